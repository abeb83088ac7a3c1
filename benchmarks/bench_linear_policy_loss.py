"""Hidden states to gradients of a policy loss: ours, eager PyTorch, torch.compile, liger-kernel, TRL, and the floor.

    python benchmarks/bench_linear_policy_loss.py [--quick] [--sizes 1024,896,32768 ...] [--providers cosmo_fast,eager]

The floor is the three bare matrix products at the row counts that the case needs. Repeats are interleaved, so that a
noisy machine is noisy for everyone; times are medians with 20 % and 80 % quantiles; peak_mib is what a call adds to the
memory in use; error_ratio is the error of (dX, dW) against fp64 over that of eager PyTorch in the same dtype.
Writes benchmarks/results/linear_policy_loss.csv.
"""

import argparse
import csv
import ctypes
import gc
import importlib.util
import itertools
import platform
import subprocess
import time
from pathlib import Path

import torch
from torch import Tensor

from cosmo_fast.objectives import TokenBatch, grpo
from cosmo_fast.ops import linear_policy_loss

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results/linear_policy_loss.csv"
PROVIDERS = ("cosmo_fast", "eager", "compile", "liger", "trl")
PACKAGES = {"liger": ("liger_kernel", "liger-kernel"), "trl": ("trl", "trl")}
CASES = ("full", "half_zero")  # every sequence has an advantage; every second one has advantage zero
EPSILON, SEQUENCES = 0.2, 8
COLUMNS = (
    "op case provider n d v dtype device ms_p20 ms_p50 ms_p80 floor_ratio peak_mib error_ratio torch commit".split()
)


