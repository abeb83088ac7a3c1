"""Policy losses against their formulas, written out token by token in plain floats."""

import inspect
import math

import pytest
import torch
from policy_batch import POSITION, SEQUENCE, N, gradient_of, mates, phi, policy_batch

from cosmo_fast import objectives
from cosmo_fast.objectives import (
    DEFAULTS,
    LOSSES,
    Objective,
    TokenBatch,
    cpgd,
    dapo,
    grpo,
    gspo,
    luspo,
    objective,
    sequence_position,
    sequence_sum,
    sft,
    vespo,
)
from cosmo_fast.objectives.aggregate import KINDS as AGGREGATIONS
from cosmo_fast.ops import linear_logprobs, linear_logprobs_reference, linear_policy_loss
from cosmo_fast.ops.linear_policy_loss import linear_policy_loss_reference

# --- the formulas: i is the token, x = ln r by token, a = A; everything is a list of floats ---


def _clip(x, low, high):
    return min(max(x, low), high)


def _mean(x, i):
    return sum(x[j] for j in mates(i)) / len(mates(i))


def _ppo(r, a, low, high, bound=math.inf):
    return -min(min(r, bound) * a, _clip(r, 1 - low, 1 + high) * a)


def _gmpo(i, x, a, low, high):
    kept = [min(x[j], high) if a[j] > 0 else max(x[j], -low) for j in range(N)]
    return -math.exp(_mean(kept, i)) * a[i]


def _sapo(r, a, hot, cold):
    heat = hot if a > 0 else cold
    return -4 / heat / (1 + math.exp(-heat * (r - 1))) * a


def _cpgd(x, logp, a, low, high, alpha=0.01, cap=2.0):
    gain = min(x * a, _clip(x, math.log(1 - low), math.log(1 + high)) * a)
    return -(gain - alpha * min(math.exp(x) - 1, cap) * logp)


def _plain(i, x, a, logp):
    return _ppo(math.exp(x[i]), a[i], 0.2, 0.2)


def _narrow(i, x, a, logp):
    return _ppo(math.exp(_mean(x, i)), a[i], 0.1, 0.15)


CASES = {
    "sft": ({}, lambda i, x, a, logp: -logp[i]),
    "reinforce": ({}, lambda i, x, a, logp: -a[i] * logp[i]),
    "rloo": ({}, lambda i, x, a, logp: -a[i] * logp[i]),
    "reinforce_pp": ({}, _plain),
    "grpo": ({}, _plain),
    "dr_grpo": ({}, _plain),
    "bnpo": ({}, _plain),
    "dapo": ({}, lambda i, x, a, logp: _ppo(math.exp(x[i]), a[i], 0.2, 0.28)),
    "grpo delta": ({"delta": 1.3}, lambda i, x, a, logp: _ppo(math.exp(x[i]), a[i], 0.2, 0.2, 1.3)),
    "gspo": ({}, lambda i, x, a, logp: _ppo(math.exp(_mean(x, i)), a[i], 3e-4, 4e-4)),
    "gspo wide": ({"epsilon": 0.1, "epsilon_high": 0.15}, _narrow),
    "luspo": ({}, lambda i, x, a, logp: _ppo(math.exp(_mean(x, i)), a[i], 2e-3, 2.5e-3)),
    "luspo wide": ({"epsilon": 0.1, "epsilon_high": 0.15}, _narrow),
    "gmpo": ({}, lambda i, x, a, logp: _gmpo(i, x, a, 0.4, 0.4)),
    "gmpo uneven": ({"epsilon": 0.1, "epsilon_high": 0.3}, lambda i, x, a, logp: _gmpo(i, x, a, 0.1, 0.3)),
    "cispo": ({}, lambda i, x, a, logp: -min(math.exp(x[i]), 5.0) * a[i] * logp[i]),
    "cispo tight": ({"epsilon_high": 1.1}, lambda i, x, a, logp: -min(math.exp(x[i]), 1.1) * a[i] * logp[i]),
    "sapo": ({}, lambda i, x, a, logp: _sapo(math.exp(x[i]), a[i], 1.0, 1.05)),
    "sapo hot": (
        {"sapo_temperature_pos": 2.0, "sapo_temperature_neg": 0.5},
        lambda i, x, a, logp: _sapo(math.exp(x[i]), a[i], 2.0, 0.5),
    ),
    "vespo": ({}, lambda i, x, a, logp: -phi(_mean(x, i) * len(mates(i)), a[i]) * a[i] * logp[i]),
    "vespo other": (
        {"vespo_k_pos": 1.5, "vespo_lambda_pos": 0.3, "vespo_k_neg": 0.7, "vespo_lambda_neg": 1.1},
        lambda i, x, a, logp: -phi(_mean(x, i) * len(mates(i)), a[i], (1.5, 0.7), (0.3, 1.1)) * a[i] * logp[i],
    ),
    "cpgd": ({}, lambda i, x, a, logp: _cpgd(x[i], logp[i], a[i], 0.2, 0.2)),
    "cpgd drift": (
        {"alpha": 0.05, "drift_cap": 0.3, "epsilon_high": 0.4},
        lambda i, x, a, logp: _cpgd(x[i], logp[i], a[i], 0.2, 0.4, 0.05, 0.3),
    ),
    "cpgd tight to loose": (
        {"epsilon_start": 0.05, "epsilon_high": 0.6},
        lambda i, x, a, logp: _cpgd(x[i], logp[i], a[i], 0.05 + 0.15 * POSITION[i], 0.05 + 0.55 * POSITION[i]),
    ),
    "cpgd reweighted": (
        {"reweight": True, "epsilon_high": 0.3},
        lambda i, x, a, logp: _cpgd(x[i], logp[i], a[i] * _clip(math.exp(x[i]), 0.8, 1.3), 0.2, 0.3),
    ),
}


