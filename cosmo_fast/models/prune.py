"""Choosing the vision rows that a language model goes on with, and going on with them from a decoder layer on.

Attention and key norms are those of the layer that is entered, as FastV and PyramidDrop have it
(https://arxiv.org/abs/2403.06764, https://arxiv.org/abs/2410.17247); everything else works on the features.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import torch

from cosmo_fast import ops
from cosmo_fast.data.rows import DataError
from cosmo_fast.ops.prefix_attention import Segments, prefix_lse
from cosmo_fast.ops.vision_prune import VERSION
from cosmo_fast.plan import Media, Plan, Prompt
from cosmo_fast.pruning import Kept, VisionPrune


def check(policy, setting: VisionPrune | None) -> None:
    """ValueError where the policy has no such layer, no pictures, or features that enter after the layer."""
    if setting is None:
        return
    kind, layers = policy.model.config.model_type, policy.model.config.get_text_config().num_hidden_layers
    if policy.family.IMAGE_TOKEN is None:
        raise ValueError(f"vision_prune={setting!r}: a {kind!r} model takes no pictures; leave vision_prune out")
    if setting.layer >= layers:
        raise ValueError(f"vision_prune.layer={setting.layer}: the language model has the layers 0 to {layers - 1}")
    levels = len(getattr(policy.model.config.vision_config, "deepstack_visual_indexes", ()))
    if 0 < setting.layer < levels:
        raise ValueError(
            f"vision_prune.layer={setting.layer}: features of {levels} depths enter the first layers of this {kind!r} "
            f"model; set 0, or {levels} or above"
        )


def unchosen(setting: VisionPrune | None, media: tuple[Media, ...], source: str = "prompt") -> Kept | None:
    """How many rows will be kept of a prompt's pictures; DataError: ``frame_difference`` of no clip."""
    if setting is None or not media:
        return None
    if setting.selector == "frame_difference" and (
        len(media) < 2 or len({m.thw for m in media}) > 1 or media[0].thw[0] != 1
    ):
        raise DataError(
            f"{source}: vision_prune.selector=frame_difference takes a prompt's pictures for the frames of a clip, at "
            f"least two of one grid; here they have {[m.thw for m in media]}"
        )
    counts = np.array(_counts(setting, media), dtype=np.int64)
    prompts = np.zeros(len(counts), dtype=np.int64) if setting.per_prompt else None
    return Kept(setting, VERSION, int(ops.kept_counts(counts, setting.keep, prompts=prompts).sum()))


def _counts(setting: VisionPrune, media: tuple[Media, ...]) -> list[int]:
    """Rows of what is chosen from: pictures, or the one clip that they are the frames of."""
    rows = [m.rows for m in media]
    return [sum(rows)] if setting.selector == "frame_difference" else rows


@torch.no_grad()
def choose(policy, plan: Plan, features: torch.Tensor, layer=None, states=None) -> None:
    """Chooses the vision rows of all prompts of ``plan``, in place; a prompt's do not depend on the others'.

    Inside the language model they depend on them as the layers below do, which take all prompts in one pass: by a
    rounding.

    Args:
        features: (m, ...) of ``plan.media``. layer: the decoder layer that the rows would enter; by default the first.
        states: of the plan's tokens as they enter it, (T, d), and their rotary (cos, sin), each (1, T, D).
    """
    prompts = [p for p in plan.prompts if p.kept]
    setting, device = prompts[0].kept.setting, policy.device
    clips = setting.selector == "frame_difference"
    counts = [n for p in prompts for n in _counts(setting, p.media)]
    owner = [i for i, p in enumerate(prompts) for _ in _counts(setting, p.media)]
    given: dict = {"prompts": np.array(owner, dtype=np.int64)} if setting.per_prompt else {}
    rows = features[:, : policy.head_weight.shape[1]].detach()  # DeepStack's levels lie behind
    rows = rows.index_select(0, plan.tensor("feature_rows", device))
    if setting.selector == "random":
        given["seeds"] = np.array([_seed(p, m) for p in prompts for m in p.media], dtype=np.int64)
    elif clips:
        given["grids"] = np.array([(len(p.media), *p.media[0].thw[1:]) for p in prompts], dtype=np.int64)
    elif setting.selector == "dpp":
        embed = policy.model.get_input_embeddings()
        texts = [embed(torch.from_numpy(p.ids[_text_rows(p)]).to(device)).mean(0) for p in prompts]
        text = torch.stack(texts).to(rows.dtype)
        given["text"] = text if setting.per_prompt else text[torch.tensor(owner, device=device)]
    elif setting.selector in ("attention", "key_norm"):
        layer = layer if layer is not None else policy.model.get_decoder().layers[0]
        given |= _attention(layer, plan, setting, *(states or _entering(policy, plan, features)))
    kept = ops.vision_prune(rows, np.array(counts, dtype=np.int64), setting.keep, setting.selector, **given)
    ends = np.cumsum([p.vision_rows for p in plan.prompts])
    parts = np.split(kept.numpy(), np.searchsorted(kept.numpy(), ends)[:-1])
    plan.choose(
        [x - end + p.vision_rows if p.kept else None for p, x, end in zip(plan.prompts, parts, ends, strict=True)]
    )


