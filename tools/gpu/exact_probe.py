#!/usr/bin/env python3
"""Trainer and engine on one GPU with model.exact: bits, gradients and costs.

usage: exact_probe.py WORK JSON [--shape Qwen3-0.6B] [--layers N] PART...

    bits        an engine's decoded log-probabilities against the trainer's packed forward, at three temperatures, behind
                short and long prompts; and again with SGLang's quantizer put back into the trainer
    gradients   against TransformerEngine's layer and against BF16, and against themselves
    step        seconds of a training step, exact, ordinary FP8 and BF16
    engine      tokens a second of an exact and of an ordinary engine, batches of 1, 32 and 256 and at 8k context
    model       only makes the model

Random weights; a model is made in WORK once. JSON has what was found, written as it goes.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import random
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools" / "gpu")]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from random_model import write_random_model  # noqa: E402
from recipes import ENGINE  # noqa: E402
from turns import alone  # noqa: E402

from fp8slurm.checkpoint import hf_to_fp8  # noqa: E402
from fp8slurm.config import parse  # noqa: E402
from fp8slurm.config.schema import EngineSection  # noqa: E402
from fp8slurm.core.types import PackedBatch  # noqa: E402
from fp8slurm.engine.client import EngineClient, GenerateRequest  # noqa: E402
from fp8slurm.engine.server import Engine, EngineSettings  # noqa: E402
from fp8slurm.models.spec import ModelSpec  # noqa: E402

LONG = (40, 100, 128, 257, 500, 777, 1024, 1300, 1500, 1777, 2048, 2200, 2500, 2800, 3000, 3500)
DRAWS = (
    # temperature, lengths of the prompts, tokens drawn after each
    (1.0, LONG, 256),
    (0.7, [30 + 7 * i for i in range(48)], 256),
    (1.3, [5 + 3 * i for i in range(32)], 192),
)
MICRO_BATCH = 16384
TOKENS_IN = range(300, 100_000)


class Probe:
    with_stock = False

    def __init__(self, work: Path, out: Path, shape: str, layers: int | None) -> None:
        self.work, self.out, self.began = work, out, time.monotonic()
        self.found: dict[str, Any] = {"shape": shape, "layers": layers, "gpu": torch.cuda.get_device_name()}
        self.model = work / f"{shape}{'' if layers is None else f'-{layers}'}"
        self.fp8 = self.model.with_name(f"{self.model.name}-FP8")
        with (work / "lock").open("w") as lock:  # another process may be making them
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not self.model.exists():
                write_random_model(shape, self.model.with_suffix(".tmp"), layers)
                self.model.with_suffix(".tmp").rename(self.model)
            if not self.fp8.exists():
                hf_to_fp8(self.model, self.fp8, verify=False)
        self.random = random.Random(3)
        self.engines: dict[str, Engine] = {}
        self._clients: dict[str, EngineClient] = {}
        self._sessions = 0

    def put(self, name: str, value: Any) -> None:
        self.found[name] = value
        self.out.with_suffix(".tmp").write_text(json.dumps(self.found, indent=1))
        self.out.with_suffix(".tmp").rename(self.out)
        print(name, json.dumps(value)[:1500], flush=True)

    def begin(self, name: str) -> None:
        """Start the engine `name`, "exact" or "stock", unless it has been."""
        if name in self.engines:
            return
        graphs = map(str, sorted({1, 8, 256} | {len(lengths) for _, lengths, _ in DRAWS}))
        capture = ["--cuda-graph-bs-decode", *graphs, "--disable-prefill-cuda-graph"]
        section = EngineSection(
            extra_args=[*ENGINE, *capture], ready_timeout_s=200.0, mem_fraction=0.85, max_running_requests=256,
            context_length=9216, max_total_tokens=110_000,
        )  # fmt: skip
        settings = replace(EngineSettings(section), exact=name == "exact")
        self.engines[name] = Engine(self.fp8, self.out.parent, settings, f"engine-{name}-{self.model.name}")
        self.engines[name].start()

    def client(self, name: str) -> EngineClient:
        """Of an engine that was begun, when it is ready."""
        if name not in self._clients:
            self.engines[name].wait_ready()
            self.put(f"{name} engine ready after s", time.monotonic() - self.began)
            self._clients[name] = EngineClient(self.engines[name].url, self.engines[name].api_key)
        return self._clients[name]

    def stop_engines(self) -> None:
        for engine in self.engines.values():
            engine.stop()
        self.engines, self._clients = {}, {}

    def trainer(self, exact: bool = False, backend: str = "transformer_engine", recompute: str = "none") -> Any:
        """A trainer of one rank with the model's weights; `stop` before the next."""
        from fp8slurm.trainer.start import start
        from fp8slurm.trainer.trainer import Trainer

        flags = ["--model.hf-checkpoint", str(self.model), "--fp8.backend", backend, "--slurm.gpus-per-node", "1"]
        config = parse(None, [*flags, "--train.recompute", recompute, *(["--model.exact"] if exact else [])])
        self._sessions += 1
        start(config, 0, 1, dist.FileStore(str(self.work / f"store-{os.getpid()}-{self._sessions}"), 1))
        trainer = Trainer(config, ModelSpec.from_hf_dir(self.model))
        trainer.load_hf(self.model)
        return trainer

    def prompt(self, length: int) -> tuple[int, ...]:
        return tuple(self.random.choice(TOKENS_IN) for _ in range(length))


