"""The CUDA kernels of prefix_attention, by Triton's interpreter (TRITON_INTERPRET=1) or on a GPU."""

import numpy as np
import pytest
import torch
from devices import DEVICE, INTERPRETED

from cosmo_fast.ops.prefix_attention import Segments, _Triton, prefix_attention_reference

triton = pytest.importorskip("triton", reason="the CUDA kernels need triton (pip install -r requirements-dev.txt)")
from cosmo_fast.kernels import prefix_attention as twins  # noqa: E402

pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="needs a GPU, or TRITON_INTERPRET=1 (tests/test_kernels_compile.py)"
)

HALVES = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]  # its tl.dot multiplies the bits of bf16


def packed(*groups):
    """[all prompts | all responses] of (prompt length, its responses' lengths): queries and keys are the same rows."""
    lengths = [prompt for prompt, _ in groups] + [n for _, responses in groups for n in responses]
    starts = (np.cumsum(lengths) - lengths).tolist()
    rows = [(start, n, start, n, 0, 0) for start, n in zip(starts, lengths, strict=True)]
    owners = [i for i, (_, responses) in enumerate(groups) for _ in responses]
    for at, owner in enumerate(owners, len(groups)):
        rows[at] = (*rows[at][:4], starts[owner], lengths[owner])
    return np.array(rows, dtype=np.int64)


def stored(*segments):
    """Queries alone over a store of keys: (q_length, k_start, k_length, prefix_start, prefix_length) of each."""
    starts = np.cumsum([0, *(s[0] for s in segments)])
    return np.array([(start, *s) for start, s in zip(starts, segments, strict=False)], dtype=np.int64)


LAYOUTS = {
    "one prompt alone": packed((35, [])),
    "one token each": packed((1, [1])),
    "ragged groups": packed((34, [4, 33]), (3, [1]), (5, [6, 2])),
    "a prompt without responses": packed((4, [3, 3]), (6, []), (5, [2])),
    "an empty response": packed((4, [0, 3]), (35, [2])),
    "no prompt": packed((0, [5, 34]), (0, [3])),
    "short responses share tiles": packed((33, [1, 7, 2, 9, 3])),
    "decoding": stored(
        (1, 70, 5, 3, 37), (1, 80, 1, 3, 37), (1, 90, 39, 3, 37), (1, 140, 2, 50, 20), (1, 150, 3, 0, 0)
    ),
    "suffixes over stored keys": stored((7, 40, 12, 0, 40), (33, 60, 40, 0, 40), (2, 110, 2, 104, 5)),
    "overlapping prefixes": stored((4, 50, 4, 0, 40), (3, 60, 6, 20, 30), (2, 0, 50, 0, 0)),
}


def inputs(table, heads, kv_heads, size, dtype=torch.float32, seed=0):
    """q, k, v (k and v every second row of a wider store), and the gradient of out."""
    g = torch.Generator().manual_seed(seed)
    ends = [int((table[:, c] + table[:, c + 1]).max()) for c in (0, 2, 4)]
    q, grad = (torch.randn(ends[0], heads, size, generator=g).to(DEVICE, dtype) for _ in range(2))
    store = torch.randn(max(ends[1:]) + 3, 2, 2, kv_heads, size, generator=g).to(DEVICE, dtype)
    return q, store[:, 0, 1], store[:, 1, 0], grad


def dense(q, k, v, grad, table):
    """out, dq, dk, dv of the reference in fp64."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    out = prefix_attention_reference(q, k, v, Segments(table))
    return out.detach(), *torch.autograd.grad(out, (q, k, v), grad.double())


def ours(q, k, v, grad, table):
    segments, scale = Segments(table), q.shape[-1] ** -0.5
    out, lse = twins.prefix_attention(q, k, v, segments, scale)
    return out, *twins.prefix_attention_backward(grad, q, k, v, out, lse, segments, scale)


@pytest.fixture
def idle(monkeypatch):
    """A GPU with little to do: no tile holds two segments, each query head's part of dk and dv is summed apart."""
    monkeypatch.setattr(twins, "_processors", lambda device: 500)


