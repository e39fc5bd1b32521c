#!/usr/bin/env python3
"""The GPU packages of requirements/gpu.txt as small archives, for a machine that has no network and takes little at a
time.

usage: make_packs.py OUT --work DIR [--present NAMES] [--only PACK...] [--limit-mib 59]      (needs zstd and strip)

Every package that requirements/gpu.txt pins is downloaded as a wheel for Linux, x86-64 and Python 3.12, in that
version and no other. What a Qwen3 run on one Hopper GPU never loads is left out or blanked: GPU code of other
architectures, kernels of FlashAttention 3 for other head dimensions, static libraries, debug symbols. The rest is
packs (torch, cuda, train, serve, cudnn), cut into pieces that are compressed one by one, in folders OUT1, OUT2, ...
of at most --limit-mib each (OUT=.gpu_ makes .gpu_1, .gpu_2, ...). `source OUT1/setup_packs.sh` on the other machine
unpacks what has arrived, in parallel.

--present names a file with the packages, a line each, that the other machine has in a version that will do. They are
not packed, nor are those of LEFT_OUT. TransformerEngine's torch half is packed as source: tools/gpu/build_te.sh
builds it there. --only makes some packs anew and keeps the pieces of the others, which --work holds.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import urllib.request
import zipfile
from pathlib import Path

from fatbin import blank, blank_compressed_cubins, for_arch
from trim_fa3 import HOPPER, trim

ROOT = Path(__file__).resolve().parents[2]
PINS = ROOT / "requirements" / "gpu.txt"
PYTHON = "3.12"
PLATFORMS = [f"manylinux_2_{glibc}_x86_64" for glibc in range(39, 4, -1)] + [
    f"manylinux{name}_x86_64" for name in ("2014", "2010", "1")
]
PACKS = {
    "torch": r"torch|torchvision|triton",
    "cuda": r"nvidia-cublas|nvidia-nccl-cu13",
    "train": r"transformer-engine.*|nvdlfw-inspect|megatron-core|submitit|tyro|math-verify",
    "cudnn": r"nvidia-cudnn-cu13",
    "serve": r".*",
}
"""Pack -> names of its packages; the first that fits."""
ORDER = ("torch", "cuda", "train", "serve", "cudnn")
"""In which packs fill the folders: the last, until it has come, is replaced by the other machine's own cuDNN."""
TE_TORCH = "transformer-engine-torch"
LEFT_OUT = {
    "cuda-tile": "kernels for Blackwell",
    "contourpy": "of matplotlib",
    "cryptography": "of downloads",
    "cuda-toolkit": "empty, it only pins others",
    "cycler": "of matplotlib",
    "flash-attn-4": "for Blackwell; TransformerEngine takes it for FlashAttention 2",
    "fonttools": "of matplotlib",
    "kiwisolver": "of matplotlib",
    "matplotlib": "pictures, which runs of a visit do not draw",
    "mistral-common": "tokenizers of other models",
    "modelscope": "another hub",
    "modelscope-hub": "another hub",
    "nccl4py": "of nvshmem4py",
    "nvidia-cuda-cccl": "the machine's CUDA has it",
    "nvidia-cuda-crt": "the machine's CUDA has it",
    "nvidia-cuda-nvcc": "the machine's CUDA has it",
    "nvidia-cuda-nvdisasm": "the machine's CUDA has it",
    "nvidia-cudnn-frontend": "cuDNN for FlashInfer, of which this uses other kernels",
    "nvidia-cutlass-dsl-libs-core": "kernels for Blackwell and other models",
    "nvidia-cutlass-dsl-libs-cu12": "of another CUDA",
    "nvidia-cutlass-dsl-libs-cu13": "kernels for Blackwell and other models",
    "nvidia-mathdx": "headers for kernels that other models compile",
    "nvidia-nvvm": "the machine's CUDA has it",
    "nvshmem4py-cu13": "experts over several nodes",
    "pandas": "of data sets",
    "py-spy": "a profiler",
    "pycountry": "of mistral-common",
    "pyparsing": "of matplotlib",
    "sgl-deep-ep": "experts over several nodes",
    "tilelang": "attention of other models",
    "tokenspeed-mla": "attention of other models",
    "tokenspeed-triton": "attention of other models",
    "z3-solver": "of tilelang",
}
"""Packages of the set that a Qwen3 run on one Hopper GPU does not import, with the reason."""
DROPPED = [
    "**/*.a",
    "**/tests",
    "nvidia/cudnn/lib/libcudnn_ext*",  # causal convolutions
    "nvidia/nccl/lib/libnccl_device*",  # to compile kernels with
    "sgl_kernel/infllm_ops*",  # attention of other models
    "sgl_kernel/sm100",
    "torch/bin/protoc*",
    "torch/test",
    "transformer_engine/jax",
    "triton/_C/libproton.so",
    "triton/backends/nvidia/bin/*-blackwell",
    "triton/backends/nvidia/bin/cuobjdump",
    "triton/backends/nvidia/bin/nvdisasm",
    "triton/backends/nvidia/lib/cupti",
    "triton/instrumentation",
    "triton/profiler",
]
FA3 = "sgl_kernel/flash_ops.abi3.so"
WORTH_BLANKING = 2 << 20
PIECE = 24 << 20
"""Bytes of a pack that are compressed as one piece: small enough to fill folders and to keep every core busy."""
ZSTD = ["zstd", "-q", "-T1", "-c"]


