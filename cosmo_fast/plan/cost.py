"""What a micro-batch costs: time from what it holds, and the peak of its memory.

The time of a forward and backward is a sum over tokens, attention pairs, rows of vision features and head rows. Its
coefficients are FLOP counts of the model (:func:`flops`: the same on every machine, hence what plans are made with), or
seconds measured once a machine (:func:`calibrate`: for predictions). Memory is always measured.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import platform
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cosmo_fast
from cosmo_fast import ops
from cosmo_fast.objectives.base import TokenBatch
from cosmo_fast.plan.batches import GroupSize
from cosmo_fast.plan.layout import Plan, Prompt

if TYPE_CHECKING:
    from cosmo_fast.models.policy import Policy
    from cosmo_fast.models.vision import Vision

CHUNK_ROWS = 4096  # of linear_policy_loss: rows of logits that exist at a time
PATCHES = 4  # that become one row of vision features, in every family here
REPEATS = 3
# Tokens of a text prompt and of each of its responses in one measured pass.
PROBES = [(32, (16,)), (256, (16,)), (1024, (16,)), (32, (128,) * 2), (64, (64,) * 12)]
PICTURES = (1, 4)  # prompts with pictures in each of two further passes


def loads(sizes: Sequence[GroupSize]) -> np.ndarray:
    """Tokens, attention pairs, rows of vision features and head rows of every group: (g, 4) float64.

    A pair is a query with a key that it sees: P (P + 1) / 2 in a prompt, r P + r (r + 1) / 2 of a response to it.
    """
    prompt = np.array([s.prompt for s in sizes], dtype=np.float64)
    vision = np.array([s.vision for s in sizes], dtype=np.float64)
    owner = np.repeat(np.arange(len(sizes)), [len(s.responses) for s in sizes])
    length = np.fromiter(itertools.chain.from_iterable(s.responses for s in sizes), np.float64, len(owner))
    rows, squares = (np.bincount(owner, x, minlength=len(sizes)) for x in (length, length * (length + 1) / 2))
    return np.stack([prompt + rows, prompt * (prompt + 1) / 2 + rows * prompt + squares, vision, rows], 1)


@dataclass(frozen=True)
class Memory:
    """Bytes of a policy in training, and of a micro-batch: linear in what it holds, and the logits of one chunk.

    Bytes of tensors: what glibc's malloc keeps of freed blocks adds up to a third to a process on a CPU (measured; next
    to nothing with MALLOC_MMAP_THRESHOLD_=65536).

    ``static``: weights, gradients, two AdamW moments of what learns. ``held_*``: kept from forward to backward for a
    token, a row of vision features, a head row. ``peak*``: beyond that while the head or the backward works.
    ``logits``: of one head row. ``keys``: gradient of the stored keys and values of one prompt token.
    """

    static: float
    held_token: float
    held_vision: float
    held_row: float
    peak: float
    peak_token: float
    peak_vision: float
    peak_row: float
    logits: float
    keys: float


@dataclass(frozen=True)
class CostModel:
    """Cost of a forward and backward in ``unit`` ("FLOP" or "s"), and its memory where that was measured.

    ``start``: of every micro-batch; the others: of one token, attention pair, row of vision features, head row.
    """

    unit: str
    token: float
    pair: float
    vision: float
    row: float
    start: float = 0.0
    memory: Memory | None = None

    def of(self, sizes: Sequence[GroupSize]) -> np.ndarray:
        """Cost (g,) of every group, without ``start``."""
        return loads(sizes) @ np.array([self.token, self.pair, self.vision, self.row])

    def peak_bytes(self, sizes: Sequence[GroupSize], parts: list[list[int]] | None = None) -> int:
        """Peak memory of training on a micro-batch of these groups, weights and optimiser included.

        parts: of its only group, as :class:`cosmo_fast.plan.MicroBatch` has them.
        """
        memory, keys = self.memory, 0.0
        assert memory is not None, "calibrate measures memory"
        if parts:
            prompt, responses, vision = sizes[0]
            keys = memory.keys * prompt
            sizes = [GroupSize(prompt, max((tuple(responses[i] for i in p) for p in parts), key=sum), vision)]
        tokens, _, vision, rows = loads(sizes).sum(0)
        held = memory.held_token * tokens + memory.held_vision * vision + memory.held_row * rows
        working = memory.peak + memory.peak_token * tokens + memory.peak_vision * vision + memory.peak_row * rows
        return int(memory.static + keys + held + working - memory.logits * max(0.0, rows - CHUNK_ROWS))


def flops(policy: Policy) -> CostModel:
    """The cost of forward and backward from the sizes of the model: 6 FLOP a weight and token, 12 a pair and channel.

    A frozen weight has no gradient (4), a frozen tower no backward (2). Attention inside the tower, norms and the loss
    are left out.
    """
    config = policy.model.config.get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    text = list(policy.model.get_decoder().layers.parameters())
    rest = {id(p) for p in text} | {id(p) for p in policy.model.get_decoder().parameters()} | {id(policy.head_weight)}
    tower = [p for p in policy.model.parameters() if id(p) not in rest]

    def work(parameters: list[torch.nn.Parameter], frozen: int = 4) -> float:
        return float(sum(p.numel() * (6 if p.requires_grad else frozen) for p in parameters))

    pair = 12.0 * config.num_hidden_layers * config.num_attention_heads * head
    vision = PATCHES * work(tower, frozen=2 if policy.vision_frozen else 4)
    return CostModel("FLOP", token=work(text), pair=pair, vision=vision, row=work([policy.head_weight]))


def calibrate(
    policy: Policy, vision: Vision, prompts: Sequence[Prompt], cache_dir: str | Path | None = None
) -> CostModel:
    """Seconds and bytes of this policy on this machine, from a few small passes of its own packed forward and backward.

    Takes seconds; weights and gradients are as before afterwards. The result is kept in ``cache_dir``, by default
    $XDG_CACHE_HOME/cosmo_fast (~/.cache/cosmo_fast), under a name made from the model's shape, what of it learns,
    device, threads and versions.

    Args:
        vision: the policy's; forgets its features. prompts: of the run; pictures are measured on the first of them
            that have any, text on made-up tokens.

    Raises:
        ValueError: the folder cannot be written.
    """
    pictured = list(itertools.islice((p for p in prompts if p.media), max(PICTURES)))
    root = Path(cache_dir or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cosmo_fast")
    path = root / f"cost-{_key(policy, pictured)}.json"
    if path.is_file():
        saved = json.loads(path.read_text())
        return CostModel(**saved | {"memory": Memory(**saved["memory"])})
    model = _measure(policy, vision, pictured)
    draft = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        root.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(asdict(model)))
        draft.replace(path)
    except OSError as error:
        raise ValueError(f"cache_dir={str(root)!r} cannot be written ({error}); set XDG_CACHE_HOME") from error
    return model


def _key(policy: Policy, pictured: list[Prompt]) -> str:
    machine = torch.cuda.get_device_name() if policy.device.type == "cuda" else f"{platform.node()} {os.cpu_count()}"
    shapes = [(n, tuple(p.shape), str(p.dtype), p.requires_grad) for n, p in policy.model.named_parameters()]
    about = [policy.model.config.to_json_string(), shapes, machine]
    about += [any(getattr(m, "gradient_checkpointing", False) for m in policy.model.modules())]
    about += [torch.get_num_threads(), torch.__version__, cosmo_fast.__version__, Path(__file__).read_text()]
    about += [[m.thw for m in p.media] for p in pictured]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]


def _measure(policy: Policy, vision: Vision, pictured: list[Prompt]) -> CostModel:
    end = np.zeros(16, dtype=np.int64)
    cases = [
        ([Prompt(np.zeros(n, np.int64), (), {}, "", "")], [[np.zeros(r, np.int64) for r in lengths]])
        for n, lengths in PROBES
    ]
    cases += [(pictured[:n], [[end] for _ in pictured[:n]]) for n in PICTURES if pictured]
    load, seconds, held, peak = [], [], [], []
    with _gradients_aside(policy):
        for prompts, responses in cases:
            plan = Plan(prompts, responses)
            load.append(loads([GroupSize.of(p, r) for p, r in zip(prompts, responses, strict=True)]).sum(0))
            _pass(policy, vision, plan)
            grads = [p.grad for p in policy.model.parameters() if p.grad is not None]
            live = _Live([*policy.model.parameters(), *policy.model.buffers(), *grads])
            with live:
                held.append(_pass(policy, vision, plan, lambda live=live: live.now))
            peak.append(live.peak - held[-1])
            seconds.append(median(_seconds(policy, vision, plan) for _ in range(REPEATS)))
    load, one = np.array(load), np.ones((len(load), 1))
    start, token, pair, tower, row = _non_negative(np.hstack([one, load]), seconds)
    what = load[:, [0, 2, 3]]
    memory = Memory(
        _static(policy), *_non_negative(what, held), *_non_negative(np.hstack([one, what]), peak), *_sizes(policy)
    )
    return CostModel("s", token, pair, tower, row, start, memory)


def _static(policy: Policy) -> int:
    """Weights, and of what learns fp32 gradients, two fp32 moments and fp32 masters of narrower weights."""
    learns = [p for p in policy.model.parameters() if p.requires_grad]
    state = sum(p.numel() * (12 + (4 if p.itemsize < 4 else 0)) for p in learns)
    return state + sum(p.nbytes for p in policy.model.parameters())


def _sizes(policy: Policy) -> tuple[int, int]:
    """Bytes of the logits of a row, and of the keys and values of a token."""
    config, weight = policy.model.config.get_text_config(), policy.head_weight
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = 2 * config.num_hidden_layers * config.num_key_value_heads * head
    return weight.shape[0] * weight.itemsize, keys * weight.itemsize


def _pass(policy: Policy, vision: Vision, plan: Plan, between: Callable[[], int] | None = None) -> int | None:
    """One forward and backward as in training; returns what ``between`` says after the forward."""
    vision.forget()
    hidden = policy.hidden(plan, vision.features(plan.media))[plan.tensor("label_rows", policy.device)]
    said = between() if between else None
    weight = torch.full((len(hidden),), 1 / len(hidden), device=policy.device)
    targets, sequence = plan.tensor("targets", policy.device), plan.tensor("sequence", policy.device)
    batch = TokenBatch(targets=targets, weight=weight, sequence=sequence)
    ops.linear_policy_loss(hidden, policy.head_weight, batch, lambda logp, *_: (-logp, {})).loss.backward()
    return said


def _seconds(policy: Policy, vision: Vision, plan: Plan) -> float:
    started = time.perf_counter()
    _pass(policy, vision, plan)
    if policy.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


@contextmanager
def _gradients_aside(policy: Policy) -> Iterator[None]:
    """The gradients of these passes add up, as in every micro-batch but the first, and go; the old ones come back."""
    learns = [p for p in policy.model.parameters() if p.requires_grad]
    kept = [p.grad for p in learns]
    for p in learns:
        p.grad = None
    try:
        yield
    finally:
        for p, grad in zip(learns, kept, strict=True):
            p.grad = grad


class _Live(TorchDispatchMode):
    """Bytes of all tensors that ops return while it is active, ``known`` ones aside: ``now`` and at the ``peak``."""

    def __init__(self, known: list[torch.Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self.seen = weakref.WeakSet(t.untyped_storage() for t in known)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self.seen:
                self.seen.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, storage.nbytes())
        return out

    def _free(self, size: int) -> None:
        self.now -= size


def _non_negative(columns: np.ndarray, values: list[float]) -> list[float]:
    """Coefficients >= 0 of the least sum of squared relative errors: the best fit on any subset of the columns."""
    scaled, best, found = columns / np.array(values)[:, None], np.inf, np.zeros(columns.shape[1])
    for chosen in itertools.product([False, True], repeat=columns.shape[1]):
        fit = np.zeros(columns.shape[1])
        fit[list(chosen)] = np.linalg.lstsq(scaled[:, list(chosen)], np.ones(len(values)), rcond=None)[0]
        error = np.square(scaled @ fit - 1).sum()
        if (fit >= 0).all() and error < best:
            best, found = error, fit
    return found.tolist()
