"""Charts drawn by matplotlib, as SVG inside HTML: colours and fonts come from style.css, a unit is a phone's pixel.

matplotlib draws in stand-in colours (INKS), which become `var(--c0)` and so on, so that one drawing serves light and
dark. Its style attributes, which the page's Content-Security-Policy forbids, become attributes of their own.
"""

from __future__ import annotations

import io
import math
import re
from html import escape
from typing import Any
from xml.etree import ElementTree

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from fp8slurm.observe.plot import PHASES
from fp8slurm.report.charts import POINTS, Bucket, Chart, Line, downsample
from fp8slurm.report.content import Part
from fp8slurm.report.lanes import lanes
from fp8slurm.report.safe import figure, one_line, seconds, visible
from fp8slurm.run.evaluations import Interval
from fp8slurm.run.timeline import Span

WIDTH, HEIGHT = 360, 200
BARS = 80
"""Most bars; more steps are put together and drawn as their mean."""
ROW = 52
"""Height of one interval with its label."""
DASHES = ((), (6, 4), (2, 4), (9, 4, 2, 4), (12, 5), (4, 3, 1, 3))
_NAMES = ("soft", "line", "grid", *(f"c{i}" for i in range(6)), *(f"p{i}" for i in range(len(PHASES))))
INKS = {name: f"#0000{i:02x}" for i, name in enumerate(_NAMES, 1)}
_VARIABLES = {ink: f"var(--{name})" for name, ink in INKS.items()}
_STYLE: Any = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 11, "text.color": INKS["soft"],
    "axes.axisbelow": True, "axes.xmargin": 0, "axes.ymargin": 0.06, "axes.edgecolor": INKS["line"],
    "axes.spines.left": False, "axes.spines.right": False, "axes.spines.top": False, "grid.color": INKS["grid"],
    "xtick.major.size": 0, "ytick.major.size": 0, "xtick.labelcolor": INKS["soft"], "ytick.labelcolor": INKS["soft"],
    "lines.scale_dashes": False, "lines.linewidth": 1.8, "lines.solid_joinstyle": "round",
}  # fmt: skip


@rc_context(_STYLE)
def line_chart(chart: Chart) -> tuple[str, dict[str, Any]]:
    """(figure element, what the script needs for hovering). Some line has a value that the chart can show."""
    lines = [(line, downsample([(x, _shown(y, chart.log)) for x, y in line.points])) for line in chart.lines]
    lines = [(line, buckets) for line, buckets in lines if any(buckets)]
    axes = _axes(WIDTH, HEIGHT, left=50, right=16, top=10, bottom=26)
    for line, buckets in lines:
        _draw(axes, line, buckets)
    known = [b for _, buckets in lines for b in buckets if b is not None]
    axes.grid(axis="y", clip_on=False)
    _scale(axes, chart, min(b.low for b in known), max(b.high for b in known))
    low, high = min(b.first for b in known), max(b.last for b in known)
    if low < high:
        axes.set_xlim(low, high)
    for at, text in chart.marks:
        if low < at < high:
            axes.axvline(at, color=INKS["soft"], linewidth=1, dashes=(3, 3))
            place = axes.get_xaxis_transform()
            axes.annotate(text, (at, 0.98), (4, 0), xycoords=place, textcoords="offset points", va="top")
    box = axes.bbox
    about = "; ".join(_summary(line) for line, _ in lines)
    title = f"{chart.title}, {chart.unit}" if chart.unit else chart.title
    svg = _svg(axes, chart.id, title, about, {"tabindex": "0", "data-chart": chart.id})
    data = {
        "x": [*map(float, axes.get_xlim()), box.x0, box.x1],
        "y": [*map(float, axes.get_ylim()), HEIGHT - box.y0, HEIGHT - box.y1],
        "log": chart.log,
        "w": WIDTH,
        "lines": [
            {"name": visible(line.name), "c": line.color, "p": [_point(b) for b in buckets if b is not None]}
            for line, buckets in lines
        ],
    }
    return _figure(chart, svg, [line for line, _ in lines]), data


