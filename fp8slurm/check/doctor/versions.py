"""Version sets that go together, the one table of them: the checks here and docs/install.md read it."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata, util
from pathlib import Path
from typing import Literal

from fp8slurm.check.doctor.finding import Check, Finding
from fp8slurm.config import RunConfig

PYTHON, PACKAGES = Check("python"), Check("packages")

PYTHONS = ("3.11", "3.12", "3.13")


@dataclass(frozen=True)
class VersionSet:
    """Packages that belong together. A version is exact, or a lower bound written >=X."""

    name: str
    seen: Literal["run", "run in part"]
    note: str
    cuda: str
    """CUDA of the torch wheel, "" for the CPU build."""
    driver: int
    """Lowest major version of the NVIDIA driver for that CUDA (CUDA Toolkit release notes, table 3); 0: none."""
    packages: dict[str, str] = field(default_factory=dict)


_COMMON = {
    "torch": "2.13.0",
    "sglang": "0.5.21",
    "megatron-core": "0.19.2",
    "transformers": "5.12.1",
    "tokenizers": "0.22.2",
    "submitit": "1.5.4",
    "xgrammar": "0.2.7",
    "math-verify": "0.9.0",
}
"""The same with and without a GPU."""
NEW_CUDNN_SINCE_TE = "2.17"
CUDNN_FOR_TE = "9.22"
"""TransformerEngine 2.17.1's wheel for CUDA 13 is compiled against this cuDNN; with an older one the backward pass of
packed attention fails (CUDNN_ATTR_OPERATION_RESHAPE_MODE, CUDNN_STATUS_BAD_PARAM; seen on an H200 with 9.19). 2.16.1
trains there with 9.19, a system's 9.14 beside it."""

SETS = (
    VersionSet(
        "cpu", "run", "requirements/torch.txt and cpu.txt: the whole loop without a GPU, and every test", "", 0, _COMMON
    ),
    VersionSet(
        "gpu",
        "run in part",
        "requirements/gpu.txt: FlashAttention 3 in sglang-kernel; what ran stands in docs/gpu.md",
        "13.0",
        580,
        {
            **_COMMON,
            "transformer-engine": "2.20.2",
            "transformer-engine-cu13": "2.20.2",
            "transformer-engine-torch": "2.20.2",
            "nvidia-cublas": "13.8.2.12",
            "nvidia-cudnn-cu13": "9.24.1.1",
            "nvidia-nccl-cu13": "2.32.3",
            "sglang-kernel": "0.4.7",
            "sgl-deep-gemm": "0.2.0",
            "flashinfer-python": "0.6.18",
        },
    ),
)

OURS = "safetensors pydantic tyro rich requests numpy psutil pyarrow matplotlib tensorboard".split()
"""Other packages that pyproject.toml names: any version, but there."""


def parse(version: str) -> tuple[int, ...]:
    """The numbers of a version up to the first part that has none: 2.13.0+cpu -> (2, 13, 0)."""
    parts = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, parts[0].split("."))) if parts else ()


def agrees(installed: str, expected: str) -> bool:
    """Whether a version is the one wanted, a local label such as +cpu left out, or not below >=X."""
    if expected.startswith(">="):
        return parse(installed) >= parse(expected[2:])
    return installed.split("+")[0] == expected


def installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def torch_cuda() -> str | None:
    """CUDA of the installed torch ("" for the CPU build), None without torch; torch is not imported."""
    spec = util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = (Path(spec.origin).parent / "version.py").read_text()
    version = re.search(r"^cuda\b.*=\s*'([\d.]+)'", text, re.M)
    return version[1] if version else ""


def chosen_set() -> VersionSet | None:
    """The set that the installed torch belongs to, None if to none."""
    torch, cuda = installed("torch"), torch_cuda()
    if torch is None or cuda is None:
        return None
    same = [s for s in SETS if agrees(torch, s.packages["torch"]) and bool(s.cuda) == bool(cuda)]
    return same[0] if same else None


def check_versions(configs: list[RunConfig]) -> Iterator[Finding]:
    """Python, the packages of the set that the installed torch belongs to, cuDNN."""
    python = platform.python_version()
    if python.rpartition(".")[0] in PYTHONS:
        yield PYTHON.ok(f"Python {python}")
    else:
        yield PYTHON.error(f"Python {python}; supported: {', '.join(PYTHONS)}", "make setup PYTHON=python3.12")
    yield from _packages(any(c.fp8.backend == "transformer_engine" for c in configs))
    if torch_cuda():
        yield from check_cudnn()


