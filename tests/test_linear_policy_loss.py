"""The loss engine against fp64 autograd; the same body runs on the CPU, on a GPU and under Triton's interpreter."""

import math
import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cosmo_fast.ops.linear_head as linear_head
from cosmo_fast.objectives import Objective, TokenBatch, cpgd, grpo, sft
from cosmo_fast.ops import linear_logprobs, linear_logprobs_reference, linear_policy_loss
from cosmo_fast.ops.linear_policy_loss import linear_policy_loss_reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
if INTERPRETED:  # the Triton twins take the C++ kernels' place, so that everything below runs through them
    from cosmo_fast.kernels import vocab_stats as twins

    _library = torch.library.Library("cosmo_fast", "IMPL")
    _library.impl("vocab_stats", twins.vocab_stats, "CPU", allow_override=True)
    _library.impl("vocab_grad_", twins.vocab_grad_, "CPU", allow_override=True)
compiled_only = pytest.mark.skipif(INTERPRETED, reason="too slow for, or no business of, the interpreter")

OBJECTIVES = {
    "sft": sft(),
    "grpo": grpo(beta=0.1, entropy_coef=0.05),
    "gspo": grpo(importance_sampling_level="sequence", beta=0.1, kl="k2"),
    "cpgd": cpgd(beta=0.1, kl="k1", entropy_coef=0.05),
    "entropy": Objective("entropy", lambda logp, entropy, batch: (-entropy, {})),
}


def _case(n=23, d=8, v=37, dtype=torch.float64, seed=0, masked=0.3, scale=1.0):
    """hidden, weight, bias (leaves) and a batch of 4 sequences, some tokens masked; a policy near the old one."""
    g = torch.Generator().manual_seed(seed)

    def leaf(*shape):
        return (scale * torch.randn(*shape, generator=g, dtype=torch.float64)).to(DEVICE, dtype).requires_grad_()

    hidden, weight, bias = leaf(n, d), leaf(v, d), leaf(v)
    targets = torch.randint(0, v, (n,), generator=g).to(DEVICE)
    keep = (torch.rand(n, generator=g) >= masked).to(DEVICE)
    sequence = torch.arange(n, device=DEVICE) * 4 // max(n, 1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    with torch.no_grad():
        logp, _ = linear_logprobs_reference(hidden.double(), weight.double(), targets, bias=bias.double())
    noise = [0.3 * torch.randn(n, generator=g, dtype=torch.float64).to(DEVICE) for _ in range(3)]
    batch = TokenBatch(
        targets,
        (torch.rand(n, generator=g).to(DEVICE) + 0.1) * keep / max(n, 1),
        sequence,
        (noise[0] * 3).to(wide),
        (logp + noise[1]).to(wide),
        (logp + noise[2]).to(wide),
    )
    return hidden, weight, bias, batch


def _double(batch):
    given = {k: x for k, x in vars(batch).items() if x is not None}
    return TokenBatch(**{k: x.double() if x.is_floating_point() else x for k, x in given.items()})


def _grads(loss, *leaves):
    return torch.autograd.grad(loss, leaves)


def _assert_near(got, expected, tolerance=1e-12):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * max(1.0, b.abs().max().item() if b.numel() else 1.0))


