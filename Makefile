# make demo | test | reproduce | reproduce-prune | -cosmo | -vtp | -safework | -stability | lint | kernels-check | isa-check | dist. ARGS is passed on: make test ARGS="-k packed", make demo ARGS="--seed 1".
# Everything lives in .venv; a second run installs nothing. PIP_* variables and pip's configuration are honoured:
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make install    takes the small CPU build of torch.
PYTHON ?= python3
ifeq ($(origin CXX),default)
CXX = c++
endif
ARGS ?=
RUN = .venv/bin/python
TABLES = reproduce-prune reproduce-cosmo reproduce-vtp reproduce-safework reproduce-stability
export CXX

.PHONY: venv install install-dev demo reproduce $(TABLES) test lint kernels-check isa-check abi-check bench-train dist clean check-machine

install: .venv/.built
install-dev: .venv/.dev .venv/.built
venv: .venv/.created

demo: install
	$(RUN) -m cosmo_fast.train --config demo $(ARGS)

# The demo's figures in README.md: three seeds, then the tables are written from their summaries.
reproduce: install
	for seed in 0 1 2; do \
	  $(RUN) -m cosmo_fast.train --config demo --seed $$seed --output_dir runs/reproduce-$$seed $(ARGS) || exit 1; \
	  cp runs/reproduce-$$seed/summary.json benchmarks/results/demo-seed-$$seed.json; \
	done
	cp runs/reproduce-0/plots/overview.png benchmarks/results/demo-seed-0.png
	$(RUN) benchmarks/plot.py

# Tables of arms and seeds (benchmarks/reproduce), up to hours each; stopped, they go on where they were.
$(TABLES): install
	$(RUN) benchmarks/reproduce/runner.py $(@:reproduce-%=%) $(ARGS); status=$$?; $(RUN) benchmarks/plot.py; exit $$status

test: install-dev
	$(RUN) -m pytest -q $(ARGS)

lint: install-dev
	$(RUN) -m ruff check .
	.venv/bin/clang-format --dry-run -Werror csrc/*

kernels-check: install-dev
	$(RUN) -m cosmo_fast.kernels.check

# The row kernels pick an instruction set when they are loaded; here each one alone passes their tests (x86-64 only).
# Without a fused multiply-add (processors before 2013) linear_kl has up to three times eager PyTorch's error in fp32.
ROW_TESTS = test_vocab_stats.py test_weight_gradient.py test_advantages.py test_prefix_attention.py test_rotary.py test_vision_prune.py
isa-check: install-dev
	for arch in x86-64 x86-64-v3; do \
	  CFLAGS="-march=$$arch -DCOSMO_ISA=" $(RUN) setup.py -q build --build-base build/$$arch --build-lib build/$$arch/lib || exit 1; \
	  (cd tests && PYTHONPATH="$(CURDIR)/build/$$arch/lib" ../$(RUN) -m pytest -q -p no:cacheprovider -c /dev/null --rootdir=. \
	    --import-mode=importlib $(ROW_TESTS) $$([ $$arch = x86-64 ] || echo test_linear_kl.py)) || exit 1; \
	done

# One binary for every later torch: built with the pinned one, its op tests run with the next one. Not part of CI: that
# environment (.venv-abi) pulls PyPI's torch, a CUDA build of several GB. make abi-check ABI_TORCH=2.15.0 for another.
ABI_TORCH ?= 2.14.1
abi-check: install-dev
	$(PYTHON) -m venv .venv-abi
	.venv-abi/bin/python -m pip install -q torch==$(ABI_TORCH) numpy pytest
	PYTHONPATH=. .venv-abi/bin/python -m pytest -q tests/test_linear_policy_loss.py tests/test_objectives.py \
	  tests/test_linear_kl.py $(ROW_TESTS:%=tests/%) $(ARGS)

# One GRPO step beside TRL's own trainer, in an environment of its own (.venv-bench; see requirements-train-bench.txt).
bench-train: install
	$(PYTHON) -m venv .venv-bench
	grep -v '^torch==' requirements.txt > .venv-bench/common.txt
	.venv-bench/bin/python -m pip install -q -r .venv-bench/common.txt -r requirements-train-bench.txt
	PYTHONPATH=. .venv-bench/bin/python benchmarks/bench_train.py $(ARGS)

dist: install-dev
	rm -rf dist
	$(RUN) -m build --no-isolation --sdist --wheel

clean:
	rm -rf build dist .venv .venv-abi .venv-bench *.egg-info cosmo_fast/*.so

check-machine:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "cosmo_fast needs Python 3.11 or later: install it, or name it: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "cosmo_fast needs Python's venv module (Debian: apt install python3-venv)" >&2; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig as s; sys.exit(not os.path.exists(os.path.join(s.get_path("include"), "Python.h")))' || \
	  { echo "cosmo_fast needs Python's headers (Debian: apt install python3-dev)" >&2; exit 1; }
	@command -v $(firstword $(CXX)) >/dev/null || \
	  { echo "cosmo_fast needs a C++ compiler: $(firstword $(CXX)) is not on PATH (Debian: apt install g++, or set CXX)" >&2; exit 1; }

.venv/.created:
	@$(MAKE) --no-print-directory check-machine
	$(PYTHON) -m venv .venv
	touch $@

.venv/.deps: requirements.txt | .venv/.created
	$(RUN) -m pip install -r requirements.txt
	touch $@

.venv/.dev: requirements-dev.txt .venv/.deps
	$(RUN) -m pip install -r requirements-dev.txt
	touch $@

.venv/.built: setup.py pyproject.toml $(wildcard csrc/*) .venv/.deps
	@$(MAKE) --no-print-directory check-machine
	$(RUN) -m pip install --no-build-isolation --no-deps -e .
	touch $@
