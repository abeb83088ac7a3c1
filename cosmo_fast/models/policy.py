"""A Hugging Face model with the packed forward: plan + vision features -> hidden states -> log-probs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer

from cosmo_fast import ops
from cosmo_fast.models import qwen2_5_vl
from cosmo_fast.plan import Plan

FAMILIES = {qwen2_5_vl.MODEL_TYPE: qwen2_5_vl}


class PackedForward:
    """What a forward is told about attention: the plan's segments, through :func:`cosmo_fast.ops.prefix_attention`."""

    def __init__(self, plan: Plan):
        self.segments = plan.segments

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        return ops.prefix_attention(q, k, v, self.segments, scale=scale)


class Policy:
    """A model, its tokenizer and image processor, and the forward that sampling, scoring and training share.

    Attributes:
        model: the transformers model. tokenizer, image_processor: its own. family: the module of its architecture.
        eos_ids: ids that end a response.
    """

    def __init__(self, model: nn.Module, tokenizer, image_processor, family):
        self.model, self.tokenizer, self.image_processor, self.family = model, tokenizer, image_processor, family
        eos = model.generation_config.eos_token_id
        eos = eos if isinstance(eos, list) else [eos]
        self.eos_ids = sorted({*(i for i in eos if i is not None), tokenizer.eos_token_id})
        family.register_attention(model)

    @property
    def device(self) -> torch.device:
        return self.head_weight.device

    @property
    def head_weight(self) -> torch.Tensor:
        """(V, d) of the language-model head."""
        return self.model.get_output_embeddings().weight

    @property
    def vision_frozen(self) -> bool:
        return not any(p.requires_grad for p in self.family.vision_parameters(self.model))

    def freeze_vision_tower(self, frozen: bool) -> None:
        """The whole tower, its merger included, learns or not."""
        for parameter in self.family.vision_parameters(self.model):
            parameter.requires_grad_(not frozen)

    def hidden(self, plan: Plan, features: torch.Tensor | None, attention=None) -> torch.Tensor:
        """Final hidden states (T, d) of a packed micro-batch.

        Args:
            plan: the layout. features: vision features (m, d) of ``plan.media``, in that order, or None without any.
            attention: who attends to whom; by default the plan's prompts and responses.
        """
        embeddings = self.model.get_input_embeddings()(plan.tensor("tokens", self.device))
        if len(plan.image_rows):
            rows, of = plan.tensor("image_rows", self.device), plan.tensor("feature_rows", self.device)
            embeddings = embeddings.index_copy(0, rows, features.to(embeddings.dtype).index_select(0, of))
        return self.forward(embeddings, plan.tensor("positions", self.device), attention or PackedForward(plan))

    def forward(self, embeddings: torch.Tensor, positions: torch.Tensor, attention) -> torch.Tensor:
        """Language model on (T, d) embeddings at (3, T) positions -> final hidden states (T, d)."""
        return self.family.language_model(self.model)(
            inputs_embeds=embeddings.unsqueeze(0),
            position_ids=positions.unsqueeze(1),
            attention_mask={"full_attention": None, "sliding_attention": None},
            use_cache=False,
            plan=attention,
        ).last_hidden_state[0]

    def logprobs(
        self, plan: Plan, features: torch.Tensor | None, temperature: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and entropies (N,) of the plan's response tokens; differentiable."""
        hidden = self.hidden(plan, features)[plan.tensor("label_rows", self.device)]
        return ops.linear_logprobs(
            hidden, self.head_weight, plan.tensor("targets", self.device), temperature=temperature
        )

    def save(self, folder: Path) -> None:
        """An ordinary Hugging Face folder: weights, config, tokenizer, chat template, image processor."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)


def load_policy(name_or_path: str | Path, *, device: str = "cpu", trust_remote_code: bool = False) -> Policy:
    """Loads a model folder or hub name as a :class:`Policy` in fp32.

    Raises:
        ValueError: no model there, or an architecture that the packed forward does not know.
    """
    path = Path(name_or_path)
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
    model = family.load(name_or_path).to(device)
    # Dropout would make two passes over the same tokens differ, and with them the first policy ratio.
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    return Policy(model, tokenizer, family.load_image_processor(name_or_path), family)
