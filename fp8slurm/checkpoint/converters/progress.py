"""A progress bar over bytes with GB/s, or nothing at all."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed / 1e9:.2f} GB/s" if speed else "- GB/s")


class Progress:
    """Shown while used as a context, if `shown`; counts bytes read and bytes checked."""

    def __init__(self, total: int, shown: bool) -> None:
        self._bar = None
        if shown:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                _Speed(),
                TimeRemainingColumn(),
            )
            self._bar = Bar(*columns, console=Console(stderr=True), refresh_per_second=4)
            self._task = self._bar.add_task("convert", total=total)

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, nbytes: int) -> None:
        """Count bytes; from any thread."""
        if self._bar:
            self._bar.update(self._task, advance=nbytes)

    def describe(self, text: str) -> None:
        """What is being worked on."""
        if self._bar:
            self._bar.update(self._task, description=text)
