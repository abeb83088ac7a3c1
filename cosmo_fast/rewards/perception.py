"""Perception: what of the picture and the question a response states, and whether it stays with it.

The column `facts` holds {"visual": [...], "textual": [...]}, short phrases as the embedded world writes them: V, atomic
facts of the picture, and Z, entities, quantities and conditions of the question. `rewards.facts` matches them [ours].
Each reward is None on rows without the facts that it needs.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from cosmo_fast.rewards.columns import RewardError, row_name, rows_of
from cosmo_fast.rewards.facts import claims, clauses, conflicts, items, stated_facts, things
from cosmo_fast.rewards.format import section


def visual_key(
    prompts: Sequence, completions: Sequence[str], *, tau_high: float = 0.8, tau_low: float = 0.4, **columns
) -> list[float | None]:
    """R_vkey of VTPerception-R1: cov = |K_v ∩ D| / |K_v|; 1 if cov ≥ tau_high, 0.5 if ≥ tau_low, else 0.

    K_v: the row's visual facts; D: the facts in `<description>`. The thresholds are not published: ours.
    """
    return _covered("visual", "description", completions, columns, tau_high, tau_low)


def textual_key(
    prompts: Sequence, completions: Sequence[str], *, tau_high: float = 0.8, tau_low: float = 0.4, **columns
) -> list[float | None]:
    """R_tkey: as `visual_key`, with the row's textual facts and the facts of `<think>`."""
    return _covered("textual", "think", completions, columns, tau_high, tau_low)


def _covered(kind: str, tag: str, completions, columns, high: float, low: float) -> list[float | None]:
    if not 0 < low <= high <= 1:
        raise RewardError(f"tau_low={low} and tau_high={high} must satisfy 0 < tau_low <= tau_high <= 1")
    rewards: list[float | None] = []
    for row, text in zip(rows_of(columns, len(completions)), completions, strict=True):
        hits = stated_facts(section(text, tag), facts_of(row)[kind])
        share = sum(hits) / len(hits) if hits else None
        rewards.append(None if share is None else 1.0 if share >= high else 0.5 if share >= low else 0.0)
    return rewards


def consistency(prompts: Sequence, completions: Sequence[str], **columns) -> list[float | None]:
    """R_cons of VTPerception-R1: |F ∩ E| / max(1, |F|), and 0 on a clear conflict.

    F: the key items of `<think>` and `<answer>`; E: those of `<description>` and the question. Ours: an item is a thing
    of the row's facts, a colour, place or size, or a number of a thing; a conflict is a value in F that contradicts
    what E says of the same thing (`facts.conflicts`).
    """
    rewards: list[float | None] = []
    for prompt, row, text in zip(prompts, rows_of(columns, len(completions)), completions, strict=True):
        about = things([fact for facts in facts_of(row).values() for fact in facts])
        used = f"{section(text, 'think')}<>{section(text, 'answer')}"  # a tag ends a clause
        given = f"{section(text, 'description')}<>{prompt}"
        share = len(items(used, about) & items(given, about)) / max(1, len(items(used, about)))
        clash = conflicts(claims(used, about), claims(given, about))
        rewards.append(None if not about else 0.0 if clash else share)
    return rewards


def visual_focus(prompts: Sequence, completions: Sequence[str], **columns) -> list[float | None]:
    """Visual focus by facts: max(0, stated − contradicted) / |V| over the whole response.

    COSMO-RL (arXiv 2510.04196) names such a reward and publishes no formula: this one is ours. stated: the visual facts
    that the response states; contradicted: the values in it that contradict one (`facts.conflicts`).
    """
    rewards: list[float | None] = []
    for row, text in zip(rows_of(columns, len(completions)), completions, strict=True):
        visual = facts_of(row)["visual"]
        about = things(visual)
        wrong = conflicts(claims(text, about), claims("; ".join(visual), about))
        rewards.append(max(0, sum(stated_facts(text, visual)) - wrong) / len(visual) if visual else None)
    return rewards


def visual_focus_drop(prompts: Sequence, completions: Sequence[str], **columns) -> list[float | None]:
    """Visual focus by the policy itself: 1 − exp(−drop), 0 where drop is negative; None on rows without a picture.

    drop, the column `blank_logprob_drop` that an `rl` stage adds for this reward: how much of the response's mean
    log-prob a token, in nats, goes when every picture is blanked. So r is the share of a token's probability (geometric
    mean) that the picture gives it. The formula is ours, as for `visual_focus`; a pass a rollout is its price.
    """
    if "blank_logprob_drop" not in columns:
        raise RewardError("visual_focus_drop needs the column 'blank_logprob_drop', which an rl stage adds")
    return [None if drop is None else max(0.0, -math.expm1(-drop)) for drop in columns["blank_logprob_drop"]]


def facts_of(row: Mapping[str, Any]) -> dict[str, list[str]]:
    """The row's facts, with an empty list for a kind that it lacks; RewardError where they have another form."""
    facts = row.get("facts") or {}
    fits = isinstance(facts, Mapping) and facts.keys() <= {"visual", "textual"}
    if not fits or not all(
        isinstance(v, list) and all(isinstance(f, str) and clauses(f) for f in v) for v in facts.values()
    ):
        form = '{"visual": [text, ...], "textual": [text, ...]} with words in every text'
        raise RewardError(f"{row_name(row)}: column 'facts' must be {form}, got {facts!r}")
    return {kind: facts.get(kind, []) for kind in ("visual", "textual")}