def pins() -> dict[str, str]:
    """Package -> version, of requirements/gpu.txt."""
    lines = [line.partition("#")[0].strip() for line in PINS.read_text().splitlines()]
    return dict(line.split("==") for line in lines if line)


def pack_of(package: str) -> str:
    return next(pack for pack, names in PACKS.items() if re.fullmatch(names, package))


def download(requirements: dict[str, str], into: Path) -> None:
    """Wheels, none twice. `===` takes the version to the letter: `==` would prefer a build such as 2.13.0+cpu."""
    into.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--python-version", PYTHON, "--implementation", "cp", "--dest", str(into)]
    command += [f"--abi={abi}" for abi in ("cp312", "abi3", "none")] + [f"--platform={p}" for p in PLATFORMS]
    subprocess.run([*command, *(f"{name}==={version}" for name, version in requirements.items())], check=True)


def download_te_source(version: str, target: Path) -> None:
    """pip would build the package's metadata, for which it needs torch and CUDA; but it tells where the file is."""
    command = [sys.executable, "-m", "pip", "download", "-vv", "--no-deps", "--only-binary=:all:", f"{TE_TORCH}===0"]
    output = subprocess.run(command, capture_output=True, text=True).stdout
    found = re.search(rf"https://\S+/transformer_engine_torch-{re.escape(version)}\.tar\.gz", output)
    if found is None:
        raise SystemExit(f"make_packs: the package index has no source of {TE_TORCH} {version}")
    with urllib.request.urlopen(found[0]) as answer, open(target, "wb") as file:
        shutil.copyfileobj(answer, file)


def unpack(wheels: Path, site: Path) -> None:
    """All wheels, as pip would lay them into one folder but for scripts, without what nobody loads."""
    site.mkdir(parents=True)
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
            for member in archive.infolist():  # which leaves out that a file is a program, such as Triton's ptxas
                if member.external_attr >> 16 & 0o100:
                    (site / member.filename).chmod(0o755)
    for data in list(site.glob("*.data")):
        for kind in ("purelib", "platlib"):
            if (data / kind).exists():
                shutil.copytree(data / kind, site, dirs_exist_ok=True)
        shutil.rmtree(data)
    for pattern in DROPPED:
        for path in list(site.glob(pattern)):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    if (site / FA3).exists():
        kept, blanked = trim(site / FA3)
        print(f"  {FA3}: GPU code kept {kept / 1e6:.0f} MB, blanked {blanked / 1e6:.0f} MB", flush=True)
    for library in site.rglob("*.so*"):
        if library.stat().st_size < WORTH_BLANKING or library == site / FA3 or library.is_symlink():
            continue
        kept, blanked = blank(library, for_arch(HOPPER))
        if library.name.startswith("libcublasLt"):
            blanked += blank_compressed_cubins(library, HOPPER)
        if blanked:
            print(f"  {library.name}: GPU code kept {kept / 1e6:.0f} MB, blanked {blanked / 1e6:.0f} MB", flush=True)


