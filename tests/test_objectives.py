"""Aggregation against its formulas, written out sequence by sequence."""

import pytest
import torch

from cosmo_fast.objectives import sequence_weights, token_weights

LENGTHS, GROUPS = torch.tensor([3, 5, 0, 4]), torch.tensor([7, 7, 7, 2])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("token-mean", [1 / 12] * 4),
        ("seq-mean-token-mean", [1 / 9, 1 / 15, 0, 1 / 12]),
        ("seq-mean-token-sum", [1 / 3] * 4),
        ("seq-mean-token-sum-norm", [1 / 80] * 4),
        ("prompt-mean-token-mean", [1 / 16, 1 / 16, 0, 1 / 8]),
    ],
)
def test_aggregation_is_its_formula(kind, expected):
    weights = sequence_weights(kind, LENGTHS, GROUPS, 20)
    expected = torch.tensor(expected) * (LENGTHS > 0)
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(token_weights(kind, LENGTHS, GROUPS, 20), expected.repeat_interleave(LENGTHS))
    if not kind.startswith("seq-mean-token-sum"):
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
