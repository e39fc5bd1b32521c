#!/usr/bin/env python3
"""Training step of one GPU, BF16 against FP8: tokens/s, TFLOP/s, memory. Each precision is a process of its own.

usage: bench_train.py [--model Qwen3-4B] [--tokens 8192 16384] [--layers N] [--backend off] [--json FILE] [--profile FILE]
With --profile one more step is made under torch's profiler: where the GPU's time goes, by kind of kernel and by kernel.
A mixture of experts in BF16 is measured with TransformerEngine's CUTLASS grouped products and with cuBLAS's ("grouped"); --backend deep_gemm
is FP8 with `fp8.grouped = "deep_gemm"`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools" / "gpu")]
SEQUENCE = 2048
ROW = "row: "
"""Begins a result among what libraries print."""


def measure(
    model: Path, backend: str, sizes: list[int], recompute: str, rounds: int, profiled: bool = False
) -> Iterator[dict]:
    """For each number of tokens, and each way of grouped products: medians of `rounds` optimizer steps on one packed
    micro-batch of sequences of SEQUENCE tokens."""
    import torch
    import torch.distributed as dist

    from fp8slurm.config import parse
    from fp8slurm.models.spec import ModelSpec
    from fp8slurm.trainer.start import start

    cuda = torch.cuda.is_available()
    flags = ["--model.hf-checkpoint", str(model), "--train.recompute", recompute]
    flags += ["--fp8.backend", "transformer_engine" if backend == "deep_gemm" else backend]
    flags += ["--fp8.grouped", "deep_gemm"] if backend == "deep_gemm" else []
    config = parse(None, flags)
    start(config, 0, 1, dist.FileStore(tempfile.mktemp(), 1))
    from fp8slurm.trainer.trainer import Trainer

    spec = ModelSpec.from_hf_dir(model)
    t = Trainer(config, spec)
    with torch.no_grad():
        for p in t.module.parameters():
            p.fill_(1.0) if p.dim() == 1 else p.normal_(0, 0.02)
    t.optimizer.reload_model_params()
    grouped = ["cublas", "cutlass"] if cuda and spec.num_experts and backend == "off" else [None]
    for tokens in sizes:
        for way in grouped:
            if way:  # TransformerEngine reads it at every product
                os.environ["NVTE_USE_CUTLASS_GROUPED_GEMM"] = str(int(way == "cutlass"))
            row = measure_size(t, spec, tokens, rounds, profiled and cuda)
            yield {"backend": backend, "recompute": recompute} | ({"grouped": way} if way else {}) | row


def measure_size(t: Any, spec: Any, tokens: int, rounds: int, profiled: bool) -> dict:
    """One row of `measure`, with the trainer as it is."""
    import torch

    from fp8slurm.data.prompts import SftExample
    from fp8slurm.rl.loss import sft_loss
    from fp8slurm.rl.packing import pack_sft

    cuda = torch.cuda.is_available()
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: tuple(torch.randint(0, spec.vocab_size, (n,), generator=generator).tolist())  # noqa: E731
    length = min(SEQUENCE, tokens)
    examples = [SftExample(draw(1), draw(length - 1)) for _ in range(tokens // length)]
    batches = pack_sft(examples, data_parallel_size=1, tokens_per_micro_batch=tokens, pad_multiple=t.pad_multiple)[0]
    assert sum(len(b.tokens) for b in batches) == tokens, [len(b.tokens) for b in batches]
    sync = torch.cuda.synchronize if cuda else lambda: None
    parts: dict[str, list[float]] = {"step": [], "forward_backward": []}
    said: dict[str, list[float]] = {"losses": [], "grad_norms": []}
    run = t._run

    def timed_run(*args, **kwargs):
        sync()
        began = time.perf_counter()
        out = run(*args, **kwargs)
        sync()
        parts["forward_backward"].append(time.perf_counter() - began)
        return out

    if cuda:
        torch.cuda.reset_peak_memory_stats()
    t._run = timed_run
    try:
        for _ in range(rounds + 2):
            sync()
            began = time.perf_counter()
            result = t.train_step(batches, sft_loss, 1e-6)
            sync()
            parts["step"].append(time.perf_counter() - began)
            said["losses"].append(result.loss)
            said["grad_norms"].append(result.grad_norm)
    finally:
        t._run = run
    assert result.ok, "the step was skipped"
    profile = profile_step(lambda: t.train_step(batches, sft_loss, 1e-6)) if profiled else None
    seconds = {k: statistics.median(v[2:]) for k, v in parts.items()}
    share = spec.experts_per_token / spec.num_experts if spec.is_moe else 1.0  # of the experts, a token's
    linear = sum(
        p.numel() * (share if ".experts." in n else 1.0)
        for n, p in t.module.named_parameters()
        if p.dim() == 2 and "embedding" not in n
    )
    if spec.tie_word_embeddings:
        linear += spec.vocab_size * spec.hidden_size
    # causal attention: QK^T and PV, forward and twice that backward, over half of each sequence's square
    attention = 6 * spec.num_layers * spec.num_heads * spec.head_dim * length * tokens
    flop = 6 * linear * tokens + attention
    memory = torch.cuda.max_memory_allocated() / 1e9 if cuda else float("nan")
    return {
        "tokens": tokens, "seconds": seconds["step"], "all": parts["step"],
        "forward_backward_s": seconds["forward_backward"], "tokens_per_s": tokens / seconds["step"],
        "tflops": flop / seconds["forward_backward"] / 1e12, "memory_gb": memory, "loss": result.loss,
    } | said | ({"profile": profile} if profile else {})  # fmt: skip


KINDS = {
    "quantize": ("quantize", "block_scaled", "blockwise", "swizzle"),
    "attention": ("flash", "fmha", "sdpa", "attention", "fused_attn"),
    "gemm": ("gemm", "nvjet", "cutlass", "xmma", "cublas"),
    "optimizer and gradient norm": ("multi_tensor", "adam"),
    "norms": ("norm",),
    "rope and activation": ("rope", "swiglu", "silu", "triton_poi", "activation"),
    "copies and fills": ("memcpy", "memset", "copy", "fill"),
    "reductions": ("reduce",),
}
"""Kind of kernel -> parts of names, the first that fits decides; what is left is elementwise."""


def profile_step(step: Callable[[], object]) -> dict:
    """GPU milliseconds of one step by kind of kernel and by kernel, and the time in which no kernel ran."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        step()
        torch.cuda.synchronize()
    kinds: dict[str, float] = {}
    kernels: dict[str, list[float]] = {}
    spans = []
    for event in recorded.events():
        if event.device_type != torch.autograd.DeviceType.CUDA or getattr(event, "is_user_annotation", False):
            continue
        began, ended = event.time_range.start, event.time_range.end
        name = event.name.lower()
        kind = next((k for k, parts in KINDS.items() if any(part in name for part in parts)), "elementwise")
        kinds[kind] = kinds.get(kind, 0) + (ended - began) / 1e3
        seen = kernels.setdefault(event.name[:120], [0, 0])
        seen[0], seen[1] = seen[0] + (ended - began) / 1e3, seen[1] + 1
        spans.append((began, ended))
    spans.sort()
    busy, until = 0.0, 0.0
    for began, ended in spans:
        busy += max(0.0, ended - max(began, until))
        until = max(until, ended)
    top = sorted(kernels.items(), key=lambda item: -item[1][0])[:60]
    return {
        "span_ms": (until - spans[0][0]) / 1e3,
        "idle_ms": (until - spans[0][0] - busy) / 1e3,
        "kinds_ms": dict(sorted(kinds.items(), key=lambda item: -item[1])),
        "kernels": [{"name": name, "ms": ms, "calls": calls} for name, (ms, calls) in top],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen3-4B", help="a folder, or a shape of fp8slurm/models/known")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 16384])
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--recompute", default="none", choices=["none", "full"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--profile", type=Path, help="where the profiles go, JSON")
    parser.add_argument("--backend", choices=["off", "fp8", "deep_gemm"], help="only this one (default: the first two)")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    import torch

    model = Path(args.model)
    if not model.is_dir():
        from random_model import KNOWN

        config = json.loads((KNOWN / f"{args.model}.json").read_text())
        if args.layers:
            config["num_hidden_layers"] = args.layers
        model = Path(tempfile.mkdtemp())
        (model / "config.json").write_text(json.dumps(config))
    if args.one:
        for row in measure(model, args.one, args.tokens, args.recompute, args.rounds, args.profile is not None):
            print(ROW + json.dumps(row), flush=True)
        return
    backends = ["off", "transformer_engine" if torch.cuda.is_available() else "emulated"]
    if args.backend:
        backends = {"off": backends[:1], "fp8": backends[1:], "deep_gemm": ["deep_gemm"]}[args.backend]
    rows, profiles, failed = [], [], False
    for backend in backends:
        again = [sys.executable, __file__, "--model", str(model), "--recompute", args.recompute]
        again += ["--rounds", str(args.rounds), "--tokens", *map(str, args.tokens), "--one", backend]
        again += ["--profile", str(args.profile)] if args.profile else []
        child = subprocess.Popen(again, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        errors: list[str] = []
        reader = threading.Thread(target=lambda pipe=child.stderr, to=errors: to.extend(pipe))
        reader.start()
        assert child.stdout is not None
        for line in child.stdout:
            if not line.startswith(ROW):
                continue
            rows.append(json.loads(line.removeprefix(ROW)))
            if "profile" in rows[-1]:
                named = {k: rows[-1][k] for k in ("backend", "tokens", "grouped") if k in rows[-1]}
                profiles.append(named | rows[-1].pop("profile"))
                print(json.dumps({k: v for k, v in profiles[-1].items() if k != "kernels"}), flush=True)
            print(json.dumps(rows[-1]), flush=True)
            if args.json:  # as it goes: what is measured is there whatever comes next
                args.json.write_text(json.dumps(rows, indent=1))
        status = child.wait()
        reader.join()
        if status:
            failed = True
            tail = [line.strip() for line in errors if line.strip()][-3:]
            print(f"{backend}: failed with status {status}: {' | '.join(tail)}", flush=True)
    if args.profile:
        args.profile.write_text(json.dumps(profiles, indent=1))
    sys.exit(failed)


if __name__ == "__main__":
    main()
