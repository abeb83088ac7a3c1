"""Runs the arms of a table, two single-threaded processes side by side, and files what each of them measured.

    python benchmarks/reproduce/runner.py prune [--arm NAME] [--seed N] [--jobs 2] [--list | --dry-run]

A table is a module of this folder: its docstring states the hypotheses, written before the run; ``SEEDS``, ``ARMS`` and
``BASELINE`` say what is run and what it is compared with, ``MORE`` which arms run with further seeds, too. When an arm
ends, a row for each stage and split is in benchmarks/results/reproduce/TABLE.csv (``arm, seed, stage, split``, metrics,
``n``, where it ran); the docstring is in TABLE.md beside it, so that the CSV has no comment lines; benchmarks/plot.py
adds what the module's ``table(rows)`` returns and, where it has a ``plot(rows, path)``, TABLE.png. An arm with rows is
not run again: take its rows out to repeat it (but one that others need is, and its rows are replaced, where its run is
gone). One that was stopped goes on from its last checkpoint in ``--runs`` (runs/reproduce), if its settings are what
they were. An arm that fails shows the end of its log; the others go on, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import hashlib
import importlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "reproduce"
KEYS = ("arm", "seed", "stage", "split")
METRICS = (
    "accuracy", "safe_rate", "over_refusal_rate", "warn_rate", "helpful_rate", "value_rate", "knowledge_rate",
    "instruction_rate", "false_certain_rate", "verdict_accuracy", "format_rate", "mean_length",
)  # fmt: skip
WHERE = ("device", "threads", "torch", "commit")
TAIL = 30  # lines of a failed arm's log that are shown


@dataclass(frozen=True, eq=False)
class Arm:
    """One run a seed.

    recipe: a YAML file of this folder, of which it runs ``stages`` (by default all). settings: its overrides,
    ``{"stages.rl.max_steps": 60}``. start: the arm whose final model it starts from. needs: further arms of the same
    seed that have to end before; in settings ``{NAME}`` is the run folder of one of them. program: what is run instead
    of training, a script of this folder that takes ``MODEL OUTPUT_DIR --seed N`` and leaves a summary.json as training
    does. measure: further columns, from the run folder and a stage's name.
    """

    name: str
    recipe: str = ""
    stages: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    start: str | None = None
    needs: tuple[str, ...] = ()
    program: str = ""
    measure: Callable[[Path, str], dict[str, Any]] | None = None

    @property
    def after(self) -> tuple[str, ...]:
        """Arms that end before this one begins."""
        return ((self.start,) if self.start else ()) + self.needs


@dataclass(frozen=True, eq=False)
class Job:
    """An arm with a seed, and the folder of its run."""

    arm: Arm
    seed: int
    runs: Path

    @property
    def name(self) -> str:
        return f"{self.arm.name}-{self.seed}"

    @property
    def folder(self) -> Path:
        return self.runs / self.name

    @property
    def ended(self) -> bool:
        return (self.folder / "summary.json").is_file()

    @property
    def begun(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        return any(self.folder.glob("checkpoint-*"))

    @property
    def about(self) -> Path:
        """Where :meth:`settings` are while it runs, and after."""
        return self.runs / f"{self.name}.settings"

    @property
    def changed(self) -> bool:
        """Whether its folder holds what other settings made."""
        return (self.ended or self.begun) and not (self.about.is_file() and self.about.read_text() == self.settings())

    def settings(self) -> str:
        """What it is run with: the command, without how it goes on, its recipe or program, and those it needs."""
        skipped = {"--resume_from_checkpoint", "--overwrite_output_dir"}
        command = self.command()[1:]
        kept = [part for i, part in enumerate(command) if not skipped & set(command[max(i - 1, 0) : i + 1])]
        before = [self.runs / f"{name}-{self.seed}.settings" for name in self.arm.after]
        kept += [hashlib.sha256(path.read_bytes()).hexdigest() for path in before if path.is_file()]
        text = "\n".join([*kept, (HERE / (self.arm.program or self.arm.recipe)).read_text()])
        return text.replace(str(self.runs), "RUNS").replace(str(ROOT), "ROOT")

    def command(self) -> list[str]:
        """What runs it, or goes on with it."""
        arm = self.arm
        start = [str(self.runs / f"{arm.start}-{self.seed}")] if arm.start else []
        if arm.program:
            return [sys.executable, str(HERE / arm.program), *start, str(self.folder), "--seed", str(self.seed)]
        chosen = yaml.safe_load((HERE / arm.recipe).read_text())["stages"]
        chosen = {"stages": [stage for stage in chosen if stage["name"] in arm.stages]} if arm.stages else {}
        settings = self._filled(chosen | arm.settings) | {"seed": self.seed, "output_dir": str(self.folder)}
        settings |= {"model_name_or_path": start[0]} if start else {}
        settings |= {"resume_from_checkpoint": True} if self.begun else {"overwrite_output_dir": True}
        flags = [part for key, value in settings.items() for part in (f"--{key}", _flag(value))]
        return [sys.executable, "-m", "cosmo_fast.train", "--config", str(HERE / arm.recipe), *flags]

    def _filled(self, settings: dict[str, Any]) -> dict[str, Any]:
        """``settings`` with the folders of the arms that they name."""
        text = json.dumps(settings)
        for name in self.arm.after:
            text = text.replace(f"{{{name}}}", str(self.runs / f"{name}-{self.seed}"))
        return json.loads(text)


def _flag(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def read(path: Path) -> list[dict[str, str]]:
    """Rows of a result file, none where there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Adds rows, in place of earlier ones of the same arm and seed; readers see the file before or after, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        new = {(row["arm"], str(row["seed"])) for row in rows}
        kept = [row for row in read(path) if (row["arm"], row["seed"]) not in new] + rows
        middle = dict.fromkeys(name for row in kept for name in row if name not in (*KEYS, "n", *WHERE))
        part = path.with_suffix(".part")
        with part.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*KEYS, *middle, "n", *WHERE], restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(kept)
        os.replace(part, path)


