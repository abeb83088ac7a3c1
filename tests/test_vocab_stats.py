"""The row kernels: any width, stride and content; the same body runs on the CPU, on a GPU and under the interpreter."""

import math

import pytest
import torch
from devices import DEVICE, INTERPRETED, compiled_only, interpret

from cosmo_fast.ops import vocab_stats
from cosmo_fast.ops.linear_head import compacting_rows
from cosmo_fast.ops.vocab_stats import vocab_grad_, vocab_stats_reference

interpret("vocab_stats", "vocab_stats", "vocab_grad_")


def test_logp_and_entropy_are_no_worse_than_eager_on_the_same_logits():
    for dtype in (torch.float32, torch.bfloat16):
        logits = (3 * torch.randn(64, 1001, generator=torch.Generator().manual_seed(0))).to(DEVICE, dtype)
        targets = torch.arange(64, device=DEVICE)
        truth = vocab_stats_reference(logits.double(), targets)
        for a, b, t in zip(vocab_stats(logits, targets), vocab_stats_reference(logits, targets), truth, strict=False):
            assert (a - t).norm() <= 1.1 * (b - t).norm()


def test_confident_tokens_keep_their_log_probability_and_gradient():
    logits = torch.zeros(3, 5, device=DEVICE)
    logits[:, 2] = torch.tensor([12.0, 25.0, 60.0], device=DEVICE)
    targets = torch.full((3,), 2, device=DEVICE)
    stats = vocab_stats(logits, targets)
    other = 4 * torch.exp(-logits[:, 2].double())  # 1 - p = x / (1 + x)
    torch.testing.assert_close(stats.logp.double(), -torch.log1p(other), rtol=1e-6, atol=0)
    gradient = vocab_grad_(logits.clone(), targets, stats, torch.ones(3, device=DEVICE))
    torch.testing.assert_close(gradient[:, 2].double(), other / (1 + other), rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient[:, 0].double(), -other / (1 + other) / 4, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("columns", [1, 2, 37, 2049])
def test_rows_of_any_width_stride_and_content(columns, dtype):
    g = torch.Generator().manual_seed(0)
    storage = (3 * torch.randn(6, columns + 5, generator=g)).to(DEVICE, dtype)
    targets = torch.randint(0, columns, (6,), generator=g).to(DEVICE)
    logits = storage[:, :columns]
    if columns > 2:
        logits[1, :] = -math.inf
        logits[1, targets[1]] = 2.0  # one choice
        logits[2, (targets[2] + 1) % columns] = -math.inf
        logits[3, (targets[3] + 1) % columns] = math.nan
    stats = vocab_stats(logits, targets)
    expected = vocab_stats_reference(logits, targets)
    for a, b in zip(stats, expected, strict=False):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-5, equal_nan=True)
    if columns > 2:
        assert stats.logp[1] == 0 and stats.entropy[1] == 0 and stats.logp[3].isnan()
    z = logits.clone().double().requires_grad_()
    c = torch.randn(2, 6, generator=g).to(DEVICE, stats.logp.dtype)
    logp, entropy = vocab_stats_reference(z, targets)
    good = [0, 2, 4, 5]  # autograd has NaN where a probability is 1
    (logp * c[0] + entropy * c[1])[good].sum().backward()
    untouched = storage[:, columns:].clone()
    got = vocab_grad_(logits, targets, stats, c[0], c[1])
    tolerance = {"rtol": 1e-2, "atol": 1e-4} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    finite = z.grad[good].isfinite()
    torch.testing.assert_close(got[good].double()[finite], z.grad[good][finite], **tolerance)
    assert torch.equal(storage[:, columns:], untouched)
    if columns > 2:
        assert torch.equal(got[1], torch.zeros_like(got[1])) and got[3].isnan().all()


def test_a_target_that_cannot_be_drawn_has_log_probability_minus_infinity():
    logits = torch.tensor([[0.0, -math.inf, 1.0]], device=DEVICE)
    stats = vocab_stats(logits, torch.tensor([1], device=DEVICE))
    assert stats.logp == -math.inf
    torch.testing.assert_close(
        stats.entropy.double(), vocab_stats_reference(logits.double(), torch.tensor([0], device=DEVICE))[1]
    )


