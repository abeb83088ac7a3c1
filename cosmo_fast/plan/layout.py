"""The layout of one packed micro-batch: ``[all prompts | all responses]``, no padding, every image once.

A prompt and its pictures stand in the batch once for all of its responses. Boundaries, picture slots and positions are
decided here, on the host, from what the encoder knows; nothing later looks for special tokens or infers a boundary
from positions, so a picture token that a policy samples is a token like any other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from cosmo_fast import _host
from cosmo_fast.ops.prefix_attention import Segments
from cosmo_fast.pruning import Kept


@dataclass(frozen=True)
class Media:
    """A picture or video inside a prompt.

    ``offset``: row of its first feature in the prompt; ``thw``: grid of the features, after the merge. ``time_step``:
    positions from one frame to the next (Qwen2.5-VL's videos: tokens_per_second · second_per_grid_t; Qwen2-VL's: 1);
    None where positions count the features like text (InternVL). Qwen3-VL: each frame of a video is a medium.
    """

    key: str
    offset: int
    thw: tuple[int, int, int]
    time_step: float | None = 1.0

    @property
    def rows(self) -> int:
        return self.thw[0] * self.thw[1] * self.thw[2]


@dataclass(frozen=True, eq=False)
class Prompt:
    """An encoded prompt. ``ids`` (P,) int64 with one id for every vision feature; ``columns`` are the row's own.

    ``kept``: how its vision rows are pruned, and which of them stay once that is chosen; None: all of them.
    """

    ids: np.ndarray
    media: tuple[Media, ...]
    columns: dict[str, Any]
    text: str
    source: str
    kept: Kept | None = None
    question: str = ""  # the users' words alone, as a verifier reads them

    @property
    def vision_rows(self) -> int:
        return sum(m.rows for m in self.media)

    @property
    def dropped(self) -> int:
        return self.vision_rows - self.kept.count if self.kept else 0

    @property
    def length(self) -> int:
        """Tokens in the first layer of the language model, after which there may be fewer."""
        return len(self.ids) - (self.dropped if self.kept and not self.kept.setting.layer else 0)

    def keep(self, rows: np.ndarray) -> Prompt:
        """The prompt with the vision ``rows`` (count,) int64 chosen."""
        chosen = replace(self, kept=replace(self.kept, rows=rows))
        return replace(chosen, kept=replace(chosen.kept, hash=chosen._hash()))

    def reuse(self, kept: Kept | None) -> Prompt:
        """The prompt with the choice that a sample to it carries.

        Raises:
            ValueError: it was made under another setting or version of the selectors, or is not what its hash says.
        """
        was, now = (f"{k.setting!r}, version {k.version}" if k else "none" for k in (kept, self.kept))
        if was != now:
            raise ValueError(f"{self.source}: the sample was made with vision_prune {was}; here it is {now}")
        chosen = replace(self, kept=kept)
        chosen.check()
        return chosen

    def check(self) -> None:
        """ValueError where the chosen rows are not those that were hashed when they were chosen."""
        if self.kept and self.kept.rows is not None and self.kept.hash != (found := self._hash()):
            raise ValueError(
                f"{self.source}: the kept vision rows have hash {found}, the sample says {self.kept.hash}: it would be "
                "trained on other rows than it was sampled with; sample it again"
            )

    def _hash(self) -> str:
        about = f"{Plan([self]).hash} {self.kept.setting.model_dump_json()} {self.kept.version}"
        return hashlib.sha256(about.encode()).hexdigest()[:16]


def _starts(lengths: np.ndarray, base: int = 0) -> np.ndarray:
    return base + np.cumsum(lengths) - lengths


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenated ``arange(start, start + length)``."""
    total = int(lengths.sum())
    return np.repeat(starts - _starts(lengths), lengths) + np.arange(total)


