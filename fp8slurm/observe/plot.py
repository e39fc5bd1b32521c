"""Plots of one run, or of several for comparison, from their metrics.jsonl."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fp8slurm.core.errors import InputError
from fp8slurm.core.numbers import number
from fp8slurm.observe.metrics import Record, column, read_metrics
from fp8slurm.observe.output import check_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GAPS = (
    ("gap/max", "max |d|"),
    ("gap/p99", "99th percentile |d|"),
    ("gap/mean_abs", "mean |d|"),
    ("gap/k1", "KL, k1 (size)"),
    ("gap/k3", "KL, k3"),
)
TIMES = (
    ("time/rollout", "rollout"),
    ("time/logprobs", "log-probabilities"),
    ("time/train", "training"),
    ("time/sync", "weight sync"),
    ("time/eval", "evaluation"),
    ("time/checkpoint", "checkpoint"),
)
OTHER = ("", "other")
PHASES = (*TIMES[:-1], OTHER, TIMES[-1])
"""(key, name) in the order in which they are stacked; "" is what no phase claims."""
BY_NAME = (("Reward by source", "source/", "/reward"), ("Parts of the reward", "reward/parts/", ""))
"""(title, prefix, suffix): what a run's own names stand between in a key."""
SMOOTHING = 10
"""Steps of the trailing mean of the reward."""


def main(argv: list[str]) -> int:
    """`fp8slurm plot RUN [RUN ...] [--out PNG]`: one run to its plot.png, several into one picture."""
    parser = argparse.ArgumentParser(prog="fp8slurm plot", description="Draw the curves of one or several runs.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory, such as runs/tiny-fp8")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="picture to write, such as all.png (default: plot.png in RUN; several runs need it)",
    )
    args = parser.parse_args(argv)
    if args.out is not None:
        check_file(args.out, "--out")
        _check_format(args.out)
    if len(args.runs) == 1:
        out = plot(args.runs[0], args.out)
    elif args.out is None:
        raise InputError(
            f"{len(args.runs)} runs in one picture: say where it goes with --out FILE, such as --out all.png"
        )
    else:
        names = [run.name for run in args.runs]
        labels = names if len(set(names)) == len(names) else [str(run) for run in args.runs]
        out = plot_runs(dict(zip(labels, args.runs)), args.out)
    print(out)
    return 0


def _check_format(out: Path) -> None:
    from matplotlib.figure import Figure

    known = Figure().canvas.get_supported_filetypes()
    if out.suffix.removeprefix(".").lower() not in ("", *known):
        raise InputError(f"--out {out}: no picture is written as {out.suffix}; allowed: {', '.join(sorted(known))}")


def plot(run_dir: Path, out: Path | None = None) -> Path:
    """Draw one run to `out` (left out: plot.png in the run directory). InputError: nothing to draw."""
    run_dir = Path(run_dir)
    records = read_metrics(run_dir)
    if not records:
        raise InputError(f"{run_dir}: metrics.jsonl is empty")
    out = Path(out) if out is not None else run_dir / "plot.png"
    named = [(title, lines) for title, prefix, suffix in BY_NAME if (lines := _named(records, prefix, suffix))]
    figure, axes = _figure(run_dir.resolve().name, 3 if named else 2)
    for empty in axes[2:].flat[len(named) :]:
        empty.set_axis_off()
    for place, (title, lines) in zip(axes[2:].flat, named):
        for name, key in lines:
            steps, values = column(records, key)
            place.plot(steps, values, label=name.replace("$", r"\$"), **_marker(steps))
        place.set(title=title, xlabel="RL step", ylabel="mean of the samples")
        _legend(place)
    _accuracy(axes[0, 1], {"": records})
    if any(r["phase"] == "rl" for r in records):
        _reward(axes[0, 0], {"reward": records})
        _gaps(axes[1, 0], records)
        _times(axes[1, 1], records, "rl")
    else:
        _one(axes[0, 0], records, "loss", "Loss of the supervised steps", "nats")
        _one(axes[1, 0], records, "grad_norm", "Gradient norm before clipping", "norm")
        _times(axes[1, 1], records, "sft")
    return _save(figure, out)


