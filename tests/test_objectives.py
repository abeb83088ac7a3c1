"""Losses, advantages and aggregation against their formulas, written out token by token."""

import math

import pytest
import torch

from cosmo_fast.objectives import Objective, TokenBatch, advantages, cpgd, grpo, sequence_weights, sft, token_weights

SEQUENCE = torch.tensor([0] * 3 + [1] * 5 + [2] * 4)
N = len(SEQUENCE)


def _batch(seed=0, spread=0.5):
    g = torch.Generator().manual_seed(seed)
    logp, ref = (-torch.rand(N, generator=g, dtype=torch.float64) * 3 for _ in range(2))
    old = logp + spread * torch.randn(N, generator=g, dtype=torch.float64)
    advantage = torch.randn(3, generator=g, dtype=torch.float64)[SEQUENCE]
    batch = TokenBatch(torch.zeros(N, dtype=torch.int64), torch.ones(N), SEQUENCE, advantage, old, ref)
    return logp.requires_grad_(), torch.rand(N, generator=g, dtype=torch.float64), batch


def _kl(kind, logp, ref):
    return {"k1": logp - ref, "k2": (logp - ref) ** 2 / 2, "k3": math.exp(ref - logp) - (ref - logp) - 1}[kind]


def _clip(x, low, high):
    return min(max(x, low), high)


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
@pytest.mark.parametrize("delta", [None, 1.5])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_grpo_is_its_formula(kl, delta, level):
    logp, entropy, batch = _batch()
    objective = grpo(0.2, 0.28, delta, beta=0.1, kl=kl, entropy_coef=0.01, importance_sampling_level=level)
    got, metrics = objective(logp, entropy, batch)
    for i in range(N):
        mates = [j for j in range(N) if SEQUENCE[j] == SEQUENCE[i]] if level == "sequence" else [i]
        r = math.exp(sum(logp[j].item() - batch.old_logp[j].item() for j in mates) / len(mates))
        a = batch.advantage[i].item()
        gain = min((r if delta is None else min(r, delta)) * a, _clip(r, 0.8, 1.28) * a)
        expected = -gain + 0.1 * _kl(kl, logp[i].item(), batch.ref_logp[i].item()) - 0.01 * entropy[i].item()
        assert got[i].item() == pytest.approx(expected, rel=1e-12)
        assert metrics["clip_ratio/high"][i] == (r > 1.28 and a > 0)
        assert metrics["clip_ratio/low"][i] == (r < 0.8 and a < 0)


def test_cpgd_is_its_formula():
    logp, entropy, batch = _batch(spread=1.0)
    got, _ = cpgd(0.2, alpha=0.05, drift_cap=0.5)(logp, entropy, batch)
    for i in range(N):
        x, old, a = logp[i].item(), batch.old_logp[i].item(), batch.advantage[i].item()
        gain = min((x - old) * a, _clip(x - old, math.log(0.8), math.log(1.2)) * a)
        assert got[i].item() == pytest.approx(-(gain - 0.05 * min(math.exp(x - old) - 1, 0.5) * x), rel=1e-12)


def test_the_gradient_of_cpgd_has_no_ratio_in_it():
    logp, entropy, batch = _batch(spread=0.05)  # nothing is clipped
    (gradient,) = torch.autograd.grad(cpgd(alpha=0.0)(logp, entropy, batch)[0].sum(), logp)
    torch.testing.assert_close(gradient, -batch.advantage, rtol=0, atol=0)


def test_the_drift_gradient_is_capped():
    logp, entropy, batch = _batch()
    batch.old_logp, batch.advantage = logp.detach() - 3, torch.zeros(N, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(cpgd(alpha=0.01, drift_cap=2.0)(logp, entropy, batch)[0].sum(), logp)
    torch.testing.assert_close(gradient, torch.full_like(gradient, 0.02))


def test_sft_is_the_negative_log_likelihood():
    logp, entropy, batch = _batch()
    torch.testing.assert_close(sft()(logp, entropy, batch)[0], -logp)


@pytest.mark.parametrize("objective", [grpo(), cpgd()], ids=lambda o: o.name)
def test_on_policy_the_gradient_is_the_policy_gradient(objective):
    logp, entropy, batch = _batch()
    batch.old_logp = logp.detach().clone()
    (gradient,) = torch.autograd.grad(objective(logp, entropy, batch)[0].sum(), logp)
    torch.testing.assert_close(gradient, -batch.advantage, rtol=0, atol=0)


@pytest.mark.parametrize("edge", [0.8, 1.2])
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
def test_a_ratio_at_the_clip_bound_has_the_whole_gradient_or_none(edge, advantage):
    batch = TokenBatch(*[torch.zeros(1, dtype=torch.int64)] * 3)
    batch.advantage = torch.tensor([advantage], dtype=torch.float64)
    batch.old_logp = torch.tensor([-math.log(edge)], dtype=torch.float64)
    logp = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    for objective in (grpo(), cpgd()):
        (gradient,) = torch.autograd.grad(objective(logp, logp.detach(), batch)[0].sum(), logp)
        full = -advantage * (edge if objective.name == "grpo" else 1)
        assert min(abs(gradient.item() - full), abs(gradient.item())) < 0.011


@pytest.mark.parametrize("objective", [grpo(beta=0.1), grpo(importance_sampling_level="sequence"), cpgd(beta=0.1)])
def test_enormous_log_ratios_leave_everything_finite(objective):
    for old in (-1e4, 1e4, -200.0):
        logp, entropy, batch = _batch()
        logp = logp.detach().float().requires_grad_()
        batch.old_logp, batch.ref_logp = torch.full((N,), old), torch.full((N,), -old)
        loss, metrics = objective(logp, entropy.float(), batch)
        (gradient,) = torch.autograd.grad(loss.sum(), logp)
        assert all(x.isfinite().all() for x in (loss, gradient, *metrics.values()))


def test_a_missing_vector_is_named():
    logp, entropy, batch = _batch()
    batch.ref_logp = None
    with pytest.raises(ValueError, match="ref_logp"):
        grpo(beta=0.1)(logp, entropy, batch)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: grpo(epsilon=1.0), "epsilon"),
        (lambda: grpo(delta=1.1), "delta"),
        (lambda: grpo(kl="k4"), "k4"),
        (lambda: grpo(importance_sampling_level="word"), "word"),
        (lambda: cpgd(alpha=-1), "alpha"),
        (lambda: cpgd(beta=-1), "beta"),
        (lambda: TokenBatch(torch.zeros(3), torch.ones(2), torch.zeros(3)), "weight"),
    ],
)
def test_bad_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_select_keeps_what_is_given_and_what_is_not():
    _, _, batch = _batch()
    batch.ref_logp = None
    part = batch.select(torch.tensor([1, 4]))
    assert len(part) == 2 and part.ref_logp is None and torch.equal(part.advantage, batch.advantage[[1, 4]])


