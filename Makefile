# Commands of the project. The first one that runs also creates .venv; later ones reuse it.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# pyenv's python3.12 shim follows .python-version; elsewhere any python3.12 on the path does.
PYTHON ?= python3.12
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
KERNELS := kernels/vlm_kernels

# Several ranks share the cores: one thread each is faster than all of them fighting.
export OMP_NUM_THREADS := 1
export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE := 1

.PHONY: help install demo demo_moe demo_mistral3 demo_gemma4 test test_full test_lower_bounds lint gpu gpu_bundle gpu_dry bench clean

help:
	@echo "make demo           train a tiny Gemma 3 on drawn images, resume it in another layout, export and check it"
	@echo "make demo_moe       train a tiny Qwen3-VL-MoE with expert parallelism, export and check it"
	@echo "make demo_mistral3  the first one with a tiny Mistral3 (Ministral 3's text)"
	@echo "make demo_gemma4    the first one with a tiny Gemma 4, which also listens to synthesised clips"
	@echo "make test           tests of every family and kind, in layouts in which every two features meet"
	@echo "make test_full      tests in all layouts and sizes; goes on where it was stopped; FAMILY=gemma3 for one family"
	@echo "make test_lower_bounds  make test's tests with the oldest torch, torchvision and transformers that are allowed"
	@echo "make lint           ruff, mypy and the order in which packages may import each other"
	@echo "make gpu            tests, profiles, benchmarks and demos on one GPU, in stages of at most two minutes"
	@echo "make gpu_bundle     what a container with a GPU and without network needs for that, in one folder"
	@echo "make gpu_dry        starts each of those stages on this machine, at tiny sizes"
	@echo "make bench          benchmarks that need no GPU"

install: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard $(KERNELS)/*/*.cu $(KERNELS)/*/*.cuh $(KERNELS)/*/*.h)
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.12, or run make PYTHON=/path/to/python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' || { echo "$(PYTHON) is not Python 3.12" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@head -n 1 $(KERNELS)/_C.txt
	@touch $@

demo: $(STAMP)
	$(BIN)/python -m demo.run

demo_moe: $(STAMP)
	$(BIN)/python -m demo.run --model qwen3_vl_moe

demo_mistral3: $(STAMP)
	$(BIN)/python -m demo.run --model mistral3

demo_gemma4: $(STAMP)
	$(BIN)/python -m demo.run --model gemma4

# Two processes, of which one works while the other waits for its ranks; the tests of a file stay together.
test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not full" tests

# What has passed with the present sources and packages is not run again (tests/resume.py).
FAMILY ?=
test_full: $(STAMP)
	$(BIN)/python -m pytest -p tests.resume -n 2 --dist loadfile $(if $(FAMILY),-k $(FAMILY)) tests

# The extension that `make install` built serves both environments.
LOWER := .venv_lower
test_lower_bounds: $(STAMP)
	test -x $(LOWER)/bin/python || $(PYTHON) -m venv $(LOWER)
	$(BIN)/python -m tests.lower_bounds --requirements > $(LOWER)/requirements.txt
	$(LOWER)/bin/python -m pip install --quiet --constraint constraints_lower.txt --requirement $(LOWER)/requirements.txt
	$(LOWER)/bin/python -m tests.lower_bounds

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# Where a container brings torch and there is no network: make gpu GPU_PYTHON=python3, beside a gpu_bundle made before.
GPU_PYTHON ?=
gpu: $(if $(GPU_PYTHON),,$(STAMP))
	$(or $(GPU_PYTHON),$(BIN)/python) -m benchmarks.gpu $(if $(GPU_PYTHON),--bundle gpu_bundle) $(GPU_OPTIONS)

gpu_bundle: $(STAMP)
	$(BIN)/python -m benchmarks.gpu.bundle gpu_bundle

gpu_dry: $(STAMP)
	$(BIN)/python -m benchmarks.gpu --dry

bench: $(STAMP)
	set -e; for script in convert train_step memory_estimate planner loss_memory context_balance launches packing startup_counts save_memory operator_host_cost; do $(BIN)/python benchmarks/$$script.py; done

clean:
	rm -rf $(VENV) $(LOWER) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache build gpu_bundle $(KERNELS)/_C.* *.egg-info
