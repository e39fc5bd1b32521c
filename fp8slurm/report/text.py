"""The report as Markdown, for a terminal or a chat: the same figures, curves as sparklines."""

from __future__ import annotations

from collections.abc import Sequence

from fp8slurm.report import content
from fp8slurm.report.blocks import Block, Browser, Charts, Fold, Head, Items, Table, Text, Timeline, Times
from fp8slurm.report.charts import Chart, Points, downsample
from fp8slurm.report.lanes import LANE_HEADS, lane_rows
from fp8slurm.report.safe import figure, gist, one_line, seconds, visible
from fp8slurm.report.samples import Samples, ShownSample
from fp8slurm.report.sections import sections
from fp8slurm.run.reader import Run

_BLOCKS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
SPARK = 24
WORST = 5
"""Tokens with the largest gap that are listed for a sample."""


def markdown(run: Run, samples: Samples, others: list[Run], names: list[str]) -> str:
    """The whole document; nothing in it is a control character."""
    word, words = content.status(run)
    out = [f"# {one_line(run.name)}", "", f"**{word}**, {words}. {cell(', '.join(content.facts(run)))}.", ""]
    if switched := content.controls(run):
        out += [f"> {content.CONTROL}: {', '.join(switched)}.", ""]
    if told := content.alerts(run):
        out += ["> To look at:", *(f"> - {one_line(alert, 300)}" for alert in told), ""]
    if run.notes:
        out += ["> Not everything could be read:", *(f"> - {one_line(n, 300)}" for n in run.notes[:30]), ""]
    out += table_lines(("figure", "value", ""), [(h.title, h.value, h.detail) for h in content.headlines(run)])
    for _, title, blocks in sections(run, samples, others, names):
        out += [f"## {title}", "", *(line for block in blocks for line in _block(block))]
    return "\n".join(out).rstrip() + "\n"


def _block(block: Block) -> list[str]:
    match block:
        case Text(text, _):
            return [text, ""]
        case Head(text):
            return [f"### {text}", ""]
        case Items(rows, title):
            return [*([f"{title}:", ""] if title else []), *(f"- {cell(row)}" for row in rows), ""]
        case Table():
            cells = [
                [gist(c) if kind == "l" else c.partition("\n")[0] for c, kind in zip(row, block.kinds.ljust(len(row)))]
                for row in block.rows
            ]
            return table_lines(block.heads, cells)
        case Fold(summary, table, _, is_open):
            return [f"{summary}:", "", *_block(table)] if is_open else [f"{summary}: see the HTML report.", ""]
        case Charts(charts, _):
            return _curves(charts)
        case Times():
            times = [
                (p.name, seconds(p.total), f"{100 * p.share:.1f}%", seconds(p.median), "\u2588" * round(20 * p.share))
                for p in block.parts
            ]
            return table_lines(("phase", "total", "share", "median of a step", ""), times)
        case Timeline(_, _, spans, lasted):
            return table_lines(LANE_HEADS, lane_rows(spans, lasted))
        case Browser(samples):
            return [line for s in samples.shown for line in _sample(s)]
    return []


def cell(text: str) -> str:
    """Text that cannot leave its cell."""
    line = one_line(text, 400)
    for old, new in (("\\", "\\\\"), ("|", "\\|"), ("`", "'"), ("<", "\\<"), ("](", "\\](")):
        line = line.replace(old, new)
    return line


def table_lines(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Padded, so that it reads well without being rendered too."""
    lines = [[cell(str(c)) for c in row] for row in (heads, *rows)]
    width = [max(3, *map(len, column)) for column in zip(*lines)]
    padded = [f"| {' | '.join(c.ljust(w) for c, w in zip(line, width))} |" for line in lines]
    return [padded[0], f"|{'|'.join('-' * (w + 2) for w in width)}|", *padded[1:], ""]


def spark(values: Points, width: int = SPARK) -> str:
    """Means of neighbouring points as blocks between the smallest and the largest; a space where nothing is finite."""
    buckets = downsample(values, width)
    known = [b.mean for b in buckets if b is not None]
    low, high = min(known, default=0.0), max(known, default=0.0)

    def block(mean: float) -> str:
        return _BLOCKS[round((mean - low) / (high - low) * 7) if high > low else 3]

    return "".join(" " if b is None else block(b.mean) for b in buckets)


def _curves(charts: list[Chart]) -> list[str]:
    rows = []
    for chart in charts:
        for line in chart.lines:
            if known := [y for _, y in line.points if y is not None]:
                name = chart.title if len(chart.lines) == 1 else f"{chart.title}, {line.name}"
                ends = map(figure, (known[0], min(known), max(known), known[-1]))
                rows.append((name, chart.unit, *ends, spark(line.points)))
    return table_lines(("curve", "unit", "first", "smallest", "largest", "last", ""), rows) if rows else []


def _sample(s: ShownSample) -> list[str]:
    gap = "not recorded" if s.mean_gap is None else f"mean {figure(s.mean_gap)}, largest {figure(s.max_gap)} nats"
    out = [f"**Step {s.step}**, reward {figure(s.reward)}, label {cell(s.label)}, gap |d| {gap}", ""]
    for text in (s.prompt, s.response):
        out += ["    " + line for line in visible(text)[:1500].splitlines() or [""]] + [""]
    if given := "".join(p.text for p in s.pieces if p.given):
        out += [f"Said by tools: {cell(one_line(given, 200))}", ""]
    if left_out := sum(p.masked for p in s.pieces):
        out += [f"Left out of the loss: {left_out} of {len(s.pieces)} pieces", ""]
    worst = sorted((p for p in s.pieces if p.gap is not None), key=lambda p: -abs(p.gap or 0.0))[:WORST]
    if worst:
        listed = ", ".join(f"\u201c{one_line(p.text, 20)}\u201d {figure(p.gap, True)}" for p in worst)
        out += [f"Largest gaps: {cell(listed)}", ""]
    return out
