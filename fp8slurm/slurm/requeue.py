"""A job back in the queue, or, where the site forbids that, submitted anew with what waits for it."""

from __future__ import annotations

import json
import logging
import os
import signal
from pathlib import Path
from typing import Any

from fp8slurm.core.files import patiently, write_atomic
from fp8slurm.run.chain_record import CHAIN, read_chain
from fp8slurm.run.directory import SLURM_FOLDER, RunDirectory
from fp8slurm.run.task_errors import STOPPED
from fp8slurm.scheduler import job as slurm
from fp8slurm.scheduler.job import Job, SlurmError

log = logging.getLogger(__name__)


def go_on(
    run: RunDirectory, job: Job, record: dict[str, Any], environment: dict[str, str],
    bad_node: dict[str, str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Requeue or resubmit the job and say so in stopped.json with `record`, how the attempt ended; returns all of it.

    bad_node: node and why; the job is not to get it again.

    A run directory that cannot be written to is no reason to stay where the job is.
    """

    def keep(record: dict[str, Any]) -> None:
        try:
            patiently(lambda: write_atomic(run.attempt_dir / STOPPED, json.dumps(record)), pauses_s=(0.2, 0.8))
        except OSError as error:
            log.error("%s cannot be written: %s", run.attempt_dir / STOPPED, error)

    keep(record | {"next": "requeued"})  # now: Slurm ends this process as soon as it has taken the requeue
    exclude = ""
    if bad_node is not None:
        try:
            exclude = slurm.leave_out(job.id, bad_node["node"])
        except SlurmError as error:
            log.error("%s is not left out: %s", bad_node["node"], error)
    record = record | requeue_or_resubmit(run, job, environment, exclude)
    if record.pop("excluded", False):
        record["left_out"] = bad_node
    keep(record)
    return record


def requeue_or_resubmit(run: RunDirectory, job: Job, environment: dict[str, str], exclude: str = "") -> dict[str, Any]:
    """Put the job back into the queue, or submit it anew where that is forbidden: next, why_not, resubmitted; excluded,
    where it does not get the nodes `exclude`. A job that was cancelled stays so."""
    try:
        if slurm.cancelled(slurm.show_job(job.id) or {}):
            return {"next": "", "why_not": "the job was cancelled"}
    except SlurmError as error:
        log.warning("whether the job was cancelled is not known: %s", error)
    if exclude:  # Slurm takes that for pending jobs only, and by then ends this process, KillWait after a first notice
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        slurm.requeue(job.id)
        return {"next": "requeued"} | _exclude(job, exclude)
    except SlurmError as refusal:
        try:
            new = resubmit(run, job, environment, exclude)
        except (SlurmError, OSError) as error:
            return {"next": "", "why_not": f"scontrol requeue: {refusal}; sbatch: {error}"}
        said = {"next": f"resubmitted as job {new}", "resubmitted": new, "why_not": f"scontrol requeue: {refusal}"}
        return said | ({"excluded": True} if exclude else {})


def _exclude(job: Job, exclude: str) -> dict[str, Any]:
    if not exclude:
        return {}
    try:
        slurm.ask("scontrol", "update", f"JobId={slurm.number_of(job.id)}", f"ExcNodeList={exclude}")
    except SlurmError as error:
        log.error("the job may get %s again: %s", exclude, error)
        return {}
    return {"excluded": True}


def resubmit(run: RunDirectory, job: Job, environment: dict[str, str], exclude: str = "") -> str:
    """Submit the job's own script again with its arguments, to start when this job has ended; returns the new job's id.

    environment: that of a process of the job, before anything was changed in it.

    Raises:
        SlurmError: Slurm refuses.
    """
    assert run.attempt is not None
    script = run.attempt_dir / "job_script.sh"
    slurm.ask("scontrol", "write", "batch_script", job.id, str(script))
    shown = slurm.show_job(job.id) or {}
    flags = slurm.flags_of(shown | ({"ExcNodeList": exclude} if exclude else {}), environment)
    arguments = (run.owner(run.attempt) or {}).get("arguments", [])
    new = slurm.sbatch(
        f"--dependency=afterany:{slurm.number_of(job.id)}", *flags, str(script), *arguments,
        environment=slurm.environment_for_a_job(environment), cwd=environment.get("SLURM_SUBMIT_DIR"),
    )  # fmt: skip

    pickle = run.path / SLURM_FOLDER / f"{job.id}_submitted.pkl"
    if pickle.is_file():  # submitit looks for what to run under the job's number
        os.link(pickle, pickle.with_name(f"{new}_submitted.pkl"))
    try:
        follow(run.path, job.id, new)
    except SlurmError as error:
        log.warning("the jobs of the chain that wait for job %s cannot be moved behind job %s: %s", job.id, new, error)
    return new


def follow(run: Path, old: str, new: str) -> None:
    """Let the links that wait for job `old` wait for `new`, which goes on with its work (a site without requeueing).

    Raises:
        SlurmError: Slurm refused; the chain is then cancelled when `old` ends.
    """
    record = read_chain(run / CHAIN)
    for link in record.get("links", []):
        if link["job_id"] == old:
            link["job_id"] = new
        elif old in link["after"]:
            link["after"] = [new if i == old else i for i in link["after"]]
            slurm.ask("scontrol", "update", f"JobId={link['job_id']}", f"Dependency=afterok:{':'.join(link['after'])}")
    if record:
        write_atomic(run / CHAIN, json.dumps(record, indent=1))
