#!/usr/bin/env python3
"""A weight update from training ranks through a rollout worker into a real SGLang engine on the CPU: seconds by part, bytes, ratios.

The ranks hold random BF16 parameters in Megatron's shapes and run the WeightStream of a run; this process is the rollout worker
(Receiver, EngineLink) of an engine in block FP8. In turns with the updates, so that both see the same machine, the floor
is measured: all matrices quantized into ready memory, then the same bytes in one gloo broadcast, then the engine's own
load of these bytes, from their arrival to its answer. Medians over the runs; the first update is not counted.

usage: tools/bench/bench_sync.py [--shape tiny|4b|30b-a3b] [--layers 2] [--vocab N] [--tp 1] [--bucket-mib 32] [--runs 7] [--json OUT]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fp8slurm.engine.server import Engine
    from fp8slurm.models.spec import ModelSpec

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
SHAPES = {"4b": "Qwen3-4B", "30b-a3b": "Qwen3-30B-A3B"}


def config_of(args: argparse.Namespace) -> dict[str, Any]:
    """config.json of the shape, in block FP8."""
    import tiny

    from fp8slurm.models.spec import QuantizationSpec

    if args.shape == "tiny":
        config = {**tiny.model_config()}
    else:
        config = json.loads((ROOT / "fp8slurm/models/known" / f"{SHAPES[args.shape]}.json").read_text())
        config["num_hidden_layers"] = args.layers
    config |= {"quantization_config": QuantizationSpec().to_config(), "eos_token_id": 0, "bos_token_id": 0}
    return config | ({"vocab_size": args.vocab} if args.vocab else {})


def start_engine(args: argparse.Namespace, folder: Path) -> tuple[ModelSpec, Engine]:
    """The shape, written to folder/model, and an engine of it with dummy weights, on its way up."""
    from fp8slurm.config.schema import EngineSection
    from fp8slurm.engine.server import Engine, EngineSettings
    from fp8slurm.models.spec import ModelSpec

    (folder / "model").mkdir()
    (folder / "model/config.json").write_text(json.dumps(config_of(args)))
    section = EngineSection(max_running_requests=4, max_total_tokens=1024, context_length=256, ready_timeout_s=600,
                            extra_args=["--load-format", "dummy"])  # fmt: skip
    engine = Engine(folder / "model", folder / "log", EngineSettings(section, cpu=True, cpu_threads=1))
    engine.start()
    return ModelSpec.from_hf_dir(folder / "model"), engine


def child(folder: Path, rank: int, tp: int, bucket_bytes: int, runs: int) -> None:
    """A training rank: updates and floors in turns; rank 0 writes what it measured."""
    import torch
    import torch.distributed as dist

    from fp8slurm.fp8.block import BlockFP8
    from fp8slurm.fp8.quantize import quantize
    from fp8slurm.models.names import NameTable
    from fp8slurm.models.spec import ModelSpec
    from fp8slurm.sync.groups import Group, connect_store
    from fp8slurm.sync.stream import Cut, WeightStream

    store = connect_store(folder / "store.json", 120)
    dist.init_process_group("gloo", store=dist.PrefixStore("ranks", store), rank=rank, world_size=tp)
    spec = ModelSpec.from_hf_dir(folder / "model")
    generator = torch.Generator().manual_seed(rank)
    noise = (torch.randn(1 << 22, generator=generator) * 0.02).bfloat16()
    held = {}
    for i, e in enumerate(NameTable(spec)):
        shape = e.shard_shape(tp if e.tp_dim is not None and e.expert is None else 1)
        n = torch.Size(shape).numel()
        held[e.name] = noise.roll(i * 12345).repeat(-(-n // noise.numel()))[:n].reshape(shape)
    stream = WeightStream(
        NameTable(spec), lambda: iter(held.items()), spec.quantization, bucket_bytes, torch.bfloat16,
        Cut(rank, tp, dist.group.WORLD),
    )  # fmt: skip
    for name in stream.sources:
        store.set(f"sync/plan/{name}", stream.describe(name))
    groups = {n: Group(store, f"sync/{n}", 0, 2, "127.0.0.1") for n in stream.sources}
    shards = [held[p.entry.name] for p in stream.planned if p.quantized and p.part == 0]
    ready = [quantize(w) for w in shards]
    flat = torch.zeros(0, dtype=torch.uint8)
    measured = []
    for run in range(runs + 1):
        record: dict[str, Any] = {}
        store.wait([f"update/{run}"])
        start = time.perf_counter()
        stream.send(run, lambda name, bucket: groups[name].start_broadcast(bucket.payload, 0))
        store.wait([f"updated/{run}"])
        record["update"] = time.perf_counter() - start
        record["parts"], record["counts"] = dict(stream.seconds), dict(stream.counts)
        store.wait([f"floor/{run}"])
        if tp > 1:
            dist.barrier()
        start = time.perf_counter()
        for w, out in zip(shards, ready):
            quantize(w, out=BlockFP8(out.data, out.scale_inv))
        if tp > 1:
            dist.barrier()
        record["quantize"] = time.perf_counter() - start
        if rank == 0:
            if not flat.numel():
                flat = torch.zeros(int(store.get("bytes")), dtype=torch.uint8)
            store.wait([f"listening/{run}"])
            start = time.perf_counter()
            next(iter(groups.values())).broadcast(flat, 0)
            store.wait([f"heard/{run}"])
            record["broadcast"] = time.perf_counter() - start
        measured.append(record)
    (folder / f"rank{rank}.json").write_text(json.dumps(measured))
    store.set(f"left/{rank}", "")
    os._exit(0)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything, as JSON; the rollout worker's part is played here."""
    import torch

    from fp8slurm.engine.client import EngineClient
    from fp8slurm.models.names import NameTable
    from fp8slurm.sync.engine_link import EngineLink
    from fp8slurm.sync.groups import Group, host_store, publish
    from fp8slurm.sync.plan import source_names
    from fp8slurm.sync.receiver import HostReceiver
    from fp8slurm.sync.stream import parse_description
    from fp8slurm.sync.traffic import traffic

    bucket_bytes = int(args.bucket_mib * 2**20)
    spec, engine = start_engine(args, folder)
    store, port = host_store("127.0.0.1")
    publish(folder / "store.json", "127.0.0.1", port)
    children = []
    try:
        for rank in range(args.tp):
            command = [
                sys.executable,
                __file__,
                "--child",
                str(folder),
                str(rank),
                str(args.tp),
                str(bucket_bytes),
                str(args.runs),
            ]
            children.append(subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}))
        names = source_names(1, 1 if spec.is_moe else 0)
        plans = {n: parse_description(store.get(f"sync/plan/{n}").decode()) for n in names}
        groups = {n: Group(store, f"sync/{n}", 1, 2, "127.0.0.1") for n in names}
        receiver = HostReceiver(store, [(n, groups[n], plans[n]) for n in names], keep=True)
        expected = traffic(NameTable(spec), spec.quantization, bucket_bytes, tensor_parallel_size=args.tp)
        store.set("bytes", str(expected.payload))
        flat = torch.zeros(expected.payload, dtype=torch.uint8)
        engine.wait_ready()
        client = EngineClient(engine.url, engine.api_key, 600)
        link = EngineLink(client, 1)
        link.open()
        worker, loads = [], []
        for run in range(args.runs + 1):
            store.set(f"update/{run}", "")
            link.update(run, receiver.receive(run, run, verify=False))
            store.set(f"updated/{run}", "")
            worker.append(dict(link.seconds))
            assert link.counts == {"loaded": expected.loaded, "buckets": expected.buckets}, (link.counts, expected)
            store.set(f"floor/{run}", "")
            listening = groups[names[0]].start_broadcast(flat, 0)
            store.set(f"listening/{run}", "")
            listening.wait()
            store.set(f"heard/{run}", "")
            link.update(run, iter(receiver.held))
            loads.append(link.seconds["load"])
        link.verify(receiver.held)
        ours, four = [], []
        for i in range(21):
            start = time.perf_counter()
            link.update(2000 + i, iter(()))
            ours.append(time.perf_counter() - start)
            start = time.perf_counter()
            client.pause("retract")
            client.begin_update()
            client.end_update()
            client.resume()
            four.append(time.perf_counter() - start)
        link.close()
        for process in children:
            process.wait(120)
        ranks = [json.loads((folder / f"rank{r}.json").read_text()) for r in range(args.tp)]
    finally:
        engine.stop()
        for process in children:
            process.kill()
            process.wait()
    for r, rank in enumerate(ranks):
        for record in rank:
            want = expected.ranks[r]
            assert record["counts"] == {k: getattr(want, k) for k in record["counts"]}, (record["counts"], want)
    floors = [a["quantize"] + a["broadcast"] + load for a, load in zip(ranks[0], loads)][1:]
    updates = [a["update"] for a in ranks[0]][1:]
    middle = statistics.median
    return {
        "shape": args.shape, "layers": spec.num_layers, "vocab": spec.vocab_size, "tp": args.tp, "bucket_mib": args.bucket_mib,
        "runs": args.runs, "load_average": os.getloadavg()[0], "cpus": os.cpu_count(), "digest": "equal",
        "update": middle(updates), "floor": middle(floors), "ratio": middle(u / f for u, f in zip(updates, floors)),
        "floor_parts": {
            "quantize": middle(a["quantize"] for a in ranks[0][1:]),
            "broadcast": middle(a["broadcast"] for a in ranks[0][1:]),
            "load": middle(loads[1:]),
        },
        "trainer": [{k: middle(a["parts"][k] for a in rank[1:]) for k in rank[0]["parts"]} for rank in ranks],
        "worker": {k: middle(a[k] for a in worker[1:]) for k in worker[0]},
        "traffic": expected.as_dict(), "empty": middle(ours), "four_calls": middle(four),
        "updates": updates, "floors": floors,
    }  # fmt: skip


