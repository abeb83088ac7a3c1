"""The loss engine against fp64 autograd; the same body runs on the CPU, on a GPU and under Triton's interpreter."""

import math

import pytest
import torch
from devices import DEVICE, INTERPRETED, compiled_only, interpret
from flops import Flops
from loss_case import assert_near as _assert_near
from loss_case import double as _double
from loss_case import grads as _grads
from loss_case import loss_case

import cosmo_fast.ops.linear_head as linear_head
from cosmo_fast.objectives import Objective, cpgd, grpo, sft
from cosmo_fast.ops import linear_logprobs, linear_logprobs_reference, linear_policy_loss
from cosmo_fast.ops.linear_policy_loss import linear_policy_loss_reference

interpret("vocab_stats", "vocab_stats", "vocab_grad_")


def _case(*arguments, **options):
    return loss_case(*arguments, **options, device=DEVICE)


OBJECTIVES = {
    "sft": sft(),
    "grpo": grpo(beta=0.1, entropy_coef=0.05),
    "gspo": grpo(importance_sampling_level="sequence", beta=0.1, kl="k2"),
    "cpgd": cpgd(beta=0.1, kl="k1", entropy_coef=0.05),
    "entropy": Objective("entropy", lambda logp, entropy, batch: (-entropy, {})),
}


# --- against fp64 ---


