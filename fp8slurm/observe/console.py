"""What a person sees while a run goes on: a live table on a terminal, a line a step anywhere else."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
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


def format_duration(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, second = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{second:02d}" if hours else f"{minutes}:{second:02d}"


def format_line(record: Mapping[str, Any], total: int) -> str:
    """One step as a line of text: step, then each figure that the record has."""
    parts = [f"{record['phase']} {record['step']}/{total}"]
    parts += [f"{title} {form.format(record[key])}" for title, key, form in COLUMNS if record.get(key) is not None]
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
        self._live = Live(get_renderable=self.render, console=self.console, refresh_per_second=2)

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self._live.refresh()
            self._live.stop()

    def update(self, record: Mapping[str, Any]) -> None:
        """Show one record of metrics.jsonl."""
        if record["phase"] != self._phase:
            self._times.clear()
        self._phase, self._step = record["phase"], record["step"]
        self._rows.append(record)
        if record.get("eval/accuracy") is not None:
            self._accuracy = record["eval/accuracy"]
        if record.get("time/step") is not None:
            self._times.append(record["time/step"] + (record.get("time/checkpoint") or 0.0))
        self._status = ""
        if not self.console.is_terminal:
            self.note(format_line(record, self.totals.get(self._phase, 0)))

    def status(self, text: str) -> None:
        """What is going on right now (shown on a terminal only)."""
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

    def render(self) -> Group:
        """The table of the last steps, with its progress bar."""
        table = Table(expand=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("step", justify="right")
        for title, _, _ in COLUMNS:
            table.add_column(title, justify="right")
        for name in TIMES:
            table.add_column(f"{name} s", justify="right", style="dim")
        table.add_column("step s", justify="right")
        for record in self._rows:
            cells = [f"{record['phase']} {record['step']}"]
            cells += ["" if record.get(key) is None else form.format(record[key]) for _, key, form in COLUMNS]
            times = [record.get(f"time/{name}") for name in (*TIMES, "step")]
            table.add_row(*cells, *["" if not t else f"{t:.1f}" for t in times])
        left = self.remaining_s()
        facts = [f"{format_duration(time.monotonic() - self._start)} gone"]
        if left is not None:
            facts.append(f"about {format_duration(left)} left")
        if self._accuracy is not None:
            facts.append(f"held-out accuracy {self._accuracy:.3f}")
        if self._status:
            facts.append(self._status)
        progress = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(40),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}", markup=False),
        )
        total = self.totals.get(self._phase) or None
        progress.add_task(f"{self.name} {self._phase}", total=total, completed=self._step, facts=", ".join(facts))
        return Group(table, progress)
