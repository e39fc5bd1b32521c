"""Random signals to random processes of a run: whatever comes, it is started again as a job script would, and ends with
the bytes of an undisturbed run. `make test-faults`; FAULT_SECONDS=600 makes it longer."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from injection import check_same, is_permanent
from tiny_runs import TIMEOUT_S, TinyRuns, task_pids

from fp8slurm.core.processes import process_start

pytestmark = [pytest.mark.slow, pytest.mark.faults]

SECONDS = float(os.environ.get("FAULT_SECONDS", "240"))
SIGNALS = [
    signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGSEGV,
    signal.SIGABRT, signal.SIGPIPE, signal.SIGSTOP,
]  # fmt: skip
STOPPED_S = 3.0


def send(number: signal.Signals, victim: psutil.Process) -> None:
    """One that is stopped goes on after a while."""
    with suppress(psutil.NoSuchProcess):
        victim.send_signal(number)
        if number == signal.SIGSTOP:
            time.sleep(STOPPED_S)
            victim.send_signal(signal.SIGCONT)


def hail(process: subprocess.Popen, chance: random.Random, until: float, sent: Counter[str]) -> int:
    """Send signals to the command's family until it has ended, or `until`; its exit status."""
    deadline = time.monotonic() + TIMEOUT_S
    while process.poll() is None:
        assert time.monotonic() < deadline, "it neither goes on nor ends"
        with suppress(subprocess.TimeoutExpired):
            process.wait(chance.uniform(3, 25))
            break
        if time.monotonic() < until:
            with suppress(psutil.NoSuchProcess):
                family = psutil.Process(process.pid)
                number, victim = chance.choice(SIGNALS), chance.choice([family, *family.children(recursive=True)])
                sent[number.name] += 1
                send(number, victim)
    return process.wait()


def wait_for_tasks(run: Path) -> None:
    """Until those of every attempt have ended: also where the command was killed."""
    deadline = time.monotonic() + TIMEOUT_S
    numbers = [int(path.name) for path in (run / "attempts").glob("[0-9]*")]
    while any(process_start(pid) for number in numbers for pid in task_pids(run, number).values()):
        assert time.monotonic() < deadline, "tasks go on without the command that started them"
        time.sleep(0.2)


def test_random_signals_to_random_processes(runs: TinyRuns, reference: Path, tmp_path: Path) -> None:
    chance, sent, starts = random.Random(11), Counter[str](), 0
    until = time.monotonic() + SECONDS
    for number in range(1000):
        name, folder = f"signals-{number}", tmp_path / str(number)
        while True:
            process, starts = runs.start(name), starts + 1
            try:
                status = hail(process, chance, until, sent)
            finally:
                runs.stop(process)
            wait_for_tasks(runs.path(name))
            if status == 0:
                break
            attempts = [int(path.name) for path in (runs.path(name) / "attempts").glob("[0-9]*")]
            newest = runs.path(name) / "attempts" / str(max(attempts, default=0))
            assert not is_permanent(newest), runs.said(process)
        folder.mkdir()
        check_same(runs.path(name), reference, folder)
        if time.monotonic() > until:
            break
    print(f"{sum(sent.values())} signals in {starts} starts of {number + 1} runs: {dict(sent)}")
    assert sum(sent.values()) >= 5
