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

.PHONY: help install demo demo_moe demo_mistral3 test lint gpu bench clean

help:
	@echo "make demo           train a tiny Gemma 3 on drawn images, resume it in another layout, export and check it"
	@echo "make demo_moe       train a tiny Qwen3-VL-MoE with expert parallelism, export and check it"
	@echo "make demo_mistral3  the first one with a tiny Mistral3 (Ministral 3's text)"
	@echo "make test           the test suite"
	@echo "make lint           ruff and mypy"
	@echo "make gpu            GPU tests and benchmarks (needs a GPU)"
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

test: $(STAMP)
	$(BIN)/python -m pytest tests

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

gpu: $(STAMP)
	GPU_TESTS=1 $(BIN)/python -m pytest tests/gpu
	set -e; for script in benchmarks/gpu_*.py; do [ ! -e "$$script" ] || $(BIN)/python "$$script"; done

bench: $(STAMP)
	set -e; for script in benchmarks/*.py; do case "$$script" in */gpu_*) ;; *) $(BIN)/python "$$script";; esac; done

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build kernels/_C.* *.egg-info
