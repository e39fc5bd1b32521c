"""What a report says, before it is HTML or Markdown."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from typing import Any

from fp8slurm.config import RunConfig
from fp8slurm.core.numbers import number
from fp8slurm.models.precision import serves_fp8
from fp8slurm.observe.plot import TIMES
from fp8slurm.report.safe import figure, seconds, size, when
from fp8slurm.run.reader import Run

EDGE = 5
"""Steps at each end that "first" and "last" are means of."""
OVER = "mean of all RL records"
"""What the gaps are means of: record 0, measured before anything was trained, counts."""
PHASES = (*TIMES[:-1], ("", "other"), TIMES[-1])
"""(key, name) in the order in which they are stacked; "" is what no phase claims."""


@dataclass(frozen=True)
class Headline:
    """One figure at the top."""

    title: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class Setting:
    """One setting of a run and its default."""

    key: str
    value: str
    default: str
    help: str
    changed: bool


def status(run: Run) -> tuple[str, str]:
    """(running, finished, stopped, failed, unfinished or empty; the same in words)."""
    steps, last = number(run.setting("run.steps")), run.last_step()
    of = f" of {steps:.0f}" if steps is not None else ""
    newest = run.attempts[-1] if run.attempts else None
    if not run.records:
        word = newest.state if newest and newest.state in ("running", "failed") else "empty"
        return word, "no step yet"
    phase = f"{last}{of} RL steps" if last is not None else f"supervised step {run.last_step('sft')}, no RL step yet"
    if newest is not None and newest.state == "running":
        return "running", phase
    if steps is not None and (last if last is not None else 0 if steps == 0 else -1) >= steps:
        return "finished", phase
    if newest is not None and newest.state in ("failed", "stopped"):
        return newest.state, phase
    return "unfinished", phase


def precision(run: Run) -> str:
    """Who multiplies in what, in words."""
    backend = run.setting("fp8.backend")
    if backend is None:
        return "precision unknown"
    names = {"transformer_engine": "FP8 trainer (TransformerEngine)", "emulated": "FP8 trainer (emulated on the CPU)"}
    trainer = names.get(str(backend), "BF16 trainer" if run.setting("model.dtype") != "float32" else "FP32 trainer")
    engine = run.setting("fp8.engine")
    if run.setting("model.rollout_checkpoint"):
        return f"{trainer}, engine as {run.setting('model.rollout_checkpoint')}"
    return f"{trainer}, {'FP8' if serves_fp8(None, engine, backend) else 'BF16'} engine"


def facts(run: Run) -> list[str]:
    """What the run is, in a few words each."""
    out = [precision(run)]
    if run.setting("model.hf_checkpoint"):
        out.append(str(run.setting("model.hf_checkpoint")))
    nodes, ranks = run.setting("slurm.nodes"), run.setting("slurm.ranks_per_node")
    if nodes and ranks:
        out.append(f"{nodes} node{'s' if nodes != 1 else ''}, {ranks} rank{'s' if ranks != 1 else ''} each")
    if run.attempts and run.attempts[0].started:
        out.append(f"started {when(run.attempts[0].started)}")
    return out


CONTROL = "A control experiment, made to fail, whose figures say nothing about training"


def controls(run: Run) -> list[str]:
    """Experiments that must fail, switched on in this run."""
    return [f"control.{k}" for k, v in run.config.get("control", {}).items() if v]


def ends(values: list[float]) -> tuple[float, float] | None:
    """Means of the first and the last EDGE values."""
    if not values:
        return None
    return statistics.fmean(values[:EDGE]), statistics.fmean(values[-EDGE:])


def finals(run: Run) -> dict[str, float | None]:
    """The figures that runs are compared by."""
    accuracy, reward = run.values("eval/accuracy"), ends(run.values("reward/mean"))

    def mean(key: str) -> float | None:
        values = run.values(key)
        return statistics.fmean(values) if values else None

    def middle(key: str) -> float | None:
        values = run.values(key)
        return statistics.median(values) if values else None

    return {
        "RL steps": number(run.last_step()),
        "held-out accuracy, first": accuracy[0] if accuracy else None,
        "held-out accuracy, last": accuracy[-1] if accuracy else None,
        "held-out accuracy, best": max(accuracy) if accuracy else None,
        f"reward, mean of the last {EDGE} steps": reward[1] if reward else None,
        f"gap, mean |d|, {OVER} (nats)": mean("gap/mean_abs"),
        f"gap, 99th percentile, {OVER} (nats)": mean("gap/p99"),
        f"gap, KL k3, {OVER} (nats)": mean("gap/k3"),
        "gap, mean |d| after the last update (nats)": (run.values("final_gap/mean_abs") or [None])[-1],
        "tokens clipped, mean of all steps": _clipped(run),
        "response length, last steps (tokens)": (ends(run.values("rollout/response_length")) or (None, None))[1],
        "seconds a step, median": middle("time/step"),
        "trained tokens per second, median": middle("throughput/tokens_per_s"),
        "seconds a weight sync, median": middle("time/sync"),
        "steps skipped (NaN, or no signal)": sum(run.values("skipped")) if run.values("skipped") else None,
    }


def _clipped(run: Run) -> float | None:
    both = [run.values(k) for k in ("ratio/clipped_low", "ratio/clipped_high")]
    return sum(statistics.fmean(v) for v in both if v) if any(both) else None


def headlines(run: Run) -> list[Headline]:
    """The cards at the top, most telling first."""
    f, out = finals(run), []
    last, best, first = (f[f"held-out accuracy, {k}"] for k in ("last", "best", "first"))
    if last is None:
        out.append(Headline("Held-out accuracy", "not measured", "data.eval names the held-out prompts"))
    else:
        out.append(Headline("Held-out accuracy", figure(last), f"from {figure(first)}, best {figure(best)}"))
    reward = ends(run.values("reward/mean"))
    if reward:
        out.append(Headline("Mean reward", figure(reward[1]), f"last {EDGE} steps; from {figure(reward[0])}"))
    gap = f[f"gap, mean |d|, {OVER} (nats)"]
    if gap is not None:
        p99, k3 = f[f"gap, 99th percentile, {OVER} (nats)"], f[f"gap, KL k3, {OVER} (nats)"]
        steps = [step for step, value in run.series("gap/mean_abs") if value is not None]
        over = f"mean of RL records {steps[0]} to {steps[-1]}" if len(steps) > 1 else f"RL record {steps[0]}"
        detail = f"mean |d|; 99% {figure(p99)}; k3 {figure(k3)}; {over}"
        out.append(Headline("Trainer\u2013engine gap", f"{figure(gap)} nats", detail))
    final = [c for c in run.comparisons]
    if final:
        c = final[-1]
        value, low, high = c.difference
        interval = f"95% {figure(low, True)} to {figure(high, True)}; " if low is not None else ""
        out.append(
            Headline(f"{c.names[0]} minus {c.names[1]}", figure(value, True), f"{c.task}: {interval}{c.verdict}")
        )
    else:
        out.append(Headline("FP8 minus BF16", "not measured", "fp8slurm eval --run RUN --precision both"))
    step, tokens = f["seconds a step, median"], f["trained tokens per second, median"]
    if step is not None:
        detail = f"median; {figure(tokens)} tokens/s" if tokens is not None else "median"
        out.append(Headline("Time per step", seconds(step), detail))
    total = sum(run.values("time/step") + run.values("time/step", "sft"))
    total += sum(run.values("time/checkpoint") + run.values("time/checkpoint", "sft"))
    if total:
        out.append(Headline("Time in steps", seconds(total), "kept steps only, without starting up"))
    if run.attempts:
        faults = sum(len(a.faults) + (a.state == "failed") for a in run.attempts)
        out.append(Headline("Attempts", str(len(run.attempts)), f"{faults} faults" if faults != 1 else "1 fault"))
    skipped = f["steps skipped (NaN, or no signal)"]
    if skipped:
        out.append(Headline("Steps skipped", figure(skipped), "NaN or infinity, or no group with signal"))
    return out


def settings(run: Run) -> list[Setting]:
    """Every setting of config.json beside its default."""
    defaults = RunConfig().model_dump(mode="json")
    out = []
    for section, values in run.config.items():
        model = RunConfig.model_fields[section].annotation if section in RunConfig.model_fields else None
        for key, value in values.items():
            known = section in defaults and key in defaults[section]
            default = defaults[section][key] if known else None
            told = getattr(model, "model_fields", {}).get(key)
            text = (told.description or "") if told is not None else "not a setting of this version"
            shown = _plain(default) if known else "\u2013"
            out.append(Setting(f"{section}.{key}", _plain(value), shown, text, not known or value != default))
    return out


def differences(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """(key, value in every run) of the settings that are not the same in all; the run's own name is left out."""
    flat = [{f"{s}.{k}": _plain(v) for s, values in run.config.items() for k, v in values.items()} for run in runs]
    keys = sorted({k for f in flat for k in f} - {"run.name", "run.root"})
    rows = [(k, [f.get(k, "\u2013") for f in flat]) for k in keys]
    return [(k, values) for k, values in rows if len(set(values)) > 1]


