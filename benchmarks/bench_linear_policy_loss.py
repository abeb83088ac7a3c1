"""Hidden states to gradients of a policy loss: ours, eager PyTorch, torch.compile, other packages, and the floor.

    python benchmarks/bench_linear_policy_loss.py [--quick] [--sizes 1024,896,32768 ...] [--cases full kl ...]
    python benchmarks/bench_linear_policy_loss.py --memory | --growth | --bandwidth

Cases: `full` every sequence has an advantage, `half_zero` every second one has none, `grpo` rewards of ragged groups
to gradients, `advantage` 100,000 ragged groups of rewards, `logprobs` scores and entropies without gradient, `kl` the
exact KL(policy ‖ reference) with the policy's gradient. torch_lce and cce know the plain likelihood only: in `full`
they run that, which is the same matrix work, and their error is compared with eager's on it; cce on CUDA only.
The floor is the bare matrix products at the row counts that the case needs (of `full` for `advantage`), each with fresh
outputs, as autograd makes them; floor_reused writes into outputs that exist. In `grpo` and `advantage` the row `full`
is our policy loss on the same tokens, with the advantages given. Repeats are interleaved, so that a noisy
machine is noisy for everyone; times are medians with 20 % and 80 % quantiles, floor_ratio is to `floor`; peak_mib is
what a call adds to the memory in use; error_ratio is the error of the results (dX and dW, scores, advantages) against
fp64 over that of eager PyTorch in the same dtype.
--memory: the peak of one call beyond inputs and dX over N, each in a fresh process; expected_mib is one chunk of logits
and dW, in the dtype for one chunk and in fp32 for several. --growth: floor_ratio over N and chunk_rows. --bandwidth:
the row kernels beside a copy.
Writes benchmarks/results/linear_policy_loss[_memory|_growth|_bandwidth][_cuda][_quick].csv once all is measured.
"""

import argparse
import itertools
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from measure import LEAST, SLOW, Memory, free_bytes, interleaved, origin, result_file, write
from rivals import CASES, EPSILON, FORMS, PLAIN, PROVIDERS, Problem, softmax_logp, truth, unavailable, yardsticks

from cosmo_fast.objectives import grpo
from cosmo_fast.ops import linear_policy_loss, vocab_stats
from cosmo_fast.ops.vocab_stats import vocab_grad_

OP = "linear_policy_loss"
COLUMNS = (
    "op case provider n d v dtype device ms_p20 ms_p50 ms_p80 floor_ratio peak_mib error_ratio torch commit".split()
)
MEMORY_COLUMNS = "op case provider n d v dtype device chunk_rows peak_mib expected_mib growth torch commit".split()
GROWTH_COLUMNS = (
    "op case provider n d v dtype device chunk_rows chunks ms_p20 ms_p50 ms_p80 floor_ratio torch commit".split()
)
BANDWIDTH_COLUMNS = "op case provider n v dtype device ms_p20 ms_p50 ms_p80 gb_per_s copy_ratio torch commit".split()
GROWTH_CHUNKS = (4096, 1024)
QUICK = {"sizes": ["256,256,8192"], "dtypes": ["bfloat16"], "repeats": 3}
SLOW_TO_COMPILE = ("compile", "liger", "liger_one_chunk", "cce")  # minutes
QUICK_PROVIDERS = [name for name in PROVIDERS if name not in SLOW_TO_COMPILE]


def _error(got: tuple, expected: tuple) -> float:
    """The largest relative error among the results."""
    return max(((g.double() - t).norm() / t.norm()).item() for g, t in zip(got, expected, strict=True))


def _errors(problem: Problem, steps: dict) -> dict[str, float]:
    """The error of every provider against fp64; also the warm-up: nothing is compiled after it."""
    expected = truth(problem)
    errors = {name: _error(step(), expected) for name, step in steps.items() if name.split(" (")[0] not in PLAIN}
    if plain := {name: step for name, step in steps.items() if name not in errors}:
        expected = truth(problem, plain=True)
        errors |= {name: _error(step(), expected) for name, step in plain.items()}
        likelihood = problem.backward(lambda: -softmax_logp(problem.hidden, problem.weight, problem.targets).mean())
        errors["eager's plain likelihood"] = _error(likelihood(), expected)
    return errors


