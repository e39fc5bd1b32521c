"""Where the seconds of a step go."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager


class Stopwatch:
    """Seconds by phase; after every phase `heartbeat` says that something has moved."""

    def __init__(self, heartbeat: Callable[[], None] = lambda: None) -> None:
        self.heartbeat = heartbeat
        self.seconds: dict[str, float] = {}
        self.spans: list[tuple[str, float, float]] = []
        """Phase, begin and end (Unix seconds) of everything that was timed since they were last taken; phases within
        another one come before it."""
        self._within_s = 0.0
        """Seconds of the phases within the one that is being timed."""

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Count what happens inside as `phase`, but for phases within it: a rollout may have to send weights first."""
        begun, start, outside, self._within_s = time.time(), time.perf_counter(), self._within_s, 0.0
        yield
        whole = time.perf_counter() - start
        self.spans.append((phase, begun, begun + whole))
        self.spent(phase, whole - self._within_s)
        self._within_s = outside + whole
        self.heartbeat()

    def spent(self, phase: str, seconds: float) -> None:
        """Count what somebody else has measured."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def take_spans(self) -> list[tuple[str, float, float]]:
        """`spans`, which begin anew."""
        spans, self.spans = self.spans, []
        return spans

    def clear(self, keep: Sequence[str] = ()) -> None:
        """Begin anew, with all phases but these at 0."""
        self.seconds = {phase: seconds for phase, seconds in self.seconds.items() if phase in keep}
