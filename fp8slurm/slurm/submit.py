"""From a configuration to a queued Slurm job."""

from __future__ import annotations

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


def configuration(argv: list[str], prog: str) -> tuple[RunConfig, bool]:
    """(configuration, whether --dry-run was given) of a command line, for jobs under Slurm. Raises ValueError, SystemExit."""
    import argparse

    from fp8slurm.config import parse, recipe_names

    parser = argparse.ArgumentParser(prog=prog, add_help=False)
    parser.add_argument("--recipe", help=f"{', '.join(recipe_names())}, or the path of a .toml file")
    parser.add_argument("--dry-run", action="store_true", help="print what would run, start nothing")
    own, flags = parser.parse_known_args(argv)
    if "-h" in flags or "--help" in flags:
        parser.print_help()
    config = parse(own.recipe, flags, prog)
    return config.model_copy(update={"slurm": config.slurm.model_copy(update={"executor": "slurm"})}), own.dry_run


def parameters(config: RunConfig, run_dir: Path, python: str = sys.executable) -> dict[str, Any]:
    """submitit's parameters of the job; `python` is the interpreter of the job script's last line."""
    s, placement = config.slurm, place(config)
    more: dict[str, Any] = {"requeue": True, "reservation": s.reservation, "mem": s.memory, **s.sbatch}
    srun = {
        "kill-on-bad-exit": 1, "cpus-per-task": s.cpus_per_task, "container-image": s.container_image,
        "container-mounts": ",".join(s.container_mounts) or None,
    }  # fmt: skip
    chosen = {
        "job_name": config.run.name,
        "time": slurm.minutes(s.time),
        "nodes": placement.nodes,
        "ntasks_per_node": placement.tasks_per_node,
        "cpus_per_task": s.cpus_per_task,
        "gpus_per_node": s.gpus_per_node or None,
        "partition": s.partition,
        "account": s.account,
        "qos": s.qos,
        "constraint": s.constraint,
        "exclude": s.exclude,
        "signal_delay_s": s.signal_delay_s,
        # Without it bash would die of the SIGTERM before the tasks, and its last line would never run.
        "setup": ["trap : TERM USR2", *s.setup],
        "srun_args": [f"--{k}={v}" for k, v in srun.items() if v is not None] + s.srun,
        "teardown": [f"exec {shlex.quote(python)} -m fp8slurm.slurm.after $? {shlex.quote(str(run_dir))}"],
        "additional_parameters": {k: v for k, v in more.items() if v is not None and v is not False},
    }
    return {k: v for k, v in chosen.items() if v is not None} | {"wckey": None}


def task_python(config: RunConfig) -> str:
    """The interpreter of the tasks: this one, or the container's python3."""
    return "python3" if config.slurm.container_image else shlex.quote(sys.executable)


def script(config: RunConfig, run_dir: Path) -> str:
    """The sbatch script, as submitit makes it."""
    from submitit.slurm.slurm import _make_sbatch_string

    folder = run_dir / FOLDER
    command = f"{task_python(config)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    return _make_sbatch_string(command=command, folder=folder, **parameters(config, run_dir))


def submit(config: RunConfig) -> str | None:
    """Queue the run; returns the job's id, or None where the run is finished already.

    Raises:
        ValueError: Slurm is not there or refuses; another job or process holds the run directory.
    """
    import submitit

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
        os.environ.update(slurm.environment_for_a_job(before))
        os.environ["PYTHONPATH"] = os.pathsep.join(p for p in (package, path) if p)
        return executor.submit(work, config.model_dump_json(), str(run.path)).job_id
    finally:
        os.environ.clear()
        os.environ.update(before)


def refuse_second_job(run: RunDirectory) -> None:
    """Raises RunBusyError where a job of this run waits or runs, or a process of this machine holds it."""
    held = run.owner(run.newest_attempt())
    living = attempt.holder(held) if held is not None else None
    submitted = sorted((run.path / FOLDER).glob("*_submitted.pkl"), key=lambda p: p.stat().st_mtime)
    for pickle in reversed(submitted):
        job_id = pickle.name.partition("_")[0]
        try:
            if living is None and slurm.is_active(job_id):
                living = f"job {job_id}"
        except slurm.SlurmError as error:
            raise ValueError(f"cannot ask Slurm whether job {job_id} of {run.path} is over: {error}") from None
    if living:
        raise RunBusyError(
            f"{run.path} is held by {living}: wait for it, cancel it (scancel), or choose another name with --run.name"
        )
