"""The public kernel API: each op with its reference."""

from cosmo_fast.ops.group_advantages import group_advantages, group_advantages_reference
from cosmo_fast.ops.grpo_loss import GrpoLossOutput, grpo_loss
from cosmo_fast.ops.linear_head import empty_cache
from cosmo_fast.ops.linear_kl import KLOutput, linear_kl, linear_kl_reference
from cosmo_fast.ops.linear_logprobs import linear_logprobs, linear_logprobs_reference
from cosmo_fast.ops.linear_policy_loss import LossOutput, linear_policy_loss, linear_policy_loss_reference
from cosmo_fast.ops.prefix_attention import Segments, prefix_attention, prefix_attention_reference
from cosmo_fast.ops.rms_norm import rms_norm, rms_norm_reference
from cosmo_fast.ops.rotary import rotary, rotary_reference
from cosmo_fast.ops.row_tolerance import RowTolerance
from cosmo_fast.ops.swiglu import swiglu, swiglu_reference
from cosmo_fast.ops.vision_prune import kept_counts, vision_prune
from cosmo_fast.ops.vocab_stats import VocabStats, vocab_stats, vocab_stats_reference

__all__ = [
    "GrpoLossOutput",
    "KLOutput",
    "LossOutput",
    "RowTolerance",
    "Segments",
    "VocabStats",
    "empty_cache",
    "group_advantages",
    "group_advantages_reference",
    "grpo_loss",
    "kept_counts",
    "linear_kl",
    "linear_kl_reference",
    "linear_logprobs",
    "linear_logprobs_reference",
    "linear_policy_loss",
    "linear_policy_loss_reference",
    "prefix_attention",
    "prefix_attention_reference",
    "rms_norm",
    "rms_norm_reference",
    "rotary",
    "rotary_reference",
    "swiglu",
    "swiglu_reference",
    "vision_prune",
    "vocab_stats",
    "vocab_stats_reference",
]
