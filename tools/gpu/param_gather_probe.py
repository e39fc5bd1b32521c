#!/usr/bin/env python3
"""FP8 primary weights on one GPU: steps with fp8.param_gather on against off, what is synced, what a checkpoint holds.

usage: param_gather_probe.py [--cases tiny Qwen3-4B:4:checkpoint Qwen3-4B] [--tokens 8192] [--folder FOLDER] [--json FILE]

A case is SHAPE[:LAYERS][:checkpoint]. Every process prints JSON lines; a part that fails prints its traceback's end and the
next one goes on. Losses of on and off should agree within FP8's noise (both quantize bf16(master)); the bytes have to be equal.
host_adam_probe.py does the same with Adam in host memory.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools" / "gpu")]
STEPS, MORE = 5, 2


def say(**record: Any) -> None:
    print(json.dumps(record), flush=True)


def part(name: str, work: Callable[[], dict[str, Any]], **where: Any) -> bool:
    """Run and print one part; whether it passed."""
    began = time.perf_counter()
    try:
        record = work()
        passed = not any(v is False for v in record.values())
    except Exception:  # noqa: BLE001 - the next part is worth its own try
        record, passed = {"traceback": traceback.format_exc()[-3000:]}, False
    say(part=name, passed=passed, **where, **record, took_s=round(time.perf_counter() - began, 2))
    return passed


def trainer_of(model: Path, *flags: str) -> Any:
    """A started trainer with nothing loaded."""
    import torch.distributed as dist

    from fp8slurm.config import parse
    from fp8slurm.models.spec import ModelSpec
    from fp8slurm.trainer import start

    config = parse(None, ["--model.hf-checkpoint", str(model), "--fp8.backend", "transformer_engine", *flags])
    start.start(config, 0, 1, dist.FileStore(tempfile.mktemp(), 1))
    from fp8slurm.trainer.trainer import Trainer

    return Trainer(config, ModelSpec.from_hf_dir(model))


def batches_of(t: Any, tokens: int) -> list[Any]:
    import torch

    from fp8slurm.data.prompts import SftExample
    from fp8slurm.rl.packing import pack_sft

    generator = torch.Generator().manual_seed(0)
    top = min(256, t.spec.vocab_size)
    draw = lambda n: tuple(torch.randint(0, top, (n,), generator=generator).tolist())  # noqa: E731
    length = min(2048, tokens)
    examples = [SftExample(draw(1), draw(length - 1)) for _ in range(tokens // length)]
    return pack_sft(examples, data_parallel_size=1, tokens_per_micro_batch=tokens, pad_multiple=t.pad_multiple)[0]


def steps(t: Any, tokens: int, n: int, lr: float) -> dict[str, Any]:
    """n optimizer steps; losses, median seconds without the first two, memory."""
    import torch

    from fp8slurm.rl.loss import sft_loss

    batches, losses, norms, seconds = batches_of(t, tokens), [], [], []
    torch.cuda.reset_peak_memory_stats()
    for _ in range(n):
        torch.cuda.synchronize()
        began = time.perf_counter()
        result = t.train_step(batches, sft_loss, lr)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        assert result.ok, f"the step was skipped: {result}"
        losses.append(result.loss / tokens)
        norms.append(result.grad_norm)
    return {
        "losses": losses,
        "grad_norms": norms,
        "step_s": statistics.median(seconds[min(2, n - 1) :]),
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
        "held_gb": torch.cuda.memory_allocated() / 1e9,
    }


def digest(*tensors: Any) -> str:
    import torch

    sha = hashlib.sha256()
    for t in tensors:
        sha.update(t.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return sha.hexdigest()[:16]


def digests(t: Any) -> dict[str, list[str]]:
    """Of every parameter: codes and scales (or values), transposed codes, master."""
    from fp8slurm.trainer import primary_fp8

    masters = primary_fp8.Masters(t.optimizer)
    out = {}
    for entry, p, _ in t.shards.parameters:
        if primary_fp8.is_primary(p):
            q = primary_fp8.codes_and_scales(p, entry.name)
            out[entry.name] = [
                digest(q.data, q.scale_inv),
                digest(p._columnwise_data) if p._columnwise_data is not None else "",
            ]
        else:
            out[entry.name] = [digest(p), ""]
        out[entry.name].append(digest(masters.own[p][0]))
    return out


def names(t: Any) -> dict[str, Any]:
    from fp8slurm.trainer import primary_fp8

    weight = next(p for _, p, _ in t.shards.parameters if primary_fp8.is_primary(p))
    data = weight._rowwise_data.data_ptr()
    inside = any(b.param_data.data_ptr() <= data < b.param_data.data_ptr() + b.param_data.nbytes for b in t.ddp.buffers)
    return {
        "fp8_parameters": len(t.primary_fp8), "first": t.primary_fp8[:8], "class": type(weight).__name__,
        "scale_shape": list(weight._rowwise_scale_inv.shape), "codes_shape": list(weight._rowwise_data.shape),
        "transposed": "kept" if weight._columnwise_data is not None else "none", "codes_in_ddp_buffer": inside,
        "high_precision": [e.name for e, p, _ in t.shards.parameters if not primary_fp8.is_primary(p)][:8],
        "buffers": [[str(b.param_dtype), b.numel] for b in t.ddp.buffers],
    }  # fmt: skip


def primary_bytes(t: Any) -> dict[str, Any]:
    """Primary codes against quantize(bf16(master)), ours and TransformerEngine's; the transposed codes against the codes."""
    import torch

    from fp8slurm.fp8.quantize import quantize
    from fp8slurm.trainer import primary_fp8

    masters, other, te, transposed, scales, n = primary_fp8.Masters(t.optimizer), 0, 0, 0, 0, 0
    first = ""
    for entry, p, _ in t.shards.parameters:
        if not primary_fp8.is_primary(p):
            continue
        q, whole = primary_fp8.codes_and_scales(p, entry.name), masters.whole(p)
        again = quantize(whole)
        codes = int((again.data.view(torch.uint8) != q.data.view(torch.uint8)).sum())
        scale = int((again.scale_inv != q.scale_inv).sum())
        if (codes or scale) and not first:
            first = f"{entry.name}: {codes} codes, {scale} scales"
        other, scales, n = other + codes, scales + scale, n + q.data.numel()
        made = primary_fp8.codes_and_scales(p._get_quantizer()(whole))
        te += int((made.data.view(torch.uint8) != q.data.view(torch.uint8)).sum()) + int(
            (made.scale_inv != q.scale_inv).sum()
        )
        if p._columnwise_data is not None:
            transposed += int((p._columnwise_data != p._rowwise_data.t()).sum())
    return {
        "codes": n, "codes_unlike_our_quantizer": other, "scales_unlike_our_quantizer": scales, "first_unlike": first,
        "unlike_te_quantizer": te, "transposed_unlike": transposed, "equal": not (other or scales or te or transposed),
    }  # fmt: skip


