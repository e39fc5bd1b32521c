"""What a report is made of before it is HTML or Markdown. All text is plain; `code` in a Text is set as code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from fp8slurm.report.charts import Chart
from fp8slurm.report.content import Part
from fp8slurm.report.samples import Samples
from fp8slurm.run.evaluations import Interval
from fp8slurm.run.timeline import Span


class Text(NamedTuple):
    """A paragraph of ours, nothing in it comes from a run; small: a remark on what is above it."""

    text: str
    small: bool = False


class Head(NamedTuple):
    """A heading within a section."""

    text: str


class Items(NamedTuple):
    """A list."""

    rows: Sequence[str]
    title: str = ""


class Table(NamedTuple):
    """Rows of text; a second line of a cell is a remark, which Markdown leaves out."""

    label: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    kinds: str = ""
    """A letter a column: n number, b the number that matters, m name of a figure, c code, p state of an attempt,
    w time, l a text of many lines; anything else is text, as are columns without a letter."""


class Fold(NamedTuple):
    """What HTML folds up; Markdown shows it where it is open, and names it otherwise."""

    summary: str
    table: Table
    more: str = ""
    """Text of a run below the table, as it is."""
    open: bool = False


class Charts(NamedTuple):
    """Curves; sparklines in Markdown. prefix: of the charts' ids, which are distinct in a page."""

    charts: list[Chart]
    prefix: str = ""


class Times(NamedTuple):
    """Seconds by phase of the steps of one phase of the run ("rl" or "sft")."""

    id: str
    title: str
    rows: list[tuple[int, list[float]]]
    parts: list[Part]


class Timeline(NamedTuple):
    """Who did what in one step, drawn; the table says for how long."""

    id: str
    title: str
    spans: list[Span]
    seconds: float
    """Of the step."""


class Intervals(NamedTuple):
    """(name, colour, interval) below each other, in HTML only: a table has the figures."""

    id: str
    title: str
    rows: list[tuple[str, int, Interval]]
    zero_line: bool = False


class Browser(NamedTuple):
    """The samples of saved rollouts."""

    samples: Samples


Block = Any
"""One of the classes above."""
