"""Tables of benchmarks/results as Markdown, put between the marks `<!-- NAME -->` and `<!-- /NAME -->` of README.md.

    python benchmarks/plot.py [--check]

--check changes nothing and fails when README.md is not what the result files say.
"""

import argparse
import csv
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
RATES = (("accuracy", "accuracy"), ("safe_rate", "safe rate"), ("over_refusal_rate", "over-refusal"))


def demo_table() -> str:
    """One row a rate on held-out scenes, the three seeds in a cell, a column a stage; then the time and the device."""
    runs = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("demo-seed-*.json"))]
    stages = [stage["name"] for stage in runs[0]["stages"]]
    lines = [
        "| held-out scenes, seeds " + ", ".join(str(run["seed"]) for run in runs) + " | " + " | ".join(stages) + " |"
    ]
    lines.append("|---" * (len(stages) + 1) + "|")
    for key, name in RATES:
        cells = [
            " / ".join(f"{run['stages'][i]['splits']['scenes'][key]:.2f}".lstrip("0") for run in runs)
            for i in range(len(stages))
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
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


def loss_table() -> str:
    """The policy loss against its rivals: time as a ratio to three bare products, for every case measured."""
    with (RESULTS / "linear_policy_loss.csv").open() as file:
        rows = list(csv.DictReader(file))
    cases: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        cases.setdefault((row["case"], row["dtype"], row["n"], row["d"], row["v"]), {})[row["provider"]] = row
    providers = [name for name in dict.fromkeys(row["provider"] for row in rows) if name != "floor"]
    lines = ["| case, dtype, N × d × V | " + " | ".join(providers) + " |", "|---" * (len(providers) + 1) + "|"]
    for (case, dtype, n, d, v), found in cases.items():
        cells = [f"{float(found[p]['floor_ratio']):.2f}" if p in found else "–" for p in providers]
        lines.append(f"| {case}, {dtype}, {n} × {d} × {v} | " + " | ".join(cells) + " |")
    lines.append("")
    lines.append(
        "Time over that of the bare matrix products that the case needs, medians "
        f"({rows[0]['device']}, torch {rows[0]['torch']})."
    )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail when README.md differs from the results")
    options = parser.parse_args()
    readme = ROOT / "README.md"
    text = before = readme.read_text()
    for name, table in (("demo", demo_table()), ("loss", loss_table())):
        mark = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text = mark.sub(lambda match, table=table: f"{match[1]}\n{table}\n\n{match[2]}", text)
    if options.check:
        return int(text != before)
    readme.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
