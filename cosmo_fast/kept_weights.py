"""Weights of a run that are needed again: a stage's reference and its best."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from cosmo_fast import checkpoint as ckpt
from cosmo_fast.config import ConfigError, StageConfig
from cosmo_fast.models import Policy
from cosmo_fast.stages.state import StageState


@dataclass
class KeptWeights:
    """The checkpoints of a run by global step, those before ``resume`` beside it.

    ``policy``: the run's. ``load``: a model folder -> a policy. ``start``: the folder that the run began with.
    """

    policy: Policy
    load: Callable[..., Policy]
    start: str
    output_dir: Path
    resume: Path | None

    def folder(self, step: int) -> Path | str:
        """The weights after global step ``step``; 0 is the start.

        Raises:
            ConfigError: they lie no longer beside the checkpoint that the run goes on from.
        """
        if not step:
            return self.start
        earlier = self.resume is not None and step <= ckpt.load_state(self.resume)["global_step"]
        folder = (self.resume.parent if earlier else self.output_dir) / f"checkpoint-{step}"
        if not (folder / ckpt.STATE).is_file():
            raise ConfigError(
                f"resume_from_checkpoint={str(self.resume)!r} needs {folder.name} beside it: its weights are the "
                "reference (beta) or the best (metric_for_best_model)"
            )
        return folder

    def reference(self, stage: StageConfig, begin: int, state: StageState) -> Policy | None:
        """The reference of a stage that goes on at step ``begin``; an adapter keeps its own.

        None where that is the policy as it is now, or with the adapter's.
        """
        now, adapter = not begin and stage.reference == "start", self.policy.adapter
        kept = None if now else self.folder(state.reference)
        if adapter is not None:
            adapter.keep_reference(adapter.state() if now else {} if kept == self.start else adapter.read(kept))
        if now or adapter is not None:
            return None
        reference = self.load(kept)
        reference.model.requires_grad_(False)
        return reference

    @torch.no_grad()
    def restore(self, value: float, step: int) -> str:
        """The policy becomes that of global step ``step`` again; returns a line to say so."""
        folder = self.folder(step)
        if self.policy.adapter is not None:
            self.policy.adapter.load(folder)
        else:
            best = self.load(folder, device="cpu").model.named_parameters()
            for (_, own), (_, kept) in zip(self.policy.model.named_parameters(), best, strict=True):
                own.copy_(kept)
        return f"the weights of {folder.name} are back: the best, {value:.4g}"
