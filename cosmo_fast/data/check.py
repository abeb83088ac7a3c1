"""What is wrong with rows, told before training; the trainer checks its rows by the same functions."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cosmo_fast.config import Config, ConfigError, StageConfig, VerifierConfig
from cosmo_fast.data.encode import Encoder
from cosmo_fast.data.rows import Row, load_rows
from cosmo_fast.data.sources import fit, read, world_resolver
from cosmo_fast.distributed import Ranks
from cosmo_fast.evaluate.metrics import score
from cosmo_fast.models import Policy, load_policy
from cosmo_fast.plan import GroupSize, Prompt, micro_batches
from cosmo_fast.rewards import STAGE_COLUMNS, RewardMix
from cosmo_fast.rewards.calls import RewardFunction
from cosmo_fast.rewards.worker import Worker
from cosmo_fast.verifiers.engine import rewarded, unjudged


def at(where: str, check: Callable, *arguments) -> Any:
    """Calls ``check``; what it refuses is said with the place in the data."""
    try:
        return check(*arguments)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error


def reward_mix(
    config: Config,
    stage: StageConfig,
    reward_funcs: Mapping[str, RewardFunction | str],
    worker: Worker | None = None,
) -> RewardMix:
    """The rewards of an `rl` stage, those of ``reward_funcs`` that it names among them. ConfigError for a bad name.

    worker: computes them, unless the stage has reward_worker: false.
    """
    used = {name for recipe in (stage.reward_recipe or {}).values() for name in recipe}
    own = {name: f for name, f in reward_funcs.items() if name in used}
    recipe, format_weight = stage.first_weights
    if config.verifiers:
        recipe, own = rewarded(recipe, own, config.verifiers)
    mix = RewardMix(
        recipe,
        format_weight=format_weight,
        rewards=own,
        options=stage.reward_options,
        max_completion_length=config.max_completion_length,
        timeout=stage.reward_timeout,
        worker=worker if stage.reward_worker else None,
    )
    named = {"dynamic_sample_reward": stage.dynamic_sample_reward} if stage.dynamic_sample_reward else {}
    named |= {"gate_reward": stage.gate_reward} if stage.multi_objective_aggregation == "gated" else {}
    for setting, name in named.items():
        if name not in mix.functions:
            raise ConfigError(f"{setting}={name!r} is no reward of stage {stage.name!r}: {[*mix.functions]}")
    return mix


def check_rewards(
    where: str, mix: RewardMix, prompts: Sequence[Prompt | Row], verifiers: Mapping[str, VerifierConfig] | None = None
) -> None:
    """ValueError for a row without a recipe, or one that its reward or its judge cannot deal with."""
    columns = [STAGE_COLUMNS | unjudged(verifiers or {}, p.columns) for p in prompts]
    for prompt in prompts:
        at(prompt.source, mix.recipe, prompt.columns)
    texts, said = [getattr(p, "text", "") for p in prompts], [""] * len(prompts)
    # A user's own rewards may be slow, or count their calls.
    at(where, mix.built_in(), texts, said, columns, [p.source for p in prompts])
    for prompt, row in zip(prompts, columns, strict=True):
        at(prompt.source, score, [row], [""])


def check_file(
    path: str, *, config: Config | None = None, stage: str | None = None, image_root: str | None = None
) -> dict[str, Any]:
    """Problems of a JSONL file, each with file and line, and counts of its rows.

    Without a recipe: what :func:`load_rows` refuses; labels, judges and answers by the default rewards, of rows that
    have a label or policy or only ask (a row that answers without either is taken for a supervised one). With one, its
    pictures' folder and bounds too, and prompts, answers and lengths for every stage that names the file (or
    ``stage``) and its evaluation; no weights are loaded, no picture is decoded, no reward of the user's own is called.

    Returns:
        {"rows", "problems": [str], "label" | "policy" | "task" | "attack_family": {value: count}}.

    Raises:
        ValueError: no such file, or the recipe does not say for what the file is meant.
    """
    problems: list[str] = []
    if config is None:
        rows, mix = load_rows(path, image_root=image_root, problems=problems), RewardMix()
        routed = {id(row) for row in rows if row.response is None or {"label", "policy"} & row.columns.keys()}
        checks = [lambda row: id(row) in routed and check_rewards(row.source, mix, [row])]
    else:
        resolve = world_resolver(config, Ranks(None))
        uses, path = _uses(path, config, stage, resolve), resolve(path)
        rows, model = read(config, path, problems=problems), resolve(config.model_name_or_path)
        policy = load_policy(model, trust_remote_code=config.trust_remote_code, weights=False)
        checks = [_as_read_by(use, config, policy) for use in uses]
    for row, check in itertools.product(rows, checks):
        try:
            check(row)
        except ValueError as error:
            problems.append(f"{row.source}: {str(error).removeprefix(f'{row.source}: ')}")
    start = len(f"{Path(path).name}:")
    problems = sorted(dict.fromkeys(problems), key=lambda problem: int(problem[start:].split(":")[0]))
    result: dict[str, Any] = {"rows": len(rows), "problems": problems}
    for column in ("label", "policy", "task", "attack_family"):
        counts = Counter(str(row.columns[column]) for row in rows if row.columns.get(column) is not None)
        result |= {column: dict(counts.most_common())} if counts else {}
    return result


def _as_read_by(stage: StageConfig | None, config: Config, policy: Policy) -> Callable[[Row], Any]:
    """The check of a row as ``stage`` will take it, or the evaluation (None)."""
    encoder = Encoder.within(policy, config)
    mix = reward_mix(config, stage, {}) if stage and stage.kind == "rl" else None

    def check(row: Row) -> None:
        prompt = encoder.prompt(row)
        if stage is None:
            score([unjudged(config.verifiers, row.columns)], [""])
            return
        fit({row.source: ([row], 1.0)}, stage, whole=False)
        if mix:
            check_rewards(row.source, mix, [row], config.verifiers)
        responses = [[0] * config.max_completion_length] * stage.num_generations if mix else [encoder.target(row)]
        micro_batches([GroupSize.of(prompt, responses)], config.max_tokens_per_batch)

    return check


def _uses(path: str, config: Config, stage: str | None, resolve: Callable[[str], str]) -> list[StageConfig | None]:
    """The stages that read the file, None for the evaluation."""

    def named(files) -> bool:
        return Path(resolve(path)).resolve() in {Path(resolve(config.data_path(name))).resolve() for name in files}

    found: list = [s for s in config.stages if (named(s.datasets) if stage is None else s.name == stage)]
    found += [None] if stage is None and named(config.eval.datasets.values()) else []
    if not found:
        names = [s.name for s in config.stages]
        raise ConfigError(f"--stage {stage}: the recipe does not read {path!r}; say for which of {names} it is meant")
    return found
