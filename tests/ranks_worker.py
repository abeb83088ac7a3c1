"""What every process of test_distributed.py runs: a recipe, keeping the gradients of its first optimiser steps."""

import sys
import zlib

import torch
from safetensors.torch import save_file

from cosmo_fast import distributed
from cosmo_fast.config import load_config
from cosmo_fast.trainer import Trainer


def spread(prompts, completions, **columns):
    """A reward that tells any two texts apart."""
    return [zlib.crc32(text.encode()) % 97 / 97 for text in completions]


def main(recipe, out, *flags):
    torch.set_num_threads(1)
    trainer = Trainer(load_config(recipe, list(flags)))
    kept = []

    def keep(update):
        named = {n: p for n, p in trainer.policy.model.named_parameters() if p.requires_grad}
        full = (
            (lambda p: p.grad) if trainer.ranks.deepspeed is None else sys.modules["deepspeed"].utils.safe_get_full_grad
        )
        kept.append({n: g.detach().float().clone() for n, p in named.items() if (g := full(p)) is not None})

    for kind in (distributed.Update, distributed.ZeroUpdate):
        norm = kind.norm
        kind.norm = lambda self, norm=norm: (keep(self), norm(self))[1]
    trainer.train()
    if trainer.ranks.first:
        save_file({f"{i}/{n}": g.contiguous() for i, grads in enumerate(kept) for n, g in grads.items()}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
