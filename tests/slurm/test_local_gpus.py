"""Tasks that submitit's local executor starts see the GPUs that the launcher sees."""

import os
import subprocess
import sys

import pytest

from fp8slurm.process import environment


@pytest.mark.parametrize("given", [None, "3,5", ""])
def test_local_tasks_see_the_gpus_of_the_launcher(tmp_path, given):
    code = """
import os, sys, submitit
from fp8slurm.process.environment import GPUS, see_gpus
def seen():
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    see_gpus()
    return hidden, os.environ.get("CUDA_VISIBLE_DEVICES"), GPUS in os.environ
executor = submitit.LocalExecutor(folder=sys.argv[1])
os.environ[GPUS] = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
print(executor.submit(seen).result())
"""
    variables = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    if given is not None:
        variables["CUDA_VISIBLE_DEVICES"] = given
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=variables, capture_output=True, text=True)
    assert done.stdout.strip() == str(("", given, False)), done.stderr


def test_the_launcher_hands_its_gpus_on(monkeypatch):
    monkeypatch.setenv(environment.GPUS, "0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    environment.see_gpus()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"