def _plain(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, str):
        return value
    return json.dumps(value)


def phase_seconds(run: Run, phase: str = "rl") -> list[tuple[int, list[float]]]:
    """(step, seconds of each of PHASES) of every step that has a time."""
    out = []
    for r in run.records:
        whole = number(r.get("time/step"))
        if r["phase"] != phase or whole is None:
            continue
        values = [number(r.get(key)) or 0.0 if key else 0.0 for key, _ in PHASES]
        inside = sum(v for (key, _), v in zip(PHASES, values) if key and key != "time/checkpoint")
        values[[key for key, _ in PHASES].index("")] = max(0.0, whole - inside)
        out.append((r["step"], values))
    return out


@dataclass(frozen=True)
class Part:
    """One row of the table of times."""

    name: str
    total: float
    share: float
    median: float
    """Over the steps that have it."""
    slot: int
    """Place in PHASES."""


def parts(run: Run, phase: str = "rl") -> list[Part]:
    """Seconds by phase, over all steps."""
    rows = [values for _, values in phase_seconds(run, phase)]
    whole = sum(map(sum, rows)) or 1.0
    out = []
    for slot, (_, name) in enumerate(PHASES):
        values = [row[slot] for row in rows if row[slot] > 0]
        if values:
            out.append(Part(name, sum(values), sum(values) / whole, statistics.median(values), slot))
    return out


@dataclass(frozen=True)
class Spread:
    """One metric over all steps, as text with its unit."""

    key: str
    median: str
    p90: str
    largest: str
    count: int


def sync_and_memory(run: Run) -> list[Spread]:
    """Every time/sync*, sync/* and memory/* key that was recorded."""
    out = []
    for key in run.keys():
        if not (key.startswith(("time/sync", "sync/", "memory/", "mem/")) or "memory" in key):
            continue
        values = sorted(run.values(key) or run.values(key, "sft"))
        if not values:
            continue
        show = _unit(key)
        p90 = values[min(len(values) - 1, int(0.9 * len(values)))]
        out.append(Spread(key, show(statistics.median(values)), show(p90), show(values[-1]), len(values)))
    return out


def _unit(key: str) -> Any:
    if key.startswith("time/"):
        return seconds
    if "bytes" in key:
        return size
    if key.endswith(("_gib", "_gb")):
        return lambda v: f"{figure(v)} GiB"
    return figure
