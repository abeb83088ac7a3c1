"""Links in the texts lead somewhere, the recipes in them load, and every setting stands in docs/settings.md."""

import re
from pathlib import Path

import pytest
import yaml

from cosmo_fast.config import Config, StageConfig, load_config
from cosmo_fast.config.recipe import EvalConfig, VerifierConfig, WorldConfig
from cosmo_fast.rewards import M3_RECIPES, REWARDS

ROOT = Path(__file__).resolve().parent.parent
TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "results" / "README.md"]
LEAST = {"output_dir": "x", "model_name_or_path": "x"}
STAGE = {"name": "rl", "kind": "rl", "train_dataset": "x", "max_steps": 1}


def _anchors(path: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def _in_code(name: str) -> list[str]:
    prose = re.sub("```.*?```", "", (ROOT / "docs" / name).read_text(), flags=re.S)
    return re.findall(r"\w+", " ".join(re.findall("`[^`]+`", prose)))


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_title_of_it(text):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text.read_text()):
        name, _, anchor = target.partition("#")
        path = (text.parent / name).resolve() if name else text
        assert path.exists() and (not anchor or anchor in _anchors(path)), target


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_recipe_in_the_texts_loads(text, tmp_path):
    for number, block in enumerate(re.findall(r"```yaml\n(.*?)```", text.read_text(), re.S)):
        (tmp_path / f"{number}.yaml").write_text(yaml.safe_dump({**LEAST, "stages": [STAGE], **yaml.safe_load(block)}))
        load_config(str(tmp_path / f"{number}.yaml"))


def test_every_setting_and_every_reward_is_documented():
    models = (Config, StageConfig, EvalConfig, WorldConfig)
    assert {name for model in models for name in model.model_fields} <= set(_in_code("settings.md"))
    inner = {name for name in REWARDS if name.endswith("_gold")} | {"format", "verifier_unparsable"}
    assert {*REWARDS, *M3_RECIPES, *VerifierConfig.model_fields} - inner <= set(_in_code("rewards.md"))
