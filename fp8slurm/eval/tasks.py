"""Task definitions, shipped or a user's own."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from fp8slurm.config import RunConfig
from fp8slurm.config.schema import RewardSection, Section
from fp8slurm.core.errors import InputError, TransientInputError
from fp8slurm.data import SUFFIXES
from fp8slurm.rewards.pool import check_kind

DEFINITIONS = Path(__file__).parent / "definitions"
HELD_OUT = "held_out"
"""Name of the task that a run's data.eval is."""
TASKS, OF_A_RUN = "--tasks", "--eval.tasks"
"""Where tasks are named: a flag of fp8slurm eval, and a setting of a run."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class EvalTask(Section):
    """A task: how its file is read, how a question is put, sampled and graded (docs/eval.md)."""

    name: str
    """Its name in results and metrics: letters, digits, '.', '_', '-'."""
    description: str = ""
    """One line about it."""
    prompt_keys: list[str] = ["prompt"]
    """Keys of the question, the first that a row has; a list of messages is taken as it is."""
    label_keys: list[str] = ["label"]
    """Keys of the reference answer, the first that a row has."""
    id_keys: list[str] = []
    """Keys of the question's id; a row without one has the number of the row, from 0."""
    label_pattern: str | None = None
    """Regular expression; its last match's group 1 is the label. A label without a match stays as it is."""
    label_form: str | None = Field(None, exclude=True)
    """Regular expression that every label of the task fits as a whole; a file with another one is another task's."""
    published_questions: int | None = Field(None, ge=1, exclude=True)
    """Questions of the published task; another number in the file is said."""
    choices_keys: list[str] = []
    """Keys of a list of choices; the label is then a letter, or a number from 0."""
    choice_columns: list[str] = []
    """One key a choice, the first is right; their order is drawn from the question's text."""
    template: str = "{prompt}"
    """What is asked; {prompt} and {choices} are filled in."""
    chat: bool = False
    """Ask as the user's message of the chat template; otherwise the text is tokenized as it stands."""
    grader: str = "exact"
    """exact, numeric, choice, math, or module:function."""
    n_samples: int = Field(1, ge=1)
    """Samples a question."""
    temperature: float = Field(0.0, ge=0)
    """0 is greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus sampling."""
    top_k: int = -1
    """Top-k sampling; -1 is off."""
    max_tokens: int = Field(1024, ge=1)
    """Longest response."""
    data: Path | None = None
    """JSONL or parquet with the questions."""

    @property
    def file(self) -> Path:
        """`data`, which every task has that is asked."""
        assert self.data is not None
        return self.data


def shipped() -> list[str]:
    """Names of the definitions that come with the package."""
    return sorted(p.stem for p in DEFINITIONS.glob("*.toml"))


