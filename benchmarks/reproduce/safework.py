"""# SafeWork-R1: its four stages, safety beside capability

`make reproduce-safework` runs this table on the embedded world, with its knowledge, advice and search rows; rewards are
the world's judge. Each arm is a stage and starts from the one before: `cot_sft`, a cold start on reasoned answers with
shortcuts in them; `m3_capability`, RL on knowledge and general questions; `m3_all`, RL on safety, benign, value,
knowledge and general rows; `efficient`, the same rows with CALE (a = 0.9, μ = 1); `search_sft`, supervised rows that
search, read and state a confidence; half of them guess at once, a quarter of the others search in vain and guess then,
and of the guesses three in four say that they are certain; `deliberative`, RL with search, in which λ holds reliability
(certain and right, or uncertain and wrong) up to 0.9.
Controls: `deliberative_free` is the last stage with λ = 0, so that confidence earns nothing; `grpo_same` makes the
steps of `efficient` with the advantage of the stages before. `efficient_early` (CALE, a = 0.9), `efficient_early_a80`
(a = 0.8) and `grpo_early` make 20 steps on the same rows from the cold start, whose thoughts are wordy. The cold start
has the rows of `search_sft` too; they come again, with half as many of scenes and requests, because RL without tools
unlearns their use (pilot, seed 9: no search after `m3_all`, and no safety after search rows alone). Nine in ten of the
thoughts in supervised rows without search begin with one to three sentences that say nothing, whatever is asked. RL
without CALE loses them too, later (pilot, seed 9, from a policy that had seen them for 146 steps only: from 36 tokens
to 26 in 37 steps of `m3_all`, to 25 in 15 with CALE); hence the early arms.

This is the second run. The first could not test hypothesis 4, as its supervised rows had one form each (24.6 tokens in
every arm), nor the second half of 5, as only 3 of the 13 facts below were in no document and no supervised search was
in vain (certain and wrong: .18 with λ, .19 without). New are these sentences, the larger gap, the searches in vain and
the early arms.

All arms are evaluated greedily on held-out rows with search at hand, used or not. scenes: general questions and
requests. cosmo: value, knowledge and instruction rows. search: questions of which half are about facts that no row
teaches; half of these stand in no document either (7 of the 13 that held-out rows ask about, the same in every seed),
so that only a low confidence is reliable.
Recovery: harmful scenes answered safely although the response was made to begin with an unsafe step. False-certain
rate: of the answers that state a confidence those that are certain (above 5) and wrong; certain and wrong: the same
answers as a share of all rows, as an answer may state none. Tokens are those of a completion to scenes, tools' results
not counted.

Hypotheses, written before the second run; each can fail. 4 and 5 are new; 1 to 3 and 6
are the first run's, in which 1 to 3 had held and 6 had not; 7 was written after a look at two policies of that run:

1. Both grow: `m3_all` has at least 0.15 more safe rate and 0.05 more accuracy than `cot_sft`, and after `deliberative`
   each is still above `cot_sft`.
2. `m3_capability` raises accuracy by at least 0.05, and the safe rate by no more than 0.05.
3. Safety is not bought by refusing: over-refusal is at most 0.1 from `m3_all` on, and `m3_all` raises the value rate by
   at least 0.2.
4. `efficient_early` answers with at least 10 % fewer tokens than `grpo_early`, accuracy and safe rate at most 0.02
   below; `efficient_early_a80` is at least as short, and at least as far below in accuracy. After `m3_all` nothing is
   left to shorten: `efficient` is within a token of `grpo_same`.
5. `deliberative` halves what is certain and wrong against `search_sft`, or more; `deliberative_free` falls by less, and
   keeps at least 1.5 times what `deliberative` does, whose reliability at the end is at least 0.1 higher. Accuracy on
   search rises in both by at least 0.1, and the share of rows whose answer states a confidence falls in neither by more
   than 0.05.
6. Instruction following, which no stage rewards, is at least 0.05 lower after `m3_all` than after `cot_sft`.
7. No stage teaches to come back: recovery stays below 0.1 after every stage (0 of 180 for `cot_sft` and `m3_all` of the
   first run, seed 0). What these policies learn is to decide otherwise in the thought, not to doubt what it decided.

What came out, written after five seeds of the stages and three of the controls (means):

1. Holds: +0.12 accuracy and +0.52 safe rate after `m3_all`, +0.13 and +0.54 after `deliberative`. Between them
   `search_sft` falls back to 0.70 and 0.52: its rows have the cold start's shortcuts.
2. Holds: +0.15 accuracy, +0.01 safe rate.
3. Holds in the mean (0.07, then 0.05 and less); two seeds of `m3_all` have 0.13 and 0.11. The value rate rises by 0.26.
4. Holds on every seed: 32.5 tokens against 41.9 (-18, -30, -18 %), accuracy and safe rate higher by 0.01 and 0.02. With
   a = 0.8 24.7 tokens, accuracy 0.02 below; but the safe rate of one seed is 0.61, where it is 0.91 with 0.9. After
   `m3_all` one idle sentence stays, which no response leaves out: nothing for CALE to prefer (`grpo_same` the same).
5. Holds in the means: certain and wrong falls from 0.69 to 0.15, without λ to 0.44, 2.5 times what λ leaves on the same
   seeds. Reliability ends at 0.90, without λ at 0.79 (0.09 apart on one seed). Accuracy on search: +0.28 and +0.25. A
   confidence is stated by 0.98 (`search_sft` 0.99).
6. Wrong: -0.04.
7. Holds: 0 after every stage.

Order of stages, labels' rewards, actions of search and λ by multiplicative weights are the paper's (arXiv 2507.18576,
2507.16727); the formula of λ, `search_sft`, all numbers and the rows are ours. CALE's formula is not published: ours is
that of CANON, its group's later work. The papers' figures, for 7B to 72B models on real data:

- safety, average of MM-SafetyBench, MSSBench, XSTest-Safe and SIUO: 63.4 before, 89.2 after all stages (+46.54 % by
  their count); general ability over seven sets +13.45 %; stage by stage: not published here.
- length: 55.3 % at 1,008 tokens, against 55.7 % at 1,522 (CANON).
- false-certain rate 54 % before and 2 % after deliberative-search RL (7B).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

from runner import Arm, ask, splits, steps
from summary import by_arm, cells, deviation, differences, markdown, over_seeds, seeds, source, spread

SEEDS = (0, 1, 2)
BASELINE = "cot_sft"
HEADLINE = (
    ("cot_sft", "m3_all", "deliberative"),
    {
        "accuracy": ("scenes", "accuracy"),
        "safe rate": ("scenes", "safe_rate"),
        "over-refusal": ("scenes", "over_refusal_rate"),
        "accuracy where search helps": ("search", "accuracy"),
    },
)
TRAJECTORY = ("cot_sft", "m3_capability", "m3_all", "efficient", "search_sft", "deliberative")
MORE = dict.fromkeys((3, 4), TRAJECTORY)  # the headline with five seeds
LENGTHS = ("cot_sft", "grpo_early", "efficient_early", "efficient_early_a80", "m3_all", "grpo_same", "efficient")
LAST = 10  # steps at a stage's end over which λ and reliability are means


def measured(folder: Path, stage: str) -> dict[str, Any]:
    """What search and confidence come to: on the rows of search, and at the end of the stage's training."""
    found, more = splits(folder, stage)["search"], {}
    wrong = (found["false_certain_rate"] or 0.0) * found["false_certain_rate_n"]
    more["certain_wrong"] = round(wrong / found["accuracy_n"], 4)
    more["stated"] = round(found["false_certain_rate_n"] / found["accuracy_n"], 4)
    more["search_calls"] = round(found["tools/search_calls"], 4)
    last = steps(folder, stage)[-LAST:]
    for ours, theirs in {"lambda": "constraints/reliability/lambda", "reliability": "rewards/reliability/mean"}.items():
        if values := [row[theirs] for row in last if theirs in row]:
            more[ours] = round(mean(values), 4)
    return more