def plot_runs(runs: Mapping[str, Path], out: Path) -> Path:
    """Draw several runs into one picture, each under its label: reward, accuracy, gap and step time."""
    records = {label: _records(Path(folder)) for label, folder in runs.items()}
    if not records:
        raise InputError("no runs to plot")
    figure, axes = _figure("")
    _reward(axes[0, 0], records)
    _accuracy(axes[0, 1], records)
    for label, rows in records.items():
        steps, values = column(rows, "gap/mean_abs")
        (line,) = axes[1, 0].plot(steps, values, label=label, **_marker(steps))
        _mark_final(axes[1, 0], rows, "gap/mean_abs", line.get_color())
        steps, values = column(rows, "gap/k3")
        axes[1, 0].plot(steps, [v or math.nan for v in values], color=line.get_color(), linestyle=":", **_marker(steps))
        steps, values = column(rows, "time/step")
        axes[1, 1].plot(steps, values, label=label)
    _finish_gap(axes[1, 0], "Gap of trainer and engine log-probabilities: mean |d| (lines), k3 KL (dotted)")
    axes[1, 1].set(title="Step time", xlabel="RL step", ylabel="seconds", ylim=(0, None))
    _legend(axes[1, 1])
    return _save(figure, Path(out))


def _records(run_dir: Path) -> list[Record]:
    records = read_metrics(run_dir)
    if not any(r["phase"] == "rl" for r in records):
        raise InputError(f"{run_dir}: metrics.jsonl has no RL step to plot")
    return records


def _named(records: list[Record], prefix: str, suffix: str) -> list[tuple[str, str]]:
    """(name, key) of the keys between whose prefix and suffix a name stands, sorted."""
    keys = sorted({k for r in records for k in r if k.startswith(prefix) and k.endswith(suffix)})
    return [(k[len(prefix) : len(k) - len(suffix)], k) for k in keys]


def _figure(title: str, rows: int = 2) -> tuple[Figure, np.ndarray]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, 2, figsize=(13, 4.5 * rows), layout="constrained")
    if title:
        figure.suptitle(title, fontsize=14)
    return figure, axes


def _reward(axes: Axes, runs: Mapping[str, list[Record]]) -> None:
    for label, records in runs.items():
        steps, values = column(records, "reward/mean")
        (line,) = axes.plot(steps, values, alpha=0.35, linewidth=1)
        means = [sum(values[max(0, i - SMOOTHING + 1) : i + 1]) / min(i + 1, SMOOTHING) for i in range(len(values))]
        name = f"mean of {SMOOTHING} steps" if label == "reward" else label
        axes.plot(steps, means, color=line.get_color(), linewidth=2, label=name)
    suffix = "" if "reward" in runs else f" (bold: mean of {SMOOTHING} steps)"
    axes.set(title=f"Mean reward of the samples{suffix}", xlabel="RL step", ylabel="reward")
    _legend(axes)


def _accuracy(axes: Axes, runs: Mapping[str, list[Record]]) -> None:
    """Held-out accuracy; the supervised phase, if any, lies left of step 0."""
    warm = False
    for label, records in runs.items():
        before, early = column(records, "eval/accuracy", "sft")
        last = max([r["step"] for r in records if r["phase"] == "sft"], default=0)
        steps, values = column(records, "eval/accuracy")
        warm = warm or bool(before)
        axes.plot([s - last for s in before] + steps, early + values, marker="o", markersize=4, label=label or None)
        if not label and values:
            below = -14 if values[-1] > 0.1 else 6  # the axis' own figures stand there
            axes.annotate(
                f"{values[-1]:.3f}", (steps[-1], values[-1]), xytext=(-4, below), textcoords="offset points", ha="right"
            )
    if warm:
        axes.axvline(0, color="grey", linewidth=1, linestyle="--")
        axes.text(0, 0.97, " RL starts", color="grey", va="top", transform=axes.get_xaxis_transform())
    axes.set(
        title="Held-out accuracy, greedy",
        xlabel="RL step (negative: supervised warm start)" if warm else "RL step",
        ylabel="share answered exactly",
        ylim=(0, 1.02),
    )
    axes.grid(alpha=0.3)
    if "" not in runs:
        _legend(axes)


