"""One evaluation: what is missing is asked for, graded, summarized."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp8slurm.config.schema import RewardSection, RolloutSection
from fp8slurm.core.errors import InputError
from fp8slurm.core.files import read_json, sha256
from fp8slurm.engine.client import GenerateRequest, Generation
from fp8slurm.engine.completions import Completions
from fp8slurm.engine.server import EngineSettings
from fp8slurm.eval import compare
from fp8slurm.eval.asking import EvalRequest, batches, rows_of, rows_of_conversations
from fp8slurm.eval.checkpoints import Checkpoint, files_stamp
from fp8slurm.eval.display import Meter, count, waiting
from fp8slurm.eval.engines import Engines
from fp8slurm.eval.grading import Graders
from fp8slurm.eval.nodes import ResultCollector, StepRendezvous
from fp8slurm.eval.questions import Question
from fp8slurm.eval.records import FORMAT, SUMMARY, Key, Records, append_rows, key_of, node_file
from fp8slurm.eval.summary import RIGHT, document, speed, summarize
from fp8slurm.eval.tasks import EvalTask
from fp8slurm.models.spec import ModelSpec
from fp8slurm.run.evaluations import served_name, served_title
from fp8slurm.sessions.runner import SessionRunner, through
from fp8slurm.sessions.session import Model

AT_ONCE = 1024
"""Conversations that go on at the same time; they are on disk when all of them have ended."""


@dataclass(frozen=True)
class EvalSpec:
    """What is asked, in whatever precision."""

    tasks: list[EvalTask]
    questions: dict[str, list[Question]]
    left_out: dict[str, int]
    seed: int
    stop_ids: list[int]
    tokenizer: Any
    chat_template_kwargs: dict[str, Any]
    rollout: RolloutSection | None = None
    """Whose `generate` holds conversations in place of single responses."""

    @property
    def samples(self) -> int:
        return sum(t.n_samples * len(self.questions[t.name]) for t in self.tasks)

    def check_context(self, context: int) -> None:
        """InputError: a question alone fills the engine's context."""
        for task in self.tasks:
            for question in self.questions[task.name]:
                if len(question.token_ids) + 2 > context:
                    raise InputError(
                        f"question {question.id} of {task.name} has {len(question.token_ids)} tokens, the engine's "
                        f"context {context}: --max-prompt-tokens {context // 2} leaves such questions out, "
                        f"--engine.context-length makes room"
                    )

    def settings(self, checkpoint: Checkpoint, precision: str, model: Path, engine: EngineSettings) -> dict[str, Any]:
        """settings.json: two evaluations with the same ask the same of the same weights."""
        conversations = {} if self.rollout is None else {"generate": self.rollout.generate}
        return conversations | {
            "format": FORMAT,
            "checkpoint": str(checkpoint.path.resolve()),
            "weights": hashlib.sha256(json.dumps(files_stamp(checkpoint.path)).encode()).hexdigest(),
            "model": str(model.resolve()),
            "model_config": sha256(model / "config.json"),
            "precision": precision,
            **({} if engine.section.kv_cache == "auto" else {"kv_cache": engine.section.kv_cache}),
            "dtype": engine.section.dtype,
            "context_length": engine.section.context_length,
            "engine_arguments": engine.section.extra_args,
            "deterministic": engine.deterministic,
            "seed": self.seed,
            "stop_token_ids": self.stop_ids,
            "chat_template_kwargs": self.chat_template_kwargs,
            "tasks": [
                t.model_dump(mode="json") | {"sha256": sha256(t.file), "questions": len(self.questions[t.name])}
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
    limits: RewardSection
    """Of each grader."""

    def name(self, precision: str) -> str:
        """fp8, or fp8-kv-fp8; in names of folders and between the tasks of a step."""
        return served_name(precision, self.engine.section.kv_cache)

    def title(self, precision: str) -> str:
        """The same for people."""
        return served_title(precision, self.engine.section.kv_cache)


Work = list[list[EvalRequest]]


def missing(spec: EvalSpec, serving: Serving, done: set[Key]) -> Work:
    """The batches of all tasks, less the samples that are done."""
    return [b for t in spec.tasks for b in batches(t, spec.questions[t.name], serving.batch_size, done)]


def digest(spec: EvalSpec, work: Work) -> str:
    """Equal where two tasks of a step would ask the same in the same batches."""
    tasks = [t.model_dump(mode="json", exclude={"data"}) for t in spec.tasks]
    put = [[[*w.key, w.question.token_ids] for w in batch] for batch in work]
    return hashlib.sha256(json.dumps([tasks, spec.seed, spec.stop_ids, put]).encode()).hexdigest()


def evaluate(
    spec: EvalSpec, serving: Serving, checkpoint: Checkpoint, precision: str, model: Path, records: Records,
    score_of: Path | None, score_questions: int, rendezvous: StepRendezvous | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Complete the evaluation in `records` (entered); its summary.

    score_of: folder of the finished evaluation whose first responses are scored (its own may be given): a file
    scored.jsonl beside the samples. rendezvous: of task 0 of a step, whose other tasks `assist`. EngineError: an engine
    cannot be kept alive, or another task failed.
    """
    context = serving.engine.section.context_length or context_of(model)
    spec.check_context(context)
    work = missing(spec, serving, set(records.rows))
    if rendezvous is not None:
        rendezvous.announce(serving.name(precision), {
            "batches": len(work), "digest": digest(spec, work), "model": str(model.resolve()), "context": context,
            "folder": str(records.folder.resolve()), "attempt": records.attempt, "done": list(records.rows),
        })  # fmt: skip
    summary = read_json(records.folder / SUMMARY) if records.complete and not work else None
    sequences = None
    if score_of is not None and score_of != records.folder:
        sequences = compare.fixed_sequences(compare.load(score_of)[1], spec.questions, score_questions)
    elif score_of is not None and summary is not None:
        sequences = compare.fixed_sequences(list(records.rows.values()), spec.questions, score_questions)
    if summary is not None and (score_of is None or compare.is_scored(records.folder, sequences or [])):
        return summary
    with Graders(spec.tasks, serving.limits, spec.questions) as graders:
        restarts, engines, nodes = 0, serving.engines, 1
        if summary is None:
            graders.submit(list(records.rows.values()))
        if work or score_of is not None:
            with Engines(model, records.folder, serving.engine, serving.engines) as pool:
                engines = len(pool.engines)
                with waiting(f"{serving.title(precision)}: starting {count(engines, 'engine')}"):
                    pool.wait_ready()
                    if work:
                        pool.warm_up(work[0][0].request(spec.seed, spec.stop_ids))
                if work:
                    others = _ask(spec, serving, precision, work, records, graders, pool, context, rendezvous)
                    restarts, nodes = sum(o["restarts"] for o in others), 1 + len(others)
                    engines += sum(o["engines"] for o in others)
                restarts += pool.restarts
                if score_of is not None:
                    if sequences is None:
                        rows = list(records.rows.values())
                        sequences = compare.fixed_sequences(rows, spec.questions, score_questions)
                    with waiting(f"{serving.title(precision)}: log-probabilities of {len(sequences)} answers"):
                        compare.score(pool.client(pool.engines[0]), sequences, records.folder)
        if summary is not None:
            return summary
        emulated = serving.engine.on_cpu and "fp8" in serving.name(precision)
        counts = {"nodes": nodes, "engines": engines, "engine_restarts": restarts, "emulated": emulated}
        return _finish(spec, serving, checkpoint, precision, records, graders, counts)


def _ask(
    spec: EvalSpec, serving: Serving, precision: str, work: Work, records: Records, graders: Graders, pool: Engines,
    context: int, rendezvous: StepRendezvous | None,
) -> list[dict[str, int]]:  # fmt: skip
    """Have all of it answered, with the other tasks of the step where there are any; what those report."""
    lock, name = threading.Lock(), serving.name(precision)
    if rendezvous is not None:
        pool.share(rendezvous.claims(name), rendezvous.all_ready(name, len(pool.engines)))
    with Meter(serving.title(precision), spec.samples, len(records.rows)) as meter:
        meter.scores = graders.scores

        def seen(rows: list[dict[str, Any]]) -> None:
            meter.advance(len(rows), sum(r.get("said", len(r["response_ids"])) for r in rows))
            graders.submit(rows)

        def kept(rows: list[dict[str, Any]]) -> None:
            with lock:
                records.append(rows)
                seen(rows)

        def others(rows: list[dict[str, Any]]) -> None:
            with lock:
                records.rows |= {key_of(row): row for row in rows}
                seen(rows)

        if rendezvous is None:
            drive = _drive if spec.rollout is None else _converse
            drive(spec, work, pool, context, records.attempt, kept)
            return []
        with ResultCollector(rendezvous, records.folder, others) as collector:
            _drive(spec, work, pool, context, records.attempt, kept)
            return collector.finish(name)


def _drive(
    spec: EvalSpec, work: Work, pool: Engines, context: int, attempt: int, keep: Callable[[list[dict[str, Any]]], None]
) -> None:
    """Have the work, or what this task claims of it, answered; keep(rows) is called from several threads."""
    started = time.monotonic()

    def answered(batch: list[EvalRequest], generations: list) -> None:
        rows = rows_of(batch, generations, spec.tokenizer, spec.stop_ids)
        at = round(time.monotonic() - started, 3)
        keep([row | {"attempt": attempt, "at": at} for row in rows])

    pool.ask(work, lambda w: w.request(spec.seed, spec.stop_ids, context), answered)


def _converse(
    spec: EvalSpec, work: Work, pool: Engines, context: int, attempt: int, keep: Callable[[list[dict[str, Any]]], None]
) -> None:
    """The same by conversations. On the CPU those of a batch go on together, and their turns are batches, so that the
    same are had each time."""
    assert spec.rollout is not None
    started, engine = time.monotonic(), pool.engines[0]
    model = ModelSpec.from_hf_dir(engine.model_dir)
    runner = SessionRunner(
        spec.rollout, Model(spec.tokenizer, spec.stop_ids, model, context, spec.chat_template_kwargs)
    )
    completions = Completions(pool)

    def turn(requests: list[GenerateRequest]) -> list[Generation]:
        found: list[Generation] = []
        pool.ask([requests], lambda request: request, lambda _, generations: found.extend(generations))
        return found

    how: dict[str, Any] = {"batch": turn} if engine.cpu else {"complete": through(completions)}
    if not engine.cpu:  # their requests are single ones: batches are of no use to them
        left = [w for batch in work for w in batch]
        work = [left[i : i + AT_ONCE] for i in range(0, len(left), AT_ONCE)]
    try:
        for batch in work:
            held = runner.converse([w.asked(spec.seed, spec.stop_ids, context) for w in batch], **how)
            at = round(time.monotonic() - started, 3)
            keep([r | {"attempt": attempt, "at": at} for r in rows_of_conversations(batch, held, spec.tokenizer)])
    finally:
        completions.close()
        runner.close()


def assist(spec: EvalSpec, serving: Serving, precision: str, rendezvous: StepRendezvous) -> None:
    """The part of a task that is not task 0: answer batches into a file beside the samples until none is left.

    EngineError: an engine cannot be kept alive, or another task failed. InputError: this node has other questions.
    """
    name = serving.name(precision)
    job = rendezvous.work(name)
    if not job["batches"]:
        return
    work = missing(spec, serving, {(task, id, sample) for task, id, sample in job["done"]})
    if digest(spec, work) != job["digest"]:
        raise InputError("this node has other questions or settings than node 0: task files and flags must be the same")
    folder, model, number = Path(job["folder"]), Path(job["model"]), rendezvous.place.number
    logs = folder / f"node-{number}"
    logs.mkdir(exist_ok=True)
    lock, count = threading.Lock(), 0
    with open(node_file(folder, number), "ab") as file, Engines(model, logs, serving.engine, serving.engines) as pool:
        pool.wait_ready()
        pool.warm_up(work[0][0].request(spec.seed, spec.stop_ids))
        pool.share(rendezvous.claims(name), rendezvous.all_ready(name, len(pool.engines)))

        def keep(rows: list[dict[str, Any]]) -> None:
            nonlocal count
            with lock:
                append_rows(file, [row | {"node": number} for row in rows])
                count += len(rows)

        _drive(spec, work, pool, job["context"], job["attempt"], keep)
        rendezvous.done(name, count, len(pool.engines), pool.restarts)


def _finish(
    spec: EvalSpec, serving: Serving, checkpoint: Checkpoint, precision: str, records: Records, graders: Graders,
    counts: dict[str, int],
) -> dict[str, Any]:  # fmt: skip
    scores = graders.finish()
    order = [(t.name, q.id, k) for t in spec.tasks for q in spec.questions[t.name] for k in range(t.n_samples)]
    rows = [records.rows[key] | {"score": scores[key], "correct": scores[key] >= RIGHT} for key in order]
    entries = {
        t.name: summarize(t, [r for r in rows if r["task"] == t.name], graders.failures[t.name], spec.left_out[t.name])
        for t in spec.tasks
    }
    tokens, seconds = speed(rows)
    summary = document(
        checkpoint.name,
        {"kind": checkpoint.kind, "path": str(checkpoint.path)},
        checkpoint.step,
        precision,
        serving.engine.section.kv_cache,
        "eval",
        spec.seed,
        entries,
    ) | {"response_tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / max(seconds, 1e-3), **counts}
    records.finish(rows, summary)
    assert {key_of(r) for r in rows} == set(order)
    return summary


def context_of(model: Path) -> int:
    """Longest prompt plus response of a model, in tokens."""
    return int(read_json(model / "config.json")["max_position_embeddings"])
