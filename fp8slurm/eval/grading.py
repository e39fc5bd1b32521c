"""Grades rows of samples.jsonl, in a thread beside the generation."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fp8slurm.config.schema import RewardSection
from fp8slurm.core.types import Prompt, Sample, SampleGroup
from fp8slurm.eval.questions import Question
from fp8slurm.eval.records import Key, key_of
from fp8slurm.eval.tasks import EvalTask, grader_section
from fp8slurm.rewards.pool import RewardPool

Rows = Sequence[dict[str, Any]]
NOTHING = Question("", "", (), "")
"""Of a row whose question is not known: an older evaluation's."""


class Graders:
    """A grader for every task: `grade` at once, or, as a context manager, `submit` and `finish` beside the generation.

    InputError: a user's function cannot be loaded.
    """

    def __init__(
        self, tasks: Sequence[EvalTask], limits: RewardSection, questions: Mapping[str, Sequence[Question]]
    ) -> None:
        """limits: timeout_s, memory_mib and number of processes of each grader; questions: those that rows answer."""
        self.scores: dict[Key, float] = {}
        """Of every row that was graded."""
        self._pools: dict[str, RewardPool] = {}
        self._kinds = {t.name: t.grader for t in tasks}
        self._questions = {(task, q.id): q for task, of_task in questions.items() for q in of_task}
        self.failures = {t.name: 0 for t in tasks}
        """Answers that a task's grader could not digest, counted as wrong."""
        self._rows: queue.SimpleQueue[Rows | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        try:
            for task in tasks:
                if task.grader not in self._pools:
                    self._pools[task.grader] = RewardPool(grader_section(task, limits))
        except BaseException:
            self.close()
            raise
        self._thread = threading.Thread(target=self._work, name="graders", daemon=True)

    def __enter__(self) -> Graders:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._rows.put(None)
        self._thread.join()
        self.close()

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()

    def submit(self, rows: Rows) -> None:
        """Grade these when there is time."""
        self._rows.put(rows)

    def finish(self) -> dict[Key, float]:
        """Scores of all rows that were submitted."""
        self._rows.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self.scores

    def grade(self, rows: Rows, heartbeat: Callable[[], None] = lambda: None) -> None:
        """Grade these now; `heartbeat`: as in RewardPool.score."""
        for name in dict.fromkeys(row["task"] for row in rows):
            mine = [row for row in rows if row["task"] == name]
            groups = [self._group(i, row) for i, row in enumerate(mine)]
            pool = self._pools[self._kinds[name]]
            before = pool.failures
            pool.score(groups, heartbeat)
            self.failures[name] += pool.failures - before
            self.scores |= {key_of(row): g.samples[0].reward for row, g in zip(mine, groups)}

    def _group(self, i: int, row: dict[str, Any]) -> SampleGroup:
        asked = self._questions.get((row["task"], row["id"]), NOTHING)
        thinking = row.get("prompt", "").rstrip().endswith("<think>")
        prompt = Prompt(i, asked.token_ids, row["label"], thinking, asked.content, asked.row)
        ids = row.get("response_ids", [])
        sample = Sample(ids, [], [], row.get("finish_reason", "stop"), row["response"], row.get("reward", 0.0))
        return SampleGroup(prompt, [sample])

    def _work(self) -> None:
        try:
            while (rows := self._rows.get()) is not None:
                self.grade(rows)
        except BaseException as error:
            self._error = error