def sync(t: Any) -> dict[str, Any]:
    """Buckets against the weights: codes cut with the name table's own function, values by TransformerEngine's dequantize."""
    import torch

    from fp8slurm.fp8 import triton_quantize
    from fp8slurm.fp8.block import BlockFP8
    from fp8slurm.fp8.quantize import dequantize
    from fp8slurm.models.names import NameTable
    from fp8slurm.models.spec import QuantizationSpec
    from fp8slurm.sync import stream as stream_module

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("quantized again")

    stream_module.quantize = triton_quantize.GroupedLaunch = refused
    table = NameTable(t.spec)
    stream = stream_module.WeightStream(table, t.named_shards, QuantizationSpec(), 2**29, torch.bfloat16)
    held = {e.name: p for e, p, _ in t.shards.parameters}
    codes = values = compared = 0
    for _, bucket in stream.buckets(1):
        views = dict(bucket.views())
        for name, tensor in views.items():
            if tensor.dtype != torch.float8_e4m3fn:
                continue
            entry = table.of_hf(name)
            at = [x.name for x in entry.tensors].index(name)
            p = held[entry.name]
            piece = entry.split(p._rowwise_data)[at].data
            codes += int((piece != tensor.view(torch.uint8)).sum())
            mine = dequantize(BlockFP8(tensor, views[name + "_scale_inv"]))
            values += int((entry.split(p.dequantize(dtype=torch.float32))[at].data != mine).sum())
            compared += 1
    seconds = []
    for version in range(2, 7):
        torch.cuda.synchronize()
        began = time.perf_counter()
        total = sum(bucket.payload.numel() for _, bucket in stream.buckets(version))
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return {
        "matrices": compared, "unlike_codes": codes, "unlike_values": values, "bytes": total,
        "fill_s": statistics.median(seconds), "equal": compared > 0 and not (codes or values),
    }  # fmt: skip


