"""Triton twins of csrc/vocab_stats.cpp: one program a row, no atomics, any V, offsets in 64 bits.

A kernel does only what is vocabulary-sized; what one row comes to is finished in PyTorch on (N,) vectors in fp64, as in
the C++ twin. y = softcap * tanh(z / softcap) / temperature; softcap 0 means none.
"""

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

# Explicit, because Triton's default changed in 3.10: products and sums fuse, as they do in the C++ twin.
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}
MAX_BLOCK = {torch.bfloat16: 4096, torch.float32: 4096, torch.float64: 512}  # columns at a time, without spills


@triton.jit
def _tanh(x):
    """Small relative error everywhere: a polynomial near 0, the exponential elsewhere (Cephes tanhf, tanh)."""
    xx = x * x
    if x.dtype == tl.float64:
        p = (-9.64399179425052238628e-1 * xx + -9.92877231001918586564e1) * xx + -1.61468768441708447952e3
        q = ((xx + 1.12811678491632931402e2) * xx + 2.23548839060100448583e3) * xx + 4.84406305325125486048e3
        near = x + x * xx * p / q
    else:
        p = ((-5.70498872745e-3 * xx + 2.06390887954e-2) * xx + -5.37397155531e-2) * xx + 1.33314422036e-1
        near = x + x * xx * (p * xx + -3.33332819422e-1)
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def _stats_kernel(
    logits, targets, temperature, own, other_max, other_sum, moment, columns, stride, softcap,
    HAS_TEMPERATURE: tl.constexpr, HAS_CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    out = other_max.dtype.element_ty
    target = tl.load(targets + row)
    inverse_t = tl.full((), 1.0, out)
    if HAS_TEMPERATURE:
        inverse_t = 1.0 / tl.load(temperature + row)
    m = tl.full((), float("-inf"), out)
    s = tl.zeros((BLOCK,), out)
    w = tl.zeros((BLOCK,), out)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = (column < columns) & (column != target)
        y = tl.load(logits + row * stride + column, mask=inside, other=float("-inf")).to(out)
        if HAS_CAP:
            y = tl.where(inside, softcap * _tanh(y / softcap), float("-inf"))
        top = tl.maximum(m, tl.max(y, 0))
        base = tl.where(top == float("-inf"), 0.0, top)  # only -inf so far: differences are -inf, not NaN
        shift = tl.where(m == float("-inf"), 0.0, (m - base) * inverse_t)
        factor = tl.exp(shift)
        u = (y - base) * inverse_t
        e = tl.exp(u)
        w = factor * (w + s * shift) + e * tl.where(u < -1000.0, -1000.0, u)  # 0 * -inf is NaN
        s = s * factor + e
        m = top
    valid = (target >= 0) & (target < columns)
    z = tl.load(logits + row * stride + target, mask=valid, other=float("nan")).to(out)
    if HAS_CAP:
        z = softcap * _tanh(z / softcap)
    tl.store(own + row, z)
    tl.store(other_max + row, m)
    tl.store(other_sum + row, tl.sum(s, 0))
    tl.store(moment + row, tl.sum(w, 0))


@triton.jit
def _grad_kernel(
    logits, rows, targets, other_max, scale, offset, c_logp, c_entropy, target_grad, temperature,
    columns, stride, softcap,
    HAS_ROWS: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_TEMPERATURE: tl.constexpr, HAS_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    source = row
    if HAS_ROWS:
        source = tl.load(rows + row)
    work = other_max.dtype.element_ty
    target = tl.load(targets + source)
    m = tl.load(other_max + source)
    m = tl.where(m == float("-inf"), 0.0, m)  # the scale is 0 there
    k = tl.load(scale + source)
    c = tl.load(c_logp + source)
    at_target = tl.load(target_grad + source)
    inverse_t = tl.full((), 1.0, work)
    if HAS_TEMPERATURE:
        inverse_t = 1.0 / tl.load(temperature + source)
    if HAS_ENTROPY:
        ce = tl.load(c_entropy + source)
        shift = tl.load(offset + source)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        y = tl.load(logits + source * stride + column, mask=inside, other=0.0).to(work)
        slope = inverse_t
        if HAS_CAP:
            th = _tanh(y / softcap)
            y = softcap * th
            slope = (1.0 - th * th) * inverse_t
        u = (y - m) * inverse_t
        g = c
        if HAS_ENTROPY:
            g = c + ce * (tl.where(u < -1000.0, -1000.0, u) + shift)
        p = tl.exp(tl.where(u > 0.0, 0.0, u)) * k  # u > 0 only at the target
        g = tl.where(column == target, at_target, -p * g) * slope
        tl.store(logits + row * stride + column, g.to(logits.dtype.element_ty), mask=inside)


def _block(logits: Tensor) -> int:
    return min(MAX_BLOCK[logits.dtype], triton.next_power_of_2(logits.shape[1]))


def _check(logits: Tensor) -> None:
    if logits.dim() != 2 or logits.shape[1] == 0 or (logits.shape[1] > 1 and logits.stride(1) != 1):
        shape = f"shape {tuple(logits.shape)}, strides {logits.stride()}"
        raise RuntimeError(f"logits must be (N, V) with V > 0 and contiguous columns, got {shape}")


def vocab_stats(
    logits: Tensor, targets: Tensor, temperature: Tensor | None, softcap: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logp, entropy, other_max, other_sum (N,) of `logits` (N, V): see `ops.vocab_stats`. One read."""
    _check(logits)
    n, columns = logits.shape
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    own, other_max, other_sum, moment = (logits.new_empty(n, dtype=wide) for _ in range(4))
    if n:
        _stats_kernel[(n,)](
            logits, targets, temperature, own, other_max, other_sum, moment, columns, logits.stride(0), softcap,
            HAS_TEMPERATURE=temperature is not None, HAS_CAP=softcap > 0, BLOCK=_block(logits), **OPTIONS,
        )  # fmt: skip
    difference, total = other_max.double() - own.double(), other_sum.double()
    log_sum = total.log()
    d = (difference if temperature is None else difference / temperature) + log_sum
    logp, log_other = -softplus(d), -softplus(-d)
    entropy = log_other.exp() * (log_sum - moment / total)
    for log_p in (logp, log_other):
        entropy = entropy - torch.where(log_p > -torch.inf, log_p.exp() * log_p, 0.0)
    certain = (other_max == -torch.inf) & (own > -torch.inf) & (total == 0)  # no other column can be drawn
    overflow = own == torch.inf  # not certainty
    logp, entropy = (x.masked_fill(certain, 0.0).masked_fill(overflow, torch.nan).to(wide) for x in (logp, entropy))
    return logp, entropy, other_max, other_sum


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x) without overflow or cancellation (torch's own goes over to x beyond a threshold)."""
    return x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))


def vocab_grad_(
    logits: Tensor,
    rows: Tensor | None,
    targets: Tensor,
    logp: Tensor,
    entropy: Tensor,
    other_max: Tensor,
    other_sum: Tensor,
    c_logp: Tensor,
    c_entropy: Tensor | None,
    temperature: Tensor | None,
    softcap: float,
) -> None:
    """Overwrites `logits` with the gradient of c_logp·logp + c_entropy·entropy: see `ops.vocab_grad_`. One pass."""
    _check(logits)
    wide = logp.double()
    other, p = -torch.expm1(wide), wide.exp()
    scale = torch.where(other_sum > 0, other / other_sum, other * 0)
    at_target, offset = c_logp * other, None
    if c_entropy is not None:
        offset = (torch.where(scale > 0, scale, 1.0).log() + entropy).to(logp.dtype)
        at_target = at_target - torch.where(p > 0, c_entropy * p * (wide + entropy), 0.0)
    scale, at_target = scale.to(logp.dtype), at_target.to(logp.dtype)
    n, columns = logits.shape[0] if rows is None else rows.shape[0], logits.shape[1]
    if n:
        _grad_kernel[(n,)](
            logits, rows, targets, other_max, scale, offset, c_logp, c_entropy, at_target, temperature,
            columns, logits.stride(0), softcap,
            HAS_ROWS=rows is not None, HAS_ENTROPY=c_entropy is not None, HAS_TEMPERATURE=temperature is not None,
            HAS_CAP=softcap > 0, BLOCK=_block(logits), **OPTIONS,
        )  # fmt: skip


def variants():
    """(kernel, label, signature by argument, compile-time values) of every variant, for `kernels.check`."""
    kinds = ((torch.bfloat16, "bf16", "*fp32"), (torch.float32, "fp32", "*fp32"), (torch.float64, "fp64", "*fp64"))
    for (dtype, kind, vector), switches in itertools.product(kinds, itertools.product((False, True), repeat=4)):
        temperature, cap, entropy, rows = switches
        names = ("temperature", "cap", "entropy", "rows")
        label = " ".join([kind, *(name for name, on in zip(names, switches, strict=True) if on)])
        shape = {"columns": "i32", "stride": "i64", "softcap": "fp32"}
        if not (entropy or rows):
            outputs = dict.fromkeys(("own", "other_max", "other_sum", "moment"), vector)
            constants = {"HAS_TEMPERATURE": temperature, "HAS_CAP": cap, "BLOCK": MAX_BLOCK[dtype]}
            inputs = {"logits": f"*{kind}", "targets": "*i64", "temperature": vector if temperature else None}
            yield _stats_kernel, label, {**inputs, **outputs, **shape}, constants
        inputs = {"logits": f"*{kind}", "rows": "*i64" if rows else None, "targets": "*i64"}
        inputs |= {"other_max": vector, "scale": vector, "offset": vector if entropy else None, "c_logp": vector}
        inputs |= {"c_entropy": vector if entropy else None, "target_grad": vector}
        inputs |= {"temperature": vector if temperature else None}
        constants = {"HAS_ROWS": rows, "HAS_ENTROPY": entropy, "HAS_TEMPERATURE": temperature, "HAS_CAP": cap}
        yield _grad_kernel, label, {**inputs, **shape}, {**constants, "BLOCK": MAX_BLOCK[dtype]}
