"""What a report says, before it is HTML or Markdown."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

from fp8slurm.config import RunConfig
from fp8slurm.core.numbers import number
from fp8slurm.models.precision import serves_fp8
from fp8slurm.observe.plot import PHASES, phase_seconds
from fp8slurm.report.safe import figure, seconds, size, when
from fp8slurm.run.alerts import alerts as run_alerts
from fp8slurm.run.alerts import bound_of
from fp8slurm.run.attempts import run_state
from fp8slurm.run.reader import Run

EDGE = 5
"""Steps at each end that "first" and "last" are means of."""
OVER = "mean of all RL records"
"""What the gaps are means of: record 0, measured before anything was trained, counts."""


class Headline(NamedTuple):
    """One figure at the top."""

    title: str
    value: str
    detail: str = ""


class Setting(NamedTuple):
    """One setting of a run and its default."""

    key: str
    value: str
    default: str
    help: str
    changed: bool


class Part(NamedTuple):
    """One row of the table of times."""

    name: str
    total: float
    share: float
    median: float
    """Over the steps that have it."""
    slot: int
    """Place in PHASES."""


def status(run: Run) -> tuple[str, str]:
    """(running, held, finished, stopped, failed or new; how far it is, in words)."""
    steps, last = number(run.setting("run.steps")), run.last_step()
    newest = run.attempts[-1] if run.attempts else None
    word = run_state(None if steps is None else int(steps), run.checkpoint, last, newest)
    if not run.records:
        return word, "no step yet"
    of = f" of {steps:.0f}" if steps is not None else ""
    return (
        word,
        f"{last}{of} RL steps" if last is not None else f"supervised step {run.last_step('sft')}, no RL step yet",
    )


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


def alerts(run: Run) -> list[str]:
    """What of the last steps somebody should look at."""
    return run_alerts(run.records, run.records, bound_of(run.config))


def ends(values: list[float]) -> tuple[float | None, float | None]:
    """Means of the first and the last EDGE values."""
    return (statistics.fmean(values[:EDGE]), statistics.fmean(values[-EDGE:])) if values else (None, None)


def finals(run: Run) -> dict[str, float | None]:
    """The figures that runs are compared by."""

    def over(statistic: Callable[[list[float]], float], *keys: str) -> float | None:
        """Of all values of a key; the sum over the keys that were recorded."""
        each = [statistic(values) for key in keys if (values := run.values(key))]
        return sum(each) if each else None

    return {
        "RL steps": number(run.last_step()),
        "held-out accuracy, first": over(lambda values: values[0], "eval/accuracy"),
        "held-out accuracy, last": over(lambda values: values[-1], "eval/accuracy"),
        "held-out accuracy, best": over(max, "eval/accuracy"),
        f"reward, mean of the last {EDGE} steps": ends(run.values("reward/mean"))[1],
        f"gap, mean |d|, {OVER} (nats)": over(statistics.fmean, "gap/mean_abs"),
        f"gap, 99th percentile, {OVER} (nats)": over(statistics.fmean, "gap/p99"),
        f"gap, KL k3, {OVER} (nats)": over(statistics.fmean, "gap/k3"),
        "gap, mean |d| after the last update (nats)": over(lambda values: values[-1], "final_gap/mean_abs"),
        "tokens clipped, mean of all steps": over(statistics.fmean, "ratio/clipped_low", "ratio/clipped_high"),
        "response length, last steps (tokens)": ends(run.values("rollout/response_length"))[1],
        "turns of a conversation, last steps": ends(run.values("rollout/turns"))[1],
        "branches of a conversation (its samples), mean of all steps": over(statistics.fmean, "rollout/branches"),
        "seconds a step, median": over(statistics.median, "time/step"),
        "trained tokens per second, median": over(statistics.median, "throughput/tokens_per_s"),
        "seconds a weight sync, median": over(statistics.median, "time/sync"),
        "steps skipped (NaN, or no signal)": over(sum, "skipped"),
    }


def headlines(run: Run) -> list[Headline]:
    """The cards at the top, most telling first."""
    f, out = finals(run), [Headline("Held-out accuracy", "not measured", "data.eval names the held-out prompts")]
    first, last, best = (f[f"held-out accuracy, {k}"] for k in ("first", "last", "best"))
    if last is not None:
        out = [Headline("Held-out accuracy", figure(last), f"from {figure(first)}, best {figure(best)}")]
    before, after = ends(run.values("reward/mean"))
    if after is not None:
        out.append(Headline("Mean reward", figure(after), f"last {EDGE} steps; from {figure(before)}"))
    gap, p99, k3 = (f[f"gap, {k}, {OVER} (nats)"] for k in ("mean |d|", "99th percentile", "KL k3"))
    if gap is not None:
        steps = [step for step, value in run.series("gap/mean_abs") if value is not None]
        over = f"mean of RL records {steps[0]} to {steps[-1]}" if len(steps) > 1 else f"RL record {steps[0]}"
        detail = f"mean |d|; 99% {figure(p99)}; k3 {figure(k3)}; {over}"
        out.append(Headline("Trainer\u2013engine gap", f"{figure(gap)} nats", detail))
    if run.comparisons:
        c = run.comparisons[-1]
        value, low, high = c.difference
        interval = f"95% {figure(low, True)} to {figure(high, True)}; " if low is not None else ""
        detail = f"{c.task}: {interval}{c.verdict}"
        out.append(Headline(f"{c.names[0]} minus {c.names[1]}", figure(value, True), detail))
    else:
        out.append(Headline("FP8 minus BF16", "not measured", "fp8slurm eval --run RUN --precision both"))
    step, tokens = f["seconds a step, median"], f["trained tokens per second, median"]
    if step is not None:
        speed = f"; {figure(tokens)} tokens/s" if tokens is not None else ""
        out.append(Headline("Time per step", seconds(step), f"median{speed}"))
    keys = ("time/step", "time/checkpoint")
    if total := sum(sum(run.values(key, phase)) for key in keys for phase in ("rl", "sft")):
        out.append(Headline("Time in steps", seconds(total), "kept steps only, without starting up"))
    if run.attempts:
        faults = sum(len(a.faults) + (a.state == "failed") for a in run.attempts)
        out.append(Headline("Attempts", str(len(run.attempts)), f"{faults} faults" if faults != 1 else "1 fault"))
    if skipped := f["steps skipped (NaN, or no signal)"]:
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


def parts(run: Run, phase: str = "rl") -> list[Part]:
    """Seconds by phase, over all steps."""
    rows = [values for _, values in phase_seconds(run.records, phase)]
    whole = sum(map(sum, rows)) or 1.0
    out = []
    for slot, (_, name) in enumerate(PHASES):
        values = [row[slot] for row in rows if row[slot] > 0]
        if values:
            out.append(Part(name, sum(values), sum(values) / whole, statistics.median(values), slot))
    return out


def sync_and_memory(run: Run) -> list[tuple[str, ...]]:
    """(key, median, 90%, largest, steps), with units, of every time/sync*, sync/* and memory/* key over all steps."""
    out: list[tuple[str, ...]] = []
    for key in run.keys():
        if not (key.startswith(("time/sync", "sync/", "memory/", "mem/")) or "memory" in key):
            continue
        if values := sorted(run.values(key) or run.values(key, "sft")):
            p90 = values[min(len(values) - 1, int(0.9 * len(values)))]
            shown = map(_unit(key), (statistics.median(values), p90, values[-1]))
            out.append((key, *shown, str(len(values))))
    return out


def _unit(key: str) -> Callable[[float], str]:
    if key.startswith("time/"):
        return seconds
    if "bytes" in key:
        return size
    return (lambda v: f"{figure(v)} GiB") if key.endswith(("_gib", "_gb")) else figure
