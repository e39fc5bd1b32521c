#!/usr/bin/env python3
"""Updates whole and with sync.delta, from a rank through a rollout worker into a real SGLang engine on the CPU.

The rank has random BF16 weights (standard deviation 0.02) with FP32 masters, which an update moves by the learning rate up or
down, as Adam's steps do where gradients are noise. Both ways take the same path as a run's (WeightStream, LastSent, HostReceiver,
EngineLink); a link of N Gbit/s between rank and rollout worker is waited for, bytes / rate a bucket, before its broadcast over
loopback. The engine's digest is compared after every way. What else could be sent is counted from the same changes:

    bitmap   a bit a byte for every 16 KiB (a block of codes) in which anything changed, four bytes to name it, the new bytes
    gaps     the distance to the last changed byte in one byte, 255 standing for as many without a change, the new bytes

usage: tools/bench/bench_delta.py [--shape 4b] [--layers 2] [--vocab 2048] [--rates 1e-6 3e-6 1e-5 1e-4] [--gbits 0 25 10 1] [--runs 3] [--json OUT]
       tools/bench/bench_delta.py --run RUN     what a run's metrics say, by the part of its steps
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "tools" / "bench")]

BLOCK_BYTES = 128 * 128


class Pending:
    """A broadcast in another thread."""

    def __init__(self, future: Future[None]) -> None:
        self.future = future

    def wait(self) -> None:
        self.future.result()


def other_encodings(at: Any, whole: int) -> dict[str, int]:
    """Bytes of the encodings that are not used, for changes at these positions (int64, ascending)."""
    import torch

    blocks = int(torch.div(at, BLOCK_BYTES, rounding_mode="floor").unique().numel())
    gaps = at.diff(prepend=at.new_full((1,), -1)) - 1
    return {
        "bitmap": blocks * (4 + BLOCK_BYTES // 8) + at.numel(),
        "gaps": 2 * at.numel() + int(torch.div(gaps, 255, rounding_mode="floor").sum()),
        "whole": whole,
    }


def measure(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """A row for every learning rate, way and link."""
    import torch
    from bench_sync import start_engine

    from fp8slurm.engine.client import EngineClient
    from fp8slurm.engine.inside import delta
    from fp8slurm.models.names import NameTable
    from fp8slurm.sync.bucket import WeightBucket
    from fp8slurm.sync.delta import LastSent
    from fp8slurm.sync.engine_link import EngineLink
    from fp8slurm.sync.groups import Group, host_store
    from fp8slurm.sync.receiver import HostReceiver
    from fp8slurm.sync.stream import Sender, WeightStream

    spec, engine = start_engine(args, folder)
    rows = []
    try:
        store, _ = host_store("127.0.0.1")
        generator = torch.Generator().manual_seed(0)
        table = NameTable(spec)
        masters = {e.name: torch.randn(e.shard_shape(1), generator=generator) * 0.02 for e in table}
        held = {name: master.bfloat16() for name, master in masters.items()}
        stream = WeightStream(
            table, lambda: iter(held.items()), spec.quantization, int(args.bucket_mib * 2**20), torch.bfloat16
        )
        (name, source), *more = stream.sources.items()
        assert not more, "one source"
        engine.wait_ready()
        number = 0
        for way in ("whole", "delta"):
            with ThreadPoolExecutor(1) as pool, ThreadPoolExecutor(1) as wire:  # broadcasts keep their order
                there = pool.submit(Group, store.clone(), f"{way}/{name}", 1, 2, "127.0.0.1")
                group = Group(store, f"{way}/{name}", 0, 2, "127.0.0.1")
                receiver = HostReceiver(
                    store.clone(), [(name, there.result(), source.buckets)], keep=True, delta=way == "delta"
                )
                sender = Sender(LastSent(store) if way == "delta" else None)
                link = EngineLink(EngineClient(engine.url, engine.api_key, 600), 1)
                link.open()
                for lr, gbits in [(0.0, 0.0), *((r, g) for r in args.rates for g in args.gbits)]:
                    seconds, sent, figures = [], [], []
                    for _ in range(args.runs if lr else 2):  # the first two: all of it, and the first recorded load
                        number += 1
                        for key, master in masters.items():
                            step = torch.randint(0, 2, master.shape, generator=generator, dtype=torch.int8) * 2 - 1
                            held[key].copy_(master.add_(step, alpha=lr))
                        count = 0

                        def to_hosts(_: str, bucket: WeightBucket, gbits: float = gbits) -> Pending:
                            nonlocal count
                            payload = bucket.payload if bucket.delta is None else bucket.delta.payload
                            count += payload.numel()

                            def carry() -> None:
                                time.sleep(payload.numel() * 8e-9 / gbits if gbits else 0)
                                group.broadcast(payload, 0)

                            return Pending(wire.submit(carry))

                        def update(number: int = number) -> None:
                            link.update(number, receiver.receive(number, number, verify=False))

                        sender.prepare(lambda _, **asked: [receiver.prepare(None, asked)])  # type: ignore[arg-type]
                        start = time.perf_counter()
                        coming = pool.submit(update)
                        sender.send(number, number, stream, to_hosts, False)
                        coming.result()
                        seconds.append(time.perf_counter() - start)
                        sender.done(number, True)
                        sent.append(count)
                        figures.append(receiver.figures)
                    if lr:
                        row = {"way": way, "lr": lr, "gbits": gbits, "seconds": statistics.median(seconds),
                               "sent": statistics.median(sent), **{k: v for k, v in figures[-1].items() if "changed" in k}}  # fmt: skip
                        rows.append(row)
                        print(json.dumps(row), flush=True)
                link.verify(receiver.held)
                link.close()
        for lr in args.rates:  # one more update at each rate: how else its changes could be written
            before = [b.payload.clone() for _, b in stream.buckets(0) if b is not None]
            for key, master in masters.items():
                step = torch.randint(0, 2, master.shape, generator=generator, dtype=torch.int8) * 2 - 1
                held[key].copy_(master.add_(step, alpha=lr))
            total: dict[str, int] = {"used": 0}
            for old, (_, bucket) in zip(before, stream.buckets(0)):
                at = delta.positions(old, bucket.payload, old.numel())
                total["used"] += delta.encoded_bytes(old.numel(), at.numel())
                for kind, size in other_encodings(at, old.numel()).items():
                    total[kind] = total.get(kind, 0) + size
            rows.append({"lr": lr, "bytes": total})
            print(json.dumps(rows[-1]), flush=True)
    finally:
        engine.stop()
    return rows


def of_run(run: Path) -> Iterator[dict[str, Any]]:
    """Medians of a run's sync/* over its first, middle and last ten RL steps, and over the steps of its supervised phase."""
    from fp8slurm.observe.metrics import read_metrics

    records = [r for r in read_metrics(run) if "sync/changed_codes" in r]
    rl = [r for r in records if r["phase"] == "rl"]
    middle = len(rl) // 2
    parts = {"supervised": [r for r in records if r["phase"] == "sft"], "all RL": rl}
    if len(rl) >= 30:
        parts |= {"first 10": rl[:10], "middle 10": rl[middle - 5 : middle + 5], "last 10": rl[-10:]}
    for part, some in parts.items():
        if some:
            keys = [k for k in some[0] if k.startswith("sync/")]
            values = {k: statistics.median(r[k] for r in some) for k in keys}
            yield {"part": part, "steps": f"{some[0]['step']}-{some[-1]['step']}", "lr": some[-1].get("lr"), **values,
                   "sent": values["sync/sent_bytes"] / values["sync/bytes"]}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="4b", choices=["tiny", "4b", "30b-a3b"])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--bucket-mib", type=float, default=32)
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-6, 3e-6, 1e-5, 1e-4])
    parser.add_argument("--gbits", nargs="+", type=float, default=[0, 25, 10, 1], help="0: nothing is waited for")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.run is not None:
        rows = list(of_run(args.run))
        for row in rows:
            print(json.dumps(row))
    else:
        import torch

        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as folder:
            rows = measure(args, Path(folder))
        print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
