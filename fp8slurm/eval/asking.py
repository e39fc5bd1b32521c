"""Samples to ask for, in batches, and the answers as rows."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

from fp8slurm.core.types import Prompt, Sample
from fp8slurm.data.prompts import sample_seed
from fp8slurm.engine.client import GenerateRequest, Generation
from fp8slurm.eval.questions import Question
from fp8slurm.eval.records import Key
from fp8slurm.eval.tasks import EvalTask
from fp8slurm.sessions.runner import Asked
from fp8slurm.sessions.session import told


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

    def asked(self, seed: int, stop_ids: Sequence[int], context: int | None = None) -> Asked:
        """The same as a conversation of rollout.generate. Its number is the sample's."""
        q = self.question
        thinking = q.text.rstrip().endswith("<think>")
        prompt = Prompt(0, q.token_ids, q.label, thinking, q.content, q.row, source=self.task.name)
        return Asked(prompt, self.sample, self.request(seed, stop_ids, context))


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
    return [_row(w, a.token_ids, text, a.finish_reason) for w, a, text in zip(batch, answers, texts, strict=True)]


def rows_of_conversations(
    batch: Sequence[EvalRequest], held: Sequence[Sequence[Sample]], tokenizer: Any
) -> list[dict[str, Any]]:
    """The same of conversations: the response is what the model said last, and `conversation` all of it, with who said
    it. Of one with branches it is the last branch."""
    rows = []
    for w, branches in zip(batch, held, strict=True):
        s = branches[-1]
        row = _row(w, list(s.response_ids), s.text, s.finish_reason)
        row |= {"conversation": told(s, tokenizer), "said": sum(b - a for one in branches for a, b in one.turns)}
        row |= {key: value for key, value in (("reward", s.reward), ("error", s.error)) if value}
        rows.append(row)
    return rows


def _row(w: EvalRequest, ids: list[int], text: str, finish_reason: str) -> dict[str, Any]:
    return {
        "task": w.task.name, "id": w.question.id, "sample": w.sample, "prompt": w.question.text,
        "label": w.question.label, "response": text, "response_ids": ids, "finish_reason": finish_reason,
    }  # fmt: skip