@pytest.mark.parametrize("kept", [[0, 1, 2], [3, 4], [0, 4], [1, 3, 4], [0, 1, 2, 3, 4], []])
def test_compacted_rows_equal_selected_rows(kept):
    logits, targets = torch.randn(5, 9, device=DEVICE), torch.arange(5, device=DEVICE)
    stats, c = vocab_stats(logits, targets), torch.randn(5, device=DEVICE)
    keep = torch.zeros(5, dtype=torch.bool, device=DEVICE)
    keep[kept] = True
    slots = compacting_rows(keep)
    whole = vocab_grad_(logits.clone(), targets, stats, c)
    got = vocab_grad_(logits.clone(), targets, stats, c, rows=slots)
    assert sorted(range(5) if slots is None else slots.tolist()) == kept
    assert torch.equal(got, whole if slots is None else whole[slots])


@compiled_only
def test_offsets_beyond_32_bits_are_reached():
    stride = 2**30 + 3
    storage = torch.empty(
        2 * stride + 50, dtype=torch.bfloat16, device=DEVICE
    )  # 4 GiB, of which three rows are touched
    logits = storage.as_strided((3, 50), (stride, 1))
    logits.copy_(torch.randn(3, 50))
    targets = torch.tensor([0, 20, 49], device=DEVICE)
    stats, copy = vocab_stats(logits, targets), logits.contiguous()
    assert torch.equal(stats.logp, vocab_stats(copy, targets).logp)
    c = torch.ones(3, device=DEVICE)
    assert torch.equal(vocab_grad_(logits, targets, stats, c), vocab_grad_(copy, targets, stats, c))


@compiled_only
def test_more_rows_than_a_grid_axis_holds():
    logits, targets = torch.randn(70_000, 3, device=DEVICE), torch.ones(70_000, dtype=torch.int64, device=DEVICE)
    torch.testing.assert_close(vocab_stats(logits, targets).logp, logits.log_softmax(-1)[:, 1], rtol=1e-5, atol=1e-6)


@compiled_only
def test_the_ops_pass_opcheck():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 7, generator=g).to(DEVICE)
    targets, temperature = torch.tensor([0, 6, 3, 3], device=DEVICE), torch.full((4,), 0.7, device=DEVICE)
    ops = torch.ops.cosmo_fast
    torch.library.opcheck(ops.vocab_stats, (logits.clone().requires_grad_(), targets, temperature, 3.0))
    torch.library.opcheck(ops.vocab_stats, (logits, targets, None, 0.0))
    stats, c = ops.vocab_stats(logits, targets, None, 0.0), torch.ones(4, device=DEVICE)
    torch.library.opcheck(ops.vocab_grad_, (logits.clone(), None, targets, *stats, c, c, None, 0.0))
    torch.library.opcheck(
        ops.vocab_grad_, (logits.clone(), torch.tensor([0, 3], device=DEVICE), targets, *stats, c, None, None, 0.0)
    )


@compiled_only
def test_vocab_stats_is_differentiable():
    logits = torch.randn(4, 7, dtype=torch.float64, device=DEVICE, requires_grad=True)
    targets = torch.tensor([0, 6, 3, 3], device=DEVICE)
    assert torch.autograd.gradcheck(lambda z: tuple(vocab_stats(z, targets, temperature=0.7)[:2]), (logits,))


@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="a GPU is not asked for the values of its indices")
def test_indices_outside_their_range_are_refused():
    logits, targets = torch.randn(4, 7), torch.tensor([0, 6, 3, 3])
    with pytest.raises(RuntimeError, match=r"targets\[1\] = 7"):
        vocab_stats(logits, targets.clamp(max=6).index_fill(0, torch.tensor([1]), 7))
    stats = vocab_stats(logits, targets)
    with pytest.raises(RuntimeError, match=r"rows\[0\] = 1"):
        vocab_grad_(logits, targets, stats, torch.ones(4), rows=torch.tensor([1, 3]))


def test_an_overflow_at_the_target_is_not_certainty():
    logits = torch.zeros(1, 5, device=DEVICE)
    logits[0, 2] = math.inf
    assert vocab_stats(logits, torch.tensor([2], device=DEVICE)).logp.isnan().all()