class Flops(TorchDispatchMode):
    """Multiply-adds of every matrix product, in units of one n·v·d product."""

    def __init__(self, n, v, d):
        super().__init__()
        self.unit, self.total, self.gemms = n * v * d, 0.0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Counts and passes on."""
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            a, b = args[-2:] if name == "mm" else args[1:3]
            self.total += a.shape[0] * a.shape[1] * b.shape[1] / self.unit
            self.gemms += 1
        return func(*args, **(kwargs or {}))


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


@pytest.mark.parametrize("chunk_rows", [7, 4096])
@pytest.mark.parametrize("tied", [False, True])
def test_dw_may_be_added_to_the_weights_gradient_itself(tied, chunk_rows):
    hidden, weight, bias, batch = _case()
    results = []
    for accumulate in (False, True):
        w, b = weight.detach().clone().requires_grad_(), bias.detach().clone().requires_grad_()
        h = w[batch.targets] * 1.5 if tied else hidden.detach().clone().requires_grad_()  # an embedding of the tokens
        for _ in range(2):
            options = {"bias": b, "chunk_rows": chunk_rows, "accumulate_weight_grad": accumulate}
            linear_policy_loss(h, w, batch, grpo(0.9), **options).loss.backward(retain_graph=tied and not accumulate)
            h = w[batch.targets] * 1.5 if tied else h
        results.append([w.grad, b.grad, *([] if tied else [h.grad])])
    _assert_near(*results)


def test_dw_in_the_weights_gradient_keeps_its_dtype_and_needs_no_second_matrix():
    hidden, weight, _, batch = _case(16, 32, 300, torch.bfloat16)
    for chunk_rows in (5, 4096):
        weight.grad = None
        expected = _grads(linear_policy_loss(hidden, weight, batch, sft(), chunk_rows=chunk_rows).loss, weight)[0]
        options = {"chunk_rows": chunk_rows, "accumulate_weight_grad": True}
        linear_policy_loss(hidden, weight, batch, sft(), **options).loss.backward()
        assert weight.grad.dtype == torch.bfloat16
        torch.testing.assert_close(weight.grad, expected, rtol=1e-2, atol=1e-4)


def test_dw_is_not_added_where_something_else_must_see_it():
    hidden, weight, _, batch = _case()

    def run(w, backward=lambda loss: loss.backward()):
        backward(linear_policy_loss(hidden, w, batch, sft(), accumulate_weight_grad=True).loss)

    with pytest.raises(ValueError, match="not a leaf"):
        run(weight * 1)
    hooked = weight.detach().clone().requires_grad_()
    hooked.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(ValueError, match="hooks"):
        run(hooked)
    managed = weight.detach().clone().requires_grad_()
    managed.ds_id = 0
    with pytest.raises(ValueError, match="DeepSpeed"):
        run(managed)
    with pytest.raises(RuntimeError, match="gradient of 1"):
        run(weight, lambda loss: (2 * loss).backward())
    with pytest.raises(RuntimeError, match="retain_graph"):
        run(weight, lambda loss: loss.backward(retain_graph=True))


@compiled_only
@pytest.mark.skipif(DEVICE != "cpu", reason="how a CPU lays out its products")
@pytest.mark.parametrize("n", [511, 512, 700])
@pytest.mark.parametrize("columns", [100, 4097])
def test_a_turned_dw_is_the_same(n, columns):
    hidden, weight, _, batch = _case(n, 24, columns, torch.bfloat16, scale=0.3)
    wide = _double(batch)
    truth = _grads(linear_policy_loss_reference(hidden.double(), weight.double(), wide, sft()), weight)[0].double()
    eager = _grads(linear_policy_loss_reference(hidden, weight, batch, sft()), weight)[0].double()
    for chunk_rows in (4096, 600):
        ours = _grads(linear_policy_loss(hidden, weight, batch, sft(), chunk_rows=chunk_rows).loss, weight)[0].double()
        assert (ours - truth).norm() <= 1.1 * (eager - truth).norm()


@compiled_only
@pytest.mark.skipif(DEVICE != "cpu", reason="ops of a CPU")
@pytest.mark.parametrize(("m", "d"), [(1, 1), (37, 5), (64, 32), (100, 70)])
def test_a_product_is_turned_into_the_gradient_bit_by_bit(m, d):
    x = torch.randn(d, m + 9, generator=torch.Generator().manual_seed(0)).bfloat16()[:, :m]
    for out in (torch.full((m, d), math.nan, dtype=torch.bfloat16), torch.rand(m, d)):
        expected = x.t() if out.dtype == torch.bfloat16 else out + x.t().float()
        torch.library.opcheck(torch.ops.cosmo_fast.add_transposed_.default, (out.clone(), x))
        torch.ops.cosmo_fast.add_transposed_(out, x)
        assert torch.equal(out, expected)
    for args in ((torch.zeros(m, d + 1), x), (torch.zeros(m, d), x.float()), (torch.zeros(m, d).double(), x)):
        with pytest.raises(RuntimeError, match="must be"):
            torch.ops.cosmo_fast.add_transposed_(*args)
    torch.library.opcheck(torch.ops.cosmo_fast.huge_pages_.default, (torch.empty(1 << 20),))


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
