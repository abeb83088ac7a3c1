"""What the losses share, in plain floats: KL, importance corrections, and the token batch."""

import math

import pytest
import torch
from policy_batch import POSITION, SEQUENCE, N, gradient_of, mates, phi, policy_batch

from cosmo_fast.objectives import (
    LOSSES,
    TokenBatch,
    grpo,
    importance_correction,
    kl_estimate,
    objective,
    sequence_mean,
    sequence_position,
    sequence_sum,
    vespo,
)

WITH_OLD = [name for name in LOSSES if name not in ("sft", "reinforce", "rloo")]

# --- KL ---


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "k1+", "k3+"])
def test_each_kl_has_its_value_and_its_gradient(kind):
    logp, _, batch = policy_batch()
    value = kl_estimate(kind, logp, batch.ref_logp)
    (gradient,) = torch.autograd.grad(value.sum(), logp)
    for i in range(N):
        d = logp[i].item() - batch.ref_logp[i].item()
        expected = {"k1": (d, 1), "k2": (d * d / 2, d), "k3": (math.exp(-d) - 1 + d, 1 - math.exp(-d))}
        assert value[i].item() == pytest.approx(expected[kind[:2]][0], rel=1e-10)
        slope = expected["k2" if kind.endswith("+") else kind][1]  # straight through: that of k2
        assert gradient[i].item() == pytest.approx(slope, rel=1e-12)


