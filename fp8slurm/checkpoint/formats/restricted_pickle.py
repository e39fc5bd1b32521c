"""Pickles of which nothing is run: the few records that a checkpoint's files are made of, in bounded time and memory.

A pickle is a program. Refused here are the names that it may not call (`find_class` of the subclasses), the operations
that no checkpoint needs, and what would cost without end where it is hashed or shown: a tuple that holds another one
twice, which holds another one twice, takes ten bytes a level and twice the time.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import is_dataclass
from enum import Enum
from typing import Any

import torch

from fp8slurm.core.errors import BadCheckpoint

MOST_IN_TUPLE = 10_000
"""Values in a tuple, those of the tuples in it counted."""

_OPERATIONS = (
    "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT "
    "BINUNICODE SHORT_BINUNICODE BINBYTES SHORT_BINBYTES BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET "
    "EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS "
    "GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD BINPERSID"
)
"""What torch, Megatron and this package write, in protocols 2 to 5."""


class _Operations(dict[int, Callable[[Any], None]]):
    def __missing__(self, code: int) -> Callable[[Any], None]:
        raise BadCheckpoint(f"pickle operation {bytes([code])!r} has no place there")


def _code(operation: str) -> int:
    code: bytes = getattr(pickle, operation)
    return code[0]


class RestrictedUnpickler(pickle._Unpickler):
    """Raises BadCheckpoint for what has no place in a checkpoint; a damaged pickle may raise anything."""

    stack: list[Any]
    dispatch = _Operations({_code(name): pickle._Unpickler.dispatch[_code(name)] for name in _OPERATIONS.split()})

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self._sizes: dict[int, int] = {}
        self._tuples: list[Any] = []
        """Those that _sizes knows by their id, which another object could get otherwise."""

    def fills(self, value: Any) -> bool:
        """Whether the pickle may set this object's attributes."""
        return is_dataclass(value) and not isinstance(value, type)

    def is_key(self, value: Any) -> bool:
        """Whether something else than text or a whole number may be a dictionary's key: hashing it must be quick."""
        return False

    def before_call(self) -> None:
        function, arguments = self.stack[-2:]
        if type(arguments) is not tuple or not callable(function):
            raise BadCheckpoint("a call of something else than a function has no place there")
        if function in (dict, OrderedDict) and arguments:
            raise BadCheckpoint("a dictionary made of another object has no place there")
        if isinstance(function, type) and issubclass(function, Enum) and type(arguments[0]) not in (int, str):
            raise BadCheckpoint(f"{function.__name__} of a {type(arguments[0]).__name__} has no place there")

    def before_build(self) -> None:
        target, state = self.stack[-2:]
        if not self.fills(target) or not (type(state) is dict or hasattr(target, "__setstate__")):
            raise BadCheckpoint(f"a {type(target).__name__} of a {type(state).__name__} has no place there")

    def before_items(self, pairs: list[Any]) -> None:
        for key in pairs[::2]:
            if type(key) not in (str, int) and not self.is_key(key):
                raise BadCheckpoint(f"a {type(key).__name__} as a key has no place there")

    def after_tuple(self) -> None:
        made, size = self.stack[-1], 1
        for value in made:
            if is_dataclass(value):  # its hash is that of its attributes
                raise BadCheckpoint(f"a {type(value).__name__} in a tuple has no place there")
            size += len(value) + 1 if isinstance(value, torch.Size) else self._sizes.get(id(value), 1)
        if size > MOST_IN_TUPLE:
            raise BadCheckpoint(f"a tuple of more than {MOST_IN_TUPLE} values has no place there")
        self._sizes[id(made)] = size
        self._tuples.append(made)


def _checked(operation: str, before: Callable | None = None, after: Callable | None = None) -> None:
    plain = RestrictedUnpickler.dispatch[_code(operation)]

    def load(self: RestrictedUnpickler) -> None:
        if before is not None:
            before(self)
        plain(self)
        if after is not None:
            after(self)

    RestrictedUnpickler.dispatch[_code(operation)] = load


for _name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
    _checked(_name, after=RestrictedUnpickler.after_tuple)
for _name in ("REDUCE", "NEWOBJ"):
    _checked(_name, before=RestrictedUnpickler.before_call)
_checked("BUILD", before=RestrictedUnpickler.before_build)
_checked("SETITEM", before=lambda self: self.before_items(self.stack[-2:]))
_checked("SETITEMS", before=lambda self: self.before_items(self.stack))
