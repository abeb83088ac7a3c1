"""Triton twin of csrc/vocab_kl.cpp: one program a row, no atomics, no host sync, any V, offsets in 64 bits.

y = softcap * tanh(z / softcap) / temperature; softcap 0 means none. What the sums are, and why, is written in the C++.
"""

import itertools

import torch
import triton
import triton.language as tl
from cosmo_fast.kernels.vocab_stats import _tanh
from torch import Tensor

OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
MAX_BLOCK = {torch.bfloat16: 1024, torch.float32: 2048, torch.float64: 128}  # columns at a time, without spills


@triton.jit
def _logits(row, column, columns, softcap, work: tl.constexpr, HAS_CAP: tl.constexpr):
    """A block of capped logits; -inf beyond the row."""
    inside = column < columns
    y = tl.load(row + column, mask=inside, other=float("-inf")).to(work)
    if HAS_CAP:
        y = tl.where(inside, softcap * _tanh(y / softcap), float("-inf"))
    return y


@triton.jit
def _base(top):
    return tl.where(top == float("-inf"), 0.0, top)  # -inf - -inf is NaN


@triton.jit
def _near(x):
    """Where differences of the two rows are made by a series in x = log p - log q."""
    return x * x < (1e-6 if x.dtype == tl.float64 else 0.015625)


@triton.jit
def _difference(p, q, r):
    """q - p without cancellation, 0 for equal rows; r = log p - log q."""
    series = (((r * (1.0 / 120) - 1.0 / 24) * r + 1.0 / 6) * r - 0.5) * r + 1.0
    return tl.where(_near(r), -p * r * series, q - p)


@triton.jit
def _log1p(w):
    """log(1 + w) for -1 < w <= 0 with a small relative error: 2 artanh(w / (2 + w)) by its series near 0."""
    s = w / (2.0 + w)
    z = s * s
    if w.dtype == tl.float64:  # Kahan's correction of the rounded 1 + w
        v = 1.0 + w
        return tl.where(v == 1.0, w, tl.log(v) * (w / tl.where(v == 1.0, 1.0, v - 1.0)))
    series = ((((z * (1.0 / 11) + 1.0 / 9) * z + 1.0 / 7) * z + 1.0 / 5) * z + 1.0 / 3) * z
    return tl.where(w > -0.4, 2.0 * (s + s * series), tl.log(1.0 + w))


@triton.jit
def _mixture(p, q, r, beta):
    """log(p / m), log(q / m) of m = (1 - beta) p + beta q; 0 where that row is 0."""
    first = p >= q
    larger = tl.where(first, p, q)
    part = tl.where(first, beta, beta - 1.0) * _difference(p, q, r) / larger
    log = -_log1p(tl.where(larger > 0.0, part, larger))
    log_p = tl.where(first, log, log + r)
    log_q = tl.where(first, log - r, log)
    return tl.where(p > 0.0, log_p, p), tl.where(q > 0.0, log_q, q)


@triton.jit
def _gradients(p, q, r, kl_p, kl_q, beta, MIXTURE: tl.constexpr):
    """By the logits of either row, before the temperature and the cap."""
    if MIXTURE:
        log_p, log_q = _mixture(p, q, r, beta)
        grad_p, grad_q = (1.0 - beta) * p * (log_p - kl_p), beta * q * (log_q - kl_q)
    else:
        grad_p, grad_q = tl.where(p > 0.0, p * (r - kl_p), p), _difference(p, q, r)
    return grad_p, grad_q


@triton.jit
def _write(row, column, columns, y, gradient, softcap, HAS_CAP: tl.constexpr):
    if HAS_CAP:
        th = y / softcap
        gradient *= 1.0 - th * th
    tl.store(row + column, gradient.to(row.dtype.element_ty), mask=column < columns)


