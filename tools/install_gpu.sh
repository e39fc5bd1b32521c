#!/usr/bin/env bash
# A virtual environment for GPU nodes: the set `cluster` of docs/install.md. Run it where nvcc is (no GPU needed), with a network.
#
#   tools/install_gpu.sh VENV [PYTHON]        DRY_RUN=1 prints the commands
#
# NVTE_CUDA_ARCHS (90) are the architectures that TransformerEngine's torch half is compiled for, MAX_JOBS (4) the compilers at once.
set -euo pipefail
VENV=${1:?usage: tools/install_gpu.sh VENV [PYTHON]}
PYTHON=${2:-python3}
cd "$(dirname "$0")/.."
do_() { if [ -n "${DRY_RUN:-}" ]; then printf '%q ' "$@"; echo; else "$@"; fi; }
pin() { grep -E "^($1)(==|>=)" requirements/cluster.txt; }

if [ -z "${DRY_RUN:-}" ]; then
  command -v nvcc > /dev/null || { echo "install_gpu.sh: there is no nvcc on this machine: load the CUDA 13 module, or go to a node that has it" >&2; exit 2; }
  "$PYTHON" -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else f"install_gpu.sh: Python {v[0]}.{v[1]}; allowed: 3.11, 3.12, 3.13")'
fi
export NVTE_FRAMEWORK=pytorch NVTE_CUDA_ARCHS=${NVTE_CUDA_ARCHS:-90} MAX_JOBS=${MAX_JOBS:-4}

do_ "$PYTHON" -m venv "$VENV"
PIP="$VENV/bin/pip"
do_ "$PIP" install --upgrade pip setuptools wheel ninja pybind11
# 1. torch with its CUDA libraries: everything after it is compiled against it, or pinned to it
do_ "$PIP" install "$(pin torch)"
# 2. SGLang with all that it needs, FA3 (in sglang-kernel), FlashInfer and DeepGEMM included; it pins this torch
do_ "$PIP" install $(pin 'sglang|sglang-kernel|sgl-deep-gemm|flashinfer-python|transformers|tokenizers')
# 3. Megatron-core without its dependencies, and ours
do_ "$PIP" install --no-deps --ignore-requires-python "$(pin megatron-core)"
do_ "$PIP" install "$(pin submitit)" math-verify tyro rich safetensors pyarrow matplotlib tensorboard
# 4. cuDNN and NCCL newer than torch's own; pip says that torch wants others, and that is so
do_ "$PIP" install --no-deps "$(pin nvidia-cudnn-cu13)" "$(pin nvidia-nccl-cu13)"
# 5. TransformerEngine: two wheels, and its torch half as source, for this torch
do_ "$PIP" install --no-deps "$(pin transformer-engine)" "$(pin transformer-engine-cu13)" onnxscript onnx einops
do_ "$PIP" install --no-deps --no-build-isolation "$(pin transformer-engine-torch)"
# 6. this project
do_ "$PIP" install --no-deps --no-build-isolation --editable .
do_ "$VENV/bin/fp8slurm" doctor --quick
