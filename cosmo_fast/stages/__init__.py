"""What one optimiser step of each kind of stage does."""

from cosmo_fast.stages.rl import RLStage
from cosmo_fast.stages.sft import SFTStage

STAGES = {"sft": SFTStage, "rl": RLStage}

__all__ = ["STAGES", "RLStage", "SFTStage"]
