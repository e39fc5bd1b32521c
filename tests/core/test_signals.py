"""What ends a command that runs in a terminal."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from fp8slurm.core.signals import ENDING, ended_is_interrupted


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.signal(number, signal.SIG_DFL) for number in ENDING}  # these tests may run under nohup
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", ENDING)
def test_it_is_interrupted_and_afterwards_all_is_as_before(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), ended_is_interrupted():
        os.kill(os.getpid(), number)
        pytest.fail("it went on")
    assert signal.getsignal(number) == before


def test_what_nohup_ignores_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with ended_is_interrupted():
        os.kill(os.getpid(), signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_under_nohup_a_command_is_still_ended_by_kill() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with pytest.raises(KeyboardInterrupt), ended_is_interrupted():
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("it went on")
