"""Torch's memory of a training rank on a GPU that it shares with an engine.

What stays lies in the midst of what a step gives back, and cudaMalloc's pieces go back whole or not at all: a rank of
the 4B on four H100s kept 42 GB where by plan 18 are in use, and engines that woke found no room (docs/gpu.md).
Expandable segments go back page by page. But another process cannot map them (the handles are those of cudaMalloc), so
what engines map is allocated without: `mappable`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Torch's settings of its allocator: its name since torch 2.9, and before."""
SWITCH = re.compile(r"expandable_segments\s*:\s*(\w+)")


def settings(given: str, expandable: bool) -> str:
    """The user's settings, with or without expandable segments: torch forgets every setting that is not named again."""
    switch = f"expandable_segments:{expandable}"
    return SWITCH.sub(switch, given) if SWITCH.search(given) else ",".join(filter(None, (given, switch)))


def given() -> str:
    """What the user has set."""
    return next((os.environ[name] for name in VARIABLES if os.environ.get(name)), "")


def expandable() -> bool:
    """Whether ranks use them: yes, unless the user has said no."""
    switch = SWITCH.search(given())
    return switch is None or switch[1].lower() in ("true", "1")


def use_expandable_segments() -> None:
    """From here on in this process, unless the user has said no."""
    if expandable():
        _set(True)


@contextmanager
def mappable() -> Iterator[None]:
    """What is allocated on a GPU in here can be mapped by other processes."""
    if not (torch.cuda.is_available() and expandable()):
        yield
        return
    _set(False)
    try:
        yield
    finally:
        _set(True)


def _set(on: bool) -> None:
    torch._C._accelerator_setAllocatorSettings(settings(given(), on))