@rc_context(_STYLE)
def stacked(rows: list[tuple[int, list[float]]], id: str, title: str) -> str:
    """Mean seconds a step by phase, over the steps; rows are those of phase_seconds, at least one."""
    size = -(-len(rows) // BARS)
    groups = [rows[i : i + size] for i in range(0, len(rows), size)]
    means = [[sum(values[slot] for _, values in g) / len(g) for slot in range(len(PHASES))] for g in groups]
    axes = _axes(2 * WIDTH, HEIGHT, left=50, right=10, top=10, bottom=26)
    width = 1 - min(2 / (axes.bbox.width / len(groups)), 0.18)
    base, tips = [0.0] * len(groups), {}
    for slot, (_, name) in enumerate(PHASES):
        heights = [values[slot] for values in means]
        bars = axes.bar(range(len(groups)), heights, width, base, color=INKS[f"p{slot}"], clip_on=False)
        base = [b + h for b, h in zip(base, heights)]
        for i, (bar, height) in enumerate(zip(bars, heights)):
            first, last = groups[i][0][0], groups[i][-1][0]
            steps = f"step {first}" if first == last else f"steps {first} to {last}"
            bar.set_gid(f"bar-{slot}-{i}")
            bar.set_visible(height > 0)
            tips[f"bar-{slot}-{i}"] = f"{steps}: {name} {seconds(height)} of {seconds(sum(means[i]))}"
    axes.grid(axis="y", clip_on=False)
    axes.set_xlim(-0.5, len(groups) - 0.5)
    axes.set_ylim(0, max(base) * 1.05 or 1.0)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.tick_params(axis="x", pad=8)
    places = range(0, len(groups), -(-len(groups) // 8))
    axes.set_xticks(places, [tick(groups[i][0][0]) for i in places])
    note = f" <small>mean of {size} steps a bar</small>" if size > 1 else ""
    about = "seconds of each phase of a step, stacked; the table has the figures"
    svg = _svg(axes, id, title, about, {"class": "bars"}, tips)
    return (
        f'<figure class="chart"><figcaption><span>{escape(title)} <small>seconds a step</small>{note}</span>'
        f"</figcaption>{svg}</figure>"
    )


@rc_context(_STYLE)
def timeline(spans: list[Span], lasted: float, id: str, title: str) -> str:
    """A lane below the other for whoever worked in a step, over its seconds."""
    rows = lanes(spans)
    axes = _axes(2 * WIDTH, 22 * len(rows) + 34, left=74, right=14, top=4, bottom=28)
    slots = {name: slot for slot, (_, name) in enumerate(PHASES)}

    def ink(what: str) -> str:
        name = "rollout" if what == "generating" else what
        if what.startswith("waits"):
            return INKS["line"]
        return INKS[f"p{slots[name]}"] if name in slots else INKS["soft"]

    tips = {}
    for row, (lane, work) in enumerate(rows.items()):
        for i, (what, begin, end) in enumerate(work):
            (bar,) = axes.barh(row, end - begin, 0.72, begin, color=ink(what), clip_on=True)
            bar.set_gid(f"bar-{row}-{i}")
            tips[f"bar-{row}-{i}"] = f"{lane}: {what} {seconds(end - begin)}, {begin:.2f} s to {end:.2f} s"
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_xlim(0, lasted)
    axes.grid(axis="x", clip_on=False)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} s")
    keys: dict[str, list[str]] = {}
    for what in dict.fromkeys(what for work in rows.values() for what, *_ in work):
        keys.setdefault(_VARIABLES[ink(what)], []).append(what)
    items = [f"<li>{_box(colour)}{escape(', '.join(names))}</li>" for colour, names in keys.items()]
    about = "what trainer, weight updates, rollout workers and engines did in the step; the table has the seconds"
    svg = _svg(axes, id, title, about, {"class": "bars"}, tips)
    return (
        f'<figure class="chart"><figcaption><span>{escape(title)} <small>who did what when</small></span></figcaption>'
        f'{svg}<ul class="legend">{"".join(items)}</ul></figure>'
    )


@rc_context(_STYLE)
def share_bar(parts: list[Part], id: str) -> str:
    """All time as one bar, with a legend."""
    axes = _axes(100, 10, 0, 0, 0, 0)
    axes.set_axis_off()
    at, items, tips = 0.0, [], {}
    for p in parts:
        tips[f"share-{p.slot}"] = f"{p.name} {100 * p.share:.1f}%"
        axes.barh(0, p.share, 1, at, color=INKS[f"p{p.slot}"], clip_on=False, gid=f"share-{p.slot}")
        at += p.share
        items.append(f"<li>{_box(f'var(--p{p.slot})')}{escape(p.name)} <b>{100 * p.share:.1f}%</b></li>")
    axes.set(xlim=(0, 1), ylim=(-0.5, 0.5))
    more = {"class": "share", "preserveAspectRatio": "none"}
    svg = _svg(axes, id, "shares of all time", ", ".join(tips.values()), more, tips)
    return f'{svg}<ul class="legend">{"".join(items)}</ul>'


@rc_context(_STYLE)
def intervals(rows: list[tuple[str, int, Interval]], id: str, title: str, zero_line: bool = False) -> str:
    """(name, colour, interval) as points with their intervals below each other."""
    height = ROW * len(rows) + 24
    axes = _axes(WIDTH, height, left=12, right=12, top=4, bottom=20)
    axes.grid(axis="x", clip_on=False)
    axes.margins(x=0.08)
    axes.spines["bottom"].set_visible(False)
    labels = {}
    for i, (name, color, (value, low, high)) in enumerate(rows):
        y, ink, reach = ROW * i + 40, INKS[f"c{color}"], ", no interval recorded"
        if low is not None and high is not None:
            axes.plot((low, high), (y, y), color=ink, linewidth=2, clip_on=False)
            reach = f", 95% {figure(low, zero_line)} to {figure(high, zero_line)}"
        axes.plot(value, y, "o", color=ink, markersize=9, markeredgewidth=0, clip_on=False)
        labels[f"label-{i}"], labels[f"reach-{i}"] = one_line(name, 46), f"{figure(value, zero_line)}{reach}"
        for kind, above in (("label", 27), ("reach", 12)):  # untrusted names never pass through matplotlib
            axes.text(0, y - above, "-", transform=axes.get_yaxis_transform(), gid=f"{kind}-{i}")
    if zero_line:
        axes.axvline(0, color=INKS["soft"], linewidth=1, dashes=(3, 3))
    axes.set(ylim=(height - 24, 0), yticks=[])
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    about = visible("; ".join(f"{name} {figure(value)}" for name, _, (value, _, _) in rows))
    svg = _svg(axes, id, title, about, {}, labels)
    return f'<figure class="chart"><figcaption><span>{escape(title)}</span></figcaption>{svg}</figure>'


def _swatch(path: str) -> str:
    return f'<svg class="swatch" viewBox="0 0 20 8" aria-hidden="true"><path {path}/></svg>'


def _box(colour: str) -> str:
    return _swatch(f'd="M0 0h20v8H0" fill="{colour}"')


def _look(line: Line) -> str:
    dash = f' stroke-dasharray="{" ".join(map(str, DASHES[line.dash]))}"' if line.dash else ""
    return _swatch(f'd="M0 4H20" stroke="var(--c{line.color})" stroke-width="1.8"{dash}')


def tick(value: float) -> str:
    """An axis label."""
    size = abs(value)
    if size >= 1e6 or 0 < size < 1e-3:
        mantissa, exponent = f"{size:.2e}".split("e")
        text = f"{float(mantissa):g}e{int(exponent)}"
    else:
        text = f"{size / 1000:g}k" if size >= 1e4 else f"{size:.4g}"
    return ("\u2212" if value < 0 else "") + text


def _axes(width: int, height: int, left: int, right: int, top: int, bottom: int) -> Axes:
    """Axes with these margins in a figure of so many pixels."""
    sheet = Figure((width / 72, height / 72), dpi=72, frameon=False)
    area = left / width, bottom / height, 1 - (left + right) / width, 1 - (top + bottom) / height
    axes = sheet.add_axes(area, facecolor="none")
    axes.patch.set_visible(False)
    axes.tick_params(pad=6)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: tick(value))
    return axes


def _shown(y: float | None, log: bool) -> float | None:
    return None if y is None or (log and y <= 0) else y


def _draw(axes: Axes, line: Line, buckets: list[Bucket | None]) -> None:
    """The mean as a line, broken at None, with dots where there are few; smallest to largest as a band."""
    gap = (math.nan,) * 4
    x, mean, low, high = zip(*(gap if b is None else (b.x, b.mean, b.low, b.high) for b in buckets))
    ink = INKS[f"c{line.color}"]
    if any(b is not None and b.low != b.high for b in buckets):
        axes.fill_between(x, low, high, color=ink, alpha=0.2, linewidth=0, clip_on=False)
    axes.plot(x, mean, color=ink, clip_on=False, linestyle=(0, DASHES[line.dash]) if line.dash else "-")
    around = [None, *buckets, None]
    few = sum(b is not None for b in buckets) <= 30
    dots = [b for before, b, after in zip(around, buckets, around[2:]) if b and (few or not (before or after))]
    axes.plot([b.x for b in dots], [b.mean for b in dots], "o", color=ink, ms=4.4, mew=0, clip_on=False)


def _scale(axes: Axes, chart: Chart, low: float, high: float) -> None:
    """Limits that show every value from low to high, and round ticks."""
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
    round_ticks = MaxNLocator(6, steps=[1, 2, 5, 10])
    axes.yaxis.set_major_locator(round_ticks)
    if chart.log:
        axes.set_yscale("log")
        if high / low < 1.5:
            axes.set_ylim(low / 1.4, high * 1.4)
        if high / low > 10:
            axes.yaxis.set_major_locator(LogLocator(subs=(1,) if high / low > 100 else (1, 2, 5), numticks=6))
        else:
            axes.yaxis.set_major_locator(round_ticks)
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(lambda value, _: tick(value))
    elif chart.zero and low >= 0:
        axes.set_ylim(0, (high or 1.0) * 1.06)


def _svg(axes: Axes, id: str, title: str, about: str, more: dict[str, str], texts: dict[str, str] | None = None) -> str:
    """The figure as an svg element with a title and a description for screen readers.

    more: further attributes of it; texts: by an artist's gid, what it says (a text), or what pointing at it shows.
    """
    out, sheet, texts = io.StringIO(), axes.get_figure(root=True), texts or {}
    assert sheet is not None
    with rc_context({"svg.hashsalt": id}):  # ids of a figure differ from those of the others in the page
        sheet.savefig(out, format="svg", metadata={"Date": None})
    referenced = set(re.findall(r'(?:href="|url\()#(\w+)', out.getvalue()))
    root = ElementTree.fromstring(out.getvalue())
    for element in list(root.iter()):
        element.tag = element.tag.rpartition("}")[2]
        element[:] = [child for child in element if not child.tag.endswith(("}metadata", "}style"))]
        given = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        gid = given.pop("id", "")
        style = [part.split(": ", 1) for part in given.pop("style", "").split("; ") if part]
        given |= {key: _VARIABLES.get(value, value) for key, value in style if not key.startswith("font")}
        given = {key: _short(value) if key in ("d", "x", "y") else value for key, value in given.items()}
        given.pop("transform", None)  # no text of ours is turned
        element.attrib = ({"id": gid} if gid in referenced else {}) | given
        element.text, element.tail = (element.text or "").strip(), None
        if gid in texts and element[-1].tag.endswith("}text"):
            element[-1].text = texts[gid]
            element.set("class", gid.partition("-")[0])
        elif gid in texts:
            ElementTree.SubElement(element, "title").text = texts[gid]
    named = {"role": "img", "aria-labelledby": f"{id}-t {id}-d"}
    root.attrib = {"viewBox": root.attrib["viewBox"], **named, **more}
    for tag, text in (("desc", about), ("title", title)):
        head = ElementTree.Element(tag, id=f"{id}-{tag[0]}")
        head.text = text
        root.insert(0, head)
    if "data-chart" in root.attrib:
        hover = ElementTree.SubElement(root, "g", {"class": "hover", "hidden": ""})
        top, bottom = (str(round(sheet.bbox.height - y, 1)) for y in (axes.bbox.y1, axes.bbox.y0))
        ElementTree.SubElement(hover, "line", y1=top, y2=bottom)
    return ElementTree.tostring(root, encoding="unicode")


def _short(numbers: str) -> str:
    """A path's or a coordinate's numbers with two decimals."""
    return re.sub(r"-?\d+\.\d+", lambda m: f"{float(m[0]):.2f}".rstrip("0").rstrip("."), numbers.replace("\n", ""))


def _point(b: Bucket) -> list[float]:
    plain = [_round(b.first), _round(b.mean)]
    return plain if b.first == b.last else [*plain, _round(b.last), _round(b.low), _round(b.high)]


def _round(value: float) -> float:
    return float(f"{value:.5g}") if value != int(value) or abs(value) > 1e9 else int(value)


def _last(line: Line) -> str:
    return next((figure(y) for _, y in reversed(line.points) if y is not None), "")


def _figure(chart: Chart, svg: str, lines: list[Line]) -> str:
    items = "".join(f"<li>{_look(line)}{escape(visible(line.name))} <b>{_last(line)}</b></li>" for line in lines)
    legend = f'<ul class="legend">{items}</ul>' if len(lines) > 1 else ""
    newest = "" if legend else _last(lines[0])
    nan = sum(y is None for line in lines for _, y in line.points)
    longest = max(len(line.points) for line in lines)
    notes = [chart.note] if chart.note else []
    if nan:
        notes.append(f"NaN or infinite at {nan} steps: the line is broken there")
    if longest > POINTS:
        notes.append(f"line: mean of {-(-longest // POINTS)} steps, band: smallest to largest")
    note = f'<p class="note">{escape(". ".join(notes))}.</p>' if notes else ""
    unit = f" <small>{escape(chart.unit)}</small>" if chart.unit else ""
    return (
        f'<figure class="chart"><figcaption><span>{escape(chart.title)}{unit}</span><b>{newest}</b></figcaption>'
        f"{svg}{legend}{note}</figure>"
    )


def _summary(line: Line) -> str:
    known = [y for _, y in line.points if y is not None]
    first, last, low, high = map(figure, (known[0], known[-1], min(known), max(known)))
    return f"{visible(line.name)}: first {first}, last {last}, smallest {low}, largest {high}"
