"""Recipes: YAML merged with ``--key.sub value`` flags, checked as a whole before any work begins."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from cosmo_fast.config.rules import Constraint, Curriculum, Schedule, SearchTool, StopLoss, StopRule, Strict, Tools
from cosmo_fast.config.stage import ConfigError, StageConfig
from cosmo_fast.pruning import VisionPrune

RECIPES = Path(__file__).parent.parent / "recipes"

PIXELS = "`size` in the model's preprocessor_config.json sets the tokens of a picture"
# What users of TRL, verl and EasyR1 write, and our name for it, or what to do instead.
ALIASES = {
    "n": "num_generations", "clip_ratio_low": "epsilon", "clip_ratio_high": "epsilon_high", "clip_ratio": "epsilon",
    "kl_loss_coef": "beta", "ppo_epochs": "num_iterations", "max_response_length": "max_completion_length",
    "lr": "learning_rate", "total_steps": "max_steps", "torch_dtype": "dtype", "lora_rank": "lora_r",
    "use_peft": "lora_r", "enable_gradient_checkpointing": "gradient_checkpointing",
    "scale_rewards": "advantage", "adv_estimator": "advantage", "kl_coef": "beta", "filter_groups": "dynamic_sample",
    "max_num_gen_batches": "max_resample_times", "online_filtering": "dynamic_sample",
    "num_train_epochs": "a stage's length is max_steps", "total_epochs": "a stage's length is max_steps",
    "train_batch_size": "see per_device_train_batch_size and steps_per_generation of a stage",
    "report_to": "metrics go to metrics.jsonl in the run folder only",
    "custom_reward_function": "name MODULE:FUNCTION in a stage's reward_recipe",
    "min_pixels": PIXELS, "max_pixels": PIXELS, "bf16": "write dtype: bfloat16, at the top of the recipe",
    "reward_funcs": "name rewards in a stage's reward_recipe; functions are passed in Python: Trainer(reward_funcs=…)",
}  # fmt: skip


def _count(value: Any) -> Any:
    if isinstance(value, bool):  # TRL's switch
        raise ValueError(f"{str(value).lower()} is no count; give the number of samples to keep, 0 for none")
    return value


class EvalConfig(Strict):
    """Greedy evaluation of named row files after every stage."""

    datasets: dict[str, str] = Field(default_factory=dict)
    tools: Tools | None = None  # after stages that have none of their own, so that all are measured alike
    limit: int | None = Field(default=None, gt=0)  # first rows of each file
    batch_size: int = Field(default=256, gt=0)

    @model_validator(mode="after")
    def _tools_are_used(self):
        if self.tools and not self.datasets:
            raise ValueError("tools has no effect without datasets")
        return self


class VerifierConfig(Strict):
    """A model that gives the verdicts of one reward in place of the rows' judges; ``rule``: the judges themselves."""

    model: str
    max_tokens: int = Field(default=8, ge=1, le=16)
    think: bool = False  # the score is score(answer) · score(thought)
    picture: bool = True  # False: of a verifier that reads text alone
    max_unparsable: float = Field(default=0.2, ge=0, le=1)  # share of its answers that may be no verdict
    noise: float = Field(default=0.0, ge=0, le=1)  # share of verdicts exchanged for another, for experiments


class WorldConfig(Strict):
    """The embedded world that ``world:`` paths name; built once a seed and size. ``seed``: by default the run's."""

    seed: int | None = Field(default=None, ge=0)
    picture: int = 56  # side of its pictures in pixels, a multiple of 56; 392 gives 196 vision tokens
    family: Literal["qwen2_5_vl", "qwen3_vl", "internvl"] = "qwen2_5_vl"  # of its model; rows and pictures are the same
    sizes: dict[str, float] = Field(default_factory=dict)
    cache_dir: str | None = None


