#!/usr/bin/env python3
"""A whole weight update into a real SGLang engine: CUDA IPC on one GPU, and NCCL, from GPU to GPU where there are two.

This process stands for a training rank: it holds BF16 parameters in Megatron's shapes and runs the same WeightStream and
EngineLink as a run does. The engine loads another random checkpoint of the shape in block FP8, is updated, and has to
hold the bytes that were sent (raw digest). Then updates are timed, and the four calls around an empty one.

usage: sync_probe.py [--model tiny|Qwen3-0.6B|Qwen3-4B] [--layers N] [--bucket-mib 512] [--updates 5] [--ways cuda-ipc nccl]
       sync_probe.py --delta 0.003 --ways nccl     and updates that send only what changed, of so many of the weights
       sync_probe.py --cpu [--model tiny]     over gloo, to try the script
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools" / "gpu")]
# read when NCCL is loaded, here and in the engine, which inherits them
os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
os.environ.setdefault("NCCL_CUMEM_ENABLE", "0")  # as SGLang sets it: both ends have to agree
# else SGLang compiles DeepGEMM for every batch of up to 16384 tokens before it answers, for 10 minutes and more
os.environ.setdefault("SGLANG_JIT_DEEPGEMM_PRECOMPILE", "0")
os.environ.setdefault("PYTHONFAULTHANDLER", "1")  # the engine's stacks, when it is aborted

import torch  # noqa: E402
from random_model import write_random_model  # noqa: E402
from recipes import ENGINE as GPU_ENGINE  # noqa: E402

if torch.cuda.device_count() == 1:
    os.environ.setdefault("NCCL_MULTI_RANK_GPU_ENABLE", "1")

from fp8slurm.config.schema import EngineSection  # noqa: E402
from fp8slurm.engine.client import EngineClient, GenerateRequest  # noqa: E402
from fp8slurm.engine.server import Engine, EngineSettings, visible_gpus  # noqa: E402
from fp8slurm.models.names import NameTable  # noqa: E402
from fp8slurm.models.spec import ModelSpec  # noqa: E402
from fp8slurm.sync.bucket import WeightBucket, payload_bytes  # noqa: E402
from fp8slurm.sync.delta import LastSent  # noqa: E402
from fp8slurm.sync.engine_link import EngineLink  # noqa: E402
from fp8slurm.sync.mapped import MappedTransport  # noqa: E402
from fp8slurm.sync.stream import WeightStream  # noqa: E402
from fp8slurm.sync.traffic import traffic  # noqa: E402
from fp8slurm.sync.transport import BroadcastTransport  # noqa: E402


class NcclTransport(BroadcastTransport):
    """The broadcast over NCCL, from a payload on this process's GPU. (In runs the ranks send it, sync/direct.py.) Its end is
    not told apart from the load's: handover is next to nothing."""

    backend = "nccl"

    def finish(self) -> None:
        super().finish()
        torch.cuda.current_stream().synchronize()  # wait() only orders streams

    def _leave(self, client: EngineClient, group: torch.distributed.ProcessGroup) -> None:
        # the engine shuts its end down, and NCCL wants both ends to do the same: where this one aborts (or is only
        # forgotten) the engine's waits for ever (seen with NCCL 2.32.3, torch 2.11)
        leaving = self._pool.submit(client.leave_group, self._name)
        group.shutdown()
        leaving.result()


def parameters(table: NameTable, device: str) -> dict[str, torch.Tensor]:
    """Random parameters, BF16, one whole rank: norms near 1, matrices with standard deviation 0.02."""
    generator = torch.Generator(device).manual_seed(7)
    out = {}
    for entry in table:
        noise = torch.randn(entry.shape, generator=generator, device=device) * 0.02
        out[entry.name] = (1 + noise if len(entry.shape) == 1 else noise).bfloat16()
    return out


def empty_updates(client: EngineClient, link: EngineLink, n: int) -> tuple[float, float]:
    """(our update without a bucket, the server's own four calls), median seconds."""
    ours, theirs = [], []
    for i in range(n):
        start = time.perf_counter()
        link.update(1000 + i, iter(()))
        ours.append(time.perf_counter() - start)
        start = time.perf_counter()
        client.pause("retract")
        if client.begin_update():
            client.end_update()
        client.resume()
        theirs.append(time.perf_counter() - start)
    return statistics.median(ours), statistics.median(theirs)


def changes(
    link: EngineLink, stream: WeightStream, held: dict[str, torch.Tensor], share: float, updates: int
) -> dict[str, Any]:
    """Updates as sync.delta sends them, each after `share` of the weights changed by a tenth; the bytes compared after
    each."""
    last = LastSent(SimpleNamespace(set=lambda *_: None, delete_key=lambda _: None))
    runs: list[dict[str, float]] = []
    for number in range(1, updates + 2):
        for weight in held.values():
            places = torch.randint(weight.numel(), (int(share * weight.numel()),), device=weight.device)
            weight.view(-1)[places] *= 1.1
        sent: list[WeightBucket] = []

        def buckets(number: int = number, sent: list[WeightBucket] = sent) -> Iterator[WeightBucket]:
            for source, bucket in stream.buckets(2000 + number):
                assert bucket is not None
                sent.append(last.changes(number, source, replace(bucket, number=number)))
                yield sent[-1]

        last.begin(number > 1)
        start = time.perf_counter()
        link.update(2000 + number, buckets())
        total = time.perf_counter() - start
        last.done(number, True)
        size = sum(payload_bytes(b.specs) if b.delta is None else b.delta.payload.numel() for b in sent)
        runs.append(
            {"total": total, "sent": size, "whole": sum(b.delta is None for b in sent), "compare": last.seconds}
        )
        link.verify(WeightBucket(b.version, b.specs, b.payload.clone()) for _, b in stream.buckets(2000 + number))
    return {"share": share, "first": runs[0], **{k: statistics.median(r[k] for r in runs[1:]) for k in runs[0]}}


