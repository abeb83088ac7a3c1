"""Exact KL against fp64 autograd; the same body runs on the CPU, on a GPU and under Triton's interpreter."""

import math

import pytest
import torch
from devices import DEVICE, INTERPRETED, compiled_only, interpret
from flops import Flops
from loss_case import assert_near

from cosmo_fast.ops.linear_kl import linear_kl, linear_kl_reference
from cosmo_fast.ops.vocab_kl import KINDS, vocab_kl_, vocab_kl_reference

interpret("vocab_kl", "vocab_kl_")
bf16_rounds = pytest.mark.skipif(INTERPRETED, reason="the interpreter truncates to bf16")
EVERY = [(kind, 0.5) for kind in KINDS] + [("js", 0.25)]


def _case(n=17, d=6, e=4, v=37, dtype=torch.float64, masked=0.3, scale=1.0):
    """Six leaves (hidden, weight, bias of the policy and of the reference) and the weights of the tokens."""
    g = torch.Generator().manual_seed(0)

    def leaf(*shape):
        return (scale * torch.randn(*shape, generator=g, dtype=torch.float64)).to(DEVICE, dtype).requires_grad_()

    leaves = leaf(n, d), leaf(v, d), leaf(v), leaf(n, e), leaf(v, e), leaf(v)
    weight = torch.rand(n, generator=g, dtype=torch.float64) * (torch.rand(n, generator=g) >= masked)
    return leaves, weight.to(DEVICE)


def _run(function, leaves, weight, kind, beta=0.5, **options):
    hidden, head, bias, ref_hidden, ref_head, ref_bias = leaves
    biases = {"bias": bias, "ref_bias": ref_bias}
    return function(hidden, head, ref_hidden, ref_head, weight, kind, beta=beta, **biases, **options)


def _grads(loss, leaves):
    return torch.autograd.grad(loss, [x for x in leaves if x is not None])


def _pair(n, v, dtype=torch.float32, apart=1.0, seed=0):
    """Logits of a policy and of a reference so far apart."""
    g = torch.Generator().manual_seed(seed)
    y = 3 * torch.randn(n, v, generator=g, dtype=torch.float64)
    x = y + apart * torch.randn(n, v, generator=g, dtype=torch.float64)
    return y.to(DEVICE, dtype), x.to(DEVICE, dtype)


# --- against fp64 ---


@pytest.mark.parametrize("chunk_rows", [7] if INTERPRETED else [3, 4096])
@pytest.mark.parametrize("options", ["plain", "temperature", "per row and caps"])
@pytest.mark.parametrize(("kind", "beta"), EVERY)
def test_loss_and_six_gradients_equal_the_reference(kind, beta, options, chunk_rows):
    leaves, weight = _case()
    rows = torch.linspace(0.5, 1.5, len(weight), dtype=torch.float64, device=DEVICE)
    how = {
        "plain": {},
        "temperature": {"temperature": 0.75},
        "per row and caps": {"temperature": rows, "logit_softcap": 3.0, "ref_logit_softcap": 5.0},
    }[options]
    output = _run(linear_kl, leaves, weight, kind, beta, chunk_rows=chunk_rows, **how)
    reference = _run(linear_kl_reference, leaves, weight, kind, beta, **how)
    assert_near([output.loss, (output.kl * weight).sum()], [reference, reference.detach()])
    assert_near(_grads(output.loss, leaves), _grads(reference, leaves))
    assert not output.kl.requires_grad and torch.equal(output.kl == 0, weight == 0)


def test_without_weights_and_biases_the_loss_is_the_mean():
    leaves, _ = _case()
    leaves = [*leaves[:2], None, *leaves[3:5], None]
    output, reference = (_run(f, leaves, None, "reverse") for f in (linear_kl, linear_kl_reference))
    assert_near([output.loss, output.kl.mean()], [reference, reference.detach()])
    assert_near(_grads(output.loss, leaves), _grads(reference, leaves))


