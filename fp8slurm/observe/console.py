"""What a person sees while a run goes on: a live table on a terminal, a line a step anywhere else."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.measure import Measurement
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

ROWS = 12
"""Steps that the table shows."""
SPEED_WINDOW = 10
"""Steps whose mean time the remaining time is estimated from."""

COLUMNS = (
    ("reward", "reward/mean", "{:.3f}"),
    ("held-out", "eval/accuracy", "{:.3f}"),
    ("loss", "loss", "{:.4f}"),
    ("gap |d|", "gap/mean_abs", "{:.1e}"),
    ("grad norm", "grad_norm", "{:.2f}"),
    ("tokens/s", "throughput/tokens_per_s", "{:,.0f}"),
)
TIMES = ("rollout", "logprobs", "train", "sync", "eval", "checkpoint")
FIRST_TO_GO = (
    "checkpoint s", "logprobs s", "eval s", "sync s", "train s", "rollout s", "grad norm", "tokens/s", "loss",
    "held-out",
)  # fmt: skip
"""Columns that a narrow terminal does without, in this order."""


def format_duration(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, second = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{second:02d}" if hours else f"{minutes}:{second:02d}"


def clock(at: float, now: float | None = None) -> str:
    """A time of Unix seconds as a clock shows it: 23:40, on another day Tue 03:10, in a week or more with its date."""
    then, today = datetime.fromtimestamp(at), datetime.fromtimestamp(time.time() if now is None else now)
    days = (then.date() - today.date()).days
    return then.strftime("%H:%M" if days == 0 else "%a %H:%M" if abs(days) < 7 else "%Y-%m-%d %H:%M")


def stamp() -> str:
    """The time in front of a line."""
    return datetime.now().strftime("%H:%M:%S")


def why_no_update(record: Mapping[str, Any]) -> str:
    """Why a step left out an update, or "" where it made all of them."""
    if not record.get("skipped"):
        return ""
    if "loss" not in record:
        return "no sample" if record.get("rollout/groups") else "no signal"
    if record["loss"] is None or record.get("grad_norm") is None:
        return "NaN/inf"
    return "part NaN/inf"


def format_line(record: Mapping[str, Any], total: int) -> str:
    """One step as a line of text: step, then each figure that the record has."""
    parts = [f"{record['phase']} {record['step']}/{total}"]
    parts += [f"{title} {form.format(record[key])}" for title, key, form in COLUMNS if record.get(key) is not None]
    if why := why_no_update(record):
        parts.append(f"no update: {why}")
    if record.get("time/step") is not None:
        phases = " ".join(f"{n} {record[f'time/{n}']:.1f}" for n in TIMES if record.get(f"time/{n}"))
        parts.append(f"{record['time/step']:.1f} s" + (f" ({phases})" if phases else ""))
    return "  ".join(parts)


class Display:
    """Shows records as they come; a context manager. `totals` is the number of steps of each phase."""

    def __init__(self, name: str, totals: Mapping[str, int], stream: TextIO | None = None) -> None:
        self.name, self.totals = name, dict(totals)
        self.stream = stream if stream is not None else sys.stdout
        self.console = Console(file=self.stream)
        self._rows: deque[Mapping[str, Any]] = deque(maxlen=ROWS)
        self._times: deque[float] = deque(maxlen=SPEED_WINDOW)
        self._status, self._accuracy, self._start = "starting", None, time.monotonic()
        self._phase, self._step = next(iter(self.totals), "rl"), 0
        self._goes_on = False
        """Whether a step has come since this began: until then nobody knows how long the start takes."""
        self._live = Live(get_renderable=self.render, console=self.console, refresh_per_second=2)

    @property
    def is_live(self) -> bool:
        """Whether it is a table on a terminal, which may say how long something has been going on."""
        return self.console.is_terminal

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self._live.refresh()
            self._live.stop()

    def history(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Records of before: they are in the table and in the speed, and no lines of their own."""
        count = 0
        for record in records:
            self._keep(record)
            count += 1
        if count and not self.console.is_terminal:
            self.note(f"{stamp()}  {self._phase} {self._step}/{self.totals.get(self._phase, 0)} recorded before this")

    def update(self, record: Mapping[str, Any]) -> None:
        """Show one record of metrics.jsonl, which was written just now."""
        self._keep(record)
        self._status, self._goes_on = "", True
        if not self.console.is_terminal:
            left = self.remaining_s()
            done = f"  done {clock(time.time() + left)}" if left and self._is_last else ""
            self.note(f"{stamp()}  {format_line(record, self.totals.get(self._phase, 0))}{done}")

    @property
    def _is_last(self) -> bool:
        """Whether the run ends with this phase."""
        return self._phase == next(reversed(self.totals), self._phase)

    def _keep(self, record: Mapping[str, Any]) -> None:
        if record["phase"] != self._phase:
            self._times.clear()
        self._phase, self._step = record["phase"], record["step"]
        self._rows.append(record)
        if record.get("eval/accuracy") is not None:
            self._accuracy = record["eval/accuracy"]
        if record.get("time/step") is not None:
            self._times.append(record["time/step"] + (record.get("time/checkpoint") or 0.0))

    def status(self, text: str) -> None:
        """What is going on right now; without a terminal a line, where it has changed."""
        if text and text != self._status and not self.console.is_terminal:
            self.note(f"{stamp()}  {text}")
        self._status = text

    def note(self, text: str) -> None:
        """A line that stays, above the table on a terminal."""
        if self.console.is_terminal:
            self.console.print(Text(text))
        else:
            print(text, file=self.stream, flush=True)

    def remaining_s(self) -> float | None:
        """Estimated seconds to the end of the phase, from the last steps; None before the first."""
        if not self._times:
            return None
        return max(0, self.totals.get(self._phase, 0) - self._step) * sum(self._times) / len(self._times)

    def render(self) -> Display:
        return self

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The table of the last steps, as many columns as fit, and how far the run is."""
        if self._rows:
            yield self._table(console, options)
        total = self.totals.get(self._phase) or None
        head = f"{self.name} {self._phase} {self._step}/{total or '?'} "
        bar = Table.grid()
        room = max(10, min(40, options.max_width - len(head)))
        bar.add_row(Text(head, style="bold"), ProgressBar(total or 1, self._step, width=room))
        yield bar
        yield Text(", ".join(self._facts()))

    def _facts(self) -> list[str]:
        facts = [self._status] if self._status else []
        facts.append(f"{format_duration(time.monotonic() - self._start)} gone")
        if (left := self.remaining_s()) and self._goes_on:
            done = f", done {clock(time.time() + left)}" if self._is_last else f" of {self._phase}"
            facts.append(f"about {format_duration(left)} left{done}")
        if self._accuracy is not None:
            facts.append(f"held-out accuracy {self._accuracy:.3f}")
        return facts

    def _table(self, console: Console, options: ConsoleOptions) -> Table:
        columns = [(title, [_figure(r, key, form) for r in self._rows]) for title, key, form in COLUMNS]
        columns += [(f"{n} s", [_figure(r, f"time/{n}", "{:.1f}") for r in self._rows]) for n in TIMES]
        columns.append(("step s", [_figure(r, "time/step", "{:.1f}") for r in self._rows]))
        columns.append(("no update", [why_no_update(r) for r in self._rows]))
        shown = [(title, cells) for title, cells in columns if any(cells) or title in ("reward", "step s")]
        for first in ("", *FIRST_TO_GO):
            shown = [(title, cells) for title, cells in shown if title != first]
            table = Table(expand=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
            table.add_column("step", justify="right")
            for title, _ in shown:
                table.add_column(title, justify="right", no_wrap=True, style="dim" if title in FIRST_TO_GO[:6] else "")
            for i, record in enumerate(self._rows):
                table.add_row(f"{record['phase']} {record['step']}", *(cells[i] for _, cells in shown))
            if Measurement.get(console, options.update(max_width=1000), table).maximum <= options.max_width:
                break
        return table


def _figure(record: Mapping[str, Any], key: str, form: str) -> str:
    value = record.get(key)
    return "" if value is None or (key.startswith("time/") and not value) else form.format(value)
