"""Rewards with TRL's signature, f(prompts, completions, **columns) -> list[float | None], and their mix by label."""

from cosmo_fast.rewards.columns import RewardError
from cosmo_fast.rewards.format import answer_text
from cosmo_fast.rewards.mix import M3_RECIPES, REWARDS, STAGE_COLUMNS, MixedRewards, RewardMix, resolve
from cosmo_fast.rewards.safety import JUDGES, SAFETY_REWARD, VERDICTS

__all__ = [
    "JUDGES",
    "M3_RECIPES",
    "REWARDS",
    "SAFETY_REWARD",
    "STAGE_COLUMNS",
    "VERDICTS",
    "MixedRewards",
    "RewardError",
    "RewardMix",
    "answer_text",
    "resolve",
]
