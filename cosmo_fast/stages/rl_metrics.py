"""What an RL step logs: the rollout, and how far the trainer's log-probs are from the sampler's."""

from __future__ import annotations

import numpy as np

from cosmo_fast.evaluate import score
from cosmo_fast.rewards.relations import relations
from cosmo_fast.rewards.safety import GOLD
from cosmo_fast.rollout.tools import tool_metrics
from cosmo_fast.stages.base import Context
from cosmo_fast.stages.packed import Group
from cosmo_fast.stages.rollout import Rollout


def mismatch(context: Context, groups: list[Group], logps: list) -> dict[str, float]:
    """How far the trainer's log-probs are from the sampler's on the same weights: 0 up to rounding.

    Raises:
        FloatingPointError: the mean is over ``max_rollout_kl`` nats a token: sampler and trainer are two policies.
    """
    own = [(g, arrays) for g, arrays in zip(groups, logps, strict=True) if arrays is not None]
    pairs = [(w, old, new) for g, arrays in own for w, old, new in zip(g.weights, g.old_logps, arrays, strict=True)]
    gaps = np.concatenate([np.zeros(0), *((old - new)[w > 0] for w, old, new in pairs)])
    shares = context.ranks.gather((gaps.size, gaps.sum(), np.abs(np.expm1(-gaps)).max(initial=0.0)))
    counts, sums, errors = zip(*shares, strict=True)
    if not sum(counts):
        return {}
    kl, bound = float(sum(sums) / sum(counts)), context.stage.max_rollout_kl
    if bound is not None and abs(kl) > bound:
        raise FloatingPointError(
            f"rollout/kl {kl:.3g} is over max_rollout_kl={bound}: on the same weights the sampler's and the trainer's "
            "log-probs differ by that much a token. No update was made. Try dtype: float32, or raise max_rollout_kl"
        )
    return {"rollout/kl": kl, "rollout/max_ratio_error": float(max(errors))}


def rollout_metrics(rollout: Rollout, each: int) -> dict[str, float]:
    """What is logged of a rollout, ``each`` of its samples a group."""
    mixed, completions = rollout.mixed, rollout.completions
    lengths = np.array([c.own.sum() for c in completions])
    said = zip(rollout.owner, rollout.verdicts, strict=True)
    judged = score([prompt.columns | {"verifier_verdicts": given} for prompt, given in said], rollout.texts)
    logged = mixed.metrics() | relations(mixed, each) | _verifier_metrics(mixed)
    return logged | {
        "frac_reward_zero_std": 1 - len(rollout.varied(each)) / (len(rollout.owner) // each),
        # over all groups, idle ones too
        "entropy": float(np.concatenate([c.entropies[c.own] for c in completions]).mean()),
        "completions/mean_length": float(lengths.mean()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": 1 - sum(c.ended for c in completions) / len(completions),
        **tool_metrics(completions),
        "accuracy": judged["accuracy"],
        "false_certain_rate": judged["false_certain_rate"],
        "safety/safe_rate": judged["safe_rate"],
        "safety/over_refusal_rate": judged["over_refusal_rate"],
        "safety/helpful_rate": judged["helpful_rate"],
        **{name: judged[name] for name in ("format_rate", "value_rate", "knowledge_rate", "instruction_rate")},
    }


def _verifier_metrics(mixed) -> dict[str, float]:
    """verifier/unparsable: share of garbage; verifier/KIND_error: mean distance to the reward of the row's judge."""
    columns = dict(zip(mixed.names, mixed.matrix.unbind(1), strict=True))
    pairs = {n.removesuffix("_gold"): gold for n, gold in columns.items() if n in GOLD}
    found = {f"{kind}_error": (gold - columns[kind]).abs() for kind, gold in pairs.items() if kind in columns}
    found |= {"unparsable": columns["verifier_unparsable"]} if "verifier_unparsable" in columns else {}
    return {f"verifier/{n}": gap.nanmean().item() for n, gap in found.items() if not gap.isnan().all()}
