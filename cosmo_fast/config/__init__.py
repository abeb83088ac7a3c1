"""Recipes and their stages: YAML and flags as dataclasses that check themselves."""

from cosmo_fast.config.recipe import RECIPES, Config, EvalConfig, VerifierConfig, WorldConfig, load_config
from cosmo_fast.config.stage import (
    LOSS_OPTIONS,
    AdvantageKind,
    Aggregation,
    ConfigError,
    LossType,
    StageConfig,
    resolved_stage,
)

__all__ = [
    "LOSS_OPTIONS",
    "RECIPES",
    "AdvantageKind",
    "Aggregation",
    "Config",
    "ConfigError",
    "EvalConfig",
    "LossType",
    "StageConfig",
    "VerifierConfig",
    "WorldConfig",
    "load_config",
    "resolved_stage",
]
