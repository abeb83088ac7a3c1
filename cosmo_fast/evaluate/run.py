"""Greedy completions of a policy on rows, scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cosmo_fast.data.encode import Encoder
from cosmo_fast.data.rows import Row
from cosmo_fast.evaluate.attacks import attack_report, unknown_tokens
from cosmo_fast.evaluate.metrics import score
from cosmo_fast.models import Policy
from cosmo_fast.models.vision import Vision
from cosmo_fast.pruning import VisionPrune
from cosmo_fast.rollout import Completion, Sampler, SamplingParams
from cosmo_fast.rollout.tools import tool_metrics
from cosmo_fast.search import Search
from cosmo_fast.verifiers.engine import Verifiers, counted


def complete(
    policy: Policy,
    rows: list[Row],
    params: SamplingParams,
    *,
    seed: int = 0,
    vision_prune: VisionPrune | None = None,
    vision: Vision | None = None,
    **bounds: int,
) -> tuple[list[str], list[Completion]]:
    """One completion a row, decoded without special tokens, in the order of the rows, and as it was sampled.

    ``bounds`` are Sampler's.

    ``vision``: keeps the features of a frozen tower from one call to the next.
    """
    encoder = Encoder(policy, vision_prune=vision_prune)
    sampler = Sampler(policy, vision or Vision(policy), **bounds)
    groups = sampler.generate([encoder.prompt(row) for row in rows], params, seed=seed)
    completions = [group[0] for group in groups]
    return policy.tokenizer.batch_decode([c.ids for c in completions], skip_special_tokens=True), completions


def evaluate(
    policy: Policy,
    rows: list[Row],
    *,
    max_completion_length: int,
    stop_strings: Sequence[str] = (),
    search: Search | None = None,
    plain: list[Row] | None = None,
    trained_on: list[Row] | None = None,
    verifiers: Verifiers | None = None,
    **options: Any,
) -> dict[str, Any]:
    """:func:`cosmo_fast.evaluate.score` of greedy completions; ``options`` are those of :func:`complete`.

    mean_length: tokens a completion, those of tools' results not counted.
    With a ``search`` that answers their calls also tools/search_calls, tools/read_calls and tools/failed, means a row.
    Of attacked rows also :func:`cosmo_fast.evaluate.attacks.attack_report` under "jailbreak"; ``plain``: the rows that
    they were made of, ``trained_on``: the rows of the policy's training, both for whether an attack counts.
    ``verifiers`` judge the answers to rows without a judge; verifier_unparsable is the share that they cannot.
    """
    params = SamplingParams(max_completion_length, temperature=0, stop_strings=tuple(stop_strings), search=search)
    completions, sampled = complete(policy, rows, params, **options)
    columns, garbage = judged_columns(policy, rows, completions, verifiers)
    result = score(columns, completions) | tool_metrics(sampled)
    if garbage is not None:
        result["verifier_unparsable"] = garbage
    result["mean_length"] = sum(int(c.own.sum()) for c in sampled) / len(sampled) if sampled else None
    if any(row.get("attack") is not None for row in columns):
        if plain is not None:
            wanted = {str(row.get("attack_of")) for row in columns}
            plain = [row for row in plain if str(row.columns.get("id", row.source)) in wanted]
            texts = complete(policy, plain, params, **options)[0]
            said, _ = judged_columns(policy, plain, texts, verifiers)
            before = [{"id": row.source, **columns} for row, columns in zip(plain, said, strict=True)], texts
        unknown = None if trained_on is None else unknown_tokens(Encoder(policy), rows, trained_on)
        result["jailbreak"] = attack_report(columns, completions, plain=before if plain else None, unknown=unknown)
    return result


def judged_columns(
    policy: Policy, rows: list[Row], completions: list[str], verifiers: Verifiers | None
) -> tuple[list[dict[str, Any]], float | None]:
    """The rows' columns, with verdicts where rates need one and there is no judge; the share that is no verdict."""
    columns = [row.columns for row in rows]
    lacks = [i for i, row in enumerate(columns) if verifiers and counted(verifiers.rules, row)]
    if not lacks:
        return columns, None
    encoder = Encoder(policy)
    said = verifiers([encoder.prompt(rows[i]) for i in lacks], [completions[i] for i in lacks], None, seed=0)
    for i, row in zip(lacks, said, strict=True):
        columns[i] = columns[i] | {"verifier_verdicts": row["verifier_verdicts"]}
    return columns, sum(row.get("verifier_unparsable", 0.0) for row in said) / len(said)