def compress(site: Path, pack: str, into: Path, level: int) -> None:
    """`site` as a tar archive in pieces: PACK.000.zst, PACK.001.zst, ..., each to be decompressed by itself."""
    shutil.rmtree(into, ignore_errors=True)
    into.mkdir(parents=True)
    tar = subprocess.Popen(["tar", "-c", "--sort=name", "-C", str(site), "."], stdout=subprocess.PIPE)
    assert tar.stdout is not None
    number = 0
    while piece := tar.stdout.read(PIECE):
        with open(into / f"{pack}.{number:03}.zst", "wb") as file:
            subprocess.run([*ZSTD, f"-{level}"], input=piece, stdout=file, check=True)
        number += 1
    if tar.wait():
        raise SystemExit(f"make_packs: tar ended with status {tar.returncode}")
    size = sum(path.stat().st_size for path in into.iterdir())
    print(f"  {pack}: {number} pieces, {size / 2**20:.1f} MiB", flush=True)


def lay_out(pieces: Path, out: str, limit: int) -> None:
    """Pieces into numbered folders, each into the first with room; the list of all pieces and the scripts into every one."""
    for old in Path(out).parent.glob(f"{Path(out).name}[0-9]*"):
        shutil.rmtree(old)
    paths = [path for pack in ORDER for path in sorted((pieces / pack).glob("*.zst"))]
    listing = "".join(f"{path.name} {path.stat().st_size}\n" for path in paths)
    used: list[int] = []
    for path in paths:
        size = path.stat().st_size
        number = next((n for n, full in enumerate(used, start=1) if full + size <= limit), len(used) + 1)
        folder = Path(f"{out}{number}")
        if number > len(used):
            used.append(0)
            folder.mkdir(parents=True)
            (folder / "pieces.txt").write_text(listing)
            for script in ("setup_packs.sh", "build_te.sh"):
                shutil.copy(ROOT / "tools" / "gpu" / script, folder)
        shutil.copy(path, folder)
        used[number - 1] += size
    for number, size in enumerate(used, start=1):
        packs = sorted({path.name.partition(".")[0] for path in Path(f"{out}{number}").glob("*.zst")})
        print(f"{out}{number}: {size / 2**20:.1f} MiB of {', '.join(packs)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="what the folders' names begin with, before their number")
    parser.add_argument(
        "--work", type=Path, required=True, help="a folder for wheels and what comes out of them; about 15 GB"
    )
    parser.add_argument("--present", type=Path)
    parser.add_argument("--only", nargs="+", choices=list(PACKS), default=list(PACKS))
    parser.add_argument("--limit-mib", type=float, default=59.0)
    parser.add_argument(
        "--level", type=int, default=9, help="of zstd: 9 takes a tenth of xz's time and leaves a tenth more"
    )
    args = parser.parse_args()
    present = set(args.present.read_text().split()) if args.present else set()
    wanted = {name: version for name, version in pins().items() if name not in present | LEFT_OUT.keys()}
    te_version = wanted.pop(TE_TORCH)
    for pack in args.only:
        print(f"== {pack}", flush=True)
        wheels, site = args.work / pack / "wheels", args.work / pack / "site"
        shutil.rmtree(site, ignore_errors=True)
        download({name: version for name, version in wanted.items() if pack_of(name) == pack}, wheels)
        unpack(wheels, site)
        if pack == pack_of(TE_TORCH):
            download_te_source(te_version, site / "transformer_engine_torch.tar.gz")
        compress(site, pack, args.work / "pieces" / pack, args.level)
    lay_out(args.work / "pieces", args.out, int(args.limit_mib * 2**20))


if __name__ == "__main__":
    main()
