"""The report as Markdown, for a terminal or a chat: the same figures, curves as sparklines."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from fp8slurm.report import content, curves
from fp8slurm.report.charts import downsample
from fp8slurm.report.safe import figure, one_line, seconds, visible
from fp8slurm.report.samples import Samples, ShownSample
from fp8slurm.run.reader import Run

_BLOCKS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
SPARK = 24
WORST = 5
"""Tokens with the largest gap that are listed for a sample."""


def markdown(run: Run, found: Samples, others: list[Run], names: list[str]) -> str:
    """The whole document; nothing in it is a control character."""
    word, words = content.status(run)
    out = [f"# {one_line(run.name)}", "", f"**{word}**, {words}. {one_line(content.precision(run))}.", ""]
    switched = content.controls(run)
    if switched:
        out += [
            f"> A control experiment, made to fail: {', '.join(switched)}. Its figures say nothing about training.",
            "",
        ]
    if run.notes:
        out += ["> Not everything could be read:", *(f"> - {one_line(n, 300)}" for n in run.notes[:30]), ""]
    out += _table(("figure", "value", ""), [(h.title, h.value, h.detail) for h in content.headlines(run)])
    if others:
        out += _compare([run, *others], names)
    out += _curves(run)
    out += _times(run)
    out += _sync(run)
    out += _evaluations([run, *others], names)
    out += _attempts(run)
    out += _configuration(run)
    out += _samples(found)
    return "\n".join(out).rstrip() + "\n"


def cell(text: str) -> str:
    """Text that cannot leave its cell."""
    return (
        one_line(text, 400)
        .replace("\\", "\\\\")
        .replace("|", "\\|")
        .replace("`", "'")
        .replace("<", "\\<")
        .replace("](", "\\](")
    )


def _table(heads: Sequence[str], rows: list[Sequence[str]]) -> list[str]:
    """Padded, so that it reads well without being rendered too."""
    cells = [[cell(str(c)) for c in row] for row in rows]
    width = [
        max(3, len(h), *(len(r[i]) for r in cells)) if cells else max(3, len(h)) for i, h in enumerate(map(cell, heads))
    ]

    def line(row: Sequence[str]) -> str:
        return "| " + " | ".join(c.ljust(w) for c, w in zip(row, width)) + " |"

    return [line([cell(h) for h in heads]), "|" + "|".join("-" * (w + 2) for w in width) + "|", *map(line, cells), ""]


def spark(values: Sequence[tuple[float, float | None]], width: int = SPARK) -> str:
    """Means of neighbouring points as blocks between the smallest and the largest; a space where nothing is finite."""
    buckets = downsample(values, width)
    known = [b.mean for b in buckets if b is not None]
    if not known:
        return ""
    low, high = min(known), max(known)

    def block(mean: float) -> str:
        return _BLOCKS[round((mean - low) / (high - low) * 7) if high > low else 3]

    return "".join(" " if b is None else block(b.mean) for b in buckets)


def _curves(run: Run) -> list[str]:
    rows = []
    for chart in curves.one_run(run):
        for line in chart.lines:
            known = [y for _, y in line.points if y is not None]
            if known:
                name = chart.title if len(chart.lines) == 1 else f"{chart.title}, {line.name}"
                rows.append(
                    (
                        name,
                        chart.unit,
                        figure(known[0]),
                        figure(min(known)),
                        figure(max(known)),
                        figure(known[-1]),
                        spark(line.points),
                    )
                )
    out = ["## Curves", ""]
    if rows:
        out += _table(("curve", "unit", "first", "smallest", "largest", "last", ""), rows)
    out += [f"- not recorded: {name} ({how})" for name, how in curves.missing(run)]
    return out + [""]


def _times(run: Run) -> list[str]:
    out = ["## Time by phase", ""]
    some = False
    for phase, title in (("rl", "RL steps"), ("sft", "Supervised steps")):
        parts = content.parts(run, phase)
        if parts:
            some = True
            rows = [
                (p.name, seconds(p.total), f"{100 * p.share:.1f}%", seconds(p.median), "\u2588" * round(20 * p.share))
                for p in parts
            ]
            out += [f"{title}:", "", *_table(("phase", "total", "share", "median of a step", ""), rows)]
    return out if some else [*out, "Not recorded: no step has a time yet.", ""]


def _sync(run: Run) -> list[str]:
    found = content.sync_and_memory(run)
    out = ["## Sync and memory", ""]
    if found:
        out += _table(
            ("metric", "median", "90%", "largest", "steps"),
            [(s.key, s.median, s.p90, s.largest, str(s.count)) for s in found],
        )
    if not any(s.key.startswith(("time/sync", "sync/")) for s in found):
        out += ["Sync times: not recorded (time/sync, in every step that sends weights).", ""]
    if not any("mem" in s.key for s in found):
        out += ["Memory: not recorded in this run's metrics.jsonl.", ""]
    return out


def _evaluations(runs: list[Run], names: list[str]) -> list[str]:
    rows = [
        (names[i], x.task, x.checkpoint, x.precision, figure(x.accuracy[0]),
         f"{figure(x.accuracy[1])} to {figure(x.accuracy[2])}" if x.accuracy[1] is not None else "not recorded",
         str(x.questions or "\u2013"), x.made_by)
        for i, run in enumerate(runs) for x in run.evaluations if x.made_by != "training"
    ]  # fmt: skip
    out = ["## Evaluations", ""]
    if rows:
        out += _table(("run", "task", "checkpoint", "precision", "accuracy", "95% interval", "questions", "by"), rows)
    else:
        out += ["None finished: fp8slurm eval --run RUN.", ""]
    training = sum(x.made_by == "training" for run in runs for x in run.evaluations)
    if training:
        out += [f"{training} evaluations while training: see the curve, and eval/.", ""]
    flips = [
        (names[i], c.task, c.checkpoint, f"{c.names[0]} - {c.names[1]}", figure(c.difference[0], True),
         f"{figure(c.difference[1], True)} to {figure(c.difference[2], True)}" if c.difference[1] is not None else "not recorded",
         c.verdict, f"{c.lost} lost, {c.won} won")
        for i, run in enumerate(runs) for c in run.comparisons
    ]  # fmt: skip
    if flips:
        return out + _table(
            ("run", "task", "checkpoint", "compared", "difference", "95% interval", "in words", "flipped"), flips
        )
    return [*out, "FP8 against BF16: not measured (fp8slurm eval --run RUN --precision both).", ""]


def _attempts(run: Run) -> list[str]:
    def when(at: float | None) -> str:
        return "\u2013" if at is None else datetime.fromtimestamp(at).strftime("%Y-%m-%d %H:%M:%S")

    out = ["## Attempts and faults", ""]
    if not run.attempts:
        return [*out, "Not recorded: there is no attempts folder.", ""]
    rows = [
        (str(a.number), when(a.started), when(a.ended) if a.state != "running" else "goes on",
        a.began_at or "the start",
         f"{a.last[0]} {a.last[1]}" if a.last else "not recorded", a.state, _short(a.why), str(a.engine_restarts))
        for a in run.attempts
    ]  # fmt: skip
    out += _table(("attempt", "start", "end", "continued from", "last step", "ended", "why", "engine restarts"), rows)
    faults = [
        f"- attempt {a.number}: {one_line(f, 300)}"
        for a in run.attempts
        for f in [*a.faults, *(f"changed setting: {c}" for c in a.changed)]
    ]
    return out + [*faults, ""]


def _short(text: str) -> str:
    lines = text.strip().splitlines()
    return (
        "\u2013"
        if not lines
        else one_line(lines[0] if len(lines) < 3 else f"{lines[0].split(':')[0]}: {lines[-1]}", 160)
    )


def _configuration(run: Run) -> list[str]:
    out = ["## Configuration", ""]
    if not run.config:
        return [*out, "Not recorded: config.json is missing or cannot be read.", ""]
    changed = [s for s in content.settings(run) if s.changed]
    return (
        out
        + ["What differs from the defaults:", ""]
        + _table(("setting", "this run", "default"), [(s.key, s.value, s.default) for s in changed])
    )


def _compare(runs: list[Run], names: list[str]) -> list[str]:
    all_finals = [content.finals(r) for r in runs]
    rows = []
    for key in all_finals[0]:
        values = [f[key] for f in all_finals]
        if any(v is not None for v in values):
            base = values[0]
            apart = ["\u2013" if v is None or base is None else figure(v - base, True) for v in values[1:]]
            rows.append((key, *map(figure, values), *apart))
    out = ["## Comparison", "", *_table(["figure", *names, *(f"{n} minus {names[0]}" for n in names[1:])], rows)]
    differing = content.differences(runs)
    if differing:
        return out + _table(["setting", *names], [(k, *values) for k, values in differing])
    return [*out, "No setting differs.", ""]


def _samples(found: Samples) -> list[str]:
    out = ["## Samples", ""]
    if not found.steps:
        return [*out, "Not recorded: --rollout.save-every N keeps the samples of every N-th step.", ""]
    for s in found.shown:
        out += _one(s)
    return out


def _one(s: ShownSample) -> list[str]:
    gap = "not recorded" if s.mean_gap is None else f"mean {figure(s.mean_gap)}, largest {figure(s.max_gap)} nats"
    out = [f"**Step {s.step}**, reward {figure(s.reward)}, label {cell(s.label)}, gap |d| {gap}", ""]
    for text in (s.prompt, s.response):
        out += ["    " + line for line in visible(text)[:1500].splitlines() or [""]] + [""]
    worst = sorted((p for p in s.pieces if p.gap is not None), key=lambda p: -abs(p.gap or 0.0))[:WORST]
    if worst:
        listed = ", ".join(f"\u201c{one_line(p.text, 20)}\u201d {figure(p.gap, True)}" for p in worst)
        out += [f"Largest gaps: {cell(listed)}", ""]
    return out
