"""Line charts and bars as inline SVG: one pixel of the view box is one CSS pixel at the width of a phone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from fp8slurm.report.safe import figure, visible

POINTS = 240
"""Most points of a line; more steps are put into as many buckets, drawn as their mean with a band from min to max."""
WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 50, 10, 10, 26


@dataclass
class Line:
    """One curve; y is None where the step recorded a NaN or an infinity."""

    name: str
    points: Sequence[tuple[float, float | None]]
    color: int = 0
    """Which --cN it is drawn in, and which dash where `dashed`."""
    dash: int = 0


@dataclass
class Chart:
    """One figure of curves over steps."""

    id: str
    title: str
    unit: str
    lines: list[Line]
    log: bool = False
    zero: bool = False
    """The axis begins at 0."""
    note: str = ""
    marks: list[tuple[float, str]] = field(default_factory=list)
    """Vertical lines."""


@dataclass(frozen=True)
class Bucket:
    """Some neighbouring points: first and last x, mean, smallest and largest y."""

    first: float
    last: float
    mean: float
    low: float
    high: float

    @property
    def x(self) -> float:
        return (self.first + self.last) / 2


def downsample(points: Sequence[tuple[float, float | None]], limit: int = POINTS) -> list[Bucket | None]:
    """At most `limit` buckets of equally many points, extremes kept; None where a line is to be broken."""
    size = max(1, -(-len(points) // limit))
    out: list[Bucket | None] = []
    for start in range(0, len(points), size):
        part = [(x, y) for x, y in points[start : start + size] if y is not None]
        if not part:
            out.append(None)
            continue
        ys = [y for _, y in part]
        out.append(Bucket(part[0][0], part[-1][0], sum(ys) / len(ys), min(ys), max(ys)))
    return out


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers within [low, high], about `count`."""
    span = high - low
    if not span > 0:
        return [low]
    step = 10 ** math.floor(math.log10(span / count))
    step *= next((m for m in (1, 2, 5) if span / (step * m) <= count + 0.5), 10)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within [low, high]; with few of them 2 and 5 times those too."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    inside = [10.0**p for p in powers if low <= 10.0**p <= high]
    if len(inside) < 2:
        inside = [m * 10.0**p for p in powers for m in (1, 2, 5) if low <= m * 10.0**p <= high]
    if len(inside) < 2:
        return [t for t in ticks(low, high) if t > 0]
    while len(inside) > 6:
        inside = inside[::2]
    return inside


class Axis:
    """Numbers to view-box coordinates."""

    def __init__(self, low: float, high: float, start: float, end: float, log: bool = False) -> None:
        self.low, self.high, self.start, self.end, self.log = low, high, start, end, log

    def __call__(self, value: float) -> float:
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        value = math.log10(value) if self.log else value
        return self.start + (self.end - self.start) * ((value - low) / (high - low) if high > low else 0.5)


def y_axis(buckets: list[Bucket], log: bool, zero: bool) -> Axis:
    """A range that shows every value, with a margin."""
    low, high = min(b.low for b in buckets), max(b.high for b in buckets)
    if log:
        if high / low < 1.5:
            low, high = low / 1.3, high * 1.3
        return Axis(low / 1.08, high * 1.08, HEIGHT - BOTTOM, TOP, True)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high == low:
        low, high = (low - abs(low) * 0.1, high + abs(high) * 0.1) if low else (0.0, 1.0)
    margin = (high - low) * 0.06
    return Axis(low if zero and low == 0 else low - margin, high + margin, HEIGHT - BOTTOM, TOP)


def line_chart(chart: Chart) -> tuple[str, dict[str, Any]]:
    """(figure element, what the script needs for hovering). A chart without a value says that nothing was recorded."""
    lines = [(line, _usable(line, chart.log)) for line in chart.lines]
    lines = [(line, buckets) for line, buckets in lines if any(buckets)]
    every = [b for _, buckets in lines for b in buckets if b is not None]
    assert every, chart.id
    x0, x1 = min(b.first for b in every), max(b.last for b in every)
    x = Axis(x0, x1, LEFT, WIDTH - RIGHT)
    y = y_axis(every, chart.log, chart.zero)
    parts = [*_grid(chart, x, y)]
    for at, text in chart.marks:
        if x0 < at < x1:
            px = _n(x(at))
            parts.append(f'<line class="mark" x1="{px}" x2="{px}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
            parts.append(f'<text class="tick" x="{_n(x(at) + 4)}" y="{TOP + 9}">{escape(text)}</text>')
    for line, buckets in lines:
        parts += _line(line, buckets, x, y)
    parts.append(f'<g class="hover" hidden=""><line y1="{TOP}" y2="{HEIGHT - BOTTOM}"/></g>')
    summary = "; ".join(_summary(line) for line, _ in lines)
    title = f"{chart.title}, {chart.unit}" if chart.unit else chart.title
    svg = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" aria-labelledby="{chart.id}-t {chart.id}-d" '
        f'data-chart="{chart.id}"><title id="{chart.id}-t">{escape(title)}</title>'
        f'<desc id="{chart.id}-d">{escape(summary)}</desc>{"".join(parts)}</svg>'
    )
    data = {
        "x": [x.low, x.high, x.start, x.end],
        "y": [y.low, y.high, y.start, y.end],
        "log": chart.log,
        "w": WIDTH,
        "lines": [
            {"name": visible(line.name), "c": line.color, "p": [_point(b) for b in buckets if b is not None]}
            for line, buckets in lines
        ],
    }
    return _figure(chart, svg, [line for line, _ in lines]), data


