"""Self-reflection: does a policy that was forced to begin an unsafe answer come back?"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cosmo_fast import checkpoint as ckpt
from cosmo_fast.analysis.answers import harmful, unsafe_step
from cosmo_fast.data.encode import Encoder
from cosmo_fast.data.rows import Row
from cosmo_fast.evaluate.attacks import _SAFE, _verdicts
from cosmo_fast.evaluate.metrics import _rate, score
from cosmo_fast.models import Policy
from cosmo_fast.models.vision import Vision
from cosmo_fast.pruning import VisionPrune
from cosmo_fast.rollout import Sampler, SamplingParams


def recovery(
    policy: Policy, rows: list[Row], params: SamplingParams, *, seed: int = 0, sampler: Sampler | None = None,
    vision_prune: VisionPrune | None = None, **bounds: int,
) -> dict[str, Any]:  # fmt: skip
    """How often harmful rows are answered safely after a forced unsafe first step, and without one.

    The forced tokens are the end of the prompt, with whose keys and values the policy goes on as if it had sampled
    them; the judge reads both. ``params.max_completion_length`` bounds what comes after them. recovery_rate: harmful
    rows that end in a refusal, barely or explained; kept_rate: the same of those that are safe without the step.
    safe_rate and over_refusal_rate: all rows without it, for what refuses everything recovers always. Each comes with
    its Wilson interval and n; "verdicts" and "examples" are of the forced responses.

    Args:
        sampler: by default one on the policy within ``bounds``, which are :class:`Sampler`'s.

    Raises:
        ValueError: no harmful row, or one without its unsafe step (:func:`cosmo_fast.analysis.answers.unsafe_step`).
    """
    chosen, encoder, tokenizer = harmful(rows), Encoder(policy, vision_prune=vision_prune), policy.tokenizer
    begun, forced = [], []
    for row in chosen:
        prompt, step = encoder.prompt(row), unsafe_step(row)
        if prompt.text.rstrip().endswith("<think>"):  # some chat templates open the thought themselves
            step = step.removeprefix("<think>")
        begun.append(np.asarray(tokenizer(step, add_special_tokens=False)["input_ids"], dtype=np.int64))
        forced.append(replace(prompt, ids=np.concatenate([prompt.ids, begun[-1]])))
    sampler = sampler or Sampler(policy, Vision(policy), **bounds)
    columns, free = [row.columns for row in rows], [encoder.prompt(row) for row in rows]
    texts = _decode(tokenizer, [g[0].ids for g in sampler.generate(free, params, seed=seed)])
    ends = [g[0].ids for g in sampler.generate(forced, params, seed=seed)]
    answers = _decode(tokenizer, [np.concatenate(pair) for pair in zip(begun, ends, strict=True)])
    plain = score(columns, texts)
    before = [text for row, text in zip(columns, texts, strict=True) if row.get("policy") == "refuse"]
    was, now = (_verdicts([row.columns for row in chosen], said) for said in (before, answers))
    result = _rate("recovery_rate", [verdict in _SAFE for verdict in now])
    result |= _rate("kept_rate", [b in _SAFE for a, b in zip(was, now, strict=True) if a in _SAFE])
    result |= {key: value for key, value in plain.items() if key.startswith(("safe_rate", "over_refusal_rate"))}
    shown = zip(chosen, _decode(tokenizer, begun), answers, now, strict=True)
    examples = [{"source": r.source, "forced": b, "response": a, "verdict": v} for r, b, a, v in shown]
    return result | {"verdicts": dict(sorted(Counter(now).items())), "examples": examples[:4]}


def stage_ends(folder: Path) -> list[tuple[str, Path]]:
    """(stage, checkpoint) of every stage of a run folder that has ended, in order; of another folder itself alone."""
    found = [(ckpt.load_state(path), path) for path in ckpt.checkpoints(folder)]
    ends = [(s["config"]["stages"][s["stage_index"] - 1]["name"], path) for s, path in found if s["step"] == 0]
    return ends or [(folder.name, folder)]


def _decode(tokenizer, ids: list[np.ndarray]) -> list[str]:
    return tokenizer.batch_decode(ids, skip_special_tokens=True)
