"""Python code of a model's, run in a process of its own with limits, and apart from everything as far as Linux allows.

    sandbox = Sandbox()                          once: finds out what the kernel allows, and says what it does not
    result = await sandbox.run("print(6 * 7)")   in a generate function; any number of calls at a time
    result.text                                  what the model is told

No thread is started, and no call waits for a child that hangs. What it does not protect from: docs/security.md.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fp8slurm.agents.confined import LOST, STEPS
from fp8slurm.core.errors import InputError
from fp8slurm.core.processes import PACKAGE_ROOT, kill_group

log = logging.getLogger(__name__)

PROBE_LIMIT_S = 60.0
_PIECE = 1 << 16


@dataclass(frozen=True)
class Limits:
    """Of one call."""

    timeout_s: float = 10.0
    """Seconds from its start; then it is killed with all that it has started."""
    memory_mib: int = 512
    """Address space of each of its processes."""
    output_bytes: int = 16_384
    """Of standard output and error together; one that writes more is killed."""
    disk_mib: int = 64
    """Of files in its folder together (of each file, where the kernel gives it no folder of its own)."""
    processes: int = 32
    """Processes and threads at a time. Only where the sandbox has namespaces, and not for root."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise InputError(f"Limits({name}={value!r}): allowed: more than 0")


@dataclass(frozen=True)
class ToolResult:
    """What came of one call."""

    output: str
    """Standard output and error as they came, what is no UTF-8 replaced; at most Limits.output_bytes of it."""
    ended: Literal["exit", "timeout", "output", "signal"]
    """By itself, or killed: too late, too much output, or by the kernel or itself."""
    status: int
    """Exit status; of one that was killed minus the signal's number."""
    why: str = ""
    """In words, where it did not end with status 0."""

    @property
    def ok(self) -> bool:
        return self.ended == "exit" and self.status == 0

    @property
    def text(self) -> str:
        """The output, and on a line of its own why it is not all there could be."""
        return self.output if self.ok else "\n".join(filter(None, (self.output.rstrip("\n"), f"[{self.why}]")))


class Sandbox:
    """Runs code apart. A new interpreter for each call: nothing is left from one to the next."""

    def __init__(
        self, limits: Limits | None = None, at_once: int = 64, hidden: Sequence[Path] = (),
        isolation: Literal["if possible", "required"] = "if possible",
    ) -> None:  # fmt: skip
        """at_once: processes at a time; further calls wait, and their time begins when they start. hidden: folders that
        code finds empty, such as the one with the labels.

        What the kernel does not allow is logged, and left out. InputError instead: isolation = "required", or there are
        `hidden` folders that cannot be hidden.
        """
        if at_once < 1:
            raise InputError(f"Sandbox(at_once={at_once}): allowed: 1 and more")
        self.limits = limits or Limits()
        self._hidden = [str(Path(path).resolve()) for path in hidden]
        self._slots = asyncio.Semaphore(at_once)
        self.steps: tuple[str, ...] = tuple(STEPS)
        """Of confined.STEPS what is done here."""
        failed = self._probe()
        self.steps = () if "namespaces" in failed else tuple(step for step in STEPS if step not in failed)
        for step, reason in failed.items():
            promise = STEPS.get(step, "these folders look empty: " + ", ".join(self._hidden))
            said = f"the kernel does not let this user run tools with: {promise} ({step}: {reason})"
            if isolation == "required" or self._hidden and step in ("namespaces", "hidden"):
                raise InputError(f'{said}. Sandbox(isolation="if possible") without `hidden` runs them without it')
            log.warning("%s. They run without", said)

    async def run(self, source: str, stdin: str = "", limits: Limits | None = None) -> ToolResult:
        """Run Python source as a program, in an empty folder. stdin: what it can read.

        A cancelled call kills its process. RuntimeError: the kernel no longer allows what it allowed at the start.
        """
        limits = limits or self.limits
        async with self._slots:
            folder = Path(tempfile.mkdtemp(prefix="fp8slurm-tool-"))
            try:
                return await self._run(folder, source, stdin, limits)
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    async def _run(self, folder: Path, source: str, stdin: str, limits: Limits) -> ToolResult:
        (folder / "input").write_text(stdin, encoding="utf-8", errors="replace")
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        try:
            with open(folder / "input", "rb") as given:
                process = self._start(folder, source, limits, given.fileno(), writing)
        except BaseException:
            os.close(reading)
            raise
        finally:
            os.close(writing)
        output = bytearray()
        try:
            ended = await _watch(process.pid, reading, output, limits)
        finally:
            _drain(reading, output, limits.output_bytes)
            kill_group(process)  # also what a tool that ended left behind
            os.close(reading)
        return _result(process.returncode, ended, output, limits)

    def _start(self, folder: Path, source: str, limits: Limits, stdin: int, output: int) -> subprocess.Popen[bytes]:
        work = folder / "work"
        work.mkdir()
        spec = {
            "source": source, "folder": str(work), "steps": self.steps, "hidden": self._hidden, "probe": False,
            "memory_mib": limits.memory_mib, "disk_mib": limits.disk_mib, "processes": limits.processes,
            "cpu_s": int(limits.timeout_s) + 1,
        }  # fmt: skip
        return self._launch(folder, spec, stdin, output)

    def _launch(self, folder: Path, spec: dict[str, object], stdin: int, output: int) -> subprocess.Popen[bytes]:
        """Nothing of this process's environment, which may hold keys, goes along."""
        (folder / "spec.json").write_text(json.dumps(spec))
        environment = {"PATH": os.defpath, "PYTHONPATH": PACKAGE_ROOT, "HOME": str(folder / "work"), "LANG": "C.UTF-8"}
        return subprocess.Popen(
            [sys.executable, "-P", "-s", "-u", "-m", "fp8slurm.agents.confined", str(folder / "spec.json")],
            stdin=stdin, stdout=output, stderr=output, env=environment, cwd=folder, start_new_session=True,
        )  # fmt: skip

    def _probe(self) -> dict[str, str]:
        """Why each step fails that fails here."""
        with tempfile.TemporaryDirectory(prefix="fp8slurm-tool-") as name:
            (work := Path(name) / "work").mkdir()
            spec = {"folder": str(work), "steps": self.steps, "hidden": self._hidden, "probe": True, "disk_mib": 1}
            with open(Path(name) / "output", "w+b") as said:
                process = self._launch(Path(name), spec, subprocess.DEVNULL, said.fileno())
                try:
                    process.wait(PROBE_LIMIT_S)
                except subprocess.TimeoutExpired:
                    kill_group(process)
                said.seek(0)
                text = said.read().decode(errors="replace")
        try:
            return dict(json.loads(text))
        except ValueError:
            return {"namespaces": f"status {process.returncode}: {text[-500:]}"}