def pack(rows: list[tuple[list[int], int, list[float]]], temperature: float) -> list[PackedBatch]:
    """Micro-batches of (tokens, length of the prompt, the engine's log-probabilities of the others)."""
    batches, current = [], []
    for row in [*rows, None]:
        if row is None or sum(len(r[0]) for r in current) + len(row[0]) > MICRO_BATCH:
            batches.append(_one(current, temperature))
            current = []
        current.append(row)
    return batches


def _one(rows: list[Any], temperature: float) -> PackedBatch:
    pad = -sum(len(r[0]) for r in rows) % 128
    rows = [*rows, *([([0] * pad, pad, [])] if pad else [])]
    tokens, labels, positions, said, ends = [], [], [], [], [0]
    for ids, prompt, logprobs in rows:
        tokens += ids
        labels += [*ids[1:], 0]
        positions += range(len(ids))
        said += [0.0] * (prompt - 1) + logprobs + [0.0]
        ends.append(len(tokens))
    mask = torch.zeros(len(tokens), dtype=torch.bool)
    for (_, prompt, logprobs), start in zip(rows, ends):
        mask[start + prompt - 1 : start + prompt - 1 + len(logprobs)] = True
    zeros = torch.zeros(len(tokens))
    return PackedBatch(
        tokens=torch.tensor(tokens), labels=torch.tensor(labels), position_ids=torch.tensor(positions),
        cu_seqlens=torch.tensor(ends, dtype=torch.int32), loss_weights=mask / mask.sum().clamp(min=1),
        rollout_logprobs=torch.tensor(said[: len(tokens)]), advantages=zeros, loss_mask=mask, temperature=temperature,
    )  # fmt: skip


def compare(trainer: Any, batches: list[PackedBatch]) -> dict[str, Any]:
    """The trainer's log-probabilities of the drawn tokens against the engine's, bit by bit."""
    ours = torch.cat([lp.cpu()[b.loss_mask] for lp, b in zip(trainer.logprobs(batches), batches)])
    theirs = torch.cat([b.rollout_logprobs[b.loss_mask] for b in batches])
    equal = ours.view(torch.int32) == theirs.view(torch.int32)
    d = (ours.double() - theirs.double()).abs()
    return {
        "tokens": len(d), "differ": int((~equal).sum()), "mean_abs": float(d.mean()), "max_abs": float(d.max()),
        "mean_logprob": float(theirs.double().mean()),
    }  # fmt: skip


