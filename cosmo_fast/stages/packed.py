"""Groups through the packed forward: one pass a micro-batch, or two phases for a group that is larger than one.

Two phases: the prompt goes forward once and its keys and values are kept; then some responses at a time go forward and
backward over them, adding to the gradients of those keys, those values and the prompt's last hidden state; at the end
the prompt goes backward once with what has come together. The gradient is that of one pass, up to the order of sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from cosmo_fast import ops
from cosmo_fast.models import Policy
from cosmo_fast.models.vision import Vision
from cosmo_fast.ops.prefix_attention import Segments
from cosmo_fast.ops.vocab_stats import statistics_dtype
from cosmo_fast.plan import GroupSize, Plan, Prompt, micro_batches


@dataclass
class Group:
    """A prompt and its responses with what the loss knows of every token; lists have an entry a response.

    ``weights``, ``old_logps``, ``ref_logps``: (R,) arrays; ``advantages``: floats; ``ended``: whether the policy ended
    the response itself; ``tool_masks``: (R,) bool, the tokens that the policy chose. None where the loss has no use
    for them.
    """

    prompt: Prompt
    responses: list[np.ndarray]
    weights: list[np.ndarray]
    advantages: list[float] | None = None
    old_logps: list[np.ndarray] | None = None
    ref_logps: list[np.ndarray] | None = None
    ended: list[bool] | None = None
    tool_masks: list[np.ndarray] | None = None

    @property
    def size(self) -> GroupSize:
        return GroupSize.of(self.prompt, self.responses)

    @property
    def tokens(self) -> int:
        return self.size.tokens

    def only(self, part: list[int]) -> Group:
        """The same prompt with some of the responses."""
        lists = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "prompt"}
        return replace(self, **{name: [x[i] for i in part] for name, x in lists.items() if x})


@dataclass
class Pass:
    """What one forward gives: ``hidden`` (N, d), the states that predict the response tokens of ``plan``.

    ``indices``: the places of ``groups`` in the list that was passed; of a split group ``groups`` holds a part.
    """

    indices: list[int]
    groups: list[Group]
    plan: Plan
    hidden: torch.Tensor


def plan_of(groups: list[Group]) -> Plan:
    """The packed layout of some groups."""
    return Plan([g.prompt for g in groups], [g.responses for g in groups])


def passes(
    policy: Policy,
    vision: Vision,
    groups: list[Group],
    max_tokens: int,
    backward: Callable[[torch.Tensor], None] = torch.Tensor.backward,
) -> Iterator[Pass]:
    """The forwards of ``groups`` in micro-batches of at most ``max_tokens`` tokens, each freed before the next.

    The caller's backward of a pass comes before the next pass is asked for; with gradients on, ``backward`` is called
    here with a scalar at the end of a split group.
    """
    for group in groups:
        group.prompt.check()
    for batch in micro_batches([g.size for g in groups], max_tokens):
        chosen = [groups[i] for i in batch]
        if batch.parts:
            for part in _two_phases(policy, vision, chosen[0], batch.parts, backward):
                yield replace(part, indices=batch)
            continue
        plan = plan_of(chosen)
        hidden = policy.hidden(plan, vision.features(plan.media, alone=plan.unchosen))
        yield Pass(batch, chosen, plan, hidden[plan.tensor("label_rows", policy.device)])


def _two_phases(policy: Policy, vision: Vision, group: Group, parts: list[list[int]], backward) -> Iterator[Pass]:
    prefix = _Prefix(Plan([group.prompt]))
    features = vision.features(prefix.plan.media, alone=prefix.plan.unchosen)
    last = policy.hidden(prefix.plan, features, attention=prefix)[-1:]
    [prompt] = prefix.plan.prompts  # with its vision rows chosen
    made = [last, *prefix.keys, *prefix.values]
    wide = statistics_dtype(last.dtype)  # the parts' gradients add up in fp32 at least
    leaves = [x.detach().to(wide).requires_grad_(x.requires_grad) for x in made]
    layers = len(prefix.keys)
    for part in parts:
        chosen = replace(group.only(part), prompt=prompt)
        plan = plan_of([chosen])
        attention = _Continuation(plan, leaves[1 : layers + 1], leaves[layers + 1 :])
        embeddings = policy.model.get_input_embeddings()(plan.tensor("targets", policy.device))
        positions = plan.tensor("positions", policy.device)
        states = policy.forward(embeddings, positions[:, positions.shape[1] - len(embeddings) :], attention)
        # A response's first token is predicted by the prompt's last state, which stands before the responses' own.
        rows = plan.tensor("label_rows", policy.device) - (plan.prompt_tokens - 1)
        yield Pass([], [chosen], plan, torch.cat((leaves[0].to(states.dtype), states))[rows])
    learnt = [(x, leaf.grad) for x, leaf in zip(made, leaves, strict=True) if leaf.grad is not None]
    if learnt:
        backward(torch.stack([(x * grad).sum() for x, grad in learnt]).sum())  # in the wider dtype


class _Prefix:
    """Attention of phase one; keeps every layer's keys and values, (P, Hk, D) and part of the graph."""

    def __init__(self, plan: Plan):
        self.plan, self._kept = plan, {}

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        self._kept.setdefault(layer, (k, v))  # gradient checkpointing comes here a second time
        return ops.prefix_attention(q, k, v, self.plan.at(layer), scale=scale)

    @property
    def keys(self) -> list[torch.Tensor]:
        return [self._kept[layer][0] for layer in sorted(self._kept)]

    @property
    def values(self) -> list[torch.Tensor]:
        return [self._kept[layer][1] for layer in sorted(self._kept)]


class _Continuation:
    """Attention of phase two: the responses' rows over the kept prompt and themselves."""

    def __init__(self, plan: Plan, keys: list[torch.Tensor], values: list[torch.Tensor]):
        self.keys, self.values, self.plan = keys, values, plan
        self.below, self.segments = self._table(plan.below), self._table(plan.segments)

    def _table(self, segments: Segments) -> Segments:
        table = segments.table[1:].copy()
        table[:, 0] -= segments.table[0, 1]
        return Segments(table)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        k, v = (torch.cat((x[layer].to(new.dtype), new)) for x, new in ((self.keys, k), (self.values, v)))
        segments = self.segments if layer >= self.plan.layer else self.below
        return ops.prefix_attention(q, k, v, segments, scale=scale)
