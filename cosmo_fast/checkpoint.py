"""Checkpoints: a complete Hugging Face folder plus the trainer's state, there as a whole or not at all. No pickle."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from cosmo_fast.models import Policy
from cosmo_fast.optimizer import AdamW

STATE = "trainer_state.json"
OPTIMIZER = "optimizer.safetensors"


def write_atomically(folder: Path, write) -> None:
    """Calls ``write(temporary_folder)``, syncs every file to disk and renames the folder into place."""
    temporary = folder.with_name(f".{folder.name}.partial")
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    write(temporary)
    for path in [*temporary.rglob("*"), temporary]:
        _sync(path)
    earlier = folder.with_name(f".{folder.name}.earlier")
    if folder.exists():
        shutil.rmtree(earlier, ignore_errors=True)
        folder.rename(earlier)
    temporary.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(earlier, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """Writes a file so that it holds the old text or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text)
    _sync(temporary)
    temporary.replace(path)


def save_model(output_dir: Path, policy: Policy) -> list[str]:
    """Puts the policy's model folder into ``output_dir`` itself, config.json last; returns the names of its files."""
    temporary = output_dir / ".model.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    policy.save(temporary, merged=True)
    names = sorted((p.name for p in temporary.iterdir()), key=lambda name: name == "config.json")
    for name in names:
        _sync(temporary / name)
        (temporary / name).replace(output_dir / name)
    temporary.rmdir()
    return names


def save_checkpoint(folder: Path, policy: Policy, optimizer: AdamW | None, state: dict[str, Any]) -> None:
    """Writes ``folder`` atomically: the model's or its adapter's folder, ``trainer_state.json``,
    ``optimizer.safetensors`` (moments, and the fp32 masters of bf16 weights)."""

    def write(into: Path) -> None:
        policy.save(into)
        if optimizer is not None:  # else its shards are elsewhere, and the stage is at its end
            save_file(optimizer.tensors(), into / OPTIMIZER)
        (into / STATE).write_text(json.dumps(state, indent=1))

    write_atomically(folder, write)


def load_optimizer(folder: Path, optimizer: AdamW) -> None:
    """Puts the saved moments and masters back."""
    optimizer.load_tensors(load_file(folder / OPTIMIZER))


def load_state(folder: Path) -> dict[str, Any]:
    """The trainer's state of a checkpoint: position, step counts, summary so far, config."""
    return json.loads((folder / STATE).read_text())


def checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first; what an interrupted save left behind is not among them."""
    found = [
        p for p in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name) and (p / STATE).is_file()
    ]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def find_checkpoint(output_dir: Path, wanted: str | bool) -> Path:
    """The checkpoint that ``resume_from_checkpoint`` names; true or "latest" is the newest.

    Raises:
        ValueError: there is none, or it is incomplete.
    """
    if wanted is True or wanted == "latest":
        found = checkpoints(output_dir)
        if not found:
            raise ValueError(f"resume_from_checkpoint={wanted}: {output_dir} holds no complete checkpoint")
        return found[-1]
    folder = Path(str(wanted))
    if not (folder / STATE).is_file():
        raise ValueError(f"resume_from_checkpoint={str(folder)!r} is no complete checkpoint: it has no {STATE}")
    return folder


def prune(output_dir: Path, keep: int | None, protected: set[Path]) -> None:
    """Removes the oldest checkpoints beyond ``keep``; ``protected`` ones (ends of stages) stay and do not count."""
    if keep is not None:
        removable = [p for p in checkpoints(output_dir) if p not in protected]
        for folder in removable[:-keep]:
            shutil.rmtree(folder)
