"""Recipes: YAML merged with ``--key.sub value`` flags, checked as a whole before any work begins."""

from __future__ import annotations

import difflib
import inspect
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

RECIPES = Path(__file__).parent / "recipes"

# What users of verl and EasyR1 write, and our name for it.
ALIASES = {
    "n": "num_generations", "clip_ratio_low": "epsilon", "clip_ratio_high": "epsilon_high", "clip_ratio": "epsilon",
    "kl_loss_coef": "beta", "ppo_epochs": "num_iterations", "max_response_length": "max_completion_length",
    "lr": "learning_rate", "total_steps": "max_steps", "torch_dtype": "dtype", "lora_rank": "lora_r",
    "use_peft": "lora_r", "enable_gradient_checkpointing": "gradient_checkpointing",
    "num_train_epochs": "max_steps", "scale_rewards": "advantage", "adv_estimator": "advantage", "kl_coef": "beta",
    "bf16": "dtype", "rollout.n": "num_generations",
}  # fmt: skip


LossType = Literal[
    "reinforce", "rloo", "reinforce_pp", "grpo", "dr_grpo", "bnpo", "dapo", "gspo", "gmpo", "cispo", "sapo", "luspo",
    "vespo", "cpgd",
]  # fmt: skip
AdvantageKind = Literal[
    "group", "batch", "dr_grpo", "rloo", "reinforce", "reinforce_pp", "reinforce_pp_baseline", "cpgd", "cale"
]
Aggregation = Literal[
    "token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm", "prompt-mean-token-mean"
]
# Settings that only some losses read. None is the loss's own default; one that the loss does not read is an error.
LOSS_OPTIONS = (
    "epsilon epsilon_high delta dual_clip importance_sampling_level epsilon_start alpha drift_cap kl "
    "use_bias_correction_kl sapo_temperature_pos sapo_temperature_neg "
    "vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg"
).split()


