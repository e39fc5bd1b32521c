"""Samples to ask for, in batches, and the answers as rows."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

from fp8slurm.data.prompts import sample_seed
from fp8slurm.engine.client import GenerateRequest, Generation
from fp8slurm.eval.questions import Question
from fp8slurm.eval.records import Key
from fp8slurm.eval.tasks import EvalTask


@dataclass(frozen=True)
class EvalRequest:
    """One sample to ask for."""

    task: EvalTask
    question: Question
    sample: int

    @property
    def key(self) -> Key:
        return self.task.name, self.question.id, self.sample

    def request(self, seed: int, stop_ids: Sequence[int], context: int | None = None) -> GenerateRequest:
        """Its seed is a function of `seed`, task, question and number. context: most tokens of prompt and response."""
        ids, most = list(self.question.token_ids), self.task.max_tokens
        if context is not None:
            most = max(1, min(most, context - len(ids) - 1))
        t = self.task
        own = sample_seed(seed, f"{t.name}/{self.question.id}", self.sample)
        return GenerateRequest(ids, most, t.temperature, t.top_p, t.top_k, stop_ids, seed=own)


def batches(
    task: EvalTask, questions: Sequence[Question], size: int, done: Container[Key] = ()
) -> list[list[EvalRequest]]:
    """All samples of a task that are not done, `size` at a time, in the order of questions and samples.

    The boundaries do not depend on what is done, so that what is left is asked for in the company it would have had.
    """
    requests = [EvalRequest(task, q, k) for q in questions for k in range(task.n_samples)]
    cut = [requests[i : i + size] for i in range(0, len(requests), size)]
    left = [[w for w in batch if w.key not in done] for batch in cut]
    return [batch for batch in left if batch]


def rows_of(
    batch: Sequence[EvalRequest], answers: Sequence[Generation], tokenizer: Any, stop_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """A row of samples.jsonl for every answer, ungraded (docs/eval.md)."""
    bare = [a.token_ids[:-1] if a.token_ids and a.token_ids[-1] in stop_ids else a.token_ids for a in answers]
    texts = tokenizer.batch_decode(bare)
    return [
        {
            "task": w.task.name, "id": w.question.id, "sample": w.sample, "prompt": w.question.text,
            "label": w.question.label, "response": text, "response_ids": a.token_ids, "finish_reason": a.finish_reason,
        }
        for w, a, text in zip(batch, answers, texts, strict=True)
    ]  # fmt: skip
