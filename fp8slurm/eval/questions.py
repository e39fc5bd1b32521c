"""Questions of a task from a local file, rendered and tokenized."""

from __future__ import annotations

import hashlib
import logging
import random
import re
import reprlib
import string
from dataclasses import dataclass, field, replace
from typing import Any

from fp8slurm.config.bounds import USUAL_HEAT
from fp8slurm.config.schema import DataSection
from fp8slurm.core.errors import InputError
from fp8slurm.data.prompts import (
    MISSING,
    WARNINGS,
    BadRow,
    Doubts,
    check_template_arguments,
    check_tokens,
    encode,
    label_text,
    last_turns,
    lookup,
    prompt_content,
    read_rows,
    render,
    whole_text,
)
from fp8slurm.eval.tasks import EvalTask, shipped
from fp8slurm.rewards.graders import label_error

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Question:
    """A tokenized question."""

    id: str
    text: str
    """What the tokenizer got, the chat template applied."""
    token_ids: tuple[int, ...]
    label: str
    content: str | list[dict[str, Any]] = field(default="", compare=False)
    row: dict[str, Any] = field(default_factory=dict, compare=False)
    """As in core/types.py, Prompt: for graders that ask for them."""


def load_questions(
    task: EvalTask, tokenizer: Any, data: DataSection, limit: int | None = None, rows: int | None = None
) -> tuple[list[Question], int]:
    """(the questions of task.data in the file's order, how many rows were left out).

    `data` gives chat_template_kwargs, max_prompt_tokens (longer questions are left out and counted) and on_bad_line.
    limit: only the first so many questions; rows: read only so many rows. InputError: no such file, a row that cannot
    be used or an id that is there twice (file and line are named), no question left.
    """
    assert task.data is not None
    check_template_arguments(data.chat_template_kwargs)
    kept: list[Question] = []
    seen: dict[str, int] = {}
    bad = read = 0
    for index, parse in read_rows(task.data):
        if rows is not None and read >= rows:
            break
        read += 1
        try:
            row = parse()
            question = _question(task, row, index, data, tokenizer)
            if question.id in seen:
                raise BadRow(f"id {question.id!r} is there twice, first in line {seen[question.id] + 1}")
        except BadRow as error:
            where = f"{task.data}:{index + 1}"
            if data.on_bad_line == "error":
                raise InputError(f"{where}: {error}. --on-bad-line skip (--data.on-bad-line) leaves such out") from None
            bad += 1
            if bad <= WARNINGS:
                log.warning("%s left out: %s", where, error)
            continue
        seen[question.id] = index
        kept.append(question)
    ids = encode(tokenizer, [question.text for question in kept], data.max_prompt_tokens)
    questions = [
        replace(question, token_ids=tuple(tokens))
        for question, tokens in zip(kept, ids, strict=True)
        if 0 < len(tokens) <= data.max_prompt_tokens
    ]
    for question in questions:
        check_tokens(f"{task.data}:{seen[question.id] + 1}", question.token_ids, tokenizer)
    if not questions:
        raise InputError(
            f"{task.data} has no question for {task.name}: {read} rows, {bad} of them bad, {len(kept)} longer than "
            f"{data.max_prompt_tokens} tokens (data.max_prompt_tokens, --max-prompt-tokens)"
        )
    long = len(kept) - len(questions)
    if long:
        log.warning("%s: %d questions left out, longer than %d tokens", task.data, long, data.max_prompt_tokens)
    return questions[:limit], bad + long


