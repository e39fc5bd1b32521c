"""The sections of the HTML report; every text that comes from a run goes through `e`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from html import escape
from typing import Any

from fp8slurm.report import content
from fp8slurm.report.bars import intervals, share_bar, stacked
from fp8slurm.report.safe import figure, one_line, seconds, visible
from fp8slurm.report.samples import Samples
from fp8slurm.run.attempts import Attempt
from fp8slurm.run.evaluations import Evaluation
from fp8slurm.run.reader import Run

BINS = (0.01, 0.05, 0.2)
"""|d| in nats at which a token's colour gets stronger."""
TRAINING_SHOWN = 40
"""Evaluations of the training loop in the table."""


def e(value: Any) -> str:
    """Text of a run, safe inside HTML."""
    return escape(visible(value))


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], label: str, numbers: Iterable[int] = ()) -> str:
    """Cells are HTML already; the columns `numbers` are set flush right. Scrolls by itself where it is too wide."""
    right = set(numbers)

    def cell(tag: str, i: int, text: str) -> str:
        return f"<{tag}{' class=n' if i in right else ''}>{text}</{tag}>"

    head = "".join(cell("th", i, h) for i, h in enumerate(heads))
    body = "".join(f"<tr>{''.join(cell('td', i, c) for i, c in enumerate(row))}</tr>" for row in rows)
    return (
        f'<div class="scroll" role="region" tabindex="0" '
        f'aria-label="{escape(label)}"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def when(at: float | None) -> str:
    """Local time, to the second."""
    return "\u2013" if at is None else datetime.fromtimestamp(at).strftime("%Y-%m-%d %H:%M:%S")


def cards(run: Run) -> str:
    """The headline figures."""
    out = []
    for h in content.headlines(run):
        kind = "none" if h.value == "not measured" else "value"
        out.append(
            f'<div class="card"><dt>{e(h.title)}</dt><dd class="{kind}">{e(h.value)}</dd><dd '
            f'class="detail">{e(h.detail)}</dd></div>'
        )
    return f'<dl class="cards">{"".join(out)}</dl>'


def configuration(run: Run) -> str:
    """What differs from the defaults, then everything, then packages and command."""
    if not run.config:
        return "<p>Not recorded: config.json is missing or cannot be read.</p>"
    every = content.settings(run)

    def rows(settings: list[content.Setting]) -> list[list[str]]:
        return [
            [
                f'<code>{e(s.key)}</code><span class="help">{e(s.help)}</span>',
                f"<code>{e(s.value)}</code>",
                f"<code>{e(s.default)}</code>",
            ]
            for s in settings
        ]

    changed = [s for s in every if s.changed]
    heads = ("setting", "this run", "default")
    out = [
        f"<details open><summary>{len(changed)} settings differ from the "
        f"defaults</summary>{table(heads, rows(changed), 'changed settings')}</details>",
        f"<details><summary>All {len(every)} settings</summary>{table(heads, rows(every), 'all settings')}</details>",
    ]
    newest = run.attempts[-1] if run.attempts else None
    if newest is not None and newest.packages:
        packages = [[e(k), f"<code>{e(v)}</code>"] for k, v in newest.packages.items()]
        command = f"<pre>{e(' '.join(newest.command))}</pre>" if newest.command else ""
        out.append(
            f"<details><summary>Packages and "
            f"command</summary>{table(('package', 'version'), packages, 'packages')}{command}</details>"
        )
    return "".join(out)


def times(run: Run) -> str:
    """Stacked bars of every phase of the run, all of it as one bar, and a table."""
    out = []
    for phase, title in (("rl", "RL steps"), ("sft", "Supervised steps")):
        rows = content.phase_seconds(run, phase)
        if not rows:
            continue
        parts = content.parts(run, phase)
        cells = [[e(p.name), e(seconds(p.total)), f"{100 * p.share:.1f}%", e(seconds(p.median))] for p in parts]
        out.append(
            f'<h3>{title}</h3><div class="panel">{share_bar(parts)}</div>{stacked(rows, f"time-{phase}", title)}'
            f"<details><summary>Seconds by "
            f"phase</summary>{table(('phase', 'total', 'share', 'median of a step'), cells, title, (1, 2, 3))}</details>"
        )
    if not out:
        return "<p>Not recorded: no step has a time yet.</p>"
    return "".join(out) + (
        '<p class="note">"other" is what no phase claims of time/step. The checkpoint is written between two steps '
        "and counted with the later one. "
        "Starting up, and steps that a later attempt did again, are not in metrics.jsonl and not counted.</p>"
    )


def sync(run: Run) -> str:
    """Weight sync and memory."""
    rows = [
        [f"<code>{e(s.key)}</code>", e(s.median), e(s.p90), e(s.largest), str(s.count)]
        for s in content.sync_and_memory(run)
    ]
    out = table(("metric", "median", "90%", "largest", "steps"), rows, "sync and memory", (1, 2, 3, 4)) if rows else ""
    if not any(s.key.startswith(("time/sync", "sync/")) for s in content.sync_and_memory(run)):
        out += (
            "<p>Sync times: not recorded. They are written (time/sync) in every step that sends weights to the "
            "engines.</p>"
        )
    if not any("mem" in s.key for s in content.sync_and_memory(run)):
        out += (
            "<p>Memory: not recorded in this run's metrics.jsonl (no memory/... key). <code>fp8slurm plan --recipe "
            "R</code> computes what each GPU "
            "should need.</p>"
        )
    return out


def evaluations(runs: list[Run], names: list[str]) -> str:
    """Every finished evaluation with its interval, then FP8 against BF16."""
    found = [(i, names[i], x) for i, run in enumerate(runs) for x in run.evaluations]
    several = len(runs) > 1
    out = []
    own = [f for f in found if f[2].made_by != "training"]
    training = [f for f in found if f[2].made_by == "training"]
    if own:
        rows = [
            (_evaluation_name(n if several else "", x), i % 6 if several else int(x.precision != "fp8"), x.accuracy)
            for i, n, x in own
        ]
        out.append(f'<div class="charts">{intervals(rows[:24], "evals", "Accuracy with 95% intervals")}</div>')
        out.append(_evaluation_table(own, several))
    else:
        out.append(
            "<p>None finished. <code>fp8slurm eval --run RUN</code> evaluates the newest checkpoint; "
            "<code>--precision both</code> compares FP8 with BF16.</p>"
        )
    if training:
        kept = training if len(training) <= TRAINING_SHOWN else training[-TRAINING_SHOWN:]
        more = f", the last {TRAINING_SHOWN}" if len(kept) < len(training) else ""
        out.append(
            f"<details><summary>{len(training)} evaluations while "
            f"training{more}</summary>{_evaluation_table(kept, several)}</details>"
        )
    out.append(_comparisons(runs, names))
    return "".join(out)


def _evaluation_name(run: str, x: Evaluation) -> str:
    return " ".join(p for p in (run, x.task, x.checkpoint, x.precision.upper()) if p)


def _evaluation_table(found: list[tuple[int, str, Evaluation]], several: bool) -> str:
    rows = []
    for _, name, x in found:
        value, low, high = x.accuracy
        ks = sorted(x.pass_at_k.items(), key=lambda i: int(i[0]) if i[0].isdigit() else 0)
        passes = ", ".join(f"@{k} {figure(i[0])}" for k, i in ks if k != "1")
        rows.append([
            *([e(name)] if several else []), e(x.task), e(x.checkpoint), e(x.precision.upper()),
            f"<b>{figure(value)}</b>",
            f"{figure(low)} to {figure(high)}" if low is not None else "not recorded", e(passes or "\u2013"),
            _plain(x.questions), _plain(x.samples), figure(x.response_tokens),
            "\u2013" if x.truncated is None else f"{100 * x.truncated:.1f}%", figure(x.tokens_per_second),
        ])  # fmt: skip
    heads = [
        *(["run"] if several else []),
        "task",
        "checkpoint",
        "precision",
        "accuracy",
        "95% interval",
        "pass@k",
        "questions",
        "samples",
        "tokens a response",
        "truncated",
        "tokens/s",
    ]
    first = 3 + several
    return table(heads, rows, "evaluations", (first, first + 1, *range(first + 3, first + 8)))


def _plain(value: int | None) -> str:
    return "\u2013" if value is None else f"{value:,}"


def _comparisons(runs: list[Run], names: list[str]) -> str:
    found = [(i, names[i], c) for i, run in enumerate(runs) for c in run.comparisons]
    if not found:
        return (
            "<h3>FP8 against BF16</h3><p>Not measured. <code>fp8slurm eval --run RUN --precision both</code> asks "
            "both the same questions.</p>"
        )
    several = len(runs) > 1
    out = ["<h3>FP8 against BF16, same checkpoint</h3>"]
    rows = [(f"{n + ' ' if several else ''}{c.task} {c.checkpoint}", i % 6, c.difference) for i, n, c in found]
    out.append(
        f'<div class="charts">'
        f"{intervals(rows[:24], 'diffs', 'Difference in accuracy, 95% paired interval', True)}</div>"
    )
    cells = []
    for _, name, c in found:
        value, low, high = c.difference
        cells.append([
            *([e(name)] if several else []), e(c.task), e(c.checkpoint), e(f"{c.names[0]} \u2212 {c.names[1]}"),
            figure(c.a), figure(c.b), f"<b>{figure(value, True)}</b>",
            f"{figure(low, True)} to {figure(high, True)}" if low is not None else "not recorded", e(c.verdict),
            f"{c.lost} lost, {c.won} won", figure(c.gap.get("mean_abs")), figure(c.speed_ratio),
        ])  # fmt: skip
    heads = [
        *(["run"] if several else []),
        "task",
        "checkpoint",
        "compared",
        "first",
        "second",
        "difference",
        "95% interval",
        "in words",
        "flipped",
        "gap, mean |d|",
        "speed ratio",
    ]
    return "".join(out) + table(heads, cells, "FP8 against BF16")


def attempts(run: Run) -> str:
    """Each attempt with its end, then the faults."""
    if not run.attempts:
        return "<p>Not recorded: there is no attempts folder.</p>"
    rows = []
    for a in run.attempts:
        span = seconds(a.ended - a.started) if a.ended and a.started and a.ended >= a.started else "\u2013"
        last = f"{a.last[0]} {a.last[1]}" if a.last else "not recorded"
        begun = a.began_at or "the start"
        job = f'<span class="help">job {e(a.job)}</span>' if a.job else ""
        rows.append([
            f"{a.number}{job}", _when(a.started), _when(a.ended) if a.state != "running" else "goes on", span, e(begun),
            e(last),
            f'<span class="pill {a.state}">{a.state}</span>', _why(a), str(a.engine_restarts),
        ])  # fmt: skip
    heads = ("attempt", "start", "end", "lasted", "continued from", "last step", "ended", "why", "engine restarts")
    out = [table(heads, rows, "attempts", (3, 8))]
    out.append(
        '<p class="note">Start: when the attempt wrote its first file. End: its last task\'s mark, or else the last '
        "line of its logs. "
        "The last step of an attempt whose metrics were cut back by the next one is not recorded by older versions.</p>"
    )
    for a in run.attempts:
        if a.faults or a.changed or a.stacks:
            items = [*a.faults, *(f"changed setting: {c}" for c in a.changed)]
            if a.stacks:
                items.append(f"stacks of {a.stacks} tasks are in attempts/{a.number}/stacks")
            out.append(
                f"<h3>Attempt {a.number}</h3><ul "
                f'class="plain">{"".join(f"<li>{e(one_line(i, 500))}</li>" for i in items)}</ul>'
            )
    if not any(a.faults for a in run.attempts):
        out.append("<p>No checkpoint was skipped and no engine was restarted, as far as the logs say.</p>")
    return "".join(out)


def _when(at: float | None) -> str:
    """Date and time, on a line each."""
    return when(at).replace(" ", "<br>").replace("-", "\u2011")


def _why(a: Attempt) -> str:
    text = a.why.strip()
    lines = text.splitlines()
    if len(lines) < 2 and len(text) < 160:
        return e(text or "\u2013")
    head = (
        lines[0]
        if not lines[0].rstrip().endswith("Traceback (most recent call last):")
        else lines[0].split(":")[0] + ": " + lines[-1]
    )
    return f"{e(one_line(head, 160))}<details><summary>all of it</summary><pre>{e(text[-8000:])}</pre></details>"


def samples(run: Run, found: Samples) -> str:
    """The controls of the sample browser; the script fills the list."""
    if not found.steps:
        return (
            "<p>Not recorded: <code>--rollout.save-every N</code> keeps the samples of every N-th step, with the "
            "trainer's log-probabilities.</p>"
        )
    if not found.shown:
        return "<p>Rollouts were saved, but none of their samples is shown (--samples 0, or they cannot be read).</p>"
    steps = "steps" if found.read != 1 else "step"
    lines = [f"{len(found.shown):,} of the {found.saved:,} samples of {found.read} saved {steps} are in this file."]
    if len(found.shown) < found.saved:
        lines.append(
            "Of every step half are those with the largest gap, half are spread evenly; <code>--samples N</code> "
            "embeds more, up to a size."
        )
    if found.read < len(found.steps):
        lines.append(f"{len(found.steps) - found.read:,} more saved steps, spread evenly, were not read.")
    if not found.with_gap:
        lines.append(
            "Per-token gaps: not recorded. The run was made before saved rollouts carried the trainer's "
            "log-probabilities (rollouts/trainer/step_N.jsonl)."
        )
    if not found.decoded:
        lines.append("No tokenizer.json was found where the configuration says: tokens are shown by number.")
    steps = "".join(f'<option value="{s}">{s}</option>' for s in sorted({s.step for s in found.shown}))
    names = [f"{a:g} to {b:g}" for a, b in zip(BINS, BINS[1:])] + [f"{BINS[-1]:g} and more"]
    legend = "".join(f'<li><span class="u{i}">+{n}</span></li>' for i, n in enumerate(names, 1))
    legend += "".join(f'<li><span class="n{i}">\u2212{n}</span></li>' for i, n in enumerate(names, 1))
    return f"""<p>{" ".join(lines)}</p>
<p class="note">d = trainer's minus engine's log-probability of the token, in nats. Orange: the trainer finds it likelier than the engine did; blue: less likely.
Point at a token, or click it, for its figures.</p>
<ul class="gaps" aria-label="legend of the colours"><li><span>below {BINS[0]:g}</span></li>{legend}</ul>
<div class="filters panel">
<label>Step<select id="f-step"><option value="">all</option>{steps}</select></label>
<label>Reward from<input id="f-low" type="number" step="any" inputmode="decimal"></label>
<label>Reward to<input id="f-high" type="number" step="any" inputmode="decimal"></label>
<label>Order<select id="f-sort"><option value="">as saved</option><option value="gap">largest gap first</option><option value="low">lowest reward first</option><option value="high">highest reward first</option></select></label>
</div>
<div class="pager"><button id="f-back" type="button">Back</button><button id="f-next" type="button">Next</button><output id="f-count" aria-live="polite"></output>
<span class="keys"><kbd>j</kbd> <kbd>k</kbd> sample, <kbd>n</kbd> <kbd>p</kbd> page</span></div>
<div id="sample-list"></div><noscript><p>The sample browser needs JavaScript; everything else in this file does without.</p></noscript>"""
