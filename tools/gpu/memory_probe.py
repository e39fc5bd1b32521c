#!/usr/bin/env python3
"""What a Megatron rank keeps on its GPU when it makes room for engines, after every step, and which tensors that is.

usage: memory_probe.py MODEL [--steps 6] [--tokens 8192] [--backend transformer_engine] [--tensor-parallel-size 1]
                       [--no-expandable]

MODEL: a Hugging Face folder. The first rank reports. Sequences have random lengths, so that no two steps ask for the same
sizes. Without a GPU it goes through the same steps (--backend emulated) and has nothing to report.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from fp8slurm.config import parse  # noqa: E402
from fp8slurm.data.prompts import SftExample  # noqa: E402
from fp8slurm.models.spec import ModelSpec  # noqa: E402
from fp8slurm.rl.loss import sft_loss  # noqa: E402
from fp8slurm.rl.packing import pack_sft  # noqa: E402

OURS = ("fp8slurm", "megatron", "transformer_engine")
LARGE = 1 << 20


def origin(block: dict[str, Any]) -> str:
    """The innermost lines of this project, Megatron or TransformerEngine that allocated a block."""
    frames = [f for f in block.get("frames", []) if any(name in f["filename"] for name in OURS)]
    return (
        " < ".join(f"{Path(f['filename']).name}:{f['line']} {f['name']}" for f in frames[:3])
        or "before the history began"
    )


def whole() -> float:
    """GB used of the GPU by everybody, contexts and libraries included."""
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 1e9


def report(step: str, at_most: dict[str, float]) -> None:
    """Kept, in use, gaps by pool; live blocks by origin."""
    kept, used = torch.cuda.memory_reserved() / 1e9, torch.cuda.memory_allocated() / 1e9
    most = "".join(
        f", {name[7:].replace('_', ' ')} {gb:.3f}"
        for name, gb in at_most.items()
        if name in ("memory/peak", "memory/reserved")
    )
    print(f"{step}: kept {kept:.3f} GB, in use {used:.3f}{most}; of the whole GPU {whole():.3f}", flush=True)
    gaps: Counter[str] = Counter()
    live: Counter[str] = Counter()
    number: Counter[str] = Counter()
    for segment in torch.cuda.memory_snapshot():
        pool = f"{segment['segment_type']}, stream {segment['stream']}, {'expandable' if segment.get('is_expandable') else 'cudaMalloc'}"
        for block in segment["blocks"]:
            if block["state"] == "inactive":
                gaps[pool] += block["size"]
            else:
                kind = f"{'large' if block['size'] >= LARGE else 'small'}: {origin(block)}"
                live[kind] += block["size"]
                number[kind] += 1
    for pool, size in gaps.most_common(6):
        print(f"    gaps {size / 1e9:.3f} GB in {pool}")
    for kind, size in live.most_common(12):
        print(f"    live {size / 1e9:.3f} GB in {number[kind]} blocks, {kind}", flush=True)


def work(rank: int, args: argparse.Namespace, store: str) -> None:
    """One of args.tensor_parallel_size ranks; the first reports."""
    if args.no_expandable:
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:False"
    from fp8slurm.trainer.start import start, stop

    n = args.tensor_parallel_size
    flags = ["--model.hf-checkpoint", str(args.model), "--fp8.backend", args.backend, "--train.recompute", "full"]
    flags += ["--slurm.ranks-per-node", str(n), "--parallel.tensor-parallel-size", str(n)]
    config = parse(None, flags + ["--parallel.sequence-parallel"] * (n > 1))
    start(config, rank, n, dist.FileStore(store, n), rank)
    from fp8slurm.trainer.trainer import Trainer

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.memory._record_memory_history(enabled="state", context="state", stacks="python")
        if rank == 0:
            print(f"before the model: of the whole GPU {whole():.3f} GB", flush=True)
    trainer = Trainer(config, ModelSpec.from_hf_dir(args.model))
    trainer.load_hf(args.model)
    generator = torch.Generator().manual_seed(0)

    def batches() -> list[Any]:
        lengths = torch.randint(64, max(65, args.tokens // 16), (64,), generator=generator).tolist()
        draw = lambda n: tuple(torch.randint(0, 256, (n,), generator=generator).tolist())  # noqa: E731
        examples = [SftExample(draw(n // 2), draw(n - n // 2)) for n in lengths]
        sizes = {"tokens_per_micro_batch": args.tokens, "pad_multiple": trainer.pad_multiple}
        return pack_sft(examples, data_parallel_size=1, **sizes)[0]

    trainer.settle_memory()
    trainer.warm_up(batches())
    trainer.make_room()
    for step in range(args.steps + 1):
        if cuda and rank == 0:
            report(f"step {step}" if step else "after the warm-up", trainer.memory)
        if step < args.steps:
            mine = batches()
            trainer.logprobs(mine)
            result = trainer.train_step(mine, sft_loss, 1e-5, with_entropy=True)
            if rank == 0:
                print(f"loss {result.loss:.4f}", flush=True)
            trainer.make_room()
    stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=8192, help="in a micro-batch")
    parser.add_argument("--backend", default="transformer_engine", choices=["transformer_engine", "emulated", "off"])
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="ranks, and GPUs")
    parser.add_argument("--no-expandable", action="store_true")
    args = parser.parse_args()
    if args.tensor_parallel_size < 1:
        parser.error(f"--tensor-parallel-size {args.tensor_parallel_size}: at least 1")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (args, f"{folder}/store"), args.tensor_parallel_size)


if __name__ == "__main__":
    main()
