"""On the PYTHONPATH of a run: the errors of other libraries, raised once where a test asks for it.

A file of a place's name in the folder FOREIGN_ERRORS makes the next process that comes there meet that place's error; who
meets it takes the file away, so that the next attempt passes. The product knows nothing of this: its functions are wrapped
as their modules are imported.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any


def torn_json() -> None:
    json.loads("")


def torn_text() -> None:
    b"\xff".decode()


def short_list() -> None:
    list(zip([1], [], strict=True))


PLACES = {
    "start": ("fp8slurm.trainer.start", "start", torn_json),
    "decoding": ("fp8slurm.rollout.sampler", "Sampler._without_end", torn_text),
    "save": ("fp8slurm.run.directory", "RunDirectory.commit_checkpoint", short_list),
}
"""By name: the module, the function in it that fails, and how."""


def fails_once(function: Any, file: Path, error: Any) -> Any:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if file.exists():
            try:
                file.unlink()
            except FileNotFoundError:  # another process was faster
                pass
            else:
                error()
        return function(*args, **kwargs)

    return wrapped


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        places = {name: place for name, place in PLACES.items() if place[0] == fullname}
        if not places:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_wrap(module: Any) -> None:
            execute(module)
            for name, (_, where, error) in places.items():
                *parents, function = where.split(".")
                owner = module
                for parent in parents:
                    owner = getattr(owner, parent)
                file = Path(os.environ["FOREIGN_ERRORS"]) / name
                setattr(owner, function, fails_once(getattr(owner, function), file, error))

        spec.loader.exec_module = execute_and_wrap  # type: ignore[method-assign]
        return spec


if "FOREIGN_ERRORS" in os.environ:
    sys.meta_path.insert(0, Finder())
