"""What a task does before it is a rank or an agent."""

import subprocess
import sys

IMPORTS = """
import os, sys, fp8slurm.slurm.task as task
from fp8slurm.config import RunConfig
from fp8slurm.slurm.placement import place
"""
SET = """
c = RunConfig(slurm={slurm!r})
p = place(c)
try:
    task.set_environment(c, p, p.tasks[0])
except ValueError as error:
    sys.exit(print(error))
import torch
print(os.environ["OMP_NUM_THREADS"], torch.get_num_threads())
"""


def start(code: str, **environment: str) -> str:
    """Standard output of a fresh process that has imported what a task imports first."""
    code = IMPORTS + code
    inherited = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=inherited | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_torch_is_not_imported_before_the_environment_is_set():
    """It counts OMP_NUM_THREADS when it is imported; later the variable does nothing."""
    assert start("print('torch' in sys.modules)") == "False"


def test_threads_of_a_rank():
    """More threads than cores are not looked for in torch: MKL caps them."""
    assert start(SET.format(slurm={"ranks_per_node": 4096})) == "1 1"
    assert start(SET.format(slurm={"cpu_threads": 3})).split()[0] == "3"
    assert start(SET.format(slurm={}), OMP_NUM_THREADS="3").split()[0] == "3"
    assert start(SET.format(slurm={"cpu_threads": 1}), OMP_NUM_THREADS="3") == "1 1", "the setting wins"


def test_a_contradicting_environment_is_refused():
    assert "NVTE_FP8_BLOCK_SCALING_FP32_SCALES=0" in start(SET.format(slurm={}), NVTE_FP8_BLOCK_SCALING_FP32_SCALES="0")
