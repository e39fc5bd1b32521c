"""Rewards: our own are computed here, math and users' functions in child processes that no hanging call outlives."""

from __future__ import annotations

import json
import logging
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable

from fp8slurm.config.schema import RewardSection
from fp8slurm.core.errors import InputError, TransientInputError
from fp8slurm.core.processes import python_path
from fp8slurm.core.types import Sample, SampleGroup
from fp8slurm.rewards.graders import answer_part, choice, digits, exact, numeric

log = logging.getLogger(__name__)

START_LIMIT_S = 120.0
"""Time for a child to start and to import the reward function."""
WARNINGS = 5
"""Failed calls that are logged one by one in each score(); all are counted."""
HEARTBEAT_S = 1.0
"""Least time between two heartbeats of score()."""


class RewardError(RuntimeError):
    """A reward function raised, hung or returned no finite number."""


OWN = {"exact": exact, "numeric": numeric, "choice": choice}
"""Kinds that are computed here; `digits`, with its weight, is too."""
SEARCHING = ("numeric", "choice", "math")
"""Kinds that look for the answer in a response."""
MATH_MEMORY_MIB = 2048


def check_kind(kind: str, flag: str = "--reward.kind") -> None:
    """InputError: no such kind of reward."""
    if kind not in (*OWN, "digits", "math") and not all(kind.partition(":")):
        raise InputError(f"{flag} {kind!r} is not one of {', '.join(OWN)}, digits, math, module:function")


