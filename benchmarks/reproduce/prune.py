"""# Training and evaluating with pruned vision tokens

`make reproduce-prune` runs this table: pictures of 392 × 392 of the embedded world, 196 vision tokens, of which an
object fills 1 (questions about several objects) or 4 (one object, all safety rows); 3 seeds. The arms of a seed share a
cold start: `small` learns to see on pictures of 56 × 56, `cold` where to look on large ones. `unpruned`, 60 steps of
mixed RL without pruning, is the baseline; `SELECTOR-50` and `SELECTOR-25` do the same, and are evaluated, at that keep
(per cent). `sweep` trains nothing: it evaluates the unpruned policy of its seed under every selector and keep, before
the language model and, where a name has `@2`, in its layer 2. The rows are a split of scenes and one of clips, four
frames of 196 × 196 in which one object moves; of them it also says which share of the tokens that differ from the frame
before is kept.

Hypotheses, written before the run (each can fail):

1. Evaluation only: `max_min` keeps accuracy and safe rate within 0.05 of unpruned at 50 %, because objects differ from
   the ground; `random` and `uniform` lose about the share of the tokens that they drop wherever an object is 1 token.
2. `attention` before the language model (layer 0) is no better than `random`: nothing has been looked for yet. In layer
   2 (`attention@2`) it is the best at 25 and 11 %.
3. `dpp` is close to `max_min`; `key_norm` is below `random` on some seed.
4. Training with pruning closes at least half of what evaluation only loses, for every selector, in safe rate; for
   `random` and `uniform` it does so by answering safety rows from the text, so that over-refusal rises.
5. At 50 % `uniform` is within 0.05 of `max_min` on safety rows, whose objects fill 4 tokens: simple selectors are
   enough for what is large.
6. A step at 25 % takes at most 0.7 of the unpruned step. (Keys and values shrink with what is kept: no hypothesis.)
7. On clips at 25 and 11 %, `frame_difference` is the best selector, because what moves is what is asked about.

What came out, written after the run (means over three seeds; differences are paired):

1. Holds for `max_min` at 50 % (-0.03, +0.01). Of `uniform` and `random` it is not decided: no column has the questions
   about objects of one token alone. They lose 0.16 of accuracy each, 0.26 and 0.22 of safe rate, where both end at
   0.36 and 0.38 with 11 % of the tokens: about half of what there is to lose.
2. Wrong in its first half: before the language model `attention` is as good as `max_min`, 0.13 above `random` at 50 %
   and 0.19 at 25 %. Its second half: in layer 2 it is first at 25 and 11 %, by 0.01 to 0.03, within the deviations, and
   for more keys and values than `max_min` takes at 50 % (245 and 218 against 196 KiB), which is as good or better.
3. Holds for `dpp`. `key_norm` is never below `random` before the language model; in layer 2 it is on two of three seeds
   at 50 %, and at 75 % already as bad as at 11 % on two of three: the first quarter that it drops costs everything
   there.
4. Holds for `max_min` (-0.04 becomes -0.01 at 25 %) and `attention`. Wrong for `random` (no gain) and `uniform` (0.03
   and 0.06 of 0.26 and 0.36); their over-refusal rises, from about 0.33 to 0.49 at 50 and from about 0.37 to 0.81 at 25
   %, means of both.
5. Wrong: 0.56 to 0.59 against 0.83. On scenes the only advantage of `uniform` and `random` is speed. On clips `uniform`
   is above `max_min` at 25 % (0.29, 0.25), within the deviations.
6. Not decided: 0.63, 0.68, 0.73 and 0.81 (`uniform`, `random`, `max_min`, `attention`), measured two arms side by side
   with other work on the machine; from seed to seed a ratio moves by up to 0.3.
7. Holds: 0.46 at 25 % and 0.36 at 11 %, the next 0.32 and 0.30, `attention@2`. At 50 % it is 0.51, above all tokens
   (0.34). But the policy has barely learned to answer questions about clips: naming one of the things in sight, or any
   corner, is right in about 0.3 of them, and 120 clips a seed have an error of 0.04. Trained with 25 %, clip accuracy
   falls by 0.04 to 0.06 (`max_min`, `attention`).
"""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import summary
from runner import Arm, steps