def measure(problem: Problem, names: list[str], repeats: int, device: str) -> list[dict]:
    """One row a provider, the yardsticks first; of a provider's forms the faster one."""
    torch._dynamo.reset()  # or a later size would meet the limit of recompilations and run eagerly, without a word
    steps = {name: make(problem) for name, make in FORMS[problem.case].items() if name.split(" (")[0] in names}
    errors = _errors(problem, steps)
    beside = yardsticks(problem)
    for run in beside.values():
        run()
    runs = {**beside, **steps}
    memory = {name: Memory(device).of(run) for name, run in runs.items()}
    times = interleaved(runs, repeats, device)
    fastest: dict[str, str] = {}
    for name in runs:
        owner = name.split(" (")[0]
        if owner not in fastest or times[name]["ms_p50"] < times[fastest[owner]]["ms_p50"]:
            fastest[owner] = name
    rows = []
    for owner, name in fastest.items():
        eager = "eager's plain likelihood" if owner in PLAIN else fastest.get("eager")
        ratio = errors[name] / errors[eager] if name in errors and eager else float("nan")
        floor_ratio = times[name]["ms_p50"] / times["floor"]["ms_p50"]
        figures = {"floor_ratio": floor_ratio, "peak_mib": memory[name], "error_ratio": ratio}
        rows.append({"provider": owner, **times[name], **figures})
    return rows


def cases(options, names: list[str]) -> Iterator[dict]:
    """The table of every case, size, dtype and provider."""
    about = origin(options.device)
    print(f"{'case':<10}{'n,d,v':<18}{'dtype':<10}{'provider':<17}", end="")
    print(f"{'ms':>9}{'÷ floor':>9}{'peak MiB':>10}{'error ÷ eager':>15}")
    for size, dtype, case in itertools.product(options.sizes, options.dtypes, options.cases):
        n, d, v = _size(size)
        problem = Problem(n, d, v, getattr(torch, dtype), options.device, case)
        for row in measure(problem, names, options.repeats, options.device):
            figures = (
                f"{row['ms_p50']:>9.2f}{row['floor_ratio']:>9.3f}{row['peak_mib']:>10.0f}{row['error_ratio']:>15.2f}"
            )
            print(f"{case:<10}{size:<18}{dtype:<10}{row['provider']:<17}{figures}", flush=True)
            yield {"op": OP, "case": case, "n": n, "d": d, "v": v, "dtype": dtype, **about, **row}


def _ours(problem: Problem, chunk_rows: int):
    arguments = problem.hidden, problem.weight, problem.batch, grpo(EPSILON)
    return problem.backward(lambda: linear_policy_loss(*arguments, chunk_rows=chunk_rows).loss)


def _peak(provider: str, n: int, d: int, v: int, dtype: str, device: str, chunk_rows: int, threads: int) -> float:
    """MiB of one call beyond its inputs and dX, in a process that has done nothing but a small call before."""
    torch.set_num_threads(threads)

    def step(problem: Problem):
        return _ours(problem, chunk_rows) if provider == "cosmo_fast" else FORMS["full"][provider](problem)

    step(Problem(64, 64, 512, getattr(torch, dtype), device, "full"))()
    problem = Problem(n, d, v, getattr(torch, dtype), device, "full")
    return Memory(device).of(step(problem)) - problem.hidden.nbytes / 2**20


