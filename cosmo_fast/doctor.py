"""``cosmo-fast doctor``: what is installed, what each part runs on, and what would change it."""

from __future__ import annotations

import importlib.util
import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch


def report() -> list[tuple[str, str]]:
    """(what, finding) lines; nothing is changed, nothing is downloaded."""
    from cosmo_fast import _host
    from cosmo_fast.ops import vocab_stats

    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else "CPU only: training runs on the CPU"
    kernels = "Triton" if cuda and importlib.util.find_spec("triton") else "C++ (instruction set chosen at run time)"
    if cuda and kernels != "Triton":
        kernels = "missing for CUDA: pip install triton"
    logits = torch.zeros(1, 8)
    vocab_stats(logits, torch.zeros(1, dtype=torch.int64))
    return [
        ("python", f"{platform.python_version()} on {platform.machine()}"),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"),
        ("device", device),
        ("CPU capability", torch.backends.cpu.get_cpu_capability()),
        ("transformers", _version("transformers")),
        ("extension", f"loaded: {_host.__file__}"),
        ("row kernels", kernels),
        (
            "attention",
            "PyTorch's CPU flash op, prompts shared" if not cuda else "dense scores under a mask on CUDA so far",
        ),
        ("deepspeed", _version("deepspeed", "one process; not used by this version")),
    ]


def _version(package: str, otherwise: str = "not installed") -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return f"not installed: {otherwise}" if otherwise != "not installed" else otherwise


def main() -> None:
    """Prints the report, one line a finding."""
    for what, finding in report():
        print(f"{what:<16}{finding}")
