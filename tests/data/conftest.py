"""The packages whose tasks are read, each installed once into the clone's .cache, beside the environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def reasoning_gym_folder() -> Path:
    """To be put on the path. Skipped where no index answers."""
    requirements = ROOT / "requirements" / "reasoning-gym.txt"
    version = next(x for x in requirements.read_text().split() if x.startswith("reasoning-gym==")).split("==")[1]
    folder = ROOT / ".cache" / f"reasoning-gym-{version}"
    if not folder.is_dir():
        partial = folder.with_suffix(f".{os.getpid()}")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(partial)]
        environment = {**os.environ, "PIP_CACHE_DIR": str(ROOT / ".cache" / "pip")}
        done = subprocess.run(
            [*command, "-r", str(requirements)], env=environment, capture_output=True, text=True, timeout=600
        )
        if done.returncode:
            shutil.rmtree(partial, ignore_errors=True)
            pytest.skip(f"pip could not install reasoning-gym {version}: {done.stderr.strip()[-300:]}")
        try:
            partial.rename(folder)
        except OSError:  # somebody else was faster
            shutil.rmtree(partial)
    return folder


@pytest.fixture
def reasoning_gym(reasoning_gym_folder, monkeypatch) -> None:
    """The real package, here and in processes that are started."""
    monkeypatch.syspath_prepend(str(reasoning_gym_folder))
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join(filter(None, (str(reasoning_gym_folder), os.environ.get("PYTHONPATH"))))
    )
