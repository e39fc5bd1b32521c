"""The HTML report: one file without any reference outside it."""

from __future__ import annotations

import base64
import hashlib
import json
import statistics
from datetime import datetime
from html import escape
from importlib.resources import files
from typing import Any

from fp8slurm.report import content, curves, sections
from fp8slurm.report.charts import Chart, Line, line_chart, swatch
from fp8slurm.report.safe import figure
from fp8slurm.report.samples import Samples, ShownSample
from fp8slurm.report.sections import e, table
from fp8slurm.run.reader import Run


def page(run: Run, found: Samples, others: list[Run], names: list[str]) -> str:
    """The whole document. `names`: how `run` and the `others` are called, in this order."""
    runs = [run, *others]
    drawn: dict[str, Any] = {}
    parts = []
    if others:
        parts.append(("compare", "Comparison", _compare(runs, names, drawn)))
    parts += [
        ("curves", "Curves", _curves(run, drawn)),
        ("time", "Time by phase", sections.times(run)),
        ("sync", "Sync and memory", sections.sync(run) + _draw(curves.sync(run), drawn)),
        ("evaluations", "Evaluations", sections.evaluations(runs, names)),
        ("attempts", "Attempts and faults", sections.attempts(run)),
        ("configuration", "Configuration", sections.configuration(run)),
        ("samples", "Samples", sections.samples(run, found)),
    ]
    data = {"charts": drawn, "bins": sections.BINS, "samples": [_sample(s) for s in found.shown]}
    body = "".join(
        f'<section id="{id}" aria-labelledby="{id}-h"><h2 id="{id}-h">{title}</h2>{html}</section>'
        for id, title, html in parts
    )
    nav = "".join(f'<li><a href="#{id}">{title}</a></li>' for id, title, _ in parts)
    style, script = (files("fp8slurm.report").joinpath(n).read_text() for n in ("style.css", "script.js"))
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; base-uri 'none'; "
        f"form-action 'none'"
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<meta name="color-scheme" content="light dark">
<title>{e(run.name)} \u2013 fp8slurm report</title>
<style>{style}</style>
</head>
<body>
{_header(run)}
<nav aria-label="sections"><ul>{nav}</ul></nav>
<main>
{body}
</main>
<footer>fp8slurm report, {datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")}, of {e(run.path)}. Nothing in this file is loaded from anywhere else.</footer>
<script type="application/json" id="data">{embed(data)}</script>
<script>{script}</script>
</body>
</html>
"""


def embed(value: Any) -> str:
    """JSON that no HTML parser sees an end tag or a comment in."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for c in "<>&\u2028\u2029":
        text = text.replace(c, f"\\u{ord(c):04x}")
    return text


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _header(run: Run) -> str:
    word, words = content.status(run)
    facts = [content.precision(run)]
    if run.setting("model.hf_checkpoint"):
        facts.append(str(run.setting("model.hf_checkpoint")))
    nodes, ranks = run.setting("slurm.nodes"), run.setting("slurm.ranks_per_node")
    if nodes and ranks:
        facts.append(f"{nodes} node{'s' if nodes != 1 else ''}, {ranks} rank{'s' if ranks != 1 else ''} each")
    if run.attempts and run.attempts[0].started:
        facts.append(f"started {sections.when(run.attempts[0].started)}")
    out = [f'<h1>{e(run.name)}</h1><p><span class="pill {word}">{word}</span> {e(words)}</p>']
    told = " \u00b7 ".join(facts)
    out.append(f'<p class="soft">{e(told)}</p>')
    switched = content.controls(run)
    if switched:
        out.append(
            f'<p class="banner">This run is a control experiment, made to fail: {e(", ".join(switched))}. Its figures '
            f"say nothing about training.</p>"
        )
    out.append(sections.cards(run))
    if run.notes:
        shown = "".join(f"<li>{e(n)}</li>" for n in run.notes[:30])
        more = f"<li>and {len(run.notes) - 30} more</li>" if len(run.notes) > 30 else ""
        out.append(f'<div class="banner"><b>Not everything could be read</b><ul class="plain">{shown}{more}</ul></div>')
    return f"<header>{''.join(out)}</header>"


def _draw(charts: list[Chart], drawn: dict[str, Any], prefix: str = "") -> str:
    if not charts:
        return ""
    out = []
    for chart in charts:
        chart.id = prefix + chart.id
        html, drawn[chart.id] = line_chart(chart)
        out.append(html)
    return f'<div class="charts">{"".join(out)}</div>'


def _curves(run: Run, drawn: dict[str, Any]) -> str:
    charts = curves.one_run(run)
    out = _draw(charts, drawn)
    lacking = curves.missing(run)
    if lacking:
        items = "".join(f"<li>{e(name)}: {e(how)}</li>" for name, how in lacking)
        out += f'<div class="panel"><b>Not recorded in this run</b><ul class="plain">{items}</ul></div>'
    if charts:
        out += (
            '<p class="note">Over the steps of the phase (RL unless it says supervised). Point at a curve, or move '
            "with the arrow keys, for its values; the bold figure is the last one. docs/metrics.md says what each "
            "is.</p>"
        )
    return out


def _compare(runs: list[Run], names: list[str], drawn: dict[str, Any]) -> str:
    looks = [swatch(Line(n, [], i % 6, i % 6)) for i, n in enumerate(names)]
    heads = ["figure", *(f"{look}{e(n)}" for look, n in zip(looks, names))]
    rows = []
    all_finals = [content.finals(r) for r in runs]
    for key in all_finals[0]:
        values = [f[key] for f in all_finals]
        if all(v is None for v in values):
            continue
        base = values[0]
        apart = [""] + [
            "" if v is None or base is None else f'<span class="help">{figure(v - base, True)}</span>'
            for v in values[1:]
        ]
        rows.append([f'<span class="name">{e(key)}</span>', *(f"{figure(v)}{d}" for v, d in zip(values, apart))])
    out = [f"<h3>Figures</h3>{table(heads, rows, 'final figures', range(1, len(runs) + 1))}"]
    out.append(
        f'<p class="note">Small figures: the difference to {e(names[0])}. Differences of single runs: how far two '
        f"seeds of the same settings lie apart is not known from them.</p>"
    )
    out.append(f"<h3>Curves on each other</h3>{_draw(curves.several(runs, names), drawn, 'all-')}")
    differing = content.differences(runs)
    if differing:
        cells = [[f"<code>{e(k)}</code>", *(f"<code>{e(v)}</code>" for v in values)] for k, values in differing]
        out.append(f"<h3>Settings that differ</h3>{table(['setting', *map(e, names)], cells, 'settings that differ')}")
    else:
        out.append("<h3>Settings that differ</h3><p>None.</p>")
    out.append(f"<h3>Time by phase, median of an RL step</h3>{_phase_table(runs, names)}")
    return "".join(out)


def _phase_table(runs: list[Run], names: list[str]) -> str:
    rows = []
    for slot, (_, name) in enumerate(content.PHASES):
        cells = []
        for run in runs:
            values = [v[slot] for _, v in content.phase_seconds(run) if v[slot] > 0]
            cells.append(f"{statistics.median(values):.2f} s" if values else "\u2013")
        rows.append([escape(name), *cells])
    return table(["phase", *map(e, names)], rows, "time by phase", range(1, len(runs) + 1))


def _sample(s: ShownSample) -> dict[str, Any]:
    def short(value: float | None) -> float | None:
        return None if value is None else float(f"{value:.4g}")

    return {
        "step": s.step, "index": s.index, "prompt": s.prompt, "label": s.label,
        "response": "" if s.pieces else s.response,
        "reward": s.reward, "finish": s.finish, "mean": short(s.mean_gap), "max": short(s.max_gap), "cut": s.cut,
        "tokens": [[p.text, short(p.trainer), short(p.engine), short(p.gap)] for p in s.pieces],
    }  # fmt: skip