def probe(
    way: str, engine: Engine, stream: WeightStream, updates: int, held: dict[str, torch.Tensor], share: float
) -> dict[str, Any]:
    """Open a link of that kind, update, compare the bytes, time."""
    client = EngineClient(engine.url, engine.api_key, 600)
    transport = {"cuda-ipc": MappedTransport, "nccl": NcclTransport, "gloo": BroadcastTransport}[way]()
    link = EngineLink(client, 1, transport)
    start = time.perf_counter()
    link.open()
    opened = time.perf_counter() - start
    runs = []
    for version in range(1, updates + 2):
        start = time.perf_counter()
        link.update(version, (bucket for _, bucket in stream.buckets(version)))
        runs.append({"total": time.perf_counter() - start, **stream.seconds, **link.seconds})
    clones = (WeightBucket(b.version, b.specs, b.payload.clone()) for _, b in stream.buckets(version))
    link.verify(clones)
    generated = client.generate([GenerateRequest([5, 6, 7], 4, seed=0)])[0]
    assert set(generated.weight_versions) == {version}, generated
    changed = changes(link, stream, held, share, updates) if share and way != "cuda-ipc" else None
    ours, theirs = empty_updates(client, link, 11)
    assert link.counts == {"loaded": 0, "buckets": 0}
    link.close()
    median = {k: statistics.median(r[k] for r in runs[1:]) for k in runs[0]}
    return {"way": way, "digest": "equal", "open": opened, "first": runs[0]["total"], "median": median,
            "all": [r["total"] for r in runs], "empty": ours, "four_calls": theirs,
            "delta": changed}  # fmt: skip


def watch(engine: Engine, limit_s: float) -> None:
    """After limit_s: everybody's stacks, the engine's log, and the end."""
    time.sleep(limit_s)
    print(f"not at its end after {limit_s:g} s; this process:", file=sys.stderr, flush=True)
    faulthandler.dump_traceback()
    for process in engine._family():
        process.send_signal(signal.SIGABRT)
    time.sleep(3)
    print(engine.log_tail(400), file=sys.stderr, flush=True)
    engine.stop()
    os._exit(3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--bucket-mib", type=float, default=512)
    parser.add_argument("--updates", type=int, default=5)
    parser.add_argument("--delta", type=float, default=0.0, help="share of the weights that changes between updates")
    parser.add_argument("--ways", nargs="+", default=["cuda-ipc", "nccl"])
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--folder", type=Path, help="for the checkpoints (default: a temporary one)")
    parser.add_argument("--checkpoint", type=Path, help="an FP8 folder of the model that is there already")
    parser.add_argument("--logs", type=Path, help="keep the engine's log here")
    parser.add_argument(
        "--limit-s", type=float, default=600, help="then the stacks of both ends are shown, and it is over"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device, ways = ("cpu", ["gloo"]) if args.cpu else ("cuda", args.ways)
    folder = Path(tempfile.mkdtemp(prefix="sync_probe_", dir=args.folder))
    report: dict[str, Any] = {"model": args.model, "layers": args.layers, "torch": torch.__version__, "ways": []}
    if not args.cpu:
        report |= {"gpu": torch.cuda.get_device_name(), "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    engine = None
    try:
        from fp8slurm.checkpoint import hf_to_fp8

        checkpoint = args.checkpoint or folder / "fp8"
        if args.checkpoint is None:
            write_random_model(args.model, folder / "bf16", args.layers)
            hf_to_fp8(folder / "bf16", checkpoint, verify=False)
            shutil.rmtree(folder / "bf16")
        extra = [] if args.cpu else [*GPU_ENGINE, "--disable-cuda-graph"]
        section = EngineSection(
            max_running_requests=16, max_total_tokens=8192, context_length=1024, mem_fraction=0.4, extra_args=extra
        )
        # NCCL wants a GPU for each end, where there are two; CUDA IPC the same one
        apart = "nccl" in ways and not args.cpu and torch.cuda.device_count() > 1
        gpus = None if args.cpu else (visible_gpus()[1 if apart else 0],)
        report["gpus"] = 2 if apart else 1
        engine = Engine(
            checkpoint, args.logs or folder / "log", EngineSettings(section, cpu=args.cpu, cpu_threads=1, gpus=gpus)
        )
        engine.start()
        threading.Thread(target=watch, args=(engine, args.limit_s), daemon=True).start()
        spec = ModelSpec.from_hf_dir(checkpoint)
        table = NameTable(spec)
        held = parameters(table, device)
        bucket_bytes = int(args.bucket_mib * 2**20)
        planned = traffic(table, spec.quantization, bucket_bytes)
        stream = WeightStream(table, lambda: iter(held.items()), spec.quantization, bucket_bytes, torch.bfloat16)
        report |= {"bytes": planned.payload, "buckets": planned.buckets, "of_bf16": planned.ratio}
        engine.wait_ready()
        for way in ways:
            try:
                report["ways"].append(probe(way, engine, stream, args.updates, held, args.delta))
                print(json.dumps(report["ways"][-1]), flush=True)
            except Exception as error:  # noqa: BLE001 - the other way is worth its own try
                report["ways"].append({"way": way, "error": f"{type(error).__name__}: {error}"[:2000]})
                print(engine.log_tail(40), file=sys.stderr)
                engine.restart()
    finally:
        if engine is not None:
            engine.stop()
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(report, indent=1))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))
    sys.exit(1 if any("error" in way for way in report["ways"]) else 0)


if __name__ == "__main__":
    main()
