"""One evaluation: what is missing is asked for, graded, summarized."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp8slurm.engine.server import EngineSettings
from fp8slurm.eval import compare
from fp8slurm.eval.asking import Wanted, batches, rows_of
from fp8slurm.eval.checkpoints import Checkpoint, files_stamp
from fp8slurm.eval.display import Meter, waiting
from fp8slurm.eval.engines import Engines
from fp8slurm.eval.grading import Graders
from fp8slurm.eval.records import FORMAT, SUMMARY, Records, key_of
from fp8slurm.eval.summary import RIGHT, document, speed, summarize
from fp8slurm.eval.questions import Question
from fp8slurm.eval.tasks import EvalTask, file_digest


@dataclass(frozen=True)
class Asked:
    """What is asked, in whatever precision."""

    tasks: list[EvalTask]
    questions: dict[str, list[Question]]
    left_out: dict[str, int]
    seed: int
    stop_ids: list[int]
    tokenizer: Any
    chat_template_kwargs: dict[str, Any]

    @property
    def samples(self) -> int:
        return sum(t.n_samples * len(self.questions[t.name]) for t in self.tasks)

    def check_context(self, context: int) -> None:
        """ValueError: a question alone fills the engine's context."""
        for task in self.tasks:
            for question in self.questions[task.name]:
                if len(question.token_ids) + 2 > context:
                    raise ValueError(
                        f"question {question.id} of {task.name} has {len(question.token_ids)} tokens, the engine's "
                        f"context {context}: --max-prompt-tokens {context // 2} leaves such questions out, "
                        f"--engine.context-length makes room"
                    )

    def settings(self, checkpoint: Checkpoint, precision: str, model: Path, engine: EngineSettings) -> dict[str, Any]:
        """settings.json: two evaluations with the same ask the same of the same weights."""
        return {
            "format": FORMAT,
            "checkpoint": str(checkpoint.path.resolve()),
            "weights": hashlib.sha256(json.dumps(files_stamp(checkpoint.path)).encode()).hexdigest(),
            "model": str(model.resolve()),
            "model_config": file_digest(model / "config.json"),
            "precision": precision,
            "dtype": engine.section.dtype,
            "seed": self.seed,
            "stop_token_ids": self.stop_ids,
            "chat_template_kwargs": self.chat_template_kwargs,
            "tasks": [
                t.model_dump(mode="json") | {"sha256": file_digest(t.data), "questions": len(self.questions[t.name])}
                for t in self.tasks
            ],
        }


@dataclass(frozen=True)
class Serving:
    """How it is served; none of it is part of what is asked."""

    engine: EngineSettings
    engines: int
    batch_size: int
    """Samples in one request."""
    grader_timeout_s: float


def evaluate(
    asked: Asked, serving: Serving, checkpoint: Checkpoint, precision: str, model: Path, records: Records,
    score_of: Path | None, score_questions: int,
) -> dict[str, Any]:  # fmt: skip
    """Complete the evaluation in `records` (entered); its summary.

    score_of: folder of the finished evaluation whose first responses are scored (its own may be given): a file
    scored.jsonl beside the samples. EngineError: an engine cannot be kept alive.
    """
    context = serving.engine.section.context_length or context_of(model)
    asked.check_context(context)
    work = [
        batch
        for t in asked.tasks
        for batch in batches(t, asked.questions[t.name], serving.batch_size, set(records.rows))
    ]
    summary = json.loads((records.folder / SUMMARY).read_text()) if records.complete and not work else None
    sequences = None
    if score_of is not None and score_of != records.folder:
        sequences = compare.fixed_sequences(compare.load(score_of)[1], asked.questions, score_questions)
    elif score_of is not None and summary is not None:
        sequences = compare.fixed_sequences(list(records.rows.values()), asked.questions, score_questions)
    if summary is not None and (score_of is None or compare.is_scored(records.folder, sequences or [])):
        return summary
    with Graders(asked.tasks, serving.grader_timeout_s) as graders:
        restarts, engines = 0, serving.engines
        if summary is None:
            graders.submit(list(records.rows.values()))
        if work or score_of is not None:
            with Engines(model, records.folder, serving.engine, serving.engines) as pool:
                engines = len(pool.engines)
                with waiting(f"{precision.upper()}: starting {engines} engine(s)"):
                    pool.wait_ready()
                    if work:
                        pool.warm_up(work[0][0].request(asked.seed, asked.stop_ids))
                if work:
                    _ask(asked, precision, work, records, graders, pool, context)
                restarts = pool.restarts
                if score_of is not None:
                    if sequences is None:
                        rows = list(records.rows.values())
                        sequences = compare.fixed_sequences(rows, asked.questions, score_questions)
                    with waiting(f"{precision.upper()}: log-probabilities of {len(sequences)} answers"):
                        compare.score(pool.client(pool.engines[0]), sequences, records.folder)
        if summary is not None:
            return summary
        return _finish(asked, checkpoint, precision, records, graders, engines, restarts)


def _ask(
    asked: Asked, precision: str, work: list[list[Wanted]], records: Records, graders: Graders, pool: Engines,
    context: int,
) -> None:  # fmt: skip
    lock, started, attempt = threading.Lock(), time.monotonic(), records.attempt
    with Meter(precision.upper(), asked.samples, len(records.rows)) as meter:
        meter.scores = graders.scores

        def answered(batch: list[Wanted], generations: list) -> None:
            rows = rows_of(batch, generations, asked.tokenizer, asked.stop_ids)
            with lock:
                at = round(time.monotonic() - started, 3)
                records.append([row | {"attempt": attempt, "at": at} for row in rows])
                meter.advance(len(rows), sum(len(r["response_ids"]) for r in rows))
            graders.submit(rows)

        pool.ask(work, lambda w: w.request(asked.seed, asked.stop_ids, context), answered)


def _finish(
    asked: Asked, checkpoint: Checkpoint, precision: str, records: Records, graders: Graders, engines: int,
    restarts: int,
) -> dict[str, Any]:  # fmt: skip
    scores = graders.finish()
    order = [(t.name, q.id, k) for t in asked.tasks for q in asked.questions[t.name] for k in range(t.n_samples)]
    rows = [records.rows[key] | {"score": scores[key], "correct": scores[key] >= RIGHT} for key in order]
    entries = {
        t.name: summarize(t, [r for r in rows if r["task"] == t.name], graders.failures[t.name], asked.left_out[t.name])
        for t in asked.tasks
    }
    tokens, seconds = speed(rows)
    summary = document(
        checkpoint.name, {"kind": checkpoint.kind, "path": str(checkpoint.path)}, checkpoint.step, precision, "eval",
        asked.seed, entries,
    ) | {
        "response_tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / max(seconds, 1e-3),
        "engines": engines, "engine_restarts": restarts,
    }  # fmt: skip
    records.finish(rows, summary)
    assert {key_of(r) for r in rows} == set(order)
    return summary


def context_of(model: Path) -> int:
    """Longest prompt plus response of a model, in tokens."""
    return int(json.loads((model / "config.json").read_text())["max_position_embeddings"])