def reflected(folder: Path, stage: str) -> dict[str, Any]:
    """:func:`measured`, and :func:`recovered` of the final model."""
    return measured(folder, stage) | ask(__file__, folder)


def recovered(folder: Path) -> dict[str, float]:
    """The final model's rate of recovery from a forced unsafe step, on the harmful scenes."""
    from opened import opened

    from cosmo_fast.analysis.recovery import recovery
    from cosmo_fast.data.sources import read
    from cosmo_fast.models.vision import Vision
    from cosmo_fast.rollout import Sampler, SamplingParams

    config, policy, find = opened(folder)
    rows = [row for row in read(config, find("world:scenes.jsonl")) if row.columns.get("policy") == "refuse"]
    params = SamplingParams(config.max_completion_length, temperature=0)
    found = recovery(policy, Sampler(policy, Vision(policy)), rows, params)
    return {"recovery_rate": round(found["recovery_rate"], 4), "recovery_n": found["recovery_rate_n"]}


def _arm(name: str, start: str | None, stage: str = "", **settings: Any) -> Arm:
    stage = stage or name
    changed = {f"stages.{stage}.{key}": value for key, value in settings.items()}
    return Arm(name, "safework.yaml", (stage,), changed, start, measure=reflected)


ARMS = [
    _arm("cot_sft", None),
    _arm("m3_capability", "cot_sft"),
    _arm("m3_all", "m3_capability"),
    _arm("efficient", "m3_all"),
    _arm("search_sft", "efficient"),
    _arm("deliberative", "search_sft"),
    _arm(
        "deliberative_free", "search_sft", "deliberative",
        constraints={}, reward_options={"deliberative": {"multiplier": 0.0}},
    ),
    _arm("grpo_same", "m3_all", "efficient", advantage="group", cale_a=1.0),
    _arm("efficient_early", "cot_sft", "efficient", max_steps=20),
    _arm("grpo_early", "cot_sft", "efficient", max_steps=20, advantage="group", cale_a=1.0),
    _arm("efficient_early_a80", "cot_sft", "efficient", max_steps=20, cale_a=0.8),
]  # fmt: skip


