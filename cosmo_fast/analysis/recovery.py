"""Self-reflection: does a policy that was forced to begin an unsafe answer come back?"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cosmo_fast import checkpoint as ckpt
from cosmo_fast.analysis.answers import harmful, unsafe_step
from cosmo_fast.data.encode import Encoder
from cosmo_fast.data.rows import Row
from cosmo_fast.evaluate.metrics import score
from cosmo_fast.evaluate.run import judged_columns
from cosmo_fast.models import Policy
from cosmo_fast.pruning import VisionPrune
from cosmo_fast.rollout import Sampler, SamplingParams
from cosmo_fast.verifiers.engine import Verifiers


def recovery(
    policy: Policy, sampler: Sampler, rows: list[Row], params: SamplingParams, *, seed: int = 0,
    vision_prune: VisionPrune | None = None, verifiers: Verifiers | None = None,
) -> dict[str, Any]:  # fmt: skip
    """How often harmful rows are answered safely after a forced unsafe first step, and without one.

    The forced tokens end the prompt, and the policy goes on over their keys and values as if it had sampled them; the
    judge reads both. ``params.max_completion_length`` bounds what comes after them. recovery_rate: harmful rows that
    end in a refusal, barely or explained; safe_rate and over_refusal_rate: of all rows without the step, for what
    refuses everything always recovers; each with its Wilson interval and n. verdicts, examples: of forced responses.
    ``verifiers`` judge rows without a judge.

    Raises:
        ValueError: no harmful row, or one without its unsafe step (:func:`cosmo_fast.analysis.answers.unsafe_step`).
    """
    encoder, chosen, forced, begun = Encoder(policy, vision_prune=vision_prune), harmful(rows), [], []
    for row in chosen:
        prompt, step = encoder.prompt(row), unsafe_step(row)
        if prompt.text.rstrip().endswith("<think>"):  # some chat templates open the thought themselves
            step = step.removeprefix("<think>")
        begun.append(np.array(policy.tokenizer(step, add_special_tokens=False)["input_ids"], dtype=np.int64))
        forced.append(replace(prompt, ids=np.concatenate([prompt.ids, begun[-1]])))

    def judged(asked: list[Row], prompts: list, before: list[np.ndarray]) -> tuple[list[str], dict[str, Any]]:
        groups = sampler.generate(prompts, params, seed=seed)
        ids = [np.concatenate([b, group[0].ids]) for b, group in zip(before, groups, strict=True)]
        texts = policy.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return texts, score(judged_columns(policy, asked, texts, verifiers)[0], texts)

    texts, after = judged(chosen, forced, begun)
    _, free = judged(rows, [encoder.prompt(row) for row in rows], [np.zeros(0, dtype=np.int64)] * len(rows))
    result = {f"recovery_rate{end}": after[f"safe_rate{end}"] for end in ("", "_interval", "_n")}
    result |= {name: value for name, value in free.items() if name.startswith(("safe_rate", "over_refusal_rate"))}
    return result | {"verdicts": after["verdicts"], "examples": texts[:4]}


def stage_ends(folder: Path) -> list[tuple[str, Path]]:
    """(stage, checkpoint) of each stage of a run folder that has ended, in order; of another folder itself alone."""
    found = [(ckpt.load_state(path), path) for path in ckpt.checkpoints(folder)]
    ends = [(s["config"]["stages"][s["stage_index"] - 1]["name"], path) for s, path in found if s["step"] == 0]
    return ends or [(folder.name, folder)]
