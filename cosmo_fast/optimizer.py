"""AdamW with fp32 masters beside bf16 parameters."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


class AdamW(torch.optim.AdamW):
    """AdamW over what learns; vectors (norms, biases) are not decayed.

    A bf16 parameter has an fp32 master: the optimizer's parameter, moments and gradient are the master's, and after
    :meth:`step` the parameter is the master, rounded. Without it an update below 2⁻⁹ of a weight is lost. The gradient
    of every backward is added to the master's as soon as autograd has it, and freed: micro-batches add up in fp32, and
    no bf16 gradient outlives its layer. fp32 parameters are the optimizer's own, as in PyTorch.

    Args:
        named: parameters by name; what does not learn is left out. keep_masters: False where another keeps them
            (DeepSpeed). settings: as in PyTorch.

    Attributes:
        names: of the parameters that the groups hold. masters: (parameter, master) pairs.
    """

    def __init__(
        self, named: Iterable[tuple[str, nn.Parameter]], *, weight_decay: float, keep_masters: bool = True, **settings
    ):
        self.names: dict[nn.Parameter, str] = {}
        self.masters: list[tuple[nn.Parameter, nn.Parameter]] = []
        self._hooks = []
        for name, parameter in named:
            if not parameter.requires_grad:
                continue
            owner = parameter
            if keep_masters and parameter.dtype == torch.bfloat16:
                owner = nn.Parameter(parameter.detach().float())
                self.masters.append((parameter, owner))
                self._hooks.append(parameter.register_post_accumulate_grad_hook(_collector(owner)))
            self.names[owner] = name
        groups = [
            {"params": [p for p in self.names if p.dim() > 1], "weight_decay": weight_decay},
            {"params": [p for p in self.names if p.dim() <= 1], "weight_decay": 0.0},
        ]
        super().__init__(groups, fused=True, **settings)

    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        self.publish()
        return loss

    @torch.no_grad()
    def publish(self) -> None:
        """Every bf16 parameter becomes its master, rounded."""
        for parameter, master in self.masters:
            parameter.copy_(master)

    def release(self) -> None:
        """Gradients stay with the parameters again; call it before another optimizer is made of them."""
        for hook in self._hooks:
            hook.remove()

    def tensors(self) -> dict[str, torch.Tensor]:
        """All state by ``entry/parameter name``, the masters among it."""
        held = {
            f"{entry}/{self.names[p]}": torch.as_tensor(value).contiguous()
            for p, entries in self.state.items()
            for entry, value in entries.items()
        }
        return held | {f"master/{self.names[master]}": master.detach() for _, master in self.masters}

    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Puts :meth:`tensors` back, each beside its parameter."""
        owners = {name: p for p, name in self.names.items()}
        for key, value in tensors.items():
            entry, name = key.split("/", 1)
            if entry == "master":
                owners[name].data.copy_(value)
            else:
                self.state[owners[name]][entry] = value.to(owners[name].device)
        self.publish()


def _collector(master: nn.Parameter):
    def collect(parameter: nn.Parameter) -> None:
        if master.grad is None:
            master.grad = parameter.grad.float()
        else:
            master.grad += parameter.grad
        parameter.grad = None

    return collect