def test_every_loss_has_a_formula_here_and_every_rl_loss_its_defaults():
    assert {case.split()[0] for case in CASES} == set(LOSSES) == {"sft", *DEFAULTS}
    assert all(aggregation in AGGREGATIONS for aggregation, _ in DEFAULTS.values())
    for name in LOSSES:
        made = getattr(objectives, name)()
        assert made.name == name
        assert made.sequence_level == (name in ("gspo", "luspo", "gmpo", "vespo"))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("spread", [0.1, 0.5])
def test_the_loss_is_its_formula_with_correction_kl_and_entropy(case, spread):
    options, formula = CASES[case]
    name = case.split()[0]
    logp, entropy, batch = policy_batch(spread=spread)
    x = (logp.detach() - batch.old_logp).tolist()
    bare = [formula(i, x, batch.advantage.tolist(), logp.tolist()) for i in range(N)]
    got, metrics = objective(name, **options)(logp, entropy, batch)
    assert got.tolist() == pytest.approx(bare, rel=1e-12, abs=1e-14)
    assert all(value.shape == (N,) and not value.requires_grad for value in metrics.values())
    if name != "vespo":
        batch.correction = torch.arange(N) / 4.0
    full = objective(name, **options, beta=0.1, kl="k2", entropy_coef=0.02)(logp, entropy, batch)[0]
    for i in range(N):
        kl = (logp[i].item() - batch.ref_logp[i].item()) ** 2 / 2
        scale = 1 if name == "vespo" else i / 4
        assert full[i].item() == pytest.approx(bare[i] * scale + 0.1 * kl - 0.02 * entropy[i].item(), rel=1e-12)


