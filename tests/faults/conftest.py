"""Faults of the file system and of processes, in runs on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest
from injection import compile_injector


@pytest.fixture(scope="session")
def injector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that a process loads to meet faults."""
    return compile_injector(tmp_path_factory.mktemp("injector"))
