# fp8slurm. `make help` lists the targets; ARGS="--section.key VALUE ..." reaches the command behind a target.

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
RUN    ?= runs/tiny-fp8

BIN := $(CURDIR)/$(VENV)/bin
PY  := $(BIN)/python

# Nothing is written outside this folder: every cache lives under it.
CACHE := $(CURDIR)/.cache
export PIP_CACHE_DIR           := $(CACHE)/pip
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export XDG_CACHE_HOME          := $(CACHE)
export HF_HOME                 := $(CACHE)/huggingface
export MPLCONFIGDIR            := $(CACHE)/matplotlib
export TORCH_HOME              := $(CACHE)/torch
export TORCHINDUCTOR_CACHE_DIR := $(CACHE)/inductor
export TRITON_CACHE_DIR        := $(CACHE)/triton
export FLASHINFER_WORKSPACE_BASE := $(CACHE)
export SGLANG_CACHE_DIR        := $(CACHE)/sglang
export HF_HUB_OFFLINE          := 1
# Temporary files too, unless the path is so long that Unix sockets in it would not work.
ifeq ($(shell [ $$(printf %s "$(CACHE)/tmp" | wc -c) -le 50 ] && echo short),short)
export TMPDIR                  := $(CACHE)/tmp
endif

STAMP := $(VENV)/.complete

.DEFAULT_GOAL := help
.PHONY: help setup tiny-data train-tiny-fp8 eval-fp8 plot test test-fast clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo '  ARGS="--rollout.n-samples 16" passes settings on, PYTHON=python3.12 chooses the interpreter of the environment'

setup: $(STAMP)  ## build .venv from the pinned requirements (the other targets do it when a file changed)

$(STAMP): requirements/torch.txt requirements/cpu.txt pyproject.toml
	@mkdir -p $(CACHE)/tmp
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else f"PYTHON=$(PYTHON) is Python {v[0]}.{v[1]}; allowed: 3.11, 3.12, 3.13 (make PYTHON=python3.12 ...)")'
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --requirement requirements/torch.txt
	$(BIN)/pip install --quiet --no-deps --ignore-requires-python --requirement requirements/cpu.txt
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

tiny-data: $(STAMP)  ## the tiny model and its data (models/tiny, data/tiny)
	@$(PY) tools/make_tiny.py --out models/tiny --data data/tiny

train-tiny-fp8: tiny-data  ## the whole loop in FP8 on this machine, no GPU: about five minutes on two cores
	$(BIN)/fp8slurm train --recipe tiny-fp8 $(ARGS)

eval-fp8: $(STAMP)  ## RUN=runs/NAME: newest checkpoint -> HF -> FP8 HF -> SGLang -> accuracy
	$(BIN)/fp8slurm eval --run $(RUN) $(ARGS)

plot: $(STAMP)  ## RUN=runs/NAME: draw its curves again
	$(BIN)/fp8slurm plot $(RUN)

test: tiny-data  ## every test that this machine can run
	$(PY) -m pytest $(ARGS)

test-fast: tiny-data  ## the tests without servers and process groups, under five minutes
	$(PY) -m pytest -m "not slow" $(ARGS)

clean:  ## remove .venv and the caches; runs, models and data stay
	rm -rf $(VENV) .cache
