"""Evaluations under RUN/eval (docs/eval.md): summary.json of each, and the comparisons of FP8 with BF16."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fp8slurm.core.numbers import number

Interval = tuple[float, float | None, float | None]
"""(value, low, high); the bounds are None where they were not recorded."""


def served_name(precision: str, kv_cache: str) -> str:
    """How an evaluation was served, in names of folders: fp8, or fp8-kv-fp8 with an FP8 KV cache."""
    return precision if kv_cache == "auto" else f"{precision}-kv-{kv_cache}"


def served_title(precision: str, kv_cache: str) -> str:
    """The same for people: FP8, or FP8 with FP8 KV."""
    return precision.upper() if kv_cache == "auto" else f"{precision.upper()} with {kv_cache.upper()} KV"


@dataclass
class Evaluation:
    """One task of one summary.json."""

    folder: str
    checkpoint: str
    step: int | None
    precision: str
    kv_cache: str
    """auto or fp8, as engine.kv_cache."""
    made_by: str
    """eval or training."""
    task: str
    accuracy: Interval
    pass_at_k: dict[str, Interval] = field(default_factory=dict)
    questions: int | None = None
    samples: int | None = None
    response_tokens: float | None = None
    truncated: float | None = None
    """Share of the samples."""
    tokens_per_second: float | None = None
    date: str = ""

    @property
    def served(self) -> str:
        """FP8, BF16, FP8 with FP8 KV."""
        return served_title(self.precision, self.kv_cache)


@dataclass
class Comparison:
    """One task of one compare.json; a is FP8 as a rule, b the baseline."""

    folder: str
    checkpoint: str
    task: str
    names: tuple[str, str]
    a: float | None
    b: float | None
    difference: Interval
    questions: int | None
    lost: int
    won: int
    speed_ratio: float | None
    gap: dict[str, float]
    """logprob_gap: mean_abs, p99, max, k1, k3, tokens."""

    @property
    def verdict(self) -> str:
        """What the interval says, in words."""
        value, low, high = self.difference
        if low is None or high is None:
            return "no interval was recorded"
        if high < 0:
            return f"{self.names[0]} is significantly worse"
        if low > 0:
            return f"{self.names[0]} is significantly better"
        return "no significant difference"


def read_evaluations(folder: Path, notes: list[str]) -> list[Evaluation]:
    """Every finished evaluation, by step, precision and task; unfinished ones are noted."""
    from fp8slurm.run.read_json import read_json

    out: list[Evaluation] = []
    for path in _find(folder, "summary.json"):
        summary = read_json(path, notes)
        name = path.parent.relative_to(folder).as_posix()
        if not summary:
            continue
        tasks = summary.get("tasks")
        if not isinstance(tasks, dict):  # the first format: one task, no interval
            tasks = {"held_out": summary} if number(summary.get("accuracy")) is not None else {}
        for task, figures in tasks.items():
            if not isinstance(figures, dict) or (accuracy := _interval(figures.get("accuracy"))) is None:
                notes.append(f"eval/{name}/summary.json: task {task} has no accuracy")
                continue
            lengths = figures.get("response_tokens")
            passes = figures.get("pass_at_k")
            samples = _count(figures.get("samples"), figures.get("questions"))
            truncated = number(figures.get("truncated"))
            if figures is summary and truncated is not None and samples:
                truncated /= samples
            out.append(
                Evaluation(
                    name, Path(str(summary.get("checkpoint", "?"))).name, _count(summary.get("step")),
                    str(summary.get("precision", "?")), str(summary.get("kv_cache", "auto")),
                    str(summary.get("made_by", "eval")), str(task), accuracy,
                    {str(k): i for k, v in passes.items() if (i := _interval(v))} if isinstance(passes, dict) else {},
                    _count(figures.get("questions")), samples,
                    number(lengths.get("mean")) if isinstance(lengths, dict) else None, truncated,
                    number(summary.get("tokens_per_second")), str(summary.get("date", "")),
                )
            )  # fmt: skip
    notes.extend(
        f"eval/{path.parent.relative_to(folder).as_posix()} is not finished: it has no summary.json"
        for path in _find(folder, "settings.json")
        if not (path.parent / "summary.json").is_file()
    )
    return sorted(
        out, key=lambda e: (e.made_by != "eval", e.task, e.step if e.step is not None else -1, e.precision, e.kv_cache)
    )


def read_comparisons(folder: Path, notes: list[str]) -> list[Comparison]:
    """Every compare.json, one entry a task."""
    from fp8slurm.run.read_json import read_json

    out = []
    for path in _find(folder, "compare.json"):
        summary = read_json(path, notes)
        tasks, names = summary.get("tasks"), summary.get("precision")
        if not isinstance(tasks, dict):
            continue
        caches = summary.get("kv_cache", ["auto", "auto"])
        both = ("A", "B")
        if isinstance(names, list) and isinstance(caches, list) and len(names) == len(caches) == 2:
            both = (served_title(str(names[0]), str(caches[0])), served_title(str(names[1]), str(caches[1])))
        raw = summary.get("logprob_gap")
        gap = {k: v for k, x in raw.items() if (v := number(x)) is not None} if isinstance(raw, dict) else {}
        for task, figures in tasks.items():
            difference = _interval(figures.get("difference")) if isinstance(figures, dict) else None
            if difference is None:
                notes.append(f"eval/{path.parent.name}/compare.json: task {task} has no difference")
                continue
            lost, won = (len(x) if isinstance(x := figures.get(k), list) else 0 for k in ("lost", "won"))
            out.append(
                Comparison(
                    path.parent.relative_to(folder).as_posix(), str(summary.get("checkpoint", "?")), str(task),
                    (both[0], both[1]), number(figures.get("a")), number(figures.get("b")), difference,
                    _count(figures.get("questions")), lost, won, number(summary.get("speed_ratio")), gap,
                )
            )  # fmt: skip
    return out


def _find(folder: Path, name: str) -> list[Path]:
    try:
        return sorted([*folder.glob(f"*/{name}"), *folder.glob(f"*/*/{name}")])
    except OSError:
        return []


def _interval(value: Any) -> Interval | None:
    if isinstance(value, dict):
        middle = number(value.get("value"))
        return None if middle is None else (middle, number(value.get("low")), number(value.get("high")))
    plain = number(value)
    return None if plain is None else (plain, None, None)


def _count(*values: Any) -> int | None:
    return next((int(n) for v in values if (n := number(v)) is not None), None)
