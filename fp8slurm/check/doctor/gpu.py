"""GPUs, as nvidia-smi tells it; torch is not imported."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import util
from pathlib import Path

from fp8slurm.check.doctor.finding import Check, Finding
from fp8slurm.check.doctor.versions import SETS, chosen_set, installed
from fp8slurm.config import RunConfig
from fp8slurm.scheduler import job as slurm

GPU = Check("gpu")

FP8_ENGINE, FP8_TRAINER, NOT_TRIED = (8, 9), (9, 0), (10, 0)
"""Compute capabilities: FP8 in SGLang from Ada on; blockwise FP8 GEMMs in TransformerEngine from Hopper on
(transformer_engine/pytorch/quantization.py); Blackwell computes blockwise with other scales and was not tried."""
FA3 = "flash_ops.abi3.so"
TRITON_COST = "0.012 nats apart on average with a trained 0.6B on an H200, docs/gpu.md"
USED_BY_OTHERS = (500, 4000)
"""MiB in use before anything was started: a warning, an error."""

QUERY = "index,name,uuid,driver_version,compute_cap,memory.total,memory.used,ecc.errors.uncorrected.volatile.total"


@dataclass(frozen=True)
class Gpu:
    """One line of nvidia-smi; memory in MiB."""

    index: str
    name: str
    uuid: str
    driver: str
    capability: tuple[int, int]
    total: int
    used: int
    ecc_errors: int | None
    """Uncorrected since the last reset; None: the card has no ECC, or it is off."""


def nvidia_smi(*arguments: str) -> str | None:
    """What nvidia-smi says, None where it is missing or fails."""
    if not shutil.which("nvidia-smi"):
        return None
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout if done.returncode == 0 else None


def parse(text: str) -> list[Gpu]:
    """Lines of --query-gpu with QUERY, csv,noheader,nounits."""
    gpus = []
    for line in text.strip().splitlines():
        index, name, uuid, driver, capability, total, used, ecc = (v.strip() for v in line.split(","))
        major, _, minor = capability.partition(".")
        errors = int(ecc) if ecc.isdigit() else None
        gpus.append(Gpu(index, name, uuid, driver, (int(major), int(minor)), int(total), int(used), errors))
    return gpus


def visible() -> list[Gpu]:
    """The GPUs of this node that this process may use (Slurm's, or CUDA_VISIBLE_DEVICES')."""
    text = nvidia_smi(f"--query-gpu={QUERY}", "--format=csv,noheader,nounits")
    gpus = parse(text) if text else []
    given = slurm.gpu_list()
    return [g for g in gpus if g.index in given or g.uuid in given] if given else gpus


def check_gpus(configs: list[RunConfig], tasks_here: bool = True) -> Iterator[Finding]:
    """tasks_here: the recipes' tasks would run on this machine; otherwise (a login node) no GPU is missed."""
    needed = max((c.slurm.gpus_per_node for c in configs), default=0)
    gpus = visible()
    if not gpus:
        if needed and tasks_here:
            yield GPU.error(
                f"no GPU is visible, and a recipe wants --slurm.gpus-per-node {needed}",
                "run this where the GPUs are (--slurm), ask for them in the allocation, or look at nvidia-smi there",
            )
        else:
            fix = "" if slurm.Job.here() else "fp8slurm doctor --slurm looks at the nodes"
            yield GPU.warning("no GPU is visible: the CPU recipes run here (FP8 emulated)", fix)
        return
    kinds = sorted({g.name for g in gpus})
    if len(gpus) < needed and tasks_here:
        yield GPU.error(
            f"{len(gpus)} GPUs are visible, a recipe wants --slurm.gpus-per-node {needed}",
            "ask for as many (--gres, --gpus-per-node), or lower --slurm.gpus-per-node and --slurm.ranks-per-node",
        )
    else:
        yield GPU.ok(f"{len(gpus)} x {', '.join(kinds)}, {gpus[0].total / 1024:.0f} GiB, driver {gpus[0].driver}")
    if len(kinds) > 1:
        yield GPU.warning(
            f"different GPUs on one node: {', '.join(kinds)}; the slowest sets the pace",
            "--slurm.constraint picks one kind",
        )
    yield from _driver(gpus)
    yield from _capability(gpus, configs)
    yield from _attention(gpus, configs)
    yield from _used(gpus, any(c.slurm.share_gpus for c in configs))
    yield from _ecc(gpus)
    if len(gpus) > 1:
        yield nvlink(nvidia_smi("nvlink", "--status") or "")


def _driver(gpus: list[Gpu]) -> Iterator[Finding]:
    chosen = chosen_set()
    driver = gpus[0].driver
    if chosen and chosen.driver and int(driver.partition(".")[0]) < chosen.driver:
        yield GPU.error(
            f"driver {driver}: CUDA {chosen.cuda} of the installed torch needs {chosen.driver} or newer",
            "ask the site for a newer driver or for CUDA's compatibility package, or install a torch for an older CUDA",
        )


