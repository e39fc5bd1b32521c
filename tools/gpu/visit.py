#!/usr/bin/env python3
"""What docs/gpu.md reports, made on a machine with GPUs: many runs at once, each on its share of the GPUs.

usage: visit.py WORK OUT [--seconds 550] [--archive OUT.tar.gz] [--rehearse] PART...

    tests        pytest -m gpu, by rooms
    faults       of these what is about ranks and engines that stop inside NCCL
    models       large models, made for a later call
    nccl         weight updates over NCCL between two GPUs
    memory       what a rank keeps when it makes room, and where its gaps are
    measures     quantizer and weight updates, over CUDA IPC and NCCL
    tiny         the tiny recipe, three precisions x three seeds
    small        the same with Qwen3-0.6B's shape; small-0, small-1, small-2: one seed of it
    small-probe  its learning rates
    variants     the tiny recipe with FP8 primary weights, BF16 moments, a sleeping optimizer
    experts      tiny-moe-fp8 in BF16 with several settings and seeds
    4b, 4b-bf16  RL steps of Qwen3-4B's shape on all GPUs together, engines and trainer taking turns
    4b-sleep     the same, the optimizer's state in host memory meanwhile
    4b-split     the same with half of the GPUs serving, weights by NCCL
    4b-whole     the same to its end, its checkpoint and what an engine loads made of it
    exact, exact-cool      20 RL steps of the tiny recipe with model.exact, at temperature 1 and 0.7
    exact-0.6b, exact-4b   RL steps of these shapes
    exact-cost   the 4B's engine with model.exact and without, in turns with other parts that measure; then training steps
    unsteady-search        tiny runs without importance weights at higher learning rates, eight updates a step: where does a gap do harm?
    unsteady               there: exact, FP8 and BF16 trainers with an FP8 engine, three seeds each
    trace                  `fp8slurm trace` of the part exact's run
    0.6b         RL steps of Qwen3-0.6B's shape on one GPU in FP8, on the next in BF16: is the plan right for another model?
    4b-one, 4b-one-bf16   RL steps of the 4B on one GPU, samples of 256 tokens, three records
    4b-one-always   4b-one with the separate log-probability pass: its seconds, and (ratio/kl) how far it is from the step's own
    0.6b-always  the same of the 0.6B's shape, beside other runs: only how far apart the two are
    model-4b     the 4B's folders, made beside other jobs
    rollout      tokens/s of the 4B at batch 1, 32, 256: FP8 and BF16 with FlashAttention 3, FP8 with Triton's attention, in turns
    update       weight updates of the 4B over CUDA IPC, ours and the way of others, in turns
    moe-train    training steps of five layers of 30B-A3B in BF16, with cuBLAS's and CUTLASS's grouped products, and in FP8
    moe-grouped  these experts with one launch a product: are they right, how long does each launch take, and the same training steps, profiled
    kv           an FP8 KV cache of the 4B's engine against BF16: scales that take effect, sequences held, tokens/s, gap by position
    host-adam    FP8 primary weights with Adam in host memory: bytes, seconds and memory against the other two ways
    delta        updates of changes only: shares that change, seconds to encode, into an engine
    seeds        whether requests with a sampling_seed draw the same tokens again, and if not, why
    grouped      the test of a BF16 mixture's grouped products
    doctor       fp8slurm doctor
    30b          RL steps of some of Qwen3-30B-A3B's layers on all GPUs together
    eight        the recipes for 4B and 30B-A3B on eight GPUs, with faults, in parts; what is left is done by the next call
    nodes        two Slurm nodes of a GPU each, NCCL over sockets; the parts of both are in eight.py

Models and recipes are made in WORK. OUT gets every run's records, errors and the ends of its logs, what each job said, and
results.json; with --archive a file has all of OUT whenever a job has ended, for machines from which few files come back, and
only what was there when they were taken away. A job that does not fit at the moment waits for those before it.

Seconds that parts took on one H200 with 16 cores, nothing compiled before (2026-11-30): tiny 285, rollout 150, seeds 160 (beside small-0), moe-train
more than 105, 4b-one more than 160, small-0 more than 175 beside seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools" / "gpu")]

from eight import MULTICAST_OFF  # noqa: E402
from recipes import PRECISIONS, write_model, write_recipe  # noqa: E402
from turns import arrive  # noqa: E402

MEMORY_EVERY_S = 0.5
END_S = 25
"""Before the deadline: what still runs is ended then."""


@dataclass
class Job:
    """One command, on `gpus` GPUs of which it takes `share` each (0: all of them that there are)."""

    name: str
    command: list[str]
    gpus: int = 1
    share: float = 1.0
    run: Path | None = None
    until: int | None = None
    """RL step at which it has shown what it is for, and is ended."""
    limit_s: float = 420.0
    """It hangs, and is ended: those behind it want the GPUs."""
    turn: Path | None = None
    """Of jobs with the same: they start together and measure one after the other (turns.py)."""
    on: tuple[int, ...] = ()
    process: subprocess.Popen | None = None
    began: float = 0.0
    seconds: float = 0.0
    status: int | None = None


@dataclass
class Visit:
    """Where things are."""

    work: Path
    out: Path
    gpus: int
    jobs: list[Job] = field(default_factory=list)
    seconds: float = 500.0
    """That the parts of eight.py may take together."""
    rehearse: bool = False
    """Those with tiny models, on the CPU."""
    archive: Path | None = None

    def tiny(self, moe: bool = False) -> Path:
        folder = self.work / ("tiny-moe" if moe else "tiny")
        if not folder.exists():
            make = [
                sys.executable,
                str(ROOT / "tools/make_tiny.py"),
                "--out",
                str(folder),
                "--data",
                str(self.work / "data"),
            ]
            subprocess.run([*make, *(["--moe"] if moe else [])], check=True, stdout=subprocess.DEVNULL)
        return folder

    def fp8(self, model: Path) -> Path:
        """A model in block FP8 beside it."""
        from fp8slurm.checkpoint import hf_to_fp8

        target = model.with_name(f"{model.name}-FP8")
        if not target.exists():
            hf_to_fp8(model, target, verify=False)
        return target

    def train(self, name: str, base: str, graphs: list[int], hf: Path, gpus: int = 1, share: float = 1.0,
              until: int | None = None, **sections: dict[str, Any]) -> None:  # fmt: skip
        """A run NAME of recipe `base`, changed by `sections`."""
        data = self.work / "data"
        own: dict[str, dict[str, Any]] = {
            "run": {"name": name, "root": self.work / "runs"},
            "model": {"hf_checkpoint": hf},
            "data": {"train": data / "train.jsonl", "eval": data / "eval.jsonl"},
            "observe": {"plot": False, "tensorboard": False},
        }
        merged = {key: own.get(key, {}) | sections.get(key, {}) for key in (*own, *sections)}
        recipe = write_recipe(self.work / "recipes" / f"{name}.toml", base, graphs, **merged)
        command = [sys.executable, "-m", "fp8slurm.cli", "train", "--recipe", str(recipe)]
        self.jobs.append(Job(name, command, gpus or self.gpus, share, self.work / "runs" / name, until))

    def test(self, name: str, gpus: int, share: float, *arguments: str) -> None:
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-o", "addopts=--import-mode=importlib", *arguments]
        self.jobs.append(Job(name, command, gpus or self.gpus, share))

    def script(
        self, name: str, gpus: int, share: float, *command: str, limit_s: float = 120, turn: Path | None = None
    ) -> None:
        self.jobs.append(Job(name, [sys.executable, *command], gpus or self.gpus, share, limit_s=limit_s, turn=turn))


def faults(v: Visit) -> None:
    v.test("test-stops", min(2, v.gpus), 0.05, "tests/e2e/test_gpus.py", "-k", "stops")
    for when in ("update", "evaluate"):
        v.test(f"test-dies-{when}", 0, 0.05, "tests/e2e/test_gpus.py", "-k", f"dies and {when}")


def tests(v: Visit) -> None:
    faults(v)
    v.test("test-experts", min(2, v.gpus), 0.05, "tests/e2e/test_gpus.py", "-k", "experts")
    v.test("test-nccl", 0, 0.05, "tests/e2e/test_gpus.py", "-k", "nccl_from")
    v.test(
        "test-units",
        1,
        0.05,
        "tests/fp8",
        "tests/trainer/test_gpu.py",
        "tests/trainer/test_grouped_gpu.py",
        "tests/core/test_gpu_memory.py",
    )
    v.test("test-sync", min(2, v.gpus), 0.05, "tests/sync/test_gpu.py")


def measures(v: Visit) -> None:
    """Weight updates of the 4B, and of three layers of the 30B-A3B, and what they are made of; one after the other."""
    model = write_model(v.work / "Qwen3-4B", "Qwen3-4B", v.tiny())
    probe = ["tools/gpu/sync_probe.py", "--folder", str(v.work), "--logs", str(v.out / "logs")]
    large = ["--model", "Qwen3-4B", "--checkpoint", str(v.fp8(model)), "--updates", "7"]
    v.script("ipc-4b", 1, 1.0, *probe, *large, "--ways", "cuda-ipc", "--json", str(v.out / "ipc-4b.json"))
    v.script("ipc-30b", 1, 1.0, *probe, "--model", "Qwen3-30B-A3B", "--layers", "3", "--ways", "cuda-ipc",
             "--json", str(v.out / "ipc-30b.json"))  # fmt: skip
    nccl(v)
    v.script("quantize-4b", 1, 1.0, "tools/bench/bench_quantize.py", "--json", str(v.out / "quantize-4b.json"))
    v.script("quantize-30b", 1, 1.0, "tools/bench/bench_quantize.py", "--model", "Qwen3-30B-A3B", "--layers", "5",
             "--json", str(v.out / "quantize-30b.json"))  # fmt: skip


def nccl(v: Visit) -> None:
    """The probe over NCCL between two GPUs: the tiny model, then the 4B."""
    model = write_model(v.work / "Qwen3-4B", "Qwen3-4B", v.tiny())
    for name, large in (
        ("tiny", ["--bucket-mib", "0.5"]),
        ("4b", ["--model", "Qwen3-4B", "--checkpoint", str(v.fp8(model)), "--updates", "7"]),
    ):
        command = ["env", "NCCL_DEBUG=INFO", sys.executable, "tools/gpu/sync_probe.py", "--folder", str(v.work), "--ways", "nccl", "--limit-s", "160",
                   "--logs", str(v.out / f"logs-{name}"), "--json", str(v.out / f"nccl-{name}.json")]  # fmt: skip
        v.jobs.append(
            Job(f"nccl-{name}", [*command, *large], min(2, v.gpus), 0.1 if name == "tiny" else 0.4, limit_s=190)
        )


def models(v: Visit) -> None:
    """The large models, made beside other runs for the visit's next call."""
    lines = ["import sys; sys.path.insert(0, 'tools/gpu')", "from pathlib import Path", "from visit import Visit, write_model",
             f"v = Visit(Path({str(v.work)!r}), Path({str(v.out)!r}), {v.gpus})", "v.fp8(write_model(v.work / 'Qwen3-4B', 'Qwen3-4B', v.tiny()))",
             "v.fp8(write_model(v.work / 'Qwen3-30B-A3B-8', 'Qwen3-30B-A3B', v.tiny(), 8))"]  # fmt: skip
    v.jobs.append(Job("models", [sys.executable, "-c", "\n".join(lines)], 1, 0.12))


