"""Attention of groups that share a prompt, forward + backward, against PyTorch's flash attention on unshared rows.

    python benchmarks/bench_prefix_attention.py [--threads 2] [--device cpu] [--dtypes float32,bfloat16] [--repeats 9]

`cosmo_fast`: `prefix_attention` on [all prompts | all responses]. `cosmo_fast_merged`: PyTorch's flash op for each
segment alone and for each group against its prompt, merged by log-sum-exp (CPU). `sdpa`: `scaled_dot_product_attention(
is_causal=True, enable_gqa=True)` on [g, p + r], its keys repeated outside the timer; it does `pairs` times as many
causal pairs. A row with a `decode` case is one new token of each response over what is there (forward only; sdpa: on
padded keys of its own for each response). Writes benchmarks/results/prefix_attention.csv (--quick: …_quick.csv), where
g is responses a prompt times prompts, error_ratio the norm of the error against fp64 over that of sdpa.
"""

import argparse
from functools import partial
from pathlib import Path

import measure
import numpy as np
import torch
from merged_attention import merged_attention
from torch.nn.functional import scaled_dot_product_attention

from cosmo_fast.ops import Segments, prefix_attention

COLUMNS = "provider p r g heads kv_heads head_size dtype device ms_p50 error_ratio torch commit".split()
# prompts, p, r, responses a prompt, query and key heads, head size
CASES = [
    (1, 1500, 400, 8, 8, 2, 64),
    (1, 3000, 200, 8, 8, 2, 64),
    (16, 226, 48, 8, 4, 2, 64),
    (16, 226, 48, 8, 8, 2, 32),
    (16, 40, 20, 8, 4, 2, 32),
]
QUICK = [(2, 40, 20, 4, 4, 2, 32)]
DECODE = (32, 226, 48, 8, 4, 2, 64)


def segments(prompts: int, p: int, r: int, g: int) -> Segments:
    """`prompts` prompts of p tokens, then g responses of r tokens to each."""
    start = np.arange(prompts) * p
    zero = np.zeros(prompts, dtype=np.int64)
    own = np.stack([start, zero + p, start, zero + p, zero, zero], 1)
    first = prompts * p + np.arange(prompts * g) * r
    length = np.full(prompts * g, r)
    shared = np.stack([first, length, first, length, start.repeat(g), np.full(prompts * g, p)], 1)
    return Segments(np.concatenate([own, shared]))


def decoding(prompts: int, p: int, r: int, g: int) -> Segments:
    """One query a response; the rows of k and v as in `segments`."""
    rows = segments(prompts, p, r, g).table[prompts:].copy()
    rows[:, 0], rows[:, 1] = np.arange(len(rows)), 1
    return Segments(rows)


def _unshared(x: torch.Tensor, layout: Segments, prompts: int) -> torch.Tensor:
    """(T, H, D) -> (g, H, p + r, D): each response after its own copy of the prompt."""
    rows = [
        torch.cat([torch.arange(s[4], s[4] + s[5]), torch.arange(s[2], s[2] + s[3])])
        for s in layout.table[prompts:].tolist()
    ]
    return x.detach()[torch.stack(rows).to(x.device)].transpose(1, 2).contiguous()


def _gradients(f, inputs, grad):
    return torch.autograd.grad(f(*inputs), inputs, grad)


