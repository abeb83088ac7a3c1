"""What a rollout has sampled: prompts, responses and rewards, a group's responses side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cosmo_fast.plan import Prompt
from cosmo_fast.report.metrics import finite
from cosmo_fast.rewards import MixedRewards
from cosmo_fast.rollout import Completion

_LISTS = ("owner", "completions", "texts", "verdicts")


@dataclass
class Rollout:
    """S samples: ``owner`` (the prompt of each), ``completions``, ``texts`` and ``mixed``; seconds spent on them.

    ``verdicts``: the column `verifier_verdicts` of each.
    """

    owner: list[Prompt]
    completions: list[Completion]
    texts: list[str]
    verdicts: list[dict[str, str]]
    mixed: MixedRewards
    sample_s: float
    reward_s: float

    def joined(self, other: Rollout) -> Rollout:
        """These samples, then the other's."""
        seconds = self.sample_s + other.sample_s, self.reward_s + other.reward_s
        lists = (getattr(self, name) + getattr(other, name) for name in _LISTS)
        return Rollout(*lists, MixedRewards.joined([self.mixed, other.mixed]), *seconds)

    def only(self, groups: list[int], each: int) -> Rollout:
        """Some groups of ``each`` responses, in that order."""
        index = [group * each + i for group in groups for i in range(each)]
        lists = ([getattr(self, name)[i] for i in index] for name in _LISTS)
        return Rollout(*lists, self.mixed[torch.tensor(index)], self.sample_s, self.reward_s)

    def varied(self, each: int, reward: str | None = None) -> list[int]:
        """The groups whose rewards are not all equal: those named ``reward``, where it applies, else the sums.

        A response on which a reward failed has none.
        """
        rewards = self.mixed.total
        if reward is not None:
            column = self.mixed.matrix[:, self.mixed.names.index(reward)]
            rewards = torch.where(column.isnan(), rewards, column)
        rewards = rewards.view(-1, each)
        failed = rewards.isnan()
        most, least = rewards.masked_fill(failed, -torch.inf).amax(1), rewards.masked_fill(failed, torch.inf).amin(1)
        return torch.nonzero(most > least).flatten().tolist()

    def shown(self, gains: list[float], count: int) -> list[dict[str, Any]]:
        """``count`` samples, evenly spread, with their advantages, as ``report.write_samples`` takes them."""
        return [
            {
                "id": self.owner[i].columns.get("id"),
                "label": self.owner[i].columns.get("label"),
                "prompt": self.owner[i].text,
                "images": [m.key for m in self.owner[i].media],
                "response": self.texts[i],
                "reward": finite(self.mixed.total[i]),
                "rewards": dict(zip(self.mixed.names, finite(self.mixed.matrix[i].tolist()), strict=True)),
                "advantage": gains[i],
                **({"vision_prune": kept.written()} if (kept := self.completions[i].kept) else {}),
            }
            for i in np.linspace(0, len(self.texts) - 1, min(len(self.texts), count)).astype(int)
        ]
