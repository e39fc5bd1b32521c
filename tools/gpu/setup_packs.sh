# Unpack the packs of make_packs.py that have arrived, once, and set the environment for them. To be sourced, from the project's root, in
# every call on the GPU machine: `source .gpu_1/setup_packs.sh`. Folders may come one call at a time; a pack whose pieces are not all
# there waits. Needs tar, a python3 with the packages that were not packed, and zstd or Python's pyarrow.
#
# GPU_SITE (/opt/fp8slurm-gpu) is where everything goes. What the packs lack of NVIDIA's libraries is linked from python3's own.

GPU_SITE=${GPU_SITE:-/opt/fp8slurm-gpu}

if command -v zstd > /dev/null; then
  _PACKS_UNZSTD="zstd -dcq"
else
  _PACKS_UNZSTD='python3 -c "import shutil, sys, pyarrow as pa; shutil.copyfileobj(pa.CompressedInputStream(sys.stdin.buffer, \"zstd\"), sys.stdout.buffer, 1 << 22)"'
fi

_packs_unpack() {
  local folders=$1 began=$SECONDS pack number piece size file pids=() complete=
  mkdir -p "$GPU_SITE/site" "$GPU_SITE/pieces"
  for folder in "$folders"[0-9]*; do
    for piece in "$folder"/*.[0-9][0-9][0-9].zst; do
      file=$GPU_SITE/pieces/$(basename "$piece" .zst)
      pack=${file##*/}; pack=${pack%%.*}
      [ -e "$file" ] || [ -e "$GPU_SITE/$pack.unpacked" ] || printf '%s\0%s\0' "$piece" "$file"
    done
  done | xargs -0 -r -n 2 -P "$(nproc)" sh -c "$_PACKS_UNZSTD"' < "$0" > "$1.part" && mv "$1.part" "$1"' || return 1

  for pack in $(cut -d. -f1 "$folders"[0-9]*/pieces.txt | sort -u); do
    [ -e "$GPU_SITE/$pack.unpacked" ] && continue
    complete=yes
    for number in $(cat "$folders"[0-9]*/pieces.txt | sort -u | grep "^$pack\." | cut -d. -f2); do
      [ -e "$GPU_SITE/pieces/$pack.$number" ] || complete=
    done
    [ -n "$complete" ] || { echo "packs: $pack is not complete yet"; continue; }
    [ "$pack" != cudnn ] || rm -rf "$GPU_SITE/site/nvidia/cudnn"  # links to another version
    (cat "$GPU_SITE/pieces/$pack".* | tar -x -C "$GPU_SITE/site" && touch "$GPU_SITE/$pack.unpacked" && rm "$GPU_SITE/pieces/$pack".*) &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || return 1; done
  [ ${#pids[@]} -eq 0 ] || echo "packs: unpacked after $((SECONDS - began)) s: $(cd "$GPU_SITE" && echo *.unpacked)"
}

_packs_link() {  # libraries of CUDA that torch looks for beside itself
  local own
  [ -e "$GPU_SITE/torch.unpacked" ] || return 0
  own=$(PYTHONPATH= python3 -c 'import nvidia; print(list(nvidia.__path__)[0])') || return 1
  for folder in "$own"/*; do
    case ${folder##*/} in
      cudnn) [ -e "$GPU_SITE/cudnn.unpacked" ] && continue ;;  # all of its libraries are of one version
      nccl) [ -e "$GPU_SITE/cuda.unpacked" ] && continue ;;
    esac
    [ ! -d "$folder" ] || cp -rsn "$folder" "$GPU_SITE/site/nvidia/" 2> /dev/null || true
  done
}

mkdir -p "$GPU_SITE/site/nvidia"
[ -e "$GPU_SITE/began" ] || date +%s > "$GPU_SITE/began"  # visit.py says what setting up has taken
_packs_unpack "$(dirname "${BASH_SOURCE[0]}" | sed 's/[0-9]*$//')" && _packs_link || echo "packs: FAILED" >&2

export PYTHONPATH=$GPU_SITE/site:$PWD PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
# these come before a system's own: two versions of cuDNN in a process fail
export LD_LIBRARY_PATH=$GPU_SITE/site/nvidia/cudnn/lib:$GPU_SITE/site/nvidia/cu13/lib:$GPU_SITE/site/nvidia/nccl/lib
# where TransformerEngine looks first; else it takes python3's own cuBLAS and cuDNN
export CUDNN_PATH=$GPU_SITE/site/nvidia/cudnn NVRTC_PATH=$GPU_SITE/site/nvidia/cu13 CURAND_PATH=$GPU_SITE/site/nvidia/cu13
export NVTE_FP8_BLOCK_SCALING_FP32_SCALES=1 CUDA_DEVICE_MAX_CONNECTIONS=1
# two ranks on one GPU; no multicast: it can take GPUs that others share out of service
export NCCL_MULTI_RANK_GPU_ENABLE=1 NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1
# else SGLang compiles DeepGEMM for every batch of up to 16384 tokens before it answers
export SGLANG_JIT_DEEPGEMM_PRECOMPILE=0
export DG_JIT_CACHE_DIR=$GPU_SITE/cache/dg SGLANG_DG_CACHE_DIR=$GPU_SITE/cache/dg SGLANG_CACHE_DIR=$GPU_SITE/cache/sglang
export TVM_FFI_CACHE_DIR=$GPU_SITE/cache/tvm TRITON_CACHE_DIR=$GPU_SITE/cache/triton FLASHINFER_WORKSPACE_BASE=$GPU_SITE/cache
