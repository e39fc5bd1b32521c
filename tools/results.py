#!/usr/bin/env python3
"""The runs behind docs/results.md, one after the other, and their table.

usage: tools/results.py run [NAME ...]     run what is not finished yet (all of them by default)
       tools/results.py table              print the table of what is there, in Markdown, and draw docs/results*.png
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fp8slurm.core.files import write_atomic  # noqa: E402
from fp8slurm.observe.metrics import Record, column, read_metrics  # noqa: E402

CONTROL_STEPS = "25"
RUNS: dict[str, tuple[str, list[str]]] = {
    "fp8-seed0": ("FP8 trainer, FP8 engine", ["--run.seed", "0"]),
    "fp8-seed1": ("FP8 trainer, FP8 engine", ["--run.seed", "1"]),
    "fp8-seed2": ("FP8 trainer, FP8 engine", ["--run.seed", "2"]),
    "bf16": ("BF16 trainer, BF16 engine", ["--fp8.backend", "off"]),
    "bf16-fp8": ("BF16 trainer, FP8 engine", ["--fp8.backend", "off", "--fp8.engine", "fp8"]),
    "shuffled": ("control: shuffled rewards", ["--control.shuffle-rewards", "--run.steps", CONTROL_STEPS]),
    "frozen": ("control: engine's weights frozen", ["--control.freeze-engine", "--run.steps", CONTROL_STEPS]),
    "negated": ("control: advantage's sign turned", ["--control.negate-advantage", "--run.steps", CONTROL_STEPS]),
}


def path(name: str) -> Path:
    return ROOT / "runs" / f"results-{name}"


def run(names: list[str]) -> None:
    """Run each; a finished one says so and is left alone."""
    for name in names:
        flags = RUNS[name][1]
        command = [
            sys.executable,
            "-m",
            "fp8slurm.cli",
            "train",
            "--recipe",
            "tiny-fp8",
            "--run.name",
            path(name).name,
            *flags,
        ]
        print("$", "fp8slurm", *command[3:], flush=True)
        path(name).mkdir(parents=True, exist_ok=True)
        with open(path(name) / "console.log", "a") as log:
            done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        print(name, "status", done.returncode, flush=True)


def row(name: str) -> str | None:
    """A line of the table, None where the run has not begun."""
    try:
        records = read_metrics(path(name))
    except ValueError:
        return None
    steps, accuracy = column(records, "eval/accuracy")
    rl = [r for r in records if r["phase"] == "rl"]
    if not steps or not rl:
        return None
    reached = next((s for s, a in zip(steps, accuracy) if a >= 0.85), None)
    minutes = sum(r.get("time/step", 0) + r.get("time/checkpoint", 0) for r in records) / 60

    def mean(key: str, over: list[Record]) -> float:
        values = [r[key] for r in over if r.get(key) is not None]
        return sum(values) / max(1, len(values))

    trained = [r for r in rl if r["step"] > 0]
    reward = mean("reward/mean", trained[:5]), mean("reward/mean", trained[-5:])
    return (
        f"| {RUNS[name][0]} | {name} | {accuracy[0]:.3f} | {accuracy[-1]:.3f} (step {steps[-1]}) | {max(accuracy):.3f} | "
        f"{reached if reached is not None else '-'} | {reward[0]:.3f} -> {reward[1]:.3f} | "
        f"{mean('gap/mean_abs', trained):.2e} | {mean('gap/p99', trained):.2e} | {mean('gap/k3', trained):.2e} | "
        f"{rl[-1].get('final_gap/mean_abs', float('nan')):.2e} | {mean('time/step', trained):.1f} | {minutes:.1f} |"
    )


def table() -> None:
    from fp8slurm.observe.plot import plot_runs

    print(
        "| what | run | held-out at start | at the end | best | first >= 0.85 | reward, first and last 5 steps | gap mean abs | p99 | k3 KL | after the last step | s/step | minutes |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    for name in RUNS:
        line = row(name)
        if line:
            print(line)
    groups = {
        "results_precision.png": ["fp8-seed0", "bf16", "bf16-fp8"],
        "results_seeds.png": ["fp8-seed0", "fp8-seed1", "fp8-seed2"],
        "results_controls.png": ["fp8-seed0", "shuffled", "frozen", "negated"],
    }
    for out, names in groups.items():
        there = {n: path(n) for n in names if row(n)}
        if there:
            plot_runs(there, ROOT / "docs" / out)
    rows = {n: row(n) for n in RUNS if row(n)}
    write_atomic(ROOT / "runs" / "results.json", json.dumps(rows, indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:
        run(sys.argv[2:] or list(RUNS))
    elif sys.argv[1:] == ["table"]:
        table()
    else:
        sys.exit(__doc__)
