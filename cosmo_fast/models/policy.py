"""A Hugging Face model with the packed forward: plan + vision features -> hidden states -> log-probs."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer
from transformers.modeling_layers import GradientCheckpointingLayer

from cosmo_fast import ops
from cosmo_fast.models import adapter as lora
from cosmo_fast.models import internvl, prune, qwen2_vl, qwen3_vl, text
from cosmo_fast.models.fused import fuse
from cosmo_fast.plan import Plan

FAMILIES = {name: family for family in (internvl, qwen2_vl, qwen3_vl, text) for name in family.MODEL_TYPES}

VISION, ENDS = ("vision_tower", "merger"), ("embeddings", "head")  # parts that can be frozen, with language_model


class PackedForward:
    """What a forward is told about attention: the plan's segments, through :func:`cosmo_fast.ops.prefix_attention`."""

    def __init__(self, plan: Plan):
        self.plan = plan

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        return ops.prefix_attention(q, k, v, self.plan.at(layer), scale=scale)


class Policy:
    """A model, its tokenizer and image processor, and the forward that sampling, scoring and training share.

    Attributes:
        model: the transformers model. tokenizer, image_processor: its own. family: the module of its architecture.
        eos_ids: ids that end a response. adapter: its LoRA adapter, or None.
    """

    def __init__(self, model: nn.Module, tokenizer, image_processor, family):
        self.model, self.tokenizer, self.image_processor, self.family = model, tokenizer, image_processor, family
        self.adapter: lora.Adapter | None = None
        eos = model.generation_config.eos_token_id
        eos = eos if isinstance(eos, list) else [eos]
        self.eos_ids = sorted({i for i in (*eos, tokenizer.eos_token_id) if i is not None})
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"the tokenizer of this {model.config.model_type!r} model has no eos_token to end an answer with; set "
                "it in tokenizer_config.json"
            )
        family.register_attention(model)
        fuse(model)

    @property
    def device(self) -> torch.device:
        return self.head_weight.device

    @property
    def head_weight(self) -> torch.Tensor:
        """(V, d) of the language-model head."""
        return self.model.get_output_embeddings().weight

    @property
    def vision_parameters(self) -> list[nn.Parameter]:
        """Those of the tower, its merger or projector included."""
        parts = [f".{part}." for part in self.family.VISION_PARTS]
        return [p for name, p in self.model.named_parameters() if any(part in f".{name}" for part in parts)]

    @property
    def vision_frozen(self) -> bool:
        return not any(p.requires_grad for p in self.vision_parameters)

    def freeze(self, parts: Sequence[str]) -> None:
        """``parts`` do not learn, all else does; with an adapter, what the adapter has there.

        Args:
            parts: vision_tower (less the merger), merger (or projector), embeddings, language_model, head, or regular
                expressions that are searched in the weights' names.

        Raises:
            ValueError: a part without weights, a bad expression, half of two tied parts, nothing left that learns.
        """
        own = self.model.parameters() if self.adapter is None else self.adapter.parameters.values()
        learning, frozen = {id(p) for p in own}, set()
        for part in parts:
            found = self._part(part)
            if not found and not (part in VISION and not self.vision_parameters):
                raise ValueError(f"freeze names {part!r}, but no weight of this model has that in its name")
            frozen |= found
        if self.adapter is None and self._part("head") & self._part("embeddings") and len({*parts} & set(ENDS)) == 1:
            raise ValueError(
                f"freeze={[*parts]}: embeddings and head are one weight in this model; name both or neither"
            )
        if not learning - frozen:
            raise ValueError(f"freeze={[*parts]} leaves nothing that learns")
        for parameter in self.model.parameters():
            parameter.requires_grad_(id(parameter) in learning - frozen)

    def freeze_vision_tower(self, frozen: bool) -> None:
        """The whole tower, its merger included, does not learn, all else does; or all of it learns."""
        self.freeze(VISION if frozen else ())

    def _part(self, part: str) -> set[int]:
        """Ids of the weights that a name in ``freeze`` stands for."""
        embeddings, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        if part in VISION:
            vision = {id(p) for p in self.vision_parameters}
            merger = {id(p) for n, p in self.model.named_parameters() if re.search("merger|projector", n)} & vision
            return merger if part == "merger" else vision - merger
        ends = {"embeddings": embeddings, "head": head}
        if part in ends:
            return {id(p) for p in ends[part].parameters()}
        if part == "language_model":
            inputs = {id(p) for p in embeddings.parameters()}
            return {id(p) for p in self.model.get_decoder().parameters()} - inputs
        try:
            return {id(p) for name, p in self.model.named_parameters() if re.search(part, name)}
        except re.error as error:
            raise ValueError(f"freeze: {part!r} is neither a part nor a regular expression: {error}") from error

    def checkpoint_gradients(self) -> None:
        """Keeps only the layers' inputs for the backward, which computes each layer again.

        transformers checkpoints layers that train; here only the layers themselves are told so, what is inside them
        stays in evaluation, so that no dropout comes back.

        Raises:
            ValueError: the architecture has no layers that can be checkpointed.
        """
        # The older name warns where the newer one is there.
        enable = getattr(self.model, "activation_checkpointing_enable", self.model.gradient_checkpointing_enable)
        enable({"use_reentrant": False, "preserve_rng_state": False})
        for module in self.model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = True

    def hidden(self, plan: Plan, features: torch.Tensor | None, attention=None) -> torch.Tensor:
        """Final hidden states (T, d) of a packed micro-batch, of the tokens that are left after pruning.

        Args:
            plan: the layout; where it waits for the choice of vision rows, they are chosen.
            features: the family's vision features (m, ...) of ``plan.media``, in that order, or None without any.
            attention: who attends to whom; by default the plan's prompts and responses.
        """
        if plan.unchosen and not plan.layer:
            prune.choose(self, plan, features)
        embeddings, inputs = self.embed(plan, features)
        if plan.layer:
            for layer in self.model.get_decoder().layers:
                if prune.enter not in layer._forward_pre_hooks.values():
                    layer.register_forward_pre_hook(prune.enter, with_kwargs=True)
            inputs["pruning"] = self, plan, features
        attention = attention or PackedForward(plan)
        return self.forward(embeddings, plan.tensor("positions", self.device), attention, **inputs)

    def embed(self, plan: Plan, features: torch.Tensor | None) -> tuple[torch.Tensor, dict[str, Any]]:
        """What enters the first layer, (T, d), and what else the family gives its language model."""
        embeddings = self.model.get_input_embeddings()(plan.tensor("tokens", self.device))
        inputs: dict[str, Any] = {}
        if len(plan.image_rows):
            rows, of = plan.tensor("image_rows", self.device), plan.tensor("feature_rows", self.device)
            picked = features.to(embeddings.dtype).index_select(0, of)
            embeddings, inputs = self.family.language_inputs(embeddings, rows, picked)
        return embeddings, inputs

    def forward(self, embeddings: torch.Tensor, positions: torch.Tensor, attention, **inputs) -> torch.Tensor:
        """Language model on (T, d) embeddings at (3, T) positions -> final hidden states (T, d).

        ``inputs`` are what the family's ``language_inputs`` adds. No mask is made: the plan decides who sees whom.
        """
        decoder, x = self.model.get_decoder(), embeddings.unsqueeze(0)
        positions = positions.unsqueeze(1) if self.family.ROTARY_AXES == 3 else positions[:1]
        told: dict[str, Any] = {"use_cache": False, "plan": attention}
        if inputs or decoder._forward_pre_hooks or decoder._forward_hooks or not _plain(decoder):
            return decoder(inputs_embeds=x, position_ids=positions, **told, **inputs).last_hidden_state.squeeze(0)
        # The same without what serves masks, caches and recorded outputs, which takes as long as a small model's step.
        told |= {"attention_mask": None, "position_ids": None, "past_key_values": None}
        told["position_embeddings"] = decoder.rotary_emb(x, positions)
        for layer in decoder.layers:
            x = layer(x, **told)
        return decoder.norm(x).squeeze(0)

    def logprobs(
        self, plan: Plan, features: torch.Tensor | None, temperature: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and entropies (N,) of the plan's response tokens; differentiable."""
        hidden = self.hidden(plan, features)[plan.tensor("label_rows", self.device)]
        return ops.linear_logprobs(
            hidden, self.head_weight, plan.tensor("targets", self.device), temperature=temperature
        )

    def save(self, folder: Path, *, merged: bool = False) -> None:
        """An ordinary Hugging Face folder: weights, config, tokenizer, chat template, image processor.

        merged: of a policy with an adapter, the complete model; otherwise the adapter as PEFT reads it, and no weights
        of the base.
        """
        if self.adapter is not None and not merged:
            self.adapter.save(folder)
            self.model.config.save_pretrained(folder)  # the dtype that the adapter was trained on
        else:
            state = None if self.adapter is None else self.adapter.merged()
            self.model.save_pretrained(folder, state_dict=state)
        self.tokenizer.save_pretrained(folder)
        if self.image_processor is not None:
            self.image_processor.save_pretrained(folder)


def load_policy(
    name_or_path: str | Path,
    *,
    device: str = "auto",
    trust_remote_code: bool = False,
    dtype: Literal["float32", "bfloat16"] | None = None,
    weights: bool = True,
) -> Policy:
    """Loads a model folder, an adapter's folder (with the base model that it names) or a hub name as a :class:`Policy`.

    device: "auto" is CUDA where there is one. dtype: None for the one it was saved in, fp32 where that is neither.
    weights: False reads the configuration, tokenizer and image processor alone, to encode rows with.

    Raises:
        ValueError: no model there, weights missing, an architecture that the packed forward does not know, no such
            device.
    """
    path, device = Path(name_or_path), _device(device)
    if (path / lora.CONFIG).is_file():
        return _load_with_adapter(path, device, trust_remote_code, dtype, weights)
    if path.is_absolute() and not (path / "config.json").is_file():
        raise ValueError(f"model_name_or_path={str(path)!r} is not a model folder: it has no config.json")
    try:
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise ValueError(f"model_name_or_path={str(name_or_path)!r} cannot be loaded: {error}") from error
    family: Any = FAMILIES.get(config.model_type)
    if family is None:
        raise ValueError(
            f"model_name_or_path={str(name_or_path)!r} is a {config.model_type!r} model; supported: {sorted(FAMILIES)}"
        )
    saved = str(config.dtype).removeprefix("torch.")
    dtype = dtype or ("bfloat16" if saved == "bfloat16" else "float32")
    options = {"dtype": getattr(torch, dtype), "trust_remote_code": trust_remote_code, "output_loading_info": True}
    found: dict[str, Any] = {"missing_keys": []}
    if weights:
        model, found = family.MODEL.from_pretrained(name_or_path, **options)
    else:
        device = "meta"
        with torch.device(device):
            model = family.MODEL.from_config(config, trust_remote_code=trust_remote_code)
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"model_name_or_path={str(name_or_path)!r}: {len(missing)} weights of the model are not in its files, "
            f"first {missing[0]!r}; is the folder complete?"
        )
    model = model.to(device)
    # Dropout would make two passes over the same tokens differ, and with them the first policy ratio.
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    return Policy(model, tokenizer, family.load_image_processor(name_or_path), family)


def _plain(decoder: nn.Module) -> bool:
    return type(decoder).__module__.startswith("transformers.models.")


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={name!r} is not there: {error}; use auto or cpu") from error
    return name


def _load_with_adapter(folder: Path, device: str, trust_remote_code: bool, dtype, weights: bool) -> Policy:
    base = json.loads((folder / lora.CONFIG).read_text())["base_model_name_or_path"]
    if not base:
        raise ValueError(f"{folder / lora.CONFIG} names no base model: set its base_model_name_or_path")
    if dtype is None and (folder / "config.json").is_file():
        dtype = json.loads((folder / "config.json").read_text())["dtype"]
    policy = load_policy(base, device=device, trust_remote_code=trust_remote_code, dtype=dtype, weights=weights)
    if weights:
        lora.load_adapter(policy, folder)
    return policy
