"""Which curves a report draws."""

from __future__ import annotations

from fp8slurm.report.charts import Chart, Line
from fp8slurm.report.content import sync_and_memory
from fp8slurm.run.reader import Run

_GAP = "d = trainer's minus engine's log-probability of each sampled token"
_K3 = "KL of engine and trainer, estimated from the sampled tokens"
_BRANCHES = "branches: samples that one conversation became"
_Curves = tuple[tuple[str, str, str, tuple[tuple[str, str], ...], str, str], ...]
"""(id, title, unit, (name, key) of each line, "log", "zero" or "" for the axis, note)."""
RL: _Curves = (
    ("reward", "Reward", "mean of all samples", (("reward", "reward/mean"),), "", ""),
    ("gap", "Gap", "nats", (("mean |d|", "gap/mean_abs"), ("99th percentile |d|", "gap/p99")), "log", _GAP),
    ("k3", "Gap as KL (k3)", "nats", (("k3", "gap/k3"),), "log", _K3),
    ("clip", "Clipped tokens", "share", (("below", "ratio/clipped_low"), ("above", "ratio/clipped_high")), "zero", ""),
    ("entropy", "Entropy", "nats per token", (("entropy", "entropy"),), "", ""),
    ("length", "Response length", "tokens, mean", (("length", "rollout/response_length"),), "", ""),
    ("grad", "Gradient norm", "before clipping", (("gradient norm", "grad_norm"),), "zero", ""),
    ("lr", "Learning rate", "", (("learning rate", "lr"),), "zero", ""),
    ("loss", "Loss", "", (("loss", "loss"),), "", ""),
    ("truncated", "Truncated responses", "share", (("truncated", "rollout/truncated"),), "zero", ""),
    (
        "turns",
        "Conversations",
        "mean",
        (("turns", "rollout/turns"), ("branches", "rollout/branches")),
        "zero",
        _BRANCHES,
    ),
    ("failed", "Failed conversations", "share, left out of the loss", (("failed", "rollout/failed"),), "zero", ""),
    ("speed", "Trained tokens", "per second", (("tokens/s", "throughput/tokens_per_s"),), "zero", ""),
)
SFT: _Curves = (
    ("sft-loss", "Supervised loss", "nats per token", (("loss", "loss/sft"),), "", ""),
    ("sft-grad", "Supervised gradient norm", "before clipping", (("norm", "grad_norm"),), "zero", ""),
)

BY_NAME = (
    ("source-reward", "Reward by source", "mean of its samples", "source/", "/reward"),
    ("parts", "Parts of the reward", "mean of the samples that have it", "reward/parts/", ""),
    ("source-length", "Response length by source", "tokens, mean", "source/", "/response_length"),
    ("source-truncated", "Truncated responses by source", "share", "source/", "/truncated"),
)
"""(id, title, unit, prefix, suffix): what a run's own names stand between in a key."""
COLOURS, MOST_LINES = 6, 12


def one_run(run: Run) -> list[Chart]:
    """The curves of a run; what it did not record is left out (`missing` names it)."""
    charts = [
        Chart(
            id, title, unit, [Line(name, run.series(key, phase), i) for i, (name, key) in enumerate(lines)][::-1],
            axis == "log", axis == "zero", note,
        )
        for phase, curves in (("rl", RL), ("sft", SFT)) for id, title, unit, lines, axis, note in curves
    ]  # fmt: skip
    charts[1:1] = [_accuracy(run), *(_by_name(run, *of) for of in BY_NAME)]
    return [c for c in charts if _any(c)]


def _by_name(run: Run, id: str, title: str, unit: str, prefix: str, suffix: str) -> Chart:
    """A line for each name, in another dash where colours are used up."""
    keys = [k for k in run.keys(prefix) if k.endswith(suffix)]
    lines = [
        Line(k[len(prefix) : len(k) - len(suffix)], run.series(k), i % COLOURS, i // COLOURS)
        for i, k in enumerate(keys)
    ]
    note = f"The first {MOST_LINES} of {len(lines)} names" if len(lines) > MOST_LINES else ""
    return Chart(id, title, unit, lines[:MOST_LINES], zero=suffix == "/truncated", note=note)


def _accuracy(run: Run) -> Chart:
    """Held-out accuracy, the supervised phase left of step 0, and each task that is evaluated in training."""
    last_sft = run.last_step("sft") or 0
    early = [(s - last_sft, v) for s, v in run.series("eval/accuracy", "sft")]
    tasks = [k for k in run.keys("eval/") if k.endswith("/accuracy") and k.count("/") == 2]
    lines = [Line("held-out prompts", early + run.series("eval/accuracy"))]
    lines += [Line(k.split("/")[1], run.series(k), i % 6) for i, k in enumerate(tasks, 1)]
    note, marks = ("Negative steps: the supervised warm start", [(0.0, "RL starts")]) if early else ("", [])
    return Chart("accuracy", "Held-out accuracy", "share right", lines, zero=True, note=note, marks=marks)


SYNC_CHARTS = 9


def sync(run: Run) -> list[Chart]:
    """One curve for every key of weight sync and memory."""
    keys = [key for key, *_ in sync_and_memory(run) if run.values(key)][:SYNC_CHARTS]
    charts = [
        Chart(f"sync-{i}", key, "seconds" if key.startswith("time/") else "", [Line(key, run.series(key))], zero=True)
        for i, key in enumerate(keys)
    ]
    return [c for c in charts if _any(c)]


EXPECTED = (
    ("reward", "reward/mean", "recorded in every RL step"),
    ("held-out accuracy", "eval/accuracy", "give data.eval and eval.every"),
    ("gap", "gap/mean_abs", "recorded in every RL step"),
    (
        "clip fraction",
        "ratio/clipped_low",
        "recorded where a step has several updates, or --train.recompute-logprobs always",
    ),
    ("entropy", "entropy", "recorded in every RL step that updates"),
    ("response length", "rollout/response_length", "recorded in every RL step"),
    ("gradient norm", "grad_norm", "recorded in every step that updates"),
    ("learning rate", "lr", "recorded in every step that updates"),
)


def missing(run: Run) -> list[tuple[str, str]]:
    """(name, how to record it) of the curves that one expects and that this run has no value of."""
    return [(name, how) for name, key, how in EXPECTED if not run.values(key)]


def several(runs: list[Run], names: list[str]) -> list[Chart]:
    """The same curves of several runs on each other, a chart for each key, a colour and a dash for each run."""
    time = ("step", "Time per step", "seconds", (("step", "time/step"),), "zero", "")
    accuracy = ("accuracy", "Held-out accuracy", "share right", (("", "eval/accuracy"),), "zero", "")
    charts = []
    for id, title, unit, curves, axis, note in (RL[0], accuracy, *RL[1:], time):
        for n, (name, key) in enumerate(curves):
            lines = [
                Line(run_name, run.series(key), i % 6, i % 6) for i, (run, run_name) in enumerate(zip(runs, names))
            ]
            whole = f"{title}, {name}" if len(curves) > 1 else title
            charts.append(Chart(f"{id}-{n}" if n else id, whole, unit, lines, axis == "log", axis == "zero", note))
    return [c for c in charts if _any(c)]


def _any(chart: Chart) -> bool:
    """Whether there is a value that the chart can show."""
    return any(v is not None and (v > 0 or not chart.log) for line in chart.lines for _, v in line.points)
