"""Tables of benchmarks/results as Markdown, put between the marks `<!-- NAME -->` and `<!-- /NAME -->` of README.md and
of benchmarks/results/README.md; and benchmarks/results/reproduce/TABLE.md, whose header, table and picture are those
that the module of the table makes of TABLE.csv.

    python benchmarks/plot.py [--check]

--check changes nothing and fails when one of the texts is not what the result files say. A mark whose result file is
not there keeps what it has.
"""

import argparse
import csv
import importlib
import json
import re
import sys
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks" / "reproduce"))

import runner  # noqa: E402
from summary import by_arm, markdown, source  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
RATES = (("accuracy", "accuracy"), ("safe_rate", "safe rate"), ("over_refusal_rate", "over-refusal"))
PLAIN_CASES = ("full", "half_zero")
HEADLINE = ("update", "step")  # phases of train.csv
PER_PROMPT = 8  # responses to each prompt in prefix_attention.csv, whose g counts them over all prompts
YARDSTICKS = ("floor", "floor_reused", "full")  # rows that others are measured by


def _number(value: str | float) -> str:
    """Short enough to read: two decimals, or three digits below a tenth."""
    x = float(value)
    return f"{x:.0f}" if abs(x) >= 100 else f"{x:.2f}" if abs(x) >= 0.1 or x == 0 else f"{x:.3g}"


def demo_table(paths: list[Path]) -> str:
    """One row a rate on held-out scenes, the three seeds in a cell, a column a stage; then the time and the device."""
    runs = [json.loads(path.read_text()) for path in paths]
    stages = [stage["name"] for stage in runs[0]["stages"]]
    body = []
    for key, name in RATES:
        cells = [
            " / ".join(f"{run['stages'][i]['splits']['scenes'][key]:.2f}".lstrip("0") for run in runs)
            for i in range(len(stages))
        ]
        body.append([name, *cells])
    lines = [markdown(["held-out scenes, seeds " + ", ".join(str(run["seed"]) for run in runs), *stages], body)]
    timed = max(runs, key=lambda run: int(run["environment"]["threads"]))
    seconds = sum(stage["seconds"] for stage in timed["stages"])
    about = timed["environment"]
    lines.append("")
    lines.append(
        f"Training alone took {seconds:.0f} s with seed {timed['seed']} on {about['threads']} threads "
        f"({about['device']}, {about['versions']})."
    )
    for split, what in (("concepts", "held-out objects"), ("intents", "held-out harmful intents")):
        pairs = [run["stages"][-1]["splits"][split] for run in runs]
        cells = " / ".join(f"{p['safe_rate']:.2f} and {p['over_refusal_rate']:.2f}" for p in pairs)
        lines.append(f"On {what} the last stage refuses {cells} (harmful, benign): no bar is set there yet.")
    return "\n".join(lines)


def _ratio(row: dict, reused: dict | None) -> str:
    """Time over the bare products with fresh outputs; in brackets over those with outputs that exist."""
    bracket = f" ({_number(float(row['ms_p50']) / float(reused['ms_p50']))})" if reused else ""
    return _number(row["floor_ratio"]) + bracket


def _beside_full(cases: dict[tuple, dict[str, dict]]) -> str:
    """A sentence on our time in `grpo` and `advantage` over that of `full` in the same run."""
    shares: dict[str, list[str]] = {}
    for (case, dtype, n, d, v), found in cases.items():
        if {"full", "cosmo_fast"} <= set(found):
            share = float(found["cosmo_fast"]["ms_p50"]) / float(found["full"]["ms_p50"])
            figure = f"{share * 100:.3g} %" if case == "advantage" else f"{share:.3f} ×"
            shares.setdefault(case, []).append(f"{figure} ({dtype}, {n} × {d} × {v})")
    parts = [f"`{case}` takes {', '.join(figures)}" for case, figures in shares.items()]
    return f"\n\nBeside the policy loss on the same tokens, in the same run: {'; '.join(parts)}." if parts else ""


