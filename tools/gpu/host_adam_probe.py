#!/usr/bin/env python3
"""FP8 primary weights with Adam in host memory, on one GPU: against FP8 primary weights with Adam on the GPU, and against BF16
weights with Megatron's CPU-offloaded Adam.

usage: host_adam_probe.py [--cases tiny Qwen3-4B:12] [--tokens 8192] [--limit 170] [--folder FOLDER] [--json FILE]

A case is SHAPE[:LAYERS]. Kinds of runs, each a process: gpu (FP8 weights, FusedAdam), hybrid (BF16 weights, Megatron's offload),
host (FP8 weights, ours). With the tiny model masters, codes and scales are compared after one step and after five, and host's
checkpoint is continued as each kind. Without clipping, whose norm is a sum in another order. No process begins later than --limit
seconds. Prints JSON lines; a part that fails prints its traceback's end and the next one goes on.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools" / "gpu")]

from param_gather_probe import checkpoint, digests, names, part, primary_bytes, say, steps, sync, trainer_of  # noqa: E402

FLAGS = {
    "gpu": ["--fp8.param-gather", "--optim.no-cpu-offload"],
    "hybrid": ["--fp8.no-param-gather", "--optim.cpu-offload"],
    "host": ["--fp8.param-gather", "--optim.cpu-offload"],
}
MORE = 4
"""Steps after the first."""


def state(t: Any) -> dict[str, Any]:
    """Masters of all parameters, and codes and scales of those that are quantized (BF16 weights' are made here)."""
    from fp8slurm.fp8.policy import decide
    from fp8slurm.fp8.quantize import quantize
    from fp8slurm.trainer import primary_fp8
    from fp8slurm.trainer.optimizer_state import distributed_parts

    out = {}
    held = {}
    for one in distributed_parts(t.optimizer):
        for parameters in one.model_float16_groups:
            held |= {p: one._get_main_param_and_optimizer_states(p) for p in parameters}
    for entry, p, _ in t.shards.parameters:
        out[f"{entry.name}/master"] = held[p]["param"].detach().float().cpu().clone()
        if primary_fp8.is_primary(p):
            q = primary_fp8.codes_and_scales(p, entry.name)
        elif all(decide(x.name, x.shape).quantize for x in entry.tensors):
            q = quantize(p.detach())
        else:
            out[f"{entry.name}/value"] = p.detach().cpu().clone()
            continue
        out |= {f"{entry.name}/codes": q.data.cpu().clone(), f"{entry.name}/scales": q.scale_inv.cpu().clone()}
    return out


def ulps(a: Any, b: Any) -> Any:
    """How many fp32 numbers lie between, element by element."""
    import torch

    ints = [x.contiguous().view(torch.int32).to(torch.int64) for x in (a, b)]
    ordered = [torch.where(i < 0, -(i & 0x7FFFFFFF), i) for i in ints]
    return (ordered[0] - ordered[1]).abs()


def difference(one: Path, other: Path) -> dict[str, Any]:
    import torch

    a, b = torch.load(one), torch.load(other)
    assert a.keys() == b.keys()
    out: dict[str, Any] = {"masters": 0, "masters_unlike": 0, "largest_ulp": 0, "largest_difference": 0.0, "unlike": {}}
    for key in a:
        kind = key.rsplit("/", 1)[1]
        if kind == "master":
            u = ulps(a[key], b[key])
            out["masters"] += u.numel()
            out["masters_unlike"] += int((u > 0).sum())
            out["largest_ulp"] = max(out["largest_ulp"], int(u.max()))
            out["largest_difference"] = max(out["largest_difference"], float((a[key] - b[key]).abs().max()))
        else:
            x, y = (t.contiguous().view(torch.uint8) for t in (a[key], b[key]))
            out["unlike"][kind] = out["unlike"].get(kind, 0) + int((x != y).sum())
    return out


def where_time_goes(t: Any, tokens: int, lr: float) -> dict[str, Any]:
    """Seconds of one more step of HostAdam: the CPU's Adam, and a plain pass over the same bytes; its memory."""
    import torch

    from fp8slurm.trainer.optimizer_state import distributed_parts

    kernel = whole = 0.0
    parts = distributed_parts(t.optimizer)
    for one in parts:
        adam, step = one._adam, one._step

        def timed_adam(*args: Any, adam: Any = adam) -> None:
            nonlocal kernel
            began = time.perf_counter()
            adam(*args)
            kernel += time.perf_counter() - began

        def timed_step(step: Any = step) -> None:
            nonlocal whole
            torch.cuda.synchronize()
            began = time.perf_counter()
            step()
            torch.cuda.synchronize()
            whole += time.perf_counter() - began

        one._adam, one._step = timed_adam, timed_step
    steps(t, tokens, 1, lr)
    for one in parts:
        del one._adam, one._step
    masters = [(m, one.optimizer.state[m]) for one in parts for g in one.optimizer.param_groups for m in g["params"]]
    staged = parts[0]._slots[0].gradients
    began = time.perf_counter()
    for m, s in masters:  # of the same bytes: masters and moments read and written, a gradient read, a value written
        for piece in range(0, m.numel(), staged.numel()):
            rows = slice(piece, piece + staged.numel())
            m[rows].add_(staged[: len(m[rows])], alpha=0.0)
            s["exp_avg"][rows].mul_(1.0)
            s["exp_avg_sq"][rows].mul_(1.0)
            parts[0]._slots[0].values[: len(m[rows])].copy_(m[rows])
    plain = time.perf_counter() - began
    slots = [slot for one in parts for slot in one._slots]
    return {
        "optimizer_s": whole, "adam_and_rounding_s": kernel, "plain_pass_s": plain, "over_plain": kernel / plain,
        "rounds": sum(len(one._rounds) for one in parts), "threads": torch.get_num_threads(),
        "parameters": sum(m.numel() for m, _ in masters),
        "pinned_gb": sum(s.gradients.nbytes + s.values.nbytes for s in slots) / 1e9,
        "staging_on_gpu_gb": sum(s.on_device.nbytes for s in slots) / 1e9,
    }  # fmt: skip


def child(args: argparse.Namespace) -> None:
    import torch

    kind, _, then = args.one.partition(".")
    where, tiny = {"case": args.case, "run": args.one}, args.case.startswith("tiny")
    lr = 1e-3 if tiny else 1e-5
    held: dict[str, Any] = {}

    def build() -> dict[str, Any]:
        t = held["t"] = trainer_of(args.folder / "model", *FLAGS[kind], "--optim.clip-grad", "0")
        if then:
            t.load(args.folder / "checkpoint")
        else:
            t.load_hf(args.folder / "model")
        return {"built_gb": torch.cuda.memory_allocated() / 1e9}

    def first() -> dict[str, Any]:
        out = steps(held["t"], args.tokens, 1, lr)
        if tiny:
            torch.save(state(held["t"]), args.folder / f"{kind}.1.pt")
        return out

    def more() -> dict[str, Any]:
        out = steps(held["t"], args.tokens, MORE, lr)
        if tiny:
            torch.save(state(held["t"]), args.folder / f"{kind}.{1 + MORE}.pt")
        return out | {"host_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}

    def saved() -> dict[str, Any]:
        (args.folder / "digests.json").write_text(json.dumps(digests(held["t"])))
        return checkpoint(held["t"], args.folder / "checkpoint")

    def resumed() -> dict[str, Any]:
        wanted, got = json.loads((args.folder / "digests.json").read_text()), digests(held["t"])
        unlike = [f"{k}[{i}]" for k in wanted for i in range(3) if got[k][i] != wanted[k][i]]
        return {"unlike": unlike[:6], "equal": not unlike}

    if not part("load checkpoint" if then else "build and load_hf", build, **where):
        return
    t = held["t"]
    if then:
        if kind != "hybrid":
            part("codes, transposed codes and masters as saved", resumed, **where)
        part("steps after resume", lambda: steps(t, args.tokens, 2, lr), **where)
        return
    if kind != "hybrid":
        part("fp8 parameters", lambda: names(t), **where)
        part("primary bytes after load_hf", lambda: primary_bytes(t), **where)
    part("first step", first, **where)
    part("steps", more, **where)
    if kind == "host":
        part("primary bytes after steps", lambda: primary_bytes(t), **where)
        part("where the time goes", lambda: where_time_goes(t, args.tokens, lr), **where)
        if tiny:
            part("sync buckets", lambda: sync(t), **where)
            part("checkpoint", saved, **where)
            part("steps after save", lambda: steps(t, args.tokens, 2, lr), **where)


def compare(case: str, folder: Path, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the processes of a case said about the same thing."""
    found = {(x.get("run"), x.get("part")): x for x in lines if x.get("case") == case and x.get("passed")}
    out = []
    ran = {kind: found[kind, "steps"] for kind in FLAGS if (kind, "steps") in found}
    for other in ("gpu", "hybrid"):
        if other in ran and "host" in ran:
            both = [found[kind, "first step"]["losses"] + ran[kind]["losses"] for kind in (other, "host")]
            record: dict[str, Any] = {
                "part": f"host against {other}", "case": case, "same_losses": both[0] == both[1], "losses": both,
                "step_s": [ran[kind]["step_s"] for kind in (other, "host")],
                "peak_gb": [ran[kind]["peak_gb"] for kind in (other, "host")],
                "held_gb": [ran[kind]["held_gb"] for kind in (other, "host")],
                "host_gb": [ran[kind]["host_gb"] for kind in (other, "host")],
            }  # fmt: skip
            for n in (1, 1 + MORE):
                files = [folder / f"{kind}.{n}.pt" for kind in (other, "host")]
                if all(f.exists() for f in files):
                    record[f"after_{n}"] = difference(*files)
            out.append(record)
    for kind in FLAGS:
        resumed, went_on = found.get((f"{kind}.then", "steps after resume")), found.get(("host", "steps after save"))
        if resumed and went_on:
            a, b = went_on["losses"], resumed["losses"]
            out.append({"part": f"resumed as {kind}", "case": case, "first_equal": a[0] == b[0], "losses": [a, b]})
    return out


def run(case: str, name: str, folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One process's lines."""
    tokens = min(args.tokens, 2048) if case.startswith("tiny") else args.tokens
    command = [
        sys.executable,
        __file__,
        "--one",
        name,
        "--case",
        case,
        "--folder",
        str(folder),
        "--tokens",
        str(tokens),
    ]
    left = args.began + args.limit - time.monotonic()
    if left < 5:
        return [{"part": "process", "case": case, "run": name, "left_out": "no time"}]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=min(args.timeout, left + 20))
        out, error, rc = done.stdout, done.stderr, done.returncode
    except subprocess.TimeoutExpired as late:
        out, error = ((x if isinstance(x, str) else (x or b"").decode()) for x in (late.stdout, late.stderr))
        rc = -1
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    if rc:
        lines.append({"part": "process", "case": case, "run": name, "passed": False, "rc": rc, "stderr": error[-2500:]})
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["tiny", "Qwen3-4B:12"])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--limit", type=float, default=170, help="seconds after which nothing more is begun")
    parser.add_argument("--timeout", type=float, default=90, help="seconds a process")
    parser.add_argument("--folder", type=Path, help="for models and checkpoints (default: a temporary one)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        child(args)
        return
    from random_model import write_random_model

    args.began = time.monotonic()
    lines: list[dict[str, Any]] = []
    base = Path(tempfile.mkdtemp(prefix="host_adam_", dir=args.folder))

    def keep(new: list[dict[str, Any]]) -> None:
        for line in new:
            lines.append(line)
            print(json.dumps(line), flush=True)
        if args.json:
            args.json.write_text("\n".join(map(json.dumps, lines)) + "\n")

    def model(case: str) -> None:
        shape, layers = (case.split(":") + [""])[:2]
        write_random_model(shape, base / case.replace(":", "_") / "model", int(layers) if layers else None)

    with ThreadPoolExecutor(4) as pool:
        made = {}
        for number, case in enumerate(args.cases):
            folder = base / case.replace(":", "_")
            try:
                if case in made:
                    made[case].result()
                else:
                    model(case)
                if number + 1 < len(args.cases):  # beside the runs of this one
                    made[args.cases[number + 1]] = pool.submit(model, args.cases[number + 1])
                # the tiny model's times say nothing: its processes run side by side
                for group in ((tuple(FLAGS), tuple(f"{k}.then" for k in FLAGS)) if case.startswith("tiny") else
                              (("host",), ("hybrid",), ("gpu",))):  # fmt: skip
                    for future in [pool.submit(run, case, name, folder, args) for name in group]:
                        keep(future.result())
            except Exception:  # noqa: BLE001 - the next case is worth its own try
                keep([{"part": "case", "case": case, "passed": False, "traceback": traceback.format_exc()[-2000:]}])
            try:
                keep(compare(case, folder, lines))
            except Exception:  # noqa: BLE001
                keep([{"part": "compare", "case": case, "passed": False, "traceback": traceback.format_exc()[-2000:]}])
    shutil.rmtree(base, ignore_errors=True)
    failed = [f"{x.get('case')} {x.get('run')} {x['part']}" for x in lines if x.get("passed") is False]
    say(part="summary", failed=failed, seconds=round(time.monotonic() - args.began, 1))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
