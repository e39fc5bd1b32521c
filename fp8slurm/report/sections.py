"""The sections of a report, as blocks that page.py makes HTML of and text.py Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from fp8slurm.observe.plot import PHASES, phase_seconds
from fp8slurm.report import content, curves
from fp8slurm.report.blocks import Block, Browser, Charts, Fold, Head, Intervals, Items, Table, Text, Times
from fp8slurm.report.blocks import Timeline as Drawn
from fp8slurm.report.safe import DASH, figure, one_line, seconds, when
from fp8slurm.report.samples import Samples
from fp8slurm.run.attempts import Attempt
from fp8slurm.run.evaluations import Comparison, Evaluation, Interval
from fp8slurm.run.reader import Run
from fp8slurm.run.timeline import around, read_timeline, who_waits

TRAINING_SHOWN = 40
"""Evaluations of the training loop in the table."""
INTERVALS_SHOWN = 24


def sections(run: Run, samples: Samples, others: list[Run], names: list[str]) -> list[tuple[str, str, list[Block]]]:
    """(id, title, blocks) of each. `names`: how `run` and the `others` are called, in this order."""
    runs = [run, *others]
    return [
        *([("compare", "Comparison", _compare(runs, names))] if others else []),
        ("curves", "Curves", _curves(run)),
        ("time", "Time by phase", _times(run)),
        *([("timeline", "One step, who waits for whom", shown)] if (shown := _timeline(run)) else []),
        ("sync", "Sync and memory", _sync(run)),
        ("evaluations", "Evaluations", _evaluations(runs, names)),
        ("attempts", "Attempts and faults", _attempts(run)),
        ("configuration", "Configuration", _configuration(run)),
        ("samples", "Samples", _samples(samples)),
    ]


def _compare(runs: list[Run], names: list[str]) -> list[Block]:
    finals = [content.finals(run) for run in runs]
    rows = []
    for key, first in finals[0].items():
        values = [f[key] for f in finals]
        if any(v is not None for v in values):
            apart = [DASH if v is None or first is None else figure(v - first, True) for v in values[1:]]
            rows.append((key, *map(figure, values), *apart))
    apart_heads = [f"{name} minus {names[0]}" for name in names[1:]]
    medians = []
    for slot, (_, phase) in enumerate(PHASES):
        spent = [[v[slot] for _, v in phase_seconds(run.records) if v[slot] > 0] for run in runs]
        medians.append((phase, *(f"{statistics.median(s):.2f} s" if s else DASH for s in spent)))
    differing = [(key, *values) for key, values in content.differences(runs)]
    return [
        Head("Figures"),
        Table("final figures", ("figure", *names, *apart_heads), rows, "m" + "n" * (len(names) + len(apart_heads))),
        Text("Differences of single runs: how far two seeds of the same settings lie apart they do not say.", True),
        Head("Curves on each other"),
        Charts(curves.several(runs, names), "all-"),
        Head("Settings that differ"),
        Table("settings", ("setting", *names), differing, "c" * (1 + len(names))) if differing else Text("None."),
        Head("Time by phase, median of an RL step"),
        Table("time by phase", ("phase", *names), medians, "t" + "n" * len(names)),
    ]  # fmt: skip


def _curves(run: Run) -> list[Block]:
    charts = curves.one_run(run)
    out: list[Block] = [Charts(charts)]
    if lacking := curves.missing(run):
        out.append(Items([f"{name}: {how}" for name, how in lacking], "Not recorded in this run"))
    if charts:
        hint = (
            "Over the steps of the phase (RL unless it says supervised). Point at a curve of the HTML report, or move "
        )
        out.append(Text(f"{hint}with the arrow keys, for its values. docs/metrics.md says what each is.", True))
    return out


def _times(run: Run) -> list[Block]:
    out: list[Block] = []
    for phase, title in (("rl", "RL steps"), ("sft", "Supervised steps")):
        if rows := phase_seconds(run.records, phase):
            out += [Head(title), Times(f"time-{phase}", title, rows, content.parts(run, phase))]
    if not out:
        return [Text("Not recorded: no step has a time yet.")]
    note = (
        '"other" is what no phase claims of time/step. The checkpoint is written between two steps and counted '
        "with the later one. Starting up, and steps that a later attempt did again, are not in metrics.jsonl and not"
        " counted."
    )
    return [*out, Text(note, True)]


def _timeline(run: Run) -> list[Block]:
    """The newest RL step that trained and whose successor is recorded: engines may have worked for that one."""
    if not run.attempts:
        return []
    entries = read_timeline(run.path / "attempts" / str(run.attempts[-1].number))
    trained = {r["step"] for r in run.records if r["phase"] == "rl" and r.get("time/train")}
    steps = [e for e in entries if e["phase"] == "rl" and e["step"] in trained]
    if not steps:
        return []
    entry = steps[-2] if len(steps) > 1 else steps[-1]
    spans, lasted = around(entries, entry["step"]), entry["end"] - entry["begin"]
    record = next(r for r in run.records if (r["phase"], r["step"]) == ("rl", entry["step"]))
    off = max((clock[1] for clock in entry["clocks"].values()), default=0.0)
    note = (
        f"Seconds since the step began, on the clock of the first training rank, as far as nodes agree ({off:.3f} s). "
        "An engine is generating while it has requests; a rollout worker's bars are the commands that it works on."
    )
    told = f"RL step {entry['step']}, {seconds(lasted)}. Waiting: {who_waits(record) or 'not recorded'}."
    return [Text(told), Drawn(f"timeline-{entry['step']}", f"RL step {entry['step']}", spans, lasted), Text(note, True)]


def _sync(run: Run) -> list[Block]:
    rows = content.sync_and_memory(run)
    out: list[Block] = []
    if rows:
        out.append(Table("sync and memory", ("metric", "median", "90%", "largest", "steps"), rows, "cnnnn"))
    if not any(key.startswith(("time/sync", "sync/")) for key, *_ in rows):
        out.append(Text("Sync times: not recorded (time/sync, in every step that sends weights to the engines)."))
    if not any("mem" in key for key, *_ in rows):
        told = "Memory: not recorded in this run's metrics.jsonl (no memory/... key). "
        out.append(Text(told + "`fp8slurm plan --recipe R` computes what each GPU should need."))
    return [*out, Charts(curves.sync(run))]


def _evaluations(runs: list[Run], names: list[str]) -> list[Block]:
    several = len(runs) > 1
    every = [(i, name, x) for i, (run, name) in enumerate(zip(runs, names)) for x in run.evaluations]
    own = [row for row in every if row[2].made_by != "training"]
    training = [row for row in every if row[2].made_by == "training"]
    out: list[Block] = []
    if own:
        drawn = [
            (" ".join(p for p in (name if several else "", x.task, x.checkpoint, x.served) if p),
             i % 6 if several else int(x.precision != "fp8") + 2 * int(x.kv_cache != "auto"), x.accuracy)
            for i, name, x in own
        ]  # fmt: skip
        out.append(Intervals("evals", "Accuracy with 95% intervals", drawn[:INTERVALS_SHOWN]))
        out.append(_evaluation_table(own, several))
    else:
        told = "None finished. `fp8slurm eval --run RUN` evaluates the newest checkpoint; "
        out.append(Text(told + "`--precision both` compares FP8 with BF16."))
    if training:
        more = f", the last {TRAINING_SHOWN}" if len(training) > TRAINING_SHOWN else ""
        table = _evaluation_table(training[-TRAINING_SHOWN:], several)
        out.append(Fold(f"{len(training)} evaluations while training{more}", table))
    pairs = [(i, name, c) for i, (run, name) in enumerate(zip(runs, names)) for c in run.comparisons]
    if not pairs:
        told = "Not measured. `fp8slurm eval --run RUN --precision both` asks both the same questions."
        return [*out, Head("FP8 against BF16"), Text(told)]
    drawn = [(f"{name + ' ' if several else ''}{c.task} {c.checkpoint}", i % 6, c.difference) for i, name, c in pairs]
    title = "Difference in accuracy, 95% paired interval"
    out += [Head("FP8 against BF16, same checkpoint"), Intervals("diffs", title, drawn[:INTERVALS_SHOWN], True)]
    return [*out, _comparison_table(pairs, several)]


def _evaluation_table(rows: Sequence[tuple[int, str, Evaluation]], several: bool) -> Table:
    cells = []
    for _, name, x in rows:
        ks = sorted(x.pass_at_k.items(), key=lambda i: int(i[0]) if i[0].isdigit() else 0)
        passes = ", ".join(f"@{k} {figure(i[0])}" for k, i in ks if k != "1")
        cells.append((
            name, x.task, x.checkpoint, x.served, figure(x.accuracy[0]), _interval(x.accuracy),
            passes or DASH, _count(x.questions), _count(x.samples), figure(x.response_tokens),
            DASH if x.truncated is None else f"{100 * x.truncated:.1f}%", figure(x.tokens_per_second),
        ))  # fmt: skip
    heads = (
        "run", "task", "checkpoint", "precision", "accuracy", "95% interval", "pass@k", "questions", "samples",
        "tokens a response", "truncated", "tokens/s",
    )  # fmt: skip
    return _with_run("evaluations", heads, cells, "ttttbntnnnnn", several)


def _comparison_table(rows: Sequence[tuple[int, str, Comparison]], several: bool) -> Table:
    cells = [
        (name, c.task, c.checkpoint, f"{c.names[0]} \u2212 {c.names[1]}", figure(c.a), figure(c.b),
         figure(c.difference[0], True), _interval(c.difference, True), c.verdict, f"{c.lost} lost, {c.won} won",
         figure(c.gap.get("mean_abs")), figure(c.speed_ratio))
        for _, name, c in rows
    ]  # fmt: skip
    heads = (
        "run", "task", "checkpoint", "compared", "first", "second", "difference", "95% interval", "in words", "flipped",
        "gap, mean |d|", "speed ratio",
    )  # fmt: skip
    return _with_run("FP8 against BF16", heads, cells, "ttttnnbnttnn", several)


def _with_run(label: str, heads: Sequence[str], cells: Sequence[tuple[str, ...]], kinds: str, several: bool) -> Table:
    """A table whose first column names the run, where there are several."""
    return Table(label, heads, cells, kinds) if several else Table(label, heads[1:], [c[1:] for c in cells], kinds[1:])


def _interval(estimate: Interval, signed: bool = False) -> str:
    _, low, high = estimate
    return "not recorded" if low is None else f"{figure(low, signed)} to {figure(high, signed)}"


def _count(value: int | None) -> str:
    return DASH if value is None else f"{value:,}"


def _attempts(run: Run) -> list[Block]:
    if not run.attempts:
        return [Text("Not recorded: there is no attempts folder.")]
    rows: list[tuple[str, ...]] = []
    out: list[Block] = []
    for a in run.attempts:
        rows.append((
            f"{a.number}\njob {a.job}" if a.job else f"{a.number}", when(a.started),
            when(a.ended) if a.state != "running" else "goes on",
            seconds(a.ended - a.started) if a.ended and a.started and a.ended >= a.started else DASH,
            a.began_at or ("the start" if a.recorded else "not recorded"),
            f"{a.last[0]} {a.last[1]}" if a.last else "not recorded", a.state,
            _why(a, run.attempts[-1]), str(a.engine_restarts) if a.recorded else "not recorded",
        ))  # fmt: skip
        items = [*a.faults, *(f"changed setting: {c}" for c in a.changed)]
        if a.stacks:
            items.append(f"stacks of {a.stacks} tasks are in attempts/{a.number}/stacks")
        if items:
            out += [Head(f"Attempt {a.number}"), Items([one_line(i, 500) for i in items])]
    heads = ("attempt", "start", "end", "lasted", "continued from", "last step", "ended", "why", "engine restarts")
    note = (
        "Start: when the attempt wrote its first file. End: its last task's mark, or else the last line of its logs. "
        "The last step of an attempt whose metrics were cut back by the next one is not recorded by older versions."
    )
    if not all(a.recorded for a in run.attempts):
        told = "An attempt of an older version, or one that ended before its tasks began, has no `events` folder: "
        out.append(Text(told + "where it began, skipped checkpoints and engine restarts stand in its logs only."))
    elif not any(a.faults for a in run.attempts):
        out.append(Text("No checkpoint was skipped and no engine was restarted."))
    return [Table("attempts", heads, rows, "twwnttpln"), Text(note, True), *out]


def _why(a: Attempt, newest: Attempt) -> str:
    """Why an attempt ended; a failure that the run has left behind says so."""
    left_behind = a.state == "failed" and a.number != newest.number and newest.state != "failed"
    return ("earlier: " if left_behind else "") + a.why.strip() or DASH


def _configuration(run: Run) -> list[Block]:
    """What differs from the defaults, then everything, then packages and command."""
    if not run.config:
        return [Text("Not recorded: config.json is missing or cannot be read.")]
    every = content.settings(run)
    rows = [(f"{s.key}\n{s.help}", s.value, s.default) for s in every]
    changed = [row for row, s in zip(rows, every) if s.changed]
    heads = ("setting", "this run", "default")
    table = Table("changed settings", heads, changed, "ccc")
    out: list[Block] = [
        Fold(f"{len(changed)} settings differ from the defaults", table, open=True),
        Fold(f"All {len(every)} settings", Table("all settings", heads, rows, "ccc")),
    ]
    newest = run.attempts[-1] if run.attempts else None
    if newest is not None and newest.packages:
        packages = Table("packages", ("package", "version"), list(newest.packages.items()), "tc")
        out.append(Fold("Packages and command", packages, " ".join(newest.command)))
    return out


def _samples(samples: Samples) -> list[Block]:
    if not samples.steps:
        told = "Not recorded: `--rollout.save-every N` keeps the samples of every N-th step, "
        return [Text(told + "with the trainer's log-probabilities.")]
    if not samples.shown:
        return [Text("Rollouts were saved, but none of their samples is shown (--samples 0, or they cannot be read).")]
    steps = "steps" if samples.read != 1 else "step"
    lines = [f"{len(samples.shown):,} of the {samples.saved:,} samples of {samples.read} saved {steps} are shown."]
    if len(samples.shown) < samples.saved:
        lines.append("Of every step half are those with the largest gap, half are spread evenly;")
        lines.append("`--samples N` embeds more, up to a size.")
    if samples.read < len(samples.steps):
        lines.append(f"{len(samples.steps) - samples.read:,} more saved steps, spread evenly, were not read.")
    if not samples.with_gap:
        lines.append("Per-token gaps: not recorded. The run was made before saved rollouts carried the trainer's")
        lines.append("log-probabilities (rollouts/trainer/step_N.jsonl).")
    if not samples.decoded:
        lines.append("No tokenizer.json was found where the configuration says: tokens are shown by number.")
    return [Text(" ".join(lines)), Browser(samples)]
