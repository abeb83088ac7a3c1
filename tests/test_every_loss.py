"""Every loss × KL × aggregation × level through the engine, against fp64 autograd over all logits."""

import inspect

import pytest
import torch

from cosmo_fast.objectives import LOSSES, TokenBatch, objective, sequence_position, token_weights
from cosmo_fast.objectives.aggregate import KINDS as AGGREGATIONS
from cosmo_fast.objectives.terms import KL_KINDS
from cosmo_fast.ops import linear_logprobs_reference, linear_policy_loss
from cosmo_fast.ops.linear_policy_loss import linear_policy_loss_reference

LENGTHS, GROUPS = torch.tensor([5, 7, 1, 6]), torch.tensor([0, 0, 3, 3])
LEVELS = [
    (name, level)
    for name, loss in LOSSES.items()
    for level in (
        ("token", "sequence") if "importance_sampling_level" in inspect.signature(loss).parameters else (None,)
    )
]


def _case(aggregation):
    g = torch.Generator().manual_seed(1)
    n, d, v = int(LENGTHS.sum()), 5, 23

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    hidden, weight, bias = normal(n, d), normal(v, d), normal(v)
    targets, sequence = torch.randint(0, v, (n,), generator=g), torch.arange(4).repeat_interleave(LENGTHS)
    logp, _ = linear_logprobs_reference(hidden, weight, targets, bias=bias)
    batch = TokenBatch(
        targets,
        token_weights(aggregation, LENGTHS, GROUPS, max_length=9).double(),
        sequence,
        advantage=normal(4)[sequence],
        old_logp=logp + 0.2 * normal(n),
        ref_logp=logp + 0.3 * normal(n),
        correction=torch.rand(n, generator=g, dtype=torch.float64) + 0.5,
        position=sequence_position(sequence).double(),
    )
    batch.weight[3] = 0.0  # one token under the mask
    return [x.requires_grad_() for x in (hidden, weight, bias)], batch


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("kl", [*KL_KINDS, "k3 corrected", None])
@pytest.mark.parametrize(("name", "level"), LEVELS)
def test_loss_and_gradients_are_those_of_autograd_over_all_logits(name, level, kl, aggregation):
    (hidden, weight, bias), batch = _case(aggregation)
    options = {} if level is None else {"importance_sampling_level": level}
    if kl is not None:
        kind, _, corrected = kl.partition(" ")
        options |= {"beta": 0.1, "kl": kind, "use_bias_correction_kl": bool(corrected), "entropy_coef": 0.02}
    loss = objective(name, **options)
    expected = linear_policy_loss_reference(hidden, weight, batch, loss, bias=bias)
    truth = torch.autograd.grad(expected, (hidden, weight, bias))
    for chunk_rows in (4, 4096):
        got = linear_policy_loss(hidden, weight, batch, loss, bias=bias, chunk_rows=chunk_rows).loss
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
        for a, b in zip(torch.autograd.grad(got, (hidden, weight, bias)), truth, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-13 * max(1.0, b.abs().max().item()))
