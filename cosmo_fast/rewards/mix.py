"""Which rewards a sample gets: its label names a recipe, a recipe is {reward: weight}."""

import copy
import importlib
import inspect
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from cosmo_fast.rewards.accuracy import accuracy
from cosmo_fast.rewards.calls import ARGUMENTS, Fault, RewardFunction, Sample, Values, call, compute, time_limit
from cosmo_fast.rewards.columns import RewardError, row_name
from cosmo_fast.rewards.confidence import confidence, deliberative, reliability
from cosmo_fast.rewards.format import format_answer, format_deliberative, format_perception, format_reward
from cosmo_fast.rewards.instruction import instruction
from cosmo_fast.rewards.length import repetition, soft_overlong
from cosmo_fast.rewards.perception import consistency, textual_key, visual_focus, visual_focus_drop, visual_key
from cosmo_fast.rewards.safety import GOLD, general, helpful, knowledge, safety, value, verifier_unparsable
from cosmo_fast.rewards.worker import Worker

REWARDS: dict[str, RewardFunction] = {
    "format": format_reward, "format_answer": format_answer, "format_perception": format_perception,
    "format_deliberative": format_deliberative, "accuracy": accuracy, "safety": safety, "helpful": helpful,
    "value": value, "knowledge": knowledge, "general": general, "instruction": instruction, "visual_key": visual_key,
    "textual_key": textual_key, "consistency": consistency, "visual_focus": visual_focus,
    "visual_focus_drop": visual_focus_drop, "repetition": repetition, "soft_overlong": soft_overlong,
    "confidence": confidence, "reliability": reliability, "deliberative": deliberative,
    "verifier_unparsable": verifier_unparsable, **GOLD,
}  # fmt: skip

# The group's public M3-RL table; its "rule" is our accuracy.
M3_RECIPES: dict[str, dict[str, float]] = {
    "safety": {"safety": 1.0},
    "value": {"value": 1.0},
    "knowledge": {"knowledge": 1.0, "helpful": 0.5},
    "knowledge_rule": {"accuracy": 1.0, "helpful": 0.5},
    "normal": {"helpful": 1.0},
    "general": {"general": 1.0},
    "general_rule": {"accuracy": 1.0},
}
MAX_DEAD = 3  # ours: calls in a row that a reward may fail as a whole, where that few failures are allowed at all
# What an rl stage adds to the columns of a row: what the users say, unless the row has a column of that name, and the
# paths of its pictures; the sampled tokens; and the answer to `visual_focus_drop`.
STAGE_COLUMNS: dict[str, Any] = {"question": "", "images": (), "completion_ids": (), "blank_logprob_drop": 0.0}