def bits(probe: Probe) -> None:
    probe.begin("exact")
    trainer = probe.trainer(exact=True)
    client = probe.client("exact")
    if probe.with_stock:  # comes up while the trainer works
        probe.begin("stock")
    drawn = []
    for temperature, lengths, tokens in DRAWS:
        prompts = [probe.prompt(n) for n in lengths]
        made = client.generate([GenerateRequest(p, tokens, temperature) for p in prompts], one_batch=True)
        drawn.append((temperature, [([*p, *g.token_ids], len(p), g.logprobs) for p, g in zip(prompts, made)]))
    packs = [pack(rows, temperature) for temperature, rows in drawn]
    for (temperature, _), batches in zip(drawn, packs):
        probe.put(f"bits/temperature {temperature:g}", compare(trainer, batches))
    from fp8slurm.trainer import exact_cuda

    def stock(x: torch.Tensor) -> Any:
        from sglang.kernels.ops.quantization.fp8_kernel import sglang_per_token_group_quant_fp8

        return sglang_per_token_group_quant_fp8(x, 128, column_major_scales=True, scale_tma_aligned=True)

    with patch.object(exact_cuda, "quantize_rows", stock):
        probe.put("bits/with SGLang's quantizer", compare(trainer, packs[1]))
    small = [_one(rows[:1], temperature) for temperature, rows in drawn]
    probe.put("bits/alone", compare(trainer, small))
    _stop()


def _stop() -> None:
    import gc

    from fp8slurm.trainer.start import stop

    stop()
    gc.collect()
    torch.cuda.empty_cache()


