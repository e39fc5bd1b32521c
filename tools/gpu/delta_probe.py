#!/usr/bin/env python3
"""sync.delta on a GPU: how many codes change an update, what comparing and applying take, a real engine's bytes after it.

    shares   a supervised start from random weights, then 25 updates at each learning rate, with the supervised gradient and with
             one whose examples have random signs (what group-centred advantages of +-1 leave): shares of codes, scales, others
    encode   buckets of the 4B's bytes of which some are changed: seconds to find, encode, sum and apply them, whole copies beside
    engine   sync_probe.py --delta beside the two: an FP8 engine after whole updates and after changes, digests compared

Each part writes OUT/delta_PART.json; one that fails says so there.

usage: delta_probe.py WORK OUT [--model Qwen3-0.6B] [--start 80] [--steps 25] [--parts shares encode engine]
       delta_probe.py WORK OUT --cpu [--start 4 --steps 2]      the tiny model, to try the script
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools" / "gpu")]

import torch  # noqa: E402

from fp8slurm.engine.inside import delta  # noqa: E402
from fp8slurm.sync.delta import Announced, LastSent  # noqa: E402

RATES = (1e-6, 3e-6, 1e-5)
ENCODED_SHARES = (0.0005, 0.003, 0.01, 0.05)


class Table(dict):
    """A store for one process."""

    def set(self, name: str, value: str) -> None:
        self[name] = value

    def check(self, names: list[str]) -> bool:
        return all(name in self for name in names)

    def delete_key(self, name: str) -> None:
        self.pop(name, None)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def shares(args: argparse.Namespace) -> dict[str, Any]:
    """Of a model that has learned something."""
    import torch.distributed as dist
    from recipes import write_model
    from visit import Visit

    from fp8slurm.config import parse
    from fp8slurm.models.names import NameTable
    from fp8slurm.models.spec import ModelSpec, QuantizationSpec
    from fp8slurm.rl.supervised import SupervisedPhase
    from fp8slurm.run.directory import RunState
    from fp8slurm.sync.stream import WeightStream
    from fp8slurm.trainer.start import start

    tiny = Visit(args.work, args.out, 1).tiny()
    model = tiny if args.cpu else write_model(args.work / args.model, args.model, tiny)
    data = args.work / "data"
    backend = "emulated" if args.cpu else "transformer_engine"
    flags = {
        "model.hf-checkpoint": model, "fp8.backend": backend, "data.train": data / "train.jsonl",
        "sft.data": data / "sft.jsonl", "sft.max-steps": args.start, "sft.batch-size": 128, "sft.lr": 3e-4,
        "sft.warmup-steps": min(30, args.start // 2), "optim.beta2": 0.99, "train.tokens-per-micro-batch": 4096,
    }  # fmt: skip
    config = parse(None, [f"--{key}={value}" for key, value in flags.items()])
    store = args.work / f"delta_store_{time.time_ns()}"
    start(config, 0, 1, dist.FileStore(str(store), 1))
    from fp8slurm.trainer.trainer import Trainer

    spec = ModelSpec.from_hf_dir(model)
    trainer = Trainer(config, spec)
    trainer.load_hf(model)
    stream = WeightStream(
        NameTable(spec), trainer.named_shards, QuantizationSpec(), 128 * 2**20, getattr(torch, config.engine.dtype)
    )
    table = Table()
    last, updates = LastSent(table), 0

    def update() -> dict[str, float]:
        """What an update sends now, and the seconds that finding it out takes."""
        nonlocal updates
        updates += 1
        last.begin(updates > 1)
        told, turns = Announced(table, updates), {}
        for source, bucket in stream.buckets(updates):
            assert bucket is not None
            last.changes(updates, source, bucket)
            turns[source] = turns.get(source, -1) + 1
            told.bucket(source, turns[source], bucket.specs)
        synchronize()
        last.done(updates, True)
        return {**told.figures(), "compare_s": last.seconds}

    phase = SupervisedPhase(config, trainer)
    state, losses, supervised = RunState("sft", 0), [], []
    update()
    for step in range(args.start):
        state, record = phase.step(state)
        losses.append(record["loss"])
        if step < 3 or step >= args.start - 3:
            supervised.append({"step": step + 1, "lr": record["lr"], "loss": record["loss"], **update()})
    report: dict[str, Any] = {
        "model": args.model if not args.cpu else "tiny",
        "losses": losses,
        "supervised": supervised,
    }
    update()
    report["updates"] = []
    signs = torch.Generator().manual_seed(5)
    from fp8slurm.rl import supervised as module

    pack = module.pack_sft

    def signed(*arguments: Any, **packing: Any) -> Any:
        ranks = pack(*arguments, **packing)
        for batch in ranks[0]:
            ends = batch.cu_seqlens.tolist()
            for a, b in zip(ends, ends[1:]):
                batch.loss_weights[a:b] *= 2 * int(torch.randint(2, (), generator=signs)) - 1
        return ranks

    for gradient, how in (("supervised", pack), ("random signs", signed)):
        module.pack_sft = how
        for lr in RATES:
            trainer.new_optimizer()
            phase.settings = config.sft.model_copy(update={"lr": lr, "warmup_steps": 0, "max_steps": 10**9})
            for step in range(args.steps):
                state, record = phase.step(replace(state, step=1))
                assert abs(record["lr"] - lr) < 1e-12, record
                report["updates"].append(
                    {"gradient": gradient, "lr": lr, "step": step + 1, "loss": record["loss"], **update()}
                )
    module.pack_sft = pack
    report["summary"] = [
        {
            "gradient": g,
            "lr": lr,
            **{k: medians(report["updates"], g, lr, k) for k in report["updates"][0] if "/" in k or k == "compare_s"},
        }
        for g in ("supervised", "random signs")
        for lr in RATES
    ]
    return report


def medians(rows: list[dict[str, Any]], gradient: str, lr: float, key: str) -> list[float]:
    """Of the first five, and of the last ten updates."""
    values = [r[key] for r in rows if (r["gradient"], r["lr"]) == (gradient, lr)]
    return [statistics.median(values[:5]), statistics.median(values[-10:])]


def encode(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds for the 4B's bytes."""
    device = "cpu" if args.cpu else "cuda"
    sizes = [2**22] * 2 if args.cpu else [778 * 10**6, *[512 * 2**20] * 6, 410 * 10**6]
    generator = torch.Generator(device).manual_seed(1)
    old = [torch.randint(0, 256, (n,), generator=generator, dtype=torch.uint8, device=device) for n in sizes]
    new, there = [b.clone() for b in old], [b.clone() for b in old]
    scratch = torch.empty(max(sizes), dtype=torch.uint8, device=device)
    rows = []
    for share in ENCODED_SHARES:
        seconds: dict[str, list[float]] = {}

        def timed(name: str, call: Callable[[], Any], seconds: dict[str, list[float]] = seconds) -> Any:
            synchronize()
            start = time.perf_counter()
            result = call()
            synchronize()
            seconds[name][-1] += time.perf_counter() - start
            return result

        for _ in range(4):
            for name in ("positions", "encode", "checksum", "keep", "apply"):
                seconds.setdefault(name, []).append(0.0)
            sent = 0
            for kept, now, engine in zip(old, new, there):
                places = torch.randint(0, now.numel(), (int(share * now.numel()),), generator=generator, device=device)
                now[places] += 1
                at = timed("positions", lambda a=kept, b=now: delta.positions(a, b, b.numel()))
                encoded = timed("encode", lambda at=at, b=now: delta.encode(at, b))
                total = timed("checksum", lambda e=encoded: delta.checksum(e))
                timed("keep", lambda a=kept, b=now: a.copy_(b))

                def apply(e: torch.Tensor = encoded, n: int = at.numel(), p: torch.Tensor = engine) -> None:
                    flat = scratch[: p.numel()]
                    flat.copy_(p)
                    delta.apply(e, n, flat)
                    p.copy_(flat)

                timed("apply", apply)
                assert torch.equal(engine, now), share
                assert total == delta.checksum(encoded.cpu()), "the checksum on the GPU is another one than on the CPU"
                sent += encoded.numel()
        rows.append(
            {
                "share": share,
                "sent": sent,
                "of": sum(sizes),
                **{k: statistics.median(v[1:]) for k, v in seconds.items()},
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return {"bytes": sum(sizes), "rows": rows}


def engine_command(args: argparse.Namespace) -> list[str]:
    command = [sys.executable, str(ROOT / "tools/gpu/sync_probe.py"), "--delta", "0.003", "--updates", "5"]
    command += ["--json", str(args.out / "delta_engine.json"), "--logs", str(args.out / "delta_engine_log")]
    command += ["--folder", str(args.work), "--limit-s", "170"]
    return [
        *command,
        *(["--cpu", "--model", "tiny"] if args.cpu else ["--model", args.model, "--ways", "nccl", "gloo"]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="Qwen3-0.6B")
    parser.add_argument("--start", type=int, default=80)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--parts", nargs="+", default=["shares", "encode", "engine"])
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args()
    for folder in (args.work, args.out):
        folder.mkdir(parents=True, exist_ok=True)
    engine = None
    if "engine" in args.parts:
        with open(args.out / "delta_engine.out", "w") as out:
            engine = subprocess.Popen(engine_command(args), stdout=out, stderr=subprocess.STDOUT)
    for name, part in (("encode", encode), ("shares", shares)):
        if name not in args.parts:
            continue
        start = time.perf_counter()
        try:
            report = part(args)
        except Exception:  # noqa: BLE001 - the other parts are worth their own try
            report = {"error": traceback.format_exc()[-3000:]}
        where = "cpu" if args.cpu else torch.cuda.get_device_name()
        report |= {"seconds": time.perf_counter() - start, "on": where, "torch": torch.__version__}
        (args.out / f"delta_{name}.json").write_text(json.dumps(report, indent=1))
        print(name, json.dumps(report.get("summary", report.get("rows", report.get("error", "")))), flush=True)
    if engine is not None:
        print("engine: status", engine.wait(), (args.out / "delta_engine.out").read_text()[-1500:], flush=True)


if __name__ == "__main__":
    main()