class Problem:
    """Random states (N, d), a head (V, d), 8 sequences, an old policy a few percent away: some tokens are clipped."""

    def __init__(self, n: int, d: int, v: int, dtype: torch.dtype, device: str, case: str, seed: int = 0):
        if n % SEQUENCES:
            raise ValueError(f"N = {n} must be a multiple of {SEQUENCES} (sequences)")
        g = torch.Generator().manual_seed(seed)
        self.hidden = torch.randn(n, d, generator=g).to(device, dtype).requires_grad_()
        self.weight = (torch.randn(v, d, generator=g) / d**0.5).to(device, dtype).requires_grad_()
        self.targets = torch.randint(0, v, (n,), generator=g).to(device)
        self.sequence_advantage = torch.randn(SEQUENCES, generator=g).to(device)
        if case == "half_zero":
            self.sequence_advantage[::2] = 0.0
        self.advantage = self.sequence_advantage.repeat_interleave(n // SEQUENCES)
        with torch.no_grad():
            logp = torch.cat([_eager_logp(h, self.weight, t) for h, t in zip(*self.split(), strict=True)])
        self.old_logp = logp + 0.05 * torch.randn(n, generator=g).to(device)
        sequence = torch.arange(SEQUENCES, device=device).repeat_interleave(n // SEQUENCES)
        weight = torch.full((n,), 1 / n, device=device)
        self.batch = TokenBatch(self.targets, weight, sequence, self.advantage, self.old_logp)
        # Rows whose coefficient is not zero: all that the two gradient products need.
        ratio = (logp - self.old_logp).exp()
        high, low = (ratio > 1 + EPSILON) & (self.advantage > 0), (ratio < 1 - EPSILON) & (self.advantage < 0)
        self.active = int(((self.advantage != 0) & ~high & ~low).sum())

    def split(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """States and targets in eight pieces."""
        rows = len(self.targets) // SEQUENCES
        return self.hidden.detach().split(rows), self.targets.split(rows)

    def loss(self, logp: Tensor) -> Tensor:
        """GRPO's token mean on log-probabilities (N,)."""
        ratio, a = (logp - self.old_logp.to(logp.dtype)).exp(), self.advantage.to(logp.dtype)
        return -torch.min(ratio * a, ratio.clamp(1 - EPSILON, 1 + EPSILON) * a).mean()


def _eager_logp(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = hidden @ weight.t()
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1).gather(1, targets[:, None])[:, 0]


def _logsumexp_logp(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = (hidden @ weight.t()).float()
    return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(-1)


def _liger(problem: Problem):
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, loss_type="bnpo", epsilon_low=EPSILON, epsilon_high=EPSILON
    )
    shape = (SEQUENCES, len(problem.targets) // SEQUENCES)
    mask = torch.ones(shape, device=problem.targets.device)
    targets, old = problem.targets.view(shape), problem.old_logp.view(shape)

    def run() -> Tensor:
        hidden = problem.hidden.view(*shape, -1)
        return loss(
            hidden, problem.weight, targets, mask, problem.sequence_advantage, old_per_token_logps=old
        )[0]  # fmt: skip

    return run


def _trl(problem: Problem):
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as tile

    def run() -> Tensor:
        arguments = (problem.hidden, problem.weight, None, problem.targets, 1.0, tile, None, 1.0, ())
        return problem.loss(ChunkedLogProbFunction.apply(*arguments)[0])

    return run


def makers(names: list[str]) -> dict:
    """Functions problem -> (function -> loss) by provider; eager in its two forms, of which the faster is kept."""
    for name in names:
        module, package = PACKAGES.get(name, (None, None))
        if module and importlib.util.find_spec(module) is None:
            advice = "pip install -r requirements-bench.txt, or leave it out with --providers"
            raise SystemExit(f"provider {name!r} needs the package {package}: {advice}")

    def from_logp(function):
        return lambda p: lambda: p.loss(function(p.hidden, p.weight, p.targets))

    compiled = torch.compile(_eager_logp, dynamic=False)
    known = {
        "cosmo_fast": lambda p: lambda: linear_policy_loss(p.hidden, p.weight, p.batch, grpo(EPSILON)).loss,
        "eager": from_logp(_eager_logp),
        "eager (logsumexp)": from_logp(_logsumexp_logp),
        "compile": from_logp(compiled),
        "liger": _liger,
        "trl": _trl,
    }
    return {name: make for name, make in known.items() if name.split(" (")[0] in names}


def _floor(problem: Problem):
    hidden, weight = problem.hidden.detach(), problem.weight.detach()

    def run():
        logits = hidden @ weight.t()
        dz = logits[: problem.active]
        return dz @ weight, dz.t() @ hidden[: problem.active]

    return run


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
        ctypes.CDLL(None).malloc_trim(0)  # pages that an earlier call freed would hide what this one needs
        reset.write_text("5")
        before = self._resident("VmRSS")
        run()
        return (self._resident("VmHWM") - before) / 1024

    @staticmethod
    def _resident(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(field)).split()[1])


def _step(problem: Problem, loss):
    def run():
        problem.hidden.grad = problem.weight.grad = None
        loss().backward()

    return run


def _errors(problem: Problem, steps: dict) -> dict[str, float]:
    """Relative error of (dX, dW) against fp64 of every provider."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (problem.hidden, problem.weight))
    truth = torch.autograd.grad(problem.loss(_eager_logp(hidden, weight, problem.targets)), (hidden, weight))
    errors = {}
    for name, step in steps.items():
        step()
        got = (problem.hidden.grad, problem.weight.grad)
        errors[name] = max(((g.double() - t).norm() / t.norm()).item() for g, t in zip(got, truth, strict=True))
    return errors


def measure(problem: Problem, providers: dict, repeats: int, device: str) -> list[dict]:
    """One row a provider, the floor first."""
    steps = {name: _step(problem, make(problem)) for name, make in providers.items()}
    errors = _errors(problem, steps)  # also the warm-up: nothing is compiled after it
    runs = {"floor": _floor(problem), **steps}
    memory = {name: Memory(device).of(run) for name, run in runs.items()}
    times = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(_seconds(run, device))
    quantiles = {
        name: torch.tensor(t).quantile(torch.tensor([0.2, 0.5, 0.8])).mul(1e3).tolist() for name, t in times.items()
    }
    eager = [name for name in runs if name.startswith("eager")]
    fastest = min(eager, key=lambda name: quantiles[name][1], default=None)
    rows = []
    for name, (p20, p50, p80) in quantiles.items():
        if name in eager and name != fastest:
            continue
        ratio = errors[name] / errors[fastest] if fastest and name in errors else float("nan")
        row = {"provider": name.split(" (")[0], "ms_p20": p20, "ms_p50": p50, "ms_p80": p80}
        rows.append(row | {"floor_ratio": p50 / quantiles["floor"][1], "peak_mib": memory[name], "error_ratio": ratio})
    return rows


def _seconds(run, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _origin(device: str) -> dict[str, str]:
    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    commit = git("rev-parse", "--short", "HEAD") or "none"
    threads = torch.get_num_threads()
    name = torch.cuda.get_device_name() if device == "cuda" else f"{_processor()}, {threads} threads"
    dirty = "-dirty" if git("status", "--porcelain", "--", "csrc", "kernels", "cosmo_fast/ops") else ""
    return {"device": name, "torch": torch.__version__, "commit": commit + dirty}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    """Measures, prints a table, writes the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["1024,896,32768", "512,1024,151936"], help="N,d,V")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32"])
    parser.add_argument("--cases", nargs="+", default=CASES, choices=CASES)
    parser.add_argument("--providers", default=",".join(PROVIDERS), help="comma-separated, of " + ", ".join(PROVIDERS))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="one small size, bf16, three repeats")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.quick:
        options.sizes, options.dtypes, options.repeats = ["256,256,8192"], ["bfloat16"], 3
    names = options.providers.split(",")
    if unknown := set(names) - set(PROVIDERS):
        raise SystemExit(f"unknown providers {', '.join(sorted(unknown))}; known: {', '.join(PROVIDERS)}")
    providers, origin, rows = makers(names), _origin(options.device), []
    print(f"{'case':<10}{'n,d,v':<18}{'dtype':<10}{'provider':<12}", end="")
    print(f"{'ms':>9}{'÷ floor':>9}{'peak MiB':>10}{'error ÷ eager':>15}")
    for size, dtype, case in itertools.product(options.sizes, options.dtypes, options.cases):
        n, d, v = (int(x) for x in size.split(","))
        problem = Problem(n, d, v, getattr(torch, dtype), options.device, case)
        common = {"op": "linear_policy_loss", "case": case, "n": n, "d": d, "v": v, "dtype": dtype, **origin}
        for row in measure(problem, providers, options.repeats, options.device):
            rows.append(common | row)
            figures = (
                f"{row['ms_p50']:>9.2f}{row['floor_ratio']:>9.3f}{row['peak_mib']:>10.0f}{row['error_ratio']:>15.2f}"
            )
            print(f"{case:<10}{size:<18}{dtype:<10}{row['provider']:<12}{figures}", flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{x:.4g}" if isinstance(x, float) else x for k, x in row.items()})


if __name__ == "__main__":
    main()