def _random_batches(probe: Probe, tokens: int, length: int) -> list[PackedBatch]:
    rows = [(list(probe.prompt(length)), length // 4, [0.0] * (length - length // 4)) for _ in range(tokens // length)]
    return [_one(rows, 1.0)]


def _loss(logprobs: torch.Tensor, entropy: Any, batch: PackedBatch) -> tuple[torch.Tensor, dict[str, Any]]:
    return -(logprobs * batch.loss_weights).sum() + (
        0 if entropy is None else 1e-3 * (entropy * batch.loss_weights).sum()
    ), {}


def gradients(probe: Probe) -> None:
    batches = _random_batches(probe, 8192, 512)

    def of(trainer: Any) -> dict[str, torch.Tensor]:
        trainer._gradients(batches, _loss, True)
        named = {entry.name: parameter.main_grad.float().cpu() for entry, parameter, _ in trainer.shards.parameters}
        return {name: g.clone() for name, g in named.items()}

    made: dict[str, dict[str, torch.Tensor]] = {}
    for name, how in (("exact", {"exact": True}), ("recomputed", {"exact": True, "recompute": "full"}),
                      ("fp8", {}), ("bf16", {"backend": "off"})):  # fmt: skip
        trainer = probe.trainer(**how)
        made[name] = of(trainer)
        if name == "exact":
            again = of(trainer)
            apart = {n: float((g - made[name][n]).norm() / g.norm()) for n, g in again.items()}
            probe.put("gradients/repeat", {n: d for n, d in apart.items() if d})
        del trainer
        _stop()
    recomputed = {n: float((g - made["exact"][n]).norm() / g.norm()) for n, g in made["recomputed"].items()}
    probe.put("gradients/recomputed", {n: d for n, d in recomputed.items() if d})
    table = {}
    for name, want in made["bf16"].items():
        table[name] = [float((made[k][name] - want).norm() / want.norm().clamp(min=1e-30)) for k in ("exact", "fp8")]
    worst = sorted(table.items(), key=lambda item: -item[1][0] / max(item[1][1], 1e-9))[:8]
    probe.put("gradients/relative to bf16 [exact, fp8]", {
        "median": [statistics.median(v[i] for v in table.values()) for i in (0, 1)],
        "max": [max(v[i] for v in table.values()) for i in (0, 1)], "worst ratios": dict(worst),
    })  # fmt: skip


def step(probe: Probe) -> None:
    batches = _random_batches(probe, 16384, 1024)
    for name, how in (("exact", {"exact": True}), ("fp8", {}), ("bf16", {"backend": "off"})):
        trainer = probe.trainer(recompute="full", **how)
        probe.put(f"step/{name}", _seconds(trainer, batches) | {"kernels": _kernels(trainer, batches)})
        del trainer
        _stop()


def _seconds(trainer: Any, batches: list[PackedBatch]) -> dict[str, Any]:
    """Medians of five steps without the optimizer's, of five forward passes, and the most memory."""
    torch.cuda.reset_peak_memory_stats()
    calls = {
        "gradients_s": lambda: trainer._gradients(batches, _loss_of_logprobs, False),
        "step_s": lambda: trainer.train_step(batches, _loss_of_logprobs, 0.0),
        "logprobs_s": lambda: trainer.logprobs(batches),
    }
    found: dict[str, Any] = {}
    for name, call in calls.items():
        seconds = []
        for _ in range(6):
            torch.cuda.synchronize()
            begun = time.perf_counter()
            call()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begun)
        found[name] = statistics.median(seconds[1:])
    return found | {"peak_gb": torch.cuda.max_memory_allocated() / 1e9}


def _kernels(trainer: Any, batches: list[PackedBatch], most: int = 32) -> list[Any]:
    """[ms, launches, name] of the kernels that take longest in a step."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        trainer._gradients(batches, _loss_of_logprobs, False)
        torch.cuda.synchronize()
    times: dict[str, list[float]] = {}
    for event in seen.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            one = times.setdefault(event.name[:90], [0.0, 0])
            one[0] += (event.time_range.end - event.time_range.start) / 1e3
            one[1] += 1
    return sorted(([round(t, 2), int(n), name] for name, (t, n) in times.items()), reverse=True)[:most]


def _loss_of_logprobs(logprobs: torch.Tensor, entropy: Any, batch: PackedBatch) -> tuple[torch.Tensor, dict[str, Any]]:
    return -(logprobs * batch.loss_weights).sum(), {}


def engine(probe: Probe) -> None:
    for name in ("exact", "stock"):
        probe.begin(name)
    clients = {name: probe.client(name) for name in ("exact", "stock")}
    with alone("exact-engine"):
        _rates(probe, clients)


def _rates(probe: Probe, clients: dict[str, EngineClient]) -> None:
    for batch, length, tokens, rounds in ((1, 128, 256, 4), (32, 128, 256, 4), (256, 128, 256, 3), (8, 8192, 128, 3)):
        requests = [GenerateRequest(probe.prompt(length), tokens, 1.0) for _ in range(batch)]
        seconds: dict[str, list[float]] = {name: [] for name in clients}
        for i in range(rounds + 1):
            for name, client in clients.items():
                client.flush_cache()
                begun = time.perf_counter()
                client.generate(requests, one_batch=True)
                if i:
                    seconds[name].append(time.perf_counter() - begun)
        rate = {name: batch * tokens / statistics.median(s) for name, s in seconds.items()}
        probe.put(
            f"engine/batch {batch} behind {length}",
            {**rate, "exact/stock": rate["exact"] / rate["stock"], "seconds": seconds},
        )


PARTS = {"bits": bits, "gradients": gradients, "step": step, "engine": engine, "model": lambda probe: None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("json", type=Path)
    parser.add_argument("--shape", default="Qwen3-0.6B")
    parser.add_argument("--layers", type=int)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("SGLANG_JIT_DEEPGEMM_PRECOMPILE", "0")
    probe = Probe(args.work, args.json, args.shape, args.layers)
    probe.with_stock = "engine" in args.parts
    try:
        for part in args.parts:
            if part in ("gradients", "step"):
                probe.stop_engines()
            PARTS[part](probe)
    finally:
        probe.stop_engines()


if __name__ == "__main__":
    main()
