"""Which vision tokens a language model is given: the setting of a recipe, and the choice that a sample carries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator


class VisionPrune(BaseModel):
    """A recipe's ``vision_prune``: what :func:`cosmo_fast.ops.vision_prune` keeps.

    ``keep``: a share in (0, 1], or a whole number of rows a picture, with ``per_prompt`` of all pictures of a prompt
    together. ``layer``: the layers below it see all rows (FastV, https://arxiv.org/abs/2403.06764); 0 is before the
    language model. Frozen, equal by value.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    selector: Literal["uniform", "random", "max_min", "dpp", "attention", "key_norm", "frame_difference"]
    keep: float | int
    layer: int = Field(default=0, ge=0)
    per_prompt: bool = False

    @model_validator(mode="after")
    def _fits(self):
        whole = isinstance(self.keep, int)
        if self.keep <= 0 or (not whole and self.keep > 1):
            raise ValueError(f"keep={self.keep} must be a share in (0, 1] or a whole number of rows above 0")
        if self.per_prompt and (not whole or self.selector == "frame_difference"):
            raise ValueError(
                f"per_prompt=true with selector={self.selector!r} and keep={self.keep}: a prompt's budget is a whole "
                "number of rows, and a clip is one prompt's already; set per_prompt: false"
            )
        if self.layer and self.selector not in ("attention", "key_norm"):
            raise ValueError(
                f"layer={self.layer} with selector={self.selector!r}: only attention and key_norm choose inside the "
                "language model; set layer: 0"
            )
        return self

    @classmethod
    def parse(cls, text: str | None) -> VisionPrune | None:
        """Of a flag: ``selector=max_min,keep=0.5``. ValueError as for a recipe."""
        if text is None:
            return None
        pairs = dict(pair.partition("=")[::2] for pair in text.split(","))
        try:
            return cls(**{name.strip(): yaml.safe_load(value) for name, value in pairs.items()})
        except yaml.YAMLError as error:
            raise ValueError(f"--vision-prune {text!r}: a value cannot be read: {error}") from error
        except ValidationError as error:
            said = "; ".join(f"{'.'.join(map(str, e['loc']))} {e['msg']}".strip() for e in error.errors())
            raise ValueError(f"--vision-prune {text!r}: {said}") from error


@dataclass(frozen=True, eq=False)
class Kept:
    """What of a prompt's pictures goes into the language model, or into its layer ``setting.layer``.

    ``count``: how many rows; ``rows`` (count,) int64: which, ascending, counted over all pictures of the prompt in
    order; None until they are chosen, which happens once. ``hash``: of the prompt's layout with these rows (tokens,
    original positions), the setting and the ``version`` of the selectors.
    """

    setting: VisionPrune
    version: int
    count: int
    rows: np.ndarray | None = None
    hash: str = ""

    def written(self) -> dict[str, Any]:
        """Setting, version, rows and hash as JSON has them."""
        return self.setting.model_dump() | {"version": self.version, "rows": self.rows.tolist(), "hash": self.hash}
