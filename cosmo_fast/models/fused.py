"""Modules of a transformers model that compute the same with less: norms, gated MLPs, attention, patches' projections.

A module's class is changed, on the instance: weights, names, hooks, what is saved and what PEFT matches stay, a
deepcopy computes with its own weights, and no other model is touched.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from cosmo_fast import ops
from cosmo_fast.models.attention import CLASSES


class RMSNorm(nn.Module):
    """A norm with ``weight`` (d,) and ``variance_epsilon``, by :func:`cosmo_fast.ops.rms_norm`."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return ops.rms_norm(hidden_states, self.weight, self.variance_epsilon)


class GatedMLP(nn.Module):
    """An MLP with ``gate_proj``, ``up_proj`` and ``down_proj``, by :func:`cosmo_fast.ops.swiglu`."""

    def forward(self, hidden_state: torch.Tensor) -> torch.Tensor:
        return self.down_proj(ops.swiglu(self.gate_proj(hidden_state), self.up_proj(hidden_state)))


class PatchProjection(nn.Conv3d):
    """A convolution (n, C, t, p, p) -> (n, D, 1, 1, 1) of patches as large as its kernel: one matrix product.

    Raises:
        ValueError: patches of another size.
    """

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        if patches.shape[1:] != self.weight.shape[1:]:
            raise ValueError(f"patches {tuple(patches.shape)} do not have the kernel's {tuple(self.weight.shape[1:])}")
        return functional.linear(patches.flatten(1), self.weight.flatten(1), self.bias)[..., None, None, None]


def fuse(model: nn.Module) -> None:
    """Installs them in ``model``, in place, where a module is known to compute what they do.

    A norm or an MLP is known by the names of its parts and by giving, on a test input, bit for bit what the reference
    of its op gives; the first of each class is tried. They stay transformers' own on any device but the CPU: the ops
    are CPU kernels. The projection is plain PyTorch and is installed everywhere, and so is the attention of the known
    classes, whose ops know the device.
    """
    on_cpu = next(model.parameters()).device.type == "cpu"
    known: dict[tuple[type, type | None], bool] = {}
    for module in model.modules():
        children, kind = dict(module.named_children()), CLASSES.get(type(module).__name__)
        if kind and type(module).__module__.startswith("transformers.models."):
            module.__class__ = kind
            continue
        if type(module) is nn.Conv3d and _takes_patches(module):
            module.__class__ = PatchProjection
            continue
        if not on_cpu or isinstance(module, (RMSNorm, GatedMLP)):
            continue
        if not children and {*module._parameters} == {"weight"} and hasattr(module, "variance_epsilon"):
            kind, same = RMSNorm, _is_norm
        elif {*children} == {"gate_proj", "up_proj", "down_proj", "act_fn"}:
            kind, same = GatedMLP, _is_gated_mlp
        else:
            continue
        key = type(module), type(children.get("act_fn"))
        if key not in known:
            known[key] = same(module)
        if known[key]:
            module.__class__ = kind


def _takes_patches(conv: nn.Conv3d) -> bool:
    plain = conv.padding == (0, 0, 0) and conv.dilation == (1, 1, 1) and conv.groups == 1
    return plain and conv.stride == conv.kernel_size


@torch.no_grad()
def _is_norm(module: nn.Module) -> bool:
    x = _rows(module.weight, module.weight.shape[0])
    return torch.equal(module(x), ops.rms_norm_reference(x, module.weight, module.variance_epsilon))


@torch.no_grad()
def _is_gated_mlp(module: nn.Module) -> bool:
    x = _rows(module.down_proj.weight, module.gate_proj.in_features)
    product = ops.swiglu_reference(module.gate_proj(x), module.up_proj(x))
    return torch.equal(module.act_fn(x), functional.silu(x)) and torch.equal(module(x), module.down_proj(product))


def _rows(weight: torch.Tensor, size: int) -> torch.Tensor:
    return torch.linspace(-2, 3, 2 * size, dtype=weight.dtype).view(2, size)
