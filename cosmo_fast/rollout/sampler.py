"""Continuous batching on the packed forward, reproducible sample by sample.

A step is one forward over ``[new prompts | the last token of every live response]``. Keys and values lie in a store of
a fixed number of rows: a prompt's once for all of its responses, a response's in an interval of its own. A response
leaves in the step that ends it, and the next groups take its place.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import nlargest

import numpy as np
import torch

from cosmo_fast.models import Policy
from cosmo_fast.models.vision import Vision
from cosmo_fast.plan import Media, Plan, Prompt
from cosmo_fast.pruning import Kept
from cosmo_fast.rollout.draw import SamplingParams, sample
from cosmo_fast.rollout.stops import StopStrings
from cosmo_fast.rollout.store import Rows, Store
from cosmo_fast.rollout.tools import ToolCalls

# Columns of the live responses; those from START on are of the layers where prompts are pruned, FULL further they are
# those of the layers below.
SAMPLE, SLOT, POSITION, LENGTH, START, PROMPT, PROMPT_LENGTH = range(7)
FULL = 3


@dataclass(frozen=True, eq=False)
class Completion:
    """A sampled response: ``ids`` (R,) int64 with the token that ended it, ``logps`` and ``entropies`` (R,) fp32.

    Both are of the distribution at the sampling temperature before top-k, top-p and min-p, as training scores it.
    ``ended``: by an end token or a stop string, not by its length. ``kept``: the vision rows of its prompt that were
    chosen, the same for all responses to it; None where none is pruned. ``tool_mask`` (R,) bool: the policy's own
    tokens, where the others are results of its ``calls`` (see ``ToolCalls``), with 0 in ``logps`` and ``entropies``;
    both None without tools.
    """

    ids: np.ndarray
    logps: np.ndarray
    entropies: np.ndarray
    ended: bool
    kept: Kept | None = None
    tool_mask: np.ndarray | None = None
    calls: tuple[int, ...] | None = None

    @property
    def own(self) -> np.ndarray:
        """(R,) bool: the tokens that the policy chose."""
        return np.ones(len(self.ids), dtype=bool) if self.tool_mask is None else self.tool_mask


class Sampler:
    """Samples from a policy. Another engine fits in its place with :meth:`generate` alone.

    Args:
        policy, vision: the model that trains and its picture features.
        batch_size: responses decoded at once, at least those of one prompt.
        max_tokens: prompt tokens forwarded at once; a longer prompt goes alone.
        kv_cache_mib: bound of the keys and values. Less is taken where less is enough: for ``batch_size`` responses of
            full length and four times the prompts that they begin with, for stragglers keep theirs.
    """

    def __init__(
        self,
        policy: Policy,
        vision: Vision,
        batch_size: int = 256,
        max_tokens: int = 16384,
        kv_cache_mib: int = 4096,
    ):
        self.policy, self.vision = policy, vision
        self.batch_size, self.max_tokens, self.kv_cache_mib = batch_size, max_tokens, kv_cache_mib
        self.kv_bytes = 0  # of the last call

    @torch.inference_mode()
    def generate(
        self,
        prompts: list[Prompt],
        params: SamplingParams,
        *,
        num_generations: int = 1,
        seed: int = 0,
        first: int = 0,
    ) -> list[list[Completion]]:
        """``num_generations`` responses for every prompt; ``first``: the number of the first one.

        Response j of prompt i draws from a random stream of its own, (seed, i · num_generations + j), whatever its
        batch-mates are. Groups are admitted whole and in order, as soon as there is room. Pictures are encoded in lots
        that the prompts' order and ``max_tokens`` alone decide, because a feature's last bits depend on the pictures
        encoded with it; one by one where prompts are pruned, whose vision rows are chosen when they are admitted.

        Raises:
            ValueError: one prompt's responses do not fit ``batch_size`` or ``kv_cache_mib``.
            MemoryError: the keys and values do not fit the machine.
        """
        rows = self.store_rows(prompts, params, num_generations)
        call = _Call(self, prompts, params, num_generations, (seed, first * num_generations), rows)
        done, self.kv_bytes = call.run(), 2 * sum(keys.nbytes for keys in call.store.keys)
        return done

    def store_rows(self, prompts: list[Prompt], params: SamplingParams, num_generations: int) -> tuple[int, int, int]:
        """Tokens that the store of a call holds, those of the layers below the first pruned one, and that layer.

        ValueError as :meth:`generate`.
        """
        if num_generations < 1:
            raise ValueError(f"num_generations={num_generations} must be at least 1")
        if num_generations > self.batch_size:
            raise ValueError(
                f"num_generations={num_generations} is over sampling_batch_size={self.batch_size}; raise the latter"
            )
        config = self.policy.model.config.get_text_config()
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        itemsize = self.policy.head_weight.element_size()
        layer_bytes, held = 2 * itemsize * config.num_key_value_heads * size, self.kv_cache_mib << 20
        layer = max((p.kept.setting.layer for p in prompts if p.kept), default=0)
        responses = min(self.batch_size, len(prompts) * num_generations)
        at_once, steps = 4 * -(-responses // num_generations), params.max_completion_length
        levels = [len(p.ids) - p.dropped for p in prompts], [len(p.ids) for p in prompts]
        groups = [max(lengths, default=0) + num_generations * steps for lengths in levels]
        layers = config.num_hidden_layers - layer, layer
        group = sum(n * rows for n, rows in zip(layers, groups, strict=True)) * layer_bytes
        if group > held:
            longest = max(levels[layer > 0])
            raise ValueError(
                f"num_generations={num_generations} responses of max_completion_length={steps} "
                f"to a prompt of {longest} tokens need {group / 2**20:.1f} MiB of keys and values, over "
                f"kv_cache_mib={self.kv_cache_mib}; raise it, or lower the others"
            )
        wanted = [responses * steps + sum(nlargest(at_once, lengths)) for lengths in levels]
        above, below = (min(held * rows // group, n) if rows else 0 for rows, n in zip(groups, wanted, strict=True))
        return above, below, layer


class _Pictures:
    """Features of a call's pictures, in lots of ``max_tokens`` prompt tokens at most; a lot goes with its prompts."""

    def __init__(self, vision: Vision, prompts: list[Prompt], max_tokens: int):
        self.vision, self.prompts = vision, prompts
        starts, tokens = [0], 0
        for i, prompt in enumerate(prompts):
            tokens += len(prompt.ids)
            if tokens > max_tokens and i > starts[-1]:
                starts.append(i)
                tokens = len(prompt.ids)
        self.lots = list(zip(starts, [*starts[1:], len(prompts)], strict=True))
        self.held: list[tuple[int, dict[str, torch.Tensor]]] = []

    def of(self, media: list[Media], stop: int) -> torch.Tensor | None:
        """Features of ``media``, pictures of the next prompts up to ``stop``."""
        while self.lots and self.lots[0][0] < stop:
            first, last = self.lots.pop(0)
            distinct = {m.key: m for prompt in self.prompts[first:last] for m in prompt.media}
            parts = []
            if distinct:
                alone = any(prompt.kept for prompt in self.prompts[first:last])
                with torch.inference_mode(False), torch.no_grad():  # training may use them again
                    made = self.vision.features([*distinct.values()], alone=alone)
                parts = made.split([m.rows for m in distinct.values()])
            self.held.append((last, dict(zip(distinct, parts, strict=True))))
        known = {key: part for _, lot in self.held for key, part in lot.items()}
        features = torch.cat([known[m.key] for m in media]) if media else None
        self.held = [lot for lot in self.held if lot[0] > stop]
        return features


