"""Several processes: DeepSpeed reduces gradients and shards the optimizer; one process is the same code without it.

Every rank draws the same rows, samples and rewards its share of the groups, and gathers the rest as plain arrays; the
update's groups are balanced over the ranks by cost. Gradients are reduced once an optimiser step, whatever number of
micro-batches and whatever modalities a rank has had: no rank waits for a collective that another never starts.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cosmo_fast.config import ConfigError
from cosmo_fast.models import Policy
from cosmo_fast.optimizer import AdamW


class Ranks:
    """This process among ``world`` ones; ``deepspeed`` is the resolved DeepSpeed configuration, None alone.

    Args:
        deepspeed: path of a DeepSpeed JSON file, as TRL and transformers take it; "auto" values are ours to fill.

    Raises:
        ConfigError: several processes without ``deepspeed``, a file that is none, DeepSpeed not installed, ZeRO 3.
    """

    def __init__(self, deepspeed: str | None = None):
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.deepspeed = None
        if deepspeed is None:
            if self.world > 1:
                raise ConfigError(
                    f"{self.world} processes were launched (WORLD_SIZE), but deepspeed is not set: give --deepspeed "
                    "FILE.json, or launch one process"
                )
            return
        self.deepspeed = _settings(deepspeed)
        try:
            import deepspeed as library
        except ImportError as error:
            raise ConfigError(f"deepspeed={deepspeed!r} needs the package: pip install deepspeed ({error})") from error
        for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
            os.environ.setdefault(name, value)
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # Its collectives in shared memory are compiled on first use, for a minute, and not at all where the path of the
        # environment holds a space; one reduction a step gains nothing from them.
        library.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # The first rank evaluates alone, however long that takes.
        library.init_distributed(verbose=False, timeout=timedelta(days=1))

    @property
    def first(self) -> bool:
        """Whether this rank writes files and talks."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """``value`` of every rank, by rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(values, value)
        return values

    def share(self, items: list) -> list:
        """This rank's consecutive share of ``items``; shares differ by one at most."""
        return items[self.start(len(items)) : self.start(len(items), self.rank + 1)]

    def start(self, count: int, rank: int | None = None) -> int:
        """Index of the first of ``count`` items in the share of a rank, by default this one."""
        return count * (self.rank if rank is None else rank) // self.world

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """The first rank goes first, the others after it."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()

    def update(self, policy: Policy, optimizer: AdamW, max_grad_norm: float) -> Update:
        """What applies the gradients of a stage."""
        if self.deepspeed is None:
            return Update(optimizer, max_grad_norm)
        return ZeroUpdate(policy, optimizer, max_grad_norm, self)

    def wait(self) -> None:
        """Until every rank is here."""
        if self.world > 1:
            torch.distributed.barrier()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# Blocks of a DeepSpeed file whose place is the recipe.
OF_THE_RECIPE = (
    "optimizer", "scheduler", "fp16", "bf16", "gradient_clipping", "train_batch_size", "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
)  # fmt: skip


def _settings(path: str) -> dict[str, Any]:
    try:
        settings = json.loads(Path(path).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"deepspeed={path!r} is no DeepSpeed JSON file: {error}") from error
    settings = _without_auto(settings)
    stage = settings.setdefault("zero_optimization", {}).setdefault("stage", 2)
    if stage not in (1, 2):
        raise ConfigError(f"deepspeed={path!r}: zero_optimization.stage={stage} is not supported; use 1 or 2")
    for name in OF_THE_RECIPE:
        block = settings.get(name, {})
        off = isinstance(block, dict) and name in ("fp16", "bf16") and not block.get("enabled")  # "auto" is ours: off
        if block != {} and not off:
            raise ConfigError(f"deepspeed={path!r}: {name} is set by the recipe (learning_rate, dtype ...); remove it")
        settings.pop(name, None)
    # The unit of reduction is the optimiser step; how many micro-batches a rank needs for it is our affair.
    return settings | {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "steps_per_print": 10**9}


def _without_auto(value):
    if isinstance(value, dict):
        return {name: _without_auto(item) for name, item in value.items() if item != "auto"}
    return value


class Update:
    """One optimiser step on one process: gradients add up, are scaled down to ``max_grad_norm`` and applied."""

    def __init__(self, optimizer: AdamW, max_grad_norm: float):
        self.optimizer, self.max_grad_norm = optimizer, max_grad_norm

    @property
    def learning(self) -> list[nn.Parameter]:
        """What gradients belong to."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def fill(self) -> None:
        """What no pass has reached has gradient 0, so that all ranks reduce alike: moments and decay go on."""
        for parameter in self.learning:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    @contextlib.contextmanager
    def accumulating(self) -> Iterator[None]:
        """Inside, :meth:`backward` adds up; after it :meth:`norm` and :meth:`step` have the gradients of all ranks."""
        self.optimizer.zero_grad(set_to_none=True)
        yield
        self.fill()

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of ``loss``."""
        loss.backward()

    def norm(self) -> float:
        """Norm of the gradients before they are scaled down."""
        norm = nn.utils.get_total_norm([p.grad for p in self.learning])
        if not norm < self.max_grad_norm - 1e-5:  # elsewhere all gradients would be read and written to be times 1
            nn.utils.clip_grads_with_norm_(self.learning, self.max_grad_norm, norm)
        return float(norm)

    def step(self) -> None:
        """Changes the weights."""
        self.optimizer.step()

    def close(self) -> None:
        """The parameters are free for another optimizer."""
        self.optimizer.release()


class ZeroUpdate(Update):
    """The same behind a DeepSpeed engine, ZeRO 1 or 2: gradients are reduced and the optimizer's state is sharded.

    In bf16 micro-batches add up in bf16, as DeepSpeed has it; masters and moments are fp32.
    """

    def __init__(self, policy: Policy, optimizer: AdamW, max_grad_norm: float, ranks: Ranks):
        import deepspeed

        super().__init__(optimizer, max_grad_norm)
        settings = ranks.deepspeed | {"gradient_clipping": max_grad_norm, "zero_allow_untested_optimizer": True}
        if policy.head_weight.dtype == torch.bfloat16:
            settings |= {"bf16": {"enabled": True}}
        self.engine, self.optimizer, *_ = deepspeed.initialize(
            model=policy.model, optimizer=optimizer, config=settings, dist_init_required=False
        )
        self.model = policy.model

    @property
    def learning(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]  # the optimizer's are DeepSpeed's flat shards

    @contextlib.contextmanager
    def accumulating(self) -> Iterator[None]:
        """Backward passes inside stay on this rank; the end reduces their sum over the ranks, once."""
        with self.engine.coalesce_grad_reduction():
            yield
            self.fill()

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of ``loss``; the mean over the ranks is taken."""
        self.engine.backward(loss, scale_wrt_gas=False)

    def norm(self) -> float:
        """Norm of the reduced gradients; DeepSpeed scales them in its step."""
        return float(self.optimizer.scaled_global_norm())

    def step(self) -> None:
        self.engine.step()

    def close(self) -> None:
        self.engine.destroy()
