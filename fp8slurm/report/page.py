"""The HTML report: one file without any reference outside it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from datetime import datetime
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from fp8slurm.report import content
from fp8slurm.report.blocks import Block, Browser, Charts, Fold, Head, Intervals, Items, Table, Text, Timeline, Times
from fp8slurm.report.drawing import intervals, line_chart, share_bar, stacked, timeline
from fp8slurm.report.lanes import LANE_HEADS, lane_rows
from fp8slurm.report.safe import gist, seconds, visible
from fp8slurm.report.samples import Samples, ShownSample
from fp8slurm.report.sections import sections
from fp8slurm.run.reader import Run

BINS = (0.01, 0.05, 0.2)
"""|d| in nats at which a token's colour gets stronger."""


def page(run: Run, samples: Samples, others: list[Run], names: list[str]) -> str:
    """The whole document. `names`: how `run` and the `others` are called, in this order."""
    drawn: dict[str, Any] = {}
    parts = [
        (id, title, "".join(_block(block, drawn) for block in blocks))
        for id, title, blocks in sections(run, samples, others, names)
    ]
    data = {"charts": drawn, "bins": BINS, "samples": [_sample(s) for s in samples.shown]}
    body = "".join(
        f'<section id="{id}" aria-labelledby="{id}-h"><h2 id="{id}-h">{title}</h2>{html}</section>'
        for id, title, html in parts
    )
    nav = "".join(f'<li><a href="#{id}">{title}</a></li>' for id, title, _ in parts)
    style, script = _file("style.css"), _file("script.js")
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; base-uri 'none'; "
        f"form-action 'none'"
    )
    return Template(_file("page.html")).substitute(
        policy=policy, name=e(run.name), style=style, header=_header(run), nav=nav, body=body, path=e(run.path),
        date=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"), data=embed(data), script=script,
    )  # fmt: skip


def _file(name: str) -> str:
    return files("fp8slurm.report").joinpath(name).read_text(encoding="utf-8")


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
    facts = " \u00b7 ".join(content.facts(run))
    out = [
        f'<h1>{e(run.name)}</h1><p><span class="pill {word}">{word}</span> {e(words)}</p><p class="soft">{e(facts)}</p>'
    ]
    if switched := content.controls(run):
        out.append(f'<p class="banner">{content.CONTROL}: {e(", ".join(switched))}.</p>')
    if told := content.alerts(run):
        out.append(f'<div class="banner"><b>To look at</b>{_list(told)}</div>')
    cards = [
        f'<div class="card"><dt>{e(h.title)}</dt><dd class="{"none" if h.value == "not measured" else "value"}">'
        f'{e(h.value)}</dd><dd class="detail">{e(h.detail)}</dd></div>'
        for h in content.headlines(run)
    ]
    out.append(f'<dl class="cards">{"".join(cards)}</dl>')
    if run.notes:
        more = [f"and {len(run.notes) - 30} more"] if len(run.notes) > 30 else []
        listed = _list([*run.notes[:30], *more])
        out.append(f'<div class="banner"><b>Not everything could be read</b>{listed}</div>')
    return f"<header>{''.join(out)}</header>"


def e(value: Any) -> str:
    """Text of a run, safe inside HTML."""
    return escape(visible(value))


