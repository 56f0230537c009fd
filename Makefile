# `make demo` and `make test` do all their set-up on a fresh machine.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
SMOLLM2 := $(VENV)/share/smollm2
SINGLE  := tests/kernels tests/models
VLLM   := .venv-vllm
VLLM_READY := $(VLLM)/.ready

export OMP_NUM_THREADS = 1
export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: demo test test-vllm lint clean

demo: $(READY)
	$(BIN)/mas-hpc pipeline configs/quickstart.yaml

# Slow tests outside kernels and models start ranks of their own, so they come one by one. g++ builds the host library of the SYCL kernels; without it their tests fail and say so.
test: $(READY)
	@command -v g++ >/dev/null || { apt-get update -qq && apt-get install -qq --yes g++; } || echo "g++ cannot be installed here"
	$(BIN)/pytest -m 'not slow' -n 2
	$(BIN)/pytest -m slow -n 2 --dist loadfile $(SINGLE)
	$(BIN)/pytest -m slow $(SINGLE:%=--ignore %)

# vLLM's CPU build needs an older transformers than ours, so it lives in an environment of its own.
test-vllm: $(VLLM_READY)
	VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 $(VLLM)/bin/pytest -rs tests/rollout/test_contract.py tests/rollout/test_vllm.py tests/rollout/test_vllm_limits.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip==25.3
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

$(VLLM_READY): pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --upgrade pip==25.3
	$(VLLM)/bin/python -m pip install --quiet --no-deps -r constraints-vllm.txt
	$(VLLM)/bin/python -m pip install --quiet --no-deps -e .
	touch $@

clean:
	rm -rf $(VENV) $(VLLM) runs build *.egg-info
