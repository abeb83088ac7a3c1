"""What changes from step to step of a stage, as pure functions of the step."""

from __future__ import annotations

import math

from cosmo_fast.config import StageConfig


def learning_rate(stage: StageConfig, step: int) -> float:
    """The rate of step ``step`` (from 0): linear warm-up, then constant, linear to 0 or half a cosine to 0."""
    if step < stage.warmup_steps:
        return stage.learning_rate * (step + 1) / stage.warmup_steps
    done = (step - stage.warmup_steps) / max(1, stage.max_steps - stage.warmup_steps)
    shapes = {"constant_with_warmup": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return stage.learning_rate * shapes[stage.lr_scheduler_type]
