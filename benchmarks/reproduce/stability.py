"""# Does CPGD stay stable where others do not?

`make reproduce-stability` runs this table: the demo's cold start (600 steps) and then, for each loss, 120 rollouts of
its mixed rows, safety 3 : general 2, at a setting that is aggressive on purpose: 8 optimiser steps a rollout of 256
(quarters of it, twice), a learning rate of 3e-4 (the demo: 1 step at 1.7e-4), no KL; 3 seeds, a cold start each. All
CPGD arms take GRPO's advantage and all losses are means over tokens, so that arms differ in the loss alone. `no_clip`
is ε 0.999999 and ε_high 1e9, `no_drift` α 0, `bare` both; what CPGD multiplies the advantage by in the second pass, a
clipped ratio, is then unclipped too. (Pilot, seed 9, 20 rollouts: at 6e-4 REINFORCE++ broke at once; at 1e-4 CPGD and
REINFORCE++ learned alike, the mean reward from 1.54 to 1.64; at 3e-4 neither learned, CPGD 1.52 to 1.49, REINFORCE++
1.54 to 1.44 and GRPO 1.53 to 1.43, the entropy of these two going from 0.14 to 0.25 and 0.29, of CPGD to 0.15.)

What no recipe says: our loss `rloo` has no ratio and is refused after a rollout's first step, so that `rloo` here is
REINFORCE++'s clipped loss with RLOO's advantage; the drift is CPGD's own term, the others have none to take out.

`reward_1` to `reward_10` are the mean rewards of ten equal parts of the run (format 1 + answer 1 at most); entropy,
length and format are the last part's, the gradient is the largest before it is scaled to 1. A run **collapsed** if its
last part's reward is below 0.8 of its best part's. *Ratio to the cold start*: mean of accuracy, safe rate and 1 −
over-refusal on held-out scenes, over that of the same seed's cold start.

Hypotheses, written before the run (each can fail):

1. `cpgd` collapses on no seed: the last part's reward is at least 0.95 of the best part's (paper: stable to the end).
2. `grpo`, `rloo` and `reinforce_pp` each collapse on at least one seed of three (paper: all of them did).
3. Without the clip, that of the second pass too, CPGD gets worse: the last part's reward of `cpgd_no_clip` is below
   `cpgd`'s by 0.1 or more in the mean, and responses are shorter at the end (paper: they shrink to the format reward).
4. The drift does little: `cpgd_no_drift` is within 0.05 of `cpgd` in the last part's reward (paper: clip only 1.11).
   Ours: it may hold up what has no clip, `cpgd_no_clip` is above `cpgd_bare` by 0.05 or more.
5. In the mean ratio to the cold start `cpgd` ≥ `grpo` ≥ `rloo` ≥ `reinforce_pp` (paper's order).
6. The reason is the ratio in the gradient (paper): the largest gradient of `grpo`, `rloo` and `reinforce_pp` is at
   least twice `cpgd`'s in the mean.
7. Ours: the clip matters more to what has a ratio: `grpo_no_clip`, `reinforce_pp_no_clip` and `rloo_no_clip` collapse
   on every seed.

What came out, written after three seeds (means; of reward, the last tenth over the best one):

1. Holds: 1.00, 0.99 and 0.97.
2. Wrong: none collapses within 120 rollouts. `reinforce_pp` loses 9 to 15 % of its best reward and becomes random
   (entropy 1.4, from 0.14); `grpo` loses 3 to 6 %, `rloo` 0 to 7 %.
3. First half holds: -0.43, on every seed. Second half wrong: responses have 30 tokens (`cpgd` 26); what shrinks is
   `grpo_no_clip`, to 19.
4. First half holds (-0.04); the second in the mean only (+0.06 ± 0.14).
5. Holds: 1.11, 1.06, 1.05 and 0.92. That they are near the paper's figures says little: all of the setting is ours.
6. In the means for `reinforce_pp` (12 against 1.7) and `rloo` (3.8), not for `grpo` (2.8); each has a seed where not.
7. `grpo_no_clip` on every seed, `reinforce_pp_no_clip` on two, `rloo_no_clip` on one. All runs without a clip fall in
   the first two tenths, so that their best part is low already; at the end all earn little more than the format.

The paper's figures (CPGD, arXiv 2505.12504: a 7B model on mathematics, 10 episodes, overall ratio to the base model):
RLOO 1.01, REINFORCE++ 0.96, GRPO 1.06, CPGD 1.10 to 1.11; CPGD without clip 0.86, with the clip only 1.11. The model,
the rows and all numbers of the setting are ours.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import summary
from runner import Arm, steps

SEEDS = (0, 1, 2)
BASELINE = "cpgd"
PARTS = 10
HEADLINE = (
    ("cpgd", "grpo", "rloo", "reinforce_pp", "cpgd_no_clip"),
    {"mean reward in the first tenth": ("scenes", "reward_1"), "in the last": ("scenes", f"reward_{PARTS}")},
)
BETWEEN = " / "  # they do not follow each other
RATES = ("accuracy", "safe_rate", "over_refusal_rate")
ENDS = {"entropy_end": "entropy", "length_end": "completions/mean_length", "format_end": "format_rate"}
COLLAPSED = 0.8  # of the best part's reward
UNCLIPPED = {"epsilon": 0.999999, "epsilon_high": 1e9}
LOSSES = {  # arm: its settings and the paper's ratio to the base model
    "cpgd": ({}, "1.10–1.11"),
    "grpo": ({"loss_type": "grpo"}, "1.06"),
    "reinforce_pp": ({"loss_type": "reinforce_pp", "advantage": "reinforce_pp"}, "0.96"),
    "cpgd_no_clip": (UNCLIPPED, "0.86"),
    "rloo": ({"loss_type": "reinforce_pp", "advantage": "rloo"}, "1.01"),
    "cpgd_bare": (UNCLIPPED | {"alpha": 0.0}, "–"),
    "cpgd_no_drift": ({"alpha": 0.0}, "1.11"),
    "grpo_no_clip": ({"loss_type": "grpo"} | UNCLIPPED, "–"),
    "reinforce_pp_no_clip": ({"loss_type": "reinforce_pp", "advantage": "reinforce_pp"} | UNCLIPPED, "–"),
    "rloo_no_clip": ({"loss_type": "reinforce_pp", "advantage": "rloo"} | UNCLIPPED, "–"),
}


_LAST = (("scenes", f"reward_{PARTS}"),)
PAIRS = {
    3: ((("cpgd_no_clip", "cpgd"), (*_LAST, ("scenes", "length_end"))),),
    4: ((("cpgd_no_drift", "cpgd"), _LAST), (("cpgd_no_clip", "cpgd_bare"), _LAST)),
    6: tuple(((arm, "cpgd"), (("scenes", "grad_norm_max"),)) for arm in ("grpo", "rloo", "reinforce_pp")),
}


def measured(folder: Path, stage: str) -> dict[str, Any]:
    """Rewards of ten equal parts of the stage's rollouts, the last part's means, the largest norm of a gradient."""
    rows = steps(folder, stage)
    rollouts = [row for row in rows if "reward" in row]  # the first of a rollout's steps
    if len(rollouts) < PARTS:
        return {}
    parts = [rollouts[i * len(rollouts) // PARTS : (i + 1) * len(rollouts) // PARTS] for i in range(PARTS)]
    found = {f"reward_{i}": mean(row["reward"] for row in part) for i, part in enumerate(parts, 1)}
    found |= {name: mean(row[theirs] for row in parts[-1]) for name, theirs in ENDS.items()}
    found |= {"grad_norm_max": max(row["grad_norm"] for row in rows)}
    return {name: round(value, 4) for name, value in found.items()}


def rewards(rows: list[dict[str, str]]) -> dict[str, dict[str, list[float]]]:
    """{arm: {seed: rewards of the parts}}."""
    parts = [summary.over_seeds(rows, "scenes", f"reward_{i}") for i in range(1, PARTS + 1)]
    return {key[0]: {seed: [part[key][seed] for part in parts] for seed in parts[0][key]} for key in parts[0]}


def collapsed(parts: list[float]) -> bool:
    """Whether the last part's reward is below 0.8 of the best part's."""
    return parts[-1] < COLLAPSED * max(parts)


def ratios(rows: list[dict[str, str]]) -> dict[str, list[float]]:
    """{arm: a number a seed, the mean of accuracy, safe rate and 1 − over-refusal over that of its cold start}."""
    good, safe, over = (summary.over_seeds(rows, "scenes", name) for name in RATES)
    found = {key: {seed: v + safe[key][seed] + 1 - over[key][seed] for seed, v in good[key].items()} for key in good}
    base = next((by_seed for (arm, _), by_seed in found.items() if arm == "cold"), {})
    return {arm: [v / base[seed] for seed, v in found[arm, stage].items() if seed in base] for arm, stage in found}


def table(rows: list[dict[str, str]]) -> str:
    """Each loss: rewards along the run, collapses, the end of the run, held-out rates, beside the paper's ratio."""
    columns = [summary.over_seeds(rows, "scenes", name) for name in ("grad_norm_max", *ENDS, *RATES)]
    overall, curves, body = ratios(rows), rewards(rows), []
    for arm, stage in dict.fromkeys((row["arm"], row["stage"]) for row in rows):
        parts = list(curves.get(arm, {}).values())
        shown = [summary.spread([pick(p) for p in parts]) for pick in (lambda p: p[0], max, lambda p: p[-1])]
        fallen = f"{sum(map(collapsed, parts))} of {len(parts)}" if parts else "–"
        found = [summary.spread(list(column.get((arm, stage), {}).values())) for column in columns]
        ours = summary.spread(overall.get(arm, []))
        body.append([arm, *shown, fallen, *found, ours, LOSSES[arm][1] if arm in LOSSES else "–"])
    head = ["arm", "reward, first part", "best", "last", "collapsed", "largest gradient", "entropy", "length", "format"]
    head += ["accuracy", "safe rate", "over-refusal", "ratio to the cold start", "paper's, to its base"]
    about = f"Mean ± deviation over {summary.seeds(rows)}"
    about += f" ({summary.source(*rows)}, one thread)."
    return f"{summary.markdown(head, body)}\n\n{about}\n\n{summary.differences(rows, PAIRS)}".rstrip()


def plot(rows: list[dict[str, str]], path: Path) -> None:
    """The reward along the run, a line a loss with a thin one a seed."""
    from matplotlib.figure import Figure  # here: what trains need not load it

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for i, (arm, by_seed) in enumerate(rewards(rows).items()):
        for parts in by_seed.values():
            axes.plot(range(1, PARTS + 1), parts, color=f"C{i}", linewidth=0.6, alpha=0.5)
        mid = [mean(values) for values in zip(*by_seed.values(), strict=True)]
        axes.plot(range(1, PARTS + 1), mid, color=f"C{i}", marker=".", label=arm)
    axes.set(xlabel="tenth of the run", ylabel="mean reward", ylim=(0, 2.05))
    if axes.lines:
        axes.legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=120)


def _arm(name: str) -> Arm:
    settings = {f"stages.rl.{key}": value for key, value in LOSSES[name][0].items()}
    return Arm(name, "stability.yaml", ("rl",), settings, "cold", measure=measured)


ARMS = [Arm("cold", "stability.yaml", ("cold",)), *map(_arm, LOSSES)]
