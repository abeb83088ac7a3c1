"""A batch of three sequences of tokens, for the tests of the losses."""

import math

import torch

from cosmo_fast.objectives import TokenBatch

SEQUENCE = torch.tensor([0] * 3 + [1] * 5 + [2] * 4)
N = len(SEQUENCE)
POSITION = [0, 1 / 2, 1, 0, 1 / 4, 2 / 4, 3 / 4, 1, 0, 1 / 3, 2 / 3, 1]
ADVANTAGES = (1.3, -0.7, 0.4)


def policy_batch(seed=0, spread=0.5):
    """logp (a leaf), entropy and a batch of three sequences; log-ratios have this spread."""
    g = torch.Generator().manual_seed(seed)
    logp, ref = (-torch.rand(N, generator=g, dtype=torch.float64) * 3 for _ in range(2))
    old = logp + spread * torch.randn(N, generator=g, dtype=torch.float64)
    advantage = torch.tensor(ADVANTAGES, dtype=torch.float64)[SEQUENCE]
    position = torch.tensor(POSITION, dtype=torch.float64)
    batch = TokenBatch(
        torch.zeros(N, dtype=torch.int64), torch.ones(N), SEQUENCE, advantage, old, ref, position=position
    )
    return logp.requires_grad_(), torch.rand(N, generator=g, dtype=torch.float64), batch


def gradient_of(made, logp, entropy, batch):
    return torch.autograd.grad(made(logp, entropy, batch)[0].sum(), logp)[0]


def mates(i):
    return [j for j in range(N) if SEQUENCE[j] == SEQUENCE[i]]


def phi(log_w, a, k=(2, 3), rate=(3, 2)):
    k, rate = (k[0], rate[0]) if a >= 0 else (k[1], rate[1])
    return math.exp(log_w) ** k * math.exp(rate - rate * math.exp(log_w))
