"""prefix_attention against dense attention in fp64, its gradients, and that a row's bits are its own business."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from cosmo_fast.ops import Segments, prefix_attention, prefix_attention_reference

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
from merged_attention import merged_attention  # noqa: E402

DTYPES = (torch.float32, torch.bfloat16)


def table(*rows):
    return Segments(np.array(rows, dtype=np.int64).reshape(-1, 6))


def packed(prompts, responses):
    """[all prompts | all responses] from the prompts' lengths and, for each prompt, its responses' lengths."""
    starts = np.cumsum([0, *prompts])
    rows = [(start, n, start, n, 0, 0) for start, n in zip(starts, prompts, strict=False)]
    at = sum(prompts)
    for start, prompt, group in zip(starts, prompts, responses, strict=False):
        for n in group:
            rows.append((at, n, at, n, start, prompt))
            at += n
    return table(*rows)


def suffixes(prompts, responses):
    """Only the responses are queries; the prompts' keys come first."""
    given = packed(prompts, responses).table[len(prompts) :].copy()
    given[:, 0] -= sum(prompts)
    return Segments(given)


def decoded(prompt, lengths, room):
    """One new token for each response of one prompt; `room` key rows are kept for each response after the prompt."""
    return table(*((i, 1, prompt + i * room, n, 0, prompt) for i, n in enumerate(lengths)))


LAYOUTS = {
    "one prompt alone": packed([5], [[]]),
    "one token each": packed([1], [[1]]),
    "ragged groups": packed([7, 3, 12], [[4, 9], [1], [6, 2, 5]]),
    "a prompt without responses between others": packed([4, 6, 5], [[3, 3], [], [2]]),
    "an empty response": packed([4, 5], [[0, 3], [2]]),
    "several blocks and tiles": packed([150, 40], [[17, 140, 33], [64, 65]]),
    "responses over stored prompts": suffixes([70, 9], [[5, 40], [1, 2, 3]]),
    "decoding": decoded(66, [1, 7, 70, 3, 64], 80),
    "a second part of a prompt": table((0, 30, 0, 100, 0, 0)),
    "prefixes without own keys before them": table((0, 3, 20, 8, 0, 20), (3, 0, 28, 4, 0, 20), (3, 2, 32, 2, 40, 5)),
    "nothing": table(),
}


def inputs(segments, heads, shared, size, dtype, seed=0):
    """q, k, v, and k and v as every second head of a wider store."""
    queries, keys = segments.rows
    generator = torch.manual_seed(seed)  # of the gradients that a test draws after these, too
    shapes = ((queries, heads, size), (keys, 2 * shared, size), (keys, 2 * shared, size))
    q, k, v = (torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)
    return [x.requires_grad_() for x in (q, k[:, ::2], v[:, ::2])]


def gradients(f, given, segments, grad):
    out = f(*given, segments)
    return out, *torch.autograd.grad(out, given, grad)


def error(a, b):
    return (a.double() - b).norm() / b.norm()


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(
    "heads, shared, size", [(4, 4, 16), (8, 2, 64), (8, 1, 80), (6, 3, 128), (5, 1, 20), (2, 1, 256)]
)
def test_values_and_gradients_equal_dense_attention_in_fp64(name, heads, shared, size):
    given = inputs(LAYOUTS[name], heads, shared, size, torch.float64)
    grad = torch.randn_like(given[0])
    ours = gradients(prefix_attention, given, LAYOUTS[name], grad)
    for a, b in zip(ours, gradients(prefix_attention_reference, given, LAYOUTS[name], grad), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * max(1, size // 8))


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "nothing"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 4e-6), (torch.bfloat16, 3e-2)])
def test_values_and_gradients_are_near_dense_attention_in_every_dtype(name, dtype, tolerance):
    for heads, shared, size in ((8, 2, 64), (5, 1, 20)):
        given = inputs(LAYOUTS[name], heads, shared, size, dtype)
        grad = torch.randn_like(given[0])
        truth = gradients(prefix_attention_reference, [x.double() for x in given], LAYOUTS[name], grad.double())
        for a, b in zip(gradients(prefix_attention, given, LAYOUTS[name], grad), truth, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=0, atol=tolerance * float(b.detach().abs().max()) + 1e-300)


def test_gradcheck():
    given = inputs(LAYOUTS["ragged groups"], 2, 1, 5, torch.float64)
    assert torch.autograd.gradcheck(lambda *x: prefix_attention(*x, LAYOUTS["ragged groups"], scale=0.7), given)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1.1), (torch.bfloat16, 1.05)])