class Config(Strict):
    """A recipe: a model, a list of stages, and what is evaluated between them."""

    output_dir: str
    overwrite_output_dir: bool = False
    seed: int = Field(default=0, ge=0)
    model_name_or_path: str
    trust_remote_code: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the model; the optimizer's masters are fp32
    gradient_checkpointing: bool = False
    deepspeed: str | None = None  # a DeepSpeed JSON file, for several processes (ZeRO 1 or 2)
    lora_r: int = Field(default=0, ge=0)  # 0: no adapter, all of the model learns
    lora_alpha: float = Field(default=32, gt=0)
    lora_dropout: float = 0.0
    lora_target_modules: str | list[str] | None = None  # default: all linear layers of the language model
    device: str = "auto"
    data_dir: str | None = None  # where relative paths of rows begin: a folder, or world: for the embedded world
    image_root: str | None = None
    max_image_pixels: int = Field(default=4096 * 4096, gt=0)
    max_prompt_length: int | None = Field(default=None, gt=0)
    max_completion_length: int = Field(default=256, gt=0)
    max_tokens_per_batch: int = Field(default=16384, gt=0)  # tokens of one forward and backward
    sampling_batch_size: int = Field(default=256, gt=0)  # responses decoded at once
    kv_cache_mib: int = Field(default=4096, gt=0)  # keys and values of what is sampled, at most
    vision_prune: VisionPrune | None = None  # in all stages and in the evaluation alike
    logging_steps: int = Field(default=10, gt=0)
    # samples kept with their pictures per logged rollout
    log_completions: Annotated[int, BeforeValidator(_count), Field(ge=0)] = 6
    save_steps: int | None = Field(default=None, gt=0)  # besides the end of every stage
    save_total_limit: int | None = Field(default=None, gt=0)
    resume_from_checkpoint: str | bool = False
    stages: list[StageConfig] = Field(min_length=1)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    world: WorldConfig = Field(default_factory=WorldConfig)
    verifiers: dict[Literal["safety", "helpful", "value", "knowledge", "general"], VerifierConfig] = {}

    @model_validator(mode="after")
    def _adapter_fits(self):
        if self.lora_dropout:
            raise ValueError(
                f"lora_dropout={self.lora_dropout} must be 0: the sampler's and the trainer's pass over the same "
                "tokens would differ, and the first policy ratio would not be 1"
            )
        idle = [n for n in ("lora_alpha", "lora_target_modules") if getattr(self, n) != Config.model_fields[n].default]
        if idle and not self.lora_r:
            raise ValueError(f"{idle[0]}={getattr(self, idle[0])!r} has no effect without lora_r above 0")
        return self

    @model_validator(mode="after")
    def _named_once(self):
        for stage in self.stages:
            if stage.kind == "rl" and stage.num_generations > self.sampling_batch_size:
                raise ValueError(
                    f"stage {stage.name!r}: num_generations={stage.num_generations} is over "
                    f"sampling_batch_size={self.sampling_batch_size}; raise the latter"
                )
            if stage.eval_steps and not self.eval.datasets:
                raise ValueError(f"stage {stage.name!r}: eval_steps={stage.eval_steps}, but eval names no datasets")
        names = [stage.name for stage in self.stages]
        for index, stage in enumerate(self.stages):
            known = ["start", "none", *(f"stage:{name}" for name in names[:index])]
            if stage.reference not in known:
                raise ValueError(f"stage {stage.name!r}: reference={stage.reference!r} is none of {', '.join(known)}")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"stages: the name(s) {twice} stand twice; results are filed by name")
        return self

    def data_path(self, name: str) -> str:
        """A file of rows, beneath ``data_dir`` unless it is absolute or of the embedded world."""
        if self.data_dir is None or name.startswith("world:") or Path(name).is_absolute():
            return name
        return f"{self.data_dir.rstrip('/')}{'' if self.data_dir.endswith(':') else '/'}{name}"

    def resolved(self) -> dict[str, Any]:
        """All settings, defaults included, as a recipe that makes the same run."""
        return self.model_dump(by_alias=True) | {"stages": [stage.resolved() for stage in self.stages]}


def load_config(recipe: str, overrides: list[str] | None = None) -> Config:
    """Reads a recipe and applies ``--key.sub value`` overrides; a stage is addressed by its name.

    Args:
        recipe: a YAML file, or the name of a recipe that the package ships.
        overrides: as on the command line, e.g. ``["--stages.cold-start.max_steps", "10", "--seed=1"]``.

    Raises:
        ConfigError: no such recipe, an unknown key, a value that does not fit. The message names the key and the value.
    """
    path = Path(recipe)
    if not path.is_file() and (RECIPES / f"{recipe}.yaml").is_file():
        path = RECIPES / f"{recipe}.yaml"
    if not path.is_file():
        shipped = ", ".join(sorted(p.stem for p in RECIPES.glob("*.yaml")))
        raise ConfigError(f"--config {recipe!r} is neither a file nor a shipped recipe ({shipped})")
    try:
        raw = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of settings, this file holds {type(raw).__name__}")
    for key, value in _pairs(overrides or []):
        _assign(raw, key, value)
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(e, raw) for e in error.errors())) from error


