# Commands of the project. The first one that runs also creates .venv; later ones reuse it.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# pyenv's python3.12 shim follows .python-version; elsewhere any python3.12 on the path does.
PYTHON ?= python3.12
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Several ranks share the cores: one thread each is faster than all of them fighting.
export OMP_NUM_THREADS := 1
export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE := 1

.PHONY: help install demo demo_moe demo_mistral3 test test_full lint gpu bench clean

help:
	@echo "make demo           train a tiny Gemma 3 on drawn images, resume it in another layout, export and check it"
	@echo "make demo_moe       train a tiny Qwen3-VL-MoE with expert parallelism, export and check it"
	@echo "make demo_mistral3  the first one with a tiny Mistral3 (Ministral 3's text)"
	@echo "make test           the test suite"
	@echo "make test_full      the same with the further layouts and sizes that are marked full"
	@echo "make lint           ruff and mypy"
	@echo "make gpu            builds the kernels, tests, demos and benchmark on one GPU"
	@echo "make bench          benchmarks that need no GPU"

install: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard kernels/*/*.cu kernels/*/*.cuh kernels/*/*.h)
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.12, or run make PYTHON=/path/to/python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' || { echo "$(PYTHON) is not Python 3.12" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@head -n 1 kernels/_C.txt
	@touch $@

demo: $(STAMP)
	$(BIN)/python -m demo.run

demo_moe: $(STAMP)
	$(BIN)/python -m demo.run --model qwen3_vl_moe

demo_mistral3: $(STAMP)
	$(BIN)/python -m demo.run --model mistral3

# Two processes, of which one works while the other waits for its ranks; the tests of a file stay together.
test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not full" tests

test_full: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile tests

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Everything runs, whatever fails before it: time on a GPU is scarce. What failed is told at the end.
gpu: $(STAMP)
	@export MEGATRON_VLM_STRICT_KERNELS=1; failed=; attempt() { echo "== $$*"; "$$@" || failed="$$failed\n  $$*"; }; \
	attempt $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .; \
	GPU_TESTS=1 attempt $(BIN)/python -m pytest tests/gpu; \
	for model in gemma3 qwen3_vl_moe mistral3; do attempt $(BIN)/python -m demo.run --processes 1 --model $$model; done; \
	attempt $(BIN)/python benchmarks/kernels.py; \
	[ -z "$$failed" ] || { printf "failed:$$failed\n" >&2; exit 1; }

bench: $(STAMP)
	set -e; for script in convert train_step; do $(BIN)/python benchmarks/$$script.py; done

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build kernels/_C.* *.egg-info
