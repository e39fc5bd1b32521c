"""A job script: a pure function of the configuration."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from fp8slurm.config import RunConfig
from fp8slurm.config.placement import place
from fp8slurm.run.directory import SLURM_FOLDER
from fp8slurm.scheduler import job as slurm

SAFE_PATH = "export PYTHONSAFEPATH=1"
"""Of a job script, after slurm.setup: `python -m` would first look for modules in the folder that the job was submitted
from, and a folder triton/ or a file queue.py there would end every task."""


def parameters(config: RunConfig, run_dir: Path, python: str = sys.executable) -> dict[str, Any]:
    """submitit's parameters of the job; `python` is the interpreter of the job script's last line."""
    s, placement = config.slurm, place(config)
    # Said either way: what Slurm does without a word after a dead node or a preemption is the site's JobRequeue.
    more: dict[str, Any] = {
        "requeue" if s.requeue else "no-requeue": True,
        "reservation": s.reservation,
        "mem": s.memory,
        **s.sbatch,
    }
    # In blocks, as the placement deals tasks to nodes, also where SBATCH_DISTRIBUTION or the site says otherwise.
    srun = {
        "kill-on-bad-exit": 1,
        "distribution": "block",
        "cpus-per-task": s.cpus_per_task,
        "container-image": s.container_image,
        "container-mounts": ",".join(s.container_mounts) or None,
    }
    chosen = {
        "job_name": config.run.name,
        "time": slurm.minutes(s.time),
        "nodes": placement.nodes,
        "ntasks_per_node": placement.tasks_per_node,
        "cpus_per_task": s.cpus_per_task,
        "gpus_per_node": gpus_per_node(config),
        "partition": s.partition,
        "account": s.account,
        "qos": s.qos,
        "constraint": s.constraint,
        "exclude": s.exclude,
        "signal_delay_s": s.signal_delay_s,
        # Without the trap bash would die of the SIGTERM before the tasks, and its last line would never run. The
        # variable, which sbatch sets where it was told what to export, would keep slurm.setup's exports from the tasks.
        "setup": ["trap : TERM USR2", "unset SLURM_EXPORT_ENV", *s.setup, SAFE_PATH],
        "srun_args": [f"--{k}={v}" for k, v in srun.items() if v is not None] + s.srun,
        "teardown": [f"exec {shlex.quote(python)} -m fp8slurm.slurm.epilogue $? {shlex.quote(str(run_dir))}"],
        "additional_parameters": {k: v for k, v in more.items() if v is not None and v is not False},
    }
    return {k: v for k, v in chosen.items() if v is not None} | {"wckey": None}


def gpus_per_node(config: RunConfig) -> str | None:
    """sbatch's --gpus-per-node: N or TYPE:N; None where no GPU is asked for."""
    s = config.slurm
    return None if not s.gpus_per_node else f"{s.gpu_type}:{s.gpus_per_node}" if s.gpu_type else str(s.gpus_per_node)


def task_python(config: RunConfig) -> str:
    """The interpreter of the tasks: this one, or the container's python3."""
    return "python3" if config.slurm.container_image else shlex.quote(sys.executable)


def script(config: RunConfig, run_dir: Path) -> str:
    """The sbatch script, as submitit makes it."""
    from submitit.slurm.slurm import _make_sbatch_string

    folder = run_dir / SLURM_FOLDER
    command = f"{task_python(config)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    return _make_sbatch_string(command=command, folder=folder, **parameters(config, run_dir))
