"""A thread in every task that ends it when a neighbour died or when nothing moves any more.

Under Slurm `srun --kill-on-bad-exit` does the first part too; submitit's local executor does not, and a rank that waits
for a dead one would wait for ever.
"""

from __future__ import annotations

import faulthandler
import json
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from fp8slurm.core.files import patiently, read_json, write_atomic
from fp8slurm.core.processes import process_start
from fp8slurm.run.task_errors import record_error

NEIGHBOUR_DIED = 75
HUNG = 76
TERMINATED = 143
LAUNCHER = "FP8SLURM_LAUNCHER"
"""The process that started tasks on this machine, as `launcher` writes it: they end with it, also if it was killed."""
FLIGHT_RECORD_S = 5.0
OTHERS_STACKS_S = FLIGHT_RECORD_S + 3.0
FAILURES = 3
"""Looks in a row that may fail otherwise than by the file system: a neighbour's file may be torn for a moment."""
SILENT_S = 30.0
"""A task that is ended from outside says where it stands if it has made no progress for so long: somebody lost patience
before the watchdog did."""


class Monitor:
    """`heartbeat` says that this task makes progress. `on_exit` runs before the process is ended from here, with status
    0 if the attempt is `replaced` by then."""

    def __init__(self, attempt_dir: Path, index: int, timeout_s: float) -> None:
        self.folder = attempt_dir / "tasks"
        self.errors = attempt_dir / "errors"
        self.stacks = attempt_dir / "stacks"
        self.hung = self.stacks / "hung"
        self._shown = False
        self.index, self.timeout_s = index, timeout_s
        self.on_exit: Callable[[], None] = lambda: None
        self.replaced: Callable[[], bool] = lambda: False
        self.on_notice: Callable[[], None] = lambda: None
        self.on_tick: Callable[[], None] = lambda: None
        self.stop_marker = attempt_dir / "stopped.json"
        self._launcher = os.environ.pop(LAUNCHER, None)
        self._last = time.monotonic()
        self._closing = threading.Event()
        self._signals, self._wakeup = os.pipe()

    def start(self) -> None:
        """Begin to watch (call this from the main thread)."""
        for folder in (self.folder, self.errors, self.stacks):
            patiently(lambda: folder.mkdir(exist_ok=True))
        me = {"host": socket.gethostname(), "pid": os.getpid(), "start": process_start(os.getpid())}
        patiently(lambda: write_atomic(self.folder / f"{self.index}.json", json.dumps(me)))
        # A main thread that waits inside C++ (store, gloo) runs no Python signal handler: the wake-up pipe reaches this
        # thread at once.
        os.set_blocking(self._wakeup, False)
        signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            signal.signal(number, lambda *_: None)
        self._check_launcher()  # now: what is imported next may keep the thread from running for seconds
        threading.Thread(target=self._watch, name="monitor", daemon=True).start()

    def heartbeat(self) -> None:
        self._last = time.monotonic()

    def expect(self, seconds: float) -> None:
        """What comes now may take this long, and has a deadline of its own; the watchdog's time runs after it, or from
        the next heartbeat."""
        self._last = time.monotonic() + seconds

    def done(self) -> None:
        """This task ended well: its end does not alarm the others."""
        patiently((self.folder / f"{self.index}.done").touch)
        self._closing.set()

    def _dead_neighbour(self) -> str | None:
        for path in self.folder.glob("*.json"):
            if path.stem == str(self.index) or path.name.startswith("."):
                continue
            task = read_json(path)
            if task["host"] != socket.gethostname() or process_start(task["pid"]) == task["start"]:
                continue
            if not path.with_suffix(".done").exists():
                return f"task {path.stem} (process {task['pid']})"
        return None

    def _watch(self) -> None:
        """Without this thread a task has no watchdog, no notice and no ear for SIGTERM: one failed read of a shared
        file system must not end it."""
        failed_before, failures = False, 0
        while not self._closing.is_set():
            try:
                self._look()
                failures = 0
            except Exception as error:  # noqa: BLE001 - a task that nobody watches ends
                failures += not isinstance(error, OSError)
                if failures == FAILURES:
                    self._end(1, f"watching it failed\n{traceback.format_exc()}")
                if not failed_before:
                    text = f"task {self.index}: watching goes on after\n{traceback.format_exc()}"
                    print(text, file=sys.stderr, flush=True)
                failed_before = True

    def _look(self) -> None:
        if select.select([self._signals], [], [], 0.5)[0]:
            number = signal.Signals(os.read(self._signals, 1)[0])
            if number in (signal.SIGTERM, signal.SIGINT):
                self._end(TERMINATED, f"ended by {number.name}")
            if number == signal.SIGUSR2:
                self.on_notice()
        # Blocked since the task began, so that no child of it is killed by it: fetched from here.
        while signal.sigtimedwait([signal.SIGUSR2], 0) is not None:
            self.on_notice()
        # what needs no file system comes first
        self._check_launcher()
        if time.monotonic() - self._last > self.timeout_s:
            self._end(HUNG, f"no progress for watchdog.timeout_s = {self.timeout_s:g} s; stacks in {self.stacks}")
        self.on_tick()
        dead = self._dead_neighbour()
        if dead:
            time.sleep(0.2)  # its last words first
            self._end(NEIGHBOUR_DIED, f"{dead} ended; this task ends with it")
        if self.hung.exists():
            self._show_where()

    def _check_launcher(self) -> None:
        if self._launcher is not None and self._launcher != launcher(int(self._launcher.split()[0])):
            self._end(TERMINATED, f"the process that started it ({self._launcher.split()[0]}) is gone")

    def _end(self, code: int, why: str) -> None:
        try:
            if self.stop_marker.exists():  # over as planned: Slurm or its neighbours end what is left
                code, why = 0, f"{why}, after the run had stopped"
            print(f"task {self.index}: {why}", file=sys.stderr, flush=True)
            if code:
                self._last_words(code, why)
        finally:  # also where the folder cannot be written
            self._leave(code)

    def _last_words(self, code: int, why: str) -> None:
        if code == HUNG:
            self.hung.touch()
        if code != TERMINATED or self.hung.exists() or time.monotonic() - self._last > SILENT_S:
            self._show_where()
        record_error(self.errors, self.index, why, primary=code not in (NEIGHBOUR_DIED, TERMINATED))
        if code == HUNG:
            self._wait_for_stacks()

    def _show_where(self) -> None:
        """Write where every thread of this task stands, once; in a hang also what NCCL did last."""
        if self._shown:
            return
        self._shown = True
        with open(self.stacks / f"task_{self.index}.txt", "w") as f:
            faulthandler.dump_traceback(f, all_threads=True)
            f.write(_in_the_kernel())
        if self.hung.exists():
            dump = threading.Thread(target=_dump_flight_record, args=(self.stacks, self.index), daemon=True)
            dump.start()
            dump.join(FLIGHT_RECORD_S)  # it must not hang as well

    def _wait_for_stacks(self) -> None:
        """The end of this task ends the job step: first the others say where they stand, those that still can."""
        deadline = time.monotonic() + OTHERS_STACKS_S
        while time.monotonic() < deadline:
            silent = [t for t in self.folder.glob("[0-9]*.json") if not (self.stacks / f"task_{t.stem}.txt").exists()]
            if all(t.with_suffix(".done").exists() for t in silent):
                return
            time.sleep(0.1)

    def _leave(self, code: int) -> None:
        threading.Timer(10.0, os._exit, (code,)).start()  # nothing here must keep a broken task alive
        try:
            self.on_exit()
        finally:
            os._exit(0 if self.replaced() else code)


