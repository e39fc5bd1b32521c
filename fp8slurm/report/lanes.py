"""The lanes of a step's timeline: their order, their rows in words."""

from __future__ import annotations

from collections.abc import Sequence

from fp8slurm.report.safe import seconds
from fp8slurm.run.timeline import WAITING, Span

LANE_HEADS = ("lane", "what", "seconds", "of the step")
UPDATES = "updates"
NAMES = {
    "requests": "generating", "evaluate": "evaluation", "eval": "evaluation", "sync": "weight sync",
    "update": "weight sync", "train": "training", "logprobs": "log-probabilities", "deal": "samples to ranks",
}  # fmt: skip
"""What a lane's work is called, where that differs from its name in the file."""


def lanes(spans: Sequence[Span]) -> dict[str, list[tuple[str, float, float]]]:
    """(what, begin, end) by lane: the trainer, the weight updates, then every worker with its engines."""
    out: dict[str, list[tuple[str, float, float]]] = {"trainer": [], UPDATES: []}
    for lane, what, begin, end in sorted(spans, key=lambda span: (_place(span[0]), span[2])):
        out.setdefault(lane, []).append((name_of(lane, what), begin, end))
        if lane == "trainer" and what == "sync":
            out[UPDATES].append((name_of(lane, what), begin, end))
    return {lane: work for lane, work in out.items() if work}


def name_of(lane: str, what: str) -> str:
    """What a bar is called."""
    if lane == "trainer" and what in WAITING:
        return f"waits: {NAMES.get(what, what)}"
    return NAMES.get(what, what)


def lane_rows(spans: Sequence[Span], lasted: float) -> list[tuple[str, str, str, str]]:
    """A row for each lane and what was done there."""
    rows = []
    for lane, work in lanes(spans).items():
        total: dict[str, float] = {}
        for what, begin, end in work:
            total[what] = total.get(what, 0.0) + end - begin
        rows += [(lane, what, seconds(s), f"{s / lasted:.0%}" if lasted else "") for what, s in total.items()]
    return rows


def _place(lane: str) -> tuple[int, float, str]:
    kind, _, number = lane.partition(" ")
    node = float(number.partition(".")[0] or -1)
    return (0 if kind == "trainer" else 1, node, {"worker": "a"}.get(kind, "b") + number)
