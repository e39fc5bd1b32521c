# fp8slurm. `make help` lists the targets; ARGS="--section.key VALUE ..." reaches the command behind a target.

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
# A command of an environment of your own (a cluster's, with TransformerEngine) in place of .venv, which is then not built.
FP8SLURM ?=

BIN := $(abspath $(VENV))/bin
PY  := $(BIN)/python

# Where something is, and which run is meant; left out: what the recipe says.
HF_CHECKPOINT  ?=
PROMPT_DATA    ?=
EVAL_DATA      ?=
FP8_CHECKPOINT ?= $(HF_CHECKPOINT:/=)-FP8
RUN            ?=
NODES          ?=
export HF_CHECKPOINT PROMPT_DATA EVAL_DATA ARGS FP8SLURM VENV

COMMAND  := $(or $(FP8SLURM),$(BIN)/fp8slurm)
# The shell takes RUN apart: make's own functions would cut a path at its spaces.
SETTINGS  = $(if $(RUN),--run.root="$$(dirname "$(RUN)")" --run.name="$$(basename "$(RUN)")") \
            $(if $(HF_CHECKPOINT),--model.hf-checkpoint="$(HF_CHECKPOINT)") \
            $(if $(PROMPT_DATA),--data.train="$(PROMPT_DATA)") $(if $(EVAL_DATA),--data.eval="$(EVAL_DATA)") $(ARGS)
# What is asked is asked before anything is built: the environment comes in the recipe's second line. Queued and running
# jobs use the one that is there: it is not rebuilt under them.
READY     = $(if $(FP8SLURM),:,$(MAKE) --no-print-directory setup)
THERE     = [ -x "$(COMMAND)" ] || $(READY)

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

# Whose VENV is, and whether it is as the requirements say: only what make built for this folder is built anew or removed.
STATE := $(shell sh tools/environment.sh state "$(VENV)")

.DEFAULT_GOAL := help
.PHONY: help setup tiny-data tiny-moe-data train-tiny-fp8 train-tiny-moe-fp8 train-4b-fp8 train-30b-a3b-fp8 all-4b-fp8 all-tiny-fp8 convert-fp8 eval-fp8 \
        status plot report lint test test-fast test-faults fuzz clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo '  variables: RUN=runs/NAME  HF_CHECKPOINT=  PROMPT_DATA=  EVAL_DATA=  FP8_CHECKPOINT=  (paths; left out: what the recipe says)'
	@echo '             ARGS="--run.name more --rollout.n-samples 16 --slurm.partition gpu"  passes settings on'
	@echo '             FP8SLURM=/path/to/fp8slurm  uses an environment of your own, PYTHON=python3.12 chooses the interpreter of .venv'

# An environment that make did not build here (tools/install_gpu.sh, a site's, another checkout's) is taken as it is.
ifneq ($(filter current own foreign,$(STATE)),)
STAMP :=
else
STAMP := environment
.PHONY: environment
environment:
	@mkdir -p $(CACHE)/tmp
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else f"PYTHON=$(PYTHON) is Python {v[0]}.{v[1]}; allowed: 3.11, 3.12, 3.13 (make PYTHON=python3.12 ...)")'
	@[ "$(STATE)" != other ] || { echo 'make: VENV=$(VENV) holds something that make did not put there, and no bin/fp8slurm: move it away, or name another folder' >&2; exit 2; }
	rm -rf "$(VENV)"
	$(PYTHON) -m venv "$(VENV)"
	@pwd -P > "$(VENV)/.made-by-make"
	$(BIN)/pip install --quiet --requirement requirements/torch.txt
	$(BIN)/pip install --quiet --no-deps --ignore-requires-python --requirement requirements/cpu.txt
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	@sh tools/environment.sh sum > "$(VENV)/.complete"
endif

setup: $(STAMP)  ## build .venv from the pinned requirements (the other targets do it when their contents changed)

tiny-data: $(STAMP)  ## the tiny model and its data (models/tiny, data/tiny)
	@$(PY) tools/make_tiny.py --out models/tiny --data data/tiny

tiny-moe-data: tiny-data  ## the tiny mixture of experts too (models/tiny-moe)
	@$(PY) tools/make_tiny.py --out models/tiny-moe --moe

train-tiny-fp8: tiny-data  ## the whole loop in FP8 on this machine, no GPU: about five minutes on two cores
	$(BIN)/fp8slurm train --recipe tiny-fp8 $(ARGS)

train-tiny-moe-fp8: tiny-moe-data  ## the same with a mixture of 8 experts over two ranks, routing replayed
	$(BIN)/fp8slurm train --recipe tiny-moe-fp8 $(ARGS)