def _in_the_kernel() -> str:
    """Each thread's name, state (R: it spins, as one that waits for a GPU) and what it waits for in the kernel:
    Python's stacks end where C++ begins."""
    lines = ["", "thread: name, state, system call and its arguments, where it waits"]
    for task in sorted(Path("/proc/self/task").iterdir(), key=lambda path: int(path.name)):
        shown = {}
        for name in ("comm", "stat", "syscall", "wchan"):
            try:
                shown[name] = (task / name).read_text().strip()
            except OSError:  # the thread has ended, or the kernel does not tell
                shown[name] = "?"
        state = shown["stat"].rpartition(")")[2].strip()[:1]
        lines.append(f"{task.name}: {shown['comm']}, {state}, {shown['syscall']}, {shown['wchan']}")
    return "\n".join(lines) + "\n"


def _dump_flight_record(folder: Path, index: int) -> None:
    """NCCL's flight recorder: this rank's last collectives, as torch's `torchfrtrace` reads them."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        (folder / f"nccl_rank_{index}").write_bytes(torch._C._distributed_c10d._dump_nccl_trace())


def launcher(pid: int | None = None) -> str:
    """Process id and start time of this process, or of another; a process id alone may be given to a new one."""
    pid = os.getpid() if pid is None else pid
    return f"{pid} {process_start(pid)}"