class Plan:
    """Integers of one micro-batch of ``g`` prompts and ``n`` responses, ``T`` tokens in all.

    Where prompts are pruned, ``tokens``, ``positions``, ``image_rows`` and ``feature_rows`` are those of the first
    layer, the rest is that of the last: the same at ``layer`` 0 once the rows are chosen. No token changes its
    position. ``taken``: the rows of the first layout that go on, None where all do or nothing is chosen yet.

    Attributes (numpy on the host; :meth:`tensor` gives a cached torch copy on a device):
        tokens (T,): ids, all prompts first, then the responses in the order of their prompts.
        positions (3, T): rotary positions by the Qwen2-VL rule; the three axes are equal for text and for media that
            are counted like text. Text after a medium starts after the maximum of its three axes, as these models were
            trained; transformers 5.23 leaves the time axis out, which differs for videos longer than high and wide.
        prompt_lengths (g,), response_lengths (n,), response_prompt (n,): the prompt that a response answers.
        next_position (g,): the first position after each prompt.
        media: the distinct pictures, in the order in which their features are concatenated.
        image_rows (m,), feature_rows (m,): token row and feature row of every vision token.
        label_rows (N,), targets (N,), sequence (N,): the token row whose hidden state predicts each response
            token, the token, and the index of its response.

    Raises:
        ValueError: a prompt without tokens.
    """

    def __init__(self, prompts: list[Prompt], responses: list[list[np.ndarray]] | None = None):
        responses = responses if responses is not None else [[] for _ in prompts]
        assert len(prompts) == len(responses)
        for prompt in prompts:
            if len(prompt.ids) == 0:
                raise ValueError(f"{prompt.source}: the prompt has no tokens; a packed prompt needs at least one")
        flat = [np.asarray(r, dtype=np.int64) for group in responses for r in group]
        self.prompts = prompts
        self.layer = max((p.kept.setting.layer for p in prompts if p.kept), default=0)
        self.full_lengths = np.array([len(p.ids) for p in prompts], dtype=np.int64)
        self.prompt_lengths = self.full_lengths - np.array([p.dropped for p in prompts], dtype=np.int64)
        if (self.prompt_lengths < 1).any():
            source = prompts[int(self.prompt_lengths.argmin())].source
            raise ValueError(f"{source}: no token of the prompt is left; raise vision_prune.keep")
        self.response_lengths = np.array([len(r) for r in flat], dtype=np.int64)
        self.response_prompt = np.repeat(np.arange(len(prompts)), [len(group) for group in responses]).astype(np.int64)
        self.tokens = np.concatenate([p.ids for p in prompts] + flat).astype(np.int64)
        self.prompt_starts = _starts(self.prompt_lengths)
        self.prompt_tokens = int(self.prompt_lengths.sum())
        self.response_starts = _starts(self.response_lengths, self.prompt_tokens)
        self._place_media()
        self._place_labels()
        self._tensors: dict[tuple[str, torch.device], torch.Tensor] = {}
        self.taken: np.ndarray | None = None
        if any(p.kept for p in prompts) and not self.unchosen:
            self._take()

    @property
    def unchosen(self) -> bool:
        """Whether a prompt waits for the choice of its vision rows."""
        return any(p.kept and p.kept.rows is None for p in self.prompts)

    def choose(self, rows: Sequence[np.ndarray | None]) -> None:
        """The vision rows of every prompt, None for one that keeps all; those that were chosen before stay."""
        chosen = zip(self.prompts, rows, strict=True)
        self.prompts = [p if r is None or p.kept.rows is not None else p.keep(r) for p, r in chosen]
        self._take()

    def _take(self) -> None:
        stays = []
        for prompt in self.prompts:
            stays.append(np.full(prompt.vision_rows, prompt.kept is None))
            if prompt.kept:
                stays[-1][prompt.kept.rows] = True
        kept = np.concatenate(stays)
        stay = np.ones(len(self.tokens), dtype=bool)
        stay[self.image_rows] = kept
        self.taken = np.flatnonzero(stay)
        if self.layer == 0:
            self.tokens, self.positions = self.tokens[self.taken], self.positions[:, self.taken]
            self.image_rows = (np.cumsum(stay) - 1)[self.image_rows[kept]]
            self.feature_rows = self.feature_rows[kept]
        self._tensors.clear()

    def _place_media(self) -> None:
        media = [(i, m) for i, prompt in enumerate(self.prompts) for m in prompt.media]
        grids = [(i, m) for i, m in media if m.time_step is not None]
        prompt_positions, self.next_position = _host.mrope_positions(
            self.full_lengths,
            np.array([i for i, _ in grids], dtype=np.int64),
            np.array([m.offset for _, m in grids], dtype=np.int64),
            np.array([m.thw for _, m in grids], dtype=np.int64).reshape(-1, 3),
            np.array([m.time_step for _, m in grids], dtype=np.float64),
        )
        response_positions = _ranges(self.next_position[self.response_prompt], self.response_lengths)
        self.positions = np.concatenate(
            [prompt_positions, np.broadcast_to(response_positions, (3, len(response_positions)))], 1
        )
        distinct: dict[str, tuple[int, Media]] = {}
        rows = 0
        for _, m in media:
            if m.key not in distinct:
                distinct[m.key] = (rows, m)
                rows += m.rows
        self.media = [m for _, m in distinct.values()]
        lengths = np.array([m.rows for _, m in media], dtype=np.int64)
        self.full_starts = starts = _starts(self.full_lengths)
        self.image_rows = _ranges(np.array([starts[i] + m.offset for i, m in media], dtype=np.int64), lengths)
        self.feature_rows = _ranges(np.array([distinct[m.key][0] for _, m in media], dtype=np.int64), lengths)

    def _place_labels(self) -> None:
        rows = _ranges(self.response_starts - 1, self.response_lengths)
        filled = self.response_lengths > 0
        first = _starts(self.response_lengths)[filled]
        last_of_prompt = self.prompt_starts + self.prompt_lengths - 1
        rows[first] = last_of_prompt[self.response_prompt[filled]]
        self.label_rows = rows
        self.targets = self.tokens[int(self.full_lengths.sum()) :]
        self.sequence = np.repeat(np.arange(len(self.response_lengths)), self.response_lengths)

    @cached_property
    def hash(self) -> str:
        """Digest of every integer of the plan: equal plans lay a batch out alike."""
        digest = hashlib.sha256()
        for name in (
            "tokens",
            "positions",
            "prompt_lengths",
            "response_lengths",
            "response_prompt",
            "image_rows",
            "feature_rows",
        ):
            digest.update(np.ascontiguousarray(getattr(self, name)).tobytes())
        if self.taken is not None:
            digest.update(self.taken.tobytes())
        return digest.hexdigest()[:16]

    @cached_property
    def segments(self) -> Segments:
        """The part of the plan that :func:`cosmo_fast.ops.prefix_attention` reads."""
        return self._segments(self.prompt_lengths)

    @cached_property
    def below(self) -> Segments:
        """The same for the layers below ``layer``, where nothing is pruned."""
        return self._segments(self.full_lengths)

    def at(self, layer: int) -> Segments:
        return self.segments if layer >= self.layer else self.below

    def _segments(self, prompt_lengths: np.ndarray) -> Segments:
        prompts = (_starts(prompt_lengths), prompt_lengths)
        responses = (_starts(self.response_lengths, int(prompt_lengths.sum())), self.response_lengths)
        none = np.zeros_like(self.prompt_starts)
        own = np.stack([*prompts, *prompts, none, none], 1)
        shared = np.stack([*responses, *responses, *(x[self.response_prompt] for x in prompts)], 1)
        return Segments(np.concatenate([own, shared]))

    def tensor(self, name: str, device: torch.device | str) -> torch.Tensor:
        """The attribute ``name`` as an int64 tensor on ``device``; made once."""
        key = (name, torch.device(device))
        if key not in self._tensors:
            self._tensors[key] = torch.from_numpy(np.ascontiguousarray(getattr(self, name))).to(device)
        return self._tensors[key]