def steps(folder: Path, stage: str) -> list[dict[str, Any]]:
    """What a run's metrics.jsonl says of a stage, a step each."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["stage"] == stage]


def splits(folder: Path, stage: str) -> dict[str, dict[str, Any]]:
    """The evaluation after a run's stage."""
    stages = json.loads((folder / "summary.json").read_text())["stages"]
    return next(about["splits"] for about in stages if about["name"] == stage)


def rows_of(job: Job, commit: str) -> list[dict[str, Any]]:
    """What the ended run's summary says, a row a stage and split."""
    summary = json.loads((job.folder / "summary.json").read_text())
    about = summary["environment"]
    where = {
        "device": about["device"],
        "threads": about["threads"],
        "torch": about["versions"].split(",")[0].removeprefix("torch "),
    }
    rows = []
    for stage in summary["stages"]:
        more = job.arm.measure(job.folder, stage["name"]) if job.arm.measure else {}
        more = {"seconds": round(stage["seconds"], 1)} | more | stage.get("measured", {})
        for split, found in stage["splits"].items():
            metrics = {name: "" if found.get(name) is None else round(found[name], 4) for name in METRICS}
            report = found.get("jailbreak", {}).get("attacks", {})
            metrics |= {f"{family}_success": round(rates["success_rate"], 4) for family, rates in report.items()}
            if report:
                metrics["best_of_success"] = round(found["jailbreak"]["best_of"]["success_rate"], 4)
            keys = dict(zip(KEYS, (job.arm.name, job.seed, stage["name"], split), strict=True))
            rows.append(keys | metrics | more | {"n": found["n"]} | where | {"commit": commit})
    return rows


def wanted(arms: Iterable[Arm], names: dict[int, set[str]], filed: set, runs: Path) -> list[Job]:
    """Jobs to run of the ``names`` that are asked for with each seed: seed by seed in the table's order, each after
    those that it needs.

    One that is needed is run again where it is filed but has no model left.
    """
    by_name = {arm.name: arm for arm in arms}
    jobs: dict[str, Job] = {}

    def add(job: Job) -> None:
        for needed in (Job(by_name[name], job.seed, runs) for name in job.arm.after):
            if not needed.ended or needed.changed:
                add(needed)
        jobs.setdefault(job.name, job)

    for seed, those in names.items():
        for name in by_name:
            if name in those and (name, str(seed)) not in filed:
                add(Job(by_name[name], seed, runs))
    return list(jobs.values())


def run(jobs: list[Job], results: Path, at_once: int) -> list[str]:
    """Runs the jobs, always the first whose needs have ended; returns the names of those that failed or were left."""
    names, waiting = {job.name for job in jobs}, list(jobs)
    running: dict[Future[bool], Job] = {}
    ended: dict[str, bool] = {}
    with ThreadPoolExecutor(at_once) as pool:
        while waiting or running:
            for job in list(waiting):
                needed = [f"{arm}-{job.seed}" for arm in job.arm.after]
                if failed := [name for name in needed if ended.get(name) is False]:
                    print(f"{job.name}: not run, {failed[0]} failed", flush=True)
                    ended[job.name] = False
                elif len(running) < at_once and all(name in ended for name in names.intersection(needed)):
                    running[pool.submit(_one, job, results)] = job
                else:
                    continue
                waiting.remove(job)
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                ended[running.pop(future).name] = future.result()
    return [name for name, well in ended.items() if not well]


