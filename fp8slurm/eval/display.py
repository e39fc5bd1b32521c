"""What a person sees of an evaluation: a bar while it runs, tables at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from fp8slurm.observe.console import format_duration
from fp8slurm.run.evaluations import served_title

LINE_EVERY_S = 30.0
"""Without a terminal: seconds between lines."""


class Meter:
    """Progress of one evaluation's samples: tokens per second, time left, accuracy so far; a context manager.

    A bar on a terminal, a line now and then anywhere else.
    """

    def __init__(self, title: str, total: int, done: int) -> None:
        self.title, self.total, self.done, self.before = title, total, done, done
        self.tokens = 0
        self.scores: dict[Any, float] = {}
        self._started = self._said = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(30), MofNCompleteColumn(),
            TextColumn("samples  {task.fields[figures]}"),
            console=Console(stderr=True), transient=True, refresh_per_second=4, disable=not sys.stderr.isatty(),
        )  # fmt: skip
        self._task = self._bar.add_task(title, total=total, completed=done, figures="")

    def __enter__(self) -> Meter:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, samples: int, tokens: int) -> None:
        self.done += samples
        self.tokens += tokens
        self._bar.update(self._task, completed=self.done, figures=self.figures())
        if self._bar.disable and time.monotonic() - self._said >= LINE_EVERY_S:
            self._said = time.monotonic()
            print(f"{self.title}: {self.done}/{self.total} samples  {self.figures()}", file=sys.stderr, flush=True)

    def figures(self) -> str:
        seconds = max(time.monotonic() - self._started, 1e-3)
        parts = [f"{self.tokens / seconds:,.0f} tokens/s"]
        if self.done > self.before:
            left = seconds / (self.done - self.before) * (self.total - self.done)
            parts.append(f"{format_duration(left)} left")
        graded = list(self.scores.values())
        if graded:
            parts.append(f"accuracy so far {sum(s >= 1 for s in graded) / len(graded):.3f}")
        return "  ".join(parts)


def count(number: int, what: str) -> str:
    """1 engine, 2 engines."""
    return f"{number} {what}{'s' if number != 1 else ''}"


def waiting(text: str) -> AbstractContextManager[Any]:
    """A spinner on a terminal, nothing anywhere else."""
    return Console(stderr=True).status(text) if sys.stderr.isatty() else nullcontext()


def percent(estimate: dict[str, float]) -> str:
    """85.0 [81.8, 88.0]."""
    return f"{100 * estimate['value']:.1f} [{100 * estimate['low']:.1f}, {100 * estimate['high']:.1f}]"


def show_summary(summary: dict[str, Any], console: Console) -> None:
    """The tasks of one evaluation as a table."""
    served = served_title(summary["precision"], summary.get("kv_cache", "auto"))
    table = Table(title=f"{summary['checkpoint']} in {served}", title_justify="left")
    table.add_column("task")
    wide = any(t["n_samples"] > 1 for t in summary["tasks"].values())
    columns = ["questions", "n", "accuracy % [95%]", *(["pass@n % [95%]"] if wide else []), "tokens", "truncated %"]
    for column in columns:
        table.add_column(column, justify="right")
    for name, t in summary["tasks"].items():
        n = t["n_samples"]
        passed = [percent(t["pass_at_k"][str(n)])] if wide else []
        table.add_row(
            name, str(t["questions"]), str(n), percent(t["accuracy"]), *passed, f"{t['response_tokens']['mean']:.1f}",
            f"{100 * t['truncated']:.1f}",
        )  # fmt: skip
    console.print(table)
    for name, t in summary["tasks"].items():
        if t["grader_failures"]:
            console.print(f"{name}: {t['grader_failures']} answers that {t['grader']} could not digest count as wrong")
        if t["left_out"]:
            console.print(f"{name}: {t['left_out']} questions were left out (bad lines, or too long)")
    if summary.get("tokens_per_second") is not None:
        console.print(
            f"{summary['response_tokens']:,} tokens in {summary['seconds']:.1f} s, "
            f"{summary['tokens_per_second']:,.0f} tokens/s, {count(summary['engines'], 'engine')}"
        )


def show_comparison(comparison: dict[str, Any], console: Console) -> None:
    """A comparison as a table, with what flipped, the gap, and the verdict."""
    a, b = map(served_title, comparison["precision"], comparison["kv_cache"])
    if a == b:
        a, b = "A", "B"
    table = Table(title=f"{comparison['checkpoint']}: {a} against {b}", title_justify="left")
    table.add_column("task")
    for column in (f"{a} %", f"{b} %", "difference, points [95%]", f"lost in {a}", f"won in {a}"):
        table.add_column(column, justify="right")
    for name, t in comparison["tasks"].items():
        d = t["difference"]
        table.add_row(
            name,
            f"{100 * t['a']:.1f}",
            f"{100 * t['b']:.1f}",
            f"{100 * d['value']:+.1f} [{100 * d['low']:+.1f}, {100 * d['high']:+.1f}]",
            str(len(t["lost"])),
            str(len(t["won"])),
        )
    console.print(table)
    for name, t in comparison["tasks"].items():
        for word in ("lost", "won"):
            if t[word]:
                console.print(f"{name}, {word} in {a}: questions {_some(t[word])}")
    gap = comparison["logprob_gap"]
    if gap is not None:
        console.print(
            f"log-probability gap on {gap['tokens']:,} tokens of {b}'s answers: mean |d| {gap['mean_abs']:.2e}, "
            f"p99 {gap['p99']:.2e}, max {gap['max']:.2e}, k3 {gap['k3']:.2e}"
        )
    if comparison["speed_ratio"] is not None:
        console.print(f"speed: {comparison['speed_ratio']:.2f} times {b}'s tokens/s")
    limit = comparison["fail_if_worse"]
    if limit is not None:
        verdict = f"worse on {', '.join(comparison['worse'])}" if comparison["worse"] else "not significantly worse"
        console.print(f"{a} is {verdict}, by more than {100 * limit:g} points (--fail-if-worse {limit:g})")


def _some(ids: Iterable[str], most: int = 12) -> str:
    ids = list(ids)
    return ", ".join(ids[:most]) + (f" and {len(ids) - most} more" if len(ids) > most else "")
