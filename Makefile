# Every target makes what it needs: `make demo` and `make test` work on a fresh clone with Python 3.11 and pip.
# PYTHON=/path/to/python picks the interpreter, WORKERS=n the number of test processes.
PYTHON  ?= $(shell command -v python3.11 || command -v python3)
WORKERS ?= 2
VENV    := .venv
BIN     := $(VENV)/bin
READY   := $(VENV)/.ready
CLIENTS := .venv-clients
VLLM    := .venv-vllm
CUDA    := .venv-cuda
BITS    := tests/test_numerics.py tests/test_qtensor.py tests/test_golden_te.py tests/test_golden_modelopt.py \
           tests/kernels/test_contract.py tests/train/test_linear.py tests/train/test_low.py
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test bits thirdparty clients vllm cuda lint check bench fmt clean

help:
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST)

demo: $(READY)  ## quantize the tiny language model of examples/tinylm and show what it costs
	@JAX_PLATFORMS=cpu $(BIN)/python examples/tinylm/demo.py

test: $(READY)  ## the fast tests (the others: pytest -m "slow or install or memory or browser or thirdparty")
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -q

bits: $(READY)  ## of the fast tests those that compare bits, compiled as users compile them (see tests/conftest.py)
	@JQOPT_TESTS_OPTIMIZED=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -q $(BITS)

thirdparty: $(READY)  ## models that others wrote, installed beside the environment
	@$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/thirdparty -r tests/thirdparty/requirements.txt
	@PYTHONPATH=$(VENV)/thirdparty $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -q -m thirdparty

clients: $(CLIENTS)/.ready  ## exports and decoders beside transformers, compressed-tensors and nvidia-modelopt, in .venv-clients
	@PYTHONPATH=.:kernels $(CLIENTS)/bin/python -m pytest -n $(WORKERS) --dist loadfile -q -m clients tests/export tests/hf

vllm: $(VLLM)/.ready  ## exports in the CPU build of vLLM, in .venv-vllm; prints the table of docs/export.md
	@PYTHONPATH=.:kernels $(VLLM)/bin/python -m pytest -q -s -m vllm tests/export

cuda: $(CUDA)/.ready  ## Triton kernels without a GPU: interpreted, compiled and lowered, in .venv-cuda
	@JAX_PLATFORMS=cpu TRITON_DEFAULT_FP_FUSION=1 $(CUDA)/bin/python -m pytest -n $(WORKERS) -q -m "cuda and not long" tests/kernels

lint: $(READY)  ## format, lint and types, without changing a file
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/pyright --pythonpath $(BIN)/python

check: lint test  ## what must be green before a commit

bench: $(READY)  ## the tables of docs/ and README.md
	@$(BIN)/python -m benchmarks.run

fmt: $(READY)  ## format, and mend what the linter can mend
	@$(BIN)/ruff format --quiet .
	@$(BIN)/ruff check --fix --quiet .

clean:  ## remove the environment and every cache
	rm -rf $(VENV) $(CLIENTS) $(VLLM) $(CUDA) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

# The stamp is older than pyproject.toml when the dependencies may have changed.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("jqopt needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0] + "; write: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11")'
	@echo "making $(VENV) (once, a few minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $(READY)

# PyTorch first and alone: what comes after must not choose another build of it.
$(CLIENTS)/.ready: pyproject.toml tests/export/requirements-torch.txt tests/export/requirements-clients.txt
	@echo "making $(CLIENTS) (once; PyTorch is large)"
	@$(PYTHON) -m venv $(CLIENTS)
	@$(CLIENTS)/bin/python -m pip install --quiet -r tests/export/requirements-torch.txt
	@$(CLIENTS)/bin/python -m pip install --quiet -r tests/export/requirements-clients.txt --editable '.[hf]'
	@touch $@

# vLLM without its dependencies, and these without those that bring another PyTorch.
$(VLLM)/.ready: pyproject.toml tests/export/requirements-torch.txt tests/export/requirements-vllm.txt tests/export/requirements-vllm-needs.txt
	@echo "making $(VLLM) (once; PyTorch and vLLM are large)"
	@$(PYTHON) -m venv $(VLLM)
	@$(VLLM)/bin/python -m pip install --quiet -r tests/export/requirements-torch.txt
	@$(VLLM)/bin/python -m pip install --quiet --no-deps -r tests/export/requirements-vllm.txt
	@$(VLLM)/bin/python -m pip install --quiet -r tests/export/requirements-vllm-needs.txt --editable '.[hf]'
	@touch $@

# Without their dependencies: the plugins need no CUDA libraries to lower and compile for a GPU.
$(CUDA)/.ready: pyproject.toml tests/kernels/requirements-triton.txt tests/kernels/requirements-plugins.txt
	@echo "making $(CUDA) (once; Triton and the plugins are large)"
	@$(PYTHON) -m venv $(CUDA)
	@$(CUDA)/bin/python -m pip install --quiet --editable '.[dev]' -r tests/kernels/requirements-triton.txt
	@$(CUDA)/bin/python -m pip install --quiet --no-deps -r tests/kernels/requirements-plugins.txt
	@touch $@