def read_definition(path: Path, flag: str = TASKS) -> EvalTask:
    """A definition from a TOML file; `data` is relative to the file. InputError names what is wrong, and `flag`."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TransientInputError(f"{path}: not a TOML file: {error}") from None
    if isinstance(values.get("data"), str):
        values["data"] = path.parent / values["data"]
    return _checked(values, str(path))


def _checked(values: Mapping[str, Any], origin: str) -> EvalTask:
    try:
        task = EvalTask.model_validate(values)
    except ValidationError as error:
        known = ", ".join(EvalTask.model_fields)
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise InputError(f"{origin}: {'; '.join(lines)}; keys of a task: {known}") from None
    if not _NAME.fullmatch(task.name):
        raise InputError(f"{origin}: name {task.name!r} may hold letters, digits, '.', '_' and '-' only")
    check_kind(task.grader, f"{origin}: grader")
    for key in ("label_pattern", "label_form"):
        pattern = getattr(task, key)
        try:
            groups = re.compile(pattern or "()").groups
        except re.error as error:
            raise InputError(f"{origin}: {key} {pattern!r}: {error}") from None
        if key == "label_pattern" and groups < 1:
            raise InputError(f"{origin}: label_pattern {task.label_pattern!r} has no group (...) for the label")
    if "{prompt}" not in task.template:
        raise InputError(f"{origin}: template {task.template!r} has no {{prompt}}")
    return task


def parse_task(text: str, data: Path | None = None, grader: str | None = None, flag: str = TASKS) -> EvalTask:
    """A task from the command line: NAME, NAME=FILE, FILE.jsonl, FILE.parquet, MY.toml or MY.toml=FILE.

    data: file of the questions, or folder with NAME.jsonl or NAME.parquet, where `text` names no file. grader: used
    instead of the definition's; needed for a bare file. flag: where `text` was given, TASKS or OF_A_RUN. InputError
    says what is allowed.
    """
    or_data = " or --data" if flag == TASKS else ""
    name, equals, file = text.partition("=")
    if not equals and Path(name).suffix in SUFFIXES:
        if grader is None:
            raise InputError(
                f"{flag} {text}: say how its answers are graded: --grader exact, numeric, choice, math or "
                f"module:function"
            )
        if not Path(name).is_file():
            raise TransientInputError(f"{flag} {text}: there is no such file")
        return _checked({"name": Path(name).stem, "grader": grader, "data": Path(name)}, f"{flag} {text}")
    path = Path(name) if name.endswith(".toml") else DEFINITIONS / f"{name}.toml"
    if not path.is_file():
        raise TransientInputError(
            f"{flag} {text}: no such task; allowed: {', '.join(shipped())} (with =FILE{or_data}), a file ending in "
            f"{' or '.join(SUFFIXES)}, or a definition ending in .toml"
        )
    task = read_definition(path, flag)
    where = Path(file) if equals else data or task.data
    if where is not None and where.is_dir():
        files = [where / f"{task.name}{suffix}" for suffix in SUFFIXES if (where / f"{task.name}{suffix}").is_file()]
        if not files:
            raise TransientInputError(f"--data {where}: no {task.name}.jsonl or {task.name}.parquet in that folder")
        where = files[0]
    if where is None:
        raise InputError(f"{flag} {text}: give its questions: {name}=FILE{or_data} (nothing is downloaded)")
    if not where.is_file():
        raise TransientInputError(f"{flag} {text}: there is no file {where}")
    changes: dict[str, Any] = {"data": where}
    if grader is not None:  # who grades otherwise knows that the file is another
        changes |= {"grader": grader, "label_form": None, "published_questions": None}
    return _checked(dict(task) | changes, f"{flag} {text}")


def held_out(config: RunConfig, data: Path | None = None) -> EvalTask | None:
    """A run's held-out prompts as a task with the settings of [eval]; None if it has none."""
    path = data or config.data.eval
    if path is None:
        return None
    kind = config.reward.kind
    return in_training(
        EvalTask(
            name=HELD_OUT,
            prompt_keys=[config.data.prompt_key],
            label_keys=[config.data.label_key] if config.data.label_key else [],
            grader="exact" if kind == "digits" else kind,
            data=path,
        ),
        config,
    )


def in_training(task: EvalTask, config: RunConfig) -> EvalTask:
    """The task, sampled by [eval] and, for what that leaves open, [rollout]."""
    e, r = config.eval, config.rollout
    return task.model_copy(
        update={
            "n_samples": e.n_samples,
            "temperature": e.temperature,
            "top_p": r.top_p,
            "top_k": r.top_k,
            "max_tokens": e.max_tokens or r.max_tokens,
        }
    )


def run_tasks(config: RunConfig) -> list[EvalTask]:
    """What a run evaluates while it trains: data.eval and eval.tasks. InputError: a name that is there twice."""
    first, tasks = held_out(config), further_tasks(config)
    return unique([first, *tasks] if first is not None else tasks, OF_A_RUN)


def further_tasks(config: RunConfig) -> list[EvalTask]:
    """eval.tasks, as a run asks them. InputError says what is wrong with one."""
    kind = config.reward.kind
    own = "exact" if kind == "digits" else kind
    return [
        in_training(
            parse_task(text, None, own if Path(text).suffix in SUFFIXES and "=" not in text else None, OF_A_RUN), config
        )
        for text in config.eval.tasks
    ]


def unique(tasks: list[EvalTask], flag: str = TASKS) -> list[EvalTask]:
    """The tasks. InputError: two of them have the same name."""
    names = [t.name for t in tasks]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{flag}: {name} is there twice; give each file or definition a name of its own")
    return tasks


def grader_section(task: EvalTask, limits: RewardSection) -> RewardSection:
    """The task's grader as a reward, with the limits of a run's; what fails counts as wrong."""
    return limits.model_copy(update={"kind": task.grader, "on_error": "zero"})
