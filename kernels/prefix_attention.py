"""Fused attention over shared prefixes: one pass over a row's prefix keys and its own, no atomics, deterministic.

The online softmax and the backward from its log-sum-exp are FlashAttention's (Dao et al., arXiv 2205.14135 and
2307.08691). The rest is ours. A tile is made of (position, head) rows: the query heads of one key head lie side by
side, and segments that share a prefix fill tiles together, so that a prefix is read once for many short responses.
Every interval of keys is walked in blocks from its own start, and a block that a row does not see leaves its sums as
they are: what a row comes to does not depend on who else is in its tile. In the backward a key is written once, by the
program that walks all of its readers in order.
"""

from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl
from cosmo_fast.kernels.prefix_schedule import key_tiles, row_tiles
from torch import Tensor

# No fused products: with and without a mask the compiler would fuse differently, and rows would depend on their tile.
OPTIONS = {"enable_fp_fusion": False}
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_LN2 = tl.constexpr(0.6931471805599453)
_LOG2E = tl.constexpr(1.4426950408889634)
_schedules = WeakKeyDictionary()


@dataclass(frozen=True)
class Tiles:
    """Rows and keys of a tile, without spills, and how Triton runs it."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int

    @property
    def launch(self) -> dict:
        return {"BLOCK_M": self.rows, "BLOCK_N": self.keys, "num_warps": self.num_warps, "num_stages": self.num_stages}

    def few_rows(self) -> "Tiles":
        """For decoding: half the rows on half the warps, so that a row's arithmetic stays what it is."""
        return replace(self, rows=64, num_warps=4) if self.rows == 128 else self


# by bytes of an element and padded head size: forward, gradient of the queries, gradient of the keys
TILES = {
    (2, 64): (Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 2), Tiles(32, 128, 8, 2)),
    (2, 128): (Tiles(128, 32, 8, 3), Tiles(128, 32, 8, 2), Tiles(32, 64, 8, 2)),
    (2, 256): (Tiles(32, 32, 8, 2), Tiles(32, 16, 8, 2), Tiles(32, 32, 8, 2)),
    (4, 64): (Tiles(32, 32, 8, 2), Tiles(32, 32, 8, 1), Tiles(32, 32, 8, 2)),
    (4, 128): (Tiles(32, 16, 8, 1), Tiles(16, 16, 8, 1), Tiles(16, 32, 8, 1)),
}


