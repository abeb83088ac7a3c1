"""What is shipped: sdist, wheel, the stable-ABI binary, and the name `kernels`."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest

import cosmo_fast

ROOT = Path(__file__).resolve().parent.parent


def _run(*command, cwd, **variables):
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")} | variables
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist with a space")
    source = "from setuptools import build_meta; print(build_meta.build_sdist(__import__('sys').argv[1]))"
    return folder / _run("-c", source, folder, cwd=ROOT).splitlines()[-1]


@pytest.fixture(scope="module")
def installed(sdist, tmp_path_factory):
    """A wheel built from the sdist alone, installed into a folder of its own: one compilation for the whole file."""
    target = tmp_path_factory.mktemp("site")
    pip = ("-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-cache-dir")
    _run(*pip, "--target", target, sdist, cwd=target)
    return target


def _shipped_kernels():
    return {p.name for p in (ROOT / "kernels").glob("*.py")}


def test_the_sdist_holds_what_a_build_needs(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    wanted = {"setup.py", "pyproject.toml", "LICENSE", "README.md", "Makefile", "cosmo_fast/kernels.py", "docs/data.md"}
    wanted |= {f"csrc/{p.name}" for p in (ROOT / "csrc").iterdir()} | {f"kernels/{name}" for name in _shipped_kernels()}
    wanted |= {f"cosmo_fast/recipes/{p.name}" for p in (ROOT / "cosmo_fast/recipes").glob("*.yaml")}
    assert wanted <= names
    assert not [n for n in names if n.endswith((".so", ".pyc")) or n.split("/")[0] in ("runs", ".venv", "build")]


def test_the_wheel_holds_the_package_the_recipes_and_the_kernels_inside_it(installed):
    package = installed / "cosmo_fast"
    assert {p.name for p in (package / "kernels").glob("*.py")} == _shipped_kernels()
    recipes = {p.name for p in (package / "recipes").glob("*.yaml")}
    assert recipes == {p.name for p in (ROOT / "cosmo_fast/recipes").glob("*.yaml")}
    modules = {p.relative_to(ROOT) for p in (ROOT / "cosmo_fast").rglob("*.py")}
    assert modules <= {p.relative_to(installed) for p in package.rglob("*.py")}
    assert not (installed / "kernels").exists() and not (installed / "tests").exists()
    assert len(list(package.glob("_C*.so"))) == len(list(package.glob("_host*.so"))) == 1


def test_the_installed_wheel_runs_outside_the_checkout(installed, tmp_path):
    source = """
import sys, torch, cosmo_fast, cosmo_fast._host
from cosmo_fast.objectives import TokenBatch, sft
from cosmo_fast.ops import linear_policy_loss
assert "triton" not in sys.modules
import importlib.util
assert importlib.util.find_spec("cosmo_fast.kernels.vocab_stats").origin.startswith(sys.argv[1])
assert cosmo_fast.__file__.startswith(sys.argv[1]) and cosmo_fast._host.__file__.startswith(sys.argv[1])
hidden = torch.randn(4, 3, requires_grad=True)
batch = TokenBatch(torch.arange(4), torch.ones(4), torch.zeros(4, dtype=torch.int64))
linear_policy_loss(hidden, torch.randn(5, 3), batch, sft()).loss.backward()
print(hidden.grad.abs().sum() > 0, cosmo_fast._host.best_fit_decreasing([1, 2], 3))
"""
    assert "tensor(True) [[1, 0]]" in _run("-c", source, installed, cwd=tmp_path, PYTHONPATH=str(installed))


def test_the_binary_uses_the_stable_abi_only():
    (binary,) = (ROOT / "cosmo_fast").glob("_C*.so")
    command = ["nm", "--dynamic", "--undefined-only", "--demangle", str(binary)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    symbols = [re.split(r" [Uwv] ", line, maxsplit=1)[1] for line in listing.splitlines()]
    torch_symbols = [s for s in symbols if re.search(r"torch|at::|c10", s)]
    assert torch_symbols and all(re.fullmatch(r"(aoti_)?torch_\w+", s) for s in torch_symbols)
    cpp = [s for s in symbols if "::" in s or "(" in s]
    assert all(re.search(r"\bstd::|__cxxabiv1::|^operator (new|delete)", s) for s in cpp), cpp
    assert not [s for s in symbols if s.startswith(("Py", "_Py"))]


def test_versions_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == cosmo_fast.__version__


def test_no_requirement_of_ours_is_torchvision():
    own = ROOT / "requirements-train-bench.txt"  # an environment of its own, for TRL's processor
    lines = [line for p in set(ROOT.glob("requirements*.txt")) - {own} for line in p.read_text().splitlines()]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [d for group in project["optional-dependencies"].values() for d in group]
    assert not [x for x in lines + extras + project["dependencies"] if x.startswith("torchvision")]


def test_the_name_kernels_is_left_to_hugging_face():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    source = """
import importlib.metadata, importlib.util
spec = importlib.util.find_spec("kernels")
assert spec is None or spec.origin is None or "site-packages" in spec.origin, spec
assert "cosmo_fast" not in importlib.metadata.packages_distributions().get("kernels", [])
from transformers import LlamaConfig, LlamaForCausalLM
sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=16)
print(type(LlamaForCausalLM(LlamaConfig(**sizes))).__name__)
"""
    assert "LlamaForCausalLM" in _run("-c", source, cwd=ROOT, PYTHONPATH=str(ROOT))


def test_without_a_compiler_the_build_stops_with_one_clear_line():
    environment = os.environ | {"CXX": "no-such-compiler"}
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert done.stderr.strip().splitlines() == [
        "cosmo_fast: no C++ compiler: 'no-such-compiler' is not on PATH (Debian: apt install g++, or set CXX)"
    ]
