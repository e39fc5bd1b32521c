"""Graded rows -> what summary.json says of a task."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from fp8slurm.eval.records import FORMAT
from fp8slurm.eval.stats import DRAWS, bootstrap, ks, pass_at_k
from fp8slurm.eval.tasks import EvalTask

RIGHT = 1.0
"""A score from which an answer counts as right."""


def by_question(rows: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows of one task by question, in the order of their first row."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["id"]].append(row)
    return dict(groups)


def summarize(
    task: EvalTask, rows: Sequence[dict[str, Any]], failures: int = 0, left_out: int = 0, draws: int = DRAWS
) -> dict[str, Any]:
    """The entry of one task (docs/eval.md): accuracy, pass@k, lengths. Every question has n_samples graded rows."""
    questions = by_question(rows)
    n = task.n_samples
    right = [sum(r["correct"] for r in q) for q in questions.values()]
    assert all(len(q) == n for q in questions.values())
    lengths = np.array([r.get("said", r.get("tokens", len(r.get("response_ids", ())))) for r in rows])
    reasons = [r["finish_reason"] for r in rows]
    return {
        "grader": task.grader,
        "data": str(task.data),
        "n_samples": n,
        "temperature": task.temperature,
        "top_p": task.top_p,
        "max_tokens": task.max_tokens,
        "questions": len(questions),
        "samples": len(rows),
        "correct": sum(right),
        "accuracy": bootstrap([c / n for c in right], draws).to_json(),
        "pass_at_k": {str(k): bootstrap([pass_at_k(n, c, k) for c in right], draws).to_json() for k in ks(n)},
        "score": float(np.mean([r["score"] for r in rows])),
        "response_tokens": {
            "mean": float(lengths.mean()),
            "median": float(np.median(lengths)),
            "p95": float(np.quantile(lengths, 0.95)),
            "longest": int(lengths.max()),
        },
        "truncated": reasons.count("length") / len(rows),
        "aborted": reasons.count("abort") / len(rows),
        "grader_failures": failures,
        "left_out": left_out,
    }


def document(
    checkpoint: str, source: dict[str, str], step: int | None, precision: str, kv_cache: str, made_by: str, seed: int,
    tasks: dict[str, dict[str, Any]],
) -> dict[str, Any]:  # fmt: skip
    """summary.json without what is measured on the clock. kv_cache: of engine.kv_cache; auto is not written."""
    return {
        "format": FORMAT,
        "checkpoint": checkpoint,
        "source": source,
        "step": step,
        "precision": precision,
        **({} if kv_cache == "auto" else {"kv_cache": kv_cache}),
        "made_by": made_by,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "tasks": tasks,
    }


def speed(rows: Sequence[dict[str, Any]]) -> tuple[int, float]:
    """(response tokens, seconds in which engines were generating), over all starts that left samples."""
    seconds: dict[int, float] = defaultdict(float)
    for row in rows:
        seconds[row["attempt"]] = max(seconds[row["attempt"]], row["at"])
    return sum(row.get("said", len(row["response_ids"])) for row in rows), sum(seconds.values())