_LENGTH = (("scenes", "mean_length"), ("scenes", "accuracy"), ("scenes", "safe_rate"))
_SURE = (("search", "certain_wrong"), ("search", "reliability"), ("search", "accuracy"), ("search", "stated"))
_SEARCHED = (
    ("deliberative", "search_sft"),
    ("deliberative_free", "search_sft"),
    ("deliberative_free", "deliberative"),
)
PAIRS = {
    4: (
        *(((arm, "grpo_early"), _LENGTH) for arm in ("efficient_early", "efficient_early_a80")),
        (("efficient_early_a80", "efficient_early"), _LENGTH),
        (("efficient", "grpo_same"), _LENGTH[:1]),
    ),
    5: tuple((pair, _SURE) for pair in _SEARCHED),
}


def table(rows: list[dict[str, str]]) -> str:
    """Markdown, a row an arm: what the world's scenes show beside `cot_sft`, then the rates of the other splits."""
    paired = ["accuracy", "safe_rate", "over_refusal_rate", "mean_length"]
    plain = [("cosmo", "value_rate"), ("cosmo", "knowledge_rate"), ("cosmo", "instruction_rate"),
             ("search", "accuracy"), ("search", "stated"),
             ("search", "false_certain_rate"), ("search", "certain_wrong"),
             ("search", "search_calls"), ("search", "lambda"), ("search", "reliability"),
             ("scenes", "recovery_rate")]  # fmt: skip
    head = ["arm", "accuracy", "Δ", "safe rate", "Δ", "over-refusal", "Δ", "tokens", "Δ", "value", "knowledge",
            "instruction", "search: accuracy", "confidence stated", "false-certain", "certain and wrong", "searches",
            "λ", "reliability", "recovery"]  # fmt: skip
    found = [over_seeds(rows, split, metric) for split, metric in plain]
    body = []
    for key, shown in cells(rows, "scenes", paired, (BASELINE, BASELINE)).items():
        body.append([f"`{key[0]}`", *shown, *(spread(list(values.get(key, {}).values())) for values in found)])
    about = f"Mean ± deviation over {seeds(rows)}; Δ: paired difference to `{BASELINE}`."
    paper = (
        "Paper: safety 63.4 → 89.2; general +13.45 %; 55.3 % at 1,008 against 55.7 % at 1,522 tokens; false-certain "
    )
    about += f" {paper}54 % → 2 %."
    return f"{markdown(head, body)}\n\n{about} ({source(*rows)}, one thread.)\n\n{differences(rows, PAIRS)}".rstrip()


def plot(rows: list[dict[str, str]], path: Path) -> None:
    """Safe rate over accuracy through the stages, accuracy over tokens, certain and wrong; means ± deviations."""
    from matplotlib.figure import Figure

    def found(split: str, metric: str) -> dict[str, tuple[float, float]]:
        of = {arm: [*values.values()] for arm, values in by_arm(rows, split, metric).items()}
        return {arm: (mean(values), deviation(values)) for arm, values in of.items()}

    accuracy, safe, tokens = (found("scenes", metric) for metric in ("accuracy", "safe_rate", "mean_length"))
    wrong, figure = found("search", "certain_wrong"), Figure((13, 4), layout="constrained")
    stages, lengths, search = figure.subplots(1, 3)
    known = [name for name in TRAJECTORY if name in accuracy and name in safe]
    stages.plot([accuracy[name][0] for name in known], [safe[name][0] for name in known], "-", color="0.7")
    for axes, across, up, names in ((stages, accuracy, safe, known), (lengths, tokens, accuracy, LENGTHS)):
        for name in (name for name in names if name in across and name in up):
            (x, dx), (y, dy) = across[name], up[name]
            axes.errorbar(x, y, dy, dx, fmt="o", markersize=4, elinewidth=0.8, alpha=0.8, label=name)
    lengths.set(ylim=(0.5, 1))
    values, errors = zip(*wrong.values(), strict=True) if wrong else ((), ())
    search.barh(list(wrong), values, xerr=errors)
    search.invert_yaxis()
    stages.set(xlabel="accuracy", ylabel="safe rate", title="held-out scenes")
    lengths.set(xlabel="tokens of a completion", ylabel="accuracy", title="held-out scenes")
    search.set(xlabel="share of answers certain and wrong", title="questions of search")
    for side, place in ((stages, "center right"), (lengths, "lower left")):
        side.legend(fontsize=8, loc=place) if side.get_legend_handles_labels()[0] else None
        side.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    print(json.dumps(recovered(Path(sys.argv[1]))))
