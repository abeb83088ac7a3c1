"""Batched sampling on the packed forward, reproducible sample by sample."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from cosmo_fast.models import Policy
from cosmo_fast.models.vision import Vision
from cosmo_fast.plan import Plan, Prompt
from cosmo_fast.rollout.store import DecodeStep, Prefill

# Responses that have ended are dropped from the batch once they are this share of it.
COMPACT_AT = 0.25


@dataclass(frozen=True)
class SamplingParams:
    """``temperature`` 0 is greedy. ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 filter nothing.

    Raises:
        ValueError: a value out of its range.
    """

    max_completion_length: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self):
        for name, low, high in (("temperature", 0, 100), ("top_k", 0, 1 << 30), ("top_p", 1e-6, 1), ("min_p", 0, 1)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name}={getattr(self, name)} is not in [{low}, {high}]")
        if self.max_completion_length < 1:
            raise ValueError(f"max_completion_length={self.max_completion_length} must be at least 1")


@dataclass(frozen=True, eq=False)
class Completion:
    """A sampled response: ``ids`` (R,) with its end token if it ended, ``logps`` (R,) fp32, ``ended``.

    ``logps`` are those at the sampling temperature, before top-k, top-p and min-p, as training scores them.
    """

    ids: np.ndarray
    logps: np.ndarray
    ended: bool


class Sampler:
    """Samples from a policy; prompts are forwarded once, their keys and values shared by all their responses.

    Args:
        policy, vision: the model that trains and its picture features.
        batch_size: responses decoded at once, at least the responses of one prompt.
        max_tokens: prompt tokens forwarded at once; a longer prompt goes alone.
    """

    def __init__(self, policy: Policy, vision: Vision, batch_size: int = 256, max_tokens: int = 16384):
        self.policy, self.vision, self.batch_size, self.max_tokens = policy, vision, batch_size, max_tokens

    @torch.no_grad()
    def generate(
        self, prompts: list[Prompt], params: SamplingParams, *, num_generations: int = 1, seed: int = 0
    ) -> list[list[Completion]]:
        """``num_generations`` responses for every prompt.

        Response j of prompt i draws from a random stream of its own, (seed, i · num_generations + j), whatever its
        batch-mates are.

        Raises:
            ValueError: one prompt's responses do not fit ``batch_size``.
            MemoryError: the keys and values do not fit.
        """
        if num_generations > self.batch_size:
            raise ValueError(
                f"num_generations={num_generations} is over sampling_batch_size={self.batch_size}; raise the latter"
            )
        at_once = max(1, self.batch_size // num_generations)
        out: list[list[Completion]] = []
        while len(out) < len(prompts):
            chunk, tokens = [], 0
            for prompt in prompts[len(out) : len(out) + at_once]:
                tokens += len(prompt.ids)
                if chunk and tokens > self.max_tokens:
                    break
                chunk.append(prompt)
            flat = self._generate(chunk, params, num_generations, seed, len(out) * num_generations)
            out += [flat[i * num_generations : (i + 1) * num_generations] for i in range(len(chunk))]
        return out

    def _generate(
        self, prompts: list[Prompt], params: SamplingParams, each: int, seed: int, first: int
    ) -> list[Completion]:
        policy, device = self.policy, self.policy.device
        plan = Plan(prompts)
        prefill = Prefill(plan)
        hidden = policy.hidden(plan, self.vision.features(plan.media), attention=prefill)
        owner = torch.arange(len(prompts), device=device).repeat_interleave(each)
        last = (plan.tensor("prompt_starts", device) + plan.tensor("prompt_lengths", device) - 1)[owner]
        hidden = hidden[last]
        steps = params.max_completion_length
        store = DecodeStep(prefill, owner, steps)
        uniforms = torch.from_numpy(_uniforms(seed, first, len(owner), steps)).to(device)
        position = plan.tensor("next_position", device)[owner]
        eos = torch.tensor(policy.eos_ids, device=device)
        ids = torch.zeros(len(owner), steps, dtype=torch.int64, device=device)
        logps = torch.zeros(len(owner), steps, device=device)
        length = torch.full((len(owner),), steps, device=device)
        ended = torch.zeros(len(owner), dtype=torch.bool, device=device)
        live = torch.arange(len(owner), device=device)
        for step in range(steps):
            logits = (hidden @ policy.head_weight.T).float()
            tokens, chosen = sample(logits, params, uniforms[live, step])
            ids[live, step], logps[live, step] = tokens, chosen
            stop = torch.isin(tokens, eos) & ~ended[live]
            length[live[stop]] = step + 1
            ended[live[stop]] = True
            running = ~ended[live]
            left = int(running.sum())
            if left == 0 or step + 1 == steps:
                break
            if left <= (1 - COMPACT_AT) * len(live):
                store.keep(running.nonzero()[:, 0])
                live, tokens = live[running], tokens[running]
            embeddings = policy.model.get_input_embeddings()(tokens)
            hidden = policy.forward(embeddings, (position[live] + step).expand(3, -1), store)
            store.step += 1
        ids, logps = ids.cpu().numpy(), logps.cpu().numpy()
        lengths, ended = length.tolist(), ended.tolist()
        return [Completion(ids[i, :n].copy(), logps[i, :n].copy(), ended[i]) for i, n in enumerate(lengths)]


def sample(logits: torch.Tensor, params: SamplingParams, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (n,) by inverse transform from ``logits`` (n, V) and ``uniform`` (n,) in [0, 1), and their log-probs.

    Greedy when temperature is 0; its log-probs are those at temperature 1.
    """
    logp = (logits / (params.temperature or 1.0)).log_softmax(-1)
    if params.temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, logp.gather(1, tokens[:, None])[:, 0]
    probabilities = _filtered(logp, params) if params.top_k or params.top_p < 1 or params.min_p else logp.exp()
    cumulative = probabilities.double().cumsum(-1)
    wanted = uniform.double() * cumulative[:, -1]
    tokens = torch.searchsorted(cumulative, wanted[:, None], right=True)[:, 0].clamp_(max=logits.shape[-1] - 1)
    return tokens, logp.gather(1, tokens[:, None])[:, 0]


def _filtered(logp: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Probabilities with what top-k, top-p and min-p exclude set to 0; the best token always stays."""
    ordered, order = torch.sort(logp, dim=-1, descending=True, stable=True)
    p = ordered.exp()
    drop = torch.zeros_like(p, dtype=torch.bool)
    if params.top_k:
        drop[:, params.top_k :] = True
    if params.top_p < 1:
        drop |= (p.cumsum(-1) - p) >= params.top_p
    if params.min_p:
        drop |= p < params.min_p * p[:, :1]
    drop[:, 0] = False
    return torch.zeros_like(p).scatter_(1, order, p.masked_fill(drop, 0))


def _uniforms(seed: int, first: int, count: int, steps: int) -> np.ndarray:
    """(count, steps) uniforms; row i depends on ``seed`` and ``first + i`` alone."""
    return np.stack([np.random.Generator(np.random.Philox(key=[seed, first + i])).random(steps) for i in range(count)])
