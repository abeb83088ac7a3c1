"""Advantages and aggregation against their formulas, written out sequence by sequence."""

import math

import pytest
import torch

from cosmo_fast.objectives import advantages, sequence_weights, token_weights

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
