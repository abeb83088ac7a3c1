"""The Triton twins: compiled for both targets without a GPU and run by the interpreter, each in its own process."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip("triton", reason="the Triton twins need triton (pip install -r requirements-dev.txt)")


def _run(*command, interpret=False):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_every_kernel_compiles_for_both_targets_without_spills():
    lines = _run("-m", "cosmo_fast.kernels.check").splitlines()
    assert re.fullmatch(r"kernels-check: \d+ compiled with triton \S+, 0 spill", lines[-1])
    for name in ("stats", "grad", "kl", "group", "forward", "query", "key", "columns", "squares"):
        for target in ("sm_80", "sm_90"):
            assert any(line.startswith(f"{name}_kernel") and target in line for line in lines)


def test_the_twins_pass_the_tests_of_the_cpu_kernels_under_the_interpreter():
    ours = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore")
    ours += (
        "tests/test_vocab_stats.py",
        "tests/test_linear_policy_loss.py",
        "tests/test_linear_kl.py",
        "tests/test_advantages.py",
        "tests/test_prefix_attention_triton.py",
        "tests/test_vision_prune.py",
    )
    assert " passed" in _run(*ours, interpret=True)


@pytest.mark.parametrize(("module", "kernel"), [("vocab_stats", "_grad_kernel"), ("vocab_kl", "_kl_kernel")])
def test_bf16_gradients_are_rounded_to_nearest(module, kernel):
    source = f"""
import cosmo_fast.kernels.check as check, cosmo_fast.kernels.{module} as module
found = [v for v in module.variants() if v[0] is module.{kernel} and v[1].startswith("bf16")]
kernel, _, signature, constants = found[-1]
print(check.compiled(kernel, signature, constants, 90, module.OPTIONS).asm["ptx"])
"""
    assert "cvt.rn.bf16" in _run("-c", source)
