"""What Slurm says about itself, the partition and the job, and whether its signals arrive."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator

from fp8slurm.check.doctor.finding import Check, Finding
from fp8slurm.config import RunConfig
from fp8slurm.core.errors import InputError
from fp8slurm.scheduler import job as slurm

SLURM = Check("slurm")

SIGNAL_WAIT_S = 30.0


def check_slurm(configs: list[RunConfig]) -> Iterator[Finding]:
    """Requeueing, signals, preemption and time limits, asked of the controller."""
    if not slurm.available():
        yield SLURM.warning("no Slurm on this machine: only --slurm.executor local works", "run it on a login node")
        return
    try:
        controller = slurm.settings()
    except slurm.SlurmError as error:
        needed = any(c.slurm.executor == "slurm" for c in configs)
        text = f"the controller does not answer: {str(error).splitlines()[-1]}"
        yield Finding(
            "slurm",
            "error" if needed else "warning",
            text,
            "scontrol ping on a login node; without Slurm only --slurm.executor local works",
        )
        return
    about = (controller.get(key, "") for key in ("SLURM_VERSION", "ProctrackType", "SelectType"))
    yield SLURM.ok(", ".join(about))
    if controller.get("JobRequeue") == "0":
        yield SLURM.warning(
            "JobRequeue=0: a job is put back into the queue only where it asks for it",
            "fp8slurm submit asks (--requeue); a script of your own needs #SBATCH --requeue",
        )
    if (
        "preempt_send_user_signal" not in controller.get("SlurmctldParameters", "")
        and controller.get("PreemptType", "preempt/none") != "preempt/none"
    ):
        yield SLURM.warning(
            "preemption sends SIGTERM, not the job's own signal (SlurmctldParameters lacks preempt_send_user_signal)",
            "a run goes on from its newest checkpoint then: lower --checkpoint.every, or choose a partition that is not"
            " preempted",
        )
    yield from _recipes(configs)


def _recipes(configs: list[RunConfig]) -> Iterator[Finding]:
    from fp8slurm.check.cluster import check_cluster, requested_partition

    for config in configs:
        if config.slurm.executor != "slurm":
            continue
        name, s = config.run.name, config.slurm
        try:
            for warning in check_cluster(config):
                yield SLURM.warning(f"{name}: {warning}", "")
            partition = requested_partition(config)[0] or "the default partition"
            yield SLURM.ok(f"{name}: {s.nodes} node(s) of {partition} for {s.time}: sbatch would take the job")
        except InputError as error:
            yield SLURM.error(
                f"{name}: {error}",
                "--slurm.partition, account, qos, time, nodes; sinfo -o '%P %l %D %G' lists what there is",
            )
        if not s.requeue:
            yield SLURM.warning(f"{name}: slurm.requeue is off: the run ends at the time limit", "--slurm.requeue")


def check_job(job_id: str) -> Iterator[Finding]:
    """The job that the doctor's tasks run in."""
    try:
        job = slurm.show_job(job_id) or {}
    except slurm.SlurmError as error:
        yield SLURM.error(
            f"a node cannot ask the controller about its job: {error}",
            "scontrol must work on the nodes: attempts are requeued from there",
        )
        return
    if job.get("Requeue") == "0":
        yield SLURM.error(
            f"job {job_id} may not be requeued (Requeue=0): a run would end at its first time limit or dead node",
            (
                "#SBATCH --requeue in the script, or a site rule forbids it (ask; --slurm.no-requeue silences this)"
                if job.get("BatchFlag") == "1"
                else "an allocation of salloc or srun never is: submit with fp8slurm submit or sbatch --requeue"
            ),
        )
    else:
        yield SLURM.ok("the job may be requeued")
    limit = job.get("TimeLimit", "")
    if limit:
        yield SLURM.ok(f"time limit {limit}, ends {job.get('EndTime', 'never')}")


class Signal:
    """Whether SIGUSR2, Slurm's notice before the time limit, reaches this process. Made before anything is started."""

    def __init__(self) -> None:
        self.arrived = 0
        signal.signal(signal.SIGUSR2, self._count)

    def _count(self, *_: object) -> None:
        self.arrived += 1

    def check(self, first: bool) -> Iterator[Finding]:
        """first: this node asks Slurm to send it, to every task of this job step."""
        job, step = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_STEP_ID")
        problem = ""
        for wait_s in (0.5, 2.0) if first else ():  # on a busy machine one was seen to reach one of two nodes
            time.sleep(wait_s)
            done = subprocess.run(["scancel", "--signal=USR2", f"{job}.{step}"], capture_output=True, text=True)
            problem = problem or done.stderr.strip()
        deadline = time.monotonic() + SIGNAL_WAIT_S
        while not self.arrived and time.monotonic() < deadline:
            time.sleep(0.05)
        if self.arrived:
            yield SLURM.ok("SIGUSR2 of Slurm reaches the tasks")
        else:
            yield SLURM.error(
                f"SIGUSR2 did not reach this task within {SIGNAL_WAIT_S:g} s{f': {problem}' if problem else ''}",
                "without it a run saves nothing before its time limit: lower --checkpoint.every, and ask the site about"
                " scancel --signal",
            )