def _block(block: Block, drawn: dict[str, Any]) -> str:
    """A block as HTML; what the script needs of its charts is put into `drawn`."""
    match block:
        case Text(text, small):
            marked = re.sub("`(.+?)`", r"<code>\1</code>", escape(text))
            return f'<p class="note">{marked}</p>' if small else f"<p>{marked}</p>"
        case Head(text):
            return f"<h3>{e(text)}</h3>"
        case Items(rows, title):
            return f'<div class="panel"><b>{e(title)}</b>{_list(rows)}</div>' if title else _list(rows)
        case Table():
            return _table(block)
        case Fold(summary, table, more, is_open):
            below = f"<pre>{e(more)}</pre>" if more else ""
            mark = " open" if is_open else ""
            return f"<details{mark}><summary>{e(summary)}</summary>{_table(table)}{below}</details>"
        case Charts(charts, prefix):
            out = []
            for chart in charts:
                chart.id = prefix + chart.id
                html, drawn[chart.id] = line_chart(chart)
                out.append(html)
            return f'<div class="charts">{"".join(out)}</div>' if out else ""
        case Times(id, title, rows, parts):
            cells = [(p.name, seconds(p.total), f"{100 * p.share:.1f}%", seconds(p.median)) for p in parts]
            table = Table(title, ("phase", "total", "share", "median of a step"), cells, "tnnn")
            bar = f'<div class="panel">{share_bar(parts, f"share-{id}")}</div>'
            return bar + stacked(rows, id, title) + _block(Fold("Seconds by phase", table), drawn)
        case Timeline(id, title, spans, lasted):
            table = Table(title, LANE_HEADS, lane_rows(spans, lasted), "ttnn")
            return timeline(spans, lasted, id, title) + _block(Fold("Seconds by lane", table), drawn)
        case Intervals(id, title, rows, zero_line):
            return f'<div class="charts">{intervals(rows, id, title, zero_line)}</div>'
        case Browser(samples):
            return _browser(samples)
    raise TypeError(block)


def _list(rows: Any) -> str:
    return f'<ul class="plain">{"".join(f"<li>{e(row)}</li>" for row in rows)}</ul>'


def _table(table: Table) -> str:
    """Scrolls by itself where it is too wide."""
    kinds = table.kinds.ljust(len(table.heads))
    mark = [" class=n" if kind in "nb" else " class=m" if kind == "m" else "" for kind in kinds]
    head = "".join(f"<th{m}>{e(h)}</th>" for h, m in zip(table.heads, mark))
    rows = "".join(
        f"<tr>{''.join(f'<td{m}>{_cell(c, kind)}</td>' for c, kind, m in zip(row, kinds, mark))}</tr>"
        for row in table.rows
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{e(table.label)}"><table><thead><tr>{head}</tr>'
        f"</thead><tbody>{rows}</tbody></table></div>"
    )


def _cell(text: str, kind: str) -> str:
    if kind == "l" and ("\n" in text or len(text) >= 160):
        return f"{e(gist(text))}<details><summary>all of it</summary><pre>{e(text[-8000:])}</pre></details>"
    first, _, remark = text.partition("\n")
    shown = e(first)
    if kind in "bc":
        tag = {"b": "b", "c": "code"}[kind]
        shown = f"<{tag}>{shown}</{tag}>"
    elif kind == "p":
        shown = f'<span class="pill {shown}">{shown}</span>'
    elif kind == "w":
        shown = shown.replace("-", "\u2011")  # a date is not broken, date and time may be
    return shown + (f'<span class="help">{e(remark)}</span>' if remark else "")


def _browser(samples: Samples) -> str:
    """The controls of the sample browser; the script fills the list."""
    steps = "".join(f'<option value="{s}">{s}</option>' for s in sorted({s.step for s in samples.shown}))
    names = [f"{a:g} to {b:g}" for a, b in zip(BINS, BINS[1:])] + [f"{BINS[-1]:g} and more"]
    legend = "".join(f'<li><span class="u{i}">+{n}</span></li>' for i, n in enumerate(names, 1))
    legend += "".join(f'<li><span class="n{i}">\u2212{n}</span></li>' for i, n in enumerate(names, 1))
    return Template(_file("samples.html")).substitute(least=f"{BINS[0]:g}", legend=legend, steps=steps)


def _sample(s: ShownSample) -> dict[str, Any]:
    def short(value: float | None) -> float | None:
        return None if value is None else float(f"{value:.4g}")

    return {
        "step": s.step, "index": s.index, "prompt": s.prompt, "label": s.label,
        "response": "" if s.pieces else s.response,
        "reward": s.reward, "finish": s.finish, "mean": short(s.mean_gap), "max": short(s.max_gap), "cut": s.cut,
        "tokens": [
            [p.text, short(p.trainer), short(p.engine), short(p.gap), *([2] if p.given else [1] if p.masked else [])]
            for p in s.pieces
        ],
    }  # fmt: skip
