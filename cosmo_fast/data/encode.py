"""Rows to token ids: chat template, one id for every vision feature, the target of a supervised row."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from cosmo_fast.config import Config
from cosmo_fast.data.rows import DataError, Row
from cosmo_fast.models import Policy, prune
from cosmo_fast.plan import Media, Prompt
from cosmo_fast.pruning import VisionPrune
from cosmo_fast.search import RESULT


class Encoder:
    """Encodes rows for one policy; picture sizes are read from file headers once, nothing is decoded.

    Args:
        policy: whose tokenizer, chat template and image processor are used.
        max_prompt_length: longest prompt in tokens, vision tokens included; None for no bound.
        max_completion_length: longest supervised target in tokens, end token included; None for no bound.
        vision_prune: how pictures are pruned; ``max_prompt_length`` counts them whole. ValueError: not this policy's.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        max_prompt_length: int | None = None,
        max_completion_length: int | None = None,
        vision_prune: VisionPrune | None = None,
    ):
        prune.check(policy, vision_prune)
        self.policy, self.vision_prune = policy, vision_prune
        self.max_prompt_length, self.max_completion_length = max_prompt_length, max_completion_length
        self.image_id: int | None = None
        if policy.family.IMAGE_TOKEN is not None:
            self.image_id = self._id(policy.family.IMAGE_TOKEN)
            self._before, self._after = ([self._id(token)] if token else [] for token in policy.family.AROUND_IMAGE)
        self.control = _control_tokens(policy)
        self._grids: dict[Path, tuple[int, int, int]] = {}

    @classmethod
    def within(cls, policy: Policy, config: Config) -> Encoder:
        """The encoder with the bounds and the pruning of a recipe."""
        bounds = ("max_prompt_length", "max_completion_length", "vision_prune")
        return cls(policy, **{name: getattr(config, name) for name in bounds})

    def prompt(self, row: Row) -> Prompt:
        """The row's conversation up to the answer, as the policy is asked.

        Raises:
            DataError: picture tokens and pictures do not match, the model takes no pictures, a text holds a control
                token, or the prompt is longer than ``max_prompt_length``.
        """
        text = self.policy.tokenizer.apply_chat_template(self._chat(row), tokenize=False, add_generation_prompt=True)
        ids = np.asarray(self.policy.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)
        slots = np.flatnonzero(ids == self.image_id) if self.image_id is not None else np.array([], dtype=np.int64)
        if len(slots) != len(row.images):
            raise DataError(
                f"{row.source}: {len(row.images)} image(s), but the rendered prompt has {len(slots)} image slot(s); "
                "check the {'type': 'image'} parts of messages and the model's chat template"
            )
        media, pieces, done, offset = [], [], 0, 0
        time_step = 1.0 if self.policy.family.ROTARY_AXES == 3 else None
        for slot, path in zip(slots, row.images, strict=True):
            offset += slot - done + len(self._before)
            entry = Media(str(path), int(offset), self._grid(path, row.source), time_step)
            media.append(entry)
            pieces += [ids[done:slot], self._before, np.full(entry.rows, self.image_id), self._after]
            offset, done = offset + entry.rows + len(self._after), slot + 1
        expanded = np.concatenate([*pieces, ids[done:]]).astype(np.int64)
        if self.max_prompt_length is not None and len(expanded) > self.max_prompt_length:
            raise DataError(
                f"{row.source}: the prompt has {len(expanded)} tokens, over max_prompt_length={self.max_prompt_length} "
                f"({sum(m.rows for m in media)} of them vision tokens); raise max_prompt_length or drop the row"
            )
        kept = prune.unchosen(self.vision_prune, tuple(media), row.source)
        said = [p.get("text", "") for m in row.prompt if m["role"] == "user" for p in m["content"]]
        return Prompt(expanded, tuple(media), row.columns, text, row.source, kept, "\n".join(filter(None, said)))

    def target(self, row: Row) -> np.ndarray:
        """The answer of a supervised row and the end token, (R,) int64; tools' results are encoded apart, as sampled.

        Raises:
            DataError: the last message is not the assistant's, or the target is longer than ``max_completion_length``.
        """
        if row.response is None:
            raise DataError(
                f"{row.source}: a supervised row ends with an assistant message, "
                f"this one with a message of {row.messages[-1]['role']!r}"
            )
        pieces = [ids for ids, _ in self._pieces(row.response)]
        target = np.asarray([*sum(pieces, []), self.policy.tokenizer.eos_token_id], dtype=np.int64)
        if self.max_completion_length is not None and len(target) > self.max_completion_length:
            raise DataError(
                f"{row.source}: the answer has {len(target)} tokens, over "
                f"max_completion_length={self.max_completion_length}; raise max_completion_length or drop the row"
            )
        return target

    def learnt(self, row: Row) -> np.ndarray:
        """(R,) bool: the tokens of ``target`` that are the policy's to say, all but tools' results."""
        return np.array([own for ids, own in self._pieces(row.response) for _ in ids] + [True])

    def _pieces(self, text: str) -> list[tuple[list[int], bool]]:
        places = [0, *(place for found in RESULT.finditer(text) for place in found.span()), len(text)]
        pieces = [text[start:stop] for start, stop in itertools.pairwise(places)]
        encode = self.policy.tokenizer
        return [(encode(p, add_special_tokens=False)["input_ids"], i % 2 == 0) for i, p in enumerate(pieces) if p]

    def _id(self, token: str) -> int:
        found = self.policy.tokenizer.convert_tokens_to_ids(token)
        if found is None or found == self.policy.tokenizer.unk_token_id:
            raise ValueError(f"the tokenizer has no {token!r}, which stands for a picture in this model's prompts")
        return found

    def _chat(self, row: Row) -> list[dict]:
        """The prompt's messages as the chat template takes them: texts alone are strings for a text-only model."""
        for message in row.messages:
            for part in message["content"]:
                if found := next((token for token in self.control if token in part.get("text", "")), None):
                    raise DataError(f"{row.source}: the text holds the control token {found!r} of this model")
        if self.image_id is not None:
            return row.prompt
        if row.images:
            raise DataError(
                f"{row.source}: {len(row.images)} image(s), but a {self.policy.model.config.model_type!r} model takes "
                "none; remove the row's images or use a vision-language model"
            )
        return [{**m, "content": "".join(part["text"] for part in m["content"])} for m in row.prompt]

    def _grid(self, path: Path, source: str) -> tuple[int, int, int]:
        if path not in self._grids:
            try:
                with Image.open(path) as image:
                    width, height = image.size
                    if image.getexif().get(ExifTags.Base.Orientation, 1) >= 5:  # stored on its side; decoded upright
                        width, height = height, width
            except OSError as error:
                raise DataError(f"{source}: {path} cannot be read: {error}") from error
            policy = self.policy
            try:
                self._grids[path] = policy.family.grid_after_merge(
                    policy.model.config, policy.image_processor, height, width
                )
            except ValueError as error:
                raise DataError(f"{source}: {path} of {width}x{height} pixels: {error}") from error
        return self._grids[path]


def _control_tokens(policy: Policy) -> list[str]:
    """Added tokens that make a turn, a picture slot or an end: written out in a text they would be taken for one."""
    tokenizer, template = policy.tokenizer, str(policy.tokenizer.chat_template)
    known = {tokenizer.bos_token, tokenizer.eos_token, policy.family.IMAGE_TOKEN}
    if policy.family.IMAGE_TOKEN is not None:
        known |= {*policy.family.AROUND_IMAGE}
    # DeepSeek's turn marks are not flagged as special; <think> is not either, and texts may hold it.
    return [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.content in known
        or (token.content in template and (token.special or re.fullmatch("<[|\uff5c].+[|\uff5c]>", token.content)))
    ]
