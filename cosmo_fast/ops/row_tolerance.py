"""Fewer rows in the gradient products than have a gradient, at a stated price. Opt-in; ours.

The gradient of one token's loss by its logits has ‖dz‖₁ = 2|c|(1 − p) for a coefficient c by logp, and at most 2|c|·H
for one by the entropy H: tokens of which the policy is sure have next to none, and a trained policy is sure of most.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_UNITS = 2**40  # of a chunk's Σ‖dz‖₁


@dataclass(frozen=True)
class RowTolerance:
    """Rows with the smallest gradients, together at most `share` of a chunk's Σ‖dz‖₁, leave the gradient products.

    share: in [0, 1). unbiased False: they are dropped, and the gradient is off by no more than the bounds that
    `LossOutput.dropped` reports. unbiased True: each stays with probability ‖dz‖₁ / (that of the smallest row outside)
    and is scaled up by its inverse: the gradient is right in expectation, the reported errors are root mean squares.
    seed: of that choice; give every call its own. Loss, log-probs, entropy and metrics are always of all rows.
    """

    share: float
    unbiased: bool = False
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.share < 1:
            raise ValueError(f"row_tolerance must lie in [0, 1), got {self.share}")

    def generator(self, device: torch.device) -> torch.Generator | None:
        """The source of the choice, for all chunks of one call."""
        return torch.Generator(device).manual_seed(self.seed) if self.unbiased else None

    def thin(self, size: Tensor, norms: Tensor, generator: torch.Generator | None) -> tuple[Tensor, dict[str, Tensor]]:
        """(factor of every row's coefficients (n,), what it costs) from ‖dz‖₁ and ‖hidden row‖₂, (n,) each.

        The costs, fp64 scalars: `rows` with a gradient that are left out; `dw`, a bound on the Frobenius norm of dW's
        error; `dx`, that of dX's in units of the largest Euclidean norm of a row of the head. See `add` for several.
        """
        size, norms = size.double(), norms.double()
        ordered, order = size.sort()
        # In integers, whose running sum is the same on every device and in every run.
        units = (ordered / ordered.sum() * _UNITS).nan_to_num(nan=2.0 * _UNITS).long()
        small = torch.zeros_like(size, dtype=torch.bool).scatter(0, order, units.cumsum(0) <= self.share * _UNITS)
        kept, error = torch.zeros_like(size), size
        if generator is not None:
            outside = torch.where(small, torch.inf, size).amin()
            outside = torch.where(outside.isfinite(), outside, torch.where(small, size, 0.0).amax())
            draw = torch.rand(size.shape, generator=generator, device=size.device, dtype=size.dtype)
            kept = torch.where(draw * outside < size, outside / size, 0.0)
            error = (size * (outside - size)).clamp(min=0).sqrt()
        factor = torch.where(small, kept, 1.0)
        error = torch.where(small & (size > 0), error, 0.0)
        gone = ((factor == 0) & (size > 0)).sum().double()
        dw = torch.linalg.vector_norm(error * norms) if self.unbiased else (error * norms).sum()
        return factor, {"rows": gone, "dw": dw, "dx": torch.linalg.vector_norm(error)}

    def nothing(self, device: torch.device) -> dict[str, Tensor]:
        """The costs of no chunk."""
        return {name: torch.zeros((), dtype=torch.float64, device=device) for name in ("rows", "dw", "dx")}

    def add(self, name: str, one: Tensor | float, other: Tensor | float) -> Tensor | float:
        """The cost `name` of two chunks or calls: root mean squares, and dX's rows, add by their squares."""
        if name == "rows" or (name == "dw" and not self.unbiased):
            return one + other
        return (one * one + other * other) ** 0.5