def _cases_table(rows: list[dict]) -> str:
    """Time as a ratio to the bare products by provider, and ours beside eager in memory and error; "" without rows."""
    if not rows:
        return ""
    cases: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        cases.setdefault((row["case"], row["dtype"], row["n"], row["d"], row["v"]), {})[row["provider"]] = row
    providers = [name for name in dict.fromkeys(row["provider"] for row in rows) if name not in YARDSTICKS]
    body = []
    for (case, dtype, n, d, v), found in cases.items():
        cells = [_ratio(found[p], found.get("floor_reused")) if p in found else "–" for p in providers]
        peaks = " / ".join(f"{float(found[p]['peak_mib']):.0f}" if p in found else "–" for p in ("cosmo_fast", "eager"))
        error = _number(found["cosmo_fast"]["error_ratio"]) if "cosmo_fast" in found else "–"
        body.append([f"{case}, {dtype}, {n} × {d} × {v}", *cells, peaks, error])
    head = ["case, dtype, N × d × V", *(name.replace("_", " ") for name in providers)]
    table = markdown([*head, "peak MiB, ours / eager", "error, ours ÷ eager"], body)
    what = (
        "Time over that of the bare matrix products, medians: first with fresh outputs, as any autograd code makes "
        f"them, in brackets into memory that exists already ({source(rows[0])})."
    )
    return f"{table}\n\n{what}{_beside_full(cases)}"


def loss_table(rows: list[dict]) -> str:
    """The policy loss against its rivals."""
    return _cases_table([row for row in rows if row["case"] in PLAIN_CASES])


def other_cases_table(rows: list[dict]) -> str:
    """Rewards to gradients, advantages (their share of `full`), scores without gradient, the exact KL."""
    return _cases_table([row for row in rows if row["case"] not in PLAIN_CASES])


def memory_table(rows: list[dict]) -> str:
    """Peak MiB over N beside what is expected of ours."""
    body = [
        [row["n"], row["dtype"], row["provider"], f"{float(row['peak_mib']):.0f}", f"{float(row['expected_mib']):.0f}"]
        for row in rows
    ]
    table = markdown(["N", "dtype", "provider", "peak MiB", "expected MiB"], body).replace(" nan |", " – |")
    first = rows[0]
    what = (
        f"Beyond inputs and dX, d {first['d']}, V {first['v']}, chunk_rows {first['chunk_rows']}; expected: one chunk "
        f"of logits and dW, which is in the dtype for one chunk and in fp32 for several ({source(first)})."
    )
    return f"{table}\n\n{what}"


def growth_table(rows: list[dict]) -> str:
    """Time over the bare products at the same N, over N and chunk_rows."""
    ours = [row for row in rows if row["provider"] != "floor"]
    counts = list(dict.fromkeys(row["n"] for row in ours))
    found: dict[tuple, dict[str, dict]] = {}
    for row in ours:
        found.setdefault((row["dtype"], row["chunk_rows"]), {})[row["n"]] = row
    body = [
        [f"{dtype}, chunk_rows {size}", *(_number(by[n]["floor_ratio"]) if n in by else "–" for n in counts)]
        for (dtype, size), by in found.items()
    ]
    what = f"Time over that of the bare products at the same N, d {rows[0]['d']}, V {rows[0]['v']}"
    return markdown(["÷ bare products", *(f"N {n}" for n in counts)], body) + f"\n\n{what} ({source(rows[0])})."


def _beside_ours(rows: list[dict], keys: list[str]) -> tuple[list[str], list[list[str]]]:
    """(providers, a row a case: its keys, ours in ms, every other's time over ours); only cases that we are in."""
    cases: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        cases.setdefault(tuple(row[key] for key in keys), {})[row["provider"]] = row
    others = [name for name in dict.fromkeys(row["provider"] for row in rows) if name != "cosmo_fast"]
    body = []
    for case, found in cases.items():
        if "cosmo_fast" in found:
            ours = float(found["cosmo_fast"]["ms_p50"])
            ratios = [f"{_number(float(found[p]['ms_p50']) / ours)} ×" if p in found else "–" for p in others]
            body.append([*case, f"{_number(ours)} ms", *ratios])
    return others, body


def train_table(rows: list[dict]) -> str:
    """One GRPO step, and the update in it."""
    rows = [row for row in rows if row["case"].startswith("vision_") and row["phase"] in HEADLINE]
    return f"{_train_table(rows)}{_best_dtypes(rows)}"