@triton.jit
def _load(base, offsets, inside, HEAD: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows at these offsets, 0 where a row is not inside and beyond the head."""
    d = tl.arange(0, BLOCK_D)
    mask = inside[:, None]
    if HEAD < BLOCK_D:
        mask &= (d < HEAD)[None, :]
    return tl.load(base + (offsets[:, None] + d[None, :]), mask=mask, other=0.0)


@triton.jit
def _rows(pieces, first, last, position):
    """The query row at each position of a tile, -1 where there is none."""
    row = tl.full(position.shape, -1, tl.int32)
    for piece in range(first, last):
        at = pieces + piece * 7
        begin, end, base = tl.load(at).to(tl.int32), tl.load(at + 1).to(tl.int32), tl.load(at + 2).to(tl.int32)
        row = tl.where((position >= begin) & (position < end), position + base, row)
    return row


@triton.jit
def _piece(pieces, piece, position, BLOCK_N: tl.constexpr):
    """First key, how many, how many of them every row sees (whole blocks), and the last that each row sees or -1."""
    at = pieces + piece * 7
    shift, keys, clear = tl.load(at + 4).to(tl.int32), tl.load(at + 5).to(tl.int32), tl.load(at + 6).to(tl.int32)
    mine = (position >= tl.load(at).to(tl.int32)) & (position < tl.load(at + 1).to(tl.int32))
    limit = tl.where(mine, tl.minimum(position + shift, keys - 1), -1)
    return tl.load(at + 3), keys, clear // BLOCK_N * BLOCK_N, limit


@triton.jit
def _attend(
    top, total, acc, query, k, v, k_row, v_row, start, keys, limit, scale,
    MASKED: tl.constexpr, HEAD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of keys, of which a row sees those up to its limit: running maximum, sum and weighted values."""
    n = tl.arange(0, BLOCK_N)
    at, inside = tl.cast(start, tl.int64), n < keys - start
    key = _load(k + at * k_row, n * k_row.to(tl.int32), inside, HEAD, BLOCK_D)
    value = _load(v + at * v_row, n * v_row.to(tl.int32), inside, HEAD, BLOCK_D)
    scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
    if MASKED:
        scores = tl.where((start + n)[None, :] <= limit[:, None], scores, float("-inf"))
    next_top = tl.maximum(top, tl.max(scores, 1))
    base = tl.where(next_top == float("-inf"), 0.0, next_top)  # -inf - -inf is NaN
    p = tl.exp2(scores - base[:, None])
    fade = tl.exp2(top - base)
    total = total * fade + tl.sum(p, 1)
    next_acc = tl.dot(p.to(value.dtype), value, acc * fade[:, None], input_precision="ieee")
    if MASKED:  # 0 times a foreign NaN is NaN
        next_acc = tl.where(limit[:, None] >= 0, next_acc, acc)
    return next_top, total, next_acc


@triton.jit(do_not_specialize=["kv_heads"])
def _forward_kernel(
    q, k, v, out, lse, tiles, pieces,
    q_row: tl.int64, q_head: tl.int64, k_row: tl.int64, k_head: tl.int64, v_row: tl.int64, v_head: tl.int64,
    kv_heads, scale,
    REP: tl.constexpr, HEAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tile, kv_head = (tl.program_id(0) // kv_heads).to(tl.int64), (tl.program_id(0) % kv_heads).to(tl.int64)
    first, last = tl.load(tiles + tile * 2), tl.load(tiles + tile * 2 + 1)
    slot, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    position = slot // REP
    row, head = _rows(pieces, first, last, position), kv_head.to(tl.int32) * REP + slot % REP
    query = _load(q, row.to(tl.int64) * q_row + head * q_head, row >= 0, HEAD, BLOCK_D)
    k += kv_head * k_head
    v += kv_head * v_head
    scale *= _LOG2E
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for piece in range(first, last):
        own, keys, full, limit = _piece(pieces, piece, position, BLOCK_N)
        k_at, v_at = k + own * k_row, v + own * v_row
        for start in range(0, full, BLOCK_N):
            top, total, acc = _attend(
                top, total, acc, query, k_at, v_at, k_row, v_row, start, keys, limit, scale,
                False, HEAD, BLOCK_N, BLOCK_D,
            )  # fmt: skip
        for start in range(full, keys, BLOCK_N):
            top, total, acc = _attend(
                top, total, acc, query, k_at, v_at, k_row, v_row, start, keys, limit, scale,
                True, HEAD, BLOCK_N, BLOCK_D,
            )  # fmt: skip
    at = row.to(tl.int64) * (kv_heads * REP) + head
    tl.store(lse + at, (top + tl.log2(total)) * _LN2, mask=row >= 0)
    mask = (row >= 0)[:, None] & (d < HEAD)[None, :]
    tl.store(out + at[:, None] * HEAD + d[None, :], (acc / total[:, None]).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _query_step(
    acc, query, grad, lse, delta, k, v, k_row, v_row, start, keys, limit, scale,
    MASKED: tl.constexpr, HEAD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What one tile of keys adds to the gradient of the queries."""
    n = tl.arange(0, BLOCK_N)
    at, inside = tl.cast(start, tl.int64), n < keys - start
    key = _load(k + at * k_row, n * k_row.to(tl.int32), inside, HEAD, BLOCK_D)
    value = _load(v + at * v_row, n * v_row.to(tl.int32), inside, HEAD, BLOCK_D)
    p = tl.exp2(tl.dot(query, tl.trans(key), input_precision="ieee") * scale - lse[:, None])
    if MASKED:
        p = tl.where((start + n)[None, :] <= limit[:, None], p, 0.0)
    ds = p * (tl.dot(grad, tl.trans(value), input_precision="ieee") - delta[:, None])
    next_acc = tl.dot(ds.to(key.dtype), key, acc, input_precision="ieee")
    if MASKED:
        next_acc = tl.where(limit[:, None] >= 0, next_acc, acc)
    return next_acc


@triton.jit(do_not_specialize=["kv_heads"])
def _query_kernel(
    q, k, v, out, grad, lse, delta, dq, tiles, pieces,
    q_row: tl.int64, q_head: tl.int64, k_row: tl.int64, k_head: tl.int64, v_row: tl.int64, v_head: tl.int64,
    kv_heads, scale,
    REP: tl.constexpr, HEAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The forward's walk again. Leaves delta = sum(grad * out) of its rows for the gradient of the keys."""
    tile, kv_head = (tl.program_id(0) // kv_heads).to(tl.int64), (tl.program_id(0) % kv_heads).to(tl.int64)
    first, last = tl.load(tiles + tile * 2), tl.load(tiles + tile * 2 + 1)
    slot, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    position = slot // REP
    row, head = _rows(pieces, first, last, position), kv_head.to(tl.int32) * REP + slot % REP
    at = row.to(tl.int64) * (kv_heads * REP) + head
    query = _load(q, row.to(tl.int64) * q_row + head * q_head, row >= 0, HEAD, BLOCK_D)
    given = _load(grad, at * HEAD, row >= 0, HEAD, BLOCK_D)
    result = _load(out, at * HEAD, row >= 0, HEAD, BLOCK_D)
    difference = tl.sum(given.to(tl.float32) * result.to(tl.float32), 1)
    tl.store(delta + at, difference, mask=row >= 0)
    log = tl.load(lse + at, mask=row >= 0, other=0.0) * _LOG2E
    k += kv_head * k_head
    v += kv_head * v_head
    scale2 = scale * _LOG2E
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for piece in range(first, last):
        own, keys, full, limit = _piece(pieces, piece, position, BLOCK_N)
        k_at, v_at = k + own * k_row, v + own * v_row
        for start in range(0, full, BLOCK_N):
            acc = _query_step(
                acc, query, given, log, difference, k_at, v_at, k_row, v_row, start, keys, limit, scale2,
                False, HEAD, BLOCK_N, BLOCK_D,
            )  # fmt: skip
        for start in range(full, keys, BLOCK_N):
            acc = _query_step(
                acc, query, given, log, difference, k_at, v_at, k_row, v_row, start, keys, limit, scale2,
                True, HEAD, BLOCK_N, BLOCK_D,
            )  # fmt: skip
    mask = (row >= 0)[:, None] & (d < HEAD)[None, :]
    tl.store(dq + at[:, None] * HEAD + d[None, :], (acc * scale).to(dq.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["kv_heads", "total_keys"])
def _key_kernel(
    q, k, v, grad, lse, delta, dk, dv, tiles, readers,
    q_row: tl.int64, q_head: tl.int64, k_row: tl.int64, k_head: tl.int64, v_row: tl.int64, v_head: tl.int64,
    kv_heads, total_keys, scale,
    REP: tl.constexpr, HEADS: tl.constexpr, HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of keys and values from HEADS of the REP query heads: over all their readers, in order."""
    SPLITS: tl.constexpr = REP // HEADS
    POSITIONS: tl.constexpr = BLOCK_M // HEADS
    part = (tl.program_id(0) % (kv_heads * SPLITS)).to(tl.int64)
    kv_head, split = part // SPLITS, part % SPLITS
    at = tiles + (tl.program_id(0) // (kv_heads * SPLITS)).to(tl.int64) * 4
    key_first, keys = tl.load(at), tl.load(at + 1).to(tl.int32)
    first, last = tl.load(at + 2).to(tl.int32), tl.load(at + 3).to(tl.int32)
    n, slot, d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    k += key_first * k_row + kv_head * k_head
    v += key_first * v_row + kv_head * v_head
    key = _load(k, n * k_row.to(tl.int32), n < keys, HEAD, BLOCK_D)
    value = _load(v, n * v_row.to(tl.int32), n < keys, HEAD, BLOCK_D)
    heads = kv_heads * REP
    head = kv_head * REP + split * HEADS
    q += head * q_head
    grad += head * HEAD
    position = slot // HEADS
    q_at = position * q_row.to(tl.int32) + slot % HEADS * q_head.to(tl.int32)
    row_at = position * heads + slot % HEADS
    scale2 = scale * _LOG2E
    acc_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    acc_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for reader in range(first, last):
        begin, end = tl.load(readers + reader * 3), tl.load(readers + reader * 3 + 1)
        ahead = tl.load(readers + reader * 3 + 2) - key_first  # row r sees the tile's keys n <= r + ahead
        begin = tl.maximum(begin, -ahead)
        for start in range(0, (end - begin).to(tl.int32), POSITIONS):
            row = begin + start
            inside = (position < end - row) & (slot < POSITIONS * HEADS)
            query = _load(q + row * q_row, q_at, inside, HEAD, BLOCK_D)
            given = _load(grad + row * heads * HEAD, row_at * HEAD, inside, HEAD, BLOCK_D)
            log = tl.load(lse + row * heads + head + row_at, mask=inside, other=0.0) * _LOG2E
            difference = tl.load(delta + row * heads + head + row_at, mask=inside, other=0.0)
            limit = tl.where(inside, position + tl.minimum(row + ahead, BLOCK_N).to(tl.int32), -1)
            scores = tl.dot(key, tl.trans(query), input_precision="ieee") * scale2
            p = tl.where(n[:, None] <= limit[None, :], tl.exp2(scores - log[None, :]), 0.0)
            acc_v = tl.dot(p.to(given.dtype), given, acc_v, input_precision="ieee")
            ds = p * (tl.dot(value, tl.trans(given), input_precision="ieee") - difference[None, :])
            acc_k = tl.dot(ds.to(query.dtype), query, acc_k, input_precision="ieee")
    at = ((split * total_keys + key_first + n) * kv_heads + kv_head) * HEAD
    mask = (n < keys)[:, None] & (d < HEAD)[None, :]
    tl.store(dk + at[:, None] + d[None, :], (acc_k * scale).to(dk.dtype.element_ty), mask=mask)
    tl.store(dv + at[:, None] + d[None, :], acc_v.to(dv.dtype.element_ty), mask=mask)


def _cached(segments, key, build):
    """(tiles, lists) of a plan on a device, built once for all layers."""
    known = _schedules.setdefault(segments, {})
    if key not in known:
        known[key] = tuple(torch.from_numpy(x).to(key[0]) for x in build())
    return known[key]


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _shape(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, int, dict, tuple[Tiles, Tiles, Tiles]]:
    """Key heads, query heads to each, what is fixed in the kernels, and the tiles."""
    heads, size = q.shape[1:]
    kv_heads, block = k.shape[1], max(16, triton.next_power_of_2(size))
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        kinds = ", ".join(str(x.dtype) for x in (q, k, v))
        raise ValueError(f"on CUDA q, k, v must all be bfloat16, float16 or float32, got {kinds}")
    tiles = TILES.get((q.element_size(), max(64, block)))
    if tiles is None:
        raise ValueError(f"the head size must be at most 256 (float32 on CUDA: 128), got {size} in {q.dtype}")
    if any(x.stride(-1) != 1 or x.stride(0) >= 2**24 for x in (q, k, v)) or q.stride(1) * heads >= 2**30:
        strides = [x.stride() for x in (q, k, v)]
        raise ValueError(f"the last axis must be contiguous and rows within 2**24 elements, got strides {strides}")
    rep, most = heads // kv_heads, min(t.rows for t in tiles)
    if rep > most:
        raise ValueError(f"{heads} query heads on {kv_heads} key heads: at most {most} to one at head size {size}")
    return kv_heads, rep, {"HEAD": size, "BLOCK_D": block, **OPTIONS}, tiles


def _row_schedule(segments, q: Tensor, kv_heads: int, rep: int, tiles: Tiles) -> tuple[Tensor, Tensor]:
    def build():
        shared = row_tiles(segments.table, tiles.rows // rep, True)
        few = len(shared[0]) * kv_heads < _processors(q.device)  # then more programs are better than fewer reads
        return row_tiles(segments.table, tiles.rows // rep, False) if few else shared

    return _cached(segments, (q.device, tiles.rows // rep, kv_heads), build)


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:2]]


def prefix_attention(q: Tensor, k: Tensor, v: Tensor, segments, scale: float) -> tuple[Tensor, Tensor]:
    """out (Tq, H, D) in q's dtype and lse (Tq, H) fp32, natural: see `ops.prefix_attention`.

    Raises ValueError for another dtype than bf16, fp16 or fp32, a head size over 256 (fp32: 128), more query heads to
    a key head than a tile has rows, or a last axis that is not contiguous.
    """
    kv_heads, rep, fixed, (tiles, _, _) = _shape(q, k, v)
    if 2 * rep * segments.table[:, 1].max(initial=0) <= tiles.rows:
        tiles = tiles.few_rows()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    table, pieces = _row_schedule(segments, q, kv_heads, rep, tiles)
    if len(table):
        _forward_kernel[(len(table) * kv_heads,)](
            q, k, v, out, lse, table, pieces, *_strides(q, k, v), kv_heads, scale, REP=rep, **fixed, **tiles.launch
        )
    return out, lse


def prefix_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, contiguous and in their dtype, from that of `out` (Tq, H, D) and what the forward returned.

    Where keys are few, each query head's part of dk and dv is summed apart in fp32, then all in order.
    """
    kv_heads, rep, fixed, (_, row, key) = _shape(q, k, v)
    grad, strides = grad.contiguous(), _strides(q, k, v)
    dq, delta = torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty_like(lse)
    table, pieces = _row_schedule(segments, q, kv_heads, rep, row)
    tiles, readers = _cached(segments, (q.device, "keys", key.keys), lambda: key_tiles(segments.table, key.keys))
    wanted = 2 * _processors(q.device)
    splits = next((s for s in range(1, rep) if rep % s == 0 and len(tiles) * kv_heads * s >= wanted), rep)
    shape, dtype = (splits, *k.shape), q.dtype if splits == 1 else torch.float32
    dk, dv = (torch.zeros(shape, dtype=dtype, device=q.device) for _ in range(2))
    if len(table):
        _query_kernel[(len(table) * kv_heads,)](
            q, k, v, out, grad, lse, delta, dq, table, pieces, *strides, kv_heads, scale, REP=rep, **fixed, **row.launch
        )
        _key_kernel[(len(tiles) * kv_heads * splits,)](
            q, k, v, grad, lse, delta, dk, dv, tiles, readers, *strides, kv_heads, k.shape[0], scale,
            REP=rep, HEADS=rep // splits, **fixed, **key.launch,
        )  # fmt: skip
    return dq, *(x[0] if splits == 1 else x.sum(0).to(q.dtype) for x in (dk, dv))


def variants():
    """(kernel, label, signature by argument, compile-time values) of every variant, for `kernels.check`."""
    rep = 7
    strides = dict.fromkeys(("q_row", "q_head", "k_row", "k_head", "v_row", "v_head"), "i64")
    for (size, block), (forward, row, key) in TILES.items():
        for dtype, kind in DTYPES.items():
            if dtype.itemsize != size:
                continue
            inputs = dict.fromkeys(("q", "k", "v"), f"*{kind}")
            lists = {"tiles": "*i64", "pieces": "*i64", **strides, "kv_heads": "i32", "scale": "fp32"}
            fixed = {"REP": rep, "HEAD": block, "BLOCK_D": block}
            signature = {**inputs, "out": f"*{kind}", "lse": "*fp32", **lists}
            for tiles in dict.fromkeys((forward, forward.few_rows())):
                yield _forward_kernel, f"{kind} {block} {tiles.rows} rows", signature, {**fixed, **tiles.launch}
            signature |= {"grad": f"*{kind}", "delta": "*fp32", "dq": f"*{kind}"}
            yield _query_kernel, f"{kind} {block}", signature, {**fixed, **row.launch}
            signature = {**inputs, "grad": f"*{kind}", "lse": "*fp32", "delta": "*fp32", **lists, "readers": "*i64"}
            signature |= {"total_keys": "i32"}
            for heads, result in ((rep, kind), (1, "fp32")):
                outputs = {"dk": f"*{result}", "dv": f"*{result}"}
                label = f"{kind} {block} {heads} heads"
                yield _key_kernel, label, {**signature, **outputs}, {**fixed, "HEADS": heads, **key.launch}