def _one(axes: Axes, records: list[Record], key: str, title: str, unit: str) -> None:
    axes.plot(*column(records, key, "sft"))
    axes.set(title=title, xlabel="supervised step", ylabel=unit)
    _legend(axes)


def _mark_final(axes: Axes, records: list[Record], key: str, color: Any) -> None:
    """The gap measured after the last update, at the last step: a point beside the one before that update."""
    steps, values = column(records, f"final_{key}")
    if steps and values[-1]:
        axes.plot(steps[-1:], [abs(values[-1])], color=color, marker="D", markersize=5, markerfacecolor="white")


def _gaps(axes: Axes, records: list[Record]) -> None:
    for index, (key, label) in enumerate(GAPS):
        steps, values = column(records, key)
        # k1 may be negative; on a logarithmic axis only its size can be shown
        sizes = [abs(v) or math.nan for v in values]
        if steps:
            axes.plot(steps, sizes, color=f"C{index}", label=label, **_marker(steps))
            _mark_final(axes, records, key, f"C{index}")
    if column(records, "final_gap/mean_abs")[0]:
        axes.plot(
            [], [], color="grey", linestyle="", marker="D", markerfacecolor="white", label="after the last update"
        )
    _finish_gap(axes, "Gap: d = trainer - engine log-probability of each sampled token")


def _finish_gap(axes: Axes, title: str) -> None:
    axes.set(title=title, xlabel="RL step", ylabel="nats")
    if any(np.size(line.get_xdata()) for line in axes.get_lines()):
        axes.set_yscale("log")
    _legend(axes)


def _times(axes: Axes, records: list[Record], phase: str) -> None:
    """Seconds of each phase of a step, stacked, the checkpoint on top; what no phase claims is `other`."""
    rows = phase_seconds(records, phase)
    steps, base = [step for step, _ in rows], [0.0] * len(rows)
    for slot, (key, label) in enumerate(PHASES):
        heights = [values[slot] for _, values in rows]
        if any(heights):
            color = f"C{slot - (slot > PHASES.index(OTHER))}" if key else "lightgrey"
            axes.bar(steps, heights, bottom=base, width=1.0, label=label, color=color)
            base = [b + h for b, h in zip(base, heights)]
    axes.set(title="Step time by phase", xlabel="RL step" if phase == "rl" else "supervised step", ylabel="seconds")
    _legend(axes)


def phase_seconds(records: list[Record], phase: str = "rl") -> list[tuple[int, list[float]]]:
    """(step, seconds of each of PHASES) of every step that has a time."""
    out = []
    for r in records:
        whole = number(r.get("time/step"))
        if r["phase"] == phase and whole is not None:
            values = {key: number(r.get(key)) or 0.0 for key, _ in TIMES}
            inside = sum(values.values()) - values["time/checkpoint"]
            values[""] = max(0.0, whole - inside)
            out.append((r["step"], [values[key] for key, _ in PHASES]))
    return out


def _marker(steps: list[int]) -> dict:
    return {"marker": "o", "markersize": 3} if len(steps) < 30 else {}


def _legend(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.11), ncols=4, frameon=False)


def _save(figure: Figure, out: Path) -> Path:
    from matplotlib import pyplot

    temporary = out.with_name(f".{out.stem}.tmp{out.suffix}")
    figure.savefig(temporary, dpi=120)
    pyplot.close(figure)
    temporary.replace(out)
    return out