def train_phases_table(rows: list[dict]) -> str:
    """The other phases and the update's parts, and the peak memory of the update."""
    others = [r for r in rows if ":" in r["case"] or (r["case"].startswith("vision_") and r["phase"] not in HEADLINE)]
    peaks: dict[str, list[str]] = {}
    for row in rows:
        if row["case"].startswith("vision_") and row["phase"] == "update" and row["peak_mib"] != "nan":
            found = peaks.setdefault(f"{row['case']}, {row['dtype']}", [])
            found.append(f"{row['provider']} {float(row['peak_mib']):.0f}")
    told = "; ".join(f"{case}: {', '.join(found)}" for case, found in peaks.items())
    memory = f"Peak MiB of an update, beyond weights, gradients and optimiser states: {told}."
    return f"{_train_table(others)} {memory}"


def _train_table(rows: list[dict]) -> str:
    others, body = _beside_ours(rows, ["case", "phase", "dtype"])
    first = rows[0]
    what = f"P {first['p']}, G {first['g']}, R {first['r']}; the others' time over ours in the same dtype"
    table = markdown(["case", "phase", "dtype", "cosmo fast", *(name.replace("_", " ") for name in others)], body)
    return f"{table}\n\n{what} ({source(first)})."


def _best_dtypes(rows: list[dict]) -> str:
    """A sentence on ours in its better dtype beside the others in theirs, which need not be the same."""
    best: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        found = best.setdefault((row["case"], row["phase"]), {})
        found[row["provider"]] = min(float(row["ms_p50"]), found.get(row["provider"], float("inf")))
    shown = []
    for (case, phase), found in best.items():
        ratios = [f"{p} {_number(ms / found['cosmo_fast'])}" for p, ms in found.items() if p in ("padded", "trl")]
        shown.append(f"{case}, {phase}: {', '.join(ratios)}")
    return f" Each in the dtype that is faster for it: {'; '.join(shown)}." if shown else ""


def train_growth_table(rows: list[dict]) -> str:
    """The update over P, G and R."""
    rows = [row for row in rows if row["case"] == "growth"]
    others, body = _beside_ours(rows, ["p", "g", "r"]) if rows else ([], [])
    return markdown(["P", "G", "R", "cosmo fast", *(name.replace("_", " ") for name in others)], body) if body else ""


def attention_table(rows: list[dict]) -> str:
    """Attention alone, beside the causal pairs that sharing the prompt saves."""
    keys = ["p", "r", "g", "heads", "kv_heads", "head_size", "dtype"]
    others, body = _beside_ours(rows, keys)
    error = {tuple(row[k] for k in keys): row["error_ratio"] for row in rows if row["provider"] == "cosmo_fast"}
    for cells in body:
        p, r, g, *_ = case = tuple(cells[: len(keys)])
        pairs = "–"
        if r.isdigit():
            p, r, each = int(p), int(r), PER_PROMPT
            shared = p * (p + 1) / 2 + each * (r * p + r * (r + 1) / 2)
            pairs = f"{_number(each * (p + r) * (p + r + 1) / 2 / shared)} ×"
        cells += [pairs, _number(error[case])]
    names = [*keys[:4], "kv heads", "head size", "dtype", "cosmo fast", *(name.replace("_", " ") for name in others)]
    table = markdown([*names, "causal pairs", "error ÷ sdpa's"], body)
    return f"{table}\n\nForward + backward (`decode`: forward); the others' time over ours ({source(rows[0])})."


def plain_table(rows: list[dict]) -> str:
    """Every column of a result file as it is; what is the same in all rows stands below."""
    same = {k: v for k, v in rows[0].items() if len(rows) > 1 and all(row[k] == v for row in rows)}
    head = [name for name in rows[0] if name not in same]
    below = ", ".join(f"{name} {value}" for name, value in same.items())
    table = markdown([name.replace("_", " ") for name in head], [[row[name] for name in head] for row in rows])
    return f"{table}\n\n{below[:1].upper()}{below[1:]}." if below else table


def selection_table(rows: list[dict]) -> str:
    """Time of every selector, the others' over ours, and its share of the prefill that it shortens."""
    prefill = {row["dtype"]: float(row["ms_p50"]) for row in rows if row["selector"] == "prefill"}
    others, body = _beside_ours([row for row in rows if row["selector"] != "prefill"], ["selector", "dtype"])
    for cells in body:
        cells.append(f"{float(cells[2].removesuffix(' ms')) / prefill[cells[1]]:.2%}")
    head = ["selector", "dtype", "cosmo fast", *(name.replace("_", " ") for name in others), "share of the prefill"]
    n, k, d = (rows[0][name] for name in ("n", "k", "d"))
    return f"{markdown(head, body)}\n\n{k} of {n} rows of {d}; the others' time over ours ({source(rows[0])})."