def check_against_dense(table, heads, kv_heads, size):
    arguments = inputs(table, heads, kv_heads, size)
    for a, b in zip(ours(*arguments, table), dense(*arguments, table), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_values_and_gradients_equal_dense_attention(name):
    check_against_dense(LAYOUTS[name], 4, 2, 16)


@pytest.mark.parametrize("name", ["short responses share tiles", "decoding"])
def test_an_idle_gpu_gets_more_programs_and_the_same_results(name, idle):
    check_against_dense(LAYOUTS[name], 4, 2, 16)


@pytest.mark.parametrize("heads, kv_heads, size", [(1, 1, 20), (8, 1, 64), (7, 1, 80), (3, 3, 24), (6, 2, 128)])
def test_any_head_size_and_group_of_heads(heads, kv_heads, size):
    check_against_dense(packed((34, [4, 5]), (3, [1])), heads, kv_heads, size)


def test_what_the_public_op_calls_on_a_gpu_is_differentiable():
    table = LAYOUTS["ragged groups"]
    q, k, v, grad = inputs(table, 4, 2, 16)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = _Triton.apply(*leaves, Segments(table), 16**-0.5)
    found = torch.autograd.grad(out, leaves, grad.transpose(0, 1).contiguous().transpose(0, 1))
    for a, b in zip((out, *found), dense(q, k, v, grad, table), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", HALVES)
def test_error_in_half_precision_stays_near_that_of_dense_attention(dtype):
    table = packed((70, [9, 40, 1]))
    arguments = inputs(table, 4, 2, 64, dtype)
    truth, got = dense(*arguments, table), ours(*arguments, table)
    leaves = [x.detach().requires_grad_() for x in arguments[:3]]
    out = prefix_attention_reference(*leaves, Segments(table))
    eager = (out.detach(), *torch.autograd.grad(out, leaves, arguments[3]))
    for a, b, t in zip(got, eager, truth, strict=True):
        assert a.dtype == dtype and (a - t).norm() <= 1.1 * (b - t).norm()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_shared_alone_permuted_and_decoded_rows_are_bitwise_equal(dtype, monkeypatch):
    table = packed((34, [4, 35, 5]), (6, [3, 2]))
    q, k, v, _ = inputs(table, 4, 2, 16, dtype)
    out, lse = twins.prefix_attention(q, k, v, Segments(table), 0.25)
    assert lse.dtype == torch.float32

    def same(rows, own):
        assert own[:, 1].sum() == len(rows)
        got, log = twins.prefix_attention(q[rows], k, v, Segments(own), 0.25)
        assert torch.equal(got, out[rows]) and torch.equal(log, lse[rows])

    for start, length, *rest in table.tolist():  # each segment alone
        same(torch.arange(start, start + length), np.array([[0, length, *rest]]))
    order = [3, 1, 6, 0, 2, 5, 4]  # segments in another order, so that other segments share its tiles
    rows = torch.cat([torch.arange(table[i, 0], table[i, 0] + table[i, 1]) for i in order])
    mixed = table[order]
    mixed[:, 0] = np.cumsum(mixed[:, 1]) - mixed[:, 1]
    same(rows, mixed)
    ends = table[2:, 0] + table[2:, 1] - 1  # the last token of every response, decoded together
    last = table[2:].copy()
    last[:, 0], last[:, 1] = np.arange(len(last)), 1
    same(torch.from_numpy(ends), last)
    monkeypatch.setattr(twins, "_processors", lambda device: 500)
    same(torch.arange(len(q)), table)


@pytest.mark.parametrize("poisoned", [1, 3], ids=["prompt", "response"])
def test_nan_in_one_segment_reaches_no_other(poisoned):
    table = packed((7, [4, 9]), (35, [1, 2, 3]))  # the responses to each prompt share a tile
    q, k, v, grad = inputs(table, 4, 2, 16)
    clean = ours(q, k, v, grad, table)
    start, length = table[poisoned, :2]
    rows = [range(s, s + n) for s, n, *_, prefix, size in table.tolist() if poisoned == 1 and size and prefix == start]
    touched = torch.zeros(len(q), dtype=torch.bool, device=DEVICE)
    touched[[*range(start, start + length), *(i for r in rows for i in r)]] = True
    for x in (q, k, v):
        x[start : start + length] = float("nan")
    out, *gradients = ours(q, k, v, grad, table)
    assert torch.equal(out[~touched], clean[0][~touched]) and out[touched].isnan().any()
    if poisoned == 3:  # its prompt's keys get its NaN
        prompt = table[poisoned, 4]
        touched[prompt : prompt + table[poisoned, 5]] = True
    keys = torch.zeros(len(k), dtype=torch.bool, device=DEVICE)
    keys[: len(touched)] = touched
    assert torch.equal(gradients[0][~touched], clean[1][~touched])
    for a, b in zip(gradients[1:], clean[2:], strict=True):
        assert torch.equal(a[~keys], b[~keys])


def test_what_the_kernels_do_not_take_is_refused():
    segments = Segments(packed((3, [])))
    for size, heads, dtype, message in (
        (16, 2, torch.float64, "must all be bfloat16, float16 or float32"),
        (257, 2, torch.bfloat16, "at most 256"),
        (16, 64, torch.float32, "at most 32 to one"),
    ):
        q, k = (torch.zeros(3, n, size, dtype=dtype, device=DEVICE) for n in (heads, 1))
        with pytest.raises(ValueError, match=message):
            twins.prefix_attention(q, k, k, segments, 1.0)
    q = torch.zeros(3, 1, 16, device=DEVICE)
    with pytest.raises(ValueError, match="last axis"):
        twins.prefix_attention(q, q.transpose(0, 2).contiguous().transpose(0, 2), q, segments, 1.0)