def memory(v: Visit) -> None:
    """What a rank keeps, step by step, and where its gaps are."""
    model = write_model(v.work / "Qwen3-4B-12", "Qwen3-4B", v.tiny(), 12)
    n = min(2, v.gpus)
    for name, more in (("expandable", []), ("cudaMalloc", ["--no-expandable"]), ("bf16", ["--backend", "off"])):
        command = ["tools/gpu/memory_probe.py", str(model), "--tensor-parallel-size", str(n), "--tokens", "20480"]
        v.script(f"memory-{name}", n, 1.0, *command, *more)


TINY = {"engine": {"max_total_tokens": 32768, "mem_fraction": 0.5}, "checkpoint": {"every": 60}, "eval": {"every": 20}}


def tiny(v: Visit) -> None:
    model, data = v.tiny(), v.work / "data"
    for seed in range(3):
        for name, fp8 in PRECISIONS.items():
            v.train(f"tiny-{name}-{seed}", "tiny-fp8", [64, 256, 512], model, share=0.06, fp8=fp8, run={"seed": seed},
                    sft={"data": data / "sft.jsonl"}, **{k: s for k, s in TINY.items()})  # fmt: skip


def small_settings(v: Visit, seed: int, precision: str, **more: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Qwen3-0.6B's shape from random weights: a supervised phase on the task, then RL."""
    settings: dict[str, dict[str, Any]] = {
        "fp8": PRECISIONS[precision],
        "run": {"seed": seed, "steps": 60},
        "sft": {"data": v.work / "data" / "sft.jsonl", "max_steps": 400, "lr": 3e-4, "warmup_steps": 30, "eval_every": 4, "eval_from": 44},
        "optim": {"lr": 2e-5},
        "train": {"tokens_per_micro_batch": 4096},
        "engine": {"max_total_tokens": 32768, "mem_fraction": 0.5, "context_length": 128},
        "checkpoint": {"every": 60},
        "eval": {"every": 20},
        "sync": {"bucket_bytes": 128 * 2**20},
    }  # fmt: skip
    return {key: settings.get(key, {}) | more.get(key, {}) for key in (*settings, *more)}


SMALL_BYTES = 18e9
"""GPU memory of a run of the 0.6B's shape, with room: four ran at once on 80 GB."""


def small(v: Visit, seeds: tuple[int, ...] = (0, 1, 2)) -> None:
    import torch

    model = write_model(v.work / "Qwen3-0.6B", "Qwen3-0.6B", v.tiny())
    memory = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 80e9
    for seed in seeds:
        for name in PRECISIONS:
            # a checkpoint of its optimizer has 8 GB: none at the end
            settings = small_settings(v, seed, name, run={"steps": 41})
            v.train(
                f"small-{name}-{seed}",
                "tiny-fp8",
                [64, 256, 512],
                model,
                share=min(1.0, SMALL_BYTES / memory),
                until=40,
                **settings,
            )


def small_probe(v: Visit) -> None:
    """Which learning rates the small model takes."""
    model = write_model(v.work / "Qwen3-0.6B", "Qwen3-0.6B", v.tiny())
    for sft, rl in ((3e-4, 2e-5), (1e-4, 1e-5), (6e-4, 5e-5)):
        settings = small_settings(v, 0, "bf16-bf16", sft={"lr": sft}, optim={"lr": rl})
        v.train(f"probe-{sft:g}-{rl:g}", "tiny-fp8", [64, 256, 512], model, share=0.35, **settings)


def variants(v: Visit) -> None:
    model, sft = v.tiny(), {"data": v.work / "data" / "sft.jsonl"}
    changes: dict[str, dict[str, dict[str, Any]]] = {
        "param-gather": {"fp8": {"param_gather": True}},
        "bf16-moments": {"optim": {"moments": "bfloat16"}},
        "optimizer-sleep": {"optim": {"sleep": True}},
    }
    for name, sections in changes.items():
        sections = {**{k: s for k, s in TINY.items()}, **sections}
        v.train(f"tiny-{name}", "tiny-fp8", [64, 256, 512], model, share=0.06, sft=sft, **sections)


def experts(v: Visit) -> None:
    model, sft = v.tiny(moe=True), {"data": v.work / "data" / "sft.jsonl"}
    larger = {"rollout": {"n_samples": 16}}
    changes: dict[str, dict[str, dict[str, Any]]] = {
        "recipe": {},
        "16": larger,
        "128x16": {"rollout": {"n_samples": 16, "prompts_per_step": 128}, "train": {"updates_per_step": 4}},
        "16-entropy": {"rollout": {"n_samples": 16, "max_replacements": 1}, "algorithm": {"entropy_coef": 0.02}},
        "16-4up": {**larger, "train": {"updates_per_step": 4}},
        "128": {"rollout": {"prompts_per_step": 128}},
    }
    for name, sections in changes.items():
        for seed in range(4):
            own = {
                "parallel": {"expert_parallel_size": 1},
                "fp8": PRECISIONS["bf16-bf16"],
                **{k: s for k, s in TINY.items()},
                **sections,
            }
            own["rollout"] = {"routing_replay": False, **own.get("rollout", {})}
            own |= {
                "run": {"steps": 100, "seed": seed},
                "eval": {"every": 10},
                "checkpoint": {"every": 200},
                "engine": TINY["engine"],
            }
            v.train(f"moe-{name}-{seed}", "tiny-moe-fp8", [64, 256, 512], model, share=0.03, sft=sft, **own)


def four_b(v: Visit, precision: str = "fp8-fp8", split: bool = False, name: str = "4b", share: float = 1.0, shape: str = "Qwen3-4B",
           gpus: int = 0, until: int = 3, **more: dict[str, Any]) -> None:  # fmt: skip
    """Random weights, a coin for a reward, every sample as long as it may be: for time, memory and bytes, not for learning.

    gpus: how many it takes, 0 for all of them; until: its last record."""
    model = write_model(v.work / shape, shape, v.tiny())
    total = gpus or v.gpus
    n = total // 2 if split else total
    settings: dict[str, dict[str, Any]] = {
        "run": {"steps": 4},
        "fp8": PRECISIONS[precision],
        "model": {"rollout_checkpoint": v.fp8(model) if "fp8" in precision else None},
        "data": {"train": v.work / "data" / "train.jsonl", "eval": None, "max_prompt_tokens": 64},
        "rollout": {"max_tokens": 512, "truncated": "keep", "max_replacements": 0, "drop_no_signal": False},
        "reward": {"kind": "coin:even"},
        "optim": {"warmup_steps": 0},
        "checkpoint": {"every": 100},
        "engine": {"per_node": n, "context_length": 2048, "mem_fraction": 0.85, "max_running_requests": 64},
        "slurm": {"gpus_per_node": total, "ranks_per_node": n},
        "parallel": {"tensor_parallel_size": min(2, n), "sequence_parallel": n > 1},
        "sync": {"verify": "first"},
    }
    if split:
        settings["engine"] |= {
            "placement": "split",
            "gpus": total - n,
            "max_running_requests": 128,
            "mem_fraction": 0.6,
        }
        if n == 1:  # 16 bytes a parameter do not fit beside gradients
            settings["optim"]["moments"] = "bfloat16"
    settings = {key: settings.get(key, {}) | more.get(key, {}) for key in (*settings, *more)}
    graphs = [128 if split else 64]  # all samples are equally long: no other batch is seen
    v.train(
        name, "qwen3-4b-fp8", graphs, model, gpus, share=share, until=None if name == "4b-whole" else until, **settings
    )
    if name == "4b-whole":  # its checkpoint, of 56 GB, to what an engine loads; beside the next run
        checkpoint = v.work / "runs" / name / "checkpoints" / "step_000004"
        convert = f"{sys.executable} -m fp8slurm.cli convert torch-dist-to-fp8 --origin-hf-dir {model} {checkpoint} {v.work}/exported"
        wait = f"while [ ! -e {checkpoint}/COMPLETE ]; do sleep 1; done; time {convert}"
        v.jobs.append(Job("4b-export", ["bash", "-c", wait], 1, 0.0))


def four_b_one(v: Visit, precision: str, name: str, **more: dict[str, Any]) -> None:
    four_b(v, precision, name=name, gpus=1, until=2, rollout={"max_tokens": 256}, run={"steps": 3}, **more)


def model_4b(v: Visit) -> None:
    lines = ["import sys; sys.path.insert(0, 'tools/gpu')", "from pathlib import Path", "from visit import Visit, write_model",
             f"v = Visit(Path({str(v.work)!r}), Path({str(v.out)!r}), {v.gpus})", "v.fp8(write_model(v.work / 'Qwen3-4B', 'Qwen3-4B', v.tiny()))"]  # fmt: skip
    v.jobs.append(Job("model-4b", [sys.executable, "-c", "\n".join(lines)], 1, 0.0))


def rollout(v: Visit) -> None:
    model = write_model(v.work / "Qwen3-4B", "Qwen3-4B", v.tiny())
    v.fp8(model)
    v.script("rollout", 1, 0.6, "tools/bench/bench_rollout.py", str(v.out), "--hf", str(model), "--rounds", "2", "--engines", "fp8-fa3",
             "fp8-triton", "bf16-fa3", "--json", str(v.out / "rollout.json"), limit_s=330, turn=v.out / "turns")  # fmt: skip


def update(v: Visit) -> None:
    v.script(
        "update",
        1,
        0.4,
        "tools/gpu/update_peer.py",
        "--json",
        str(v.out / "update.json"),
        limit_s=330,
        turn=v.out / "turns",
    )


def moe_train(v: Visit) -> None:
    for backend in ("off", "fp8"):
        v.script(f"moe-train-{backend}", 1, 1.0, "tools/bench/bench_train.py", "--model", "Qwen3-30B-A3B", "--layers", "5", "--backend", backend,
                 "--json", str(v.out / f"moe-train-{backend}.json"), limit_s=150)  # fmt: skip


def moe_grouped(v: Visit) -> None:
    v.script("moe-grouped-probe", 1, 1.0, "tools/gpu/grouped_probe.py", str(v.out / "moe-grouped-probe.json"), "compile", "bytes", "layer", "kernels", "ways",
             limit_s=150)  # fmt: skip
    for backend in ("deep_gemm", "fp8", "off"):
        name = f"moe-grouped-{backend}"
        v.script(name, 1, 1.0, "tools/bench/bench_train.py", "--model", "Qwen3-30B-A3B", "--layers", "5", "--backend", backend, "--rounds", "3",
                 "--json", str(v.out / f"{name}.json"), "--profile", str(v.out / f"{name}-profile.json"), limit_s=120)  # fmt: skip


def kv(v: Visit) -> None:
    fp8 = v.fp8(write_model(v.work / "Qwen3-4B", "Qwen3-4B", v.tiny()))
    v.script("kv", 1, 0.8, "tools/gpu/kv_probe.py", str(v.work), str(v.out / "kv.json"), "--fp8", str(fp8), limit_s=240)


def host_adam(v: Visit) -> None:
    v.script("host-adam", 1, 1.0, "tools/gpu/host_adam_probe.py", "--limit", "150", "--timeout", "70", "--json", str(v.out / "host-adam.jsonl"),
             limit_s=230)  # fmt: skip


def delta(v: Visit) -> None:
    v.script("delta", 1, 0.4, "tools/gpu/delta_probe.py", str(v.work / "delta"), str(v.out / "delta"), limit_s=240)


def seeds(v: Visit) -> None:
    v.script("seeds", 1, 0.1, "tools/gpu/seed_probe.py", str(v.fp8(v.tiny())), "--json", str(v.out / "seeds.json"), "--trace", str(v.out / "seeds"),
             limit_s=240)  # fmt: skip


def grouped(v: Visit) -> None:
    v.test("test-grouped", 1, 0.02, "tests/trainer/test_gpu.py", "-k", "cutlass")


def doctor(v: Visit) -> None:
    v.script("doctor", 0, 0.0, "-m", "fp8slurm.cli", "doctor", limit_s=90)


def exact_tiny(v: Visit, name: str, temperature: float) -> None:
    """It ends by itself at the first token that differs."""
    settings: dict[str, dict[str, Any]] = {
        **TINY, "model": {"exact": True}, "run": {"steps": 20}, "rollout": {"temperature": temperature},
        "engine": TINY["engine"] | {"mem_fraction": 0.85}, "sft": {"data": v.work / "data" / "sft.jsonl"},
    }  # fmt: skip
    v.train(name, "tiny-fp8", [64, 256, 512], v.tiny(), share=0.05, **settings)


def exact_steps(v: Visit, shape: str, share: float) -> None:
    engine = {"mem_fraction": 0.85, "max_total_tokens": 65536}  # of what others on the GPU leave
    four_b(v, name=f"exact-{shape}", shape=shape, gpus=1, share=share, model={"exact": True}, engine=engine)


UNSTEADY_LR = 5e-4


def unsteady_run(v: Visit, kind: str, lr: float, seed: int) -> None:
    """Where a gap can do harm: no importance weights for it, many updates a step, steps that are too long."""
    settings: dict[str, dict[str, Any]] = {
        "run": {"steps": 60, "seed": seed}, "train": {"updates_per_step": 8}, "optim": {"lr": lr}, "algorithm": {"tis_cap": 0.0},
        "engine": TINY["engine"] | {"mem_fraction": 0.85}, "checkpoint": {"every": 100}, "eval": {"every": 5},
        "fp8": PRECISIONS["bf16-fp8" if kind == "bf16-fp8" else "fp8-fp8"], "model": {"exact": kind == "exact"},
        "sft": {"data": v.work / "data" / "sft.jsonl"},
    }  # fmt: skip
    v.train(f"unsteady-{kind}-{lr:g}-{seed}", "tiny-fp8", [64, 256, 512], v.tiny(), share=0.03, **settings)


def unsteady_search(v: Visit) -> None:
    for lr in (1e-3, 3e-3):
        for kind in ("fp8-fp8", "bf16-fp8"):
            unsteady_run(v, kind, lr, 0)


def unsteady(v: Visit) -> None:
    for seed in range(3):
        for kind in ("exact", "fp8-fp8", "bf16-fp8"):
            unsteady_run(v, kind, UNSTEADY_LR, seed)


def trace(v: Visit) -> None:
    run = v.work / "runs" / "exact-tiny"
    cli = f"{sys.executable} -m fp8slurm.cli"
    wait = (f"until grep -q '\"phase\": *\"rl\"' {run}/metrics.jsonl; do sleep 1; done; {cli} trace {run}; "
            f"until ls {run}/attempts/*/trace/*/rank_0*.json.gz; do sleep 1; done; sleep 10; ls -l {run}/attempts/*/trace/*; "
            f"cp {run}/attempts/*/trace/*/* {v.out}")  # fmt: skip
    v.jobs.append(Job("trace", ["bash", "-c", wait], 1, 0.0))


def exact_cost(v: Visit) -> None:
    probe = ["tools/gpu/exact_probe.py", str(v.work)]
    v.script("exact-engine", 1, 0.55, *probe, str(v.out / "exact-engine.json"), "--shape", "Qwen3-4B", "engine", limit_s=300,
             turn=v.out / "turns")  # fmt: skip
    v.script("exact-step", 1, 1.0, *probe, str(v.out / "exact-step.json"), "--shape", "Qwen3-4B", "step", limit_s=150)


def plan_check(v: Visit) -> None:
    """A model of which no constant of the plan was made."""
    for precision in ("fp8-fp8", "bf16-bf16"):
        four_b(v, precision, name=f"0.6b-{precision}", shape="Qwen3-0.6B", gpus=1)


def thirty_b(v: Visit, layers: int = 8) -> None:
    model = write_model(v.work / f"Qwen3-30B-A3B-{layers}", "Qwen3-30B-A3B", v.tiny(), layers)
    v.train(
        "30b", "qwen3-30b-a3b-fp8", [64], model, 0, until=2, model={"rollout_checkpoint": v.fp8(model)},
        run={"steps": 3}, data={"train": v.work / "data" / "train.jsonl", "eval": None, "max_prompt_tokens": 64},
        rollout={"prompts_per_step": 16, "max_tokens": 512, "truncated": "keep", "max_replacements": 0, "drop_no_signal": False, "routing_replay": True},
        reward={"kind": "coin:even"}, optim={"warmup_steps": 0}, checkpoint={"every": 100},
        engine={"tensor_parallel_size": v.gpus, "expert_parallel_size": v.gpus, "context_length": 1024, "max_running_requests": 64},
        slurm={"gpus_per_node": v.gpus, "ranks_per_node": v.gpus},
        parallel={"tensor_parallel_size": v.gpus, "expert_parallel_size": v.gpus}, sync={"verify": "first"},
    )  # fmt: skip
    v.jobs[-1].limit_s = 540  # its kernels for experts are compiled when they are first needed


def recipes_in_parts(v: Visit, which: str) -> None:
    """eight.py does its parts one after the other: they start labs and runs of their own."""
    more = ["--rehearse"] if v.rehearse else []
    v.script(which, 0, 1.0, "tools/gpu/eight.py", which, str(v.work), str(v.out), "--seconds", f"{v.seconds:.0f}", *more,
             limit_s=v.seconds + END_S)  # fmt: skip


PARTS: dict[str, Callable[[Visit], None]] = {
    "eight": lambda v: recipes_in_parts(v, "eight"), "nodes": lambda v: recipes_in_parts(v, "nodes"),
    "tests": tests, "faults": faults, "models": models, "nccl": nccl, "memory": memory, "measures": measures, "tiny": tiny, "small": small, "small-probe": small_probe, "variants": variants, "experts": experts,
    "4b": four_b, "4b-bf16": lambda v: four_b(v, "bf16-bf16", name="4b-bf16"),
    "4b-sleep": lambda v: four_b(v, name="4b-sleep", optim={"sleep": True}),
    "4b-split": lambda v: four_b(v, split=True, name="4b-split", train={"tokens_per_micro_batch": 8192}), "4b-whole": lambda v: four_b(v, name="4b-whole"), "30b": thirty_b,
    "0.6b": plan_check, "exact": lambda v: exact_tiny(v, "exact-tiny", 1.0), "exact-cool": lambda v: exact_tiny(v, "exact-tiny-cool", 0.7),
    "exact-0.6b": lambda v: exact_steps(v, "Qwen3-0.6B", 0.3), "exact-4b": lambda v: exact_steps(v, "Qwen3-4B", 0.9),
    "small-0": lambda v: small(v, (0,)), "small-1": lambda v: small(v, (1,)), "small-2": lambda v: small(v, (2,)),
    "0.6b-always": lambda v: four_b(v, name="0.6b-always", shape="Qwen3-0.6B", gpus=1, share=0.3, train={"recompute_logprobs": "always"},
                                    engine={"max_total_tokens": 65536}, rollout={"max_tokens": 256}),
    "exact-cost": exact_cost, "unsteady-search": unsteady_search, "unsteady": unsteady, "trace": trace,
    "4b-one": lambda v: four_b_one(v, "fp8-fp8", "4b-one"), "4b-one-bf16": lambda v: four_b_one(v, "bf16-bf16", "4b-one-bf16"),
    "4b-one-always": lambda v: four_b_one(v, "fp8-fp8", "4b-one-always", train={"recompute_logprobs": "always"}),
    "model-4b": model_4b, "rollout": rollout, "update": update, "moe-train": moe_train, "moe-grouped": moe_grouped, "kv": kv, "host-adam": host_adam, "delta": delta, "seeds": seeds, "grouped": grouped, "doctor": doctor,
}  # fmt: skip


def run_all(v: Visit, deadline: float) -> None:
    """Start every job as soon as it fits, in their order; until all are over or the deadline comes."""
    free = [1.0] * v.gpus
    waiting, running = list(v.jobs), []
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tools" / "gpu"), os.environ.get("PYTHONPATH", "")]),
        "SGLANG_JIT_DEEPGEMM_PRECOMPILE": "0",
        **MULTICAST_OFF,
    }
    while (waiting or running) and time.time() < deadline:
        for job in list(waiting):
            best = sorted(range(v.gpus), key=lambda i: -free[i])[: job.gpus]
            if len(best) < job.gpus or any(free[i] < job.share - 1e-6 for i in best):
                break  # in their order
            waiting.remove(job)
            job.on, job.began = tuple(sorted(best)), time.time()
            for i in best:
                free[i] -= job.share
            log = open(v.out / f"{job.name}.log", "w")
            own = environment | {"CUDA_VISIBLE_DEVICES": ",".join(map(str, job.on))}
            if job.turn is not None:
                own["TURNS"] = f"{job.turn}:{sum(other.turn == job.turn for other in v.jobs)}"
            job.process = subprocess.Popen(
                job.command, cwd=ROOT, env=own, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            running.append(job)
        for job in list(running):
            assert job.process is not None
            if job.until is not None and rl_steps(job)[-1:] >= [job.until]:
                end(job, 30)
                job.process.returncode = 0
            elif time.time() - job.began > job.limit_s:
                end(job, 15)
            if job.process.poll() is not None:
                running.remove(job)
                finish(v, job, free)
        time.sleep(0.2)
    for job in running:
        assert job.process is not None
        job.process.send_signal(signal.SIGTERM)
    until = time.time() + END_S - 10
    for job in running:
        end(job, max(0.1, until - time.time()))
        finish(v, job, free)


def end(job: Job, grace_s: float) -> None:
    """SIGTERM lets a run end its tasks; after grace_s all processes of the job are killed."""
    assert job.process is not None
    job.process.send_signal(signal.SIGTERM)
    try:
        job.process.wait(grace_s)
    except subprocess.TimeoutExpired:
        os.killpg(job.process.pid, signal.SIGKILL)
        job.process.wait()


def finish(v: Visit, job: Job, free: list[float]) -> None:
    assert job.process is not None
    job.status, job.seconds = job.process.returncode, time.time() - job.began
    for i in job.on:
        free[i] += job.share
    if job.turn is not None:  # nobody waits for it any more
        arrive(job.turn, job.name)
    print(f"{job.name}: status {job.status} after {job.seconds:.0f} s on GPUs {job.on}{said(job)}", flush=True)
    if v.archive is not None:
        collect(v)
        pack(v.out, v.archive)


def pack(folder: Path, archive: Path) -> None:
    partial = archive.with_name(f".{archive.name}.partial")
    with tarfile.open(partial, "w:gz") as tar:
        tar.add(folder, arcname=".", filter=lambda info: None if info.name == f"./{archive.name}" else info)
    partial.replace(archive)


def records_of(job: Job) -> list[dict[str, Any]]:
    """What a run has recorded so far, whole lines only."""
    if job.run is None or not (job.run / "metrics.jsonl").exists():
        return []
    return [
        json.loads(line) for line in (job.run / "metrics.jsonl").read_text().splitlines(True) if line.endswith("\n")
    ]


def rl_steps(job: Job) -> list[int]:
    return [r["step"] for r in records_of(job) if r["phase"] == "rl"]


def said(job: Job) -> str:
    """Where a run got to."""
    records = records_of(job)
    if not records:
        return ""
    rl = [r for r in records if r["phase"] == "rl"]
    accuracy = [(r["step"], round(r["eval/accuracy"], 3)) for r in rl if "eval/accuracy" in r]
    gaps = [r["gap/mean_abs"] for r in rl if r.get("gap/mean_abs") is not None]
    steps = sorted(r["time/step"] for r in rl[1:])
    return (
        f"; sft {sum(r['phase'] == 'sft' for r in records)}, rl {rl[-1]['step'] if rl else '-'}, accuracy {accuracy[:1]} {accuracy[-1:]}, "
        f"gap {sum(gaps) / max(1, len(gaps)):.2e}, {steps[len(steps) // 2] if steps else 0:.2f} s a step"
    )


def watch_memory(path: Path, over: threading.Event) -> None:
    """MiB used of every GPU, a line each MEMORY_EVERY_S."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    with open(path, "w") as out:
        while not over.wait(MEMORY_EVERY_S):
            done = subprocess.run(query, capture_output=True, text=True)
            out.write(f"{time.time():.1f} {' '.join(done.stdout.split())}\n")


def collect(v: Visit) -> None:
    """What is worth keeping of every run, into OUT."""
    for job in v.jobs:
        if job.run is None or not job.run.exists():
            continue
        target = v.out / "runs" / job.name
        for path in job.run.rglob("*"):
            small = path.is_file() and path.stat().st_size < 2 << 20
            if small and path.suffix in (".jsonl", ".json") and "engine_model" not in path.parts:
                (target / path.relative_to(job.run)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target / path.relative_to(job.run))
            elif path.suffix in (".err", ".log", ".txt") and path.is_file():
                (target / path.relative_to(job.run)).parent.mkdir(parents=True, exist_ok=True)
                (target / path.relative_to(job.run)).write_bytes(path.read_bytes()[-60000:])
    rows = [
        {"name": j.name, "status": j.status, "seconds": round(j.seconds, 1), "gpus": j.on, "began": j.began}
        for j in v.jobs
    ]
    (v.out / "results.json").write_text(json.dumps(rows, indent=1))


def setup_seconds(site: Path) -> int | None:
    """From the first pack's arrival (setup_packs.sh) to the first visit on this machine; None without packs."""
    if not (site / "began").exists():
        return None
    took = site / "setup_seconds"
    if not took.exists():
        took.write_text(str(int(time.time()) - int((site / "began").read_text())))
    return int(took.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("parts", nargs="+", choices=list(PARTS))
    parser.add_argument("--seconds", type=float, default=550, help="of all of it")
    parser.add_argument("--archive", type=Path, metavar="FILE", help="a tar.gz of OUT, made anew when a job has ended")
    parser.add_argument("--rehearse", action="store_true", help="eight, nodes: with tiny models on the CPU")
    args = parser.parse_args()
    if args.rehearse and (wrong := set(args.parts) - {"eight", "nodes"}):
        parser.error(f"--rehearse with {', '.join(sorted(wrong))}: these need GPUs; allowed: eight, nodes")
    deadline = time.time() + args.seconds - END_S
    import torch

    args.out.mkdir(parents=True, exist_ok=True)
    v = Visit(
        args.work.resolve(), args.out.resolve(), torch.cuda.device_count(), rehearse=args.rehearse, archive=args.archive
    )
    names = [torch.cuda.get_device_name(i) for i in range(v.gpus)]
    print(f"{v.gpus} GPUs: {', '.join(sorted(set(names)))}; torch {torch.__version__}", flush=True)
    setup_s = setup_seconds(Path(os.environ.get("GPU_SITE", "/opt/fp8slurm-gpu")))
    if setup_s is not None:
        print(f"setting up took {setup_s} s from the first pack on", flush=True)
        (v.out / "setup.json").write_text(json.dumps({"seconds": setup_s}))
    v.tiny()
    v.seconds = deadline - time.time() - END_S
    for part in args.parts:
        PARTS[part](v)
    print(f"ready with {len(v.jobs)} jobs, {deadline - time.time():.0f} s left", flush=True)
    over = threading.Event()
    if v.gpus:
        threading.Thread(target=watch_memory, args=(v.out / "memory.txt", over), daemon=True).start()
    run_all(v, deadline)
    over.set()
    collect(v)
    bad = [j.name for j in v.jobs if j.status != 0]
    print("not ended well, or not started:", ", ".join(bad) or "none")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
