"""Makes the helpers of tests/sync and tests/engine importable, and installs an SGLang that knows no update sessions."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(HERE.parent / "engine")]


@pytest.fixture(scope="session")
def sglang_without_sessions() -> Path:
    """A folder to put first on an engine's PYTHONPATH; made once in the clone's .cache, skipped where no index answers."""
    requirements = ROOT / "requirements" / "sglang-no-session.txt"
    version = requirements.read_text().split()[-1].removeprefix("sglang==")
    folder = ROOT / ".cache" / f"sglang-{version}"
    if not folder.is_dir():
        partial = folder.with_suffix(f".{os.getpid()}")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(partial)]
        environment = {**os.environ, "PIP_CACHE_DIR": str(ROOT / ".cache" / "pip")}
        done = subprocess.run(
            [*command, "-r", str(requirements)], env=environment, capture_output=True, text=True, timeout=600
        )
        if done.returncode:
            shutil.rmtree(partial, ignore_errors=True)
            reason = f"pip could not install sglang {version}: {done.stderr.strip()[-300:]}"
            pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
        try:
            partial.rename(folder)
        except OSError:  # somebody else was faster
            shutil.rmtree(partial)
    return folder
