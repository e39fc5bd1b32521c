#!/usr/bin/env python3
"""The weight quantizer on one GPU: a model's matrices in one launch, one launch each, and a copy of as many bytes.

usage: bench_quantize.py [--model Qwen3-4B] [--layers N] [--rounds 15] [--json FILE]
Every round goes once over all of the model's Linear weights (several times the GPU's cache); 3 bytes an element are counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "tools" / "gpu")]

import torch  # noqa: E402


def main() -> None:
    from random_model import KNOWN
    from tiny import weight_shapes

    from fp8slurm.fp8.block import E4M3, BlockFP8, scale_shape
    from fp8slurm.fp8.policy import decide
    from fp8slurm.fp8.quantize import quantize
    from fp8slurm.fp8.triton_quantize import GroupedLaunch, Launch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen3-4B")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    config = json.loads((KNOWN / f"{args.model}.json").read_text())
    config["num_hidden_layers"] = args.layers or config["num_hidden_layers"]
    shapes = [s for name, s in weight_shapes(config).items() if decide(name, s).quantize]
    cases = []
    for shape in shapes:
        w = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        cases.append(
            (w, BlockFP8(torch.empty(shape, dtype=E4M3, device="cuda"), torch.empty(scale_shape(shape), device="cuda")))
        )
    elements = sum(w.numel() for w, _ in cases)
    half = 3 * elements // 2
    source, target = (torch.empty(half, dtype=torch.uint8, device="cuda").random_(0, 256) for _ in range(2))
    began = time.perf_counter()
    group = GroupedLaunch(cases)
    torch.cuda.synchronize()
    table_s = time.perf_counter() - began

    def together(how: Launch) -> None:
        group.launch(how)
        group.first_bad()

    def one_by_one() -> None:
        for w, out in cases:
            quantize(w, out=out)

    ways = {f"one launch, {n} warps": (lambda n=n: together(Launch(num_warps=n))) for n in (4, 8, 16)}
    ways |= {"a launch each": one_by_one, "copy of as many bytes": lambda: target.copy_(source)}
    rows = []
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(args.rounds + 2):  # in turns: clocks and neighbours are the same for all
        for name, way in ways.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            way()
            torch.cuda.synchronize()
            if round_ >= 2:
                seconds[name].append(time.perf_counter() - start)
    for name, times in seconds.items():
        median = statistics.median(times)
        rows.append({"way": name, "seconds": median, "gb_per_s": 3 * elements / median / 1e9})
        print(json.dumps(rows[-1]), flush=True)
    report = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "model": args.model, "matrices": len(cases),
              "elements": elements, "table_s": table_s, "rows": rows}  # fmt: skip
    print(json.dumps({k: v for k, v in report.items() if k != "rows"}))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
