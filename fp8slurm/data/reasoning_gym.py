"""Tasks of the package reasoning-gym as prompts; its verifiers as a reward are agents/reasoning_gym.py.

A data file ending in .toml names a task:

    reasoning_gym = "chain_sum"
    seed = 0                                     # 0 to 99; two seeds have no question of the same number in common
    size = 200                                   # this many questions; left out: without end, for training
    system = "Answer with the number alone."     # left out: no system message
    [settings]                                   # of the task, as the package calls them
    max_terms = 3

Question n is a function of the task, its settings, the seed, n and the package's version, which is pinned for that.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from fp8slurm.core.errors import InputError, TransientInputError
from fp8slurm.core.extras import require
from fp8slurm.core.files import read_bytes

SUFFIX = ".toml"
VERSION = "0.1.25"
BLOCK = 20_000_000
"""Questions of one seed: the package draws question n of seed s from a generator seeded with s + n."""
LARGEST_SEED = 99
_KEYS = ("reasoning_gym", "seed", "size", "system", "settings")


@dataclass(frozen=True)
class Task:
    """What a file says."""

    path: Path
    name: str
    settings: dict[str, Any]
    seed: int
    size: int | None
    """None: without end."""
    system: str

    def row(self, number: int) -> dict[str, Any]:
        """Question `number` as a row of a data file. IndexError: a seed has no such question."""
        if not 0 <= number < BLOCK:
            raise IndexError(f"{self.path}: question {number}; a seed has {BLOCK}")
        settings = json.dumps(self.settings, sort_keys=True)
        entry = entry_of(self.name, settings, self.seed, number)
        system = [{"role": "system", "content": self.system}] if self.system else []
        return {
            "prompt": [*system, {"role": "user", "content": entry["question"]}],
            "label": "" if entry["answer"] is None else str(entry["answer"]),
            "reasoning_gym": {"task": self.name, "settings": settings, "seed": self.seed, "number": number},
        }

    def rows(self) -> Iterator[dict[str, Any]]:
        """All of them. InputError: there is no end."""
        if self.size is None:
            raise InputError(f"{self.path} has no size: its questions never end, which only training can have")
        return (self.row(number) for number in range(self.size))


def read_task(path: Path) -> Task:
    """InputError: something in the file is not what it may be, or the package is not there in this version."""
    try:
        said = tomllib.loads(read_bytes(path).decode())
    except ValueError as error:
        raise InputError(f"{path} is no TOML: {error}") from None
    for key in said:
        if key not in _KEYS:
            raise InputError(f"{path}: {key!r} is not one of {', '.join(_KEYS)}")
    kinds = {"reasoning_gym": str, "seed": int, "size": int, "system": str, "settings": dict}
    for key, kind in kinds.items():
        if key in said and type(said[key]) is not kind:
            allowed = "a table" if kind is dict else kind.__name__
            raise InputError(f"{path}: {key} = {said[key]!r:.80}; allowed: {allowed}")
    if "reasoning_gym" not in said:
        raise InputError(f'{path} names no task: reasoning_gym = "chain_sum", for example')
    seed, size, settings = said.get("seed", 0), said.get("size"), said.get("settings", {})
    if not 0 <= seed <= LARGEST_SEED:
        raise InputError(f"{path}: seed = {seed}; allowed: 0 to {LARGEST_SEED}")
    if size is not None and not 1 <= size <= BLOCK:
        raise InputError(f"{path}: size = {size}; allowed: 1 to {BLOCK}, or left out (no end)")
    for key in ("seed", "size"):
        if key in settings:
            raise InputError(f"{path}: settings.{key}; allowed: {key}, outside of [settings]")
    task = Task(Path(path), said["reasoning_gym"], settings, seed, size, said.get("system", ""))
    _check(task)
    return task


def _check(task: Task) -> None:
    names = _tasks()
    if task.name not in names:
        near = difflib.get_close_matches(task.name, names, 3) or names[:3]
        raise InputError(
            f"{task.path}: reasoning_gym = {task.name!r} is none of the {len(names)} tasks of reasoning-gym {VERSION}, "
            f"such as {', '.join(near)}"
        )
    try:
        task.row(0), task.row(BLOCK - 1)
    except OSError:  # not what the settings are about
        raise
    except Exception as error:  # the package checks settings by assert, and by what its dataclasses raise
        raise InputError(
            f"{task.path}: reasoning-gym's {task.name} refuses [settings] {task.settings}: "
            f"{type(error).__name__}: {error}"
        ) from None


def _tasks() -> list[str]:
    return sorted(package().factory.DATASETS)


@cache
def package() -> Any:
    """reasoning_gym. InputError: it is not there in this version."""
    require("reasoning-gym", VERSION)
    try:
        import reasoning_gym
        import reasoning_gym.factory
    except ImportError as error:
        raise TransientInputError(f"reasoning-gym cannot be imported: {error}") from None
    return reasoning_gym


@lru_cache(maxsize=64)
def dataset(name: str, settings: str, seed: int) -> Any:
    """The package's data set. settings: JSON."""
    return package().create_dataset(name, **json.loads(settings), seed=seed * BLOCK, size=BLOCK)


@lru_cache(maxsize=4096)
def entry_of(name: str, settings: str, seed: int, number: int) -> dict[str, Any]:
    """Question `number` as the package has it: what its verifier is handed."""
    entry: dict[str, Any] = dataset(name, settings, seed)[number]
    return entry
