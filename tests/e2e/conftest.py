"""Whole runs on this machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import TinyRuns


@pytest.fixture(scope="session")
def tiny_runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TinyRuns]:
    """tiny_runs(held_out, *switches, moe=False, family="qwen3", recipe="tiny-fp8", **settings): a new folder to run in."""

    def make(held_out: int, *switches: str, **more: Any) -> TinyRuns:
        folder: Path = tmp_path_factory.mktemp("runs")
        return TinyRuns(folder, held_out, *switches, **more)

    return make