class ConfigError(ValueError):
    """A setting that is unknown, of the wrong type, or does not fit another; the message names it and its value."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class StageConfig(_Strict):
    """One stage. Names and meanings are TRL's; a field of the other kind of stage is an error when it is set."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    kind: Literal["sft", "rl"]
    train_dataset: str | dict[str, float]  # a file, or files with their sampling weights
    max_steps: int = Field(gt=0)  # optimiser steps
    per_device_train_batch_size: int = Field(default=64, gt=0)  # completions a micro-step
    gradient_accumulation_steps: int = Field(default=1, gt=0)
    learning_rate: float = Field(default=1e-6, gt=0)
    lr_scheduler_type: Literal["constant_with_warmup", "linear", "cosine"] = "constant_with_warmup"
    warmup_steps: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.01, ge=0)
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    max_grad_norm: float = Field(default=1.0, gt=0)
    freeze_vision_tower: bool = False
    row_tolerance: float = Field(default=0.0, ge=0, lt=1)  # share of the gradient's mass that the head may leave out
    row_tolerance_unbiased: bool = False  # keep such rows by chance instead: right in expectation
    # RL
    num_generations: int = Field(default=8, gt=1)
    steps_per_generation: int | None = Field(default=None, gt=0)  # micro-steps a rollout; default: one optimiser step
    num_iterations: int = Field(default=1, gt=0)  # passes over a rollout
    temperature: float = Field(default=1.0, gt=0, le=100)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    min_p: float = Field(default=0.0, ge=0, le=1)
    stop_strings: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)  # each ends a response
    loss_type: LossType = "cpgd"
    aggregation: Aggregation | None = None  # default: as the loss's paper has it, like the advantage
    advantage: AdvantageKind | None = None
    cpgd_weighting: Literal["equal", "std", "clip_filter"] = "clip_filter"  # of advantage: cpgd
    cale_mu: float = Field(default=1.0, ge=0, le=1)  # of advantage: cale
    cale_a: float = Field(default=1.0, gt=0)  # below 1 favours short answers
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    epsilon: float | None = Field(default=None, gt=0)
    epsilon_high: float | None = Field(default=None, gt=0)
    delta: float | None = None
    dual_clip: float | None = None
    importance_sampling_level: Literal["token", "sequence"] | None = None
    epsilon_start: float | None = None  # CPGD: the clip at a sequence's first token
    alpha: float | None = None  # CPGD: policy drift
    drift_cap: float | None = None
    sapo_temperature_pos: float | None = None
    sapo_temperature_neg: float | None = None
    vespo_k_pos: float | None = None
    vespo_lambda_pos: float | None = None
    vespo_k_neg: float | None = None
    vespo_lambda_neg: float | None = None
    beta: float = Field(default=0.0, ge=0)  # KL to the policy at the start of the stage
    kl: Literal["k1", "k2", "k3", "k1+", "k3+"] | None = None
    use_bias_correction_kl: bool | None = None
    entropy_coef: float = 0.0
    mask_truncated_completions: bool = False
    max_rollout_kl: float | None = Field(default=0.05, gt=0)  # nats a token between sampler and trainer; null: no bound
    reward_recipe: dict[str, dict[str, float]] | None = None  # label -> reward -> weight; default: seeds of COSMO-RL
    format_weight: float = Field(default=1.0, ge=0)

    @model_validator(mode="after")
    def _fits(self):
        if not self.datasets:
            raise ValueError("train_dataset names no file")
        for path, weight in self.datasets.items():
            if not 0 < weight < float("inf"):
                raise ValueError(f"train_dataset: {path!r} has weight {weight}; a weight must be above 0 and finite")
        if self.row_tolerance_unbiased and not self.row_tolerance:
            raise ValueError("row_tolerance_unbiased=true has no effect without a row_tolerance: set both")
        if self.kind == "sft":
            wrong = sorted(self.model_fields_set & _rl_only())
            if wrong:
                raise ValueError(f"{', '.join(wrong)}: a setting of rl stages, but stage {self.name!r} is kind: sft")
            return self
        self._check_loss()
        completions = self.completions_per_rollout
        if completions % self.num_generations:
            raise ValueError(
                f"per_device_train_batch_size × steps_per_generation = {completions} completions a rollout "
                f"is not a multiple of num_generations={self.num_generations}; change one of the three"
            )
        if self.micro_steps % self.gradient_accumulation_steps:
            raise ValueError(
                f"steps_per_generation={self.micro_steps} is not a multiple of gradient_accumulation_steps="
                f"{self.gradient_accumulation_steps}; an optimiser step may not span two rollouts"
            )
        per_update = self.per_device_train_batch_size * self.gradient_accumulation_steps
        if per_update % self.num_generations:
            raise ValueError(
                f"per_device_train_batch_size × gradient_accumulation_steps = {per_update} completions "
                f"an optimiser step is not a multiple of num_generations={self.num_generations}: a group may not be cut"
            )
        if self.max_steps % self.updates_per_rollout:
            raise ValueError(
                f"max_steps={self.max_steps} is not a multiple of the {self.updates_per_rollout} optimiser steps of "
                "a rollout (steps_per_generation / gradient_accumulation_steps × num_iterations)"
            )
        return self

    def _check_loss(self) -> None:
        """ValueError for an option that nothing reads, or that has a bad value."""
        from cosmo_fast.objectives import DEFAULTS, objective  # torch: not for whom no recipe is read

        objective(self.loss_type, **self.loss_options)
        advantage = self.advantage or DEFAULTS[self.loss_type][1]
        idle = {name: "advantage: cale" for name in ("cale_mu", "cale_a") if advantage != "cale"}
        idle |= {"cpgd_weighting": "advantage: cpgd"} if advantage != "cpgd" else {}
        idle |= {name: "a beta above 0" for name in ("kl", "use_bias_correction_kl") if not self.beta}
        for name, owner in idle.items():
            if getattr(self, name) != StageConfig.model_fields[name].default:
                raise ValueError(f"{name}={getattr(self, name)!r} has no effect without {owner}")
        if self.loss_type in ("reinforce", "rloo") and self.updates_per_rollout > 1:
            raise ValueError(
                f"loss_type {self.loss_type!r} has no ratio, but of the {self.updates_per_rollout} optimiser steps of "
                "a rollout (steps_per_generation / gradient_accumulation_steps × num_iterations) only the first is "
                "on-policy; use one, or reinforce_pp"
            )

    @property
    def loss_options(self) -> dict[str, float | str | bool]:
        """What `objectives.objective` takes besides the name: what was set."""
        given = {name: getattr(self, name) for name in (*LOSS_OPTIONS, "beta", "entropy_coef")}
        return {name: value for name, value in given.items() if value is not None}

    def resolved(self) -> dict[str, Any]:
        """The settings of this kind of stage with the defaults of its loss, as a recipe may hold them."""
        settings = self.model_dump()
        if self.kind == "sft":
            return {name: value for name, value in settings.items() if name not in _rl_only()}
        from cosmo_fast.objectives import DEFAULTS, LOSSES

        read = inspect.signature(LOSSES[self.loss_type]).parameters
        unset = [name for name in LOSS_OPTIONS if settings[name] is None]
        for name in unset:
            if name not in read or (not self.beta and name in ("kl", "use_bias_correction_kl")):
                del settings[name]
            else:
                settings[name] = read[name].default
        aggregation, advantage = DEFAULTS[self.loss_type]
        settings["aggregation"] = self.aggregation or aggregation
        settings["advantage"] = self.advantage or advantage
        return settings

    @property
    def micro_steps(self) -> int:
        return self.steps_per_generation or self.gradient_accumulation_steps

    @property
    def completions_per_rollout(self) -> int:
        return self.per_device_train_batch_size * self.micro_steps

    @property
    def updates_per_rollout(self) -> int:
        return self.micro_steps // self.gradient_accumulation_steps * self.num_iterations

    @property
    def datasets(self) -> dict[str, float]:
        return {self.train_dataset: 1.0} if isinstance(self.train_dataset, str) else self.train_dataset


