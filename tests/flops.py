"""Counts the arithmetic of matrix products."""

from torch.utils._python_dispatch import TorchDispatchMode


class Flops(TorchDispatchMode):
    """Multiply-adds of every matrix product, in units of one n·v·d product."""

    def __init__(self, n, v, d):
        super().__init__()
        self.unit, self.total = n * v * d, 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Counts and passes on."""
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            a, b = args[-2:] if name == "mm" else args[1:3]
            self.total += a.shape[0] * a.shape[1] * b.shape[1] / self.unit
        return func(*args, **(kwargs or {}))