def _packages(needs_te: bool) -> Iterator[Finding]:
    torch, chosen = installed("torch"), chosen_set()
    missing = [n for n in OURS if installed(n) is None]
    if torch is None:
        missing.insert(0, "torch")
    elif chosen is None:
        known = ", ".join(f"{s.packages['torch']} ({'CUDA ' + s.cuda if s.cuda else 'CPU'})" for s in SETS)
        kind = f"CUDA {torch_cuda()}" if torch_cuda() else "CPU"
        yield PACKAGES.warning(f"torch {torch} ({kind}) is in no known version set: {known}", "docs/install.md")
    expected = (chosen or SETS[0]).packages if torch else {}
    wrong = 0
    for name, version in expected.items():
        present = installed(name)
        if present is None:
            if needs_te or not name.startswith("transformer-engine"):
                missing.append(name)
        elif chosen and not agrees(present, version):
            wrong += 1
            how = version if version.startswith(">=") else f"=={version}"
            yield PACKAGES.error(
                f"{name} {present} is installed; the set {chosen.name} has {version}",
                f"pip install --no-deps '{name}{how}'",
            )
    for name in missing:
        version = expected.get(name, "")
        how = version if version.startswith(">=") or not version else f"=={version}"
        yield PACKAGES.error(f"{name} is not installed", f"pip install --no-deps '{name}{how}'; docs/install.md")
    te = installed("transformer-engine")
    if needs_te and te is None and "transformer-engine" not in expected:
        yield PACKAGES.error(
            "a recipe wants FP8 by TransformerEngine (--fp8.backend transformer_engine), which is not installed",
            "install it on the GPU nodes (docs/install.md), or --fp8.backend emulated (CPU) or off",
        )
    if chosen and not missing and not wrong:
        names = (n for n in ("torch", "megatron-core", "sglang", "transformer-engine") if installed(n))
        main = ", ".join(f"{n} {installed(n)}" for n in names)
        yield PACKAGES.ok(f"version set {chosen.name}, {chosen.seen}: {main}")


def check_cudnn() -> Iterator[Finding]:
    """cuDNN as TransformerEngine needs it, and no second one that the loader would find first."""
    version, engine = installed("nvidia-cudnn-cu13") or installed("nvidia-cudnn-cu12"), installed("transformer-engine")
    if version is None or engine is None:
        return
    new = parse(engine) >= parse(NEW_CUDNN_SINCE_TE)
    if new and parse(version) < parse(CUDNN_FOR_TE):
        yield PACKAGES.error(
            f"cuDNN {version} with TransformerEngine {engine}: the backward pass of packed"
            " attention fails (CUDNN_ATTR_OPERATION_RESHAPE_MODE, BAD_PARAM)",
            f"pip install --no-deps 'nvidia-cudnn-cu13>={CUDNN_FOR_TE}'",
        )
    others = [(p, v) for p, v in system_cudnn() if v[:2] != parse(version)[:2]]
    wheel = _wheel_cudnn()
    first = next(
        (p for p in os.environ.get("LD_LIBRARY_PATH", "").split(":") if p and list(Path(p).glob("libcudnn*.so.9*"))), ""
    )
    if others and (wheel is None or not first or Path(first).resolve() != wheel.resolve()):
        path, other = others[0]
        yield Finding(
            "packages",
            "error" if new else "warning",
            f"two versions of cuDNN: {version} from pip and {'.'.join(map(str, other))} in {path}: libraries of both in"
            f" one process {'end' if new else 'can end'} in CUDNN_STATUS_SUBLIBRARY_LOADING_FAILED",
            "put the first before it: export"
            f" LD_LIBRARY_PATH={wheel or 'SITE-PACKAGES/nvidia/cudnn/lib'}:$LD_LIBRARY_PATH (--slurm.setup takes such a"
            " line)",
        )
    elif parse(version) >= parse(CUDNN_FOR_TE):
        yield PACKAGES.ok(f"cuDNN {version}")


def _wheel_cudnn() -> Path | None:
    spec = util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or []) if spec else []:
        if (Path(root) / "cudnn" / "lib").is_dir():
            return Path(root) / "cudnn" / "lib"
    return None


def system_cudnn() -> list[tuple[str, tuple[int, ...]]]:
    """(folder, version) of every cuDNN 9 library that LD_LIBRARY_PATH or the loader's cache leads to, by its name."""
    files = [
        f
        for p in os.environ.get("LD_LIBRARY_PATH", "").split(":")
        if p
        for f in sorted(Path(p).glob("libcudnn*.so.9*"))
    ]
    ldconfig = shutil.which("ldconfig") or "/sbin/ldconfig"
    try:
        cache = subprocess.run([ldconfig, "-p"], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        cache = ""
    files += [Path(p) for p in re.findall(r"=> (\S*libcudnn\S*\.so\.9\S*)", cache)]
    libraries: dict[tuple[str, tuple[int, ...]], None] = {}
    for file in files:
        version = re.search(r"\.so\.(9(\.\d+)+)$", file.resolve().name)  # a wheel's files are plain .so.9
        if version:
            libraries[str(file.parent), parse(version[1])] = None
    return list(libraries)


def table() -> str:
    """SETS as a Markdown table, for docs/install.md."""
    names = list(dict.fromkeys(n for s in SETS for n in s.packages))
    rows = [["", *(s.name for s in SETS)], ["---"] * (len(SETS) + 1)]
    rows.append(["how far", *(s.seen for s in SETS)])
    rows.append(["what", *(s.note for s in SETS)])
    rows.append(["CUDA of torch, driver", *(f"{s.cuda}, {s.driver} or newer" if s.cuda else "none" for s in SETS)])
    rows += [[name, *(s.packages.get(name, "") for s in SETS)] for name in names]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
