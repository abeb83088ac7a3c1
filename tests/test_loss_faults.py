"""Faults that other loss kernels have had, each a test of ours.

Others of that list are tests beside the code: poison under the mask, all masked, advantages of zero, an fp32 head for
bf16 logits, a sharded head (test_linear_policy_loss), widths that no tile divides, offsets beyond 32 bits in the CPU
kernel (test_vocab_stats).
"""

import importlib
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from devices import DEVICE
from loss_case import grads
from torch.utils._python_dispatch import TorchDispatchMode

from cosmo_fast.objectives import TokenBatch, grpo, sft, token_weights
from cosmo_fast.ops import linear_logprobs, linear_policy_loss
from cosmo_fast.ops.linear_policy_loss import linear_policy_loss_reference

ROOT = Path(__file__).resolve().parent.parent


def _case(lengths, d=8, v=11, dtype=torch.float64, seed=0):
    """hidden, weight and a batch of sequences of these lengths, near an old policy, with equal weights."""
    g = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    hidden, weight = (torch.randn(rows, d, generator=g).to(DEVICE, dtype).requires_grad_() for rows in (n, v))
    targets = torch.randint(0, v, (n,), generator=g).to(DEVICE)
    sequence = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(DEVICE)
    advantage, noise = torch.randn(n, generator=g).to(DEVICE), 0.1 * torch.randn(n, generator=g).to(DEVICE)
    with torch.no_grad():
        old = linear_logprobs(hidden, weight, targets)[0] + noise
    return hidden, weight, TokenBatch(targets, torch.full((n,), 1 / n, device=DEVICE), sequence, advantage, old)


def _subprocess(source, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, "-c", source], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_the_error_of_a_bf16_dw_is_flat_in_the_number_of_chunks():
    hidden, weight, batch = _case([256] * 2, d=16, v=48, dtype=torch.bfloat16)
    truth = _case([256] * 2, d=16, v=48, dtype=torch.bfloat16)
    wide = [x.detach().double().requires_grad_() for x in truth[:2]]
    (expected,) = grads(linear_policy_loss_reference(*wide, batch, sft()), wide[1])

    def error(dw):
        return ((dw.double() - expected).norm() / expected.norm()).item()

    errors = {}
    for rows in (512, 64, 4):
        loss = linear_policy_loss(hidden, weight, batch, sft(), chunk_rows=rows).loss
        errors[rows] = error(grads(loss, weight)[0])
    rounded = torch.zeros_like(weight)
    for a in range(0, 512, 4):  # the fault: a running sum in bf16
        part = batch.select(slice(a, a + 4))
        rounded += grads(linear_policy_loss(hidden[a : a + 4], weight, part, sft()).loss, weight)[0]
    assert max(errors.values()) <= 1.5 * errors[512] < error(rounded) / 2, (errors, error(rounded))


@pytest.mark.parametrize(
    "kind", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm", "prompt-mean-token-mean"]
)
def test_denominators_are_global_under_accumulation_and_truncation_masks(kind):
    lengths, groups, longest = [5, 4, 3, 7, 1, 4], [0, 0, 0, 1, 1, 2], 10
    truncated = 1  # its tokens are in the batch, under the mask, and in no denominator
    hidden, weight, batch = _case(lengths)
    counted = [0 if s == truncated else n for s, n in enumerate(lengths)]
    weights = token_weights(kind, counted, torch.tensor(groups), longest)
    batch.weight = torch.zeros(len(batch), device=DEVICE)
    batch.weight[batch.sequence != truncated] = weights.to(DEVICE)

    logp = linear_logprobs(hidden, weight, batch.targets)[0]
    losses = grpo()(logp, torch.zeros_like(logp), batch)[0].split(lengths)
    kept = [s for s in range(len(lengths)) if s != truncated]
    expected = {
        "token-mean": lambda: sum(losses[s].sum() for s in kept) / sum(counted),
        "seq-mean-token-mean": lambda: sum(losses[s].mean() for s in kept) / len(kept),
        "seq-mean-token-sum-norm": lambda: sum(losses[s].sum() for s in kept) / (len(lengths) * longest),
        "prompt-mean-token-mean": lambda: (
            sum(torch.cat([losses[s] for s in kept if groups[s] == p]).mean() for p in range(3)) / 3
        ),
    }[kind]()
    whole = linear_policy_loss(hidden, weight, batch, grpo()).loss
    edges = [0, 5, 9, 19, 24]  # micro-batches of whole sequences, one of them all masked
    parts = [slice(a, b) for a, b in zip(edges, edges[1:], strict=False)]
    split = sum(linear_policy_loss(hidden[p], weight, batch.select(p), grpo()).loss for p in parts)
    truth = [expected, *grads(expected, hidden, weight)]
    for loss in (whole, split):
        for got, t in zip([loss, *grads(loss, hidden, weight)], truth, strict=True):
            torch.testing.assert_close(got, t, rtol=1e-6, atol=1e-7)  # the weights are fp32


def test_the_triton_twins_reach_offsets_beyond_32_bits():
    pytest.importorskip("triton")
    source = """
import torch
from cosmo_fast.kernels import vocab_stats as twins
stride = 2**30 + 3
storage = torch.empty(2 * stride + 50, dtype=torch.bfloat16)  # 4 GiB, of which three rows are touched
logits = storage.as_strided((3, 50), (stride, 1))
logits.copy_(torch.randn(3, 50))
targets, copy, c = torch.tensor([0, 20, 49]), logits.contiguous(), torch.ones(3)
stats = twins.vocab_stats(logits, targets, None, 0.0)
assert all(torch.equal(a, b) for a, b in zip(stats, twins.vocab_stats(copy, targets, None, 0.0), strict=True))
for z in (logits, copy):
    twins.vocab_grad_(z, None, targets, *stats, c, None, None, 0.0)
assert torch.equal(logits, copy) and logits[2].abs().sum() > 0
print("reached")
"""
    assert _subprocess(source, TRITON_INTERPRET="1") == "reached\n"


