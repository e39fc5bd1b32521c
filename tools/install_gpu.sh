#!/usr/bin/env bash
# A virtual environment for GPU nodes: the set `gpu` of docs/install.md, every package in the version of requirements/gpu.txt.
# Run it where nvcc of CUDA 13 is (no GPU needed), with a network. 12 GB of disk.
#
#   tools/install_gpu.sh VENV [PYTHON]        DRY_RUN=1 prints the commands; PYTHON: a Python 3.12 (python3.12)
#
# NVTE_CUDA_ARCHS (90) are the architectures that TransformerEngine's torch half is compiled for, MAX_JOBS (4) the compilers at once.
set -euo pipefail
VENV=${1:?usage: tools/install_gpu.sh VENV [PYTHON]}
PYTHON=${2:-python3.12}
cd "$(dirname "$0")/.."
PINS=requirements/gpu.txt
do_() { if [ -n "${DRY_RUN:-}" ]; then printf '%q ' "$@"; echo; else "$@"; fi; }
pin() { grep "^$1==" $PINS; }

if [ -z "${DRY_RUN:-}" ]; then
  command -v nvcc > /dev/null || { echo "install_gpu.sh: there is no nvcc on this machine: load the CUDA 13 module, or go to a node that has it" >&2; exit 2; }
  "$PYTHON" -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v == (3, 12) else f"install_gpu.sh: Python {v[0]}.{v[1]}; the set has wheels for 3.12 only: install_gpu.sh VENV python3.12")'
fi

do_ "$PYTHON" -m venv "$VENV"
PIP="$VENV/bin/pip"
do_ "$PIP" install --upgrade pip wheel pybind11
# 1. Every wheel of the set, without dependency resolution: it was resolved when it was written down, and four of its pins are not
#    what other packages ask for (requirements/gpu.txt says why). What is compiled below is not among them.
do_ "$PIP" install --no-deps --only-binary :all: $(grep -Ev '^(#|$|transformer-engine-torch==|megatron-core==)' $PINS)
# 2. TransformerEngine's torch half, compiled for this torch; headers that a CUDA toolkit may lack come out of the wheels
NVIDIA=$VENV/lib/python3.12/site-packages/nvidia
do_ env "CPATH=$NVIDIA/cudnn/include:$NVIDIA/nccl/include:$NVIDIA/cu13/include${CPATH:+:$CPATH}" NVTE_FRAMEWORK=pytorch \
  NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_WITH_NCCL_EP=0 "NVTE_CUDA_ARCHS=${NVTE_CUDA_ARCHS:-90}" "MAX_JOBS=${MAX_JOBS:-4}" \
  "$PIP" install --no-deps --no-build-isolation "$(pin transformer-engine-torch)"
# 3. Megatron-core, whose metadata excludes Pythons that it runs with, and this project
do_ "$PIP" install --no-deps --ignore-requires-python "$(pin megatron-core)"
do_ "$PIP" install --no-deps --no-build-isolation --editable .
do_ "$VENV/bin/fp8slurm" doctor --quick