def train(case, dtype, device):
    """The providers' forward + backward, and output and dQ of the responses of each (n, H, D), with the truth's."""
    prompts, p, r, g, heads, shared, size = case
    layout = segments(*case[:4])
    total = len(layout.table) and layout.rows[0]
    shapes = ((total, heads, size), (total, shared, size), (total, shared, size), (total, heads, size))
    q, k, v, grad = (torch.randn(shape).to(dtype) for shape in shapes)
    q, k, v, grad = (x.to(device) for x in (q, k, v, grad))
    packed = [x.requires_grad_() for x in (q, k, v)]
    rows = [_unshared(x, layout, prompts).requires_grad_() for x in (q, k, v)]
    wide = _unshared(grad, layout, prompts)
    wide[:, :, :p] = 0

    def sdpa(*x):
        return scaled_dot_product_attention(*x, is_causal=True, enable_gqa=True)

    def ours(*x):
        return prefix_attention(*x, layout)

    def merged(*x):
        return merged_attention(*x, layout)

    def of_responses(x):
        return x[:, :, p:].transpose(1, 2).flatten(0, 1)

    def found(f, inputs, given, cut):
        out = f(*inputs)
        return torch.cat([cut(x).double() for x in (out.detach(), torch.autograd.grad(out, inputs, given)[0])])

    exact = found(sdpa, [x.detach().double().requires_grad_() for x in rows], wide.double(), of_responses)
    results = {"sdpa": found(sdpa, rows, wide, of_responses)}
    runs = {}
    for name, f in {"cosmo_fast": ours, "cosmo_fast_merged": merged}.items():
        if device == "cpu" or name == "cosmo_fast":
            results[name] = found(f, packed, grad, lambda x: x[prompts * p :])
            runs[name] = partial(_gradients, f, packed, grad)
    runs["sdpa"] = partial(_gradients, sdpa, rows, wide)
    return runs, {name: (x - exact).norm().item() for name, x in results.items()}


@torch.no_grad()
def decode(case, dtype, device):
    """One token of each response: ours, and sdpa with every response's keys beside each other."""
    prompts, p, r, g, heads, shared, size = case
    layout, all_rows = decoding(*case[:4]), segments(*case[:4])
    q = torch.randn(prompts * g, heads, size).to(device, dtype)
    k, v = (torch.randn(all_rows.rows[0], shared, size).to(device, dtype) for _ in range(2))
    keys, values = (_unshared(x, all_rows, prompts) for x in (k, v))

    def sdpa(q, keys, values):
        return scaled_dot_product_attention(q.unsqueeze(2), keys, values, enable_gqa=True)[:, :, 0]

    exact = sdpa(q.double(), keys.double(), values.double())
    runs = {"cosmo_fast": lambda: prefix_attention(q, k, v, layout), "sdpa": lambda: sdpa(q, keys, values)}
    return runs, {name: (run().double() - exact).norm().item() for name, run in runs.items()}


def rows(cases, dtypes, repeats, device):
    """One row a provider and case."""
    origin = measure.origin(device)
    for dtype in dtypes:
        for make, case in [(train, case) for case in cases] + [(decode, DECODE)]:
            torch.manual_seed(0)
            prompts, p, r, g, heads, shared, size = case
            runs, errors = make(case, getattr(torch, dtype), device)
            times = measure.interleaved(runs, repeats, device)
            for name in runs:
                about = {"p": p, "r": r if make is train else f"decode {r}", "g": prompts * g, "heads": heads}
                about |= {"kv_heads": shared, "head_size": size, "dtype": dtype, "provider": name}
                about |= {"ms_p50": times[name]["ms_p50"], "error_ratio": errors[name] / errors["sdpa"]}
                yield about | origin
            ratios = {name: times[name]["ms_p50"] / times["cosmo_fast"]["ms_p50"] for name in runs}
            shares = (p * (p + 1) / 2 + g * (r * p + r * (r + 1) / 2), g * (p + r) * (p + r + 1) / 2)
            told = "  ".join(f"{name} {ratio:.2f} x" for name, ratio in ratios.items() if name != "cosmo_fast")
            pairs = f"  (causal pairs {shares[1] / shares[0]:.2f} x)" if make is train else "  (decode)"
            print(f"{dtype} {case}: {times['cosmo_fast']['ms_p50']:.2f} ms;  {told}{pairs}", flush=True)


def main() -> None:
    """Measures, prints, writes the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="one small case, three repeats")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cases, repeats = (QUICK, 3) if options.quick else (CASES, options.repeats)
    path = options.output or measure.result_file("prefix_attention", options.quick)
    measure.write(path, COLUMNS, rows(cases, options.dtypes.split(","), repeats, options.device))


if __name__ == "__main__":
    main()
