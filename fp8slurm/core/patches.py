"""What we replace in other libraries, in this process. docs/patches.md lists all of it, and a test compares.

A patch of something that is not there would do nothing without a word (a new version has another name for it), and one
that is made twice would call itself: both are refused.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_applied: dict[str, None] = {}


def applied() -> list[str]:
    """The full names of all that was replaced in this process, or in the one that it was forked from."""
    return sorted(_applied)


def note(name: str) -> None:
    """List something that is put beside a library in another way: a module that stands in for a missing one."""
    _applied[name] = None


def patch(owner: Any, attribute: str, new: Any) -> None:
    """Replace an attribute of a module or class. RuntimeError: there is none, or it is patched already."""
    name = _name_of(owner, attribute)
    if name in _applied:
        raise RuntimeError(f"{name} is patched already")
    setattr(owner, attribute, new)
    note(name)


def wrap(owner: Any, attribute: str) -> Callable[[Callable[..., Any]], None]:
    """As a decorator: `patch` by a function that gets what was there as its first argument."""
    original: Any = getattr(owner, attribute, None)

    def put(around: Callable[..., Any]) -> None:
        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            return around(original, *args, **kwargs)

        patch(owner, attribute, call)

    return put


@contextmanager
def patched(owner: Any, attribute: str, new: Any) -> Iterator[None]:
    """Replace a method of one object, or a name of a module, for a while. RuntimeError: there is none."""
    module = isinstance(owner, types.ModuleType)
    note(_name_of(owner if module else type(owner), attribute))
    before = getattr(owner, attribute)
    setattr(owner, attribute, new)
    try:
        yield
    finally:
        if module:
            setattr(owner, attribute, before)
        else:
            delattr(owner, attribute)


def _name_of(owner: Any, attribute: str) -> str:
    where = f"{owner.__module__}.{owner.__qualname__}" if isinstance(owner, type) else owner.__name__
    if not hasattr(owner, attribute):
        raise RuntimeError(f"this version has no {where}.{attribute}, which fp8slurm replaces (docs/patches.md)")
    return f"{where}.{attribute}"
