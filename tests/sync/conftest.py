"""Makes the helpers of tests/sync and tests/engine importable, and installs an SGLang that knows no update sessions."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from pip_folder import pip_folder

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "engine")]


@pytest.fixture(scope="session")
def sglang_without_sessions() -> Path:
    """A folder to put first on an engine's PYTHONPATH; made once in the clone's .cache, skipped where no index answers."""
    try:
        return pip_folder("sglang", "sglang-no-session.txt")
    except RuntimeError as error:
        pytest.fail(str(error)) if os.environ.get("CI") else pytest.skip(str(error))
