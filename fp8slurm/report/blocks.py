"""What a report is made of before it is HTML or Markdown. All text is plain; `code` in a Text is set as code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fp8slurm.report.charts import Chart
from fp8slurm.report.content import Part
from fp8slurm.report.samples import Samples
from fp8slurm.run.evaluations import Interval


@dataclass(frozen=True)
class Text:
    """A paragraph of ours, nothing in it comes from a run; small: a remark on what is above it."""

    text: str
    small: bool = False


@dataclass(frozen=True)
class Head:
    """A heading within a section."""

    text: str


@dataclass(frozen=True)
class Items:
    """A list."""

    rows: Sequence[str]
    title: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of text; a second line of a cell is a remark, which Markdown leaves out."""

    label: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    kinds: str = ""
    """A letter a column: n number, b the number that matters, m name of a figure, c code, p state of an attempt,
    w time, l a text of many lines; anything else is text, as are columns without a letter."""


@dataclass(frozen=True)
class Fold:
    """What HTML folds up; Markdown shows it where it is open, and names it otherwise."""

    summary: str
    table: Table
    more: str = ""
    """Text of a run below the table, as it is."""
    open: bool = False


@dataclass(frozen=True)
class Charts:
    """Curves; sparklines in Markdown. prefix: of the charts' ids, which are distinct in a page."""

    charts: list[Chart]
    prefix: str = ""


@dataclass(frozen=True)
class Times:
    """Seconds by phase of the steps of one phase of the run ("rl" or "sft")."""

    id: str
    title: str
    rows: list[tuple[int, list[float]]]
    parts: list[Part]


@dataclass(frozen=True)
class Intervals:
    """(name, colour, interval) below each other, in HTML only: a table has the figures."""

    id: str
    title: str
    rows: list[tuple[str, int, Interval]]
    zero_line: bool = False


@dataclass(frozen=True)
class Browser:
    """The samples of saved rollouts."""

    found: Samples


Block = Any
"""One of the classes above."""
