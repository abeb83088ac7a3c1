"""A stage's settings, each checked with the others before any work begins."""

from __future__ import annotations

import inspect
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from cosmo_fast.config.rules import Constraint, Curriculum, Schedule, StopLoss, StopRule, Strict, Tools, Weight, at

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


class StageConfig(Strict):
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
    freeze: list[str] = Field(default_factory=list)  # parts, or expressions: see Policy.freeze
    label_weights: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)  # shares of what is drawn
    curriculum: Curriculum | None = None
    eval_steps: int | None = Field(default=None, gt=0)  # evaluations inside the stage, besides the one after it
    metric_for_best_model: str | None = Field(default=None, pattern="^eval/")  # keeps a checkpoint of the best
    greater_is_better: bool = True
    load_best_model_at_end: bool = False
    stop: StopRule | None = None
    stop_loss: Annotated[list[StopLoss], BeforeValidator(lambda v: [v] if isinstance(v, dict) else v or [])] = []
    # RL
    num_generations: int = Field(default=8, gt=1)
    steps_per_generation: int | None = Field(default=None, gt=0)  # micro-steps a rollout; default: one optimiser step
    num_iterations: int = Field(default=1, gt=0)  # passes over a rollout
    temperature: float = Field(default=1.0, gt=0, le=100)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    min_p: float = Field(default=0.0, ge=0, le=1)
    stop_strings: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)  # each ends a response
    tools: Tools | None = None
    loss_type: LossType = "cpgd"
    aggregation: Aggregation | None = None  # default: as the loss's paper has it, like the advantage
    advantage: AdvantageKind | None = None
    cpgd_weighting: Literal["equal", "std", "clip_filter"] = "clip_filter"  # of advantage: cpgd
    cale_mu: float = Field(default=1.0, ge=0, le=1)  # of advantage: cale
    cale_a: float = Field(default=1.0, gt=0)  # below 1 favours short answers
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum", "gated", "lagrangian"] = (
        "sum_then_normalize"
    )
    gate_reward: str | None = None  # of gated: where it is below gate_threshold, a response has no other reward
    gate_threshold: float = 0.5
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
    beta: float = Field(default=0.0, ge=0)  # KL to the reference
    reference: str = Field(default="start", pattern="^(start|none|stage:.+)$")  # the policy then, or after stage NAME
    reference_refresh_steps: int | None = Field(default=None, gt=0)  # it becomes the policy again as often
    kl: Literal["k1", "k2", "k3", "k1+", "k3+"] | None = None
    use_bias_correction_kl: bool | None = None
    entropy_coef: float = 0.0
    mask_truncated_completions: bool = False
    max_rollout_kl: float | None = Field(default=0.05, gt=0)  # nats a token between sampler and trainer; null: no bound
    # label -> reward -> weight, a number or a schedule; default: seeds of COSMO-RL
    reward_recipe: dict[str, dict[str, Weight]] | None = None
    format_weight: Weight = 1.0
    constraints: dict[str, Constraint] = Field(default_factory=dict)  # reward -> what its mean is to reach
    dynamic_sample: bool = False  # DAPO: groups of equal rewards are replaced by groups of further prompts
    dynamic_sample_reward: str | None = None  # the reward that must differ (rows without it: the sum); default: the sum
    max_resample_times: int = Field(default=3, gt=0)  # further samplings a rollout, at most
    resample_exhausted: Literal["fill", "error"] = "fill"  # then: go on with such groups, or stop
    # rollouts in a row in which no group has rewards that differ, so that nothing is learned: the stage ends
    max_tied_rollouts: int | None = Field(default=20, gt=0)
    reward_options: dict[str, dict[str, Any]] = Field(default_factory=dict)  # reward -> argument -> value
    reward_timeout: float = Field(default=600.0, gt=0)  # seconds that one call of a reward may take
    reward_worker: bool = True  # rewards are computed in a process of their own, killed when one hangs
    # share of the responses in a call on which a reward may fail
    max_reward_failures: float = Field(default=0.1, ge=0, le=1)

    @model_validator(mode="after")
    def _fits(self):
        if not self.datasets:
            raise ValueError("train_dataset names no file")
        for path, weight in self.datasets.items():
            if not 0 < weight < float("inf"):
                raise ValueError(f"train_dataset: {path!r} has weight {weight}; a weight must be above 0 and finite")
        if self.row_tolerance_unbiased and not self.row_tolerance:
            raise ValueError("row_tolerance_unbiased=true has no effect without a row_tolerance: set both")
        self._check_rules()
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

    def _check_rules(self) -> None:
        """ValueError for rules that contradict each other, have no effect, or fall inside a rollout."""
        if self.label_weights and not sum(self.label_weights.values()):
            raise ValueError(f"label_weights={self.label_weights} leave nothing to draw")
        weights = {
            f"{label}.{n}": w for label, by_name in (self.reward_recipe or {}).items() for n, w in by_name.items()
        }
        for name, weight in {"format_weight": self.format_weight, **weights}.items():
            if min((weight.start, weight.to) if isinstance(weight, Schedule) else (weight,)) < 0:
                raise ValueError(f"{name}={weight} must not be negative")
        for name in ("eval_steps", "reference_refresh_steps"):
            steps = getattr(self, name)
            if steps and steps % self.updates_per_rollout:
                per = self.updates_per_rollout
                raise ValueError(f"{name}={steps} is not a multiple of the {per} optimiser steps of a rollout")
        rules = [*([self.stop] if self.stop else []), *self.stop_loss]
        measured = [r.metric for r in rules if r.metric.startswith("eval/")] + [self.metric_for_best_model or ""]
        if any(measured) and not self.eval_steps:
            raise ValueError(f"{next(filter(None, measured))} is measured inside the stage only with eval_steps")
        idle = {"greater_is_better": "metric_for_best_model", "load_best_model_at_end": "metric_for_best_model"}
        if self.metric_for_best_model is None:
            self._refuse_idle(idle)
            if any(rule.action == "restore" for rule in self.stop_loss):
                raise ValueError("stop_loss action=restore needs a metric_for_best_model")

    def _refuse_idle(self, idle: dict[str, str]) -> None:
        """ValueError for a setting that is not at its default, though what reads it (the value) is not there."""
        for name, owner in idle.items():
            if getattr(self, name) != StageConfig.model_fields[name].default:
                raise ValueError(f"{name}={getattr(self, name)!r} has no effect without {owner}")

    def _check_loss(self) -> None:
        """ValueError for an option that nothing reads, or that has a bad value."""
        from cosmo_fast.objectives import DEFAULTS, objective  # torch: not for whom no recipe is read

        objective(self.loss_type, **self.loss_options)
        advantage = self.advantage or DEFAULTS[self.loss_type][1]
        idle = {name: "advantage: cale" for name in ("cale_mu", "cale_a") if advantage != "cale"}
        idle |= {"cpgd_weighting": "advantage: cpgd"} if advantage != "cpgd" else {}
        gated = self.multi_objective_aggregation == "gated"
        idle |= {} if gated else dict.fromkeys(("gate_reward", "gate_threshold"), "multi_objective_aggregation: gated")
        idle |= {name: "a beta above 0" for name in ("kl", "use_bias_correction_kl") if not self.beta}
        referring = ["reference_refresh_steps", *(["reference"] if self.reference != "none" else [])]
        idle |= {name: "a beta above 0" for name in referring if not self.beta}
        sampling = ("dynamic_sample_reward", "max_resample_times", "resample_exhausted")
        idle |= {} if self.dynamic_sample else dict.fromkeys(sampling, "dynamic_sample")
        self._refuse_idle(idle)
        if self.multi_objective_aggregation == "lagrangian" and not self.constraints:
            raise ValueError("multi_objective_aggregation=lagrangian needs constraints, whose multipliers it applies")
        if self.reference == "none" and self.beta:
            raise ValueError(f"reference=none with beta={self.beta}: the KL needs a reference; set beta: 0")
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
        settings = self.model_dump(by_alias=True)
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
    def first_weights(self) -> tuple[dict[str, dict[str, float]] | None, float]:
        """``reward_recipe`` in numbers at step 0, and ``format_weight``, the larger end of a schedule."""
        recipe, shape = self.reward_recipe, self.format_weight
        if recipe is not None:
            recipe = {label: {n: at(w, 0, self.max_steps) for n, w in named.items()} for label, named in recipe.items()}
        return recipe, max(shape.start, shape.to) if isinstance(shape, Schedule) else shape

    @property
    def frozen(self) -> list[str]:
        """``freeze``, with the tower and its merger where ``freeze_vision_tower`` adds them."""
        return sorted({*self.freeze, *(("vision_tower", "merger") if self.freeze_vision_tower else ())})

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