SEEDS = (0, 1, 2)
BASELINE = "unpruned"
TRAINED = ("uniform", "random", "max_min", "attention")
KEEPS = (0.75, 0.5, 0.25, 0.11)
LAYERS = 4
KV_KIB = 2 * 196  # of a picture: 4 layers × 2 heads × 32 × (key, value) × 4 bytes a token
SWEPT = [(selector, 0) for selector in (*TRAINED, "dpp", "key_norm")] + [("attention", 2), ("key_norm", 2)]


def name(selector: str, keep: float, layer: int = 0) -> str:
    """``max_min-25``, ``attention@2-25``."""
    return f"{selector}{f'@{layer}' if layer else ''}-{round(100 * keep)}"


def vision_kv(kept: float, layer: int = 0) -> float:
    """KiB of keys and values of a prompt's 196 vision tokens, of which a share is ``kept`` from a layer on."""
    return round(KV_KIB * (layer + (LAYERS - layer) * kept) / LAYERS, 1)


def measured(folder: Path, stage: str) -> dict[str, Any]:
    """Medians over the stage's steps; ``kv_mib`` is what the sampler's store took, responses included."""
    rows = steps(folder, stage)
    names = {"step_s": "step_time", "sample_s": "timing_s/sample", "update_s": "timing_s/update",
             "kv_mib": "perf/kv_mib", "vision_kept": "perf/vision_tokens_kept"}  # fmt: skip
    found = {ours: [row[theirs] for row in rows if row.get(theirs) is not None] for ours, theirs in names.items()}
    medians = {ours: round(median(values), 4) for ours, values in found.items() if values}
    return medians | {"vision_kv_kib": vision_kv(medians.get("vision_kept", 1.0))}


def _arm(selector: str, keep: float) -> Arm:
    pruned = {"vision_prune": {"selector": selector, "keep": keep}}
    return Arm(name(selector, keep), "prune.yaml", ("rl",), pruned, "cold", measure=measured)


ARMS = [
    Arm("small", "prune.yaml", ("small",), {"eval.limit": 60}, measure=measured),
    Arm("cold", "prune.yaml", ("large",), start="small", measure=measured),
    Arm(BASELINE, "prune.yaml", ("rl",), start="cold", measure=measured),
    *(_arm(selector, keep) for selector in TRAINED for keep in (0.5, 0.25)),
    Arm("sweep", start=BASELINE, program="prune_sweep.py"),
]


def table(rows: list[dict[str, str]]) -> str:
    """Each arm and swept setting beside the unpruned policy, without `small`, which has seen no large picture."""
    order, where = {arm.name: place for place, arm in enumerate(ARMS)}, summary.source(*rows)
    rows = sorted((row for row in rows if row["arm"] != "small"), key=lambda row: order.get(row["arm"], len(order)))
    metrics = ["accuracy", "safe_rate", "over_refusal_rate"]
    base = ("unpruned", "rl")
    costs = {metric: summary.over_seeds(rows, "scenes", metric) for metric in ("step_s", "vision_kv_kib")}
    scenes = summary.cells(rows, "scenes", metrics, base)
    clips = summary.cells(rows, "clips", metrics[:1], base)
    moving = summary.over_seeds(rows, "clips", "changed_kept")
    body = []
    for arm, stage in [*scenes, *(key for key in clips if key not in scenes)]:
        found = scenes.get((arm, stage), ["–"] * 6)
        shown = f"{stage}, evaluated only" if arm == "sweep" else arm if arm != "cold" else f"cold start, {stage}"
        cost = [summary.spread(list(costs[m].get((arm, stage), {}).values())) for m in costs]
        changed = summary.spread(list(moving.get((arm, stage), {}).values()))
        body.append([shown, *found, *clips.get((arm, stage), ["–"] * 2), changed, *cost])
    head = ["arm", "accuracy", "Δ", "safe rate", "Δ", "over-refusal", "Δ", "clips: accuracy", "Δ"]
    head += ["changed tokens kept", "step s", "KV KiB"]
    about = f"Mean ± deviation over {summary.seeds(rows)}; Δ: paired difference to `unpruned`; "
    about += "KV: of a prompt's vision tokens"
    return f"{summary.markdown(head, body)}\n\n{about} ({where}, one thread)."
