"""Compiles every Triton kernel ahead of time for sm_80 and sm_90, without a GPU, and prints what each one uses.

    python -m cosmo_fast.kernels.check

Every module with kernels brings `variants()` and `OPTIONS`. One line a variant: registers a thread, shared memory
(bytes), spills (bytes of local memory: must be 0), as cuobjdump reads them from the cubin. Exits with 1 if anything
spills. A process of its own: under TRITON_INTERPRET nothing compiles.
"""

import importlib
import itertools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CAPABILITIES = (80, 90)
MODULES = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path != Path(__file__))
_ALIGNED = [["tt.divisibility", 16]]


def compiled(kernel, signature: dict, constants: dict, capability: int, options: dict):
    """One variant, compiled for sm_<capability>. None in the signature: the argument is None.

    Constants that are no argument (num_warps, num_stages) are options of this variant.
    """
    options = options | {name: value for name, value in constants.items() if name not in kernel.arg_names}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    constants = {**constants, **{name: None for name, kind in signature.items() if kind is None}}
    types = {name: "constexpr" if name in constants else signature[name] for name in kernel.arg_names}
    indices = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    aligned = {indices[name]: _ALIGNED for name, kind in types.items() if kind[0] == "*" or kind == "i64"}
    source = ASTSource(kernel, types, {indices[name]: value for name, value in constants.items()}, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(binary) -> tuple[int, int, int]:
    """(registers a thread, shared bytes, local bytes) of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(binary.asm["cubin"])
        cubin.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        command = [str(tool), "--dump-resource-usage", cubin.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    return usage["REG"], binary.metadata.shared, usage["LOCAL"] + usage["STACK"]


def main() -> int:
    """Compiles and prints; 1 if a kernel spills."""
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise SystemExit("kernels-check: unset TRITON_INTERPRET, under which Triton compiles nothing")
    modules = [importlib.import_module(f"cosmo_fast.kernels.{name}") for name in MODULES]
    modules = [module for module in modules if hasattr(module, "variants")]
    variants = [(module.OPTIONS, *variant) for module in modules for variant in module.variants()]
    failed = count = 0
    print(f"{'kernel':<16}{'variant':<40}{'target':<8}{'registers':>10}{'shared':>8}{'spills':>8}")
    for (options, kernel, label, signature, constants), capability in itertools.product(variants, CAPABILITIES):
        registers, shared, spills = resources(compiled(kernel, signature, constants, capability, options))
        name = kernel.fn.__name__.strip("_")
        print(f"{name:<16}{label:<40}sm_{capability:<5}{registers:>10}{shared:>8}{spills:>8}", flush=True)
        count, failed = count + 1, failed + (spills > 0)
    print(f"kernels-check: {count} compiled with triton {triton.__version__}, {failed} spill")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
