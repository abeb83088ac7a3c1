"""Rewards to gradients in one call, against the same steps taken by hand with plain Python loops."""

import math

import pytest
import torch
from devices import DEVICE

from cosmo_fast.objectives import DEFAULTS, TokenBatch, advantages, objective, sequence_weights
from cosmo_fast.ops import linear_logprobs, linear_policy_loss
from cosmo_fast.ops.grpo_loss import grpo_loss

LENGTHS, GROUPS = [3, 5, 0, 4, 1, 6], [8, 2, 8, 8, 2, 2]
REWARDS = [1.0, 0.25, 0.5, 0.0, 0.75, math.nan]
N = sum(LENGTHS)
OPTIONS = {"max_length": 20, "temperature": 0.8, "chunk_rows": 8}  # of the weights and of the engine


def _leaves(dtype=torch.float64, rows=N):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(n, 6, generator=g, dtype=dtype).to(DEVICE).requires_grad_() for n in (rows, 11)]


def _data(seed=1):
    """tokens, old_logp, ref_logp and a mask that leaves some of each sequence; NaN under the mask."""
    g = torch.Generator().manual_seed(seed)
    tokens, mask = torch.randint(0, 11, (N,), generator=g), torch.rand(N, generator=g) > 0.25
    old, ref = (-3 * torch.rand(N, generator=g, dtype=torch.float64) for _ in range(2))
    old, ref = (torch.where(mask, x, torch.nan) for x in (old, ref))
    return [x.to(DEVICE) for x in (tokens, old, ref, mask)]


def _vectors(rewards=REWARDS):
    return [torch.tensor(x, device=DEVICE) for x in (rewards, GROUPS, LENGTHS)]


def _by_hand(hidden, head, tokens, gains, weights, loss, mask, old, ref):
    """The loss from advantages and weights of the sequences, laid out by loops over them."""
    laid = [(s, k) for s, length in enumerate(LENGTHS) for k in range(length)]
    keep = mask.tolist()
    batch = TokenBatch(
        targets=tokens,
        weight=torch.tensor([weights[s].item() * keep[i] for i, (s, _) in enumerate(laid)], device=DEVICE),
        sequence=torch.tensor([s for s, _ in laid], device=DEVICE),
        advantage=torch.tensor([gains[s].item() for s, _ in laid], dtype=torch.float64, device=DEVICE),
        old_logp=old,
        ref_logp=ref,
        position=torch.tensor([k / max(1, LENGTHS[s] - 1) for s, k in laid], device=DEVICE),
    )
    return linear_policy_loss(hidden, head, batch, loss, temperature=0.8, chunk_rows=8)


