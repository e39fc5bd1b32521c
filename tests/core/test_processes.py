"""Where new processes find this package."""

from __future__ import annotations

import os
import subprocess
import sys

from fp8slurm.check.doctor import job
from fp8slurm.core.processes import python_path


def where(path: str) -> str:
    """The package that a process with this PYTHONPATH imports, started in a folder that has none."""
    code = "import fp8slurm; print(fp8slurm.__file__)"
    command = [sys.executable, "-S", "-c", code]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, cwd="/", check=True
    )
    return done.stdout.strip()


def test_processes_import_the_package_of_this_one(monkeypatch):
    import fp8slurm

    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    assert where(python_path()) == where(job._environment()["PYTHONPATH"]) == fp8slurm.__file__
    assert python_path().split(os.pathsep)[-1] == "/nowhere"
    monkeypatch.delenv("PYTHONPATH")
    assert os.pathsep not in python_path()