def _capability(gpus: list[Gpu], configs: list[RunConfig]) -> Iterator[Finding]:
    lowest = min(g.capability for g in gpus)
    shown = f"compute capability {lowest[0]}.{lowest[1]}"
    wants = any(c.fp8.backend == "transformer_engine" for c in configs)
    if lowest < FP8_ENGINE:
        yield Finding(
            "gpu",
            "error" if wants else "warning",
            f"{shown}: no FP8 (8.9 and 9.0 have it); BF16 runs",
            "--fp8.backend off trains and serves in BF16",
        )
    elif lowest < FP8_TRAINER:
        yield Finding(
            "gpu",
            "error" if wants else "warning",
            f"{shown}: the engine serves FP8, the trainer's blockwise recipe needs 9.0 (Hopper)",
            "--fp8.backend off --fp8.engine fp8 trains in BF16 and serves FP8",
        )
    elif lowest >= NOT_TRIED:
        yield GPU.warning(
            f"{shown}: not tried; block FP8 is computed otherwise from Blackwell on",
            "compare the gap in metrics.jsonl with a BF16 run",
        )
    else:
        yield GPU.ok(f"{shown}: FP8 in trainer and engine")


def attention_backends(config: RunConfig, capability: tuple[int, int]) -> set[str]:
    """Attention of the recipe's engines, by SGLang's names: what engine.extra_args asks for, else its own choice.

    SGLang 0.5.16 to 0.5.23 (arg_groups/model_override_base.py): fa3 on Hopper, elsewhere flashinfer, or triton without
    it; fa3 gives way to triton for a cache in fp8_e5m2."""
    words = [word for text in config.engine.extra_args for word in text.split("=", 1)]
    asked = {flag: value for flag, value in zip(words, words[1:]) if flag.startswith("--")}
    default = "fa3" if capability[0] == 9 else "flashinfer"
    both = asked.get("--attention-backend", default)
    used = {asked.get(f"--{half}-attention-backend", both) for half in ("prefill", "decode")}
    if asked.get("--kv-cache-dtype") == "fp8_e5m2":
        used = {"triton" if name == "fa3" else name for name in used}
    return used


def _attention(gpus: list[Gpu], configs: list[RunConfig]) -> Iterator[Finding]:
    lowest = min(g.capability for g in gpus)
    recipes = [c for c in configs if c.slurm.gpus_per_node]
    used = set().union(*(attention_backends(c, lowest) for c in recipes))
    if "triton" in used:
        yield GPU.warning(
            "attention of the engines will be Triton's: what an engine says of a token while it generates is not"
            f" what it says at prefill ({TRITON_COST}), and all of that is gap between trainer and engine",
            "leave --attention-backend out of engine.extra_args: on Hopper SGLang takes FlashAttention 3 (fa3),"
            " whose log-probabilities are the same bits in both",
        )
    if "fa3" in used and installed("sglang-kernel") and not fa3_library():
        yield GPU.error(
            f"sglang-kernel {installed('sglang-kernel')} has no FlashAttention 3 (sgl_kernel/{FA3} is missing), which"
            " SGLang takes on Hopper: engines would not start",
            f"pip install --no-deps --force-reinstall 'sglang-kernel=={SETS[1].packages['sglang-kernel']}'",
        )
    elif recipes and "triton" not in used:
        yield GPU.ok(f"attention of the engines: {', '.join(sorted(used))}")


def fa3_library() -> bool:
    """Whether the installed sglang-kernel has FlashAttention 3's library; it is not imported."""
    spec = util.find_spec("sgl_kernel")
    return bool(spec and spec.origin and (Path(spec.origin).parent / FA3).is_file())


def _used(gpus: list[Gpu], allowed: bool) -> Iterator[Finding]:
    busy = [g for g in gpus if g.used > USED_BY_OTHERS[0]]
    if not busy:
        yield GPU.ok(f"GPU memory is free ({max(g.used for g in gpus)} MiB in use)")
        return
    shown = ", ".join(f"GPU {g.index}: {g.used} of {g.total} MiB" for g in busy)
    finding = GPU.error if any(g.used > USED_BY_OTHERS[1] for g in busy) and not allowed else GPU.warning
    yield finding(
        f"memory in use by others: {shown}",
        "nvidia-smi shows by whom; end what is left of your own jobs, ask for whole nodes (--slurm.sbatch exclusive "
        "true), or start beside them (--slurm.share-gpus)",
    )


def _ecc(gpus: list[Gpu]) -> Iterator[Finding]:
    bad = [g for g in gpus if g.ecc_errors]
    for g in bad:
        yield GPU.error(
            f"GPU {g.index}: {g.ecc_errors} uncorrected memory errors since it was reset",
            "leave the node out (--slurm.exclude) and tell the site",
        )
    if not bad and all(g.ecc_errors is None for g in gpus):
        yield GPU.warning("ECC is off, or the cards have none: flipped bits go unnoticed", "ask the site to turn it on")
    elif not bad:
        yield GPU.ok("no uncorrected memory errors")


def nvlink(text: str) -> Finding:
    """`nvidia-smi nvlink --status` in one line."""
    speeds = [float(s) for s in re.findall(r"Link \d+: ([\d.]+) GB/s", text)]
    gpus = len(re.findall(r"^GPU \d+", text, re.M)) or 1
    if not speeds:
        return GPU.warning(
            "no NVLink between the GPUs: tensor parallelism goes over PCIe",
            "--parallel.tensor-parallel-size 1 with pipeline or data parallelism instead",
        )
    return GPU.ok(f"NVLink: {len(speeds) // gpus} links a GPU, {sum(speeds) / gpus:.0f} GB/s each way")
