"""``cosmo-fast doctor``: what is installed, what each part runs on, and what would change it."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import transformers


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
        ("kernels", kernels),
        ("peft", _version("peft", "LoRA needs it: pip install peft")),
        ("deepspeed", _version("deepspeed", "needed for several processes only")),
    ]


def environment() -> dict[str, str]:
    """What a run's figures were measured on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    return {"device": device, "threads": str(torch.get_num_threads()), "versions": versions}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.is_file() else []
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def _version(package: str, otherwise: str = "not installed") -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return f"not installed: {otherwise}" if otherwise != "not installed" else otherwise


def main() -> None:
    """Prints the report, one line a finding."""
    for what, finding in report():
        print(f"{what:<16}{finding}")