def _expected(n: int, d: int, v: int, dtype: str, chunk_rows: int) -> float:
    """MiB that ours should add: the largest chunk of logits, and dW, which several chunks sum in fp32."""
    chunks, itemsize = -(-n // chunk_rows), getattr(torch, dtype).itemsize
    return v * (-(-n // chunks) * itemsize + d * (itemsize if chunks == 1 else 4)) / 2**20


def memory(options) -> Iterator[dict]:
    """Peak memory over N: ours, and eager PyTorch (the leaner of its forms) where it fits."""
    about = origin(options.device)
    _, d, v = _size(options.sizes[0])
    forms = {"cosmo_fast": ["cosmo_fast"], "eager": [name for name in FORMS["full"] if name.startswith("eager")]}
    wanted = [name for name in forms if options.providers is None or name in options.providers.split(",")]
    for dtype, provider in itertools.product(options.dtypes, wanted):
        first = None
        for n in options.memory_rows:
            needed = n * v * (2 * getattr(torch, dtype).itemsize + 4 * 4)  # logits, their gradient, four fp32 copies
            if provider == "eager" and needed > 0.8 * free_bytes(options.device):
                print(f"eager, N = {n}: left out, about {needed / 2**30:.0f} GiB do not fit")
                continue
            common = (n, d, v, dtype, options.device, options.chunk_rows, torch.get_num_threads())
            peaks = []
            for form in forms[provider]:
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                    peaks.append(pool.submit(_peak, form, *common).result())
            peak = min(peaks)
            first = first or peak
            row = {"op": OP, "case": "memory", "provider": provider, "n": n, "d": d, "v": v, "dtype": dtype, **about}
            expected = _expected(n, d, v, dtype, options.chunk_rows) if provider == "cosmo_fast" else float("nan")
            print(f"{provider:<12}{dtype:<10}N {n:<8}{peak:>10.1f} MiB, expected {expected:>7.1f}", end="")
            print(f"{peak / first:>8.3f} × the first", flush=True)
            figures = {"peak_mib": peak, "expected_mib": expected, "growth": peak / first}
            yield row | {"chunk_rows": options.chunk_rows, **figures}


def growth(options) -> Iterator[dict]:
    """Time over that of the bare products at the same N, from one chunk of rows to many."""
    about = origin(options.device)
    _, d, v = _size(options.sizes[0])
    for dtype, n in itertools.product(options.dtypes, options.growth_rows):
        problem = Problem(n, d, v, getattr(torch, dtype), options.device, "full")
        runs = {"floor": yardsticks(problem)["floor"]} | {size: _ours(problem, size) for size in options.growth_chunks}
        for run in runs.values():
            run()
        times = interleaved(runs, options.repeats, options.device)
        for name, found in times.items():
            ratio, chunks = found["ms_p50"] / times["floor"]["ms_p50"], 1 if name == "floor" else -(-n // name)
            row = {"op": OP, "case": "growth", "provider": "floor" if name == "floor" else "cosmo_fast", "n": n}
            row |= {"d": d, "v": v, "dtype": dtype, **about, "chunk_rows": n if name == "floor" else name}
            print(f"{row['provider']:<12}{dtype:<10}N {n:<7}{chunks:>3} chunks", end="")
            print(f"{found['ms_p50']:>10.2f} ms{ratio:>8.3f}", flush=True)
            yield row | {"chunks": chunks, **found, "floor_ratio": ratio}


def bandwidth(options) -> Iterator[dict]:
    """Bytes that each row kernel must move over its time, beside a copy of the same logits."""
    about = origin(options.device)
    for size, dtype in itertools.product(options.sizes, options.dtypes):
        n, _, v = _size(size)
        random = torch.Generator(options.device).manual_seed(0)
        logits = torch.randn(n, v, generator=random, device=options.device).to(getattr(torch, dtype))
        targets = torch.randint(0, v, (n,), generator=random, device=options.device)
        stats, c = vocab_stats(logits, targets), torch.full((n,), 1.0, device=options.device)
        other = torch.empty_like(logits)
        runs = {
            "copy": (2, lambda other=other, logits=logits: other.copy_(logits)),
            "vocab_stats": (1, lambda logits=logits, targets=targets: vocab_stats(logits, targets)),
            "vocab_grad_": (2, lambda z=other, t=targets, s=stats, c=c: vocab_grad_(z, t, s, c)),
        }  # what vocab_grad_ overwrites is overwritten again: the values stay finite and the work is the same
        for _, run in runs.values():
            run()
        times = interleaved({name: run for name, (_, run) in runs.items()}, options.repeats, options.device)
        rate = {name: passes * logits.nbytes / times[name]["ms_p50"] / 1e6 for name, (passes, _) in runs.items()}
        for name, found in times.items():
            row = {"op": OP, "case": "bandwidth", "provider": name, "n": n, "v": v, "dtype": dtype, **about, **found}
            print(f"{name:<14}{n} × {v}  {dtype:<10}{rate[name]:>9.1f} GB/s{rate[name] / rate['copy']:>8.2f} × a copy")
            yield row | {"gb_per_s": rate[name], "copy_ratio": rate[name] / rate["copy"]}


def _size(text: str) -> tuple[int, int, int]:
    n, d, v = (int(x) for x in text.split(","))
    return n, d, v


def _providers(options) -> list[str]:
    """Those asked for; or all that can run here, with a word on each that cannot."""
    if options.providers is None:
        wanted = QUICK_PROVIDERS if options.quick else list(PROVIDERS)
        for name in wanted:
            if why := unavailable(name, options.device):
                print(f"{name} is left out: {why}")
        return [name for name in wanted if not unavailable(name, options.device)]
    names = options.providers.split(",")
    if unknown := set(names) - set(PROVIDERS):
        raise SystemExit(f"unknown providers {', '.join(sorted(unknown))}; known: {', '.join(PROVIDERS)}")
    for name in names:
        if why := unavailable(name, options.device):
            raise SystemExit(f"provider {name!r} cannot run: {why}; leave it out of --providers")
    return names


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["1024,896,32768", "512,1024,151936"], help="N,d,V")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32"])
    parser.add_argument("--cases", nargs="+", default=CASES, choices=CASES)
    parser.add_argument("--providers", help="comma-separated, of " + ", ".join(PROVIDERS) + "; default: all installed")
    few = f"at least {LEAST}; what takes over {SLOW:g} times the floor has exactly {LEAST}"
    parser.add_argument("--repeats", type=int, default=9, help=few)
    parser.add_argument("--quick", action="store_true", help="one small size, bf16, three repeats, nothing compiled")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--memory", action="store_true", help="peak memory over N, at d and V of the first size")
    mode.add_argument("--growth", action="store_true", help="time over N, at d and V of the first size")
    mode.add_argument("--bandwidth", action="store_true", help="the row kernels beside a copy")
    parser.add_argument("--chunk-rows", type=int, default=1024, help="of --memory")
    parser.add_argument("--memory-rows", type=int, nargs="+", default=[1024, 4096, 16384], metavar="N")
    parser.add_argument("--growth-rows", type=int, nargs="+", default=[2**k for k in range(8, 15)], metavar="N")
    parser.add_argument("--growth-chunks", type=int, nargs="+", default=GROWTH_CHUNKS, metavar="ROWS")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.quick:
        vars(options).update(QUICK)
    return options


def main() -> None:
    """Measures, prints a table, writes the CSV."""
    options = _options()
    if options.memory:
        suffix, columns, rows = "_memory", MEMORY_COLUMNS, memory(options)
    elif options.growth:
        suffix, columns, rows = "_growth", GROWTH_COLUMNS, growth(options)
    elif options.bandwidth:
        suffix, columns, rows = "_bandwidth", BANDWIDTH_COLUMNS, bandwidth(options)
    else:
        suffix, columns, rows = "", COLUMNS, cases(options, _providers(options))
    cuda = "_cuda" if options.device == "cuda" else ""
    write(options.output or result_file(f"{OP}{suffix}{cuda}", options.quick), columns, rows)


if __name__ == "__main__":
    main()
