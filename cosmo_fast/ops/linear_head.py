"""The vocabulary head in chunks of rows: logits, and the two gradient products, for the linear ops."""

import threading

import torch
from torch import Tensor

from cosmo_fast.ops.vocab_stats import DTYPES, VocabStats, check_softcap, row_temperature, statistics_dtype, vocab_grad_

# The first touch of fresh memory on a CPU costs as much as a product of small d, and the CPU allocator, unlike that of
# CUDA, gives large blocks back to the system: chunks of logits up to this size, in all, are kept for the next call.
KEPT_MIB = 256
_kept: list[Tensor] = []
_lock = threading.Lock()


def _take(like: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """An empty vector of at least `size` elements, kept memory where some fits."""
    with _lock:
        for i, buffer in enumerate(_kept):
            if like.device.type == "cpu" and buffer.dtype == dtype and size <= buffer.numel() <= 2 * size:
                return _kept.pop(i)
    return like.new_empty(size, dtype=dtype)


def _keep(buffer: Tensor) -> None:
    ordinary = type(buffer) is Tensor and not buffer.is_inference()  # another call could not write to it
    if ordinary and buffer.device.type == "cpu" and buffer.nbytes <= KEPT_MIB << 20:
        with _lock:
            _kept.append(buffer)
            while sum(kept.nbytes for kept in _kept) > KEPT_MIB << 20:
                _kept.pop(0)


def empty_cache() -> None:
    """Gives back the chunks of logits that are kept on the CPU, as `torch.cuda.empty_cache` does on a GPU."""
    with _lock:
        _kept.clear()


class LinearHead:
    """hidden (N, d) times weight (V, d), one chunk of rows at a time, in `logits_dtype`. Checks what the user gave."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        temperature: float | Tensor,
        logit_softcap: float | None,
        logits_dtype: torch.dtype | None,
        chunk_rows: int,
    ):
        if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or weight.shape[0] == 0:
            shapes = f"hidden {tuple(hidden.shape)} and head_weight {tuple(weight.shape)}"
            raise ValueError(f"{shapes} must be (N, d) and (V, d); a head sharded by ZeRO-3 must be gathered first")
        if hidden.dtype != weight.dtype or hidden.dtype not in DTYPES or hidden.device != weight.device:
            raise ValueError(
                f"hidden ({hidden.dtype}, {hidden.device}) and head_weight ({weight.dtype}, {weight.device}) must have "
                "one dtype (float32, bfloat16 or float64) and one device: cast one to the other"
            )
        if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
            raise ValueError(f"bias {tuple(bias.shape)} {bias.dtype} must be ({weight.shape[0]},) {weight.dtype}")
        if chunk_rows < 1:
            raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")
        self.dtype = logits_dtype or hidden.dtype
        if self.dtype not in (hidden.dtype, torch.float32) or (self.dtype != hidden.dtype != torch.bfloat16):
            raise ValueError(f"logits_dtype must be {hidden.dtype}, or float32 for bfloat16, got {logits_dtype}")
        self.hidden, self.weight, self.bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
        self.parameter_dtype, self.wide = weight.dtype, statistics_dtype(self.dtype)
        self.widens = self.dtype != hidden.dtype
        if self.widens and hidden.device.type != "cuda":  # no bf16 product with an fp32 result here: widen the operands
            self.weight = self.weight.float()
        self.softcap, self.chunk_rows = check_softcap(logit_softcap), chunk_rows
        self.temperature = row_temperature(temperature, self.dtype, hidden.shape[0], hidden.device)
        self._buffer = None

    def rows(self, index: Tensor | slice) -> Tensor:
        """The hidden rows at `index`, in the dtype of the products."""
        return self.hidden[index].to(self.weight.dtype)

    def row_temperatures(self, index: Tensor | slice) -> Tensor | None:
        """The temperatures (n,) of the rows at `index`; None where they are all 1."""
        return None if self.temperature is None else self.temperature[index]

    def logits(self, rows: Tensor) -> Tensor:
        """(n, V) in a buffer that the next call overwrites. One GEMM."""
        shape, weight = (rows.shape[0], self.weight.shape[0]), self.weight.t()
        if self._buffer is None or self._buffer.numel() < shape[0] * shape[1]:
            self.release(keep=False)  # before its successor is made
            self._buffer = _take(rows, shape[0] * shape[1], self.dtype)
        logits = self._buffer[: shape[0] * shape[1]].view(shape)
        if self.widens and rows.dtype != self.dtype:
            torch.mm(rows, weight, out_dtype=self.dtype, out=logits)
        elif self.bias is not None:
            return torch.addmm(self.bias.to(self.dtype), rows, weight, out=logits)
        else:
            return torch.mm(rows, weight, out=logits)
        return logits if self.bias is None else logits.add_(self.bias)

    def release(self, keep: bool = True) -> "LinearHead":
        """Lets the logits' buffer go; a CPU keeps it for the next call, up to KEPT_MIB."""
        buffer, self._buffer = self._buffer, None
        if buffer is not None and keep:
            _keep(buffer)
        return self

    def stats(self, logits: Tensor, targets: Tensor, index: Tensor | slice) -> VocabStats:
        """`vocab_stats` of one chunk."""
        temperature = self.row_temperatures(index)
        return VocabStats(*torch.ops.cosmo_fast.vocab_stats(logits, targets, temperature, self.softcap))

    def top(
        self, logits: Tensor, targets: Tensor, stats: VocabStats, index: Tensor | slice, k: int
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and ids (n, k) of the most probable tokens of one chunk."""
        values, ids = logits.topk(k, dim=1)
        first = self.stats(logits, ids[:, 0].contiguous(), index).logp  # exact where it is nearly certain
        y = torch.cat([values, logits.gather(1, targets[:, None])], 1).to(stats.logp.dtype)
        if self.softcap:
            y = self.softcap * torch.tanh(y / self.softcap)
        temperature, highest = self.row_temperatures(index), stats.other_max
        if temperature is not None:
            y, highest = y / temperature[:, None], highest / temperature
        total = torch.logaddexp(highest + stats.other_sum.log(), y[:, -1])
        logp = torch.where(ids == targets[:, None], stats.logp[:, None], y[:, :-1] - total[:, None])
        logp[:, 0] = first
        return logp, ids


class HeadGradient:
    """Sums the gradients by hidden, weight and bias over chunks: dW and db in fp32 (fp64) once there are several."""

    def __init__(self, head: LinearHead, needs: tuple[bool, bool, bool], chunks: int, into: Tensor | None = None):
        """needs: which of hidden, weight and bias want a gradient. chunks: how often `add` will be called.

        into: (V, d), takes dW on top of what it holds; `results` then has none.
        """
        self.head, self.needs, self.into = head, needs, into
        # A sum of several chunks is kept wide, and so is what is added to a narrow gradient.
        direct = into is not None and (into.dtype == head.wide or (chunks == 1 and head.weight.device.type != "cpu"))
        self.hidden = torch.zeros_like(head.hidden, memory_format=torch.contiguous_format) if needs[0] else None
        self.weight = into if direct else None
        if needs[1] and self.weight is None and chunks > 1:
            self.weight = torch.zeros_like(head.weight, dtype=head.wide)
        self.bias = head.weight.new_zeros(head.weight.shape[0], dtype=head.wide) if needs[2] else None

    def add(
        self,
        logits: Tensor,
        rows: Tensor,
        index: Tensor | slice,
        targets: Tensor,
        stats: VocabStats,
        c_logp: Tensor,
        c_entropy: Tensor | None,
    ) -> None:
        """One chunk, two GEMMs over the rows that have a coefficient; `logits` are overwritten.

        index: where the chunk's rows lie in hidden. All vectors and `rows` (n, d) are the chunk's.
        """
        keep = c_logp != 0 if c_entropy is None else (c_logp != 0) | (c_entropy != 0)
        slots = compacting_rows(keep)
        if slots is not None and not slots.numel():
            return
        temperature = self.head.row_temperatures(index)
        dz = vocab_grad_(
            logits, targets, stats, c_logp, c_entropy, rows=slots, temperature=temperature, softcap=self.head.softcap
        )
        if slots is not None:
            rows = rows[slots]
            index = slots + index.start if isinstance(index, slice) else index[slots]
        self.add_dz(dz, rows, index)

    def add_dz(self, dz: Tensor, rows: Tensor, index: Tensor | slice) -> None:
        """The products of one chunk: dz (f, V) is the gradient by its logits, `index` where its rows lie in hidden."""
        if self.bias is not None:
            self.bias += dz.sum(0, dtype=self.bias.dtype)
        dz = dz.to(rows.dtype)
        if self.hidden is not None:
            if isinstance(index, slice) and dz.dtype == self.hidden.dtype:
                torch.mm(dz, self.head.weight, out=self.hidden[index])
            else:
                self.hidden[index] = torch.mm(dz, self.head.weight).to(self.hidden.dtype)
        if self.needs[1]:
            self._add_weight(dz, rows)

    def _add_weight(self, dz: Tensor, rows: Tensor) -> None:
        """dW (+)= dz.T @ rows; the only chunk's product is dW."""
        turned = dz.device.type == "cpu" and dz.dtype == torch.bfloat16 and dz.shape[0] >= _TURNED_ROWS
        if turned and (self.weight is None or self.weight.dtype == torch.float32):
            if self.weight is None:
                self.weight = rows.new_empty(self.head.weight.shape)
            left, product = rows.t().contiguous(), rows.new_empty(rows.shape[1], _TURNED_BLOCK + 32)
            for start in range(0, dz.shape[1], _TURNED_BLOCK):
                block = dz[:, start : start + _TURNED_BLOCK]
                part = torch.mm(left, block, out=product[:, : block.shape[1]])
                torch.ops.cosmo_fast.add_transposed_(self.weight[start : start + block.shape[1]], part)
        elif self.weight is None:
            self.weight = torch.mm(dz.t(), rows)
        elif dz.dtype == self.weight.dtype:
            self.weight.addmm_(dz.t(), rows)
        elif dz.device.type == "cuda":
            torch.addmm(self.weight, dz.t(), rows, out_dtype=self.weight.dtype, out=self.weight)
        else:
            self.weight += torch.mm(dz.t(), rows)

    def results(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients by hidden, weight and bias in the parameters' dtype; None where none is wanted."""
        dtype = self.head.parameter_dtype
        if self.into is not None:
            if self.weight is not None and self.weight is not self.into:
                self.into += self.weight
            self.weight = None  # what is left to hand out
        elif self.needs[1] and self.weight is None:  # no row had a coefficient
            self.weight = torch.zeros_like(self.head.weight)
        return self.hidden, *(None if g is None else g.to(dtype) for g in (self.weight, self.bias))


# From this many rows on a bf16 dW on a CPU is made as (rows.T @ dz).T, in blocks of columns that stay in the cache.
_TURNED_ROWS, _TURNED_BLOCK = 128, 4096


def even_pieces(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    """[start, stop) in the fewest ranges of at most `size`, about equal."""
    count = -(-(stop - start) // size)
    edges = [start + (stop - start) * k // count for k in range(count + 1)] if count else []
    return list(zip(edges, edges[1:], strict=False))


def compacting_rows(keep: Tensor) -> Tensor | None:
    """Slots for the kept rows at the front: (f,) int64 input row of each output row; None if all n rows are kept.

    Kept rows among the first f stay where they are, the others fill the holes, so rows move in place and in parallel.
    """
    kept = int(keep.sum())
    if kept == keep.shape[0]:
        return None
    slots = torch.arange(kept, device=keep.device)
    slots[~keep[:kept]] = keep[kept:].nonzero()[:, 0] + kept
    return slots


class HandOut(torch.autograd.Function):
    """Ties gradients that were made in the forward to a scalar; the backward multiplies them by what comes in."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, loss, gradients, added=None):
        """loss: the scalar to return. gradients: by hidden, weight and bias, None where none is wanted.

        added: the gradient of weight to which dW has been added already, for an incoming 1.
        """
        ctx.gradients, ctx.added = gradients, None if added is None else (weight, added)
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, incoming):
        """Scales in place and lets go, unless the graph is kept for a second backward."""
        gradients = ctx.gradients
        if gradients is None:
            raise RuntimeError("this loss was differentiated a second time; give the first backward retain_graph=True")
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        if ctx.added is not None:
            weight, added = ctx.added
            if keep:
                raise RuntimeError("accumulate_weight_grad adds dW once: call backward without retain_graph")
            if weight.grad is None or weight.grad.data_ptr() != added.data_ptr():
                raise RuntimeError("head_weight.grad, with dW in it, is gone: call zero_grad before the forward")
            message = "accumulate_weight_grad has added dW for a gradient of 1: put factors into the batch's weights"
            if incoming.device.type == "cpu" and incoming != 1:
                raise RuntimeError(f"{message}, the incoming one is {incoming.item()}")
            torch._assert_async(incoming == 1, message)  # on a GPU without a host sync
        if keep:
            gradients = tuple(None if g is None else g.clone() for g in gradients)
        else:
            ctx.gradients = None
        # On a CPU reading the scalar is free, and it is 1 in most calls; on a GPU it would be a host sync.
        if incoming.device.type != "cpu" or incoming != 1:
            for g in gradients:
                if g is not None:
                    _scale_(g, incoming)
        return *gradients, None, None, None


def _scale_(gradient: Tensor, factor: Tensor) -> None:
    """gradient *= factor, a scalar tensor, rounded once. A CPU does so by itself, a GPU rounds the factor first."""
    if gradient.device.type == "cpu" or gradient.dtype == factor.dtype:
        gradient.mul_(factor)
        return
    for block in gradient.split(4096):
        block.copy_(block.to(factor.dtype).mul_(factor))


@torch.library.register_fake("cosmo_fast::add_transposed_")
def _(out, x):
    return None
