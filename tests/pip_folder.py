"""A package that the environment has not, or has in another version, for tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def pip_folder(package: str, requirements: str) -> Path:
    """A folder to put on the path, with what requirements/NAME lists; made once in the clone's .cache, beside the environment.

    RuntimeError: pip cannot install it.
    """
    listed = ROOT / "requirements" / requirements
    version = next(x for x in listed.read_text().split() if x.startswith(f"{package}==")).split("==")[1]
    folder = ROOT / ".cache" / f"{package}-{version}"
    if not folder.is_dir():
        partial = folder.with_suffix(f".{os.getpid()}")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(partial)]
        environment = {**os.environ, "PIP_CACHE_DIR": str(ROOT / ".cache" / "pip")}
        done = subprocess.run(
            [*command, "-r", str(listed)], env=environment, capture_output=True, text=True, timeout=600
        )
        if done.returncode:
            shutil.rmtree(partial, ignore_errors=True)
            raise RuntimeError(f"pip could not install {package} {version}: {done.stderr.strip()[-300:]}")
        try:
            partial.rename(folder)
        except OSError:  # somebody else was faster
            shutil.rmtree(partial)
    return folder
