"""A small embedded world, built once for all tests that need one."""

import pytest

SMALL = {
    "train_general": 180, "train_safety": 20, "rl_general": 60, "rl_safety": 12, "validation_general": 18,
    "validation_safety": 4, "scenes_general": 36, "scenes_safety": 6, "held_general": 18, "held_safety": 4,
}  # fmt: skip


@pytest.fixture(scope="session")
def small_world(tmp_path_factory):
    """The folder of a small world with its model."""
    from cosmo_fast.world import ensure_world

    return ensure_world(seed=0, cache_dir=tmp_path_factory.mktemp("cache"), **SMALL)
