"""Settings of a stage that have parts: schedules, constraints, curriculum, stop rules. All of these forms are ours."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator


class Strict(BaseModel):
    """An unknown key, NaN and infinity are errors."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class Schedule(Strict):
    """A value that goes from ``from`` to ``to`` in the first ``over`` of a stage and stays there.

    ``over``: up to 1 a share of ``max_steps``, above it optimiser steps. ``shape``: linear, half a cosine, or a step at
    the end of ``over``.
    """

    start: float = Field(alias="from")
    to: float
    over: float = Field(default=1.0, gt=0)
    shape: Literal["linear", "cosine", "step"] = "linear"

    @model_validator(mode="after")
    def _changes(self):
        if self.start == self.to:
            raise ValueError(f"a schedule from {self.start} to {self.to} changes nothing: write the number")
        return self

    def at(self, step: int, max_steps: int) -> float:
        """The value of optimiser step ``step`` (from 0) of a stage of ``max_steps``."""
        share = min(1.0, step / (self.over * max_steps if self.over <= 1 else self.over))
        if share == 1:
            return self.to
        done = {"linear": share, "cosine": (1 - math.cos(math.pi * share)) / 2, "step": 0.0}[self.shape]
        return self.start + (self.to - self.start) * done


# A number or a schedule; the tag keeps the messages of the other one out of an error.
Weight = Annotated[
    Annotated[float, Tag("number")] | Annotated[Schedule, Tag("schedule")],
    Discriminator(lambda value: "schedule" if isinstance(value, (dict, Schedule)) else "number"),
]


def at(weight: float | Schedule, step: int, max_steps: int) -> float:
    """A weight at optimiser step ``step`` (from 0) of a stage of ``max_steps``."""
    return weight.at(step, max_steps) if isinstance(weight, Schedule) else weight


class Curriculum(Schedule):
    """The share of every file's (and label's) easiest rows, by the number in ``column``, that a step draws from."""

    column: str
    start: float = Field(alias="from", gt=0, le=1)
    to: float = Field(default=1.0, gt=0, le=1)


class Constraint(Strict):
    """A reward whose mean is to reach ``target``: its weight is multiplied by λ, which every rollout adapts.

    λ ← clip(λ·exp(eta·(target − mean)), min, max), by multiplicative weights, as Deliberative Searcher (arXiv
    2507.16727) has it in words; the formula is ours.
    """

    target: float
    eta: float = Field(default=0.1, gt=0)
    start: float = Field(default=1.0, gt=0)
    min: float = Field(default=0.0, ge=0)
    max: float = Field(default=10.0, gt=0)

    @model_validator(mode="after")
    def _ordered(self):
        if not self.min <= self.start <= self.max:
            raise ValueError(f"start={self.start} must lie between min={self.min} and max={self.max}")
        return self

    def adapted(self, multiplier: float, mean: float) -> float:
        """λ after a rollout whose mean reward is ``mean``."""
        grown = multiplier * math.exp(min(700.0, self.eta * (self.target - mean)))
        return min(self.max, max(self.min, grown))


class SearchTool(Strict):
    """`<search>` and `<read>` over the documents of ``corpus``, a JSONL file: see :class:`cosmo_fast.search.Search`."""

    corpus: str
    top_k: int = Field(default=3, gt=0)
    max_calls: int = Field(default=4, gt=0)
    max_result_length: int = Field(default=64, gt=0)


class Tools(Strict):
    """What a policy can call in a response; the results that stand in it are not the policy's, and not learnt."""

    search: SearchTool


class StopRule(Strict):
    """Ends the stage when the mean of the last ``window`` values of ``metric`` is above or below a bound.

    ``metric``: a name out of metrics.jsonl, or ``eval/SPLIT/RATE`` (with ``eval_steps``).
    """

    metric: str
    above: float | None = None
    below: float | None = None
    window: int = Field(default=1, gt=0)

    @model_validator(mode="after")
    def _one_bound(self):
        if (self.above is None) == (self.below is None):
            raise ValueError(f"a rule on {self.metric!r} needs one of above and below")
        return self

    def holds(self, values: list[float]) -> bool:
        """Whether the last ``window`` of ``values`` meet the rule."""
        if len(values) < self.window:
            return False
        mean = sum(values[-self.window :]) / self.window
        return mean > self.above if self.below is None else mean < self.below

    def __str__(self) -> str:
        bound = f"below {self.below}" if self.above is None else f"above {self.above}"
        return f"{self.metric} {bound} over {self.window}"


class StopLoss(StopRule):
    """Ends the stage when something goes wrong; ``restore`` goes back to the best weights (metric_for_best_model)."""

    action: Literal["stop", "restore"] = "stop"
