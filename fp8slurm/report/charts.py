"""What a chart is made of, whoever draws it: lines, and their points put together into buckets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

POINTS = 240
"""Most points of a line; more steps are put into as many buckets, drawn as their mean with a band from min to max."""
Points = Sequence[tuple[float, float | None]]
"""(x, y); y is None where the step recorded a NaN or an infinity."""


@dataclass
class Line:
    """One curve."""

    name: str
    points: Points
    color: int = 0
    """Which --cN of style.css."""
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


class Bucket(NamedTuple):
    """Some neighbouring points: first and last x, mean, smallest and largest y."""

    first: float
    last: float
    mean: float
    low: float
    high: float

    @property
    def x(self) -> float:
        return (self.first + self.last) / 2


def downsample(points: Points, limit: int = POINTS) -> list[Bucket | None]:
    """At most `limit` buckets of equally many points, extremes kept; None where a line is to be broken."""
    size = max(1, -(-len(points) // limit))
    out: list[Bucket | None] = []
    for start in range(0, len(points), size):
        part = [(x, y) for x, y in points[start : start + size] if y is not None]
        ys = [y for _, y in part]
        out.append(Bucket(part[0][0], part[-1][0], sum(ys) / len(ys), min(ys), max(ys)) if part else None)
    return out
