"""The files of a recipe: the embedded world behind ``world:`` names, rows of every stage."""

from __future__ import annotations

import math
from typing import Any

from cosmo_fast.config import Config, ConfigError, StageConfig
from cosmo_fast.data.mixture import by_label
from cosmo_fast.data.rows import Row, load_rows
from cosmo_fast.distributed import Ranks


def world_resolver(config: Config, ranks: Ranks):
    """``world:NAME`` -> a path inside the embedded world, which the first rank builds on first use; others stay."""
    root = []

    def resolve(name: str) -> str:
        if not name.startswith("world:"):
            return name
        if not root:
            from cosmo_fast.world import ensure_world

            seed = config.seed if config.world.seed is None else config.world.seed
            about = config.world.model_dump(include={"picture", "family", "cache_dir"})
            with ranks.in_turn():
                root.append(ensure_world(seed=seed, **about, **config.world.sizes))
        file = name.removeprefix("world:")
        if "/" in file:
            from cosmo_fast.world.parts import PARTS, ensure_part

            part = file.partition("/")[0]
            if part in PARTS:
                with ranks.in_turn():
                    ensure_part(root[0], part)
        return str(root[0] / file)

    return resolve


def load_stages(config: Config, given: dict[str, list[Row]], resolve) -> dict[str, dict[str, tuple[list[Row], float]]]:
    """{stage: {file: (rows, weight)}}, a file read once; ``given`` replaces a stage's files.

    Raises:
        ConfigError: ``given`` names no stage of the recipe; label weights or a curriculum do not fit the rows.
        DataError: a bad row.
    """
    unknown = sorted(given.keys() - {s.name for s in config.stages})
    if unknown:
        raise ConfigError(
            f"train_dataset names the stage(s) {unknown}; the recipe has {[s.name for s in config.stages]}"
        )
    read_before: dict[tuple[str, bool], list[Row]] = {}
    stages: dict[str, dict[str, tuple[list[Row], float]]] = {}
    for stage in config.stages:
        if stage.name in given:
            found = {"train_dataset": (given[stage.name], 1.0)}
        else:
            found = {}
            for path, weight in stage.datasets.items():
                key = (path, stage.kind == "sft")
                if key not in read_before:
                    read_before[key] = read(config, resolve(config.data_path(path)), needs_answer=stage.kind == "sft")
                found[path] = (read_before[key], weight)
        stages[stage.name] = fit(found, stage)
    return stages


def fit(found: dict[str, tuple[list[Row], float]], stage: StageConfig, whole: bool = True):
    """The files as the stage draws from them; ``whole``: they are all that it has.

    Raises:
        ConfigError: label weights or a curriculum do not fit the rows.
    """
    if stage.curriculum:
        for row in (row for rows, _ in found.values() for row in rows):
            _difficulty(row, stage.curriculum.column)
    if not stage.label_weights:
        return found
    try:
        return by_label(found, stage.label_weights, lambda row: row.columns.get("label"), whole)
    except ValueError as error:
        raise ConfigError(f"stage {stage.name!r}: {error}") from error


def _difficulty(row: Row, column: str) -> None:
    value = row.columns.get(column)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(
            f"{row.source}: curriculum.column={column!r} must be a number in every row, here it is {value!r}"
        )


def read(config: Config, path: str, **options: Any) -> list[Row]:
    """Rows of a file under the recipe's picture settings."""
    return load_rows(path, image_root=config.image_root, max_image_pixels=config.max_image_pixels, **options)