class _Call:
    """The state of one :meth:`Sampler.generate`; what is static is allocated here."""

    def __init__(
        self, sampler: Sampler, prompts, params: SamplingParams, each: int, stream: tuple[int, int], rows: tuple
    ):
        self.policy, self.prompts, self.params, self.each, self.stream = sampler.policy, prompts, params, each, stream
        self.max_tokens, steps = sampler.max_tokens, params.max_completion_length
        self.pictures = _Pictures(sampler.vision, prompts, sampler.max_tokens)
        above, below, self.layer = rows
        self.rows, self.store = [Rows(n) for n in ([above, below] if self.layer else [above])], Store(*rows)
        self.kept: list[Kept | None] = [p.kept for p in prompts]
        slots = min(sampler.batch_size, len(prompts) * each)
        self.slots = list(range(slots))[::-1]
        self.ids = np.zeros((slots, steps), dtype=np.int64)
        self.logps, self.entropies = np.zeros((2, slots, steps), dtype=np.float32)
        self.uniforms = np.zeros((slots, steps))
        self.eos = np.array(self.policy.eos_ids)
        self.stops = StopStrings(self.policy.tokenizer, params.stop_strings) if params.stop_strings else None
        self.tools = ToolCalls(params.search, self.policy.tokenizer, slots, steps) if params.search else None
        self.live = np.zeros((0, 4 + FULL * len(self.rows)), dtype=np.int64)  # responses in the order of their prompts
        self.left = [each] * len(prompts)  # responses of a prompt that have not ended
        self.admitted = 0
        self.out: list[list[Completion | None]] = [[None] * each for _ in prompts]

    def run(self) -> list[list[Completion]]:
        while self.admitted < len(self.prompts) or len(self.live):
            hidden = self._forward()
            logits = hidden @ self.policy.head_weight.T
            place = self.live[:, SLOT], self.live[:, LENGTH]
            uniform = torch.from_numpy(self.uniforms[place]).to(logits.device)
            drawn = (x.cpu().numpy() for x in sample(logits, self.params, uniform))
            self.ids[place], self.logps[place], self.entropies[place] = drawn
            if self.tools and (given := (forced := self.tools.forced[place]) >= 0).any():
                place = tuple(x[given] for x in place)
                self.ids[place], self.logps[place], self.entropies[place] = forced[given], 0, 0
            self.live[:, LENGTH] += 1
            self._leave()
        return self.out

    def _forward(self) -> torch.Tensor:
        """Hidden states (n, d) from which every live response draws its next token, the admitted ones included."""
        live, device = self.live, self.policy.device
        tokens = self.ids[live[:, SLOT], live[:, LENGTH] - 1]
        positions = live[:, POSITION] + live[:, LENGTH] - 1
        plan, starts = self._admit()
        self.store.begin(*self._level(live, plan, starts, 0), self.layer and self._level(live, plan, starts, 1) or None)
        if plan is None:
            embeddings = self.policy.model.get_input_embeddings()(torch.from_numpy(tokens).to(device))
            return self.policy.forward(embeddings, torch.from_numpy(positions).to(device).expand(3, -1), self.store)
        features = self.pictures.of(plan.media, self.admitted)
        # The step's plan: the new prompts, then one token a live response at the position where it is.
        if plan.taken is not None:  # chosen before
            plan.taken = np.concatenate([plan.taken, len(plan.tokens) + np.arange(len(live))])
        plan.tokens = np.concatenate([plan.tokens, tokens])
        plan.positions = np.concatenate([plan.positions, np.broadcast_to(positions, (3, len(live)))], 1)
        hidden = self.policy.hidden(plan, features, attention=self.store)
        self.kept[self.admitted - len(plan.prompts) : self.admitted] = [p.kept for p in plan.prompts]
        last = np.repeat(plan.prompt_starts + plan.prompt_lengths - 1, self.each)
        own = plan.prompt_tokens + np.arange(len(live))
        return hidden[torch.from_numpy(np.concatenate([own, last])).to(device)]

    def _level(self, live: np.ndarray, plan: Plan | None, starts: np.ndarray, level: int) -> tuple:
        """Rows where the step's keys go and its table, in the layers where prompts are pruned (0) or below them (1)."""
        at = live[:, level * FULL :]
        table = np.ones((len(live), 6), dtype=np.int64)
        table[:, 0] = np.arange(len(live))
        table[:, 2:] = np.stack([at[:, START], live[:, LENGTH], at[:, PROMPT], at[:, PROMPT_LENGTH]], 1)
        rows = [at[:, START] + live[:, LENGTH] - 1]
        if plan is not None:
            prompts = (plan.below if level else plan.segments).table
            table[:, 0] += prompts[:, 1].sum()
            prompts = np.concatenate([prompts[:, :2], starts[level][:, None], prompts[:, 3:]], 1)
            rows = [np.arange(s, s + n) for s, n in prompts[:, 2:4]] + rows
            table = np.concatenate([prompts, table])
        return torch.from_numpy(np.concatenate(rows)).to(self.policy.device), table

    def _admit(self) -> tuple[Plan | None, np.ndarray]:
        """Takes slots and rows for the next groups that fit; the plan of their prompts and where their keys go."""
        first, starts, tokens, live = self.admitted, [], 0, []
        steps = self.params.max_completion_length
        while self.admitted < len(self.prompts) and len(self.slots) >= self.each:
            prompt = self.prompts[self.admitted]
            tokens += prompt.length
            if starts and tokens > self.max_tokens:
                break
            lengths = [len(prompt.ids) - prompt.dropped, len(prompt.ids)][: len(self.rows)]
            free, taken = [list(rows.free) for rows in self.rows], []
            for rows, n in zip(self.rows, lengths, strict=True):
                taken.append([rows.take(n), *(rows.take(steps, above=True) for _ in range(self.each))])
            if any(None in own for own in taken):
                for rows, before in zip(self.rows, free, strict=True):
                    rows.free = before
                break
            starts.append([own[0] for own in taken])
            slots = [self.slots.pop() for _ in range(self.each)]
            if self.tools:
                self.tools.admit(slots)
            sample = self.admitted * self.each
            if self.params.temperature:
                self.uniforms[slots] = _uniforms(self.stream[0], self.stream[1] + sample, self.each, steps)
            for j in range(self.each):
                at = [x for own, n in zip(taken, lengths, strict=True) for x in (own[1 + j], own[0], n)]
                live.append([sample + j, slots[j], 0, 0, *at])
            self.admitted += 1
        if not starts:
            return None, np.zeros(0, dtype=np.int64)
        plan = Plan(self.prompts[first : self.admitted])
        admitted = np.array(live, dtype=np.int64)
        admitted[:, POSITION] = np.repeat(plan.next_position, self.each)
        self.live = np.concatenate([self.live, admitted])
        return plan, np.array(starts, dtype=np.int64).T

    def _leave(self) -> None:
        """Hands out the responses that have ended and frees what they held."""
        live, steps = self.live, self.params.max_completion_length
        ended = (self.ids[live[:, SLOT], live[:, LENGTH] - 1, None] == self.eos).any(1)
        if self.stops:
            own = self.tools.own if self.tools else np.zeros(len(self.ids), dtype=np.int64)  # no document ends anything
            ended |= self.stops.completed([self.ids[slot, own[slot] : n] for slot, n in live[:, [SLOT, LENGTH]]])
        leaving = ended | (live[:, LENGTH] == steps)
        if self.tools:
            self.tools.answer(*live[~leaving][:, [SLOT, LENGTH]].T, self.ids)
        if not leaving.any():
            return
        for row, by_itself in zip(live[leaving].tolist(), ended[leaving].tolist(), strict=True):
            group, j = divmod(row[SAMPLE], self.each)
            kept = row[SLOT], slice(row[LENGTH])
            arrays = self.ids[kept].copy(), self.logps[kept].copy(), self.entropies[kept].copy()
            tools = (self.tools.forced[kept] < 0, (*self.tools.counts[row[SLOT]].tolist(),)) if self.tools else ()
            self.out[group][j] = Completion(*arrays, by_itself, self.kept[group], *tools)
            self.slots.append(row[SLOT])
            self.left[group] -= 1
            for i, rows in enumerate(self.rows):
                rows.give(row[START + i * FULL], steps)
                if not self.left[group]:
                    rows.give(row[PROMPT + i * FULL], row[PROMPT_LENGTH + i * FULL])
        self.live = live[~leaving]


def _uniforms(seed: int, first: int, count: int, steps: int) -> np.ndarray:
    """(count, steps) uniforms; row i depends on ``seed`` and ``first + i`` alone."""
    return np.stack([np.random.Generator(np.random.Philox(key=[seed, first + i])).random(steps) for i in range(count)])
