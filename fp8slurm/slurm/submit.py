"""From a configuration to a queued Slurm job."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from fp8slurm.checkpoint.run import RunBusyError, RunDirectory
from fp8slurm.config import RunConfig
from fp8slurm.slurm import attempt
from fp8slurm.slurm import job as slurm
from fp8slurm.slurm.placement import place

FOLDER = "slurm"
"""Of a run directory: what submitit writes (job script, pickled call), and the output of the job scripts."""

SAFE_PATH = "export PYTHONSAFEPATH=1"
"""Of a job script, after slurm.setup: `python -m` would look for modules in the folder that the job was submitted from first, and
a folder triton/ or a file queue.py there would end every task."""


class RefusedError(ValueError):
    """sbatch did not take a job; the message has its reason."""


def under_slurm(config: RunConfig) -> RunConfig:
    """The configuration with slurm.executor = "slurm", whatever it was."""
    return config.model_copy(update={"slurm": config.slurm.model_copy(update={"executor": "slurm"})})


def parameters(config: RunConfig, run_dir: Path, python: str = sys.executable) -> dict[str, Any]:
    """submitit's parameters of the job; `python` is the interpreter of the job script's last line."""
    s, placement = config.slurm, place(config)
    # Said either way: what Slurm does without a word after a dead node or a preemption is the site's JobRequeue.
    more: dict[str, Any] = {
        "requeue" if s.requeue else "no-requeue": True, "reservation": s.reservation, "mem": s.memory, **s.sbatch,
    }  # fmt: skip
    # In blocks, as the placement deals tasks to nodes, also where SBATCH_DISTRIBUTION or the site says otherwise.
    srun = {
        "kill-on-bad-exit": 1, "distribution": "block", "cpus-per-task": s.cpus_per_task, "container-image": s.container_image,
        "container-mounts": ",".join(s.container_mounts) or None,
    }  # fmt: skip
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
        # Without the trap bash would die of the SIGTERM before the tasks, and its last line would never run. The variable, which
        # sbatch sets where it was told what to export, would keep what the lines of slurm.setup export from the tasks.
        "setup": ["trap : TERM USR2", "unset SLURM_EXPORT_ENV", *s.setup, SAFE_PATH],
        "srun_args": [f"--{k}={v}" for k, v in srun.items() if v is not None] + s.srun,
        "teardown": [f"exec {shlex.quote(python)} -m fp8slurm.slurm.after $? {shlex.quote(str(run_dir))}"],
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

    folder = run_dir / FOLDER
    command = f"{task_python(config)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    return _make_sbatch_string(command=command, folder=folder, **parameters(config, run_dir))


def one_line(said: str) -> str:
    """What sbatch printed, without its own name in front of every line."""
    lines = [line.removeprefix("sbatch: ").removeprefix("error: ").strip() for line in said.splitlines()]
    return "; ".join(line for line in lines if line) or "sbatch failed without a word"


def submit(config: RunConfig) -> str | None:
    """Queue the run; returns the job's id, or None where the run is finished already.

    Raises:
        RefusedError: sbatch refuses the job.
        ValueError: Slurm is not there; another job or process holds the run directory.
    """
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    run = RunDirectory((config.run.root / config.run.name).resolve())
    if attempt.finished(config, run):
        return None
    refuse_second_job(run)
    run.path.mkdir(parents=True, exist_ok=True, mode=0o700)
    os.chmod(run.path, 0o700)
    for change in attempt.settle_configuration(config, run):
        print(f"changed since the last start: {change}", file=sys.stderr)
    executor = submitit.SlurmExecutor(folder=run.path / FOLDER, python=task_python(config))
    executor.update_parameters(**parameters(config, run.path))
    from fp8slurm.slurm.worker import work

    before = dict(os.environ)
    package, path = str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")
    try:  # sbatch hands its environment on to the job
        os.environ.clear()
        os.environ.update(slurm.environment_for_a_job(before, script(config, run.path)))
        os.environ["PYTHONPATH"] = os.pathsep.join(p for p in (package, path) if p)
        with contextlib.redirect_stderr(io.StringIO()):  # submitit prints there what the error says too
            return executor.submit(work, config.model_dump_json(), str(run.path)).job_id
    except (FailedJobError, FailedSubmissionError) as error:
        raise RefusedError(f"Slurm refuses this job: {one_line(str(error))}") from None
    finally:
        os.environ.clear()
        os.environ.update(before)


def refuse_second_job(run: RunDirectory) -> None:
    """Raises RunBusyError where a job of this run waits or runs, or a process of this machine holds it."""
    held = run.owner(run.newest_attempt()) or {}
    living = attempt.holder(held) if held else None
    submitted = sorted((run.path / FOLDER).glob("*_submitted.pkl"), key=lambda p: p.stat().st_mtime)
    jobs = [pickle.name.partition("_")[0] for pickle in reversed(submitted)]
    for job_id in dict.fromkeys([*jobs, *([held["job"]] if "job" in held else [])]):
        if living is not None:
            break
        try:
            state = slurm.unfinished(job_id)
        except slurm.SlurmError as error:
            raise ValueError(f"cannot ask Slurm whether job {job_id} of {run.path} is over: {error}") from None
        if state == slurm.ENDING:
            raise RunBusyError(
                f"{run.path} is held by job {job_id}, which is {state}: Slurm ends its processes, and it may wait again after that; "
                f"try again when squeue does not show it any more, or choose another name with --run.name"
            )
        living = f"job {job_id}" if state else None
    if living:
        raise RunBusyError(
            f"{run.path} is held by {living}: wait for it, cancel it (scancel), or choose another name with --run.name"
        )