async def _watch(pid: int, reading: int, output: bytearray, limits: Limits) -> Literal["exit", "timeout", "output"]:
    """Collect output until the process has ended or has to."""
    loop, done = asyncio.get_running_loop(), asyncio.Event()
    ended = os.pidfd_open(pid)  # asyncio's own watcher of children starts a thread for each (Python 3.11)

    def read() -> None:
        if _read(reading, output) == b"":
            loop.remove_reader(reading)
        if len(output) > limits.output_bytes:
            done.set()

    loop.add_reader(reading, read)
    loop.add_reader(ended, done.set)
    try:
        async with asyncio.timeout(limits.timeout_s):
            await done.wait()
    except TimeoutError:
        return "timeout"
    finally:
        loop.remove_reader(reading)
        loop.remove_reader(ended)
        os.close(ended)
    return "output" if len(output) > limits.output_bytes else "exit"


def _read(reading: int, output: bytearray) -> bytes | None:
    """Take what is there: nothing at the end, None where nothing is there yet."""
    try:
        piece = os.read(reading, _PIECE)
    except BlockingIOError:
        return None
    output += piece
    return piece


def _drain(reading: int, output: bytearray, most: int) -> None:
    """What a process wrote before it ended; a child of it may hold the pipe open, so its end is not waited for."""
    while len(output) <= most and _read(reading, output):
        pass


def _result(status: int, ended: Literal["exit", "timeout", "output"], output: bytearray, limits: Limits) -> ToolResult:
    if ended == "exit" and len(output) > limits.output_bytes:
        ended = "output"
    text = bytes(output[: limits.output_bytes]).decode(errors="replace")
    if status == LOST and ended == "exit":
        raise RuntimeError(f"a tool could not be kept apart as at the start: {text}")
    if ended == "timeout":
        return ToolResult(text, ended, status, f"killed after {limits.timeout_s:g} s")
    if ended == "output":
        return ToolResult(text, ended, status, f"cut off: more than {limits.output_bytes} bytes of output")
    if status < 0 or status > 128:
        number = -status if status < 0 else status - 128
        names = {s.value: s.name for s in signal.Signals}
        return ToolResult(text, "signal", -number, f"ended by signal {names.get(number, number)}")
    return ToolResult(text, ended, status, f"ended with status {status}" if status else "")
