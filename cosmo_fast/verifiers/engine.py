"""Verifiers beside the policy: one loaded model a checkpoint, awake for what a rollout's labels need."""

from __future__ import annotations

from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cosmo_fast import ops
from cosmo_fast.config import Config, ConfigError, VerifierConfig
from cosmo_fast.data.encode import Encoder
from cosmo_fast.data.rows import DataError, Row
from cosmo_fast.models import Policy, load_policy
from cosmo_fast.models.vision import Vision
from cosmo_fast.plan import Prompt
from cosmo_fast.rewards import M3_RECIPES, VERDICTS, RewardMix, answer_text
from cosmo_fast.rewards.format import shown
from cosmo_fast.rewards.safety import KIND_OF, VERIFIED, judged, verified
from cosmo_fast.rollout import Sampler, SamplingParams
from cosmo_fast.stages.packed import Group, passes
from cosmo_fast.verifiers.prompt import p_score, parse, reference, verifier_messages

RULE = "rule"  # in place of a model: the row's own judge


class Engine:
    """A verifier's model on the packed forward. Asleep its weights lie on the host: on the CPU that is no move."""

    def __init__(self, policy: Policy, config: Config):
        policy.model.requires_grad_(False)
        self.policy, self.max_tokens = policy, config.max_tokens_per_batch
        self.vision, self.encoder = Vision(policy, max_image_pixels=config.max_image_pixels), Encoder(policy)
        bounds = (config.sampling_batch_size, config.max_tokens_per_batch, config.kv_cache_mib)
        self.sampler = Sampler(policy, self.vision, *bounds)
        self.control = sorted({*self.encoder.control, *policy.tokenizer.all_special_tokens}, key=len, reverse=True)

    @contextmanager
    def awake(self, device: torch.device) -> Iterator[None]:
        """The weights are on ``device`` inside; features of pictures do not outlive it."""
        self.policy.model.to(device)
        try:
            yield
        finally:
            self.vision.forget()
            self.policy.model.to("cpu")

    def prompt(self, kind: str, rule: VerifierConfig, asked: Prompt, answer: str, rng: np.random.Generator) -> Prompt:
        """What the verifier is asked about an answer to ``asked``."""
        pictures = [Path(m.key) for m in asked.media] if rule.picture else []
        options = {"pictures": len(pictures), "reference": reference(kind, asked.columns), "control": self.control}
        messages = verifier_messages(kind, asked.question, answer, rng, **options)
        return self.encoder.prompt(Row(asked.source, messages, tuple(pictures), {}))

    def said(self, prompts: list[Prompt], max_tokens: int) -> list[str]:
        """Greedy answers of at most ``max_tokens`` tokens."""
        done = self.sampler.generate(prompts, SamplingParams(max_tokens, temperature=0))
        return self.policy.tokenizer.batch_decode([one.ids for [one] in done], skip_special_tokens=True)

    @torch.no_grad()
    def chances(self, prompts: list[Prompt], words: Sequence[str]) -> np.ndarray:
        """(n, len(words)) probabilities that an answer begins with each of ``words``, in one forward a micro-batch."""
        tokenizer = self.policy.tokenizer
        ids = [np.array(tokenizer(word, add_special_tokens=False)["input_ids"]) for word in words]
        logps: list[list[float]] = [[] for _ in prompts]
        for work in passes(self.policy, self.vision, [Group(p, ids, []) for p in prompts], self.max_tokens):
            targets = work.plan.tensor("targets", self.policy.device)
            tokens, _ = ops.linear_logprobs(work.hidden, self.policy.head_weight, targets)
            pieces = iter(tokens.double().cpu().split([len(r) for g in work.groups for r in g.responses]))
            for i, group in zip(work.indices, work.groups, strict=True):
                logps[i] += [float(next(pieces).sum()) for _ in group.responses]
        return np.exp(np.array(logps))


def rewarded(
    recipes: Mapping[str, Mapping[str, float]] | None, own: dict[str, Any], kinds: Collection[str]
) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """A stage's recipes with what is logged of its verifiers at weight 0, and ``own`` rewards with the verifiers'."""
    if both := sorted(own.keys() & set(kinds)):
        raise ConfigError(f"verifiers and reward_funcs both give {both}: keep one")
    recipes = M3_RECIPES if recipes is None else recipes
    logged = {kind: {f"{kind}_gold": 0.0, "verifier_unparsable": 0.0} for kind in kinds}
    full = {
        label: {**recipe, **{name: 0.0 for kind in recipe for name in logged.get(kind, ())}}
        for label, recipe in recipes.items()
    }
    return full, own | {kind: verified(kind) for kind in kinds if any(kind in recipe for recipe in recipes.values())}