@pytest.mark.parametrize("size", [32, 64])
def test_error_is_no_more_than_that_of_unshared_flash_attention(dtype, bound, size):
    prompt, lengths, heads, shared = 200, [90] * 8, 8, 2
    segments = packed([prompt], [lengths])
    q, k, v = given = inputs(segments, heads, shared, size, dtype)
    grad = torch.randn_like(q)
    grad[:prompt] = 0  # unshared, a prompt is there once a response
    ours = gradients(prefix_attention, given, segments, grad)
    truth = gradients(prefix_attention_reference, [x.double() for x in given], segments, grad.double())
    rows = torch.stack([torch.cat([torch.arange(prompt), torch.arange(s, s + 90)]) for s in segments.table[1:, 0]])

    def unshared(q, k, v, segments):
        k, v = (x.float() if dtype == torch.float32 else x for x in (k, v))
        out = scaled_dot_product_attention(
            *(x[rows].transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
        ).transpose(1, 2)
        return torch.cat([out[0, :prompt], out[:, prompt:].flatten(0, 1)])

    theirs = gradients(unshared, given, segments, grad)
    for a, b, exact in zip(ours, theirs, truth, strict=True):
        assert error(a, exact) <= bound * error(b, exact)


@pytest.mark.parametrize("dtype", (torch.float64, *DTYPES))
@pytest.mark.parametrize("heads, shared, size", [(4, 2, 32), (8, 1, 20), (3, 3, 64), (6, 1, 48)])
def test_shared_packed_alone_and_decoded_give_the_same_bits(dtype, heads, shared, size):
    prompts, responses = [70, 5, 130], [[9, 66], [1], [30, 2, 65]]
    segments = packed(prompts, responses)
    q, k, v = (x.detach() for x in inputs(segments, heads, shared, size, dtype))
    out = prefix_attention(q, k, v, segments)
    for start, n, _, _, prefix, length in segments.table.tolist():
        rows = [*range(prefix, prefix + length), *range(start, start + n)]
        alone = packed([length], [[n]]) if length else packed([n], [[]])
        assert torch.equal(prefix_attention(q[rows], k[rows], v[rows], alone)[length:], out[start : start + n])
        for token in range(n):
            one = table((0, 1, start, token + 1, prefix, length))
            assert torch.equal(prefix_attention(q[start + token][None], k, v, one)[0], out[start + token])
    store = suffixes(prompts, responses)
    assert torch.equal(prefix_attention(q[sum(prompts) :], k, v, store), out[sum(prompts) :])


@pytest.mark.parametrize("dtype", DTYPES)
def test_permuting_groups_and_responses_changes_no_bit(dtype):
    segments = LAYOUTS["several blocks and tiles"]
    given = inputs(segments, 4, 2, 32, dtype)
    grad = torch.randn_like(given[0])
    base = gradients(prefix_attention, given, segments, grad)
    groups = Segments(np.ascontiguousarray(segments.table[[1, 0, 5, 6, 2, 3, 4]]))
    for a, b in zip(gradients(prefix_attention, given, groups, grad), base, strict=True):
        assert torch.equal(a, b)
    responses = Segments(np.ascontiguousarray(segments.table[[0, 1, 4, 2, 3, 6, 5]]))
    out, dq, dk, dv = gradients(prefix_attention, given, responses, grad)
    assert torch.equal(out, base[0]) and torch.equal(dq, base[1])
    for a, b in ((dk, base[2]), (dv, base[3])):  # sums over responses, in their order
        torch.testing.assert_close(a, b, rtol=0, atol=(1e-6 if dtype == torch.float32 else 1e-2) * float(b.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_changes_no_bit(dtype):
    segments, threads = packed([300, 40], [[100, 50], [20]]), torch.get_num_threads()
    given = inputs(segments, 8, 2, 32, dtype)
    grad = torch.randn_like(given[0])
    try:
        torch.set_num_threads(1)
        one = gradients(prefix_attention, given, segments, grad)
        torch.set_num_threads(2)
        two = gradients(prefix_attention, given, segments, grad)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poisoned", range(9))
def test_nan_in_one_segment_reaches_no_other(dtype, poisoned):
    segments = packed([7, 3, 12], [[4, 9], [1, 2], [6, 70]])
    q, k, v = given = inputs(segments, 4, 2, 20, dtype)
    grad = torch.randn_like(q)
    clean = gradients(prefix_attention, given, segments, grad)
    start, n, *_ = segments.table[poisoned]
    hurt = torch.zeros(len(q), dtype=torch.bool)
    hurt[start : start + n] = True
    with torch.no_grad():
        for x in given:
            x[start : start + n] = float("nan")
    for begin, length, _, _, prefix, size in segments.table.tolist():
        if size and (poisoned < 3 and prefix == start):
            hurt[begin : begin + length] = True
    out, dq, dk, dv = gradients(prefix_attention, given, segments, grad)
    assert torch.equal(out[~hurt], clean[0][~hurt]) and out[hurt].isnan().any()
    assert torch.equal(dq[~hurt], clean[1][~hurt])
    if poisoned >= 3:  # the keys of its prompt learn from it
        prefix, size = segments.table[poisoned, 4:]
        hurt[prefix : prefix + size] = True
    assert torch.equal(dk[~hurt], clean[2][~hurt]) and torch.equal(dv[~hurt], clean[3][~hurt])


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_that_no_segment_names_are_not_read_and_get_no_gradient(dtype):
    segments = decoded(66, [1, 7, 70, 3, 64], 80)
    given = inputs(table(*segments.table.tolist(), (5, 0, 390, 90, 0, 0)), 4, 2, 32, dtype)
    named = torch.zeros(480, dtype=torch.bool)
    for _, _, start, n, prefix, size in segments.table.tolist():
        named[start : start + n] = named[prefix : prefix + size] = True
    with torch.no_grad():
        given[1][~named], given[2][~named] = float("nan"), float("inf")
    out, dq, dk, dv = gradients(prefix_attention, given, segments, torch.ones_like(given[0]))
    assert all(x.isfinite().all() for x in (out, dq, dk, dv))
    assert (dk[~named] == 0).all() and (dv[~named] == 0).all() and (dv[named] != 0).any(-1).all()


@pytest.mark.parametrize("dtype", (torch.float64, *DTYPES))
def test_opcheck(dtype):
    given = inputs(LAYOUTS["ragged groups"], 4, 2, 16, dtype)
    torch.library.opcheck(torch.ops.cosmo_fast.prefix_attention, (*given, LAYOUTS["ragged groups"].tensor, 0.25))


def test_the_merged_form_of_the_benchmark_is_the_same_attention():
    segments = LAYOUTS["ragged groups"]
    given = inputs(segments, 4, 2, 16, torch.float64)
    grad = torch.randn_like(given[0])
    for a, b in zip(
        gradients(merged_attention, given, segments, grad),
        gradients(prefix_attention, given, segments, grad),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "rows, why",
    [
        ([(0, 3, 0, 2, 0, 0)], "nor k_length less than q_length"),
        ([(0, 3, 0, 3, -1, 2)], "no entry may be negative"),
        ([(0, 3, 0, 3, 0, 0), (2, 3, 3, 3, 0, 0)], "exactly once"),
        ([(1, 3, 0, 3, 0, 0)], "exactly once"),
    ],
)
def test_a_table_that_makes_no_sense_is_refused(rows, why):
    with pytest.raises(ValueError, match=why):
        table(*rows)


def test_shapes_that_do_not_fit_are_refused():
    segments = packed([5], [[2]])
    with pytest.raises(ValueError, match="4 query heads are not a multiple of 3"):
        prefix_attention(torch.zeros(7, 4, 8), torch.zeros(7, 3, 8), torch.zeros(7, 3, 8), segments)
    with pytest.raises(ValueError, match="cover 7 rows, the batch has 9"):
        prefix_attention(torch.zeros(9, 4, 8), torch.zeros(9, 4, 8), torch.zeros(9, 4, 8), segments)
    with pytest.raises(ValueError, match="name 7 key rows, there are 6"):
        prefix_attention(torch.zeros(7, 4, 8), torch.zeros(6, 4, 8), torch.zeros(6, 4, 8), segments)
    with pytest.raises(ValueError, match="of one dtype are wanted"):
        prefix_attention(torch.zeros(7, 4, 8), torch.zeros(7, 4, 8), torch.zeros(7, 4, 8).double(), segments)
    with pytest.raises(RuntimeError, match="head size must be from 1 to 256, got 257"):
        prefix_attention(*(torch.zeros(7, 1, 257) for _ in range(3)), segments)


def test_keys_that_are_both_own_and_prefix_and_entries_that_overflow_are_refused():
    with pytest.raises(ValueError, match="its own keys are also its prefix's"):
        Segments(np.array([[0, 3, 0, 3, 0, 3]]))
    with pytest.raises(ValueError, match="over 2\\^40"):
        Segments(np.array([[0, 1, 2**63 - 3, 8, 0, 0]]))


def test_a_table_that_is_changed_later_changes_nothing_and_a_second_derivative_is_refused():
    table = np.array([[0, 3, 0, 3, 0, 0]])
    layout = Segments(table)
    q, k, v = (torch.randn(3, 2, 8, requires_grad=True) for _ in range(3))
    out = prefix_attention(q, k, v, layout)
    table[0, 3] = 99
    assert layout.table[0, 3] == 3 and layout.tensor[0, 3] == 3
    [dq] = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        dq.square().sum().backward()