def checkpoint(t: Any, folder: Path) -> dict[str, Any]:
    """Save, then read the file without Megatron: dtypes, and bf16(master) in every FP8 weight's place."""
    import torch
    import torch.distributed.checkpoint as dcp

    from fp8slurm.trainer import primary_fp8

    folder.mkdir()
    began = time.perf_counter()
    snapshot = t.snapshot(folder, copy=False)
    snapshot.finish([snapshot.write()])
    saved = time.perf_counter() - began
    reader = dcp.FileSystemReader(str(folder))
    kinds: dict[str, int] = {}
    found = reader.read_metadata().state_dict_metadata
    for key, item in found.items():
        if hasattr(item, "properties") and not key.startswith("optimizer."):
            kinds[str(item.properties.dtype)] = kinds.get(str(item.properties.dtype), 0) + 1
    masters, unlike, compared = primary_fp8.Masters(t.optimizer), 0, 0
    by_key: dict[str, list[tuple[int, Any]]] = {}
    for entry, p, _ in t.shards.parameters:
        if primary_fp8.is_primary(p):
            by_key.setdefault(entry.checkpoint_key, []).append((entry.layer, p))
    for key, layers in by_key.items():
        item = found[key]
        whole = torch.empty(item.size, dtype=item.properties.dtype)
        dcp.load({key: whole}, storage_reader=dcp.FileSystemReader(str(folder)), no_dist=True)
        for layer, p in layers:
            unlike += int((whole[layer].view(torch.int16) != masters.whole(p).cpu().view(torch.int16)).sum())
            compared += 1
    return {
        "save_s": saved, "model_dtypes": kinds, "bf16_only": "torch.bfloat16" in kinds and "torch.uint8" not in kinds,
        "compared": compared, "unlike_bf16_master": unlike, "equal": compared == len(t.primary_fp8) and not unlike,
    }  # fmt: skip


def new_optimizer_and_reference(t: Any) -> dict[str, Any]:
    """A new optimizer starts from bf16(master), the reference has the primary bytes; log-probabilities are the same."""
    import torch

    from fp8slurm.trainer import primary_fp8

    before = {k: v[0] for k, v in digests(t).items()}
    kept = primary_fp8.Masters(t.optimizer).rounded()
    t.new_optimizer()
    now = primary_fp8.Masters(t.optimizer).own
    masters = all(torch.equal(now[p][0], v.float()) for p, v in kept.items())
    del kept
    t.snapshot_reference()
    batches = batches_of(t, 1024)
    gap = max(float((a - b).abs().max()) for a, b in zip(t.logprobs(batches), t.logprobs(batches, reference=True)))
    after = {k: v[0] for k, v in digests(t).items()}
    return {"masters_kept": masters, "weights_kept": before == after, "gap_to_reference": gap, "same": gap == 0}


def child(args: argparse.Namespace) -> None:
    """One process: off, on or resume."""
    where = {"case": args.case, "run": args.one}
    lr = 1e-3 if args.case.startswith("tiny") else 1e-5
    on, keep = args.one != "off", args.folder / "checkpoint"
    held: dict[str, Any] = {}

    def build() -> dict[str, Any]:
        import torch

        held["t"] = trainer_of(args.folder / "model", "--fp8.param-gather" if on else "--fp8.no-param-gather")
        if args.one == "resume":
            held["t"].load(keep)
        else:
            held["t"].load_hf(args.folder / "model")
        return {
            "built_gb": torch.cuda.memory_allocated() / 1e9,
            "built_peak_gb": torch.cuda.max_memory_allocated() / 1e9,
        }

    if not part("load checkpoint" if args.one == "resume" else "build and load_hf", build, **where):
        return
    t = held["t"]
    if args.one == "resume":
        wanted = json.loads((args.folder / "digests.json").read_text())

        def same() -> dict[str, Any]:
            got = digests(t)
            unlike = [f"{k}[{i}]" for k in wanted for i in range(3) if got[k][i] != wanted[k][i]]
            return {"parameters": len(wanted), "unlike": unlike[:6], "equal": not unlike}

        part("codes, transposed codes and masters as before", same, **where)
        part("steps after resume", lambda: steps(t, args.tokens, MORE, lr), **where)
        return
    if on:
        part("fp8 parameters", lambda: names(t), **where)
        part("primary bytes after load_hf", lambda: primary_bytes(t), **where)
    part("steps", lambda: steps(t, args.tokens, STEPS, lr), **where)
    if not on:
        return
    part("primary bytes after steps", lambda: primary_bytes(t), **where)
    part("sync buckets", lambda: sync(t), **where)
    if args.checkpoint:
        (args.folder / "digests.json").write_text(json.dumps(digests(t)))
        part("checkpoint", lambda: checkpoint(t, keep), **where)
        part("steps after save", lambda: steps(t, args.tokens, MORE, lr), **where)
        part("new optimizer, reference", lambda: new_optimizer_and_reference(t), **where)


