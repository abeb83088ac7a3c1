"""Triton twins of csrc/vision_scores.cpp: no atomics, no matrix of weights, each image on its own."""

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
KEYS, LANES = 32, 32  # rows of a program, and query rows (a token's heads side by side) at a time
ROWS, SUMS = 16, 32  # rows of a program, and the lanes of a sum, which csrc/vision_prune.h fixes


@triton.jit
def _columns_kernel(
    query, key, lse, table, parts, n, q_row, q_head, k_row, k_head, scale,
    REP: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, KEYS: tl.constexpr, LANES: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    entry = table + tl.program_id(0).to(tl.int64) * 4
    first, keys, token, queries = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
    element = tl.arange(0, PADDED)
    row = tl.arange(0, KEYS)
    k_at = key + (first + row)[:, None] * k_row + head * k_head + element[None, :]
    k = tl.load(k_at, mask=(row < keys)[:, None] & (element < D)[None, :], other=0.0)
    score = tl.zeros((KEYS,), tl.float64)
    for start in range(0, queries * REP, LANES):
        lane = start + tl.arange(0, LANES)
        there = lane < queries * REP
        place, own = token + lane // REP, head * REP + lane % REP
        q_at = query + (place * q_row + own * q_head)[None, :] + element[:, None]
        q = tl.load(q_at, mask=there[None, :] & (element < D)[:, None], other=0.0)
        limit = tl.load(lse + place * HEADS + own, mask=there, other=float("inf"))
        s = tl.dot(k, q, input_precision="ieee") * scale - limit[None, :]
        score += tl.sum(tl.exp(s), 1).to(tl.float64)
    tl.store(parts + head * n + first + row, score, mask=row < keys)


@triton.jit
def _squares_kernel(x, back, out, n, d, stride, ROWS: tl.constexpr, SUMS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, SUMS)
    step = tl.load(back + row, mask=row < n, other=0)
    total = tl.zeros((ROWS, SUMS), tl.float64)
    for start in range(0, d, SUMS):
        there = (row < n)[:, None] & (start + lane < d)[None, :]
        y = tl.load(x + row[:, None] * stride + (start + lane)[None, :], mask=there, other=0.0).to(tl.float64)
        before = there & (step > 0)[:, None]
        other = (row - step)[:, None] * stride + (start + lane)[None, :]
        y -= tl.load(x + other, mask=before, other=0.0).to(tl.float64)
        total = tl.fma(y, y, total)
    tl.store(out + row[:, None] * SUMS + lane[None, :], total, mask=(row < n)[:, None])


def variants():
    """(kernel, label, signature by argument, compile-time values) of every variant, for `kernels.check`."""
    numbers = {name: "i64" for name in ("n", "q_row", "q_head", "k_row", "k_head")}
    for dtype in ("fp32", "bf16"):
        signature = {"query": f"*{dtype}", "key": f"*{dtype}", "lse": "*fp32", "table": "*i64", "parts": "*fp64"}
        sizes = {"REP": 7, "HEADS": 28, "D": 128, "KEYS": KEYS, "LANES": LANES, "PADDED": 128}
        yield _columns_kernel, dtype, signature | numbers | {"scale": "fp32"}, sizes
    for dtype in ("fp32", "bf16", "fp64"):
        signature = {"x": f"*{dtype}", "back": "*i64", "out": "*fp64", "n": "i64", "d": "i64", "stride": "i64"}
        yield _squares_kernel, dtype, signature, {"ROWS": ROWS, "SUMS": SUMS}


def vision_attention(
    query: Tensor, key: Tensor, lse: Tensor, counts: Tensor, query_counts: Tensor, scale: float
) -> Tensor:
    """Σ exp(scale q·k - lse) over query rows and heads, fp64 (n,): see `ops.vision_prune`."""
    if query.dtype == torch.float64 and query.is_cuda:
        raise ValueError("vision_prune: attention in fp64 is on the CPU only")
    counts, query_counts = counts.numpy(), query_counts.numpy()
    starts, tokens = np.cumsum(counts) - counts, np.cumsum(query_counts) - query_counts
    table = [
        (start + i, min(KEYS, count - i), token, queries)
        for start, count, token, queries in zip(starts, counts, tokens, query_counts, strict=True)
        for i in range(0, count, KEYS)
    ]
    n, heads, d = key.shape
    parts = torch.empty(heads, n, dtype=torch.float64, device=key.device)
    if table:
        places = torch.tensor(np.array(table, np.int64), device=key.device)
        strides = (*query.stride()[:2], *key.stride()[:2])
        sizes = {"REP": query.shape[1] // heads, "HEADS": query.shape[1], "D": d, "KEYS": KEYS, "LANES": LANES}
        padded = max(16, triton.next_power_of_2(d))
        grid = (len(table), heads)
        _columns_kernel[grid](query, key, lse, places, parts, n, *strides, scale, **sizes, PADDED=padded, **OPTIONS)
    return sum(parts, torch.zeros_like(parts[0]))


def vision_squares(x: Tensor, back: Tensor) -> Tensor:
    """Σ (row - the row `back` before it)², or of the row itself where that is 0, fp64 (n,)."""
    n, d = x.shape
    lanes = torch.empty(n, SUMS, dtype=torch.float64, device=x.device)
    if n:
        grid = (triton.cdiv(n, ROWS),)
        _squares_kernel[grid](x, back, lanes, n, d, x.stride(0), ROWS=ROWS, SUMS=SUMS, **OPTIONS)
    while lanes.shape[1] > 1:  # the halves in the same order as on the CPU
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]
