"""The packages whose tasks are read, each installed once into the clone's .cache, beside the environment."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pip_folder import pip_folder


@pytest.fixture(scope="session")
def reasoning_gym_folder() -> Path:
    """To be put on the path. Skipped where no index answers."""
    try:
        return pip_folder("reasoning-gym", "reasoning-gym.txt")
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture
def reasoning_gym(reasoning_gym_folder, monkeypatch) -> None:
    """The real package, here and in processes that are started."""
    monkeypatch.syspath_prepend(str(reasoning_gym_folder))
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join(filter(None, (str(reasoning_gym_folder), os.environ.get("PYTHONPATH"))))
    )