def counted(rules: Mapping[str, VerifierConfig], columns: Mapping[str, Any]) -> str | None:
    """The verifier whose verdict the rates count of a row: where they need one, the row has no judge, and it is there.

    They need one of rows with a `policy`, `value_rate` and `knowledge_rate` of those with their label.
    """
    label = columns.get("label")
    kind = KIND_OF.get(label) if columns.get("policy") is not None or label in ("value", "knowledge") else None
    return kind if columns.get("judge") is None and kind in rules and rules[kind].model != RULE else None


def unjudged(rules: Mapping[str, VerifierConfig], columns: Mapping[str, Any]) -> dict[str, Any]:
    """The row with the column `verifier_verdicts` as it is of a blank answer, about which no verifier is asked."""
    kind = counted(rules, columns)
    return {**columns, "verifier_verdicts": {kind: "unparsable"} if kind else {}}


def flagged(options: Namespace, rows: Iterable[Row]) -> Config:
    """A recipe of nothing but the verifiers in ``options.verifier``, each ``KIND=FOLDER``, within the options' bounds.

    Raises:
        ConfigError: not of that form, no such kind, one twice, or one that none of the ``rows`` needs.
    """
    rules: dict[str, VerifierConfig] = {}
    for text in options.verifier:
        kind, _, folder = text.partition("=")
        if kind not in VERIFIED or folder in ("", RULE) or kind in rules:
            raise ConfigError(f"--verifier {text!r}: want KIND=FOLDER, each KIND once, of {', '.join(VERIFIED)}")
        rules[kind] = VerifierConfig(model=folder)
    needed = {counted(rules, row.columns) for row in rows}
    if idle := sorted(rules.keys() - needed):
        raise ConfigError(
            f"--verifier {idle[0]}={rules[idle[0]].model}: no row needs its verdict, which is asked for where a row "
            "without a judge has a policy and that verifier's label, or the label value or knowledge"
        )
    bounds = {"sampling_batch_size": options.batch_size, "kv_cache_mib": options.kv_cache_mib}
    return Config.model_construct(verifiers=rules, **bounds)