def compare(case: str, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What two processes said about the same thing."""
    found = {(line.get("run"), line.get("part")): line for line in lines if line.get("case") == case}
    out = []
    off, on = found.get(("off", "steps"), {}), found.get(("on", "steps"), {})
    if "losses" in off and "losses" in on:
        out.append({
            "part": "on against off", "case": case, "losses_off": off["losses"], "losses_on": on["losses"],
            "largest_difference": max(abs(a - b) for a, b in zip(off["losses"], on["losses"])),
            "seconds": [off["step_s"], on["step_s"]], "peak_gb": [off["peak_gb"], on["peak_gb"]],
            "held_gb": [off["held_gb"], on["held_gb"]],
        })  # fmt: skip
    first, second = found.get(("on", "steps after save"), {}), found.get(("resume", "steps after resume"), {})
    if "losses" in first and "losses" in second:
        out.append({"part": "resumed against went on", "case": case, "went_on": first["losses"], "resumed": second["losses"],
                    "equal": first["losses"] == second["losses"]})  # fmt: skip
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["tiny::checkpoint", "Qwen3-4B:4:checkpoint", "Qwen3-4B"])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--folder", type=Path, help="for models and checkpoints (default: a temporary one)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--timeout", type=float, default=240, help="seconds a process")
    parser.add_argument("--one", choices=["off", "on", "resume"], help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        child(args)
        return
    from random_model import write_random_model

    lines: list[dict[str, Any]] = []
    for case in args.cases:
        shape, layers, checkpointed = (case.split(":") + ["", ""])[:3]
        folder = Path(tempfile.mkdtemp(prefix="param_gather_", dir=args.folder))
        try:
            write_random_model(shape, folder / "model", int(layers) if layers else None)
            for run in ("off", "on", "resume") if checkpointed == "checkpoint" else ("off", "on"):
                again = [sys.executable, __file__, "--one", run, "--case", case, "--folder", str(folder)]
                again += ["--tokens", str(args.tokens if shape != "tiny" else min(args.tokens, 2048))]
                again += ["--checkpoint"] if checkpointed == "checkpoint" else []
                try:
                    done = subprocess.run(again, capture_output=True, text=True, timeout=args.timeout, env=os.environ)
                    out, error, rc = done.stdout, done.stderr, done.returncode
                except subprocess.TimeoutExpired as late:
                    out, error, rc = (
                        *(x if isinstance(x, str) else (x or b"").decode() for x in (late.stdout, late.stderr)),
                        -1,
                    )
                for line in out.splitlines():
                    if line.startswith("{"):
                        lines.append(json.loads(line))
                        print(line, flush=True)
                if rc:
                    lines.append({"part": "process", "case": case, "run": run, "passed": False, "rc": rc})
                    say(**lines[-1], stderr=error[-2000:])
            for record in compare(case, lines):
                lines.append(record)
                say(**record)
        except Exception:  # noqa: BLE001 - the next case is worth its own try
            lines.append({"part": "case", "case": case, "passed": False, "traceback": traceback.format_exc()[-2000:]})
            say(**lines[-1])
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    failed = [f"{x.get('case')} {x.get('run')} {x['part']}" for x in lines if x.get("passed") is False]
    say(part="summary", failed=failed)
    if args.json:
        args.json.write_text("\n".join(map(json.dumps, lines)) + "\n")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