@triton.jit
def _raised(excess, moment, sum_p, sum_q, fall_p, fall_q):
    """The four sums once the exponents of either row have fallen by so many nats (fp64)."""
    gap = fall_p - fall_q
    fade_p, fade_q = tl.exp(-fall_p), tl.exp(-fall_q)
    moved = fade_p * (excess + sum_q * (tl.exp(tl.where(gap > 700.0, 0.0, gap)) - 1.0) - sum_p * gap)
    moved = tl.where(gap > 700.0, fade_q * sum_q, tl.where(fade_p > 0.0, moved, 0.0))
    moment = tl.where(fade_p > 0.0, fade_p * (moment - sum_p * gap), 0.0)
    work: tl.constexpr = sum_p.dtype
    return moved.to(work), moment.to(work), (sum_p * fade_p).to(work), (sum_q * fade_q).to(work)


@triton.jit
def _kl_kernel(
    logits, other, coefficient, temperature, kl, columns, stride, other_stride, softcap, other_softcap, beta,
    HAS_TEMPERATURE: tl.constexpr, HAS_CAP: tl.constexpr, HAS_OTHER_CAP: tl.constexpr, MIXTURE: tl.constexpr,
    WANTED: tl.constexpr, OTHER_WANTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    work: tl.constexpr = kl.dtype.element_ty
    first, second = logits + row * stride, other + row * other_stride
    inverse_t = tl.full((), 1.0, work)
    if HAS_TEMPERATURE:
        inverse_t = 1.0 / tl.load(temperature + row)
    top_p = tl.full((), float("-inf"), work)
    top_q = tl.full((), float("-inf"), work)
    sum_p = tl.zeros((BLOCK,), work)
    sum_q = tl.zeros((BLOCK,), work)
    excess = tl.zeros((BLOCK,), work)
    moment = tl.zeros((BLOCK,), work)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        y = _logits(first, column, columns, softcap, work, HAS_CAP)
        x = _logits(second, column, columns, other_softcap, work, HAS_OTHER_CAP)
        next_p = tl.maximum(top_p, tl.max(y, 0))
        next_q = tl.maximum(top_q, tl.max(x, 0))
        if (next_p > top_p) | (next_q > top_q):
            fall_p = tl.where(top_p == float("-inf"), 0.0, (next_p.to(tl.float64) - top_p) * inverse_t)
            fall_q = tl.where(top_q == float("-inf"), 0.0, (next_q.to(tl.float64) - top_q) * inverse_t)
            excess, moment, sum_p, sum_q = _raised(excess, moment, sum_p, sum_q, fall_p, fall_q)
            top_p = next_p
            top_q = next_q
        base_p, base_q = _base(top_p), _base(top_q)
        d = ((y - x) - (base_p - base_q)) * inverse_t
        eu, ev = tl.exp((y - base_p) * inverse_t), tl.exp((x - base_q) * inverse_t)
        ud = tl.where(eu > 0.0, eu * d, 0.0)  # a token that the first row cannot draw costs nothing
        series = ((1.0 / 24 - d * (1.0 / 120)) * d - 1.0 / 6) * d + 0.5
        sum_p += eu
        sum_q += ev
        moment += ud
        excess += tl.where(_near(d), ud * d * series, ev - eu + ud)
    total_p, total_q = tl.sum(sum_p.to(tl.float64), 0), tl.sum(sum_q.to(tl.float64), 0)
    quotient = total_q / total_p
    ratio = tl.log(quotient)
    result = tl.sum(excess.to(tl.float64), 0) / total_p - (quotient - 1.0 - ratio)
    result = tl.where(ratio > 0.5, tl.sum(moment.to(tl.float64), 0) / total_p + ratio, result)
    base_p, base_q = _base(top_p), _base(top_q)
    scale_p, scale_q = (1.0 / total_p).to(work), (1.0 / total_q).to(work)
    offset = (ratio - (base_p.to(tl.float64) - base_q) * inverse_t).to(work)
    kl_p, kl_q = result.to(work), tl.zeros((), work)
    if MIXTURE:
        sum_p = tl.zeros((BLOCK,), work)
        sum_q = tl.zeros((BLOCK,), work)
        both = tl.zeros((BLOCK,), work)
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            y = _logits(first, column, columns, softcap, work, HAS_CAP)
            x = _logits(second, column, columns, other_softcap, work, HAS_OTHER_CAP)
            p, q = tl.exp((y - base_p) * inverse_t) * scale_p, tl.exp((x - base_q) * inverse_t) * scale_q
            log_p, log_q = _mixture(p, q, (y - x) * inverse_t + offset, beta)
            sum_p += p * log_p
            sum_q += q * log_q
            both += (1.0 - beta) * (p * log_p) + beta * (q * log_q)  # the first-order parts cancel here
        kl_p, kl_q, result = tl.sum(sum_p, 0), tl.sum(sum_q, 0), tl.sum(both.to(tl.float64), 0)
    tl.store(kl + row, result.to(work))
    if WANTED or OTHER_WANTED:
        c = tl.load(coefficient + row) * inverse_t
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            y = _logits(first, column, columns, softcap, work, HAS_CAP)
            x = _logits(second, column, columns, other_softcap, work, HAS_OTHER_CAP)
            p, q = tl.exp((y - base_p) * inverse_t) * scale_p, tl.exp((x - base_q) * inverse_t) * scale_q
            grad_p, grad_q = _gradients(p, q, (y - x) * inverse_t + offset, kl_p, kl_q, beta, MIXTURE)
            if WANTED:
                _write(first, column, columns, y, c * grad_p, softcap, HAS_CAP)
            if OTHER_WANTED:
                _write(second, column, columns, x, c * grad_q, other_softcap, HAS_OTHER_CAP)


def vocab_kl_(
    logits: Tensor,
    other: Tensor,
    coefficient: Tensor | None,
    temperature: Tensor | None,
    softcap: float,
    other_softcap: float,
    beta: float,
    wanted: bool,
    other_wanted: bool,
) -> Tensor:
    """KL(logits || other) (N,), for beta > 0 the mixture's, and its gradient in place: see `ops.vocab_kl`."""
    for x in (logits, other):
        if x.dim() != 2 or x.shape != logits.shape or x.shape[1] == 0 or (x.shape[1] > 1 and x.stride(1) != 1):
            shapes = f"{tuple(logits.shape)} and {tuple(other.shape)}, strides {logits.stride()} and {other.stride()}"
            raise RuntimeError(f"logits and other must be (N, V) with V > 0 and contiguous columns, got {shapes}")
    n, columns = logits.shape
    kl = logits.new_empty(n, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)
    if n:
        _kl_kernel[(n,)](
            logits, other, coefficient, temperature, kl, columns, logits.stride(0), other.stride(0), softcap,
            other_softcap, beta, HAS_TEMPERATURE=temperature is not None, HAS_CAP=softcap > 0,
            HAS_OTHER_CAP=other_softcap > 0, MIXTURE=beta > 0, WANTED=wanted, OTHER_WANTED=other_wanted,
            BLOCK=min(MAX_BLOCK[logits.dtype], triton.next_power_of_2(columns)), **OPTIONS,
        )  # fmt: skip
    return kl


def variants():
    """(kernel, label, signature by argument, compile-time values) of every variant, for `kernels.check`."""
    names = ("mixture", "first", "second", "options")
    kinds = ((torch.bfloat16, "bf16", "*fp32"), (torch.float32, "fp32", "*fp32"), (torch.float64, "fp64", "*fp64"))
    for (dtype, kind, vector), switches in itertools.product(kinds, itertools.product((False, True), repeat=4)):
        mixture, first, second, options = switches
        if options and first != second:  # between two variants that are there
            continue
        signature = {"logits": f"*{kind}", "other": f"*{kind}", "coefficient": vector if first or second else None}
        signature |= {"temperature": vector if options else None, "kl": vector, "columns": "i32", "stride": "i64"}
        signature |= {"other_stride": "i64", "softcap": "fp32", "other_softcap": "fp32", "beta": "fp32"}
        constants = {"HAS_TEMPERATURE": options, "HAS_CAP": options, "HAS_OTHER_CAP": options, "MIXTURE": mixture}
        constants |= {"WANTED": first, "OTHER_WANTED": second, "BLOCK": MAX_BLOCK[dtype]}
        label = " ".join([kind, *(name for name, on in zip(names, switches, strict=True) if on)])
        yield _kl_kernel, label, signature, constants