LENGTHS, GROUPS = torch.tensor([3, 5, 0, 4]), torch.tensor([7, 7, 7, 2])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("token-mean", [1 / 12] * 4),
        ("seq-mean-token-mean", [1 / 9, 1 / 15, 0, 1 / 12]),
        ("seq-mean-token-sum-norm", [1 / 80] * 4),
        ("prompt-mean-token-mean", [1 / 16, 1 / 16, 0, 1 / 8]),
    ],
)
def test_aggregation_is_its_formula(kind, expected):
    weights = sequence_weights(kind, LENGTHS, GROUPS, 20)
    expected = torch.tensor(expected) * (LENGTHS > 0)
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(token_weights(kind, LENGTHS, GROUPS, 20), expected.repeat_interleave(LENGTHS))
    if kind != "seq-mean-token-sum-norm":
        torch.testing.assert_close((weights * LENGTHS).sum(), torch.tensor(1.0))


def test_aggregation_of_nothing_is_zero():
    for kind in ("token-mean", "seq-mean-token-mean", "prompt-mean-token-mean"):
        assert sequence_weights(kind, torch.tensor([0, 0]), torch.tensor([0, 1])).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("kind", "match"),
    [("mean", "mean"), ("seq-mean-token-sum-norm", "max_length"), ("prompt-mean-token-mean", "groups")],
)
def test_bad_aggregation_is_refused(kind, match):
    with pytest.raises(ValueError, match=match):
        sequence_weights(kind, LENGTHS)


@pytest.mark.parametrize("kind", ["group", "dr_grpo", "rloo", "cpgd"])
def test_advantages_are_their_formula_for_ragged_interleaved_groups(kind):
    groups = torch.tensor([3, 1, 3, 1, 3, 9])
    rewards = torch.tensor([1.0, 0.25, 0.0, 0.75, 0.5, 1.0])
    got = advantages(rewards, groups, kind)
    for i, g in enumerate(groups):
        mates = rewards[groups == g]
        centred = (rewards[i] - mates.mean()).item()
        if len(mates) == 1:
            expected = 0.0
        elif kind == "group":
            expected = centred / (mates.std().item() + 1e-4)
        elif kind == "rloo":
            expected = (rewards[i] - (mates.sum() - rewards[i]) / (len(mates) - 1)).item()
        else:
            expected = centred * (3 / 2 if kind == "cpgd" else 1)
        assert got[i].item() == pytest.approx(expected, abs=1e-6)


def test_the_weighting_of_cpgd_is_capped_and_may_be_switched():
    groups = torch.arange(10).repeat_interleave(2)
    rewards = torch.zeros(20)
    rewards[0] = 1.0
    assert advantages(rewards, groups, "cpgd")[0] == 1.5
    assert advantages(rewards, groups, "cpgd", weighting="equal")[0] == 0.5
    torch.testing.assert_close(advantages(rewards, groups, "cpgd", weighting="std"), advantages(rewards, groups))


@pytest.mark.parametrize("kind", ["group", "dr_grpo", "rloo", "cpgd"])
def test_a_group_without_variance_has_advantage_zero_exactly(kind):
    rewards = torch.tensor([0.1, 0.1, 0.1, 0.7, 0.7, 0.7, 0.7])
    assert torch.equal(advantages(rewards, torch.tensor([0] * 3 + [1] * 4), kind), torch.zeros(7))


def test_a_reward_that_does_not_apply_leaves_its_group_alone():
    rewards, groups = torch.tensor([1.0, math.nan, 0.0, math.nan]), torch.tensor([0, 0, 0, 1])
    got = advantages(rewards, groups)
    assert torch.equal(got[[1, 3]], torch.zeros(2))
    torch.testing.assert_close(got[[0, 2]], advantages(rewards[[0, 2]], groups[[0, 2]]))


@pytest.mark.parametrize(
    ("options", "match"), [({"kind": "gae"}, "gae"), ({"kind": "cpgd", "weighting": "x"}, "weighting")]
)
def test_bad_advantages_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        advantages(torch.zeros(2), torch.zeros(2), **options)
    with pytest.raises(ValueError, match="one length"):
        advantages(torch.zeros(2), torch.zeros(3))


def test_an_objective_is_any_function_of_token_vectors():
    logp, entropy, batch = _batch()
    entropy_only = Objective("entropy", lambda logp, entropy, batch: (-entropy, {}))
    assert torch.equal(entropy_only(logp, entropy, batch)[0], -entropy)
