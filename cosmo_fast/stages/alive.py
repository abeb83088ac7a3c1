"""Whether the policy sees its pictures: blank them, and the log-probs of the responses must change."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import torch

from cosmo_fast.plan import Plan, Prompt
from cosmo_fast.rollout import Completion
from cosmo_fast.stages.base import Context, logprobs
from cosmo_fast.stages.packed import Group

ROWS, TOKENS = 4, 8
# A picture that reaches no response changes nothing at all; what it adds to a random model is a thousand times this.
DEAD = 1e-6


@torch.no_grad()
def vision_alive(context: Context, runner, data: dict[str, tuple[list, float]]) -> float | None:
    """Mean |Δ log-prob| in nats a token between the pictures of the first rows and blank ones; None without pictures.

    Args:
        context: the stage's. runner: the stage, whose sampler answers where rows have no answer of their own.
        data: its encoded rows by file, as the trainer has them.

    Raises:
        ValueError: nothing changes.
    """
    policy, vision = context.policy, context.vision
    rows = [row[:2] if isinstance(row, tuple) else (row, None) for encoded, _ in data.values() for row in encoded]
    rows = [(prompt, answer) for prompt, answer in rows if prompt.media][:ROWS]
    if not rows:
        return None
    prompts = [prompt for prompt, _ in rows]
    if context.stage.kind == "sft":
        answers = [answer[:TOKENS] for _, answer in rows]
    else:
        params = replace(runner.params, max_completion_length=min(TOKENS, runner.params.max_completion_length))
        sampled = [group[0] for group in runner.sampler.generate(prompts, params, seed=context.seed)]
        answers = [c.ids for c in sampled]
        prompts = [p.reuse(c.kept) for p, c in zip(prompts, sampled, strict=True)]
    vision.forget()
    plan = Plan(prompts, [[answer] for answer in answers])
    seen, _ = policy.logprobs(plan, vision.features(plan.media))  # keeps the vision rows that the blank ones keep too
    blind, _ = policy.logprobs(plan, vision.blank(plan.media))
    vision.forget()
    change = float((seen - blind).abs().mean())
    if change < DEAD:
        raise ValueError(
            f"model_name_or_path={context.config.model_name_or_path!r} does not see its pictures: with those of "
            f"{', '.join(p.source for p in prompts)} blanked, the log-probs of the responses change by {change:.2g} "
            "nats a token. Look at the vision tower's weights (were they all in the folder?), at image_mean and "
            "image_std of the image processor, and at whether these pictures are blank themselves"
        )
    return change


def logprob_drops(context: Context, owner: list[Prompt], completions: list[Completion]) -> list[float | None]:
    """By how many nats each completion's mean log-prob a token falls with blank pictures; None where there are none.

    owner: the prompt of each completion, those of one prompt side by side.
    """
    groups: list[Group] = []
    for i, (prompt, completion) in enumerate(zip(owner, completions, strict=True)):
        if i and prompt is owner[i - 1]:
            groups[-1].responses.append(completion.ids)
        else:
            groups.append(Group(prompt, [completion.ids], weights=[]))
    seeing = [group for group in groups if group.prompt.media]
    dark = SimpleNamespace(features=lambda media, alone: context.vision.blank(media))
    blind = iter(logprobs(context, context.policy, dark, seeing))
    scored = [arrays for g in groups for arrays in (next(blind) if g.prompt.media else [None] * len(g.responses))]
    pairs = ((c.logps, dark, c.own) for c, dark in zip(completions, scored, strict=True))
    return [None if dark is None else float(seen[own].mean() - dark[own].mean()) for seen, dark, own in pairs]