class RewardPool:
    """Scores groups by `reward.kind`, with at most `workers` calls at a time; a context manager.

    `exact`, `digits`, `numeric` and `choice` need no process. For the others each call has reward.timeout_s seconds,
    after which its child is killed and replaced, and each child has reward.memory_mib of address space. InputError:
    the kind is unknown or its function cannot be imported.
    """

    def __init__(self, reward: RewardSection, workers: int = 2) -> None:
        check_kind(reward.kind)
        self.reward = reward
        self.failures = 0
        """Calls that failed since the start and counted as 0."""
        self._workers: list[_Worker] = []
        if reward.kind not in (*OWN, "digits"):
            try:
                memory_mib = reward.memory_mib
                if memory_mib is None:
                    memory_mib = MATH_MEMORY_MIB if reward.kind == "math" else 0
                for _ in range(workers):
                    self._workers.append(_Worker(reward.kind, memory_mib))
                for worker in self._workers:
                    worker.wait_ready()
            except BaseException:
                self.close()
                raise

    def score(self, groups: list[SampleGroup], heartbeat: Callable[[], None] = lambda: None) -> None:
        """Fill in `reward` of every sample. `heartbeat` is called now and then as answers come in: there is
        a deadline for each, not for all of them.

        A user's function that fails is a RewardError, which names function, prompt, sample and reason. With
        reward.on_error "zero", and always for math, where the response is to blame, the sample gets 0, is counted in
        `failures`, and the first few are logged.
        """
        calls = [(g, i, s) for g in groups for i, s in enumerate(g.samples)]
        if self.reward.kind in OWN:
            for group, _, sample in calls:
                sample.reward = OWN[self.reward.kind](self._text(group, sample), group.prompt.label)
        elif self.reward.kind == "digits":
            for group, _, sample in calls:
                sample.reward = digits(sample.text, group.prompt.label, self.reward.digits_weight)
        else:
            self._score_in_workers(calls, heartbeat)

    def _text(self, group: SampleGroup, sample: Sample) -> str:
        """What the function is given: the whole response, or of a kind that looks for an answer in it, answer_part."""
        if self.reward.kind not in SEARCHING:
            return sample.text
        return answer_part(sample.text, group.prompt.thinking, sample.finish_reason == "length")

    def _score_in_workers(self, calls: list[tuple[SampleGroup, int, Sample]], heartbeat: Callable[[], None]) -> None:
        waiting, failed, last_heartbeat = deque(calls), 0, time.monotonic()
        busy: dict[_Worker, tuple[SampleGroup, int, Sample]] = {}
        try:
            while waiting or busy:
                for worker in [w for w in self._workers if w not in busy]:
                    if waiting:
                        worker.revive()
                        busy[worker] = waiting.popleft()
                        group, _, sample = busy[worker]
                        worker.send(self._text(group, sample), group.prompt.label, self.reward.timeout_s)
                answers = _answers(list(busy))
                if time.monotonic() - last_heartbeat > HEARTBEAT_S:
                    last_heartbeat = time.monotonic()
                    heartbeat()
                for worker, answer in answers:
                    group, i, sample = busy.pop(worker)
                    sample.reward = answer.get("reward", 0.0)
                    if "error" in answer:
                        failed += 1
                        self._fail(group, i, answer["error"], failed)
        finally:
            for worker in busy:  # only after an error: their answers are not wanted any more
                worker.kill()
        if failed > WARNINGS:
            log.warning("reward function %s failed %d times, counted as 0", self.reward.kind, failed)

    def _fail(self, group: SampleGroup, i: int, reason: str, failed: int) -> None:
        what = f"reward function {self.reward.kind} on prompt {group.prompt.index}, sample {i}: {reason}"
        if self.reward.on_error == "error" and self.reward.kind != "math":
            raise RewardError(f'{what}. reward.on_error = "zero" counts such a sample as 0')
        self.failures += 1
        if failed <= WARNINGS:
            log.warning("%s; counted as 0", what)

    def close(self) -> None:
        """End the children."""
        for worker in self._workers:
            worker.kill()
        self._workers = []

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Worker:
    """One child, at most one call at a time."""

    def __init__(self, kind: str, memory_mib: int) -> None:
        self.kind, self.memory_mib = kind, memory_mib
        self.loaded = False
        """It could be imported once: if it cannot the next time, that is no fault of the user's."""
        self._start()

    def _start(self) -> None:
        self.killed = False
        self._buffer = b""
        self._set_limit(START_LIMIT_S, "to start")
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "fp8slurm.rewards.worker", self.kind, str(self.memory_mib)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": python_path()},
            start_new_session=True,
        )
        assert process.stdin is not None and process.stdout is not None
        self.process, self._stdin, self._stdout = process, process.stdin, process.stdout

    def _set_limit(self, seconds: float, what: str) -> None:
        self.deadline = time.monotonic() + seconds
        self._limit = f"{seconds:g} s ({what})"

    def revive(self) -> None:
        """Start anew after a kill."""
        if self.killed:
            self._start()
            self.wait_ready()

    def wait_ready(self) -> None:
        """InputError: the function cannot be imported; TransientInputError: not now."""
        ((_, answer),) = _answers([self])
        if "ready" not in answer:
            for_good = answer.get("refused") and not self.loaded
            error = InputError if for_good else TransientInputError
            raise error(f"reward.kind {self.kind!r} cannot be loaded: {answer['error']}")
        self.loaded = True

    def send(self, response: str, label: str, limit_s: float) -> None:
        request = json.dumps({"response": response, "label": label}) + "\n"
        self._set_limit(limit_s, "reward.timeout_s")
        try:
            self._stdin.write(request.encode())
            self._stdin.flush()
        except BrokenPipeError:
            pass  # it died; reading finds out

    def fileno(self) -> int:
        return self._stdout.fileno()

    def receive(self) -> dict | None:
        """The answer, None while it is incomplete; a child that died is an error answer."""
        data = os.read(self.fileno(), 1 << 16)
        self._buffer += data
        if not data:
            self.kill()
            return {"error": f"its process ended with status {self.process.returncode}"}
        if not self._buffer.endswith(b"\n"):
            return None
        line, self._buffer = self._buffer, b""
        answer = json.loads(line)
        if answer.get("spent"):
            self.kill()
        return answer

    def expire(self) -> dict:
        self.kill()
        return {"error": f"no answer within {self._limit}"}

    def kill(self) -> None:
        """End the child and whatever it started, its process group; before the child is reaped, its id is its own."""
        if not self.killed:
            self.killed = True
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            for pipe in (self._stdin, self._stdout):
                try:
                    pipe.close()
                except BrokenPipeError:
                    pass


def _answers(workers: list[_Worker]) -> list[tuple[_Worker, dict]]:
    """Wait for the first answers or deadlines among workers that all have a call running."""
    with selectors.DefaultSelector() as selector:
        for worker in workers:
            selector.register(worker, selectors.EVENT_READ, worker)
        while True:
            now = time.monotonic()
            ready = selector.select(max(0.0, min(w.deadline for w in workers) - now))
            done = [(key.data, answer) for key, _ in ready if (answer := key.data.receive()) is not None]
            answered = {worker for worker, _ in done}
            now = time.monotonic()
            done += [(w, w.expire()) for w in workers if w not in answered and w.deadline <= now]
            if done:
                return done