train-4b-fp8:  ## Qwen3-4B in FP8 as a Slurm job on one node of 8 GPUs (HF_CHECKPOINT=, PROMPT_DATA=, EVAL_DATA=)
	@tools/require_slurm.sh $@ qwen3-4b-fp8 gpu
	@$(THERE)
	$(COMMAND) submit --recipe qwen3-4b-fp8 $(SETTINGS)

train-30b-a3b-fp8:  ## Qwen3-30B-A3B in FP8 as a Slurm job on two nodes of 8 GPUs
	@tools/require_slurm.sh $@ qwen3-30b-a3b-fp8 gpu
	@$(THERE)
	$(COMMAND) submit --recipe qwen3-30b-a3b-fp8 $(SETTINGS)

all-4b-fp8:  ## HF -> torch_dist and FP8 -> train -> HF -> FP8 -> evaluation, as one chain of Slurm jobs
	@tools/require_slurm.sh $@ qwen3-4b-fp8 gpu
	@$(THERE)
	$(COMMAND) chain --recipe qwen3-4b-fp8 $(SETTINGS)

all-tiny-fp8:  ## the same chain for the tiny model, on a Slurm cluster without GPUs
	@tools/require_slurm.sh $@ tiny-fp8 cpu
	@$(THERE)
	@{ [ -d models/tiny ] && [ -d data/tiny ]; } || $(MAKE) --no-print-directory tiny-data
	$(COMMAND) chain --recipe tiny-fp8 $(SETTINGS)

convert-fp8:  ## HF_CHECKPOINT=models/X: BF16 -> block FP8, into FP8_CHECKPOINT (models/X-FP8)
	@[ -n "$(HF_CHECKPOINT)" ] || { echo 'make $@: give the Hugging Face folder with HF_CHECKPOINT=models/X' >&2; exit 2; }
	@[ -d "$(HF_CHECKPOINT)" ] || { echo 'make $@: HF_CHECKPOINT=$(HF_CHECKPOINT): there is no such folder' >&2; exit 2; }
	@$(READY)
	$(COMMAND) convert hf-to-fp8 "$(HF_CHECKPOINT)" "$(FP8_CHECKPOINT)" $(ARGS)

EVALUATED = $(or $(RUN),runs/tiny-fp8)
eval-fp8:  ## RUN=runs/NAME: newest checkpoint -> HF -> FP8 HF -> SGLang -> accuracy (NODES=2: on nodes of a Slurm cluster)
	@[ -f "$(EVALUATED)/config.json" ] || { echo 'make $@: RUN=$(EVALUATED): there is no run (make train-tiny-fp8 makes runs/tiny-fp8)' >&2; exit 2; }
	@$(READY)
	$(COMMAND) eval --run "$(EVALUATED)" $(if $(EVAL_DATA),--tasks "$(EVAL_DATA)") $(if $(NODES),--nodes $(NODES)) $(ARGS)

status:  ## where all runs stand, or RUN=runs/NAME: from their folders and from Slurm
	@$(THERE)
	@$(COMMAND) status $(if $(RUN),"$(RUN)") $(ARGS)

plot:  ## RUN=runs/NAME: draw its curves again
	@$(READY)
	$(COMMAND) plot "$(EVALUATED)"

report:  ## RUN=runs/NAME: its report, one HTML file
	@$(READY)
	$(COMMAND) report "$(EVALUATED)" $(ARGS)

# Two processes: much of the time is waiting. A file's tests stay together, they share servers.
PYTEST = sh tools/test_packages.sh && OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m pytest --numprocesses 2 --dist loadfile

# Everything that reads the code without running it; caches make the second time quick.
lint: $(STAMP)  ## format, style, types and import contracts: half a minute, seconds when little has changed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-logo --cache-dir .cache/import-linter
	$(BIN)/mypy

test: tiny-data  ## every test that this machine can run, node faults (test-faults) left out
	$(PYTEST) -m "not faults" $(ARGS)

test-fast: tiny-data  ## the tests without servers and process groups, under five minutes
	$(PYTEST) -m "not slow" $(ARGS)

test-faults: tiny-data  ## every fault on a real two-node Slurm cluster that is started here (root, Debian's Slurm)
	$(PYTEST) -m 'slurm or faults' $(ARGS)

FUZZ_CASES ?= 2000
FUZZ_SEED  ?= 0
fuzz: $(STAMP)  ## thousands of damaged inputs (FUZZ_CASES=2000 of each kind, FUZZ_SEED=0): a sentence or the right result
	FUZZ_CASES=$(FUZZ_CASES) FUZZ_SEED=$(FUZZ_SEED) OMP_NUM_THREADS=1 $(PY) -m pytest -rP tests/fuzz $(ARGS)

clean:  ## remove .venv and the caches; runs, models and data stay
	@case "$(STATE)" in absent | current | stale) rm -rf "$(VENV)";; *) echo 'make clean: VENV=$(VENV) was not made by make for this folder and stays';; esac
	rm -rf .cache
