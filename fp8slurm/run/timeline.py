"""Who did what when: intervals of each step's trainer, rollout workers and engines, and who waits for whom.

    attempts/N/timeline.jsonl   a line a step, by rank 0; the file before it is timeline.1.jsonl, older ones are gone
        phase, step, begin, end
        spans    [lane, what, begin, end]: "trainer" (rank 0), "worker 1", "engine 1.0"; Unix seconds
        clocks   {node: [seconds that its clock is ahead of rank 0's, how far that may be off]}

Every time is of the clock of the lane's own node; `clocks` says what to take off it. A node's offset is measured where
a command is answered: the answer cannot be older than the command nor younger than its arrival (as NTP does it).
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp8slurm.core.numbers import number

FILE, OLDER = "timeline.jsonl", "timeline.1.jsonl"
MOST_BYTES = 8 * 1024 * 1024
"""Of one file."""
WORKERS_SHOWN = 8
"""Nodes whose spans are written; metrics count all."""
WAITING = ("rollout", "score", "eval")
"""Phases in which the trainer waits for engines."""
WORD = re.compile(r"[a-z_]+( [0-9]+(\.[0-9]+)?)?", re.ASCII)
"""What a lane or its work may be called."""
Span = tuple[str, str, float, float]
"""Lane, what was done there, begin, end."""


@dataclass(frozen=True)
class Answered:
    """One command of one rollout worker: posted and read on rank 0's clock, taken and answered on the worker's."""

    kind: str
    worker: int
    posted: float
    read: float
    taken: float
    answered: float
    engines: list[list[tuple[float, float]]]
    """When each engine of the node had requests, since the answer before."""

    @property
    def offset(self) -> tuple[float, float]:
        """Seconds that the worker's clock is ahead of rank 0's, and how far that may be off."""
        low, high = self.answered - self.read, self.taken - self.posted
        return (low + high) / 2, abs(high - low) / 2


def clocks_of(answers: Iterable[Answered]) -> dict[int, tuple[float, float]]:
    """The best known offset of each worker's clock."""
    best: dict[int, tuple[float, float]] = {}
    for answer in answers:
        offset = answer.offset
        if answer.worker not in best or offset[1] < best[answer.worker][1]:
            best[answer.worker] = offset
    return best


def engines_idle(answers: Iterable[Answered], seconds: float) -> float | None:
    """Seconds of a step of `seconds` in which an engine had no request, mean of all. What is answered in the step
    counts, wherever it began. None: no engine has told."""
    busy: dict[tuple[int, int], float] = {}
    for answer in answers:
        for engine, spans in enumerate(answer.engines):
            key = answer.worker, engine
            busy[key] = busy.get(key, 0.0) + sum(end - begin for begin, end in spans)
    return statistics.fmean(max(0.0, seconds - b) for b in busy.values()) if busy else None


def line(phase: str, step: int, begin: float, end: float, trainer: Iterable[tuple[str, float, float]],
         answers: list[Answered]) -> dict[str, Any]:  # fmt: skip
    """What timeline.jsonl has of a step."""
    spans: list[Span] = [("trainer", *span) for span in trainer]
    for a in answers:
        if a.worker < WORKERS_SHOWN:
            spans.append((f"worker {a.worker}", a.kind, a.taken, a.answered))
            for number, busy in enumerate(a.engines):
                spans += [(f"engine {a.worker}.{number}", "requests", *b) for b in busy]
    rounded = [(lane, what, round(b, 4), round(e, 4)) for lane, what, b, e in spans]
    clocks = {str(w): [round(x, 6) for x in offset] for w, offset in clocks_of(answers).items()}
    return {"phase": phase, "step": step, "begin": begin, "end": end, "spans": rounded, "clocks": clocks}


def append(attempt_dir: Path, entry: dict[str, Any]) -> None:
    """Write a line. OSError."""
    path = attempt_dir / FILE
    if path.is_file() and path.stat().st_size > MOST_BYTES:
        path.replace(attempt_dir / OLDER)
    with path.open("a") as file:
        file.write(json.dumps(entry, separators=(",", ":")) + "\n")


def read_timeline(attempt_dir: Path) -> list[dict[str, Any]]:
    """The lines of an attempt that can be read, oldest first."""
    found = []
    for name in (OLDER, FILE):
        try:
            text = (attempt_dir / name).read_text(errors="replace")
        except OSError:
            continue
        for raw in text.splitlines():
            try:
                found.append(_checked(json.loads(raw)))
            except (ValueError, KeyError, TypeError, AttributeError):  # half a line, or another's
                continue
    return found


def _checked(entry: dict[str, Any]) -> dict[str, Any]:
    """The keys of a line, as what they should be."""
    spans = [(str(lane), str(what), float(begin), float(end)) for lane, what, begin, end in entry["spans"]]
    clocks = {str(node): (float(ahead), float(off)) for node, (ahead, off) in entry["clocks"].items()}
    times = (
        entry["begin"],
        entry["end"],
        *(t for span in spans for t in span[2:]),
        *(t for c in clocks.values() for t in c),
    )
    words = (entry["phase"], *(word for span in spans for word in span[:2]))
    if not all(map(math.isfinite, times)) or not all(WORD.fullmatch(word) for word in words):
        raise ValueError("not a line of ours")
    known = {"phase": entry["phase"], "step": int(entry["step"]), "begin": entry["begin"], "end": entry["end"]}
    return {**known, "spans": spans, "clocks": clocks}


def around(entries: list[dict[str, Any]], step: int, phase: str = "rl") -> list[Span]:
    """All spans that reach into a step, in seconds since its begin on rank 0's clock, cut at its ends. What engines did
    for the step after is told with that one."""
    (at,) = (e for e in entries if (e["phase"], e["step"]) == (phase, step))
    out: list[Span] = []
    for e in entries:
        for lane, what, begin, end in e["spans"]:
            kind, _, number = lane.partition(" ")
            offset = e["clocks"].get(number.partition(".")[0], [0.0])[0] if kind != "trainer" else 0.0
            first, last = max(at["begin"], begin - offset), min(at["end"], end - offset)
            if first < last:
                out.append((lane, what, first - at["begin"], last - at["begin"]))
    return out


def who_waits(record: Mapping[str, Any]) -> str:
    """One line from a record of metrics.jsonl: who waits for whom; "" where it does not say."""
    step, waits, idle = (number(record.get(f"time/{key}")) for key in ("step", "trainer_waits", "engines_idle"))
    if not step or waits is None:
        return ""
    text = f"trainer for engines {waits / step:.0%} of the last step"
    if idle is not None:
        text += f", engines for the trainer {min(1.0, idle / step):.0%}"
    return text