def _usable(line: Line, log: bool) -> list[Bucket | None]:
    points = [(x, None if y is None or (log and y <= 0) else y) for x, y in line.points]
    return downsample(points)


def _point(b: Bucket) -> list[float]:
    plain = [_r(b.first), _r(b.mean)]
    return plain if b.first == b.last else [*plain, _r(b.last), _r(b.low), _r(b.high)]


def _figure(chart: Chart, svg: str, lines: list[Line]) -> str:
    newest = "" if len(lines) > 1 else next((figure(y) for _, y in reversed(lines[0].points) if y is not None), "")
    legend = ""
    if len(lines) > 1:
        items = "".join(
            f"<li>{swatch(line)}{escape(visible(line.name))} <b>"
            f"{next((figure(y) for _, y in reversed(line.points) if y is not None), '')}</b></li>"
            for line in lines
        )
        legend = f'<ul class="legend">{items}</ul>'
    nan = sum(y is None for line in lines for _, y in line.points)
    notes = [chart.note] if chart.note else []
    if nan:
        notes.append(f"NaN or infinite at {nan} steps: the line is broken there")
    if any(len(line.points) > POINTS for line in lines):
        notes.append(
            f"line: mean of {-(-max(len(line.points) for line in lines) // POINTS)} steps, band: smallest to largest"
        )
    note = f'<p class="note">{escape(". ".join(notes))}.</p>' if notes else ""
    unit = f" <small>{escape(chart.unit)}</small>" if chart.unit else ""
    return (
        f'<figure class="chart"><figcaption><span>{escape(chart.title)}{unit}</span><b>{newest}</b></figcaption>'
        f"{svg}{legend}{note}</figure>"
    )


def swatch(line: Line) -> str:
    """The look of a line, for a legend."""
    return (
        f'<svg class="swatch" viewBox="0 0 20 8" aria-hidden="true"><path class="l c{line.color} d{line.dash}" d="M0 '
        f'4H20"/></svg>'
    )


def _summary(line: Line) -> str:
    known = [y for _, y in line.points if y is not None]
    if not known:
        return f"{visible(line.name)}: nothing finite"
    return (
        f"{visible(line.name)}: first {figure(known[0])}, last {figure(known[-1])}, "
        f"smallest {figure(min(known))}, largest {figure(max(known))}"
    )


def _grid(chart: Chart, x: Axis, y: Axis) -> list[str]:
    parts = []
    for value in log_ticks(y.low, y.high) if chart.log else ticks(y.low, y.high):
        py = _n(y(value))
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py}" y2="{py}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 6}" y="{_n(y(value) + 3.5)}" text-anchor="end">{tick(value)}</text>'
        )
    for value in ticks(x.low, x.high, 5):
        if value != int(value):
            continue
        anchor = "end" if x(value) > WIDTH - RIGHT - 14 else "middle"
        parts.append(
            f'<text class="tick" x="{_n(x(value))}" y="{HEIGHT - 10}" text-anchor="{anchor}">{tick(value)}</text>'
        )
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>')
    return parts


def tick(value: float) -> str:
    """An axis label."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6 or size < 1e-3:
        mantissa, exponent = f"{size:.0e}".split("e")
        text = f"{mantissa}e{int(exponent)}"
    elif size >= 1e4:
        text = f"{size / 1000:g}k"
    else:
        text = f"{size:.4g}"
    return ("\u2212" if value < 0 else "") + text


def _line(line: Line, buckets: list[Bucket | None], x: Axis, y: Axis) -> list[str]:
    runs: list[list[Bucket]] = [[]]
    for b in buckets:
        if b is None:
            runs.append([])
        else:
            runs[-1].append(b)
    parts = []
    bands = [r for r in runs if any(b.low != b.high for b in r)]
    for r in bands:
        upper = [f"{_n(x(b.x))} {_n(y(b.high))}" for b in r]
        lower = [f"{_n(x(b.x))} {_n(y(b.low))}" for b in reversed(r)]
        parts.append(f'<path class="band c{line.color}" d="M{"L".join(upper + lower)}Z"/>')
    path = "".join(f"M{'L'.join(f'{_n(x(b.x))} {_n(y(b.mean))}' for b in r)}" for r in runs if r)
    parts.append(f'<path class="l c{line.color} d{line.dash}" d="{path}"/>')
    known = [b for r in runs for b in r]
    dots = known if len(known) <= 30 else [r[0] for r in runs if len(r) == 1]
    parts += [f'<circle class="c{line.color}" cx="{_n(x(b.x))}" cy="{_n(y(b.mean))}" r="2.2"/>' for b in dots]
    return parts


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _r(value: float) -> float:
    return float(f"{value:.5g}") if value != int(value) or abs(value) > 1e9 else int(value)
