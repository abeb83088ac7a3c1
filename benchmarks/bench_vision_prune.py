"""Choosing vision rows, against what others do, and against the prefill that it shortens.

    python benchmarks/bench_vision_prune.py [--threads 1] [--device cpu] [--dtypes float32,bfloat16] [--repeats 15]

One image of n rows, k kept; rows of a mixture, as patches of one thing resemble each other. `divprune_loop`: the whole
matrix of cosine distances, then for every pick the minimum over the rows chosen so far, as DivPrune's published code
goes about it. `running_min`: the same matrix and a running minimum, the fastest form in PyTorch (a product of
each pick with all rows took four times as long). Both in fp32 whatever the dtype: cosines in bf16 are full of ties.
`matrix`: attention of 64 text rows (28 query and 4 key heads of 128) to n + 64 keys as eager attention in transformers
forms it, then its column sums; cosmo_fast is given q, k and the lse that flash attention leaves behind. The row
`prefill` (provider transformers) is what a 3B model does with the n + 64 tokens: 2 of Qwen2.5-3B's 36 decoder layers
with random weights, times 18, without embeddings and head.
Writes benchmarks/results/vision_prune.csv (--quick: vision_prune_quick.csv).
"""

import argparse
from pathlib import Path

import measure
import torch
from transformers import Qwen2Config, Qwen2Model

from cosmo_fast.ops import vision_prune

COLUMNS = "selector provider n k d dtype device ms_p50 torch commit".split()
CASES = [(1200, 300, 1024)]
QUICK = [(120, 30, 64)]
HEADS, KEY_HEADS, SIZE, TEXT = 28, 4, 128, 64
LAYERS, MEASURED = 36, 2


def _distances(x: torch.Tensor) -> torch.Tensor:
    x = x.float()
    x = x / x.norm(dim=1, keepdim=True)
    return 1 - x @ x.T


def divprune_loop(x: torch.Tensor, k: int) -> torch.Tensor:
    """The rows in the order in which they are picked; first the one whose nearest neighbour is farthest."""
    distances = _distances(x)
    chosen = torch.empty(k, dtype=torch.long, device=x.device)
    for i in range(k):
        if i == 0:
            nearest = distances.topk(2, dim=0, largest=False).values[1]
        else:
            nearest = torch.min(distances.index_select(0, chosen[:i]), dim=0).values  # with indices, as published
        chosen[i] = nearest.argmax()
    return chosen


def running_min(x: torch.Tensor, k: int) -> torch.Tensor:
    """The same picks."""
    distances = _distances(x)
    chosen = torch.empty(k, dtype=torch.long, device=x.device)
    chosen[0] = distances.topk(2, dim=0, largest=False).values[1].argmax()
    nearest = distances[chosen[0]].clone()
    for i in range(1, k):
        chosen[i] = nearest.argmax()
        torch.minimum(nearest, distances[chosen[i]], out=nearest)
    return chosen


def matrix(query: torch.Tensor, key: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """The k of the first n keys that get the most attention."""
    key = key.repeat_interleave(HEADS // KEY_HEADS, 1)
    weights = (query.transpose(0, 1) @ key.permute(1, 2, 0)) * SIZE**-0.5
    weights = weights.softmax(-1, dtype=torch.float32).to(query.dtype)
    return weights.sum((0, 1))[:n].topk(k).indices.sort().values


@torch.no_grad()
def providers(n: int, k: int, d: int, dtype: torch.dtype, device: str) -> dict[str, dict]:
    """For each selector the calls to compare, ours first."""
    x = torch.randn(40, d)[torch.randint(40, (n,))] + 0.7 * torch.randn(n, d)
    query, key = torch.randn(TEXT, HEADS, SIZE), torch.randn(n + TEXT, KEY_HEADS, SIZE)
    scores = query.transpose(0, 1) @ key.repeat_interleave(HEADS // KEY_HEADS, 1).permute(1, 2, 0) * SIZE**-0.5
    lse = scores.logsumexp(-1).T.contiguous().to(device)
    x, query, key = (y.to(dtype).to(device) for y in (x, query, key))
    given = {"text": x[:1], "seeds": [0], "query": query, "key": key[:n], "lse": lse, "query_counts": [TEXT]}
    given["grids"] = [(4, n // 4, 1)]

    def ours(selector):
        return lambda: vision_prune(x, [n], k, selector, **given)

    found = {name: {"cosmo_fast": ours(name)} for name in ("uniform", "random", "dpp", "key_norm", "frame_difference")}
    found["max_min"] = {"cosmo_fast": ours("max_min"), "divprune_loop": lambda: divprune_loop(x, k)}
    found["max_min"]["running_min"] = lambda: running_min(x, k)
    found["attention"] = {"cosmo_fast": ours("attention"), "matrix": lambda: matrix(query, key, n, k)}
    if dtype == torch.float32:  # before they are timed: the same rows, but for near ties
        assert divprune_loop(x, k).equal(running_min(x, k))
        same = set(ours("attention")().tolist()) & set(matrix(query, key, n, k).tolist())
        assert len(same) >= 0.99 * k, f"attention and its matrix share {len(same)} of {k} rows"
    return found


@torch.no_grad()
def prefill(tokens: int, dtype: torch.dtype, device: str, repeats: int) -> float:
    """Milliseconds of the decoder layers of a 3B model."""
    shape = {"hidden_size": 2048, "intermediate_size": 11008, "num_attention_heads": 16, "num_key_value_heads": 2}
    config = Qwen2Config(vocab_size=64, num_hidden_layers=MEASURED, **shape)
    model = Qwen2Model(config).to(dtype).to(device).eval()
    ids = torch.zeros(1, tokens, dtype=torch.long, device=device)
    runs = {"prefill": lambda: model(ids, use_cache=False)}
    runs["prefill"]()
    return measure.interleaved(runs, repeats, device)["prefill"]["ms_p50"] * LAYERS / MEASURED


def rows(cases, dtypes, device: str, repeats: int):
    """One row a selector and provider, and one for the prefill."""
    for (n, k, d), dtype in ((case, dtype) for case in cases for dtype in dtypes):
        about = {"n": n, "k": k, "d": d, "dtype": str(dtype).removeprefix("torch."), **measure.origin(device)}
        for selector, runs in providers(n, k, d, dtype, device).items():
            for run in runs.values():
                run()
            for provider, times in measure.interleaved(runs, repeats, device).items():
                yield about | {"selector": selector, "provider": provider, "ms_p50": times["ms_p50"]}
        if (n, k, d) == cases[0]:
            ms = prefill(n + TEXT, dtype, device, 3)
            yield about | {"selector": "prefill", "provider": "transformers", "ms_p50": ms}


def main() -> None:
    """Measures, prints, writes the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="one small case, three repeats")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dtypes = [getattr(torch, name) for name in options.dtypes.split(",")]
    cases, repeats = (QUICK, 3) if options.quick else (CASES, options.repeats)

    def told():
        for row in rows(cases, dtypes, options.device, repeats):
            print(
                "{selector:<18}{provider:<16}{n:>6}{k:>6}{d:>6} {dtype:<10}{ms_p50:>10.3f} ms".format(**row), flush=True
            )
            yield {name: row[name] for name in COLUMNS}

    measure.write(options.output or measure.result_file("vision_prune", options.quick), COLUMNS, told())


if __name__ == "__main__":
    main()
