"""One GRPO step split into sample, score and update: ours, TRL's GRPOTrainer, and Hugging Face on padded rows.

    python benchmarks/bench_train.py [--cases vision_trained growth ...] [--providers cosmo_fast,padded,...]

A random Qwen2.5-VL (hidden 256, 4 layers, about 1000 tokens), two prompts of one picture (196 vision tokens) and 30
text tokens, 8 responses of 48 tokens each, one batch, in fp32 and in bf16 (weights and activations; ours with the fp32
masters of its trainer, the others with AdamW on bf16 weights, which is less work). Before anything is timed, all
providers must agree on log-probs, loss and gradients of the same tokens. `trl` runs where it is installed: `make
bench-train`.
Providers: `cosmo_fast`; `cosmo_fast_unshared`, the same packed forward in which every response has a prompt of its own;
`padded`, transformers with SDPA, a row a response, its picture encoded once a row, as TRL does; `padded_vision_once`,
every picture encoded once a pass; `trl`, the real trainer with its own generation, scoring and update.
Phases: `sample` prompts to responses, prefill included; `score` log-probs without gradient; `update` forward, backward,
clipping and AdamW on given tokens; `step` sample, decode, reward, advantages and update, as each makes it with one
iteration and beta 0, where nobody scores again (TRL's sample and step have its tokenisation and picture processing in
them, about 10 ms a picture; ours has its patches from the check).
Cases: `vision_trained` and `vision_frozen` (ours then keeps the features from sampling to the update); `parts`, forward
and backward of vision tower, language model and head apart, as `update:vision` and so on, vision trained; `growth`,
the update over P (pictures and text), G and R, vision trained, fp32, TRL left out.
Repeats are interleaved; times are medians. tokens_per_s counts every prompt once and every response, whoever runs it;
peak_mib, of `update` only, is what forward and backward take beyond weights, gradients and optimiser states.
Writes benchmarks/results/train.csv once all is measured.
"""

import argparse
import importlib.util
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import torch
from measure import LEAST, SLOW, Memory, interleaved, origin, result_file, write
from train_rivals import Ours, Padded, PaddedVisionOnce, Problem, Provider, Unshared, make_model

COLUMNS = "case phase provider p g r dtype device ms_p50 tokens_per_s peak_mib torch commit".split()
PROVIDERS = ("cosmo_fast", "cosmo_fast_unshared", "padded", "padded_vision_once", "trl")
CASES = ("vision_trained", "vision_frozen", "parts", "growth")
DTYPES = ("float32", "bfloat16")
PHASES = ("sample", "score", "update", "step")
TRL_NEEDS = ("trl", "datasets", "torchvision")
DEVICE, NAN = "cpu", float("nan")
ERRORS = {"float32": (1e-4, 1e-3), "bfloat16": (0.1, 0.05)}  # of log-probs, absolute; of gradients, of their norm

MODEL = {"hidden_size": 256, "layers": 4}
SIDE = 392  # pixels of a square picture
BASE = (1, 8, 48)  # pictures a prompt, G, R
GROWTH = (BASE, (2, 8, 48), (4, 8, 48), (1, 4, 48), (1, 16, 48), (1, 8, 96), (1, 8, 192))


def make(name: str, problem: Problem) -> Provider:
    """The provider `name` on a problem."""
    if name == "trl":
        from train_trl import Trl  # what it imports is in an environment of its own

        return Trl(problem)
    ours = {"cosmo_fast": Ours, "cosmo_fast_unshared": Unshared}
    return (ours | {"padded": Padded, "padded_vision_once": PaddedVisionOnce})[name](problem)


def check(providers: dict[str, Provider]) -> None:
    """AssertionError unless everybody has the first one's log-probs, loss and gradients on the problem's tokens."""
    first = None
    logp_error, gradient_error = ERRORS[next(iter(providers.values())).problem.dtype]
    for name, provider in providers.items():
        found = provider.score(), *provider.gradients()
        first = first or found
        logp = (found[0].float() - first[0].float()).abs().max().item()
        loss = abs(found[1] - first[1])
        gradient = ((found[2] - first[2]).norm() / first[2].norm()).item()
        if not (max(logp, loss) <= logp_error and gradient <= gradient_error):
            far = f"log-probs by {logp:.2g}, the loss by {loss:.2g}, gradients by {gradient:.2g} of their norm"
            raise AssertionError(f"{name} computes something else than {next(iter(providers))}: {far}")