def _assert_same(got, got_leaves, expected, leaves):
    assert got.loss.item() == pytest.approx(expected.loss.item(), rel=1e-7)
    for mine, own in zip(
        torch.autograd.grad(got.loss, got_leaves), torch.autograd.grad(expected.loss, leaves), strict=True
    ):
        assert own.abs().max() > 1e-6
        torch.testing.assert_close(mine, own, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("loss_type", DEFAULTS)
def test_it_is_advantages_weights_and_linear_policy_loss(loss_type):
    tokens, old, ref, mask = _data()
    rewards, groups, lengths = _vectors()
    aggregation, kind = DEFAULTS[loss_type]
    options = {"beta": 0.1, "entropy_coef": 0.01} | ({"epsilon_start": 0.05} if loss_type == "cpgd" else {})
    given = {"mask": mask, "old_logp": old, "ref_logp": ref, **OPTIONS, **options}
    leaves, others = _leaves(), _leaves()
    got = grpo_loss(*leaves, tokens, rewards, groups, lengths, loss_type=loss_type, **given)

    gains = advantages(rewards, groups, kind)
    counted = torch.tensor([int(part.sum()) for part in mask.split(LENGTHS)])
    weights = sequence_weights(aggregation, counted, groups.cpu(), 20)
    expected = _by_hand(*others, tokens, gains, weights, objective(loss_type, **options), mask, old, ref)
    torch.testing.assert_close(got.advantages, gains, rtol=0, atol=0)
    _assert_same(got, leaves, expected, others)
    assert got.metrics.keys() == expected.metrics.keys()
    for name in ("logp", "entropy"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=0, atol=0)


@pytest.mark.parametrize("loss_type", ["grpo", "gspo", "gmpo", "cispo", "cpgd", "reinforce"])
def test_without_old_log_probabilities_the_policy_is_its_own_old_one(loss_type):
    tokens, _, _, mask = _data()
    hidden, head = _leaves()
    old = linear_logprobs(hidden.detach(), head.detach(), tokens, temperature=0.8)[0]
    given = {"loss_type": loss_type, "mask": mask, **OPTIONS}
    on_policy = grpo_loss(hidden, head, tokens, *_vectors(), **given)
    leaves = _leaves()
    _assert_same(on_policy, [hidden, head], grpo_loss(*leaves, tokens, *_vectors(), old_logp=old, **given), leaves)


def test_aggregation_and_advantage_can_be_chosen():
    tokens, old, ref, mask = _data()
    several = torch.rand(6, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(DEVICE)
    _, groups, lengths = _vectors()
    weighted = {"reward_weights": [1.0, 0.5], "multi_objective_aggregation": "normalize_then_sum"}
    leaves, others = _leaves(), _leaves()
    got = grpo_loss(
        *leaves, tokens, several, groups, lengths, aggregation="prompt-mean-token-mean", advantage="cale",
        advantage_options={"a": 0.9, **weighted}, mask=mask, old_logp=old, epsilon=0.1, **OPTIONS,
    )  # fmt: skip
    gains = advantages(several, groups, "cale", lengths=lengths, a=0.9, **weighted)
    counted = torch.tensor([int(part.sum()) for part in mask.split(LENGTHS)])
    weights = sequence_weights("prompt-mean-token-mean", counted, groups.cpu())
    expected = _by_hand(*others, tokens, gains, weights, objective("grpo", epsilon=0.1), mask, old, ref)
    _assert_same(got, leaves, expected, others)


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean", "prompt-mean-token-mean"])
def test_micro_batches_with_the_weights_of_the_step_add_up_to_it(aggregation):
    tokens, old, ref, mask = _data()
    rewards, groups, lengths = _vectors()
    leaves = _leaves()
    whole = grpo_loss(
        *leaves, tokens, rewards, groups, lengths, mask=mask, old_logp=old, aggregation=aggregation, temperature=0.8
    )
    expected = torch.autograd.grad(whole.loss, leaves)

    counted = torch.tensor([int(part.sum()) for part in mask.split(LENGTHS)], device=DEVICE)
    weights = sequence_weights(aggregation, counted, groups)
    hidden, head = _leaves()
    total = 0.0
    for prompt in (8, 2):
        chosen = groups == prompt
        rows = chosen.repeat_interleave(lengths).nonzero()[:, 0]
        vectors = (rewards[chosen], groups[chosen], lengths[chosen])
        own = {"mask": mask[rows], "old_logp": old[rows], "weights": weights[chosen], "temperature": 0.8}
        total = total + grpo_loss(hidden[rows], head, tokens[rows], *vectors, **own).loss
    with pytest.raises(ValueError, match="weights are an aggregation"):
        grpo_loss(hidden[rows], head, tokens[rows], *vectors, **own, aggregation=aggregation)
    assert total.item() == pytest.approx(whole.loss.item(), rel=1e-12)
    for got, own in zip(torch.autograd.grad(total, (hidden, head)), expected, strict=True):
        torch.testing.assert_close(got, own, rtol=1e-10, atol=1e-12)


def test_a_batch_without_sequences_has_loss_zero():
    hidden, head = _leaves(torch.float32, rows=0)
    empty = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    got = grpo_loss(hidden, head, empty, torch.zeros(0, device=DEVICE), empty, empty)
    got.loss.backward()
    assert got.loss == 0 and not head.grad.any() and got.advantages.shape == (0,)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"loss_type": "sft"}, "sft"),
        ({"alpha": 0.1}, "alpha"),
        ({"advantage": "gae"}, "gae"),
        ({"aggregation": "mean"}, "mean"),
        ({"loss_type": "dr_grpo"}, "max_length"),
        ({"lengths": torch.tensor([3, 5, 0, 4, 1, 7])}, "20"),
        ({"lengths": torch.tensor([3.0, 5, 0, 4, 1, 6])}, "integers"),
        ({"lengths": torch.tensor([3, 5, -1, 5, 1, 6])}, "negative"),
        ({"rewards": torch.zeros(5)}, "rewards"),
        ({"groups": torch.zeros(5, dtype=torch.int64)}, "groups"),
        ({"weights": torch.zeros(N)}, "weights"),
        ({"mask": torch.zeros(6)}, "mask"),
        ({"old_logp": torch.zeros(6)}, "old_logp"),
        ({"beta": 0.1}, "ref_logp"),
    ],
)
def test_bad_input_is_named(options, match):
    rewards, groups, lengths = _vectors()
    given = {"rewards": rewards, "groups": groups, "lengths": lengths, **options}
    with pytest.raises(ValueError, match=match):
        grpo_loss(*_leaves(), _data()[0], **given)
