"""What a loss sees: token vectors. An objective maps (logp, entropy, batch) to a loss per token."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass
class TokenBatch:
    """Response tokens of one micro-batch, flat. All vectors (N,) on the device of the hidden states.

    targets: int64 token ids. weight: fp32, 0 = masked; the aggregation *is* these weights, made once per optimiser step
    over all micro-batches and ranks (`objectives.aggregate`), so that the loss Σ weight·ℓ adds up over any split.
    sequence: int64, non-decreasing ids. advantage, old_logp, ref_logp: floating, where the objective needs them.
    correction: floating, multiplies the policy term, not KL or entropy (`importance_correction`); where it is 0 that
    term is gone. position: floating, 0 at a sequence's first token and 1 at its last (`sequence_position`); it is data,
    not found from `sequence`, so that a token-level objective may be given any part of a sequence.
    """

    targets: Tensor
    weight: Tensor
    sequence: Tensor
    advantage: Tensor | None = None
    old_logp: Tensor | None = None
    ref_logp: Tensor | None = None
    correction: Tensor | None = None
    position: Tensor | None = None

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and value.shape != self.targets.shape:
                shapes = f"{tuple(value.shape)}, targets {tuple(self.targets.shape)}"
                raise ValueError(f"TokenBatch.{field.name} has shape {shapes}: every vector needs one element a token")
        if self.targets.dim() != 1:
            raise ValueError(f"TokenBatch.targets must have one dimension, got shape {tuple(self.targets.shape)}")

    def __len__(self) -> int:
        return self.targets.shape[0]

    def select(self, index: Tensor | slice) -> "TokenBatch":
        """The tokens at `index` (int64 vector, boolean mask or slice), in that order."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: value[index] for name, value in given.items() if value is not None})

    def need(self, *names: str) -> tuple[Tensor, ...]:
        """The named vectors; ValueError for one that was not given."""
        values = tuple(getattr(self, name) for name in names)
        for name, value in zip(names, values, strict=True):
            if value is None:
                raise ValueError(f"this objective needs TokenBatch.{name}, which is None")
        return values


Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class Objective:
    """A loss by name. `sequence_level`: a token's loss depends on its whole sequence, which is then kept together."""

    name: str
    function: Callable[[Tensor, Tensor, TokenBatch], tuple[Tensor, Metrics]]
    sequence_level: bool = False

    def __call__(self, logp: Tensor, entropy: Tensor, batch: TokenBatch) -> tuple[Tensor, Metrics]:
        """Loss per token (N,), minimised, differentiable by logp and entropy (N,); detached metrics (N,) by name."""
        return self.function(logp, entropy, batch)


def sequence_sum(values: Tensor, sequence: Tensor) -> Tensor:
    """The sum of `values` (N,) over each token's sequence, at every token (N,). Ids must be non-decreasing."""
    return _by_sequence(values, sequence)[0]


def sequence_mean(values: Tensor, sequence: Tensor) -> Tensor:
    """The mean of `values` (N,) over each token's sequence, at every token (N,). Ids must be non-decreasing."""
    total, count = _by_sequence(values, sequence)
    return total / count


def sequence_position(sequence: Tensor) -> Tensor:
    """Where each token of `sequence` (N,), non-decreasing ids, lies in its sequence: (N,) fp32, 0 first, 1 last."""
    _, index, count = torch.unique_consecutive(sequence, return_inverse=True, return_counts=True)
    place = torch.arange(sequence.shape[0], device=sequence.device) - (count.cumsum(0) - count)[index]
    return place / (count[index] - 1).clamp(min=1)


def _by_sequence(values: Tensor, sequence: Tensor) -> tuple[Tensor, Tensor]:
    _, index, count = torch.unique_consecutive(sequence, return_inverse=True, return_counts=True)
    # No atomics: the same bits in every run, on a GPU as well.
    return torch.segment_reduce(values, "sum", lengths=count)[index], count[index]
