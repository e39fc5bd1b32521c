#!/usr/bin/env python3
"""hf-to-fp8 against a floor of plain read, quantize and write loops; seconds, GB/s, CPU seconds, peak memory.

Makes a checkpoint of the first layers of a known model (12 of Qwen3-4B: 2.42 GB), with a vocabulary of 2048, in /dev/shm,
converts it in a process of its own per run, and prints medians. Before every run as much of the folder's file system as the
output takes is written and freed again: memory that a virtual machine has never touched costs more than the work. Seconds are
counted after the imports. Floor and converter alternate, so that both see the same machine. With --circle the other
converters follow, and HF -> torch_dist -> FP8 is compared with HF -> FP8 byte by byte.

usage: tools/bench/bench_convert.py [--model Qwen3-4B] [--layers 12] [--runs 5] [--jobs N] [--folder /dev/shm] [--circle]
                                    [--json OUT]
"""

import argparse
import filecmp
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
KNOWN = ROOT / "fp8slurm" / "models" / "known"
CIRCLE = ("hf-to-torch-dist", "torch-dist-to-hf", "torch-dist-to-fp8")
PIECE = 4 << 20


def make_model(folder: Path, model: str, layers: int) -> int:
    """Write the checkpoint in shards of one layer; returns its size in bytes."""
    import torch
    from safetensors.torch import save_file

    from fp8slurm.models.names import NameTable
    from fp8slurm.models.spec import ModelSpec

    config = json.loads((KNOWN / f"{model}.json").read_text()) | {"num_hidden_layers": layers, "vocab_size": 2048}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    noise = (torch.randn(1 << 26, generator=generator) * 0.02).bfloat16()
    groups: dict[str, dict[str, torch.Size]] = {}
    for name, t in NameTable(ModelSpec.from_hf_config(config)).hf_tensors().items():
        groups.setdefault(name.split(".")[2] if ".layers." in name else "rest", {})[name] = torch.Size(t.shape)
    weight_map, total, made = {}, 0, 0
    for key, shapes in groups.items():
        tensors = {}
        for name, shape in shapes.items():
            start = made * 12345 % (noise.numel() - shape.numel())
            tensors[name] = noise[start : start + shape.numel()].view(shape).clone()
            made += 1
        save_file(tensors, folder / f"layer-{key}.safetensors", metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, f"layer-{key}.safetensors")
        total += sum(t.numel() * 2 for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _peak_mib() -> float:
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmHWM:")[1].split()[0]) / 1024


def _timed(do: Callable[[], Any]) -> dict[str, float]:
    imported = _peak_mib()
    cpu, begin = time.process_time(), time.perf_counter()
    do()
    return {
        "seconds": time.perf_counter() - begin,
        "cpu": time.process_time() - cpu,
        "peak_mib": _peak_mib(),
        "imports_mib": imported,
    }


def _in_threads(jobs: int, do: Callable[[int], None]) -> None:
    threads = [threading.Thread(target=do, args=(i,)) for i in range(jobs)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()


def child_convert(src: str, dst: str, jobs: int, verify: bool) -> dict[str, float]:
    """One conversion in this process."""
    from fp8slurm.checkpoint import hf_to_fp8

    return _timed(lambda: hf_to_fp8(src, dst, jobs=jobs, verify=verify))


def child_circle(kind: str, src: str, dst: str, jobs: int) -> dict[str, float]:
    """One of the other conversions in this process; the Hugging Face folder is `src` beside a torch_dist one."""
    from fp8slurm import checkpoint

    convert = getattr(checkpoint, kind.replace("-", "_"))
    origin = {} if kind == "hf-to-torch-dist" else {"origin_hf_dir": Path(src).with_name("src")}
    return _timed(lambda: convert(src, dst, jobs=jobs, **origin))


def child_floor(src: str, dst: str, jobs: int) -> dict[str, Any]:
    """Plain loops over as many bytes and elements: read all files; quantize one piece again and again; write codes."""
    import torch

    from fp8slurm.fp8.block import BlockFP8
    from fp8slurm.fp8.quantize import quantize

    torch.set_num_threads(1)
    files = sorted(Path(src).glob("*.safetensors"))
    elements = sum(f.stat().st_size for f in files) // 2
    rows, k = PIECE // 2 // 2560 // 128 * 128, 2560
    Path(dst).mkdir()

    def read(job: int) -> None:
        buffer = bytearray(PIECE)
        for file in files[job::jobs]:
            with file.open("rb", buffering=0) as f:
                while f.readinto(buffer):
                    pass

    def work(job: int) -> None:
        w = (torch.randn(rows, k) * 0.02).bfloat16()
        out = quantize(w)
        for _ in range(elements // (rows * k * jobs)):
            quantize(w, out=BlockFP8(out.data, out.scale_inv))

    def write(job: int) -> None:
        data = bytes(PIECE // 2)
        with (Path(dst) / f"{job}.bin").open("wb", buffering=0) as f:
            for _ in range(elements // (len(data) * jobs)):
                f.write(data)

    result: dict[str, Any] = {}

    def all_three() -> None:
        for name, loop in (("read", read), ("quantize", work), ("write", write)):
            begin = time.perf_counter()
            _in_threads(jobs, loop)
            result[name] = time.perf_counter() - begin

    return _timed(all_three) | result


def touch(folder: Path, nbytes: int) -> None:
    """Write and free that many bytes."""
    path = folder / "touch.bin"
    block = bytes(1 << 22)
    with path.open("wb", buffering=0) as f:
        for _ in range(nbytes // len(block) + 1):
            f.write(block)
    path.unlink()


def run_child(arguments: list[str], folder: Path, size: int, keep: bool = False) -> dict[str, Any]:
    touch(folder, size)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    out = subprocess.run(
        [sys.executable, __file__, "--child", *arguments], check=True, capture_output=True, text=True, env=environment
    )
    if not keep:
        shutil.rmtree(arguments[2])
    return json.loads(out.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=sorted(p.stem for p in KNOWN.glob("*.json")), default="Qwen3-4B")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--circle", action="store_true", help="measure the other converters, too, and compare bytes")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        kind, src, dst, jobs = args.child
        if kind in CIRCLE:
            done = child_circle(kind, src, dst, int(jobs))
        elif kind == "floor":
            done = child_floor(src, dst, int(jobs))
        else:
            done = child_convert(src, dst, int(jobs), kind == "verified")
        print(json.dumps(done))
        return
    folder = Path(tempfile.mkdtemp(prefix="bench_convert_", dir=args.folder))
    try:
        size = make_model(folder / "src", args.model, args.layers)
        kinds = ("floor", "unverified", "verified")
        runs: dict[str, list[dict[str, Any]]] = {k: [] for k in (*kinds, *CIRCLE * args.circle)}
        for _ in range(args.runs):
            for kind in kinds:
                runs[kind].append(
                    run_child([kind, str(folder / "src"), str(folder / "out"), str(args.jobs)], folder, size * 6 // 10)
                )
            for kind in CIRCLE * args.circle:
                src, dst = ("src", "ckpt") if kind == CIRCLE[0] else ("ckpt", "circle")
                arguments = [kind, str(folder / src), str(folder / dst), str(args.jobs)]
                last = kind == CIRCLE[-1]
                runs[kind].append(run_child(arguments, folder, size, keep=dst == "ckpt" or last))
                if last:
                    shutil.rmtree(folder / "ckpt")
                    compare(folder, args.jobs)
                    shutil.rmtree(folder / "circle")
        report(args, size, runs)
    finally:
        shutil.rmtree(folder)


def compare(folder: Path, jobs: int) -> None:
    """HF -> FP8 once more, against HF -> torch_dist -> FP8: every file has to be equal."""
    run_child(["unverified", str(folder / "src"), str(folder / "direct"), str(jobs)], folder, 0, keep=True)
    names = {p.name for name in ("direct", "circle") for p in (folder / name).iterdir()}
    different = [
        n for n in sorted(names) if not filecmp.cmp(folder / "direct" / n, folder / "circle" / n, shallow=False)
    ]
    if different:
        sys.exit(f"HF -> torch_dist -> FP8 differs from HF -> FP8 in {', '.join(different)}")
    print(f"HF -> torch_dist -> FP8 equals HF -> FP8 in every byte of {len(names)} files")
    shutil.rmtree(folder / "direct")


def report(args: argparse.Namespace, size: int, runs: dict[str, list[dict[str, Any]]]) -> None:
    """Print the table, and write it as JSON if asked."""
    median = {k: {m: statistics.median(r[m] for r in rs) for m in rs[0]} for k, rs in runs.items()}
    floor = median["floor"]["seconds"]
    load = os.getloadavg()[0]
    print(
        f"{size / 1e9:.2f} GB in, {args.layers} layers of {args.model}, {args.jobs} threads, median of {args.runs} runs; "
        f"load average {load:.1f}"
    )
    print(
        f"{'':17} {'seconds':>8} {'min':>6} {'max':>6} {'x floor':>8} {'GB/s in':>8} {'CPU s':>7} {'peak MiB':>9} "
        f"{'above imports':>14}"
    )
    for kind, m in median.items():
        seconds = [r["seconds"] for r in runs[kind]]
        print(
            f"{kind:17} {m['seconds']:8.2f} {min(seconds):6.2f} {max(seconds):6.2f} {m['seconds'] / floor:8.2f} "
            f"{size / m['seconds'] / 1e9:8.2f} {m['cpu']:7.2f} {m['peak_mib']:9.0f} "
            f"{m['peak_mib'] - m['imports_mib']:14.0f}"
        )
    f = median["floor"]
    print(
        f"floor: read {f['read']:.2f} s, quantize {f['quantize']:.2f} s "
        f"({size / 2 / f['quantize'] / 1e9:.2f} G elements/s), write {f['write']:.2f} s"
    )
    if args.json:
        args.json.write_text(json.dumps({"bytes": size, "load": load, "runs": runs, "median": median}, indent=1))


if __name__ == "__main__":
    main()