@dataclass(frozen=True)
class MixedRewards:
    """total: (S,) float32. matrix: (S, R) float32, unweighted, NaN = does not apply. names: the R columns.

    weights: (S, R) float32, those of the samples' labels; 0 where a recipe does not name the reward. A sample on which
    a reward fails has NaN alone: its advantage is 0 and it is in nobody's baseline. failed: the rewards' names, once
    for each such sample. notes: what to say of faults. Both are of the whole call, not of samples picked by index.
    """

    total: torch.Tensor
    matrix: torch.Tensor
    weights: torch.Tensor
    names: tuple[str, ...]
    failed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __getitem__(self, samples: torch.Tensor) -> "MixedRewards":
        """Those of some samples, by index."""
        return MixedRewards(self.total[samples], self.matrix[samples], self.weights[samples], self.names)

    @classmethod
    def joined(cls, parts: "Sequence[MixedRewards]") -> "MixedRewards":
        """The samples of several, one after the other."""
        joint = (torch.cat([getattr(part, name) for part in parts]) for name in ("total", "matrix", "weights"))
        said = (tuple(one for part in parts for one in getattr(part, name)) for name in ("failed", "notes"))
        return cls(*joint, parts[0].names, *said)

    def apart(self, named: Sequence[str], merge: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """(matrix, weights) of the same samples, (S, K) each, as `objectives.advantages` takes several objectives.

        The rewards in `named` come first, then each of the others (gated); with `merge` the weighted sum of all others
        comes first (lagrangian).
        """
        chosen = [self.names.index(name) for name in named]
        others = [column for column in range(len(self.names)) if column not in chosen]
        if not merge:
            return self.matrix[:, chosen + others], self.weights[:, chosen + others]
        rest = self.matrix[:, others]
        total = (rest.nan_to_num() * self.weights[:, others]).sum(1).masked_fill(rest.isnan().all(1), math.nan)
        matrix = torch.cat([total[:, None], self.matrix[:, chosen]], 1)
        return matrix, torch.cat([torch.ones_like(total)[:, None], self.weights[:, chosen]], 1)

    def metrics(self) -> dict[str, float | None]:
        """reward, reward_std (None where all have failed), and of each reward, over the samples that it applies to:

        rewards/<name>/mean|std where there are any, rewards/<name>/failed, their number, where it fails on some.
        """
        total = self.total[~self.total.isnan()]
        known = {"reward": total.mean().item(), "reward_std": total.std(correction=0).item()} if len(total) else {}
        result = {"reward": None, "reward_std": None} | known
        result |= {f"rewards/{name}/failed": float(count) for name, count in Counter(self.failed).items()}
        for name, column in zip(self.names, self.matrix.unbind(1), strict=True):
            values = column[~column.isnan()]
            if len(values):
                result[f"rewards/{name}/mean"] = values.mean().item()
                result[f"rewards/{name}/std"] = values.std(correction=0).item()
        return result


class RewardMix:
    """R = format_weight * R_format + sum of w * r over the recipe of the sample's label.

    recipes: {label: {reward: weight}}; "*" serves rows whose label has no recipe of its own, and rows without a label.
    A reward is a name in `rewards` or REWARDS, or a dotted path ("module:function", "module.function").
    rewards: further rewards, {name: callable or dotted path}, each f(prompts, completions, **columns) -> list of floats
    or None (does not apply), sync or async. A reward sees the samples whose recipe names it and no others.
    options: {reward: {argument: value}}, such as {"visual_key": {"tau_high": 0.9}}. timeout: seconds that one call of a
    reward may take. worker: computes the rewards in its process, which is killed when time is up. Without one the limit
    is SIGALRM, which only the main thread has: elsewhere there is none, nor inside C code, nor after an alarm that the
    reward sets itself (math-verify's limits do).
    """

    def __init__(
        self,
        recipes: Mapping[str, Mapping[str, float]] | None = None,
        *,
        format_weight: float = 1.0,
        rewards: Mapping[str, RewardFunction | str] | None = None,
        options: Mapping[str, Mapping[str, Any]] | None = None,
        max_completion_length: int | None = None,
        timeout: float = 600.0,
        worker: Worker | None = None,
    ):
        if not 0 < timeout < math.inf:
            raise ValueError(f"reward_timeout={timeout} must be a finite number of seconds above 0")
        self.timeout = timeout
        own = {name: resolve(value) for name, value in (rewards or {}).items()}
        self.recipes = {label: dict(recipe) for label, recipe in (M3_RECIPES if recipes is None else recipes).items()}
        self.format_weight = format_weight
        self.functions: dict[str, RewardFunction] = {}
        if format_weight:
            _check_weight("format_weight", format_weight)
            self.functions["format"] = own.get("format", format_reward)
        for label, recipe in self.recipes.items():
            for name, weight in recipe.items():
                if name == "format" and format_weight:
                    raise ValueError(f"label {label!r} names 'format', which format_weight={format_weight} adds to all")
                _check_weight(f"weight of {name!r} in label {label!r}", weight)
                self.functions[name] = own[name] if name in own else resolve(name)
        if unused := own.keys() - self.functions.keys():
            raise ValueError(f"rewards {sorted(unused)} are given but no label's recipe uses them")
        if unused := (options or {}).keys() - self.functions.keys():
            raise ValueError(f"reward_options name {sorted(unused)}, but the rewards here are {list(self.functions)}")
        if "soft_overlong" in self.functions and max_completion_length is not None:
            self.functions["soft_overlong"] = partial(soft_overlong, max_completion_length=max_completion_length)
        for name, given in (options or {}).items():
            takes = inspect.signature(self.functions[name]).parameters.keys() - {*ARGUMENTS, "columns"}
            if unknown := sorted(given.keys() - takes):
                raise ValueError(f"reward_options.{name}: {unknown} is nothing that the reward takes: {sorted(takes)}")
            self.functions[name] = partial(self.functions[name], **given)
        self.worker, self._dead = worker, Counter()
        self._numbers = {name: worker.add(function) for name, function in self.functions.items()} if worker else {}

    def __call__(
        self,
        prompts: Sequence,
        completions: Sequence[str],
        rows: Sequence[Mapping[str, Any]],
        sources: Sequence[str] | None = None,
        weights: Mapping[str, Mapping[str, float]] | None = None,
        max_failures: float = 0.0,
        least_failures: int = 1,
    ) -> MixedRewards:
        """Rewards of S samples. prompts, completions (decoded, without special tokens) and rows (columns): S each.

        sources: "file.jsonl:17" of each row, for messages. weights: {label: {reward: weight}} that replace the recipes'
        own in this call, as schedules and constraints do. max_failures: on what share of its samples a reward may fail
        (raise, give no finite number, or nothing in time), above 0 on ``least_failures`` of however few: they have no
        reward then.

        Raises RewardError (a ValueError) naming the reward and the row: unknown label, a reward that fails on more, on
        all of MAX_DEAD calls in a row, or returns another length, and a row to which no reward applies.
        """
        if not len(prompts) == len(completions) == len(rows):
            raise ValueError(f"{len(prompts)} prompts, {len(completions)} completions, {len(rows)} rows: want equal")
        names = [row_name(row, i, sources[i] if sources else None) for i, row in enumerate(rows)]
        recipes = [self.recipe(row, name, weights) for row, name in zip(rows, names, strict=True)]
        total = torch.zeros(len(rows), dtype=torch.float64)
        matrix = torch.full((len(rows), len(self.functions)), float("nan"), dtype=torch.float64)
        weights = torch.tensor([[r.get(name, 0.0) for name in self.functions] for r in recipes]).view(matrix.shape)
        failed, notes, left_out = [], [], set()
        for column, (name, function) in enumerate(self.functions.items()):
            chosen = [index for index, recipe in enumerate(recipes) if name in recipe]
            if not chosen:
                continue
            samples = [(names[index], prompts[index], completions[index], rows[index]) for index in chosen]
            bounds = self.timeout, max_failures, least_failures
            values, said = call(name, partial(self._run, name, function), samples, *bounds)
            self._dead[name] = self._dead[name] + 1 if all(isinstance(v, Fault) for v in values) else 0
            if self._dead[name] == MAX_DEAD and max_failures < 1:
                raise RewardError(f"{said}; so it was in the {MAX_DEAD - 1} calls before: is the reward broken?")
            notes += [said] if said else []
            for index, given in zip(chosen, values, strict=True):
                if isinstance(given, Fault):
                    failed.append(name)
                    left_out.add(index)
                elif given is not None:
                    matrix[index, column] = given
                    total[index] += recipes[index][name] * given
        own = [column for column, name in enumerate(self.functions) if not (name == "format" and self.format_weight)]
        for index in torch.nonzero(matrix[:, own].isnan().all(1)).flatten().tolist():
            # All abstain: the sample would be trained on its format alone.
            if index not in left_out and recipes[index].keys() != {"format"}:
                raise RewardError(f"no reward of {recipes[index]} applies to {names[index]}")
        total[[*left_out]] = matrix[[*left_out]] = math.nan
        said = tuple(self.functions), tuple(failed), tuple(notes)
        return MixedRewards(total.float(), matrix.float(), weights.float(), *said)

    def built_in(self) -> "RewardMix":
        """The same with 0 in place of functions that are not of this package, computed in this process."""
        other = copy.copy(self)
        whole = {name: f.func if isinstance(f, partial) else f for name, f in self.functions.items()}
        ours = {name for name, f in whole.items() if str(f.__module__).startswith("cosmo_fast.")}
        other.functions = {name: f if name in ours else _zero for name, f in self.functions.items()}
        other.worker = None
        return other

    def _run(self, name: str, function: RewardFunction, samples: Sequence[Sample], seconds: float) -> Values:
        if self.worker is not None:
            return self.worker(self._numbers[name], samples, seconds)
        with time_limit(seconds):
            return compute(function, samples)

    def recipe(
        self,
        row: Mapping[str, Any],
        name: str | None = None,
        weights: Mapping[str, Mapping[str, float]] | None = None,
    ) -> dict[str, float]:
        """{reward: weight} of one row, format included; RewardError for a label without a recipe (of row `name`)."""
        label = row.get("label")
        key = label if label in self.recipes else "*"
        recipe = self.recipes.get(key)
        if recipe is None:
            what = "has no label" if label is None else "has a label without a recipe"
            known = ", ".join(map(repr, self.recipes))
            raise RewardError(f"{name or row_name(row)} {what}; there are {known}; '*' would serve all others")
        own = {"format": self.format_weight, **recipe} if self.format_weight else recipe
        return own | dict((weights or {}).get(key, {}))


def resolve(reward: RewardFunction | str) -> RewardFunction:
    """A registered name, a dotted path or a callable -> the function; ValueError says what is missing."""
    if callable(reward):
        return reward
    if not isinstance(reward, str):
        raise ValueError(f"a reward is a name, a dotted path or a callable, not {reward!r}")
    if reward in REWARDS:
        return REWARDS[reward]
    module, _, name = reward.partition(":") if ":" in reward else reward.rpartition(".")
    if not module or not name:
        raise ValueError(f"unknown reward {reward!r}; known: {', '.join(REWARDS)}, or a path like 'module:function'")
    try:
        function = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise ValueError(f"reward {reward!r}: cannot import {module!r} ({error}); is it on PYTHONPATH?") from error
    if not callable(function):
        raise ValueError(f"reward {reward!r}: module {module!r} has no function {name!r}")
    return function


def _zero(prompts: Sequence, completions: Sequence[str], **columns) -> list[float]:
    return [0.0] * len(completions)


def _check_weight(what: str, weight: Any) -> None:
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
        raise ValueError(f"{what} must be a finite number of at least 0, not {weight!r}")
