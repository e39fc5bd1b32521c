"""Thousands of damaged inputs: each ends with a sentence that names the file, or with the right result.

    FUZZ_CASES=2000 FUZZ_SEED=1 make fuzz        (a case is named in a finding: seed, surface and number make it again)

Nobody may see a traceback, wait for longer than LIMIT_S, need more than MEMORY of address space, or read a message of
more than bounded() allows.
"""

from __future__ import annotations

import logging
import os
import random
import resource
import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from surfaces import SURFACES, Refused

from fp8slurm.core.errors import LONGEST_LINE, MOST_LINES

CASES, SEED = int(os.environ.get("FUZZ_CASES", 200)), os.environ.get("FUZZ_SEED", "0")
LIMIT_S = 20
MEMORY = 2 << 30
PREFIX = 200
"""What a command writes before a message: its own name."""
SHOWN = 25


class TooLong(BaseException):
    """The limit of time has passed."""


@contextmanager
def limited() -> Iterator[None]:
    """At most LIMIT_S seconds and MEMORY bytes of address space more than there are."""

    def stop(*_: object) -> None:
        raise TooLong

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def wrong_with(refused: Refused) -> str:
    """What is wrong with what a user was told, or ""."""
    lines = refused.said.split("\n")
    if not refused.said.strip():
        return "nothing was said"
    if len(lines) > MOST_LINES + 2 or max(map(len, lines)) > LONGEST_LINE + PREFIX:
        return f"{len(lines)} lines, the longest of {max(map(len, lines))} characters"
    if "Traceback" in refused.said:
        return "a traceback"
    if not any(name in refused.said for name in refused.names):
        return f"none of {refused.names} is named"
    return ""


@pytest.mark.parametrize("name", SURFACES)
def test_damaged_input(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    (tmp_path / name).mkdir()
    surface = SURFACES[name](tmp_path / name)
    findings: list[str] = []
    refused = read = 0
    for number in range(max(1, CASES // surface.cost)):
        rng = random.Random(f"{SEED}/{name}/{number}")
        surface.damage(rng)
        wrong = ""
        try:
            with limited():
                surface.read(rng)
            read += 1
        except Refused as error:
            refused += 1
            wrong = wrong_with(error)
            if wrong:
                wrong += f": {error.said[:300]}"
        except TooLong:
            wrong = f"not done after {LIMIT_S} s\n" + traceback.format_exc()
        except BaseException as error:  # noqa: BLE001 - a panic of a library's is none of Exception
            if isinstance(error, KeyboardInterrupt):
                raise
            wrong = traceback.format_exc()
        if wrong:
            findings.append(f"case {SEED}/{name}/{number}: {wrong[-1500:]}")
    print(f"{name}: {read + refused + len(findings)} cases, {refused} refused, {read} read, {len(findings)} findings")
    assert not findings, f"{len(findings)} of {read + refused}:\n" + "\n".join(findings[:SHOWN])
    assert refused > 0, "the damage reaches nothing"