def _expected_gradient(kind, by_bias_correction):
    """The gradient by the logits of one categorical policy, in expectation over its own samples, and the KL's."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(5, generator=g, dtype=torch.float64).requires_grad_()
    ref = torch.randn(5, generator=g, dtype=torch.float64).log_softmax(0)
    logp = logits.log_softmax(0)
    p = logp.exp()
    zero = torch.zeros(5, dtype=torch.int64)
    batch = TokenBatch(zero, torch.ones(5), zero, torch.zeros(5).double(), logp.detach(), ref)
    made = grpo(beta=1.0, kl=kind, use_bias_correction_kl=by_bias_correction)
    loss = (p.detach() * made(logp, logp.detach(), batch)[0]).sum()
    got = torch.autograd.grad(loss, logits, retain_graph=True)[0]
    return got, torch.autograd.grad((p * (logp - ref)).sum(), logits)[0]


@pytest.mark.parametrize(
    ("kind", "corrected", "exact"),
    [("k1", False, False), ("k3", False, False), ("k2", False, True), ("k1+", False, True), ("k3+", False, True)]
    + [("k1", True, True), ("k3", True, True)],
)
def test_which_kl_losses_have_the_gradient_of_the_kl(kind, corrected, exact):
    got, truth = _expected_gradient(kind, corrected)
    assert torch.allclose(got, truth, rtol=1e-10, atol=1e-12) is exact


def test_the_kl_correction_multiplies_by_the_ratio_that_the_loss_has():
    logp, entropy, batch = policy_batch()
    x, kl = logp - batch.old_logp, kl_estimate("k3", logp, batch.ref_logp)
    batch.advantage = torch.zeros(N, dtype=torch.float64)
    for name in WITH_OLD:
        ratio = (sequence_mean(x, SEQUENCE) if name in ("gspo", "luspo") else x).exp()
        options = {"alpha": 0.0} if name == "cpgd" else {}
        loss, metrics = objective(name, beta=0.5, use_bias_correction_kl=True, **options)(logp, entropy, batch)
        torch.testing.assert_close(loss, 0.5 * kl * ratio)
        torch.testing.assert_close(metrics["kl"], (kl * ratio).detach())


# --- corrections ---

OLD = [-1.0, -2.0, -0.5, -1.0, -1.0]
SAMPLING = [-1.0 - math.log(2), -2.0 - math.log(4), -0.5 + math.log(2), -1.0 + math.log(5), -1.0]


@pytest.mark.parametrize(
    ("mode", "floor", "expected"),
    [
        ("token_truncate", None, [2, 3, 0.5, 0.2, 1]),
        ("token_truncate", 0.4, [2, 3, 0.5, 0.4, 1]),
        ("token_mask", None, [2, 0, 0.5, 0.2, 1]),
        ("token_mask", 0.4, [2, 0, 0.5, 0, 1]),
        ("sequence_truncate", None, [3, 3, 3, 0.2, 0.2]),  # products 2·4·0.5 = 4 and 0.2
        ("sequence_truncate", 0.4, [3, 3, 3, 0.4, 0.4]),
        ("sequence_mask", None, [0, 0, 0, 0.2, 0.2]),
        ("sequence_mask", 0.1, [0, 0, 0, 0.2, 0.2]),
    ],
)
def test_corrections_are_trls_and_nothing_under_the_mask_reaches_them(mode, floor, expected):
    old, sampling = (torch.tensor(v, dtype=torch.float64).requires_grad_() for v in (OLD, SAMPLING))
    sequence, weight = torch.tensor([0, 0, 0, 1, 1]), torch.full((5,), 0.2)
    got = importance_correction(old, sampling, sequence, weight, mode, floor=floor)
    assert got.tolist() == pytest.approx(expected, rel=1e-12) and not got.requires_grad
    for poison in (math.nan, math.inf, -math.inf):
        extra = torch.tensor([poison, poison], dtype=torch.float64)
        order = [5, 0, 1, 6, 2, 3, 4]
        longer = [torch.cat([v.detach(), extra])[order] for v in (old, sampling)]
        masked = torch.cat([weight, torch.zeros(2)])[order]
        again = importance_correction(*longer, torch.tensor([0] * 5 + [1] * 2), masked, mode, floor=floor)
        assert torch.equal(again[masked == 0], torch.zeros(2).double()) and torch.equal(again[masked != 0], got)


def test_a_correction_at_its_bound_stays_and_without_bounds_it_is_the_ratio():
    old, sequence, weight = torch.tensor([0.0, 1.0, 50.0]), torch.tensor([0, 1, 2]), torch.ones(3)
    at = float(old[1].exp())
    for mode in ("token_mask", "sequence_mask"):
        assert importance_correction(old, torch.zeros(3), sequence, weight, mode, at, 1.0).tolist() == [1.0, at, 0.0]
    free = importance_correction(old, torch.zeros(3), sequence, weight, "token_truncate", None)
    assert free.tolist() == pytest.approx([1.0, at, math.exp(20)])


def test_a_sampler_without_a_log_prob_corrects_nothing_but_a_nan_of_the_trainer_shows():
    sequence, weight, nan = torch.tensor([0, 0]), torch.ones(2), torch.tensor([math.nan, -1.0])
    for mode in ("token_mask", "sequence_truncate"):
        assert importance_correction(-torch.ones(2), nan, sequence, weight, mode).tolist() == [1.0, 1.0]
        assert importance_correction(nan, -torch.ones(2), sequence, weight, mode)[0].isnan()


@pytest.mark.parametrize("name", LOSSES)
def test_a_correction_of_zero_removes_the_policy_term_and_its_gradient(name):
    logp, entropy, batch = policy_batch()
    batch.correction = torch.ones(N, dtype=torch.float64)
    whole = objective(name)(logp, entropy, batch)[0]
    batch.correction[SEQUENCE == 1] = 0
    loss, _ = objective(name)(logp, entropy, batch)
    assert torch.equal(loss, whole * batch.correction)
    assert not gradient_of(objective(name), logp, entropy, batch)[SEQUENCE == 1].any()
    bonus = objective(name, beta=0.1, entropy_coef=0.1)(logp, entropy, batch)[0]
    expected = 0.1 * kl_estimate("k3", logp, batch.ref_logp) - 0.1 * entropy
    torch.testing.assert_close(bonus[SEQUENCE == 1], expected[SEQUENCE == 1])


def test_vespo_takes_the_correction_into_the_weight_of_the_sequence():
    logp, entropy, batch = policy_batch(spread=0.1)
    batch.correction = 0.8 + 0.4 * torch.rand(N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = (logp.detach() - batch.old_logp + batch.correction.log()).tolist()
    got, _ = vespo()(logp, entropy, batch)
    for i in range(N):
        a, log_w = batch.advantage[i].item(), sum(x[j] for j in mates(i))
        assert got[i].item() == pytest.approx(-phi(log_w, a) * a * logp[i].item(), rel=1e-12)


# --- token batches ---


def test_positions_run_from_0_to_1_and_sums_stay_in_their_sequence():
    torch.testing.assert_close(sequence_position(SEQUENCE), torch.tensor(POSITION))
    assert sequence_position(torch.tensor([4, 7, 7])).tolist() == [0, 0, 1]
    assert sequence_sum(torch.ones(N), SEQUENCE).tolist() == [3] * 3 + [5] * 5 + [4] * 4


def test_select_keeps_what_is_given_and_what_is_not():
    _, _, batch = policy_batch()
    batch.ref_logp, batch.correction = None, torch.arange(N)
    part = batch.select(torch.tensor([1, 4]))
    assert len(part) == 2 and part.ref_logp is None and torch.equal(part.advantage, batch.advantage[[1, 4]])
    assert part.correction.tolist() == [1, 4] and torch.equal(part.position, batch.position[[1, 4]])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"mode": "token"}, "token"), ({"cap": 0.0}, "cap"), ({"cap": 2.0, "floor": 2.0}, "floor"), ({"floor": -1}, "-1")],
)
def test_bad_corrections_are_refused(options, message):
    one = torch.ones(1)
    with pytest.raises(ValueError, match=message):
        importance_correction(one, one, one, one, **{"mode": "token_mask", **options})


def test_a_vector_of_another_length_is_refused():
    with pytest.raises(ValueError, match="weight"):
        TokenBatch(torch.zeros(3), torch.ones(2), torch.zeros(3))
    with pytest.raises(ValueError, match="correction"):
        TokenBatch(*[torch.zeros(3)] * 3, correction=torch.zeros(2))