def _rows(runs: dict, problem: Problem, case: str, phase: str, repeats: int, peaks: dict | None = None) -> list[dict]:
    """A row a provider, printed too."""
    for run in runs.values():
        run()
    times = interleaved(runs, repeats, DEVICE)
    rows = []
    for name, found in times.items():
        ms, peak = found["ms_p50"], (peaks or {}).get(name, NAN)
        shape = {"p": problem.p, "g": problem.g, "r": problem.r, "dtype": problem.dtype}
        figures = {"ms_p50": ms, "tokens_per_s": problem.tokens / ms * 1e3, "peak_mib": peak}
        ratio = ms / next(iter(times.values()))["ms_p50"]
        print(f"{case:<17}{phase:<8}{problem.p:>5}{problem.g:>4}{problem.r:>5}  {problem.dtype:<10}{name:<21}", end="")
        print(f"{ms:>9.1f}{ratio:>9.2f}{peak:>10.1f}", flush=True)
        rows.append({"case": case, "phase": phase, "provider": name, **shape, **figures})
    return rows


def measure(problem: Problem, names: list[str], case: str, phases: tuple[str, ...], repeats: int) -> Iterator[dict]:
    """The rows of a case at one shape."""
    providers = {name: make(name, problem) for name in names}
    check(providers)
    if case == "parts":
        parts = {name: provider.parts() for name, provider in providers.items() if name != "trl"}
        for part in ("vision", "language", "head"):
            runs = {name: functions[part] for name, functions in parts.items()}
            yield from _rows(runs, problem, f"update:{part}", "update", repeats)
        return
    for phase in phases:
        peaks = None
        if phase == "update":
            peaks = {name: Memory(DEVICE).of(provider.accumulate) for name, provider in providers.items()}
        runs = {name: getattr(provider, phase) for name, provider in providers.items()}
        yield from _rows(runs, problem, case, phase, repeats, peaks)


def cases(options: argparse.Namespace, names: list[str], folder: Path) -> Iterator[dict]:
    """The rows of all cases."""
    about = origin(DEVICE)
    model = make_model(folder / "model", **MODEL)
    shape = f"{'P':>5}{'G':>4}{'R':>5}  {'dtype':<10}"
    print(f"{'case':<17}{'phase':<8}{shape}{'provider':<21}{'ms':>9}{'÷ first':>9}{'peak MiB':>10}")
    for case, dtype in product(options.cases, options.dtypes):
        growth = case == "growth"
        if growth and dtype != DTYPES[0]:
            continue
        for pictures, g, r in GROWTH if growth else [BASE]:
            problem = Problem(model, pictures, g, r, options.groups, case != "vision_frozen", SIDE, dtype)
            chosen = [name for name in names if name != "trl" or case in ("vision_trained", "vision_frozen")]
            phases, repeats = (("update",), LEAST) if growth else (PHASES, options.repeats)
            for row in measure(problem, chosen, case, phases, repeats):
                yield row | about


def _providers(options: argparse.Namespace) -> list[str]:
    """Those asked for; or all that can run here, with a word on TRL where it cannot."""
    missing = [name for name in TRL_NEEDS if not importlib.util.find_spec(name)]
    why = f"{', '.join(missing)} not installed: make bench-train has an environment for it"
    if options.providers is None:
        if missing:
            print(f"trl is left out: {why}")
        return [name for name in PROVIDERS if name != "trl" or not missing]
    names = options.providers.split(",")
    if unknown := set(names) - set(PROVIDERS):
        raise SystemExit(f"unknown providers {', '.join(sorted(unknown))}; known: {', '.join(PROVIDERS)}")
    if "trl" in names and missing:
        raise SystemExit(f"provider 'trl' cannot run: {why}; or leave it out of --providers")
    return names


def main() -> None:
    """Measures, prints a table, writes the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=CASES, choices=CASES)
    parser.add_argument("--providers", help="comma-separated, of " + ", ".join(PROVIDERS) + "; default: all installed")
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    few = f"at least {LEAST}; growth, and what takes over {SLOW:g} times the first provider, has exactly {LEAST}"
    parser.add_argument("--repeats", type=int, default=5, help=few)
    parser.add_argument("--groups", type=int, default=2, help="prompts a step")
    parser.add_argument("--output", type=Path, default=result_file("train", quick=False))
    options = parser.parse_args()
    names = _providers(options)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        write(options.output, COLUMNS, cases(options, names, Path(folder)))


if __name__ == "__main__":
    main()
