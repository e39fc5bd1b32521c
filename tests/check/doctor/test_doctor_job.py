"""The doctor's job: never queued where Slurm would refuse it, given up where it never starts, ended with the doctor."""

from __future__ import annotations

import os
import signal

import pytest

from fp8slurm.check.doctor import cli, job
from fp8slurm.check.doctor.finding import Finding
from fp8slurm.config import RunConfig

HUNG_UP = {signal.SIGHUP: signal.SIG_IGN, signal.SIGTERM: signal.SIG_DFL}
"""Signals as nohup leaves them."""


@pytest.fixture
def slurm(monkeypatch):
    """sbatch queues job 5, which waits for `reason`; `cancelled` are the jobs that scancel was told."""

    class Slurm:
        reason = "Resources"
        cancelled: list[str] = []

    s = Slurm()
    s.cancelled = []
    monkeypatch.setattr(job.slurm, "ask", lambda *_, **__: "5\n")
    monkeypatch.setattr(job.slurm, "show_job", lambda id: {"JobState": "PENDING", "Reason": s.reason})
    monkeypatch.setattr(job.subprocess, "run", lambda command, **_: s.cancelled.append(" ".join(command)))
    return s


@pytest.mark.parametrize("reason", ["PartitionNodeLimit", "BadConstraints"])
def test_a_job_that_never_starts_is_given_up(slurm, tmp_path, reason):
    slurm.reason = reason
    with pytest.raises(ValueError, match=rf"job 5 would never start: PENDING \({reason}\).*--slurm.nodes"):
        job._job(RunConfig(), tmp_path, lambda text: None)
    assert slurm.cancelled == ["scancel 5"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_doctor_that_is_ended_takes_its_job_along(slurm, tmp_path, number):
    before = signal.signal(number, signal.SIG_DFL)  # under nohup SIGHUP is ignored, and the doctor would wait for ever
    try:
        with pytest.raises(KeyboardInterrupt):
            job._job(RunConfig(), tmp_path, lambda text: os.kill(os.getpid(), number))
        assert slurm.cancelled == ["scancel 5"] and signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_a_doctor_under_nohup_waits_on_and_still_ends(slurm, tmp_path):
    """Its terminal is closed, then it is ended by kill."""
    before = {number: signal.signal(number, to) for number, to in HUNG_UP.items()}

    def hang_up_and_kill(text):
        for number in HUNG_UP:
            os.kill(os.getpid(), number)

    try:
        with pytest.raises(KeyboardInterrupt):
            job._job(RunConfig(), tmp_path, hang_up_and_kill)
        assert slurm.cancelled == ["scancel 5"] and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_nothing_is_queued_where_slurm_would_refuse_it(monkeypatch):
    refusal = Finding("slurm", "error", "r: --slurm.nodes 5: partition main gives a job at most 2 nodes", "")
    monkeypatch.setattr("fp8slurm.check.doctor.scheduler.check_slurm", lambda configs: iter([refusal]))
    monkeypatch.setattr("fp8slurm.scheduler.job.available", lambda: True)
    monkeypatch.setattr("fp8slurm.check.doctor.job.over_nodes", lambda *_: [])
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    findings = cli._look([RunConfig()], True, True)
    assert findings[0] == refusal and findings[1].level == "error" and "not looked at" in findings[1].text
    monkeypatch.setenv("SLURM_JOB_ID", "7")  # in an allocation there is nothing to queue
    assert cli._look([RunConfig()], True, True) == [refusal]


def test_a_percent_sign_in_the_path_of_the_log(tmp_path):
    assert f"--output={tmp_path}/a%%j/job.log" in job.script(RunConfig(), tmp_path / "a%j")
