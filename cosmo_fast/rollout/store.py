"""Keys and values of a sampling batch: a prompt's once for all of its responses, the responses' own apart."""

from __future__ import annotations

import torch

from cosmo_fast import ops
from cosmo_fast.plan import Plan


class Prefill:
    """Attention of the prompts' forward that also keeps their keys and values, padded to (g, Hk, P, D) a layer."""

    def __init__(self, plan: Plan):
        self.segments = plan.segments
        lengths = plan.tensor("prompt_lengths", "cpu")
        column = torch.arange(int(lengths.max()))
        starts = plan.tensor("prompt_starts", "cpu")
        self.padding = column[None, :] >= lengths[:, None]
        self.rows = torch.where(self.padding, starts[:, None], starts[:, None] + column[None, :])
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        assert layer == len(self.keys), "layers come in order"
        rows = self.rows.to(k.device)
        self.keys.append(k[rows].transpose(1, 2).contiguous())
        self.values.append(v[rows].transpose(1, 2).contiguous())
        return ops.prefix_attention(q, k, v, self.segments, scale=scale)


class DecodeStep:
    """Attention of one new token a response over the shared prompt and the response so far.

    Args:
        prefill: the prompts' store. owner: (n,) prompt of each live response, ascending. steps: longest response.

    The live responses are laid out as (prompts, widest group) slots, so that a prompt's keys are read once for all of
    its responses; :meth:`keep` drops the finished ones.
    """

    def __init__(self, prefill: Prefill, owner: torch.Tensor, steps: int):
        layers, heads, size = len(prefill.keys), prefill.keys[0].shape[1], prefill.keys[0].shape[3]
        shape = (layers, len(owner), heads, steps, size)
        bytes_needed = 2 * prefill.keys[0].element_size() * layers * len(owner) * heads * steps * size
        try:
            self.keys = prefill.keys[0].new_empty(shape)
            self.values = prefill.keys[0].new_empty(shape)
        except RuntimeError as error:
            raise MemoryError(
                f"keys and values of {len(owner)} responses of {steps} tokens need {bytes_needed / 2**30:.1f} GiB; "
                "lower sampling_batch_size or max_completion_length"
            ) from error
        self.prompt_keys, self.prompt_values = prefill.keys, prefill.values
        self.hidden = prefill.padding.to(self.keys.device)
        self.step = 0
        self._lay_out(owner)

    def _lay_out(self, owner: torch.Tensor) -> None:
        self.owner = owner
        groups, counts = torch.unique_consecutive(owner, return_counts=True)
        width = int(counts.max())
        first = counts.cumsum(0) - counts
        inside = torch.arange(len(owner), device=owner.device) - first.repeat_interleave(counts)
        self.slot = torch.arange(len(counts), device=owner.device).repeat_interleave(counts) * width + inside
        self.shape = (len(counts), width)
        self.groups = None if len(groups) == len(self.hidden) else groups
        self.mask = self.hidden if self.groups is None else self.hidden[groups]

    def keep(self, live: torch.Tensor) -> None:
        """Only the responses ``live`` (ascending indices) go on."""
        self.keys, self.values = self.keys[:, live], self.values[:, live]
        self._lay_out(self.owner[live])

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """q (n, H, D), k and v (n, Hk, D) of the new tokens -> (n, H, D)."""
        self.keys[layer, :, :, self.step] = k
        self.values[layer, :, :, self.step] = v
        n, heads, size = q.shape
        shared = k.shape[1]
        keys, values = self.prompt_keys[layer], self.prompt_values[layer]
        if self.groups is not None:
            keys, values = keys[self.groups], values[self.groups]
        groups, width = self.shape
        q = (q * scale).view(n, shared, heads // shared, size)
        slots = q.new_zeros(groups * width, *q.shape[1:])
        slots[self.slot] = q
        by_prompt = slots.view(groups, width, shared, -1, size).permute(0, 2, 1, 3, 4).flatten(2, 3)
        prompt_scores = (by_prompt @ keys.transpose(-1, -2)).masked_fill(self.mask[:, None, None, :], float("-inf"))
        length = prompt_scores.shape[-1]
        by_response = prompt_scores.unflatten(2, (width, -1)).permute(0, 2, 1, 3, 4).flatten(0, 1)[self.slot]
        own_scores = q @ self.keys[layer, :, :, : self.step + 1].transpose(-1, -2)
        weights = torch.cat([by_response, own_scores], -1).float().softmax(-1).to(q.dtype)
        own = weights[..., length:] @ self.values[layer, :, :, : self.step + 1]
        spread = weights.new_zeros(groups * width, *weights.shape[1:3], length)
        spread[self.slot] = weights[..., :length]
        by_prompt = spread.view(groups, width, shared, -1, length).permute(0, 2, 1, 3, 4).flatten(2, 3)
        out = (by_prompt @ values).unflatten(2, (width, -1)).permute(0, 2, 1, 3, 4).flatten(0, 1)[self.slot]
        return (out + own).reshape(n, heads, size)
