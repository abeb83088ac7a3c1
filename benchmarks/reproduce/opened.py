"""A run that has ended, opened to ask its final model more than training did."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cosmo_fast.config import Config, load_config
from cosmo_fast.data.sources import world_resolver
from cosmo_fast.distributed import Ranks
from cosmo_fast.models import Policy, load_policy


def opened(folder: Path) -> tuple[Config, Policy, Callable[[str], str]]:
    """The run's settings; its policy, the tower frozen so that features may be kept; the path of a file of its data."""
    config = load_config(str(folder / "config.yaml"))
    resolve = world_resolver(config, Ranks(None))
    policy = load_policy(folder.absolute(), device=config.device)
    policy.freeze_vision_tower(True)
    return config, policy, lambda file: resolve(config.data_path(file))