def _seed(prompt: Prompt, medium: Media) -> int:
    """The same picture in the same prompt loses the same rows wherever the run lies."""
    return zlib.crc32(f"{Path(medium.key).name} {medium.offset}".encode(), zlib.crc32(prompt.ids.tobytes()))


def _text_rows(prompt: Prompt, after: int = 0) -> np.ndarray:
    """The rows of a prompt from ``after`` on that are no vision rows."""
    text = np.ones(len(prompt.ids), dtype=bool)
    text[:after] = False
    for m in prompt.media:
        text[m.offset : m.offset + m.rows] = False
    return np.flatnonzero(text)


def _entering(policy, plan: Plan, features: torch.Tensor) -> tuple:
    """The embeddings (T, d) of a plan that nothing is chosen of yet, and their rotary (cos, sin)."""
    embeddings, _ = policy.embed(plan, features)
    positions = plan.tensor("positions", policy.device)
    positions = positions.unsqueeze(1) if policy.family.ROTARY_AXES == 3 else positions[:1]
    return embeddings, policy.model.get_decoder().rotary_emb(embeddings.unsqueeze(0), positions)


class _Tap:
    """Attention that only notes the queries and keys it is given."""

    def __init__(self):
        self.queries, self.keys = [], []

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        self.queries.append(q)
        self.keys.append(k)
        self.scale = scale
        return torch.zeros_like(q)


def _attention(layer, plan: Plan, setting: VisionPrune, states: torch.Tensor, rotary: tuple) -> dict:
    """Keys of the vision rows; for ``attention`` also the queries of every picture's prompt with their log-sum-exp.

    They ask from the text behind a picture, or, where a prompt ends in it, from its last row.
    """
    tap, device = _Tap(), states.device
    for start, length in zip(plan.full_starts.tolist(), plan.full_lengths.tolist(), strict=True):
        own = slice(start, start + length)  # by itself: a product's last bits depend on how many rows it has
        layer.self_attn(
            hidden_states=layer.input_layernorm(states[None, own]),
            position_embeddings=tuple(x[..., own, :] for x in rotary),
            attention_mask=None,
            plan=tap,
        )
    keys = torch.cat(tap.keys)
    given: dict = {"key": keys.index_select(0, plan.tensor("image_rows", device))}
    if setting.selector == "key_norm":
        return given
    rows, table, counts = [], [], []
    for start, prompt in zip(plan.full_starts.tolist(), plan.prompts, strict=True):
        for m in prompt.media if prompt.kept else ():
            last = m.offset + m.rows
            asking = _text_rows(prompt, last)
            asking = asking if len(asking) else np.array([last - 1])
            for run in np.split(asking, np.flatnonzero(np.diff(asking) > 1) + 1):
                table.append([sum(map(len, rows)), len(run), start, int(run[-1]) + 1, 0, 0])
                rows.append(start + run)
            counts.append(len(asking))
    query = torch.cat(tap.queries).index_select(0, torch.from_numpy(np.concatenate(rows)).to(device))
    lse = prefix_lse(query, keys, Segments(np.array(table, dtype=np.int64)), scale=tap.scale)
    return given | {
        "query": query, "lse": lse, "query_counts": np.array(counts, dtype=np.int64), "scale": tap.scale
    }  # fmt: skip


def enter(layer, args: tuple, kwargs: dict):
    """The hook of every decoder layer: from ``plan.layer`` on, only what is taken goes on; chosen there if need be."""
    if (pruning := kwargs.pop("pruning", None)) is None:
        return None
    policy, plan, features = pruning
    hidden, rotary, index = args[0], kwargs["position_embeddings"], layer.self_attn.layer_idx
    if index == plan.layer and plan.unchosen:
        choose(policy, plan, features, layer, (hidden[0], rotary))
    if index >= plan.layer:
        rows = plan.tensor("taken", hidden.device)
        kwargs["position_embeddings"] = tuple(x.index_select(-2, rows) for x in rotary)
        hidden = hidden.index_select(1, rows) if index == plan.layer else hidden
    return (hidden, *args[1:]), kwargs