def _one(job: Job, results: Path) -> bool:
    """Whether the job ended well and its rows are filed. Another runner that is at the same one is waited for."""
    began, log = time.monotonic(), job.runs / f"{job.name}.log"
    job.runs.mkdir(parents=True, exist_ok=True)
    with (job.runs / f"{job.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if job.changed:
            print(f"{job.name}: FAILED, its settings are not those it began with: remove {job.folder}", flush=True)
            return False
        made_by = job.runs / f"{job.name}.commit"
        earlier = made_by.read_text().split(", ") if made_by.is_file() and job.begun else []
        if not job.ended:  # else it was stopped before its rows were filed
            print(f"{job.name}: begins", flush=True)
            job.about.write_text(job.settings())
            made_by.write_text(", ".join(dict.fromkeys([*earlier, _commit()])))
            with log.open("a") as file:
                told = {"env": environment(), "cwd": ROOT, "stdout": file, "stderr": file}
                # the lock lives as long as the run, should this runner be killed
                status = subprocess.call(job.command(), **told, pass_fds=(lock.fileno(),))
            if status:
                lines = log.read_text(errors="replace").splitlines()[-TAIL:]
                print("\n".join([f"{job.name}: FAILED ({status}), the end of {log}:", *lines]), flush=True)
                return False
        try:
            append(results, rows_of(job, made_by.read_text()))
        except Exception:  # of a table's own measure: the other arms go on
            print(f"{job.name}: FAILED, it ended but was not measured:\n{traceback.format_exc()}", flush=True)
            return False
    print(f"{job.name}: filed after {time.monotonic() - began:.0f} s", flush=True)
    return True


def environment() -> dict[str, str]:
    """Of a process that trains or measures: one thread, this checkout."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])}


def ask(program: str, folder: Path) -> dict[str, Any]:
    """What a table's own program prints last of an ended run, in a process of its own: the runner loads no torch."""
    printed = subprocess.check_output([sys.executable, program, str(folder)], env=environment())
    return json.loads(printed.splitlines()[-1])  # a library may warn on the same stream


def _commit() -> str:
    """That of what runs now, with a mark if the checkout differs from it."""
    if not shutil.which("git"):
        return ""
    changes = ["status", "--porcelain", "--", "cosmo_fast", "csrc", "kernels", str(HERE)]
    asked = (["rev-parse", "--short", "HEAD"], changes)
    said = [subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip() for words in asked]
    return said[0] + ("-dirty" if said[1] else "")


def tables() -> list[str]:
    """Modules of this folder that are tables."""
    return sorted(path.stem for path in HERE.glob("*.py") if "\nARMS" in path.read_text())


def page(name: str, about: str, shown: str) -> str:
    """The text of TABLE.md: the module's docstring, and what is shown between its marks."""
    return f"{about.strip()}\n\n<!-- reproduce-{name} -->\n{shown}<!-- /reproduce-{name} -->\n"


def main(arguments: list[str] | None = None, table: ModuleType | None = None, results: Path = RESULTS) -> int:
    """Returns the exit status. ``table`` instead of the named module, ``results`` instead of the folder: for tests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=tables() if table is None else None)
    parser.add_argument("--arm", action="append", default=[], help="only this one, and what it starts from; repeatable")
    parser.add_argument("--seed", action="append", type=int, default=[], help="only this one; repeatable")
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "reproduce", help="where run folders go")
    parser.add_argument("--list", action="store_true", help="print every arm, seed and whether it is filed")
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    parser.add_argument("--results", type=Path, default=results, help="where rows are filed")
    options = parser.parse_args(arguments)
    table, results = table or importlib.import_module(options.table), options.results
    path, runs = results / f"{options.table}.csv", (options.runs / options.table).absolute()
    filed = {(row["arm"], row["seed"]) for row in read(path)}
    every = {arm.name for arm in table.ARMS}
    names = dict.fromkeys(table.SEEDS, every) | {seed: set(arms) for seed, arms in getattr(table, "MORE", {}).items()}
    names = {seed: names.get(seed, every) for seed in options.seed} or names  # what is asked for, a seed
    if options.list:
        for seed, those in names.items():
            for arm in (arm for arm in table.ARMS if arm.name in those):
                print(f"{arm.name} {seed} {'filed' if (arm.name, str(seed)) in filed else 'open'}")
        return 0
    if unknown := sorted(set(options.arm) - every):
        raise ValueError(f"--arm {unknown[0]!r} is none of {', '.join(arm.name for arm in table.ARMS)}")
    names = {seed: those & (set(options.arm) or every) for seed, those in names.items()}
    jobs = wanted(table.ARMS, names, filed, runs)
    if options.dry_run:
        print("\n".join(shlex.join(job.command()) for job in jobs))
        return 0
    about = path.with_suffix(".md")
    about.parent.mkdir(parents=True, exist_ok=True)
    kept = about.read_text().partition(f"<!-- reproduce-{options.table} -->\n")[2] if about.is_file() else ""
    about.write_text(page(options.table, table.__doc__, kept.partition(f"<!-- /reproduce-{options.table} -->")[0]))
    failed = run(jobs, path, options.jobs)
    print(f"failed: {', '.join(failed)}" if failed else f"{path}: all that was asked for is filed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
