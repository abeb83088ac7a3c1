"""What a stage remembers from step to step besides weights, moments and random streams; all of it in the checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from cosmo_fast.config import ConfigError, StageConfig
from cosmo_fast.config.rules import Schedule, at

TIED = (
    "every advantage of the rollout is 0, as in no group do the rewards differ: nothing is learned. Look at samples/: "
    "are the rows too easy or too hard, do the rewards say what was meant? Draw other rows, or raise num_generations "
    "or temperature"
)


@dataclass
class StageState:
    """Plain numbers, so that JSON keeps them bitwise.

    Attributes:
        taken, skipped: rows of each source that were drawn, and that a curriculum passed over.
        multipliers: λ of each constraint. tied: rollouts since one had a gradient.
        recent: the last values of each metric that a rule reads.
        best: [value of ``metric_for_best_model``, global step of its checkpoint]. ended: why the stage ended early.
        reference: global step of the checkpoint that is the reference; 0 is the model that the run began with.
    """

    taken: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    multipliers: dict[str, float] = field(default_factory=dict)
    tied: int = 0
    recent: dict[str, list[float]] = field(default_factory=dict)
    best: list[float] | None = None
    ended: str | None = None
    reference: int = 0

    @classmethod
    def of(cls, stage: StageConfig) -> StageState:
        """That of the stage's first step."""
        return cls(multipliers={name: constraint.start for name, constraint in stage.constraints.items()})

    def weights(self, stage: StageConfig, step: int, recipes: Mapping[str, Mapping[str, Any]]) -> dict[str, dict]:
        """{label: {reward: weight}} at a step, of those out of ``recipes`` that change: by schedule or by λ.

        With the aggregation ``lagrangian`` λ is no factor here: the caller hands ``multipliers`` to the advantages.
        """
        factors = {} if stage.multi_objective_aggregation == "lagrangian" else self.multipliers
        given = stage.reward_recipe or {}
        changing: dict[str, dict] = {}
        for label, recipe in recipes.items():
            written = {"format": stage.format_weight, **recipe, **given.get(label, {})}
            changing[label] = {
                name: at(weight, step, stage.max_steps) * factors.get(name, 1.0)
                for name, weight in written.items()
                if isinstance(weight, Schedule) or name in factors
            }
        return {label: weights for label, weights in changing.items() if weights}

    def count_tied(self, learns: bool) -> bool:
        """Counts a rollout; whether it is the first in a row of which nothing is learned."""
        self.tied = 0 if learns else self.tied + 1
        return self.tied == 1

    def adapt(self, stage: StageConfig, means: Mapping[str, float]) -> None:
        """λ of every constraint whose reward applied to a sample of the rollout; ``means``: rewards/NAME/mean."""
        for name, constraint in stage.constraints.items():
            if (mean := means.get(f"rewards/{name}/mean")) is not None:
                self.multipliers[name] = constraint.adapted(self.multipliers[name], mean)

    def note(self, stage: StageConfig, row: Mapping[str, Any], global_step: int) -> bool:
        """Takes in a row of metrics; whether it holds the best value of ``metric_for_best_model`` so far.

        Raises:
            ValueError: a rule reads a metric that such rows do not have.
        """
        for rule in {rule.metric: rule for rule in rules(stage)}.values():
            if rule.metric in row and not isinstance(row[rule.metric], str):
                if row[rule.metric] is None:  # a rate over no row of this rollout
                    continue
                values = self.recent.setdefault(rule.metric, [])
                values.append(row[rule.metric])
                del values[: -max(r.window for r in rules(stage) if r.metric == rule.metric)]
            elif not rule.metric.startswith(("eval/", "rewards/")) and (stage.kind == "sft" or "rollout/kl" in row):
                raise ValueError(
                    f"stage {stage.name!r}: no metric is named {rule.metric!r}; there are {', '.join(row)}"
                )
        value = row.get(stage.metric_for_best_model)
        sign = 1 if stage.greater_is_better else -1
        if value is None or (self.best is not None and sign * value <= sign * self.best[0]):
            return False
        self.best = [value, global_step]
        return True

    def verdict(self, stage: StageConfig) -> bool:
        """Sets ``ended`` where a rule says so; whether the best weights are to come back."""
        losses = [rule for rule in stage.stop_loss if rule.holds(self.recent.get(rule.metric, []))]
        goals = [stage.stop] if stage.stop and stage.stop.holds(self.recent.get(stage.stop.metric, [])) else []
        if losses or goals:
            self.ended = f"{'stop_loss' if losses else 'stop'}: {(losses or goals)[0]}"
        elif stage.max_tied_rollouts and self.tied >= stage.max_tied_rollouts:
            self.ended = f"max_tied_rollouts={stage.max_tied_rollouts}: {TIED}"
        return any(rule.action == "restore" for rule in losses)


def rules(stage: StageConfig) -> list:
    """The stage's stop rules, the stop-losses first."""
    return [*stage.stop_loss, *([stage.stop] if stage.stop else [])]


def check_metrics(stage: StageConfig, measured: Collection[str], rewards: Collection[str]) -> None:
    """Refuses a constraint or a rule on what the stage will not measure, as far as that is known before it begins.

    Args:
        measured: the names eval/SPLIT/RATE. rewards: those that the stage gives.

    Raises:
        ConfigError: naming the metric and those that there are.
    """
    given = {f"rewards/{name}/{kind}" for name in rewards for kind in ("mean", "std")}
    wanted = [*(f"rewards/{name}/mean" for name in stage.constraints), *(rule.metric for rule in rules(stage))]
    for metric in [*wanted, *([stage.metric_for_best_model] if stage.metric_for_best_model else [])]:
        known = measured if metric.startswith("eval/") else given
        if metric.startswith(("eval/", "rewards/")) and metric not in known:
            raise ConfigError(f"stage {stage.name!r}: {metric!r} is not measured; there are {', '.join(sorted(known))}")
