"""Functions of the user's, named as module:function in a setting."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fp8slurm.core.errors import InputError


def is_user_function(name: str) -> bool:
    """Whether a setting's value is written as module:function."""
    module, _, function = name.partition(":")
    return bool(module and function)


def load_user_function(name: str, flag: str, *arguments: str) -> Callable[..., Any]:
    """The function of `module:function`, which is called with these positional arguments.

    The module is looked for in the working folder first, and there only while it is imported: a folder of the user's
    must not stand in for a package that something else imports later.

    Raises:
        InputError: it cannot be imported, is not callable, or takes other arguments.
        OSError: a file could not be read.
    """
    module, _, function_name = name.partition(":")
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module), function_name)
    except OSError:  # a file system that stumbles is not the user's
        raise
    except Exception as error:  # whatever the user's module raises
        where = f"looked for in {here} first, then among the installed packages"
        raise InputError(f"{flag} {name} cannot be loaded ({where}): {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(here)
    if not callable(function):
        raise InputError(f"{flag} {name}: a {type(function).__name__}, which cannot be called")
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError as error:
        wanted = ", ".join(arguments)
        raise InputError(f"{flag} {name} is called as {function_name}({wanted}): {error}") from None
    return function


@contextmanager
def tried(what: str, on: str) -> Iterator[None]:
    """A call of a user's function on something made up, before a run depends on it. InputError: it raises."""
    try:
        yield
    except (InputError, OSError):
        raise
    except Exception as error:  # whatever the user's function raises
        raise InputError(f"{what} fails on {on}: {type(error).__name__}: {error}") from error
