"""A batch of four sequences near an old policy, some tokens masked, for the tests of the loss engine."""

import torch

from cosmo_fast.objectives import TokenBatch
from cosmo_fast.ops import linear_logprobs_reference


def loss_case(n=23, d=8, v=37, dtype=torch.float64, seed=0, masked=0.3, scale=1.0, device="cpu"):
    """hidden, weight, bias (leaves) and a batch of 4 sequences, some tokens masked; a policy near the old one."""
    g = torch.Generator().manual_seed(seed)

    def leaf(*shape):
        return (scale * torch.randn(*shape, generator=g, dtype=torch.float64)).to(device, dtype).requires_grad_()

    hidden, weight, bias = leaf(n, d), leaf(v, d), leaf(v)
    targets = torch.randint(0, v, (n,), generator=g).to(device)
    keep = (torch.rand(n, generator=g) >= masked).to(device)
    sequence = torch.arange(n, device=device) * 4 // max(n, 1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    with torch.no_grad():
        logp, _ = linear_logprobs_reference(hidden.double(), weight.double(), targets, bias=bias.double())
    noise = [0.3 * torch.randn(n, generator=g, dtype=torch.float64).to(device) for _ in range(3)]
    batch = TokenBatch(
        targets,
        (torch.rand(n, generator=g).to(device) + 0.1) * keep / max(n, 1),
        sequence,
        (noise[0] * 3).to(wide),
        (logp + noise[1]).to(wide),
        (logp + noise[2]).to(wide),
    )
    return hidden, weight, bias, batch


def double(batch):
    """The batch in fp64."""
    given = {k: x for k, x in vars(batch).items() if x is not None}
    return TokenBatch(**{k: x.double() if x.is_floating_point() else x for k, x in given.items()})


def grads(loss, *leaves):
    """Gradients of the loss by the leaves."""
    return torch.autograd.grad(loss, leaves)


def assert_near(got, expected, tolerance=1e-12):
    """Equal up to rounding, relative to the largest element."""
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * max(1.0, b.abs().max().item() if b.numel() else 1.0))