def report(r: dict[str, Any]) -> None:
    """Print the tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(
        f"{r['shape']}, {r['layers']} layers, vocabulary {r['vocab']}, trainer TP{r['tp']}, buckets of {r['bucket_mib']:g} MiB; "
        f"median of {r['runs']} runs, load average {r['load_average']:.1f} on {r['cpus']} CPUs"
    )
    times = Table("seconds", "where", "what")
    for i, rank in enumerate(r["trainer"]):
        for part, s in rank.items():
            times.add_row(f"{s:.4f}", f"rank {i}", part)
    for part, s in r["worker"].items():
        times.add_row(f"{s:.4f}", "worker", part)
    times.add_section()
    for part, s in r["floor_parts"].items():
        times.add_row(f"{s:.4f}", "floor", part)
    times.add_section()
    times.add_row(f"{r['update']:.4f}", "", f"whole update: {r['ratio']:.2f} x the floor of {r['floor']:.4f}")
    times.add_row(
        f"{r['empty']:.4f}", "", f"update without a bucket; the server's own four calls {r['four_calls']:.4f}"
    )
    console.print(times)
    t = r["traffic"]
    bytes_ = Table("bytes", "MB", "of BF16")
    rows = [("gathered by each other rank", max((x["gathered"] for x in t["ranks"][1:]), default=0), t["gather_bf16"] // max(1, r["tp"] - 1)),
            ("quantized matrices, scales included", t["quantized"], t["quantized_bf16"]),
            ("all: broadcast, and loaded by every engine rank", t["payload"], t["bf16"])]  # fmt: skip
    for what, n, bf16 in rows:
        bytes_.add_row(what, f"{n / 1e6:.2f}", f"{n / bf16:.4f}" if bf16 else "-")
    console.print(bytes_)
    console.print(f"{t['buckets']} buckets, {t['gathers']} messages to the source; counted at run time: the same")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=["tiny", *SHAPES], default="4b")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocab", type=int, help="rows of the embedding (left out: the model's)")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--bucket-mib", type=float, default=32)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        folder, *numbers = args.child
        child(Path(folder), *map(int, numbers))
    folder = Path(tempfile.mkdtemp(prefix="bench_sync_", dir=args.folder))
    try:
        result = measure(args, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    report(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
