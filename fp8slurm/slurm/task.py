"""What every process of a job runs. Nothing heavy is imported before the environment is set."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from fp8slurm.config import RunConfig
from fp8slurm.config.placement import Placement, Task, place
from fp8slurm.core.deadlines import RENDEZVOUS_TIMEOUT_S
from fp8slurm.core.node_faults import node_fault, try_local_disk
from fp8slurm.core.stopping import NeverStop
from fp8slurm.process.environment import see_gpus, set_environment, set_logging
from fp8slurm.process.monitor import Monitor
from fp8slurm.process.rank import rank_main
from fp8slurm.process.rollout_worker import rollout_worker_main
from fp8slurm.run.directory import RunDirectory
from fp8slurm.run.events import keep_events
from fp8slurm.run.phases import LOADING, enter_phase, keep_phases
from fp8slurm.run.task_errors import STOPPED, describe, is_permanent, record_error
from fp8slurm.scheduler.job import Job
from fp8slurm.slurm.lifecycle import JobLifecycle

if TYPE_CHECKING:
    from fp8slurm.core.stopping import StopPolicy


def run_task(config_json: str, run_dir: str, attempt: int) -> None:
    """Entry point of submitit's local executor: be the rank or the rollout worker that this task's number says."""
    import submitit

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    see_gpus()
    config = RunConfig.model_validate_json(config_json)
    placement = place(config)
    task = placement.tasks[submitit.JobEnvironment().global_rank]
    be_task(config, RunDirectory(Path(run_dir), attempt), placement, task, None)


def be_task(config: RunConfig, run: RunDirectory, placement: Placement, task: Task, job: Job | None) -> NoReturn:
    """Be this task of a run until it ends, and the process with it. SIGUSR2 must be blocked already."""
    started_with = dict(os.environ)
    set_environment(config, placement, task)
    set_logging(config, task)
    if task.role == "worker" or task.number == 0:  # the other ranks would say what rank 0 says
        keep_events(run.attempt_dir, task.index)
        keep_phases(run.attempt_dir, task.index)
    if task.role == "rank":
        enter_phase(LOADING)
    monitor = Monitor(run.attempt_dir, task.index, config.watchdog.timeout_s)
    stop_policy: StopPolicy = NeverStop()
    if job is not None:
        # srun answers a failed task by ending the step of its number: on a node that was cut off and is back, that is
        # by then the step of the attempt that goes on elsewhere.
        monitor.replaced = run.replaced
        if task.role == "rank":
            stop_policy = lifecycle = JobLifecycle(config, run, job, task.number == 0, started_with)
            monitor.on_notice, monitor.on_tick = lifecycle.notice, lifecycle.tick
    # What is imported now may lie on a slow file system; a task that takes longer fails at the rendezvous.
    monitor.expect(RENDEZVOUS_TIMEOUT_S)
    code = 1
    try:
        monitor.start()
        try_local_disk()
        if task.role == "rank":
            rank_main(config, run, placement, task, monitor, stop_policy)
        else:
            rollout_worker_main(config, run, placement, task, monitor)
        monitor.done()
        code = 0
    except BaseException as error:  # noqa: BLE001 - whatever it was, the launcher shows it and the neighbours end
        try:
            code = _last_words(run, task, error, monitor)
        except OSError as reason:
            print(f"task {task.index}: the error is only here ({reason})", file=sys.stderr)
            traceback.print_exception(error)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # A failed task must be gone at once, and interpreter shutdown with live process groups can hang.
        os._exit(code)


def _last_words(run: RunDirectory, task: Task, error: BaseException, monitor: Monitor) -> int:
    """Record what ended the task; its exit status."""
    if (run.attempt_dir / STOPPED).exists() and (task.role, task.number) != ("rank", 0):
        return 0  # the run has stopped as planned, and rank 0 and the store are gone
    text = describe(error)
    fault = node_fault(error, text)
    record_error(run.attempt_dir / "errors", task.index, text, permanent=is_permanent(error), fault=fault)
    traceback.print_exception(error)
    return 0 if monitor.replaced() else 1