def _rl_only() -> set[str]:
    names = list(StageConfig.model_fields)
    return set(names[names.index("num_generations") :])


def resolved_stage(saved: dict[str, Any]) -> dict[str, Any]:
    """`StageConfig.resolved` of a checkpoint's settings; what an earlier version did not have is at its default."""
    known = StageConfig.model_fields.keys() - (_rl_only() if saved["kind"] == "sft" else set())
    return StageConfig(**{name: value for name, value in saved.items() if name in known}).resolved()


class EvalConfig(_Strict):
    """Greedy evaluation of named row files after every stage."""

    datasets: dict[str, str] = Field(default_factory=dict)
    limit: int | None = Field(default=None, gt=0)  # first rows of each file
    batch_size: int = Field(default=256, gt=0)


class WorldConfig(_Strict):
    """The embedded world that ``world:`` paths name; built once a seed and size. ``seed``: by default the run's."""

    seed: int | None = Field(default=None, ge=0)
    sizes: dict[str, float] = Field(default_factory=dict)
    cache_dir: str | None = None


class Config(_Strict):
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
    image_root: str | None = None
    max_image_pixels: int = Field(default=4096 * 4096, gt=0)
    max_prompt_length: int | None = Field(default=None, gt=0)
    max_completion_length: int = Field(default=256, gt=0)
    max_tokens_per_batch: int = Field(default=16384, gt=0)  # tokens of one forward and backward
    sampling_batch_size: int = Field(default=256, gt=0)  # responses decoded at once
    kv_cache_mib: int = Field(default=4096, gt=0)  # keys and values of what is sampled, at most
    logging_steps: int = Field(default=10, gt=0)
    log_completions: int = Field(default=6, ge=0)  # samples kept with their pictures, a logged rollout
    save_steps: int | None = Field(default=None, gt=0)  # besides the end of every stage
    save_total_limit: int | None = Field(default=None, gt=0)
    resume_from_checkpoint: str | bool = False
    stages: list[StageConfig] = Field(min_length=1)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    world: WorldConfig = Field(default_factory=WorldConfig)

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
        names = [stage.name for stage in self.stages]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"stages: the name(s) {twice} stand twice; results are filed by name")
        return self

    def resolved(self) -> dict[str, Any]:
        """All settings, defaults included, as a recipe that makes the same run."""
        return self.model_dump() | {"stages": [stage.resolved() for stage in self.stages]}


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
            value = yaml.safe_load(text)
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
        node = child
        place.append(str(part))
    where = ".".join(place) or "recipe"
    if error["type"] == "extra_forbidden":
        known = _known_keys(error["loc"])
        last = place[-1]
        near = [ALIASES[last]] if last in ALIASES else difflib.get_close_matches(last, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
        return f"unknown setting {where!r}{hint}"
    message = error["msg"].removeprefix("Value error, ")
    given = "" if error["type"] in ("value_error", "missing") else f" (got {error['input']!r})"
    return f"{where}: {message}{given}"


def _known_keys(location: tuple) -> list[str]:
    by_parent = {"stages": StageConfig, "eval": EvalConfig, "world": WorldConfig}
    return sorted(by_parent.get(location[0] if len(location) > 1 else "", Config).model_fields)
