#!/usr/bin/env python3
"""Weight updates over CUDA IPC, ours beside the way that most others take, in turns on one GPU.

Ours is a run's: WeightStream and EngineLink into an engine with our plugin. The other way, written here from what is public of
such projects: the BF16 parameters of a bucket are quantized one matrix after the other (by our kernel), joined with their names
to one flat tensor (SGLang's FlattenedTensorBucket), pickled as an IPC handle, and given to `update_weights_from_tensor` of a
plain `sglang.launch_server`, which loads tensor by tensor. Both end with a version and the engine generating again.

Servers begin with SGLang's dummy weights, so that no checkpoint has to be written: every parameter is updated anyway.

usage: update_peer.py [--model Qwen3-4B] [--updates 7] [--bucket-mib 512 1024] [--json FILE]
       update_peer.py --model tiny --cpu --bucket-mib 1        to try the script: our engine on both sides, over gloo
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "tools" / "gpu")]
os.environ.setdefault("SGLANG_JIT_DEEPGEMM_PRECOMPILE", "0")

import tiny  # noqa: E402
import torch  # noqa: E402
from random_model import KNOWN  # noqa: E402
from recipes import engine_arguments  # noqa: E402
from sync_probe import parameters  # noqa: E402
from turns import alone  # noqa: E402

from fp8slurm.config.schema import EngineSection  # noqa: E402
from fp8slurm.core.processes import python_path  # noqa: E402
from fp8slurm.engine.client import EngineClient, GenerateRequest  # noqa: E402
from fp8slurm.engine.server import Engine, EngineError, EngineSettings, server_arguments, visible_gpus  # noqa: E402
from fp8slurm.fp8.policy import decide  # noqa: E402
from fp8slurm.fp8.quantize import quantize  # noqa: E402
from fp8slurm.models.names import NameTable  # noqa: E402
from fp8slurm.models.spec import ModelSpec, QuantizationSpec  # noqa: E402
from fp8slurm.sync.engine_link import EngineLink  # noqa: E402
from fp8slurm.sync.mapped import MappedTransport  # noqa: E402
from fp8slurm.sync.stream import WeightStream  # noqa: E402
from fp8slurm.sync.transport import BroadcastTransport  # noqa: E402

Parts = dict[str, float]


class PlainServer:
    """`python -m sglang.launch_server` without anything of ours."""

    api_key = "none"

    def __init__(self, folder: Path, log: Path, settings: EngineSettings) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", log
        command = [sys.executable, "-m", "sglang.launch_server", *server_arguments(folder, settings, port)]
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"PYTHONPATH": python_path(), "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            command, stdout=log.open("w"), stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )

    def wait_ready(self, limit_s: float = 300) -> None:
        client, until = EngineClient(self.url, self.api_key, 20), time.time() + limit_s
        while True:
            try:
                client.generate([GenerateRequest([1, 2], 2)])
                return
            except EngineError:
                if self.process.poll() is not None or time.time() > until:
                    raise EngineError(f"the plain server is not up: {self.log.read_text()[-2000:]}") from None
                time.sleep(1)

    def stop(self) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def other_way(
    client: EngineClient, table: NameTable, held: dict[str, torch.Tensor], limit: int, clears: bool, version: int
) -> Parts:
    """One update the other way, in seconds by part. limit: bytes of BF16 parameters in a bucket; clears: give the
    allocator's cache back after each bucket, as those do who share the GPU with a trainer."""
    from sglang.srt.utils import MultiprocessingSerializer
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

    parts = dict.fromkeys(("session", "quantize", "flatten", "load", "clear"), 0.0)
    began = last = clock()

    def lap(part: str) -> None:
        nonlocal last
        parts[part] -= last
        last = clock()
        parts[part] += last

    client.pause("retract")
    client.flush_cache(if_idle=True)
    has_session = client.begin_update()  # SGLang from 0.5.21 loads nothing outside one
    lap("session")
    buckets = 0
    for names in chunks(held, limit):
        named: list[tuple[str, torch.Tensor]] = []
        for name in names:
            entry = table[name]
            for piece, target in zip(entry.split(held[name]), entry.tensors, strict=True):
                if decide(target.name, tuple(piece.data.shape)).quantize:
                    codes = quantize(piece.data.contiguous())
                    named += [(target.name, codes.data), (f"{target.name}_scale_inv", codes.scale_inv)]
                else:
                    named.append((target.name, piece.data))
        lap("quantize")
        flat = FlattenedTensorBucket(named_tensors=named)
        tensors = {"flattened_tensor": flat.get_flattened_tensor(), "metadata": flat.get_metadata()}
        handle = MultiprocessingSerializer.serialize(tensors, output_str=True)
        lap("flatten")
        client.receive_handles([handle])
        lap("load")
        buckets += 1
        del named, flat, tensors, handle
        if clears and torch.cuda.is_available():
            torch.cuda.ipc_collect()
            torch.cuda.empty_cache()
            lap("clear")
    if has_session:
        client.end_update()
    client.set_weight_version(version)
    client.resume()
    lap("session")
    return {"total": last - began, "buckets": float(buckets), **parts}


