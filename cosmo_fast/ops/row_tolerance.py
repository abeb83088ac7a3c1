"""Fewer rows in the gradient products than have a gradient, at a stated price. Opt-in; ours.

The gradient of one token's loss by its logits has ‖dz‖₁ = 2|c|(1 − p) for a coefficient c by logp, and at most 2|c|·H
for one by the entropy H: tokens of which the policy is sure have next to none, and a trained policy is sure of most.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


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

        The costs, scalars that add up over chunks: `rows` left out; `dw`, a bound on the Frobenius norm of dW's error;
        `dx`, that of dX's in units of the largest Euclidean norm of a row of the head (its root mean square and so on).
        """
        ordered, order = size.sort()
        few = ordered.cumsum(0, dtype=torch.float64) <= self.share * ordered.sum(dtype=torch.float64)
        small = torch.zeros_like(few).scatter(0, order, few)
        if generator is None:
            kept = torch.zeros_like(size)
            error = size
        else:
            outside = torch.where(small, torch.inf, size).amin()
            inside = torch.where(small, size, 0.0).amax()
            chance = (size / torch.where(outside.isfinite(), outside, inside)).clamp(max=1)
            chosen = torch.rand(size.shape, generator=generator, device=size.device, dtype=size.dtype) < chance
            kept = torch.where(chosen, 1 / chance, 0.0)
            error = size * (1 / chance - 1).clamp(min=0).sqrt()
        factor = torch.where(small, kept, 1.0)
        error = torch.where(small & (size > 0), error, 0.0).double()
        weighted = error * norms.double()
        add = torch.sum if generator is None else torch.linalg.vector_norm
        return factor, {"rows": (factor == 0).sum(), "dw": add(weighted), "dx": torch.linalg.vector_norm(error)}
