#!/usr/bin/env bash
# Build TransformerEngine's torch half, which is packed as source, on the GPU machine: after `source .gpu_1/setup_packs.sh`.
#
#   tools/gpu/build_te.sh [FOLDER]      JOBS (one a core) compilers at once, 1 to 2 GB each; FOLDER gets the library, compressed
#
# Next time, put what FOLDER got, te_torch.so.xz, into one of the folders of packs: then this script unpacks it instead.
set -euo pipefail
GPU_SITE=${GPU_SITE:-/opt/fp8slurm-gpu}
SITE=$GPU_SITE/site
NAME=transformer_engine_torch$(python3 -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
built() { for file in .gpu_*[0-9]/te_torch.so.xz; do [ ! -f "$file" ] || { echo "$file"; return; }; done; }

if [ -f "$SITE/$NAME" ]; then exit; fi
if [ -n "$(built)" ]; then
  xz -dc "$(built)" > "$SITE/$NAME"
else
  OUT_FOLDER=$(realpath "${1:-$GPU_SITE}")
  mkdir -p "$GPU_SITE/te"
  tar -xzf "$SITE/transformer_engine_torch.tar.gz" -C "$GPU_SITE/te" --strip-components=1
  NVIDIA=$SITE/nvidia
  cd "$GPU_SITE/te"
  # headers that a CUDA toolkit may lack, out of the wheels
  export CPATH=$NVIDIA/cudnn/include:$NVIDIA/nccl/include:$NVIDIA/cu13/include${CPATH:+:$CPATH}
  export NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_CUDA_ARCHS=90 NVTE_WITH_NCCL_EP=0 MAX_JOBS=${JOBS:-$(nproc)}
  python3 setup.py build_ext --inplace > "$GPU_SITE/te.log" 2>&1 || { tail -n 40 "$GPU_SITE/te.log" >&2; exit 1; }
  LIBRARY=$(find . -name "$NAME" | head -n 1)
  strip --strip-unneeded "$LIBRARY"
  xz -3 -c "$LIBRARY" > "$OUT_FOLDER/te_torch.so.xz"
  cp "$LIBRARY" "$SITE/"
fi
VERSION=$(PYTHONPATH=$SITE python3 -c 'from importlib.metadata import version; print(version("transformer-engine"))')
mkdir -p "$SITE/transformer_engine_torch-$VERSION.dist-info"
printf 'Metadata-Version: 2.1\nName: transformer_engine_torch\nVersion: %s\n' "$VERSION" > "$SITE/transformer_engine_torch-$VERSION.dist-info/METADATA"
echo "TransformerEngine $VERSION: torch half in $SITE after $SECONDS s"