def _pairs(arguments: list[str]) -> list[tuple[str, Any]]:
    pairs, rest = [], list(arguments)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--") or flag == "--":
            raise ConfigError(f"unexpected argument {flag!r}; settings are given as --key.sub value")
        key, equals, text = flag[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"--{key} needs a value")
            text = rest.pop(0)
        try:
            value = text if text.endswith(":") else yaml.safe_load(text)  # world: is no mapping
        except yaml.YAMLError:
            value = text
        if isinstance(value, str):
            # YAML 1.1 reads 1e-4 as text.
            try:
                value = float(value)
            except ValueError:
                value = text
        pairs.append((key.replace("-", "_") if "." not in key else key, value))
    return pairs


def _assign(raw: dict, key: str, value: Any) -> None:
    *parents, last = key.split(".")
    node: Any = raw
    for part in parents:
        if isinstance(node, list):
            stages = [item for item in node if isinstance(item, dict)]
            named = [item for item in stages if item.get("name") == part]
            if not named:
                names = ", ".join(str(item.get("name")) for item in stages)
                raise ConfigError(f"--{key}: no stage is named {part!r}; stages: {names}")
            node = named[0]
        else:
            node = node.setdefault(part, {})
        if not isinstance(node, (dict, list)):
            raise ConfigError(f"--{key}: {part!r} is a single value ({node!r}), it has no setting {last!r}")
    if isinstance(node, list):
        raise ConfigError(f"--{key}: name a stage and a setting, as in --stages.NAME.max_steps")
    node[last] = value


def _explain(error: dict, raw: dict) -> str:
    place, node = [], raw
    for part in error["loc"]:
        child = node[part] if isinstance(node, dict) and part in node else None
        if isinstance(node, list) and isinstance(part, int):
            child = node[part]
            part = child.get("name", part) if isinstance(child, dict) else part
        node = node if child is None and part in ("number", "schedule") else child  # tags of a Weight
        if node is child:
            place.append(str(part))
    where = ".".join(place) or "recipe"
    if error["type"] == "extra_forbidden":
        path = [*place, *_foreign(error["input"])]
        return f"unknown setting {'.'.join(path)!r}; {_hint(path[-1].rpartition('.')[2], _known_keys(error['loc']))}"
    message = error["msg"].removeprefix("Value error, ")
    given = "" if error["type"] in ("value_error", "missing") else f" (got {error['input']!r})"
    return f"{where}: {message}{given}"


def _foreign(value: Any) -> list[str]:
    """Where another tool's setting stands inside a mapping: ["n"] of rollout: {n: 8}."""
    for name, inner in value.items() if isinstance(value, dict) else ():
        if name in ALIASES or name in StageConfig.model_fields or name in Config.model_fields or _foreign(inner):
            return [str(name), *_foreign(inner)]
    return []


def _hint(name: str, known: list[str]) -> str:
    name = ALIASES.get(name, name)
    if " " in name:
        return name
    if name not in known and name in StageConfig.model_fields:
        return f"{name!r} belongs to a stage: stages.NAME.{name}"
    if name not in known and name in Config.model_fields:
        return f"{name!r} belongs to the top of the recipe"
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"


def _known_keys(location: tuple) -> list[str]:
    by_parent = {"stages": StageConfig, "eval": EvalConfig, "world": WorldConfig, "curriculum": Curriculum}
    by_parent |= {"stop": StopRule, "stop_loss": StopLoss, "constraints": Constraint, "schedule": Schedule}
    by_parent |= {"vision_prune": VisionPrune, "tools": Tools, "search": SearchTool, "verifiers": VerifierConfig}
    model = next((by_parent[part] for part in reversed(location[:-1]) if part in by_parent), Config)
    return sorted(field.alias or name for name, field in model.model_fields.items())
