"""How the benchmarks measure: interleaved times, peak memory, bandwidth of a copy, where a figure came from."""

import csv
import ctypes
import gc
import platform
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from cosmo_fast.ops import empty_cache

ROOT = Path(__file__).resolve().parent.parent
SLOW = 4.0  # a call this many times longer than the first one, the yardstick, is repeated LEAST times only
LEAST = 3


class Memory:
    """Peak memory (MiB) of a call beyond what was in use before: the allocator's on CUDA, resident pages on Linux."""

    def __init__(self, device: str):
        self.cuda = device == "cuda"

    def of(self, run) -> float:
        """Runs once; NaN where the system does not say."""
        gc.collect()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            return (torch.cuda.max_memory_allocated() - before) / 2**20
        reset = Path("/proc/self/clear_refs")
        if not reset.exists():
            run()
            return float("nan")
        empty_cache()  # what our own calls keep counts as theirs
        ctypes.CDLL(None).malloc_trim(0)  # pages that an earlier call freed would hide what this one needs
        reset.write_text("5")
        before = self._resident("VmRSS")
        run()
        return (self._resident("VmHWM") - before) / 1024

    @staticmethod
    def _resident(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(field)).split()[1])


def free_bytes(device: str) -> int:
    """Memory that a call may still take."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 2**33)


def seconds(run, device: str) -> float:
    """Of one call, with its result let go."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleaved(runs: dict, repeats: int, device: str) -> dict[str, dict[str, float]]:
    """ms_p20, ms_p50, ms_p80 of every function of `runs`, called in turn; all were called before.

    The first is the yardstick: it has all repeats, and a function that takes more than SLOW times as long has LEAST.
    """
    times = {name: [seconds(run, device)] for name, run in runs.items()}
    yardstick = next(iter(times.values()))[0]
    few = {name for name, t in times.items() if t[0] > SLOW * yardstick}
    for k in range(1, max(repeats, LEAST)):
        for name, run in runs.items():
            if k < LEAST or name not in few:
                times[name].append(seconds(run, device))
    return {name: _quantiles(t) for name, t in times.items()}


def _quantiles(times: list[float]) -> dict[str, float]:
    found = torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    return dict(zip(("ms_p20", "ms_p50", "ms_p80"), (found * 1e3).tolist(), strict=True))


def origin(device: str) -> dict[str, str]:
    """Where the figures came from: device, torch, commit."""

    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    commit = git("rev-parse", "--short", "HEAD") or "none"
    threads = torch.get_num_threads()
    name = torch.cuda.get_device_name() if device == "cuda" else f"{_processor()}, {threads} threads"
    changed = git("status", "--porcelain", "--", "csrc", "kernels", "cosmo_fast", "benchmarks/*.py")
    return {"device": name, "torch": torch.__version__, "commit": commit + ("-dirty" if changed else "")}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def result_file(name: str, quick: bool) -> Path:
    """Where the figures go that no --output sends elsewhere; those of --quick beside the committed ones."""
    return ROOT / f"benchmarks/results/{name}{'_quick' if quick else ''}.csv"


def write(path: Path, columns: list[str], rows: Iterable[dict]) -> None:
    """The rows as CSV, each as soon as it is there, figures with four digits.

    Into `path`.part, renamed at the end: a run that is cut short leaves the old file, and beside it what it had.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{x:.4g}" if isinstance(x, float) else x for k, x in row.items()})
            file.flush()
    part.replace(path)
    print(f"written: {path}")