def chunks(held: dict[str, torch.Tensor], limit: int) -> Iterator[list[str]]:
    """Names in order, as many as fit into `limit` bytes."""
    chunk: list[str] = []
    size = 0
    for name, tensor in held.items():
        if chunk and size + tensor.nbytes > limit:
            yield chunk
            chunk, size = [], 0
        chunk.append(name)
        size += tensor.nbytes
    yield chunk


def write_config(model: str, folder: Path) -> Path:
    """A folder that says what the model is, in block FP8, and holds no weights."""
    config = tiny.model_config() if model == "tiny" else json.loads((KNOWN / f"{model}.json").read_text())
    quantization = QuantizationSpec(modules_to_not_convert=("lm_head",)).to_config()
    folder.mkdir(parents=True)
    ends = {"eos_token_id": 258, "bos_token_id": 256}
    (folder / "config.json").write_text(json.dumps(ends | config | {"quantization_config": quantization}))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen3-4B", help="tiny, or a shape of fp8slurm/models/known")
    parser.add_argument("--updates", type=int, default=7)
    parser.add_argument("--bucket-mib", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    logs = Path(tempfile.mkdtemp(prefix="update_peer_"))
    folder = write_config(args.model, logs / args.model)
    section = EngineSection(
        max_running_requests=16, max_total_tokens=8192, context_length=1024, mem_fraction=0.6,
        extra_args=["--load-format", "dummy", *([] if args.cpu else engine_arguments([]))],
    )  # fmt: skip
    settings = EngineSettings(section, cpu=args.cpu, cpu_threads=1, gpus=None if args.cpu else (visible_gpus()[0],))
    report: dict[str, Any] = {
        "torch": torch.__version__,
        "model": args.model,
        "other_server": "ours" if args.cpu else "plain",
    }
    if not args.cpu:
        report["gpu"] = torch.cuda.get_device_name()
    ours = Engine(folder, logs, settings, "ours")
    other: Any = None
    try:
        ours.start()
        if args.cpu:  # SGLang has no kernels there without our stand-ins
            from fp8slurm.cpu import sglang_stubs

            os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
            sglang_stubs.install()
            torch.multiprocessing.set_sharing_strategy("file_system")  # the other one wants a key that the server lacks
            other = Engine(folder, logs, settings, "other")
            other.start()
        else:
            other = PlainServer(folder, logs / "other.log", settings)
        spec = ModelSpec.from_hf_dir(folder)
        table = NameTable(spec)
        held = parameters(table, "cpu" if args.cpu else "cuda")
        stream = WeightStream(
            table, lambda: iter(held.items()), spec.quantization, args.bucket_mib[0] << 20, torch.bfloat16
        )
        other.wait_ready()
        ours.wait_ready()
        client, theirs = (EngineClient(e.url, e.api_key, 600) for e in (ours, other))
        link = EngineLink(client, 1, BroadcastTransport() if args.cpu else MappedTransport())
        link.open()

        def our_way(version: int) -> Parts:
            began = clock()
            link.update(version, (bucket for _, bucket in stream.buckets(version)))
            return {"total": clock() - began, **stream.seconds, **link.seconds}

        ways: dict[str, Callable[[int], Parts]] = {"ours": our_way}
        for mib in args.bucket_mib:
            for clears in (True, False):
                name = f"other {mib} MiB" + ("" if clears else ", cache not cleared")
                ways[name] = lambda version, m=mib, c=clears: other_way(theirs, table, held, m << 20, c, version)
        runs: dict[str, list[Parts]] = {name: [] for name in ways}
        with alone("update"):
            for version in range(1, args.updates + 2):
                for name, way in ways.items():
                    runs[name].append(way(version))
                print(version, {name: round(r[-1]["total"], 4) for name, r in runs.items()}, flush=True)
                if version > 1:  # the first compiles, maps and allocates
                    report["median"] = {
                        n: {p: statistics.median(r[p] for r in rs[1:]) for p in rs[0]} for n, rs in runs.items()
                    }
                report["all"] = {name: [r["total"] for r in rs] for name, rs in runs.items()}
                if args.json:
                    args.json.write_text(json.dumps(report, indent=1))
        # both have the same weights now: the same greedy tokens, or one of the ways loads something else
        request = [GenerateRequest([5, 6, 7], 8, temperature=0.0)]
        report["greedy"] = [c.generate(request)[0].token_ids for c in (client, theirs)]
        mine, others = (c.model_info().get("weight_version") for c in (client, theirs))
        report["versions"] = [mine, others]
    finally:
        ours.stop()
        if other is not None:
            other.stop()
        if args.json:
            args.json.write_text(json.dumps(report, indent=1))
    print(json.dumps({k: report.get(k) for k in ("median", "greedy", "versions")}, indent=1))
    sys.exit(0 if report["greedy"][0] == report["greedy"][1] else f"different tokens: {report['greedy']}")


if __name__ == "__main__":
    main()