def test_more_rows_than_65535_go_through_loss_andgrads():
    hidden, weight, batch = _case([35_000] * 2, d=2, v=3, dtype=torch.float32)
    got = linear_policy_loss(hidden, weight, batch, grpo(), chunk_rows=70_000).loss
    expected = linear_policy_loss_reference(hidden, weight, batch, grpo())
    for a, b in zip(grads(got, hidden, weight), grads(expected, hidden, weight), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_triton_twins_put_the_rows_on_the_grid_axis_that_holds_two_billion(monkeypatch):
    pytest.importorskip("triton")
    twins = importlib.import_module("cosmo_fast.kernels.vocab_stats")
    grids = []

    class Recorder:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *arguments, **options: None

    for kernel in ("_stats_kernel", "_grad_kernel"):
        monkeypatch.setattr(twins, kernel, Recorder())
    logits, targets, c = torch.zeros(70_000, 3), torch.zeros(70_000, dtype=torch.int64), torch.zeros(70_000)
    twins.vocab_stats(logits, targets, None, 0.0)
    twins.vocab_grad_(logits, None, targets, c, c, c, c, c, None, None, 0.0)
    assert grids == [(70_000,)] * 2  # axis 0; the other two end at 65,535


@pytest.mark.parametrize("shift", [-0.3, 0.3])
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
def test_a_ratio_exactly_at_the_clip_bound_has_its_gradient_whole_or_not_at_all(shift, advantage):
    hidden, weight, batch = _case([1])
    logp = linear_logprobs(hidden, weight, batch.targets)[0]
    batch.old_logp = logp.detach() - shift
    batch.advantage = torch.full((1,), advantage, device=DEVICE, dtype=torch.float64)
    ratio = (logp.detach() - batch.old_logp).exp().item()
    epsilon = abs(ratio - 1)  # exact, so that the bound is the ratio to the last bit
    assert ratio in (1 - epsilon, 1 + epsilon)
    loss = linear_policy_loss(hidden, weight, batch, grpo(epsilon)).loss
    assert loss == -ratio * advantage
    whole = grads(-ratio * advantage * logp.sum(), hidden, weight)
    for got, expected in zip(grads(loss, hidden, weight), whole, strict=True):
        share = (got.norm() / expected.norm()).item()
        assert share == 0 or share == pytest.approx(1, abs=1e-9)


def test_a_token_of_log_probability_minus_1e_12_keeps_it_and_itsgrads():
    gap = math.log(3e12)  # three other columns with e^-gap each
    hidden = torch.tensor([[gap]], device=DEVICE).requires_grad_()
    weight = torch.tensor([[0.0], [1.0], [0.0], [0.0]], device=DEVICE).requires_grad_()
    batch = TokenBatch(*(torch.tensor([x], device=DEVICE) for x in (1, 1.0, 0)))
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    own = wide[0] @ wide[1].t()
    other = torch.cat([own[:, :1], own[:, 2:]], 1).logsumexp(1) - own[:, 1]
    truth = torch.nn.functional.softplus(other, threshold=100).sum()  # −logp, exact in fp64
    output = linear_policy_loss(hidden, weight, batch, sft())
    assert output.logp.item() == pytest.approx(-1e-12, rel=1e-5) and output.loss.item() == -output.logp.item()
    assert linear_logprobs(hidden, weight, batch.targets)[0].item() == output.logp.item()
    for got, expected in zip(grads(output.loss, hidden, weight), grads(truth, *wide), strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=0)


class _Calls(TorchDispatchMode):
    """The names of all operations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Notes and passes on."""
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def two_ranks(tmp_path, monkeypatch):
    """A process group of this process alone, which says that it has two ranks: whoever reduces over ranks, does."""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_no_collective_is_issued_and_as_many_operations_for_48_sequences_as_for_2(two_ranks, level):
    with _Calls() as control:
        torch.distributed.all_reduce(torch.ones(1))
    assert any("c10d" in name for name in control.names)  # a collective would be seen
    seen = []
    for lengths in ([48, 48], [2] * 48):
        hidden, weight, batch = _case(lengths)
        with _Calls() as calls:
            linear_policy_loss(hidden, weight, batch, grpo(importance_sampling_level=level)).loss.backward()
        seen.append(calls.names)
    assert seen[0] == seen[1] and not any("c10d" in name for name in seen[0])


def test_nothing_is_compiled_at_the_first_call():
    source = """
import sys, time, torch
from cosmo_fast.objectives import TokenBatch, sft
from cosmo_fast.ops import linear_policy_loss
times = []
for n in (64, 64, 64, 96):  # the last has a shape of its own
    hidden, weight = (torch.randn(rows, 32, requires_grad=True) for rows in (n, 4096))
    batch = TokenBatch(torch.zeros(n, dtype=torch.int64), torch.ones(n), torch.zeros(n, dtype=torch.int64))
    start = time.perf_counter()
    linear_policy_loss(hidden, weight, batch, sft()).loss.backward()
    times.append(time.perf_counter() - start)
print(times[0], min(times[1:3]), times[3], "torch._inductor.compile_fx" in sys.modules)
"""
    first, later, other, compiler = _subprocess(source, CUDA_VISIBLE_DEVICES="").split()
    assert float(first) < 2 * float(later) + 0.5 and float(other) < 4 * float(later) + 0.1
    assert compiler == "False"
