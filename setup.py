"""Builds cosmo_fast._C (tensor ops, PyTorch's stable ABI) and cosmo_fast._host (integer planning, pybind11)."""

import os
import shutil
import sys
from pathlib import Path

compiler = os.environ.get("CXX", "c++").split()[0]
if shutil.which(compiler) is None:
    sys.exit(f"cosmo_fast: no C++ compiler: {compiler!r} is not on PATH (Debian: apt install g++, or set CXX)")

import pybind11  # noqa: E402
from setuptools import Extension, find_packages, setup  # noqa: E402
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension  # noqa: E402

# One binary for torch 2.11 and every later version: only the stable ABI of 2.11 is visible to the sources.
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
# No -ffast-math: NaN and -inf are data here. Sums are reordered only where a pragma says so.
CXX = ["-O3", "-g0", "-std=c++17", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
CXX += ["-Wno-psabi"]  # vectors are never passed between functions: all of them are inlined

cuda = os.environ.get("COSMO_FAST_CUDA") == "1"
if cuda and CUDA_HOME is None:
    sys.exit("cosmo_fast: COSMO_FAST_CUDA=1, but there is no nvcc: set CUDA_HOME or unset COSMO_FAST_CUDA")
sources = sorted(str(p) for p in Path("csrc").glob("*.cpp") if p.name != "host.cpp")
sources += sorted(str(p) for p in Path("csrc").glob("*.cu")) if cuda else []

setup(
    packages=[*find_packages(include=["cosmo_fast", "cosmo_fast.*"]), "cosmo_fast.kernels"],
    package_dir={"cosmo_fast.kernels": "kernels"},
    ext_modules=[
        (CUDAExtension if cuda else CppExtension)(
            "cosmo_fast._C",
            sources,
            extra_compile_args={"cxx": [*CXX, TARGET], "nvcc": ["-O3", TARGET, "-DUSE_CUDA"]},
            py_limited_api=True,
        ),
        Extension(
            "cosmo_fast._host",
            ["csrc/host.cpp"],
            include_dirs=[pybind11.get_include()],
            extra_compile_args=CXX,
            language="c++",
        ),
    ],
    cmdclass={"build_ext": BuildExtension},
)
