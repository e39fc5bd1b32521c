"""Stacked bars of seconds by phase, and intervals on a line, as inline SVG."""

from __future__ import annotations

from html import escape

from fp8slurm.report.charts import BOTTOM, LEFT, RIGHT, TOP, Axis, tick, ticks
from fp8slurm.report.content import PHASES, Part
from fp8slurm.report.safe import figure, one_line, seconds, visible
from fp8slurm.run.evaluations import Interval

BARS = 80
"""Most bars; more steps are put together and drawn as their mean."""
WIDTH, HEIGHT = 720, 200


def stacked(rows: list[tuple[int, list[float]]], id: str, title: str) -> str:
    """Mean seconds a step by phase, over the steps; rows are those of content.phase_seconds, at least one."""
    size = max(1, -(-len(rows) // BARS))
    groups = [rows[i : i + size] for i in range(0, len(rows), size)]
    means = [(g[0][0], g[-1][0], [sum(v[slot] for _, v in g) / len(g) for slot in range(len(PHASES))]) for g in groups]
    x = Axis(0, len(means), LEFT, WIDTH - RIGHT)
    y = Axis(0, max(sum(v) for _, _, v in means) * 1.05 or 1.0, HEIGHT - BOTTOM, TOP)
    out = []
    for value in ticks(y.low, y.high):
        py = f"{y(value):.1f}"
        out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py}" y2="{py}"/>')
        out.append(f'<text class="tick" x="{LEFT - 6}" y="{y(value) + 3.5:.1f}" text-anchor="end">{tick(value)}</text>')
    width = (x.end - x.start) / len(means)
    gap = min(2.0, width * 0.18)
    every = max(1, -(-len(means) // 8))
    for i, (first, last, values) in enumerate(means):
        steps = f"step {first}" if first == last else f"steps {first} to {last}"
        told = ", ".join(f"{name} {seconds(v)}" for (_, name), v in zip(PHASES, values) if v)
        base, boxes = 0.0, []
        for slot, value in enumerate(values):
            if value:
                top = y(base + value)
                boxes.append(
                    f'<rect class="p{slot}" x="{x(i) + gap / 2:.1f}" width="{width - gap:.1f}" y="{top:.1f}" '
                    f'height="{y(base) - top:.1f}"/>'
                )
                base += value
        out.append(f"<g><title>{steps}: {seconds(sum(values))} ({told})</title>{''.join(boxes)}</g>")
        if i % every == 0:
            out.append(
                f'<text class="tick" x="{x(i) + width / 2:.1f}" y="{HEIGHT - 10}" '
                f'text-anchor="middle">{tick(first)}</text>'
            )
    note = f" <small>mean of {size} steps a bar</small>" if size > 1 else ""
    return (
        f'<figure class="chart"><figcaption><span>{escape(title)} <small>seconds a '
        f"step</small>{note}</span></figcaption>"
        f'<svg class="bars" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="{id}-t"><title '
        f'id="{id}-t">{escape(title)}: '
        f"seconds of each phase of a step, stacked; the table has the figures</title>{''.join(out)}</svg></figure>"
    )


def share_bar(parts: list[Part]) -> str:
    """All time as one bar, with a legend."""
    at, boxes, items = 0.0, [], []
    for p in parts:
        boxes.append(
            f'<rect class="p{p.slot}" x="{at:.2f}" width="{100 * p.share:.2f}" height="10"><title>{escape(p.name)} '
            f"{100 * p.share:.1f}%</title></rect>"
        )
        at += 100 * p.share
        box = (
            f'<svg class="swatch" viewBox="0 0 20 8" aria-hidden="true"><rect class="p{p.slot}" width="20" '
            f'height="8"/></svg>'
        )
        items.append(f"<li>{box}{escape(p.name)} <b>{100 * p.share:.1f}%</b></li>")
    told = ", ".join(f"{p.name} {100 * p.share:.1f}%" for p in parts)
    return (
        f'<svg class="share" viewBox="0 0 100 10" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(told)}">{"".join(boxes)}</svg>'
        f'<ul class="legend">{"".join(items)}</ul>'
    )


def intervals(rows: list[tuple[str, int, Interval]], id: str, title: str, zero_line: bool = False) -> str:
    """(name, colour, interval) as points with their intervals below each other."""
    bounds = [b for _, _, i in rows for b in i if b is not None] + ([0.0] if zero_line else [])
    low, high = min(bounds), max(bounds)
    margin = (high - low) * 0.08 or 0.05
    x = Axis(low - margin, high + margin, 12, 348)
    height = 52 * len(rows) + 24
    out = []
    for value in ticks(x.low, x.high, 5):
        out.append(f'<line class="grid" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="4" y2="{height - 20}"/>')
        out.append(f'<text class="tick" x="{x(value):.1f}" y="{height - 6}" text-anchor="middle">{tick(value)}</text>')
    if zero_line:
        out.append(f'<line class="mark" x1="{x(0):.1f}" x2="{x(0):.1f}" y1="4" y2="{height - 20}"/>')
    for i, (name, color, (value, a, b)) in enumerate(rows):
        y = 52 * i + 44
        reach = (
            f", 95% {figure(a, zero_line)} to {figure(b, zero_line)}"
            if a is not None and b is not None
            else ", no interval recorded"
        )
        out.append(
            f'<text class="label" x="12" y="{y - 27}">{escape(one_line(name, 46))}</text><text class="tick" x="12" '
            f'y="{y - 12}">{figure(value, zero_line)}{reach}</text>'
        )
        line = (
            f'<line class="interval" x1="{x(a):.1f}" x2="{x(b):.1f}" y1="{y}" y2="{y}"/>'
            if a is not None and b is not None
            else ""
        )
        out.append(f'<g class="c{color}">{line}<circle cx="{x(value):.1f}" cy="{y}" r="4.5"/></g>')
    told = "; ".join(f"{name} {figure(v)}" for name, _, (v, _, _) in rows)
    return (
        f'<figure class="chart"><figcaption><span>{escape(title)}</span></figcaption><svg viewBox="0 0 360 {height}" '
        f'role="img" '
        f'aria-labelledby="{id}-t {id}-d"><title id="{id}-t">{escape(title)}</title><desc '
        f'id="{id}-d">{escape(visible(told))}</desc>{"".join(out)}</svg></figure>'
    )