@compiled_only
@pytest.mark.parametrize(("kind", "beta"), EVERY)
def test_gradcheck(kind, beta):
    leaves, weight = _case(n=4, d=3, e=2, v=5)
    how = {"chunk_rows": 3, "temperature": 0.75, "logit_softcap": 4.0}
    assert torch.autograd.gradcheck(lambda *x: _run(linear_kl, x, weight, kind, beta, **how).loss, leaves)


@pytest.mark.parametrize("chunks", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=bf16_rounds)])
@pytest.mark.parametrize("kind", KINDS)
def test_errors_are_no_larger_than_those_of_eager_pytorch(kind, dtype, chunks):
    n, d, v = (24, 16, 300) if INTERPRETED else (128, 64, 2000)
    leaves, weight = _case(n, d, d, v, dtype, scale=0.5)
    weight = weight.float()

    def run(function, leaves, weight, **options):
        leaves = [x.detach().clone().requires_grad_() for x in leaves]
        result = _run(function, leaves, weight, kind, **options)
        loss = getattr(result, "loss", result)
        return [loss.detach(), *_grads(loss, leaves)]

    truth = run(linear_kl_reference, [x.double() for x in leaves], weight.double())
    eager = run(linear_kl_reference, leaves, weight)
    ours = run(linear_kl, leaves, weight, chunk_rows=-(-n // chunks))
    for k, (a, b, t) in enumerate(zip(ours, eager, truth, strict=True)):
        ours_error, eager_error = ((x.double() - t).norm().item() for x in (a, b))
        # No product of bf16 with an fp32 result on a CPU: each chunk's dW is rounded before it is added.
        slack = 1.5 if k in (2, 5) and chunks > 1 and dtype == torch.bfloat16 and DEVICE == "cpu" else 1.1
        floor = 2 * torch.finfo(torch.float32).eps * t.norm().item() if k == 0 else 0.0  # one scalar: luck, not skill
        assert ours_error <= slack * eager_error + floor, (k, ours_error, eager_error)


# --- the rows ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("apart", [1e-3, 1e-2, 0.1, 2.0])
def test_small_divergences_keep_their_digits(kind, apart):
    y, x = _pair(32, 400 if INTERPRETED else 5000, apart=apart)
    truth = vocab_kl_reference(y.double(), x.double(), kind)
    ours, eager = vocab_kl_(y, x, kind), vocab_kl_reference(y, x, kind)
    relative = [((k - truth) / truth).abs().max().item() for k in (ours, eager)]
    assert relative[0] <= min(relative[1], 1e-6 / apart + 2e-5) and (ours > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=bf16_rounds)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flat_first", [False, True])
@pytest.mark.parametrize(("v", "peak", "noise"), [(32768, 16, 0.01), (32768, 10, 0.5), (151936, 10, 0.02)])
def test_a_peaked_row_against_a_flat_one_keeps_its_digits(v, peak, noise, flat_first, kind, dtype):
    g, n = torch.Generator().manual_seed(0), 1 if INTERPRETED else 4
    peaked, flat = torch.randn(n, v, generator=g), noise * torch.randn(n, v, generator=g)
    peaked[torch.arange(n), torch.randint(0, v, (n,), generator=g)] += peak
    pair = [z.to(DEVICE, dtype) for z in ((flat, peaked) if flat_first else (peaked, flat))]

    def eager(pair):
        leaves = [z.clone().requires_grad_() for z in pair]
        kl = vocab_kl_reference(*leaves, kind)
        return [kl.detach(), *torch.autograd.grad(kl.sum(), leaves)]

    truth, theirs = eager([z.double() for z in pair]), eager(pair)
    ours = [vocab_kl_(*pair, kind, torch.ones(n, device=DEVICE), wanted=(True, True)), *pair]
    for k, (a, b, t) in enumerate(zip(ours, theirs, truth, strict=True)):
        ours_error, eager_error = ((x.double() - t).norm().item() for x in (a, b))
        floor = 2 * torch.finfo(torch.float32).eps * t.norm().item()
        assert ours_error <= max(1.1 * eager_error, floor), (k, ours_error, eager_error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_identical_rows_have_zero_divergence_and_gradient(kind, dtype):
    y, _ = _pair(6, 300 if INTERPRETED else 2500, dtype)
    y[1, ::3] = -math.inf
    x = y.clone()
    coefficient = torch.ones(6, device=DEVICE, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    temperature = torch.full_like(coefficient, 0.7)
    kl = vocab_kl_(y, x, kind, coefficient, wanted=(True, True), temperature=temperature)
    assert all(torch.equal(z, torch.zeros_like(z)) for z in (kl, y, x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=bf16_rounds), torch.float64])
@pytest.mark.parametrize("v", [1, 2, 37, 1025, pytest.param(4097, marks=compiled_only)])
def test_rows_of_any_width_and_stride_write_only_what_is_wanted(v, dtype, kind):
    y, x = _pair(4, v + 5, dtype)
    expected = [z[:, :v].double().requires_grad_() for z in (y, x)]
    kl = vocab_kl_reference(*expected, kind)
    grads = torch.autograd.grad(kl.sum(), expected)
    ones = torch.ones(4, device=DEVICE, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = {"rtol": 1e-2, "atol": 1e-4} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-6}
    for wanted in ((False, False), (True, False), (False, True), (True, True)):
        storage = [y.clone(), x.clone()]
        sides = [z[:, :v] for z in storage]
        got = vocab_kl_(*sides, kind, ones if any(wanted) else None, wanted=wanted)
        torch.testing.assert_close(got.double(), kl.detach(), rtol=1e-5, atol=1e-6)
        for side, before, whole, want, grad in zip(sides, (y, x), storage, wanted, grads, strict=True):
            assert torch.equal(whole[:, v:], before[:, v:])
            if want:
                torch.testing.assert_close(side.double(), grad, **tolerance)
            else:
                assert torch.equal(side, before[:, :v])


@pytest.mark.parametrize("order", ["rising", "falling", "first block banned"])
@pytest.mark.parametrize("kind", KINDS)
def test_maxima_that_move_late_and_far_lose_nothing(kind, order):
    v = 500 if INTERPRETED else 3000
    banned = 7 * v // 10
    y, x = _pair(3, v, torch.float64)
    ramp = torch.linspace(0, 2000, v, dtype=torch.float64, device=DEVICE)
    if order == "first block banned":
        y[0, :banned], x[:2, :banned] = -math.inf, -math.inf
        y[1, :banned] = -math.inf
        y[2, :banned] = -1e30
    else:
        y += ramp if order == "rising" else -ramp
        x += 0.9 * ramp if order == "rising" else -1.1 * ramp
    kl, expected = vocab_kl_(y, x, kind), vocab_kl_reference(y, x, kind)
    if order == "first block banned":
        expected[:2] = vocab_kl_reference(y[:2, banned:], x[:2, banned:], kind)
    torch.testing.assert_close(kl, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_banned_by_the_lowest_number_are_as_if_cut_off(kind, dtype):
    y, x = _pair(3, 3000, dtype)
    temperature = torch.full((3,), 0.7, device=DEVICE, dtype=torch.promote_types(dtype, torch.float32))
    cut = [z[:, 2048:].clone() for z in (y, x)]
    y[:, :2048] = x[:, :2048] = torch.finfo(dtype).min
    results = [
        vocab_kl_(*z, kind, torch.ones_like(temperature), wanted=(True, True), temperature=temperature)
        for z in ((y, x), cut)
    ]
    torch.testing.assert_close(*results, rtol=1e-6, atol=0)
    for z, c in zip((y, x), cut, strict=True):
        torch.testing.assert_close(z[:, 2048:], c, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-9)
        assert not z[:, :2048].any()


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_banned_on_both_sides_do_not_count_and_on_one_side_are_infinite(kind):
    y, x = _pair(5, 40)
    y[0, 3:9] = x[0, 3:9] = -math.inf
    x[1, 7] = -math.inf  # the policy draws what the reference bans
    y[2, 7] = -math.inf
    x[3, 7], y[3, 7] = -math.inf, -1e9  # ... and what it never draws anyway
    y[4, 7] = math.nan
    left = [k for k in range(40) if not 3 <= k < 9]
    before = [y.clone(), x.clone()]
    kl = vocab_kl_(y, x, kind, torch.ones(5, device=DEVICE), wanted=(True, True))
    expected = [z[:1, left].double().requires_grad_() for z in before]
    truth = vocab_kl_reference(*expected, kind)
    truth.sum().backward()
    torch.testing.assert_close(kl[:1].double(), truth.detach(), rtol=1e-5, atol=1e-6)
    for z, e in zip((y, x), expected, strict=True):
        torch.testing.assert_close(z[:1, left].double(), e.grad, rtol=1e-4, atol=1e-6)
        assert torch.equal(z[0, 3:9], torch.zeros(6, device=DEVICE)) and z[4].isnan().all()
    infinite = {"reverse": [1], "forward": [2], "js": []}[kind]
    assert kl.isinf().nonzero()[:, 0].tolist() == infinite and kl.isnan().nonzero()[:, 0].tolist() == [4]
    assert kl[3].isfinite() and y[3].isfinite().all() and x[3].isfinite().all()


@compiled_only
def test_offsets_beyond_32_bits_are_reached():
    stride = 2**30 + 3
    storage = torch.empty(
        2 * stride + 50, dtype=torch.bfloat16, device=DEVICE
    )  # 4 GiB, three rows of which are touched
    y, x = _pair(3, 50, torch.bfloat16)
    far = storage.as_strided((3, 50), (stride, 1)).copy_(y)
    ones, results = torch.ones(3, device=DEVICE), []
    for z in (far, y):
        results += [vocab_kl_(z, x.clone(), "reverse", ones, wanted=(True, False)), z]
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])


@compiled_only
def test_the_op_passes_opcheck():
    y, x = _pair(4, 7)
    c, t = torch.ones(4, device=DEVICE), torch.full((4,), 0.7, device=DEVICE)
    op = torch.ops.cosmo_fast.vocab_kl_
    torch.library.opcheck(op, (y.clone(), x.clone(), c, t, 3.0, 0.0, 0.0, True, True))
    torch.library.opcheck(op, (y.clone(), x.clone(), None, None, 0.0, 0.0, 0.5, False, False))


# --- how much is computed ---


@compiled_only
@pytest.mark.parametrize("chunk_rows", [5, 4096])
def test_two_gemms_and_two_more_for_each_side_with_gradients(chunk_rows):
    n, d, v = 20, 6, 37
    leaves, _ = _case(n, d, d, v)
    for wanted, expected in (((), 2), ((0,), 3), ((0, 1), 4), ((0, 3), 4), ((0, 1, 3, 4), 6)):
        sides = [x.detach().requires_grad_(k in wanted) for k, x in enumerate(leaves)]
        with Flops(n, v, d) as count:
            loss = _run(linear_kl, sides, None, "reverse", chunk_rows=chunk_rows).loss
            if wanted:
                loss.backward()
        assert count.total == pytest.approx(expected)
        assert [k for k, x in enumerate(sides) if x.grad is not None] == list(wanted)


@compiled_only
def test_rows_of_weight_zero_cost_nothing():
    leaves, _ = _case(20, 6, 6)
    weight = torch.arange(20, device=DEVICE) % 2
    with Flops(20, 37, 6) as count:
        _run(linear_kl, leaves, weight, "reverse").loss.backward()
    assert count.total == pytest.approx(3)


# --- masks, sharing, backward ---


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_under_weight_zero_reaches_anything(kind):
    clean, weight = _case()
    poisoned, _ = _case()
    under = weight == 0
    temperature = torch.full_like(weight, 0.7)
    results = []
    for leaves in (clean, poisoned):
        if leaves is poisoned:
            with torch.no_grad():
                leaves[0][under], leaves[3][under], temperature[under] = math.nan, math.inf, math.nan
        output = _run(linear_kl, leaves, weight, kind, temperature=temperature.clone(), chunk_rows=5)
        results.append([*output, *_grads(output.loss, leaves)])
    assert under.any() and all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not any(x.isnan().any() for x in results[1])


@pytest.mark.parametrize("n", [0, 5])
def test_without_counted_rows_loss_and_gradients_are_zero(n):
    leaves, weight = _case(n)
    for w in (weight * 0, None) if n == 0 else (weight * 0,):
        output = _run(linear_kl, leaves, w, "js")
        assert output.loss == 0 and torch.equal(output.kl, torch.zeros(n, dtype=torch.float64, device=DEVICE))
        assert all(
            torch.equal(g, torch.zeros_like(x)) for g, x in zip(_grads(output.loss, leaves), leaves, strict=True)
        )


def test_both_sides_may_share_tensors():
    (hidden, head, bias, ref_hidden, _, _), weight = _case(d=6, e=6)
    shared = (hidden, head, bias, ref_hidden, head, bias)
    output, reference = (_run(f, shared, weight, "reverse") for f in (linear_kl, linear_kl_reference))
    leaves = (hidden, head, bias, ref_hidden)
    assert_near(_grads(output.loss, leaves), _grads(reference, leaves))
    same = _run(linear_kl, (hidden, head, bias, hidden, head, bias), weight, "reverse")
    assert same.loss == 0 and all(torch.equal(g, torch.zeros_like(g)) for g in _grads(same.loss, leaves[:3]))


def test_backward_scales_accumulates_and_may_be_kept():
    leaves, weight = _case()
    expected = _grads(_run(linear_kl_reference, leaves, weight, "reverse"), leaves)
    loss = _run(linear_kl, leaves, weight, "reverse").loss
    kept = torch.autograd.grad(2 * loss, leaves, retain_graph=True)
    (3 * loss).backward()
    _run(linear_kl, leaves, weight, "reverse").loss.backward()
    assert_near(kept, [2 * g for g in expected])
    assert_near([x.grad for x in leaves], [4 * g for g in expected])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "k3"}, "reverse, forward, js"),
        ({"kind": "js", "beta": 1.0}, "beta"),
        ({"weight": torch.ones(3)}, r"\(17,\)"),
        ({"ref_hidden": torch.zeros(16, 4, dtype=torch.float64)}, "16 over"),
        ({"ref_head_weight": torch.zeros(36, 4, dtype=torch.float64)}, "over 36"),
        ({"ref_hidden": torch.zeros(17, 4), "ref_head_weight": torch.zeros(37, 4)}, "logits_dtype"),
        ({"temperature": 0.0}, "temperature"),
        ({"ref_logit_softcap": -1.0}, "softcap"),
        ({"chunk_rows": 0}, "chunk_rows"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    (hidden, head, _, ref_hidden, ref_head, _), _ = _case()
    arguments = {"hidden": hidden, "head_weight": head, "ref_hidden": ref_hidden, "ref_head_weight": ref_head, **change}
    moved = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with pytest.raises(ValueError, match=message):
        linear_kl(**moved)


def test_fp32_logits_of_a_bf16_policy_meet_an_fp32_reference():
    leaves, weight = _case(16, 32, 32, 300, torch.bfloat16)
    mixed = [*leaves[:3], *(x.detach().float() for x in leaves[3:])]
    truth = _run(linear_kl_reference, [x.double() for x in leaves], weight[:16], "reverse")
    loss = _run(linear_kl, mixed, weight, "reverse", logits_dtype=torch.float32).loss
    assert abs(loss - truth) < 1e-5 * truth and _grads(loss, leaves[:1])[0].dtype == torch.bfloat16
