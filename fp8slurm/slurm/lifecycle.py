"""The end of a job's start, and what follows: notice, deadline, requeue.

    SIGUSR2, or the job's own clock     -> noticed
    next step boundary       -> all ranks stop there (rank 0 decides, the store tells), save, requeue
    not enough time left in a rollout   -> the step is given up, the boundary before it saved, requeue
    no time left at all                 -> requeue without saving: the newest checkpoint counts

One writer: rank 0. Its main thread stops at step boundaries, its monitor takes notices and keeps the last deadline.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from typing import Any

from fp8slurm.config import RunConfig
from fp8slurm.core.deadlines import REQUEUE_S, SAFETY
from fp8slurm.core.errors import TransientInputError
from fp8slurm.core.files import patiently, read_json, write_atomic
from fp8slurm.run.directory import FencedError, RunDirectory
from fp8slurm.run.task_errors import STOPPED
from fp8slurm.scheduler import job as slurm
from fp8slurm.scheduler.job import Job
from fp8slurm.slurm.requeue import go_on

log = logging.getLogger(__name__)


class StoppedForGood(RuntimeError):
    """The run has stopped before its end and is not queued again."""

    permanent = True


class JobLifecycle:
    """Implements rl.stopping.Stopping for one rank of a Slurm job; `notice` and `tick` are the monitor thread's."""

    def __init__(
        self, config: RunConfig, run: RunDirectory, job: Job, first: bool, environment: dict[str, str] | None = None
    ) -> None:
        """environment: what this task was started with; left out: the present one."""
        self.config, self.run, self.job, self.first = config, run, job, first
        self.environment = dict(os.environ) if environment is None else environment
        self.end: float | None = None
        self._noticed = threading.Event()
        self._lock = threading.Lock()
        if first:
            self.end = slurm.end_time(job.id)

    # -- monitor thread ------------------------------------------------------------------------------------------

    def notice(self) -> None:
        """SIGUSR2 came: the time limit is near, or the job is preempted; then its end has moved."""
        if self._noticed.is_set():
            return
        self._noticed.set()  # before Slurm is asked, which may take long to answer
        if self.first:
            log.warning("notice (SIGUSR2): the run stops at the next step boundary")
            self.end = slurm.end_time(self.job.id) or time.time() + self.config.slurm.signal_delay_s

    def tick(self) -> None:
        """Called twice a second: the last moment to requeue, whatever the loop is doing."""
        if self.first and self.end is not None and time.time() > self.end - REQUEUE_S:
            self.end = slurm.end_time(self.job.id)  # it may have been extended
            if self.end is not None and time.time() > self.end - REQUEUE_S:
                try:
                    self._go_on("no time left to save", "", False)
                    self.end = None
                except FencedError as error:  # the monitor must go on watching
                    self.end = None
                    log.error("no time left to save, and the job is not requeued: %s", error)
                except (OSError, TransientInputError) as error:
                    log.error("no time left to save, and the job is not requeued yet: %s", error)

    # -- rank 0's main thread ------------------------------------------------------------------------------------

    def noticed(self) -> bool:
        return self._noticed.is_set()

    def at_step_boundary(self, noticed: bool, step_s: float, save_s: float) -> str:
        if noticed:
            return "notice from Slurm (SIGUSR2)"
        needed = 1.2 * step_s + SAFETY * save_s + REQUEUE_S
        if self.end is not None and time.time() + needed > self.end:
            self.end = slurm.end_time(self.job.id)
            if self.end is not None and time.time() + needed > self.end:
                return f"{self.end - time.time():.0f} s of the job are left, a step and a save may take {needed:.0f} s"
        return ""

    def in_rollout(self, save_s: float) -> str:
        if self._noticed.is_set() and self.end is not None and time.time() + SAFETY * save_s + 2 * REQUEUE_S > self.end:
            return f"{self.end - time.time():.0f} s of the job are left, too few for this step and a save"
        return ""

    def stopped(self, where: str, saved: bool) -> None:
        """Raises StoppedForGood where the run does not go on by itself."""
        record = self._go_on("stopped as planned", where, saved)
        if not record["next"]:
            raise StoppedForGood(f"stopped at {where}; {record['why_not']}. Submit the run again to go on")

    # -- both ----------------------------------------------------------------------------------------------------

    def _go_on(self, why: str, where: str, saved: bool) -> dict[str, Any]:
        """Once an attempt: say in stopped.json what happened, and requeue (or resubmit) the job."""
        with self._lock:
            path = self.run.attempt_dir / STOPPED
            if path.is_file():
                return read_json(path)
            patiently(self.run.check_fence, pauses_s=(0.2, 0.8))
            record: dict[str, Any] = {
                "why": why,
                "at": where,
                "saved": saved,
                "time": time.time(),
                "next": "",
                "why_not": "",
            }
            if not self.config.slurm.requeue:
                record["why_not"] = "slurm.requeue is off"
                write_atomic(path, json.dumps(record))
                return record
            record = go_on(self.run, self.job, record, self.environment)
            log.warning("%s: %s", why, record["next"] or record["why_not"])
            return record
