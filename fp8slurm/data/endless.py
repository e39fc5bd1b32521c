"""Prompts without an end, made one by one: what training takes from a file of a reasoning-gym task without a size."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, overload

from fp8slurm.config.schema import DataSection
from fp8slurm.core.errors import InputError
from fp8slurm.core.types import Prompt
from fp8slurm.data.prompts import BadRow, check_tokens, encode, opens_thinking, prompt_content, render
from fp8slurm.data.reasoning_gym import BLOCK, Task

log = logging.getLogger(__name__)

TRIES = 10
"""Questions from which the first is taken that is short enough."""
COUNT = BLOCK // TRIES
"""Prompts of one file; a run that takes more raises IndexError."""


class EndlessPrompts(Sequence[Prompt]):
    """Prompt i is question i of the task, or the first of i + COUNT, i + 2 COUNT, ... that data.max_prompt_tokens
    allows: a function of i, so a cursor is all that a resume needs."""

    def __init__(self, task: Task, data: DataSection, tokenizer: Any, source: str) -> None:
        self.task, self._data, self._tokenizer, self._source = task, data, tokenizer, source
        self._make = lru_cache(maxsize=1024)(self._prompt)
        self.left_out = 0
        """Questions that were too long, of the prompts made so far."""

    def __len__(self) -> int:
        return COUNT

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        if isinstance(index, slice):
            return [self._make(i) for i in range(*index.indices(COUNT))]
        if not 0 <= index < COUNT:
            raise IndexError(f"{self.task.path}: prompt {index}; a seed has {COUNT}")
        return self._make(index)

    def _prompt(self, index: int) -> Prompt:
        most = self._data.max_prompt_tokens
        for number in range(index, BLOCK, COUNT):
            row = self.task.row(number)
            try:
                content = prompt_content(row, self._data.prompt_key)
                (ids,) = encode(self._tokenizer, [render(content, self._data, self._tokenizer)], most)
            except BadRow as error:
                raise InputError(f"{self.task.path}, question {number}: {error}") from None
            if len(ids) <= most:
                check_tokens(f"{self.task.path}, question {number}", ids, self._tokenizer)
                thinking = opens_thinking(self._tokenizer, ids)
                return Prompt(index, tuple(ids), row["label"], thinking, content, row, self._source)
            self.left_out += 1
            log.info("%s: question %d has more than %d tokens: another is taken", self.task.path, number, most)
        raise InputError(f"{self.task.path}: {TRIES} questions are longer than data.max_prompt_tokens = {most}")


@dataclass(frozen=True)
class InOrder:
    """Prompts as they come: what is drawn at random needs no shuffling."""

    def take(self, cursor: int, k: int) -> tuple[list[int], int]:
        """As PromptOrder.take."""
        return list(range(cursor, cursor + k)), cursor + k


class Joined(Sequence[Prompt]):
    """The prompts of several sources, one source after the other."""

    def __init__(self, parts: Sequence[Sequence[Prompt]]) -> None:
        self._parts = parts

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        for part in self._parts:
            if index < len(part):
                return part[index]
            index -= len(part)
        raise IndexError("no such prompt")