@pytest.mark.parametrize("chunk_rows", [3, 7, 4096])
@pytest.mark.parametrize("options", ["plain", "temperature", "per row and cap"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_gradients_equal_the_reference(name, options, chunk_rows):
    hidden, weight, bias, batch = _case()
    rows = torch.rand(len(batch), generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(DEVICE) + 0.5
    how = {
        "plain": {},
        "temperature": {"temperature": 0.7},
        "per row and cap": {"temperature": rows, "logit_softcap": 3.0},
    }[options]
    output = linear_policy_loss(hidden, weight, batch, OBJECTIVES[name], bias=bias, chunk_rows=chunk_rows, **how)
    reference = linear_policy_loss_reference(hidden, weight, batch, OBJECTIVES[name], bias=bias, **how)
    _assert_near([output.loss], [reference])
    _assert_near(_grads(output.loss, hidden, weight, bias), _grads(reference, hidden, weight, bias))
    expected = linear_logprobs_reference(hidden, weight, batch.targets, bias=bias, **how)
    _assert_near((output.logp, output.entropy), [x.detach() * (batch.weight != 0) for x in expected])


@compiled_only
@pytest.mark.parametrize(
    "objective",
    [sft(), *(grpo(beta=0.1, kl=k, entropy_coef=0.1) for k in ("k1", "k2", "k3"))]
    + [grpo(importance_sampling_level="sequence"), cpgd(alpha=0.0, beta=0.1), OBJECTIVES["entropy"]],
    ids=["sft", "k1", "k2", "k3", "gspo", "cpgd", "entropy"],
)
def test_gradcheck(objective):
    hidden, weight, bias, batch = _case(n=6, d=3, v=5)
    batch.old_logp = linear_logprobs(hidden, weight, batch.targets, bias=bias)[0].detach() + 0.05  # off the kinks

    def loss(h, w, b):
        return linear_policy_loss(h, w, batch, objective, bias=b, chunk_rows=4).loss

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))


@compiled_only
def test_logprobs_gradcheck_in_any_graph():
    hidden, weight, bias, batch = _case(n=6, d=3, v=5)

    def graph(h, w, b):
        logp, entropy = linear_logprobs(h, w, batch.targets, bias=b, chunk_rows=4, temperature=0.8, logit_softcap=4.0)
        return (logp.exp() * entropy).sum() + logp[2] ** 2

    assert torch.autograd.gradcheck(graph, (hidden, weight, bias))


@pytest.mark.parametrize("chunks", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_are_no_larger_than_those_of_eager_pytorch(dtype, chunks):
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter truncates to bf16; the compiled kernel rounds (tests/test_kernels_compile.py)")
    n, d, v = (24, 16, 200) if INTERPRETED else (256, 64, 3000)
    hidden, weight, _, batch = _case(n, d, v, dtype, scale=0.5)
    objective = grpo(0.99, 1e3, entropy_coef=0.05)  # no clip: whether a token is clipped is not a matter of rounding

    def run(h, w, b, function, **options):
        h, w = (x.detach().clone().requires_grad_() for x in (h, w))
        result = function(h, w, b, objective, **options)
        loss = getattr(result, "loss", result)
        return [loss.detach(), *_grads(loss, h, w)]

    wide = _double(batch)
    truth = run(hidden.double(), weight.double(), wide, linear_policy_loss_reference)
    eager = run(hidden, weight, batch, linear_policy_loss_reference)
    ours = run(hidden, weight, batch, linear_policy_loss, chunk_rows=-(-n // chunks))
    for k, (a, b, t) in enumerate(zip(ours, eager, truth, strict=True)):
        ours_error, eager_error = ((x.double() - t).norm().item() for x in (a, b))
        # No product of bf16 with an fp32 result on a CPU: each chunk's dW is rounded before it is added.
        slack = 1.5 if k == 2 and chunks > 1 and dtype == torch.bfloat16 and DEVICE == "cpu" else 1.1
        floor = 2 * torch.finfo(torch.float32).eps * t.norm().item() if k == 0 else 0.0  # one scalar: luck, not skill
        assert ours_error <= slack * eager_error + floor, (k, ours_error, eager_error)


def test_an_fp32_head_removes_the_rounding_of_bf16_logits():
    hidden, weight, _, batch = _case(16, 32, 300, torch.bfloat16)
    truth, _ = linear_logprobs_reference(hidden.double(), weight.double(), batch.targets)
    rounded, _ = linear_logprobs(hidden, weight, batch.targets)
    exact, _ = linear_logprobs(hidden, weight, batch.targets, logits_dtype=torch.float32)
    assert (exact - truth).abs().max() < 1e-4 < (rounded - truth).abs().max()
    output = linear_policy_loss(hidden, weight, batch, sft(), logits_dtype=torch.float32, chunk_rows=5)
    assert [g.dtype for g in _grads(output.loss, hidden, weight)] == [torch.bfloat16] * 2


# --- how much is computed ---


@pytest.mark.parametrize("chunk_rows", [6, 4096])
def test_three_gemms_two_with_a_frozen_head_one_without_gradient(chunk_rows):
    hidden, weight, bias, batch = _case(24, masked=0.0)
    for grads, expected in ((("h", "w"), 3), (("h",), 2), (("w",), 2), ((), 1)):
        h = hidden.detach().requires_grad_("h" in grads)
        w = weight.detach().requires_grad_("w" in grads)
        with Flops(24, 37, 8) as count:
            loss = linear_policy_loss(h, w, batch, OBJECTIVES["grpo"], chunk_rows=chunk_rows).loss
            if grads:
                loss.backward()
        assert count.total == pytest.approx(expected)


def test_sequence_objectives_pay_a_gemm_more_only_when_a_sequence_exceeds_a_chunk():
    hidden, weight, _, batch = _case(24, masked=0.0)  # sequences of 6
    for chunk_rows, expected in ((6, 3), (13, 3), (5, 4)):
        with Flops(24, 37, 8) as count:
            linear_policy_loss(hidden, weight, batch, OBJECTIVES["gspo"], chunk_rows=chunk_rows).loss.backward()
        assert count.total == pytest.approx(expected)


def test_logprobs_cost_one_gemm_and_four_with_gradients():
    hidden, weight, _, batch = _case(24)
    with Flops(24, 37, 8) as count, torch.no_grad():
        linear_logprobs(hidden, weight, batch.targets, chunk_rows=7)
    assert count.total == pytest.approx(1)
    with Flops(24, 37, 8) as count:
        linear_logprobs(hidden, weight, batch.targets, chunk_rows=7)[0].sum().backward()
    assert count.total == pytest.approx(4)


@pytest.mark.parametrize("how", [{}, {"temperature": 0.7, "logit_softcap": 2.0}])
def test_the_most_probable_tokens_come_with_the_log_probs(how):
    hidden, weight, bias, batch = _case(24)
    with Flops(24, 37, 8) as count:
        logp, entropy, top, ids = linear_logprobs(
            hidden, weight, batch.targets, bias=bias, chunk_rows=7, top_k=5, **how
        )
    assert count.total == pytest.approx(1) and not top.requires_grad
    every = torch.stack(
        [linear_logprobs_reference(hidden, weight, batch.targets * 0 + v, bias=bias, **how)[0] for v in range(37)], 1
    )
    expected, order = every.topk(5, dim=1)
    assert torch.equal(ids, order)
    _assert_near((top,), (expected.detach(),))
    _assert_near((logp, entropy), linear_logprobs_reference(hidden, weight, batch.targets, bias=bias, **how))
    _assert_near(_grads(logp.sum(), hidden), _grads(every.gather(1, batch.targets[:, None]).sum(), hidden))
    with pytest.raises(ValueError, match="top_k"):
        linear_logprobs(hidden, weight, batch.targets, top_k=38)


def test_rows_without_a_coefficient_cost_one_gemm_and_change_only_the_rounding(monkeypatch):
    hidden, weight, bias, batch = _case(24, masked=0.0)
    batch.advantage[::2] = 0.0
    results = []
    for drop in (True, False):
        if not drop:
            monkeypatch.setattr(linear_head, "compacting_rows", lambda keep: None)
        with Flops(24, 37, 8) as count:
            output = linear_policy_loss(hidden, weight, batch, grpo(0.99, 1e3), bias=bias)
            results.append((output, _grads(output.loss, hidden, weight, bias)))
        assert count.total == pytest.approx(2 if drop else 3)
    (kept, kept_grads), (whole, whole_grads) = results
    assert torch.equal(kept.loss, whole.loss) and torch.equal(kept.logp, whole.logp)
    _assert_near(kept_grads, whole_grads, 1e-14)


# --- masks and poison ---


@pytest.mark.parametrize("name", OBJECTIVES)
def test_nothing_under_the_mask_reaches_anything(name):
    clean, poisoned = (_case(masked=0.4) for _ in range(2))
    hidden, weight, bias, batch = poisoned
    under = batch.weight == 0
    with torch.no_grad():
        hidden[under] = math.nan
        for values in (batch.advantage, batch.old_logp, batch.ref_logp):
            values[under] = math.nan
        batch.old_logp[under.nonzero()[0]] = 1e30
        batch.targets[under] = -100
    temperature = torch.ones(len(batch), device=DEVICE).masked_fill(under, math.nan)
    results = []
    for h, w, b, tokens in (clean, poisoned):
        heat = temperature if tokens is batch else torch.ones_like(temperature)
        output = linear_policy_loss(h, w, tokens, OBJECTIVES[name], bias=b, temperature=heat, chunk_rows=5)
        results.append(
            [output.loss, output.logp, output.entropy, *output.metrics.values(), *_grads(output.loss, h, w, b)]
        )
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("n", [0, 9])
def test_a_batch_without_counted_tokens_has_loss_and_gradients_zero(n):
    hidden, weight, bias, batch = _case(n)
    batch.weight.zero_()
    output = linear_policy_loss(hidden, weight, batch, grpo(), bias=bias)
    assert output.loss == 0 and output.metrics == {}
    assert all(torch.equal(g, torch.zeros_like(g)) for g in _grads(output.loss, hidden, weight, bias))
    logp, _ = linear_logprobs(hidden, weight, batch.targets)
    assert logp.shape == (n,)
    assert all(g.shape == x.shape for g, x in zip(_grads(logp.sum(), hidden, weight), (hidden, weight), strict=True))


def test_zero_advantages_have_gradients_zero():
    hidden, weight, _, batch = _case()
    batch.advantage.zero_()
    output = linear_policy_loss(hidden, weight, batch, grpo())
    assert all(torch.equal(g, torch.zeros_like(g)) for g in _grads(output.loss, hidden, weight))


def test_a_nan_that_counts_is_not_hidden():
    hidden, weight, _, batch = _case(masked=0.0)
    with torch.no_grad():
        hidden[3] = math.nan
    output = linear_policy_loss(hidden, weight, batch, sft())
    assert output.loss.isnan() and output.logp.isnan().nonzero().tolist() == [[3]]


def test_a_banned_target_leaves_every_other_gradient_alone():
    hidden, weight, bias, batch = _case(masked=0.0)
    with torch.no_grad():
        bias[batch.targets[3]] = -math.inf
    logp, _ = linear_logprobs(hidden, weight, batch.targets, bias=bias)
    reference, _ = linear_logprobs_reference(hidden, weight, batch.targets, bias=bias)
    finite = reference.isfinite()
    assert not finite.all()
    found = torch.autograd.grad(logp[finite].sum(), (hidden, weight), retain_graph=True)
    _assert_near(found, _grads(reference[finite].sum(), hidden, weight))
    assert all(g.isfinite().all() for g in _grads(logp.sum(), weight))


def test_vectors_of_any_stride_and_coefficients_that_are_one_number():
    hidden, weight, _, batch = _case(masked=0.0)
    mean_entropy = Objective("mean", lambda logp, entropy, b: (-logp - 0.01 * entropy.sum() / len(entropy), {}))
    expected = linear_policy_loss_reference(hidden, weight, batch, mean_entropy)
    batch.targets = torch.stack([batch.targets, batch.targets + 1], 1)[:, 0]
    output = linear_policy_loss(hidden, weight, batch, mean_entropy)
    _assert_near([output.loss], [expected])
    _assert_near(_grads(output.loss, hidden, weight), _grads(expected, hidden, weight))
    logp, _ = linear_logprobs(hidden, weight, batch.targets)
    reference, _ = linear_logprobs_reference(hidden, weight, batch.targets)
    _assert_near(_grads(logp.sum(), hidden), _grads(reference.sum(), hidden))


# --- invariance ---


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_adds_up_over_micro_batches(name):
    hidden, weight, bias, batch = _case(24)
    whole = linear_policy_loss(hidden, weight, batch, OBJECTIVES[name], bias=bias)
    parts = [slice(0, 6), slice(6, 18), slice(18, 24)]  # between sequences
    losses = [linear_policy_loss(hidden[p], weight, batch.select(p), OBJECTIVES[name], bias=bias).loss for p in parts]
    _assert_near([sum(losses)], [whole.loss])
    _assert_near(_grads(sum(losses), hidden, weight, bias), _grads(whole.loss, hidden, weight, bias))


def test_metrics_are_means_under_the_weights():
    hidden, weight, _, batch = _case(masked=0.0)
    metrics = linear_policy_loss(hidden, weight, batch, grpo(), chunk_rows=5).metrics
    logp, entropy = linear_logprobs_reference(hidden, weight, batch.targets)
    expected = (grpo()(logp, entropy, batch)[1]["ratio"] * batch.weight).sum() / batch.weight.sum()
    torch.testing.assert_close(metrics["ratio"], expected)
    torch.testing.assert_close(metrics["entropy"], ((entropy * batch.weight).sum() / batch.weight.sum()).detach())


def test_backward_scales_accumulates_and_may_be_kept():
    hidden, weight, _, batch = _case()
    expected = _grads(linear_policy_loss_reference(hidden, weight, batch, sft()), hidden, weight)
    loss = linear_policy_loss(hidden, weight, batch, sft()).loss
    kept = torch.autograd.grad(2 * loss, (hidden, weight), retain_graph=True)
    (3 * loss).backward()
    linear_policy_loss(hidden, weight, batch, sft()).loss.backward()
    _assert_near(kept, [2 * g for g in expected])
    _assert_near((hidden.grad, weight.grad), [4 * g for g in expected])


# --- bad input ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_weight": torch.zeros(0, 8)}, "ZeRO-3"),
        ({"head_weight": torch.zeros(37, 8)}, "dtype"),
        ({"bias": torch.zeros(3, dtype=torch.float64)}, "bias"),
        ({"chunk_rows": 0}, "chunk_rows"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": torch.ones(3)}, r"\(23,\)"),
        ({"logit_softcap": -1.0}, "softcap"),
        ({"logits_dtype": torch.float16}, "logits_dtype"),
        ({"hidden": torch.zeros(22, 8, dtype=torch.float64)}, "22 rows"),
        ({"objective": lambda logp, entropy, batch: (logp.sum(), {})}, "shape"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    hidden, weight, _, batch = _case()
    arguments = {"hidden": hidden, "head_weight": weight, "batch": batch, "objective": sft(), **change}
    moved = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with pytest.raises(ValueError, match=message):
        linear_policy_loss(**moved)