@pytest.mark.parametrize("case", ["grpo", "dapo", "gspo wide", "gmpo uneven", "cpgd"])
def test_clip_metrics_mark_the_tokens_that_have_no_gradient(case):
    options, _ = CASES[case]
    logp, entropy, batch = policy_batch(seed=2)
    batch.advantage = torch.tensor([1.0, -1.0] * (N // 2), dtype=torch.float64)
    options = {**options, **({"alpha": 0.0} if case == "cpgd" else {})}
    made = objective(case.split()[0], **options)
    _, metrics = made(logp, entropy, batch)
    low, high = metrics["clip_ratio/low"], metrics["clip_ratio/high"]
    assert low.sum() and high.sum() and not (low * high).any()
    assert not (low * (batch.advantage > 0)).any() and not (high * (batch.advantage < 0)).any()
    if not made.sequence_level:
        assert torch.equal(gradient_of(made, logp, entropy, batch) == 0, (low + high) > 0)


def test_the_metrics_of_cispo_and_vespo_have_trls_names():
    logp, entropy, batch = policy_batch()
    ratio = (logp.detach() - batch.old_logp).exp()
    _, metrics = objective("cispo", epsilon_high=1.1)(logp, entropy, batch)
    assert torch.equal(metrics["cispo_clip_ratio"], ((ratio > 1.1) & (batch.advantage > 0)).double())
    assert 0 < metrics["cispo_clip_ratio"].sum() < N
    _, metrics = vespo()(logp, entropy, batch)
    log_w = sequence_sum(ratio.log(), SEQUENCE)
    assert metrics["vespo/phi_seq_mean"].tolist() == pytest.approx(
        [phi(w, a) for w, a in zip(log_w.tolist(), batch.advantage.tolist(), strict=True)]
    )


def test_two_sided_delta_is_dual_clip_ppo():
    logp, entropy, batch = policy_batch(spread=1.5)
    for advantage in (batch.advantage, -batch.advantage):
        batch.advantage = advantage
        got, _ = grpo(dual_clip=3.0)(logp, entropy, batch)
        for i in range(N):
            r, a = math.exp(logp[i].item() - batch.old_logp[i].item()), advantage[i].item()
            gain = min(r * a, _clip(r, 0.8, 1.2) * a)
            assert got[i].item() == pytest.approx(-(max(gain, 3.0 * a) if a < 0 else gain), rel=1e-12)
        assert torch.equal(got, grpo(delta=3.0)(logp, entropy, batch)[0])


# --- gradients ---


@pytest.mark.parametrize("name", sorted(DEFAULTS))
def test_on_policy_the_gradient_is_the_policy_gradient(name):
    logp, entropy, batch = policy_batch()
    batch.old_logp = logp.detach().clone()
    tolerance = {"rtol": 1e-12, "atol": 0} if name in ("gspo", "luspo", "gmpo", "sapo") else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(gradient_of(objective(name), logp, entropy, batch), -batch.advantage, **tolerance)


def test_unclipped_cpgd_is_the_policy_gradient_off_policy_too():
    logp, entropy, batch = policy_batch(spread=0.05)
    assert (logp - batch.old_logp).abs().max() < 0.18
    assert torch.equal(gradient_of(cpgd(alpha=0.0), logp, entropy, batch), -batch.advantage)
    assert torch.equal(
        gradient_of(cpgd(alpha=0.0), logp, entropy, batch), gradient_of(objective("reinforce"), logp, entropy, batch)
    )


def test_the_drift_gradient_is_capped():
    logp, entropy, batch = policy_batch()
    batch.old_logp, batch.advantage = logp.detach() - 3, torch.zeros(N, dtype=torch.float64)
    gradient = gradient_of(cpgd(alpha=0.01, drift_cap=2.0), logp, entropy, batch)
    torch.testing.assert_close(gradient, torch.full_like(gradient, 0.02))


def test_cispo_and_vespo_keep_a_gradient_where_others_clip():
    logp, entropy, batch = policy_batch()
    batch.old_logp = logp.detach() - 2
    assert (gradient_of(objective("cispo"), logp, entropy, batch) != 0).all()
    assert not gradient_of(grpo(), logp, entropy, batch)[batch.advantage > 0].any()


@pytest.mark.parametrize("name", [n for n in LOSSES if "epsilon" in inspect.signature(LOSSES[n]).parameters])
def test_a_ratio_at_the_clip_bound_has_the_whole_gradient_or_none(name):
    options = {"alpha": 0.0} if name == "cpgd" else {}
    made = objective(name, epsilon=0.2, epsilon_high=0.2, **options)
    edges = (-0.2, 0.2) if name == "gmpo" else (math.log(0.8), math.log(1.2))
    for edge in edges:
        for advantage in (-1.0, 1.0):
            batch = TokenBatch(*[torch.zeros(1, dtype=torch.int64)] * 3)
            batch.advantage = torch.tensor([advantage], dtype=torch.float64)
            batch.old_logp = torch.tensor([-edge], dtype=torch.float64)
            logp = torch.zeros(1, dtype=torch.float64, requires_grad=True)
            gradient = gradient_of(made, logp, logp.detach(), batch).item()
            full = -advantage * (1 if name == "cpgd" else math.exp(edge))
            assert min(abs(gradient - full), abs(gradient)) < 1e-9


# --- through the engine ---

SMOOTH = {  # options under which the loss has no kink near the case below
    name: {"epsilon": 0.5, "epsilon_high": 2.0} if "epsilon" in inspect.signature(LOSSES[name]).parameters else {}
    for name in LOSSES
} | {"cpgd": {"epsilon": 0.5, "epsilon_start": 0.4, "alpha": 0.0}}


def _engine_case(n=6, masked=()):
    g = torch.Generator().manual_seed(3)
    hidden, weight, bias = (
        torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_() for shape in ((n, 3), (5, 3), (5,))
    )
    targets = torch.randint(0, 5, (n,), generator=g)
    logp = linear_logprobs(hidden, weight, targets, bias=bias)[0].detach()
    noise = [0.1 * torch.randn(n, generator=g, dtype=torch.float64) for _ in range(3)]
    sequence = torch.arange(n) * 3 // n
    batch = TokenBatch(
        targets, torch.rand(n, generator=g) + 0.1, sequence, 10 * noise[0], logp + noise[1], logp + noise[2]
    )
    batch.correction, batch.position = torch.rand(n, generator=g) + 0.5, sequence_position(sequence)
    batch.weight[list(masked)] = 0
    return hidden, weight, bias, batch


@pytest.mark.parametrize("name", [n for n in LOSSES if n not in ("cispo", "vespo")])
def test_gradcheck_through_the_engine(name):
    *leaves, batch = _engine_case()
    made = objective(name, **SMOOTH[name], beta=0.1, kl="k3", use_bias_correction_kl=name != "sft", entropy_coef=0.1)

    def loss(hidden, weight, bias):
        return linear_policy_loss(hidden, weight, batch, made, bias=bias, chunk_rows=4).loss

    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("name", ["cispo", "vespo"])
def test_losses_with_a_detached_weight_have_the_gradient_of_the_weighted_log_prob(name):
    hidden, weight, bias, batch = _engine_case()
    logp, entropy = linear_logprobs_reference(hidden, weight, batch.targets, bias=bias)
    value, _ = objective(name)(logp.detach(), entropy, batch)
    frozen = (value / logp.detach() * logp * batch.weight).sum()  # the loss is linear in ln π
    loss = linear_policy_loss(hidden, weight, batch, objective(name), bias=bias, chunk_rows=4).loss
    leaves = (hidden, weight, bias)
    for a, b in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(frozen, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_adds_up_over_splits_between_sequences_and_over_chunks(name):
    hidden, weight, bias, batch = _engine_case(24, masked=(1, 9, 10))
    made = objective(name, beta=0.1, kl="k3+", entropy_coef=0.05)
    whole = linear_policy_loss_reference(hidden, weight, batch, made, bias=bias)
    expected = torch.autograd.grad(whole, (hidden, weight, bias))
    for parts, chunk_rows in (([slice(0, 8), slice(8, 24)], 4096), ([slice(0, 24)], 9), ([slice(0, 24)], 3)):
        total = sum(
            linear_policy_loss(hidden[p], weight, batch.select(p), made, bias=bias, chunk_rows=chunk_rows).loss
            for p in parts
        )
        torch.testing.assert_close(total, whole, rtol=1e-12, atol=1e-14)
        for a, b in zip(torch.autograd.grad(total, (hidden, weight, bias)), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


# --- numerics ---


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("far", [-1e4, 1e4, -200.0, 200.0])
@pytest.mark.parametrize("kl", ["k1+", "k2", "k3", "k3+"])
def test_enormous_log_ratios_leave_everything_finite(name, far, kl):
    logp, entropy, batch = policy_batch()
    logp = logp.detach().float().requires_grad_()
    for sign in (-1.0, 0.0, 1.0):
        batch.advantage, batch.correction = torch.full((N,), sign), torch.ones(N)
        batch.old_logp, batch.ref_logp = torch.full((N,), far), torch.full((N,), -far)
        own = {"drift_cap": math.inf} if name == "cpgd" else {}
        made = objective(name, beta=0.1, kl=kl, use_bias_correction_kl=not kl.endswith("+"), **own)
        loss, metrics = made(logp, entropy.float(), batch)
        (gradient,) = torch.autograd.grad(loss.sum(), logp)
        assert all(x.isfinite().all() for x in (loss, gradient, *metrics.values()))


@pytest.mark.parametrize("name", sorted(DEFAULTS))
@pytest.mark.parametrize("far", [0.0, 0.3, 200.0, -200.0])
def test_zero_advantages_have_coefficients_zero_exactly(name, far):
    logp, entropy, batch = policy_batch()
    batch.old_logp, batch.advantage = logp.detach() + far, torch.zeros(N, dtype=torch.float64)
    made = objective(name, **({"alpha": 0.0} if name == "cpgd" else {}))
    assert not gradient_of(made, logp, entropy, batch).any()
    assert gradient_of(objective(name, beta=0.1), logp, entropy, batch).any()


# --- options ---


def test_an_objective_is_any_function_of_token_vectors():
    logp, entropy, batch = policy_batch()
    entropy_only = Objective("entropy", lambda logp, entropy, batch: (-entropy, {}))
    assert torch.equal(entropy_only(logp, entropy, batch)[0], -entropy)


@pytest.mark.parametrize(
    ("made", "vector"),
    [(grpo(beta=0.1), "ref_logp"), (grpo(), "old_logp"), (sft(beta=0.1), "ref_logp"), (gspo(), "advantage")]
    + [(cpgd(epsilon_start=0.1), "position")],
)
def test_a_missing_vector_is_named(made, vector):
    logp, entropy, batch = policy_batch()
    setattr(batch, vector, None)
    with pytest.raises(ValueError, match=vector):
        made(logp, entropy, batch)


@pytest.mark.parametrize(
    ("loss_type", "options", "message"),
    [
        ("ppo", {}, "ppo"),
        ("cispo", {"epsilon": 0.2}, "cispo.*epsilon"),
        ("grpo", {"alpha": 0.1, "reweight": True}, "grpo.*alpha, reweight"),
        ("sft", {"epsilon_high": 0.2}, "sft.*epsilon_high"),
        ("rloo", {"delta": 2.0}, "rloo.*delta"),
        ("cpgd", {"vespo_k_pos": 2.0}, "cpgd.*vespo_k_pos"),
        ("grpo", {"epsilon": 1.0}, "epsilon"),
        ("dapo", {"epsilon_high": -0.1}, "epsilon_high"),
        ("grpo", {"delta": 1.1}, "delta"),
        ("grpo", {"dual_clip": 1.2}, "dual_clip"),
        ("grpo", {"dual_clip": 3.0, "delta": 4.0}, "give one"),
        ("grpo", {"kl": "k4"}, "k4"),
        ("grpo", {"kl": "k3+", "use_bias_correction_kl": True}, "choose one"),
        ("grpo", {"importance_sampling_level": "word"}, "word"),
        ("sapo", {"sapo_temperature_pos": 0.0}, "sapo_temperature_pos"),
        ("vespo", {"vespo_lambda_neg": 0.0}, "vespo_lambda"),
        ("vespo", {"vespo_k_pos": -1.0}, "vespo_k"),
        ("cispo", {"epsilon_high": 0.0}, "epsilon_high"),
        ("gmpo", {"epsilon": -0.1}, "epsilon"),
        ("cpgd", {"alpha": -1}, "alpha"),
        ("cpgd", {"beta": -1}, "beta"),
        ("cpgd", {"beta": math.nan}, "beta"),
        ("cpgd", {"epsilon_start": 0.3}, "epsilon_start"),
    ],
)
def test_bad_options_are_refused_by_name(loss_type, options, message):
    with pytest.raises(ValueError, match=message):
        objective(loss_type, **options)


def test_signatures_show_every_option_with_the_published_default():
    shown = {name: {p.name: p.default for p in inspect.signature(f).parameters.values()} for name, f in LOSSES.items()}
    assert all({"beta", "kl", "use_bias_correction_kl", "entropy_coef"} <= set(options) for options in shown.values())
    assert (shown["dapo"]["epsilon"], shown["dapo"]["epsilon_high"]) == (0.2, 0.28)
    assert shown["gspo"]["importance_sampling_level"] == "sequence" and shown["gspo"]["delta"] is None
    assert dapo(delta=1.5).name == "dapo" and luspo().sequence_level