class Verifiers:
    """The verifiers of a recipe's ``verifiers``. ``engines``: one a checkpoint, however many kinds name it.

    ``resolve``: ``world:`` names to paths; ``device``: where they wake; ``used``: the kinds that rewards or rates need.
    ValueError: a model that cannot be loaded, or that nothing has use for.
    """

    def __init__(
        self, config: Config, resolve: Callable[[str], str] = str, device: torch.device | str = "cpu",
        used: Collection[str] | None = None,
    ):  # fmt: skip
        if unused := sorted(config.verifiers.keys() - set(config.verifiers if used is None else used)):
            raise ConfigError(f"verifiers {unused}: no stage's reward_recipe names them, and no row's rates need them")
        self.rules, self.device, self.engines, self.of = config.verifiers, torch.device(device), {}, {}
        for kind, rule in self.rules.items():
            path = resolve(rule.model)
            self.of[kind] = path = str(Path(path).resolve()) if Path(path).exists() else path
            if path not in {RULE, *self.engines}:
                try:
                    policy = load_policy(path, device="cpu", trust_remote_code=config.trust_remote_code)
                except ValueError as error:
                    raise ConfigError(f"verifiers.{kind}.model={rule.model!r}: {error}") from error
                self.engines[path] = Engine(policy, config)

    def check(self, prompts: Sequence[Prompt], mix: RewardMix | None = None) -> None:
        """ValueError where a row cannot be shown to the verifier that rewards (of ``mix``) or rates need."""
        for prompt in prompts:
            for kind in self._needed(prompt, mix.recipe(prompt.columns, prompt.source) if mix else ()):
                try:
                    self._shown(kind, prompt, "", np.random.default_rng(0))
                except ValueError as error:
                    raise DataError(f"verifiers.{kind}: {error}") from error

    def __call__(
        self, prompts: Sequence[Prompt], texts: Sequence[str], recipes: Sequence[Collection[str]] | None, seed: int
    ) -> list[dict[str, Any]]:
        """The columns `verifier_scores` {kind: score}, `verifier_verdicts` {kind: verdict} and `verifier_unparsable`.

        Asked are the verifiers that a sample's rewards name, and the :func:`counted` one. A verifier sees what follows
        ``</think>``; with ``think`` the score is that times the thought's, if there is one. A blank answer is not asked
        about; of one without think tags there is a verdict, but no score, as rates read it and rewards do not.

        Args:
            prompts, texts: the samples. recipes: the names of each one's rewards; None where rates alone are wanted.
            seed: of the marks and of ``noise``, which exchanges scores, not verdicts.

        Raises:
            ValueError: more than ``max_unparsable`` of the answers of a verifier that rewards are none of its verdicts.
        """
        asked: dict[str, list[tuple[int, str, bool]]] = defaultdict(list)
        result = []
        for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            verdicts = unjudged(self.rules, prompt.columns)["verifier_verdicts"]
            result.append({"verifier_scores": {}, "verifier_verdicts": verdicts})
            answer, thought = answer_text(text), text.partition("</think>")[0].replace("<think>", "").strip()
            for kind in self._needed(prompt, recipes[i] if recipes else ()):
                if recipes and answer.strip():
                    asked[kind] += [(i, answer, True)] + [(i, thought, True)] * (
                        self.rules[kind].think and thought != ""
                    )
                elif kind in verdicts and (whole := answer_text(shown(text))).strip():
                    asked[kind].append((i, whole, False))
        for path in dict.fromkeys(self.of[kind] for kind in asked):  # a checkpoint wakes once
            with nullcontext() if path == RULE else self.engines[path].awake(self.device):
                for kind in [kind for kind in asked if self.of[kind] == path]:
                    rng = np.random.default_rng([seed, *kind.encode()])
                    put = [self._shown(kind, prompts[i], text, rng) for i, text, _ in asked[kind]]
                    found = self._scores(kind, put, rng, bounded=recipes is not None)
                    for (i, _, scored), verdict, score in zip(asked[kind], *found, strict=True):
                        row, bad = result[i], float(score is None)
                        if kind in row["verifier_verdicts"] and kind not in row["verifier_scores"]:  # of the answer
                            row["verifier_verdicts"][kind] = verdict or "unparsable"
                        if not scored:
                            if recipes is None:
                                row["verifier_unparsable"] = bad
                            continue
                        worth = VERDICTS[VERIFIED[kind][0]]["unparsable"] if score is None else score
                        row["verifier_scores"][kind] = row["verifier_scores"].get(kind, 1.0) * worth
                        row["verifier_unparsable"] = max(bad, row.get("verifier_unparsable", 0.0))
        return result

    def _needed(self, prompt: Prompt, recipe: Collection[str]) -> list[str]:
        own, label = counted(self.rules, prompt.columns), prompt.columns.get("label")
        return [k for k in self.rules if k == own or (k in recipe and label in VERIFIED[k][1])]

    def _shown(self, kind: str, prompt: Prompt, answer: str, rng: np.random.Generator) -> Any:
        """The verifier's prompt; of a rule the judge's verdict."""
        if self.of[kind] == RULE:
            return judged(answer, prompt.columns, asked=VERIFIED[kind][0])
        return self.engines[self.of[kind]].prompt(kind, self.rules[kind], prompt, answer, rng)

    def _scores(
        self, kind: str, put: list, rng: np.random.Generator, bounded: bool
    ) -> tuple[list[str | None], list[float | None]]:
        """Verdicts and scores of a kind, None for what is no verdict; ``noise`` of the scores are another verdict's.

        bounded: more than ``max_unparsable`` of None is an error.
        """
        rule, worth, said, chances = self.rules[kind], VERDICTS[VERIFIED[kind][0]], put, None
        if self.of[kind] != RULE:
            engine = self.engines[self.of[kind]]
            if kind == "knowledge":  # ours: with less than half of the mass on both it was no answer to the question
                chances = engine.chances(put, ("TRUE", "FALSE"))
                said = [("TRUE" if t > f else "FALSE") if t + f >= 0.5 else "neither" for t, f in chances]
            else:
                said = engine.said(put, rule.max_tokens)
        verdicts = [parse(kind, text) for text in said]
        bad = [text for text, verdict in zip(said, verdicts, strict=True) if verdict is None]
        if bounded and len(bad) > rule.max_unparsable * len(said):
            raise ValueError(
                f"verifiers.{kind}: {len(bad)} of {len(said)} answers of {rule.model!r} are no verdict of it, first "
                f"{bad[0]!r}; over max_unparsable={rule.max_unparsable}. Was it trained by the recipe verifier?"
            )
        scores: list[float | None] = []
        for i, verdict in enumerate(verdicts):
            flips, draw = rng.random(2)
            score = None if verdict is None else worth[verdict] if chances is None else p_score(*chances[i])
            if score is not None and flips < rule.noise:
                others = [other for other in worth if other not in (verdict, "unparsable")]
                score = worth[others[int(draw * len(others))]] if chances is None else 1 - score
            scores.append(score)
        return verdicts, scores
