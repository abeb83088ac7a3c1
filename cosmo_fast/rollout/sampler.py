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
from cosmo_fast.rollout.draw import SamplingParams, sample
from cosmo_fast.rollout.stops import StopStrings
from cosmo_fast.rollout.store import Rows, Store

# Columns of the live responses; START to PROMPT_LENGTH are those of an attention table.
SAMPLE, SLOT, POSITION, START, LENGTH, PROMPT, PROMPT_LENGTH = range(7)


@dataclass(frozen=True, eq=False)
class Completion:
    """A sampled response: ``ids`` (R,) int64 with the token that ended it, ``logps`` and ``entropies`` (R,) fp32.

    Both are of the distribution at the sampling temperature before top-k, top-p and min-p, as training scores it.
    ``ended``: by an end token or a stop string, not by its length.
    """

    ids: np.ndarray
    logps: np.ndarray
    entropies: np.ndarray
    ended: bool


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

    @torch.no_grad()
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
        encoded with it.

        Raises:
            ValueError: one prompt's responses do not fit ``batch_size`` or ``kv_cache_mib``.
            MemoryError: the keys and values do not fit the machine.
        """
        rows = self.store_rows([len(p.ids) for p in prompts], params, num_generations)
        return _Call(self, prompts, params, num_generations, (seed, first * num_generations), rows).run()

    def store_rows(self, prompt_lengths: list[int], params: SamplingParams, num_generations: int) -> int:
        """Tokens that the store of a call holds. ValueError as :meth:`generate`."""
        if num_generations < 1:
            raise ValueError(f"num_generations={num_generations} must be at least 1")
        if num_generations > self.batch_size:
            raise ValueError(
                f"num_generations={num_generations} is over sampling_batch_size={self.batch_size}; raise the latter"
            )
        config = self.policy.model.config.get_text_config()
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        itemsize = self.policy.head_weight.element_size()
        token_bytes = 2 * itemsize * config.num_hidden_layers * config.num_key_value_heads * size
        held, longest = (self.kv_cache_mib << 20) // token_bytes, max(prompt_lengths, default=0)
        group = longest + num_generations * params.max_completion_length
        if group > held:
            raise ValueError(
                f"num_generations={num_generations} responses of max_completion_length={params.max_completion_length} "
                f"to a prompt of {longest} tokens need {group * token_bytes / 2**20:.1f} MiB of keys and values, over "
                f"kv_cache_mib={self.kv_cache_mib}; raise it, or lower the others"
            )
        responses = min(self.batch_size, len(prompt_lengths) * num_generations)
        at_once = nlargest(4 * -(-responses // num_generations), prompt_lengths)
        return min(held, responses * params.max_completion_length + sum(at_once))


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
                parts = self.vision.features([*distinct.values()]).split([m.rows for m in distinct.values()])
            self.held.append((last, dict(zip(distinct, parts, strict=True))))
        known = {key: part for _, lot in self.held for key, part in lot.items()}
        features = torch.cat([known[m.key] for m in media]) if media else None
        self.held = [lot for lot in self.held if lot[0] > stop]
        return features


class _Call:
    """The state of one :meth:`Sampler.generate`; what is static is allocated here."""

    def __init__(
        self, sampler: Sampler, prompts, params: SamplingParams, each: int, stream: tuple[int, int], rows: int
    ):
        self.policy, self.prompts, self.params, self.each, self.stream = sampler.policy, prompts, params, each, stream
        self.max_tokens, steps = sampler.max_tokens, params.max_completion_length
        self.pictures = _Pictures(sampler.vision, prompts, sampler.max_tokens)
        self.rows, self.store = Rows(rows), Store(rows)
        slots = min(sampler.batch_size, len(prompts) * each)
        self.slots = list(range(slots))[::-1]
        self.ids = np.zeros((slots, steps), dtype=np.int64)
        self.logps, self.entropies = np.zeros((2, slots, steps), dtype=np.float32)
        self.uniforms = np.zeros((slots, steps))
        self.eos = np.array(self.policy.eos_ids)
        self.stops = StopStrings(self.policy.tokenizer, params.stop_strings) if params.stop_strings else None
        self.live = np.zeros((0, 7), dtype=np.int64)  # responses in the order of their prompts
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
            self.live[:, LENGTH] += 1
            self._leave()
        return self.out

    def _forward(self) -> torch.Tensor:
        """Hidden states (n, d) from which every live response draws its next token, the admitted ones included."""
        live, device = self.live, self.policy.device
        written = live[:, START] + live[:, LENGTH] - 1
        tokens = self.ids[live[:, SLOT], live[:, LENGTH] - 1]
        positions = live[:, POSITION] + live[:, LENGTH] - 1
        table = np.ones((len(live), 6), dtype=np.int64)
        table[:, 0] = np.arange(len(live))
        table[:, 2:] = live[:, START : PROMPT_LENGTH + 1]
        plan, starts = self._admit()
        if plan is None:
            self.store.begin(torch.from_numpy(written).to(device), table)
            embeddings = self.policy.model.get_input_embeddings()(torch.from_numpy(tokens).to(device))
            return self.policy.forward(embeddings, torch.from_numpy(positions).to(device).expand(3, -1), self.store)
        lengths, base = plan.prompt_lengths, len(plan.tokens)
        features = self.pictures.of(plan.media, self.admitted)
        rows = np.concatenate([*(np.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)), written])
        zeros = np.zeros_like(starts)
        prefill = np.stack([plan.prompt_starts, lengths, starts, lengths, zeros, zeros], 1)
        table[:, 0] += base
        self.store.begin(torch.from_numpy(rows).to(device), np.concatenate([prefill, table]))
        # The step's plan: the new prompts, then one token a live response at the position where it is.
        plan.tokens = np.concatenate([plan.tokens, tokens])
        plan.positions = np.concatenate([plan.positions, np.broadcast_to(positions, (3, len(live)))], 1)
        hidden = self.policy.hidden(plan, features, attention=self.store)
        last = np.repeat(plan.prompt_starts + lengths - 1, self.each)
        return hidden[torch.from_numpy(np.concatenate([base + np.arange(len(live)), last])).to(device)]

    def _admit(self) -> tuple[Plan | None, np.ndarray]:
        """Takes slots and rows for the next groups that fit; the plan of their prompts and where their keys go."""
        first, starts, tokens, live = self.admitted, [], 0, []
        steps = self.params.max_completion_length
        while self.admitted < len(self.prompts) and len(self.slots) >= self.each:
            length = len(self.prompts[self.admitted].ids)
            tokens += length
            if (starts and tokens > self.max_tokens) or (start := self.rows.take(length)) is None:
                break
            own = [self.rows.take(steps, above=True) for _ in range(self.each)]
            if None in own:
                for taken in own:
                    if taken is not None:
                        self.rows.give(taken, steps)
                self.rows.give(start, length)
                break
            starts.append(start)
            slots = [self.slots.pop() for _ in own]
            sample = self.admitted * self.each
            if self.params.temperature:
                self.uniforms[slots] = _uniforms(self.stream[0], self.stream[1] + sample, self.each, steps)
            live += [[sample + j, slots[j], 0, own[j], 0, start, length] for j in range(self.each)]
            self.admitted += 1
        if not starts:
            return None, np.zeros(0, dtype=np.int64)
        plan = Plan(self.prompts[first : self.admitted])
        admitted = np.array(live, dtype=np.int64)
        admitted[:, POSITION] = np.repeat(plan.next_position, self.each)
        self.live = np.concatenate([self.live, admitted])
        return plan, np.array(starts, dtype=np.int64)

    def _leave(self) -> None:
        """Hands out the responses that have ended and frees what they held."""
        live, steps = self.live, self.params.max_completion_length
        ended = np.isin(self.ids[live[:, SLOT], live[:, LENGTH] - 1], self.eos)
        if self.stops:
            ended |= self.stops.completed([self.ids[slot, :n] for slot, n in live[:, [SLOT, LENGTH]]])
        leaving = ended | (live[:, LENGTH] == steps)
        if not leaving.any():
            return
        for row, by_itself in zip(live[leaving].tolist(), ended[leaving].tolist(), strict=True):
            group, j = divmod(row[SAMPLE], self.each)
            kept = row[SLOT], slice(row[LENGTH])
            self.out[group][j] = Completion(
                self.ids[kept].copy(), self.logps[kept].copy(), self.entropies[kept].copy(), by_itself
            )
            self.slots.append(row[SLOT])
            self.rows.give(row[START], steps)
            self.left[group] -= 1
            if not self.left[group]:
                self.rows.give(row[PROMPT], row[PROMPT_LENGTH])
        self.live = live[~leaving]


def _uniforms(seed: int, first: int, count: int, steps: int) -> np.ndarray:
    """(count, steps) uniforms; row i depends on ``seed`` and ``first + i`` alone."""
    return np.stack([np.random.Generator(np.random.Philox(key=[seed, first + i])).random(steps) for i in range(count)])
