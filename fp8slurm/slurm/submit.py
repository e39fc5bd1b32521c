"""From a configuration to a queued Slurm job."""

from __future__ import annotations

import contextlib
import io
import os
import sys

from fp8slurm.config import RunConfig
from fp8slurm.core.errors import InputError
from fp8slurm.core.processes import python_path
from fp8slurm.run.directory import SLURM_FOLDER, RunBusyError, RunDirectory
from fp8slurm.scheduler import job as slurm
from fp8slurm.scheduler.job import one_line
from fp8slurm.slurm import attempt
from fp8slurm.slurm.script import parameters, script, task_python


class RefusedError(InputError):
    """sbatch did not take a job; the message has its reason."""


def submit(config: RunConfig) -> str | None:
    """Queue the run; returns the job's id, or None where the run is finished already.

    Raises:
        RefusedError: sbatch refuses the job.
        InputError: Slurm is not there; another job or process holds the run directory.
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
    executor = submitit.SlurmExecutor(folder=run.path / SLURM_FOLDER, python=task_python(config))
    executor.update_parameters(**parameters(config, run.path))
    from fp8slurm.slurm.worker import work

    before = dict(os.environ)
    path = python_path()
    try:  # sbatch hands its environment on to the job
        os.environ.clear()
        os.environ.update(slurm.environment_for_a_job(before, script(config, run.path)))
        os.environ["PYTHONPATH"] = path
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
    submitted = sorted((run.path / SLURM_FOLDER).glob("*_submitted.pkl"), key=lambda p: p.stat().st_mtime)
    jobs = [pickle.name.partition("_")[0] for pickle in reversed(submitted)]
    for job_id in dict.fromkeys([*jobs, *([held["job"]] if "job" in held else [])]):
        if living is not None:
            break
        try:
            state = slurm.unfinished(job_id)
        except slurm.SlurmError as error:
            raise InputError(f"cannot ask Slurm whether job {job_id} of {run.path} is over: {error}") from None
        if state == slurm.ENDING:
            raise RunBusyError(
                f"{run.path} is held by job {job_id}, which is {state}: Slurm ends it, and it may wait again then; "
                f"try again when squeue does not show it any more, or choose another name with --run.name"
            )
        living = f"job {job_id}" if state else None
    if living:
        raise RunBusyError(
            f"{run.path} is held by {living}: fp8slurm status {run.path} --follow shows it; wait, cancel it (scancel), "
            f"or choose another --run.name"
        )
