"""Where the kernels' tests run: a GPU, the CPU, or Triton's interpreter, whose twins take the CPU kernels' place."""

import importlib
import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
compiled_only = pytest.mark.skipif(INTERPRETED, reason="too slow for, or no business of, the interpreter")
_libraries = []  # an implementation lives as long as its library


def interpret(module, *ops):
    """Under the interpreter all below runs through these ops of cosmo_fast.kernels.`module`, which is returned."""
    if not INTERPRETED:
        return None
    twins = importlib.import_module(f"cosmo_fast.kernels.{module}")
    _libraries.append(torch.library.Library("cosmo_fast", "IMPL"))
    for op in ops:
        _libraries[-1].impl(op, getattr(twins, op), "CPU", allow_override=True)
    return twins
