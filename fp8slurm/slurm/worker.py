"""What srun starts: find or begin this job's attempt, then be one of its tasks.

The same for a job that `fp8slurm submit` made (submitit unpickles `work` with two strings) and for a hand-written
script (`srun ... fp8slurm worker --recipe R`).
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from pydantic import ValidationError

from fp8slurm.config import RunConfig
from fp8slurm.config.placement import Placement, Task, place
from fp8slurm.core.errors import InputError
from fp8slurm.core.files import patiently
from fp8slurm.core.node_faults import node_fault
from fp8slurm.run.directory import RunDirectory
from fp8slurm.run.task_errors import describe, is_permanent, record_error
from fp8slurm.scheduler.job import Job
from fp8slurm.slurm import attempt
from fp8slurm.slurm.task import be_task

RECORD_TIMEOUT_S = 60.0
"""A task that refuses its job waits so long for task 0 to begin the attempt in which it says why."""


def work(config_json: str, run_dir: str) -> None:
    """Be task SLURM_PROCID of the run. Does not return, except where the run is finished.

    Raises:
        SystemExit: not started by srun, or not with the tasks of this configuration; the run directory is held; too
            many attempts without progress. The reason is printed in a line, and recorded as permanent.
        Exception: anything else, which is recorded as what another attempt may not meet.
    """
    try:
        _work(config_json, run_dir)
    except InputError as error:
        print(f"fp8slurm: {error}", file=sys.stderr, flush=True)
        _record(Path(run_dir), error)
        raise SystemExit(2) from None
    except Exception as error:
        _record(Path(run_dir), error)
        raise


def _record(path: Path, error: Exception) -> None:
    """Leave the reason in the attempt of this start of the job, or where a start without one says it: without it the
    job script would take the task's end for one that another attempt may cure."""
    job, index = Job.here(), os.environ.get("SLURM_PROCID", "")
    if job is None or not index.isdigit():
        return
    try:
        # Task 0 itself has not begun one, or has it already.
        run = attempt.find(path, job) if index == "0" else attempt.join(path, job, RECORD_TIMEOUT_S)
        folder = run.attempt_dir if run is not None else attempt.unbegun(path, job)
        text = describe(error)
        fault = node_fault(error, text)
        record_error(folder / "errors", int(index), text, permanent=is_permanent(error), fault=fault)
    except (OSError, ValueError) as reason:  # TimeoutError among them: task 0 refuses the job too
        print(f"fp8slurm: the error is only here ({reason})", file=sys.stderr)


def _work(config_json: str, run_dir: str) -> None:
    # First of all: no process that is started from here on is ended by Slurm's notice.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    try:
        config = RunConfig.model_validate_json(config_json)
    except ValidationError as error:
        raise InputError(f"the job's settings are not those of this version of fp8slurm: {error}") from None
    placement = place(config)
    job, task = Job.here(), this_task(placement)
    assert job is not None
    path = Path(run_dir)
    if patiently(lambda: attempt.finished(config, RunDirectory(path))):
        if task.index == 0:
            print(f"{path} is finished: {config.run.steps} steps (--run.steps more of them to go on)")
        return
    run = attempt.begin(config, path, job) if task.index == 0 else attempt.join(path, job)
    redirect_output(run, task)
    be_task(config, run, placement, task, job)


def this_task(placement: Placement) -> Task:
    """The placement's task that Slurm's environment says this process is. Raises InputError."""
    try:
        index, tasks, node = (int(os.environ[f"SLURM_{n}"]) for n in ("PROCID", "NTASKS", "NODEID"))
    except KeyError as missing:
        raise InputError(
            f"{missing} is not set: this is no task of a Slurm job. Start it with srun from a job script (sbatch/), or "
            f"use fp8slurm submit"
        ) from None
    needed = f"{placement.nodes} nodes x {placement.tasks_per_node} tasks (--slurm.nodes, --slurm.ranks-per-node + 1)"
    if tasks != len(placement.tasks):
        raise InputError(f"srun started {tasks} tasks; the configuration needs {needed}")
    task = placement.tasks[index]
    if task.node != node:
        raise InputError(f"task {index} is on node {node} instead of {task.node}; needed are {needed}, dealt in blocks")
    return task


def redirect_output(run: RunDirectory, task: Task) -> None:
    """Standard output and error into the attempt's folder: Slurm's own files go on from one attempt to the next."""
    where = run.attempt_dir / "logs"
    print(f"task {task.index} ({task.role} {task.number}): attempt {run.attempt}, logs in {where}", file=sys.stderr)
    for stream, end in ((sys.stdout, "out"), (sys.stderr, "err")):
        stream.flush()
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        fd = patiently(lambda: os.open(where / f"{task.index}_log.{end}", flags, 0o600))
        os.dup2(fd, stream.fileno())
        os.close(fd)


def main(argv: list[str]) -> int:
    """`fp8slurm worker --recipe R [--section.key VALUE ...]`: one task of a hand-written job script."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    from fp8slurm.config import parse_command, recipe_parser
    from fp8slurm.config.derived import under_slurm

    if "--dry-run" in argv:
        raise InputError("--dry-run: a worker is a task of a running job; allowed: fp8slurm submit --dry-run")
    parser = recipe_parser(
        "fp8slurm worker",
        "One task of the run, in a job script of your own: srun starts one a training GPU and one more a node "
        "(sbatch/ has such scripts; fp8slurm submit makes them).",
    )
    config = under_slurm(parse_command(parser, argv)[1])
    work(config.model_dump_json(), str((config.run.root / config.run.name).resolve()))
    return 0