TABLES = {  # mark: (result file, its table)
    "loss": ("linear_policy_loss.csv", loss_table),
    "loss-cases": ("linear_policy_loss.csv", other_cases_table),
    "loss-memory": ("linear_policy_loss_memory.csv", memory_table),
    "loss-growth": ("linear_policy_loss_growth.csv", growth_table),
    "loss-cuda": ("linear_policy_loss_cuda.csv", _cases_table),
    "bandwidth-cuda": ("linear_policy_loss_bandwidth_cuda.csv", plain_table),
    "attention": ("prefix_attention.csv", attention_table),
    "train": ("train.csv", train_table),
    "train-phases": ("train.csv", train_phases_table),
    "train-growth": ("train.csv", train_growth_table),
    "attention-cuda": ("prefix_attention_cuda.csv", attention_table),
    "tolerance": ("row_tolerance.csv", plain_table),
    "selection": ("vision_prune.csv", selection_table),
}


def tables(results: Path = RESULTS) -> dict[str, str]:
    """Mark to table, for the result files that exist."""
    made = {}
    if seeds := sorted(results.glob("demo-seed-*.json")):
        made["demo"] = demo_table(seeds)
    for mark, (name, table) in TABLES.items():
        if (results / name).exists():
            with (results / name).open(newline="") as file:
                made[mark] = table(list(csv.DictReader(file)))
    made["reproduce"] = headlines(results)
    return {mark: text for mark, text in made.items() if text}


def headlines(results: Path) -> str:
    """A line a reproduction: what its module's HEADLINE names, from arm to arm, means over the seeds that all have."""
    lines = []
    for name in runner.tables():
        module, rows = importlib.import_module(name), runner.read(results / "reproduce" / f"{name}.csv")
        arms, shown = getattr(module, "HEADLINE", ((), {}))
        between = getattr(module, "BETWEEN", " → ")
        seeds = set.intersection(*({row["seed"] for row in rows if row["arm"] == arm} for arm in arms)) if arms else ()
        told = []
        for label, where in shown.items() if seeds else ():
            found = by_arm(rows, *where)
            means = (mean(found[arm][seed] for seed in seeds) for arm in arms)
            told.append(f"{label} {between.join(f'{value:.2f}'.lstrip('0') for value in means)}")
        if told:
            title = module.__doc__.splitlines()[0].removeprefix("# ").partition(":")[0]
            where = f"[{title}](benchmarks/results/reproduce/{name}.md), {between.join(f'`{arm}`' for arm in arms)}"
            lines.append(f"- {where}, {len(seeds)} seeds: {', '.join(told)}.")
    return "\n".join(lines)


def reproductions(results: Path = RESULTS, *, draw: bool = False) -> dict[Path, str]:
    """What TABLE.md is to hold, for the tables with rows; ``draw`` makes their pictures anew."""
    made = {}
    for name in runner.tables():
        path = results / "reproduce" / f"{name}.csv"
        if rows := runner.read(path):
            module, picture = importlib.import_module(name), path.with_suffix(".png")
            order = {arm.name: place for place, arm in enumerate(module.ARMS)}
            rows.sort(key=lambda row, order=order: order[row["arm"]])
            if draw and hasattr(module, "plot"):
                module.plot(rows, picture)
            shown = f"\n\n![Figures of the table {name}]({picture.name})" if picture.is_file() else ""
            made[path.with_suffix(".md")] = runner.page(name, module.__doc__, f"\n{module.table(rows)}{shown}\n\n")
    return made


def main() -> int:
    """Rewrites the texts, or checks them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail when a text differs from the results")
    options = parser.parse_args()
    made, texts = tables(), reproductions(draw=not options.check)
    for path in (ROOT / "README.md", RESULTS / "README.md"):
        text = path.read_text()
        for name, table in made.items():
            mark = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
            text = mark.sub(lambda match, table=table: f"{match[1]}\n{table}\n\n{match[2]}", text)
        texts[path] = text
    differ = False
    for path, text in texts.items():
        differ |= not path.is_file() or path.read_text() != text
        if not options.check:
            path.write_text(text)
    return int(options.check and differ)


if __name__ == "__main__":
    sys.exit(main())