def task_doubts(task: EvalTask, questions: list[Question], rows: int | None) -> Doubts:
    """Whether a file is that of its task, and questions ask for something. rows: of the file; None: not all were read.

    A shipped definition says what the labels of its task look like and how many questions it has: with other data its
    name would stand beside a figure that is not its.
    """
    found = last_turns([(f"question {q.id}", q.content) for q in questions])
    unmeant, unusual = ([f"{task.name}={task.data}: {text}" for text in of] for of in (found.unmeant, found.unusual))
    keys = {*task.prompt_keys, *task.label_keys, *task.choices_keys, *task.id_keys, "question"} - {"prompt", "choices"}
    if left := sorted(key for key in keys if f"{{{key}}}" in task.template):
        unmeant.append(
            f"{task.name}: its template has {{{left[0]}}}, which nothing fills in; allowed: {{prompt}}, {{choices}}"
        )
    if task.choice_columns and "{choices}" not in task.template:
        unmeant.append(
            f"{task.name}: choice_columns, and a template without {{choices}}: nobody could know the letters; allowed: "
            f"{{prompt}} with {{choices}}"
        )
    if task.top_k == 0:
        unmeant.append(f"{task.name}: top_k 0, nothing to choose from; allowed: 1 or more, or -1 (off)")
    if task.label_form is not None:
        foreign = [q for q in questions if not re.fullmatch(task.label_form, q.label.strip())]
        if foreign:
            unmeant.append(
                f"{task.name}={task.data}: question {foreign[0].id} has the label {foreign[0].label!r:.80}, which no "
                f"question of {task.name} has ({len(foreign)} of {len(questions)} are such): the file is another "
                f"task's; allowed: {task.name}'s questions, or a definition of your own (docs/eval.md)"
            )
    stem = task.file.stem.lower().replace("_", "-")
    if task.name in shipped() and stem in shipped() and stem != task.name:
        unmeant.append(f"{task.name}={task.data}: that is the name of another task; allowed: {stem}={task.data}")
    if task.choices_keys and "{choices}" not in task.template and not task.choice_columns:
        unusual.append(f"{task.name}: choices_keys without {{choices}} in the template: a model sees only the question")
    if task.temperature > USUAL_HEAT[1]:
        unusual.append(f"{task.name}: temperature {task.temperature:g}: answers are nearly random")
    if task.published_questions is not None and rows is not None and rows != task.published_questions:
        unusual.append(
            f"{task.name}={task.data}: {task.name} has {task.published_questions} questions, the file has {rows}: the "
            f"accuracy is not {task.name}'s"
        )
    return Doubts(unmeant, unusual)


def _question(task: EvalTask, row: dict, index: int, data: DataSection, tokenizer: Any) -> Question:
    """The question of a row, not tokenized yet."""
    id = _first(row, task.id_keys)
    prompt = _first(row, task.prompt_keys)
    if prompt is None:
        raise BadRow(f"no {' or '.join(map(repr, task.prompt_keys))} among its keys {sorted(row)} (prompt_keys)")
    choices = _first(row, task.choices_keys)
    if choices is None and task.choice_columns and any(c in row for c in task.choice_columns):
        choices, label = _from_columns(task, row, str(prompt))
    else:
        label = _label(task, row, choices)
    if isinstance(prompt, str):
        parts = {"prompt": prompt.strip() if task.chat else prompt, "choices": _listed(choices)}
        prompt = re.sub(r"\{(prompt|choices)\}", lambda m: parts[m[1]], task.template)
        if task.chat:
            prompt = [{"role": "user", "content": prompt.strip()}]
    error = label_error(task.grader, label)
    if error is not None:
        raise BadRow(error)
    content = prompt_content({"prompt": prompt}, "prompt")
    text = render(content, data.model_copy(update={"prompt_key": "prompt"}), tokenizer)
    return Question(whole_text(str(index if id is None else id), "the id"), text, (), label, content, row)


def _first(row: dict, keys: list[str]) -> Any:
    return next((value for k in keys if (value := lookup(row, k)) is not None and value is not MISSING), None)


def _label(task: EvalTask, row: dict, choices: Any) -> str:
    if not task.label_keys:  # a run's data.label_key ""
        return ""
    value = _first(row, task.label_keys)
    if value is None:
        raise BadRow(f"no {' or '.join(map(repr, task.label_keys))} among its keys {sorted(row)} (label_keys)")
    label = label_text(value, "the label")
    if task.label_pattern is not None:
        labels = [m[1] for m in re.finditer(task.label_pattern, label)]
        label = labels[-1] if labels else label
    if choices is None:
        return label
    if not isinstance(choices, list) or not 2 <= len(choices) <= 26:
        raise BadRow(f"the choices are a list of 2 to 26 texts, not {reprlib.repr(choices)}")
    letters = string.ascii_uppercase[: len(choices)]
    number = int(label) if re.fullmatch("[0-9]{1,9}", label) else len(letters)
    letter = letters[number] if number < len(letters) else label.strip()
    if letter.upper() not in letters or len(letter) != 1:
        raise BadRow(f"the label {label!r} is none of {', '.join(letters)} and no number from 0 to {len(letters) - 1}")
    return letter.upper()


def _from_columns(task: EvalTask, row: dict, question: str) -> tuple[list[str], str]:
    missing = [c for c in task.choice_columns if row.get(c) is None]
    if missing:
        raise BadRow(f"no {missing[0]!r} among its keys {sorted(row)} (choice_columns)")
    order = list(range(len(task.choice_columns)))
    random.Random(hashlib.sha256(question.encode()).digest()).shuffle(order)
    choices = [str(row[task.choice_columns[i]]).strip() for i in order]
    return choices, string.ascii_uppercase[order.index(0)]


def _listed(choices: list[Any] | None) -> str:
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(string.ascii_uppercase, choices or []))
