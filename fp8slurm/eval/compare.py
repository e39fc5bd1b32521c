"""Two finished evaluations of the same questions: paired differences, flips, log-probability gap, speed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fp8slurm.core.errors import InputError, TransientInputError
from fp8slurm.core.files import read_json, write_atomic
from fp8slurm.core.numbers import number
from fp8slurm.engine.client import EngineClient
from fp8slurm.eval.questions import Question
from fp8slurm.eval.records import FORMAT, SAMPLES, SCORED, SETTINGS, SUMMARY, read_rows
from fp8slurm.eval.stats import paired_difference
from fp8slurm.eval.summary import by_question

SCORED_TOKENS = 1024
"""Most response tokens of a sequence that are scored."""
_SEQUENCES = 8
"""Sequences that are scored in one request."""


def load(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(summary, graded rows) of a finished evaluation. InputError: it is none, or has a file that is broken."""
    if not (folder / SUMMARY).is_file():
        what = (
            "is an unfinished evaluation: run it again to complete it"
            if (folder / SETTINGS).is_file()
            else "has no summary.json"
        )
        raise InputError(f"{folder} {what}")
    summary, rows = read_json(folder / SUMMARY), list(read_rows(folder / SAMPLES))
    tasks, speed = summary.get("tasks"), summary.get("tokens_per_second")
    if not isinstance(tasks, dict) or not all(isinstance(task, dict) for task in tasks.values()):
        raise TransientInputError(f"{folder / SUMMARY}: tasks are no JSON objects by name")
    if not all(isinstance(summary.get(key), str) for key in ("precision", "checkpoint")):
        raise TransientInputError(f"{folder / SUMMARY}: precision and checkpoint are no text")
    if summary.get("kv_cache", "auto") not in ("auto", "fp8"):
        raise TransientInputError(f"{folder / SUMMARY}: kv_cache {summary['kv_cache']!r:.50} is neither auto nor fp8")
    if speed is not None and number(speed) is None:
        raise TransientInputError(f"{folder / SUMMARY}: tokens_per_second {speed!r:.50} is no number")
    for line, row in enumerate(rows, 1):
        named = all(isinstance(row.get(key), str) for key in ("task", "id"))
        if not named or "label" not in row or not isinstance(row.get("correct"), bool | int):
            raise TransientInputError(f"{folder / SAMPLES}:{line} has no task, id, label or correct of a graded sample")
    return summary, rows


def _settings(folder: Path) -> dict[str, Any]:
    settings = read_json(folder / SETTINGS)
    tasks = settings.get("tasks", [])
    if not isinstance(tasks, list) or not all(isinstance(t, dict) and isinstance(t.get("name"), str) for t in tasks):
        raise TransientInputError(f"{folder / SETTINGS}: tasks are no list of JSON objects with a name")
    return settings


def compare(a: Path, b: Path, fail_if_worse: float | None = None) -> dict[str, Any]:
    """compare.json (docs/eval.md) of evaluation `a` against the baseline `b`.

    InputError: one of them is not finished, or they asked other questions. The numbers of samples may differ.
    """
    (summary_a, rows_a), (summary_b, rows_b) = load(a), load(b)
    names = list(summary_a["tasks"])
    if sorted(names) != sorted(summary_b["tasks"]):
        raise InputError(f"{a} has the tasks {', '.join(names)}, {b} has {', '.join(summary_b['tasks'])}")
    _check_same_settings(a, b)
    tasks = {name: _task(name, rows_a, rows_b, a, b) for name in names}
    speed_a, speed_b = (
        None if s.get("emulated") else s.get("tokens_per_second") for s in (summary_a, summary_b)
    )  # emulated FP8 is slower than any kernel: a ratio would say nothing about FP8
    return {
        "format": FORMAT,
        "a": str(a),
        "b": str(b),
        "precision": [summary_a["precision"], summary_b["precision"]],
        "kv_cache": [summary_a.get("kv_cache", "auto"), summary_b.get("kv_cache", "auto")],
        "checkpoint": summary_a["checkpoint"],
        "tasks": tasks,
        "logprob_gap": _gap(a / SCORED, b / SCORED),
        "speed_ratio": speed_a / speed_b if speed_a and speed_b else None,
        "fail_if_worse": fail_if_worse,
        "worse": [n for n in names if fail_if_worse is not None and tasks[n]["difference"]["high"] < -fail_if_worse],
    }


SAME_OF_A_TASK = ("template", "chat", "grader", "temperature", "top_p", "top_k", "max_tokens", "sha256")
"""What of a task in settings.json has to be the same for a difference to mean anything."""
SAME_OF_ALL = ("chat_template_kwargs", "stop_token_ids")
"""The same, of all tasks."""


