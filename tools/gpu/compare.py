#!/usr/bin/env python3
"""Three precisions, several seeds each, side by side: a table, and a picture by RL step.

usage: compare.py FOLDER_OF_RUNS [--name small] [--steps 41] [--picture FILE.png]

Reads NAME-PRECISION-SEED/metrics.jsonl, as visit.py's parts `small` and `tiny` leave them. A figure of a run is its mean over
the RL steps (0, before anything was trained, to --steps - 1); intervals are two-sided 95%, Student's t over the seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path

PRECISIONS = {"fp8-fp8": "FP8 / FP8", "bf16-fp8": "BF16 / FP8", "bf16-bf16": "BF16 / BF16"}
"""Trainer / engine."""
COLOURS = {"fp8-fp8": "#2a78b8", "bf16-fp8": "#d1662b", "bf16-bf16": "#6b6b6b"}
Record = dict[str, float]
FIGURES: dict[str, Callable[[Record], float]] = {
    "gap, mean |d|": lambda r: r["gap/mean_abs"],
    "gap, 99th percentile": lambda r: r["gap/p99"],
    "gap, KL (k3)": lambda r: r["gap/k3"],
    "clipped, low + high": lambda r: r.get("ratio/clipped_low", 0) + r.get("ratio/clipped_high", 0),
    "reward": lambda r: r["reward/mean"],
}
LOGARITHMIC = ("gap",)
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Number of values -> Student's t of a two-sided 95% interval."""


def interval(values: list[float]) -> tuple[float, float, float]:
    """(mean, low, high)."""
    middle = statistics.mean(values)
    if len(values) < 2:
        return middle, math.nan, math.nan
    half = STUDENT[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return middle, middle - half, middle + half


def read(path: Path, steps: int) -> list[Record]:
    """A run's RL records, in order; ValueError where some are missing."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    mine = [r for r in records if r["phase"] == "rl" and r["step"] < steps]
    if [r["step"] for r in mine] != list(range(steps)):
        raise ValueError(f"{path} has not all RL steps from 0 to {steps - 1}")
    return mine


def values(records: list[Record], figure: Callable[[Record], float]) -> list[float]:
    """Of the steps that have it: step 0 trains nothing."""
    out = []
    for r in records:
        try:
            out.append(figure(r))
        except KeyError:
            out.append(math.nan)
    return out


def mean(numbers: list[float]) -> float:
    return statistics.mean(n for n in numbers if not math.isnan(n))


def table(runs: dict[str, dict[int, list[Record]]]) -> str:
    """Markdown: a row a run, then one a precision with the intervals."""
    lines = [
        "| trainer / engine | seed | " + " | ".join(FIGURES) + " | held-out accuracy |",
        "|---" * (len(FIGURES) + 3) + "|",
    ]
    for name, seeds in runs.items():
        for seed, records in seeds.items():
            accuracy = [r["eval/accuracy"] for r in records if "eval/accuracy" in r]
            cells = [f"{mean(values(records, f)):.3g}" for f in FIGURES.values()]
            lines.append(
                f"| {PRECISIONS[name]} | {seed} | "
                + " | ".join(cells)
                + f" | {accuracy[0]:.3f} -> {accuracy[-1]:.3f} |"
            )
    for name, seeds in runs.items():
        cells = []
        for figure in FIGURES.values():
            middle, low, high = interval([mean(values(records, figure)) for records in seeds.values()])
            cells.append(f"**{middle:.3g}** ({low:.3g} to {high:.3g})")
        lines.append(f"| **{PRECISIONS[name]}** | all {len(seeds)} | " + " | ".join(cells) + " | |")
    return "\n".join(lines)


def draw(runs: dict[str, dict[int, list[Record]]], picture: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(FIGURES), figsize=(4 * len(FIGURES), 3.8), layout="constrained")
    for axis, (what, get) in zip(axes, FIGURES.items()):
        for name, seeds in runs.items():
            columns = list(zip(*(values(records, get) for records in seeds.values())))
            steps = [step for step, c in enumerate(columns) if not any(map(math.isnan, c))]
            axis.plot(
                steps,
                [statistics.mean(columns[s]) for s in steps],
                color=COLOURS[name],
                label=PRECISIONS[name],
                linewidth=1.6,
            )
            for records in seeds.values():
                one = values(records, get)
                axis.plot(steps, [one[s] for s in steps], color=COLOURS[name], linewidth=0.6, alpha=0.45)
        axis.set_title(what, fontsize=11)
        axis.set_xlabel("RL step")
        axis.grid(alpha=0.25, linewidth=0.5)
        if what.startswith(LOGARITHMIC):
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
    axes[0].legend(frameon=False, fontsize=9)
    figure.suptitle(f"{title}: mean of the seeds (thick), each seed (thin); trainer / engine", fontsize=11)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--name", default="small")
    parser.add_argument("--steps", type=int, default=41, help="RL records of every run, step 0 included")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--title", default="RL of Qwen3-0.6B's shape")
    args = parser.parse_args()
    runs: dict[str, dict[int, list[Record]]] = {}
    for name in PRECISIONS:
        paths = sorted(args.folder.glob(f"{args.name}-{name}-*/metrics.jsonl"), key=lambda p: p.parent.name)
        if not paths:
            raise SystemExit(f"{args.folder} has no run {args.name}-{name}-SEED")
        runs[name] = {int(p.parent.name.rpartition("-")[2]): read(p, args.steps) for p in paths}
    print(table(runs))
    if args.picture:
        draw(runs, args.picture, args.title)


if __name__ == "__main__":
    main()
