"""Evaluation while a run trains: a rollout worker's share of the same questions, and one summary from all shares."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fp8slurm.config import RunConfig
from fp8slurm.config.derived import reward_workers
from fp8slurm.config.schema import RewardSection
from fp8slurm.core.files import write_atomic
from fp8slurm.engine.client import GenerateRequest, Generation
from fp8slurm.eval.asking import batches, rows_of, rows_of_conversations
from fp8slurm.eval.grading import Graders
from fp8slurm.eval.questions import Question, load_questions
from fp8slurm.eval.records import SAMPLES, SUMMARY
from fp8slurm.eval.stats import DRAWS
from fp8slurm.eval.summary import RIGHT, document, summarize
from fp8slurm.eval.tasks import HELD_OUT, EvalTask, run_tasks
from fp8slurm.models.precision import engine_in_fp8
from fp8slurm.rollout.sampler import Sampler
from fp8slurm.run.directory import RunDirectory

SHORT = ("task", "id", "sample", "label", "finish_reason", "tokens", "score", "correct")
"""What a summary needs of a row; this much travels from the rollout workers to the ranks."""


def folder_name(config: RunConfig, checkpoint: str) -> str:
    """Under RUN/eval: step_000040-fp8-training."""
    return f"{checkpoint}-{'fp8' if engine_in_fp8(config) else 'bf16'}-training"


@dataclass
class TrainingEval:
    """A rollout worker's part. No random number is drawn: seeds follow from run.seed, task, question and number."""

    config: RunConfig
    run: RunDirectory
    sampler: Sampler
    number: int
    workers: int

    def __post_init__(self) -> None:
        self.tasks = run_tasks(self.config)
        self.questions: dict[str, list[Question]] = {}
        self.left_out: dict[str, int] = {}
        for task in self.tasks:
            all_of_them, self.left_out[task.name] = load_questions(task, self.sampler.tokenizer, self.config.data)
            self.questions[task.name] = all_of_them[self.number :: self.workers]
        self.graders: Graders | None = None

    def close(self) -> None:
        """End the graders' processes."""
        if self.graders is not None:
            self.graders.close()

    def _limits(self) -> RewardSection:
        return self.config.reward.model_copy(update={"workers": reward_workers(self.config)})

    def evaluate(
        self, generate: Callable[[list[list[GenerateRequest]]], list[list[Generation]]], checkpoint: str | None,
        heartbeat: Callable[[], None] = lambda: None,
    ) -> dict[str, Any]:  # fmt: skip
        """Answer this rollout worker's share, in batches. checkpoint: name of the weights; None: only the held-out
        prompts, none written. `heartbeat`: as in RewardPool.score."""
        c = self.config
        tasks = [t for t in self.tasks if checkpoint is not None or t.name == HELD_OUT]
        rows: list[dict[str, Any]] = []
        size = c.engine.max_running_requests if c.run.deterministic else 10**9
        share = [batch for task in tasks for batch in batches(task, self.questions[task.name], size)]
        stop_ids, tokenizer = self.sampler.stop_ids, self.sampler.tokenizer
        if self.sampler.converse is not None:
            for batch in share:
                held = self.sampler.converse([w.asked(c.run.seed, stop_ids) for w in batch])
                rows += rows_of_conversations(batch, held, tokenizer)
        else:
            answered = generate([[w.request(c.run.seed, stop_ids) for w in batch] for batch in share])
            for batch, answers in zip(share, answered, strict=True):
                rows += rows_of(batch, answers, tokenizer, stop_ids)
        self.graders = self.graders or Graders(self.tasks, self._limits(), self.questions)
        before = dict(self.graders.failures)
        self.graders.grade(rows, heartbeat)
        for row in rows:
            score = self.graders.scores.pop((row["task"], row["id"], row["sample"]))
            tokens = len(row.pop("response_ids"))
            row |= {"score": score, "correct": score >= RIGHT, "tokens": row.pop("said", tokens)}
        failures = {name: count - before[name] for name, count in self.graders.failures.items()}
        if checkpoint is not None and c.eval.save_samples:
            folder = self.run.path / "eval" / folder_name(c, checkpoint)
            folder.mkdir(parents=True, exist_ok=True)
            name = SAMPLES if self.workers == 1 else f"samples.{self.number}.jsonl"
            write_atomic(folder / name, "".join(json.dumps(row) + "\n" for row in rows))
        return {"rows": [[row[key] for key in SHORT] for row in rows], "failures": failures, "left_out": self.left_out}


def merge(
    config: RunConfig, run: RunDirectory, answers: Sequence[dict[str, Any]], checkpoint: str | None, step: int,
    writes: bool,
) -> dict[str, float]:  # fmt: skip
    """The rollout workers' answers as metrics (docs/metrics.md, eval/...); `writes`: this rank writes summary.json."""
    rows = [dict(zip(SHORT, row)) for answer in answers for row in answer["rows"]]
    entries: dict[str, dict[str, Any]] = {}
    tasks = {t.name: t for t in run_tasks(config)}
    for name in dict.fromkeys(row["task"] for row in rows):
        failures = sum(a["failures"].get(name, 0) for a in answers)
        of_task = [r for r in rows if r["task"] == name]
        draws = DRAWS if writes and checkpoint is not None else 1  # nobody looks at the other intervals
        entries[name] = summarize(tasks[name], of_task, failures, answers[0]["left_out"][name], draws)
    if writes and checkpoint is not None:
        folder = run.path / "eval" / folder_name(config, checkpoint)
        folder.mkdir(parents=True, exist_ok=True)
        source = {"kind": "weights in training", "path": str(run.path)}
        precision = "fp8" if engine_in_fp8(config) else "bf16"
        kv_cache = config.engine.kv_cache
        summary = document(checkpoint, source, step, precision, kv_cache, "training", config.run.seed, entries)
        write_atomic(folder / SUMMARY, json.dumps(summary, indent=1))
    return {key: value for name, entry in entries.items() for key, value in metrics(tasks[name], entry).items()}


def metrics(task: EvalTask, entry: dict[str, Any]) -> dict[str, float]:
    """eval/KEY of the held-out prompts, eval/TASK/KEY of any other task."""
    prefix = "eval/" if task.name == HELD_OUT else f"eval/{task.name}/"
    values = {"accuracy": entry["accuracy"]["value"], "truncated": entry["truncated"]}
    if task.name != HELD_OUT:
        values["response_length"] = entry["response_tokens"]["mean"]
    if task.n_samples > 1:
        values["pass_at_n"] = entry["pass_at_k"][str(task.n_samples)]["value"]
    return {prefix + key: float(value) for key, value in values.items()}