def _check_same_settings(a: Path, b: Path) -> None:
    """InputError, naming the first setting that differs (where both evaluations have their settings.json)."""
    if not all((folder / SETTINGS).is_file() for folder in (a, b)):
        return
    settings_a, settings_b = (_settings(folder) for folder in (a, b))
    for key in SAME_OF_ALL:
        if key in settings_a and key in settings_b and settings_a[key] != settings_b[key]:
            raise InputError(
                f"{a} and {b} asked with another {key} ({settings_a[key]} and {settings_b[key]}): a difference would "
                f"mean nothing"
            )
    ours, base = ({t["name"]: t for t in settings.get("tasks", [])} for settings in (settings_a, settings_b))
    for name in sorted(ours.keys() & base.keys()):
        for key in SAME_OF_A_TASK:
            x, y = ours[name].get(key), base[name].get(key)
            if x != y:
                what = "the questions' file" if key == "sha256" else f"{key} ({x} and {y})"
                raise InputError(f"{a} and {b} asked {name} with another {what}: a difference would mean nothing")


def write(comparison: dict[str, Any], folder: Path) -> Path:
    """Write compare.json into a folder; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "compare.json", json.dumps(comparison, indent=1))
    return folder / "compare.json"


def _task(name: str, rows_a: Sequence[dict], rows_b: Sequence[dict], a: Path, b: Path) -> dict[str, Any]:
    ours, base = (by_question(r for r in rows if r["task"] == name) for rows in (rows_a, rows_b))
    if {i: q[0]["label"] for i, q in ours.items()} != {i: q[0]["label"] for i, q in base.items()}:
        raise InputError(f"{a} and {b} did not ask the same questions of {name}: a difference would mean nothing")
    mine = [sum(r["correct"] for r in ours[i]) / len(ours[i]) for i in ours]
    other = [sum(r["correct"] for r in base[i]) / len(base[i]) for i in ours]
    flips = [(i, x >= 0.5, y >= 0.5) for i, x, y in zip(ours, mine, other)]
    return {
        "a": sum(mine) / len(mine),
        "b": sum(other) / len(other),
        "difference": paired_difference(mine, other).to_json(),
        "questions": len(mine),
        "lost": [i for i, x, y in flips if y and not x],
        "won": [i for i, x, y in flips if x and not y],
    }


def _gap(a: Path, b: Path) -> dict[str, float] | None:
    """Gap of the tokens that both have scored, None if they have not scored the same."""
    if not (a.is_file() and b.is_file()):
        return None
    import torch

    from fp8slurm.core.gap import gap_metrics

    ours, base = _scored(a), _scored(b)
    if set(ours) != set(base):
        return None
    if other := [key for key in base if len(ours[key]) != len(base[key])]:
        raise TransientInputError(f"{a}: sequence {other[0]} has not as many log-probabilities as in {b}")
    pairs = [(x, y) for key in base for x, y in zip(ours[key], base[key], strict=True)]
    if not pairs:
        return None
    values = torch.tensor(pairs, dtype=torch.float64)
    gaps = gap_metrics(values[:, 0], values[:, 1])
    return {"tokens": len(pairs)} | {key.removeprefix("gap/"): float(value) for key, value in gaps.items()}


def _scored(path: Path) -> dict[str, list[float]]:
    """Log-probabilities by sequence."""
    found = {}
    for line, row in enumerate(read_rows(path), 1):
        name, values = row.get("tokens"), row.get("logprobs")
        if not (isinstance(name, str) and isinstance(values, list) and all(number(v) is not None for v in values)):
            raise TransientInputError(f"{path}:{line} has no tokens and logprobs of a scored sequence")
        found[name] = values
    return found


def fixed_sequences(
    rows: Sequence[dict[str, Any]], questions: dict[str, list[Question]], per_task: int
) -> list[tuple[list[int], list[int]]]:
    """(prompt tokens, response tokens) of the first sample of each task's first `per_task` questions."""
    first = {(r["task"], r["id"]): r["response_ids"][:SCORED_TOKENS] for r in rows if r["sample"] == 0}
    return [
        (list(q.token_ids), first[name, q.id])
        for name, its_questions in questions.items()
        for q in its_questions[:per_task]
        if first[name, q.id]
    ]


def _name(prompt: list[int], response: list[int]) -> str:
    return hashlib.sha256(json.dumps([prompt, response]).encode()).hexdigest()[:16]


def is_scored(folder: Path, sequences: Sequence[tuple[list[int], list[int]]]) -> bool:
    """Whether folder/scored.jsonl holds just these sequences."""
    path = folder / SCORED
    return path.is_file() and set(_scored(path)) == {_name(*s) for s in sequences}


def score(client: EngineClient, sequences: Sequence[tuple[list[int], list[int]]], folder: Path) -> None:
    """Write the log-probability of every response token to folder/scored.jsonl."""
    lines = []
    for start in range(0, len(sequences), _SEQUENCES):
        part = sequences[start : start + _SEQUENCES]
        for (prompt, response), logprobs in zip(part, client.score([p + r for p, r in part]), strict=True):
            own = logprobs[len(prompt) - 1 :]
            assert len(own) == len(response)
            lines.append(json.dumps({"tokens": _name(prompt, response), "logprobs": own}) + "\n")
    write_atomic(folder / SCORED, "".join(lines))
