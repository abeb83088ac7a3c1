"""LoRA through PEFT, inside the transformers model: the packed forward, its head and the family files see no change.

The base is frozen; the adapter is fp32 whatever the model's dtype. The reference of a stage is the adapter switched
off, or, where the stage did not begin with a fresh one, the adapter as it was then: no second model in either case.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def _peft():
    try:
        import peft
    except ImportError as error:
        raise ValueError("LoRA (lora_r, or an adapter folder) needs PEFT: pip install peft") from error
    return peft


class Adapter:
    """A LoRA adapter inside ``policy.model``.

    Attributes:
        parameters: its weights by the names that PEFT saves them under, fp32; nothing else learns.

    Raises:
        ValueError: PEFT is missing, no module has the wanted name, or the adapter would lie on the head or on the input
            embeddings, whose weights the sampler and the loss read directly.
    """

    def __init__(self, policy, config):
        peft = _peft()
        if policy.adapter is not None:
            raise ValueError("the model has an adapter already: train its merged model (the root of its run folder)")
        self.model = peft.get_peft_model(policy.model, config)
        model = policy.model
        for name, layer in (("head", model.get_output_embeddings()), ("embeddings", model.get_input_embeddings())):
            if isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer):
                self.model.unload()
                raise ValueError(
                    f"lora_target_modules={config.target_modules!r} names the {name}: not supported; name linear "
                    "layers of the blocks, or leave it out for all of the language model's"
                )
        named = self.model.named_parameters()
        self.parameters = {name.replace(".default", ""): p for name, p in named if p.requires_grad}
        self._start: list[torch.Tensor] | None = None
        policy.adapter = self

    def state(self) -> dict[str, torch.Tensor]:
        """Copies of the weights under the names that PEFT saves them under."""
        return {name: p.detach().clone() for name, p in self.parameters.items()}

    def save(self, folder: Path) -> None:
        """``adapter_model.safetensors`` and ``adapter_config.json``, as ``PeftModel.from_pretrained`` reads them."""
        self.model.peft_config["default"].save_pretrained(folder)
        save_file(self.state(), folder / WEIGHTS)

    def read(self, folder: Path) -> dict[str, torch.Tensor]:
        """The :meth:`state` that another run saved.

        Raises:
            ValueError: it is another adapter's.
        """
        saved = load_file(folder / WEIGHTS)
        if differ := sorted(saved.keys() ^ self.parameters.keys()):
            raise ValueError(f"{folder / WEIGHTS} holds another adapter: {differ[0]!r} is only in one of the two")
        return saved

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        for name, value in self.read(folder).items():
            self.parameters[name].copy_(value)

    def keep_reference(self, state: dict[str, torch.Tensor]) -> None:
        """The reference is the adapter with this ``state``: switched off if that adds nothing."""
        adds = any(value.any() for name, value in state.items() if ".lora_B." in name)
        self._start = [state[name].to(p.device) for name, p in self.parameters.items()] if adds else None

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside it, the model is the one of :meth:`keep_reference`; call it without gradients."""
        if self._start is None:
            learning = [p.requires_grad for p in self.parameters.values()]
            try:
                with self.model.disable_adapter():
                    yield
            finally:  # PEFT lets all of them learn again, those of a frozen tower too
                for parameter, learns in zip(self.parameters.values(), learning, strict=True):
                    parameter.requires_grad_(learns)
            return
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for i, parameter in enumerate(self.parameters.values()):
            parameter.data, self._start[i] = self._start[i], parameter.data

    @torch.no_grad()
    def merged(self) -> dict[str, torch.Tensor]:
        """The model's state without adapter names, base + B·A·α/r summed in fp32, rounded to the base's dtype once."""
        layers = {n: m for n, m in self.model.base_model.model.named_modules() if hasattr(m, "base_layer")}
        state = {}
        for name, value in self.model.base_model.model.state_dict().items():
            if ".lora_" in name:
                continue
            if name.endswith(".base_layer.weight"):
                layer = layers[name.removesuffix(".base_layer.weight")]
                value = (value.float() + layer.get_delta_weight("default")).to(value.dtype)
            state[name.replace(".base_layer.", ".")] = value
        return state


def add_adapter(
    policy, *, r: int, alpha: float = 32, target_modules: str | list[str] | None = None, seed: int = 0
) -> Adapter:
    """A fresh adapter of rank ``r`` that adds B·A·``alpha``/r, B = 0, so that the policy is the base model's.

    Args:
        policy: its model is changed in place. target_modules: as in PEFT (names, a regular expression, or
            ``all-linear``); None for all linear layers of the language model, neither tower nor head.
        seed: of A, drawn on the CPU.
    """
    if target_modules is None:
        target_modules = _language_model_layers(policy)
    config = _peft().LoraConfig(r=r, lora_alpha=alpha, target_modules=target_modules, task_type=None)
    with torch.random.fork_rng(devices=[policy.device] if policy.device.type == "cuda" else []):
        torch.manual_seed(seed)
        return Adapter(policy, config)


def load_adapter(policy, folder: Path) -> Adapter:
    """The adapter of a folder, on the policy's base model."""
    adapter = Adapter(policy, _peft().PeftConfig.from_pretrained(folder))
    adapter.load(folder)
    return adapter


def _language_model_layers(policy) -> str:
    prefix = next(name for name, module in policy.model.named_modules() if module is policy.model.get_decoder())
    leaves = {
        name.rsplit(".", 1)[-1] for name, m in policy.model.get_decoder().named_modules() if isinstance(m, nn.Linear)
    }
    return rf"{re.escape(prefix)}\.(.+\.)?({'|'.join(sorted(leaves))})"
