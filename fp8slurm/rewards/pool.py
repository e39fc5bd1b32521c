"""Rewards: our own are computed here, math and users' functions in child processes that no hanging call outlives."""

from __future__ import annotations

import json
import logging
import os
import selectors
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fp8slurm.config.schema import RewardSection
from fp8slurm.core.errors import InputError, TransientInputError, bounded
from fp8slurm.core.processes import kill_group, python_path
from fp8slurm.rewards.graders import answer_part, choice, digits, exact, numeric
from fp8slurm.rewards.signature import MATH, OF_SAMPLE, Form, is_answer
from fp8slurm.rewards.worker import no_answer

if TYPE_CHECKING:  # torch, which a task that reads its tasks of evaluation has not imported yet
    from fp8slurm.core.types import Sample, SampleGroup

log = logging.getLogger(__name__)

START_LIMIT_S = 120.0
"""Time for a child to start and to import the reward function."""
NO_START = f"no answer within {START_LIMIT_S:g} s (to start)"
WARNINGS = 5
"""Failed calls that are logged one by one in each score(); all are counted."""
HEARTBEAT_S = 1.0
"""Least time between two heartbeats of score()."""
GRACE_S = 1.0
"""Time for an async function's process to say itself that a call has taken too long."""


class RewardError(RuntimeError):
    """A reward function raised, hung or returned no finite number."""


OWN = {"exact": exact, "numeric": numeric, "choice": choice}
"""Kinds that are computed here; `digits`, with its weight, is too."""
GENERATE = "generate"
"""The kind that keeps what rollout.generate gave its samples."""
SEARCHING = ("numeric", "choice", "math")
"""Kinds that look for the answer in a response."""
MATH_MEMORY_MIB = 2048
MOST_ANSWER_BYTES = 1 << 26
START = -1
"""Number of a child's first answer, which is to no call."""


def check_kind(kind: str, flag: str = "--reward.kind") -> None:
    """InputError: no such kind of reward."""
    if kind not in (*OWN, "digits", "math", GENERATE) and not all(kind.partition(":")):
        raise InputError(f"{flag} {kind!r} is not one of {', '.join(OWN)}, digits, math, generate, module:function")


class RewardPool:
    """Scores groups by `reward.kind`; a context manager.

    `exact`, `digits`, `numeric` and `choice` need no process. The others have `workers` of them, one call at a time in
    each; an async function has one, with reward.concurrency calls at a time. Each call has reward.timeout_s seconds,
    after which its child is killed and replaced, and each child has reward.memory_mib of address space. InputError:
    the kind is unknown, or its function cannot be imported or asks for what there is not (signature.py).
    """

    def __init__(self, reward: RewardSection, workers: int | None = None) -> None:
        """workers: reward.workers where it is left out, or 2."""
        check_kind(reward.kind)
        self.reward = reward
        self.failures = 0
        """Calls that failed since the start and counted as 0."""
        self._workers: list[_Worker] = []
        self._form = MATH
        if reward.kind not in (*OWN, "digits", GENERATE):
            try:
                self._start(workers if workers is not None else reward.workers or 2)
            except BaseException:
                self.close()
                raise

    def _start(self, workers: int) -> None:
        memory_mib = self.reward.memory_mib
        if memory_mib is None:
            memory_mib = MATH_MEMORY_MIB if self.reward.kind == "math" else 0
        for _ in range(workers):
            self._workers.append(_Worker(self.reward.kind, memory_mib))
        for worker in self._workers:
            self._form = worker.wait_ready()
        if self._form.asynchronous:
            for spare in self._workers[1:]:
                spare.kill()
            del self._workers[1:]

    def score(self, groups: list[SampleGroup], heartbeat: Callable[[], None] = lambda: None) -> None:
        """Fill in `reward` of every sample. `heartbeat` is called now and then as answers come in: there is
        a deadline for each, not for all of them.

        A user's function that fails is a RewardError, which names function, prompt, sample and reason. With
        reward.on_error "zero", and always for math, where the response is to blame, the sample gets 0, is counted in
        `failures`, and the first few are logged.

        Of a conversation's branches the last one is scored, and the others get the same; one that failed gets 0.
        """
        last = {id(g): [r[-1] for r in g.rollouts if g.samples[r[-1]].finish_reason != "error"] for g in groups}
        calls = [_Call(g, [i]) for g in groups for i in last[id(g)]]
        if self.reward.kind in OWN:
            for group, sample in ((c.group, s) for c in calls for s in c.samples):
                sample.reward = OWN[self.reward.kind](self._text(group, sample), group.prompt.label)
        elif self.reward.kind == "digits":
            for group, sample in ((c.group, s) for c in calls for s in c.samples):
                sample.reward = digits(sample.text, group.prompt.label, self.reward.digits_weight)
        elif self.reward.kind != GENERATE:
            if self._form.group:
                calls = [_Call(g, last[id(g)]) for g in groups if last[id(g)]]
            self._score_in_workers(calls, heartbeat)
        for group in groups:
            for *others, i in group.rollouts:
                for branch in others:
                    group.samples[branch].reward = group.samples[i].reward

    @property
    def takes_groups(self) -> bool:
        """Whether it is called once for all samples of a prompt."""
        return self._form.group

    def _text(self, group: SampleGroup, sample: Sample) -> str:
        """What the function is given: the whole response, or of a kind that looks for an answer in it, answer_part."""
        if self.reward.kind not in SEARCHING:
            return sample.text
        return answer_part(sample.text, group.prompt.thinking, sample.finish_reason == "length")

    def _score_in_workers(self, calls: list[_Call], heartbeat: Callable[[], None]) -> None:
        waiting, failed, last_heartbeat = deque(range(len(calls))), 0, time.monotonic()
        at_once = self.reward.concurrency if self._form.asynchronous else 1
        try:
            while waiting or any(w.pending for w in self._workers):
                for worker in self._workers:
                    while waiting and len(worker.pending) < at_once:
                        worker.revive()
                        number = waiting.popleft()
                        worker.send(number, self._request(calls[number]), self._form, self.reward.timeout_s)
                answers = _answers([w for w in self._workers if w.pending])
                if time.monotonic() - last_heartbeat > HEARTBEAT_S:
                    last_heartbeat = time.monotonic()
                    heartbeat()
                for number, answer in answers:
                    if answer.get("lost"):
                        waiting.append(number)
                        continue
                    call = calls[number]
                    for i, reason in _take(call.samples, answer):
                        failed += 1
                        self._fail(call.group, call.numbers[i], reason, failed)
        finally:
            for worker in self._workers:
                if worker.pending:  # only after an error: their answers are not wanted any more
                    worker.end()
        if failed > WARNINGS:
            log.warning("reward function %s failed %d times, counted as 0", self.reward.kind, failed)

    def _request(self, call: _Call) -> dict[str, Any]:
        """What the function asks for of these samples (signature.py)."""
        prompt, names = call.group.prompt, self._form.names
        given: dict[str, Any] = {
            "label": prompt.label, "prompt": prompt.content, "row": prompt.row, "prompt_ids": prompt.token_ids,
            "source": prompt.source,
        }  # fmt: skip
        for name, plural in OF_SAMPLE.items():
            if name in names or plural in names:
                texts = {"response": lambda s: self._text(call.group, s)}
                values = [texts.get(name, lambda s: getattr(s, name))(s) for s in call.samples]
                given |= {name: values[0], plural: values}
        return {"arguments": {name: given[name] for name in names}, "samples": len(call.numbers)}

    def _fail(self, group: SampleGroup, i: int, reason: str, failed: int) -> None:
        of = f" of source {group.prompt.source}" if group.prompt.source else ""
        what = (
            f"reward function {self.reward.kind} on prompt {group.prompt.index}{of}, sample {group.first + i}: {reason}"
        )
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


@dataclass(frozen=True)
class _Call:
    """One call of the function: for one sample, or for all of a prompt."""

    group: SampleGroup
    numbers: Sequence[int]
    """Which samples of the group."""

    @property
    def samples(self) -> list[Sample]:
        return [self.group.samples[i] for i in self.numbers]


def _take(samples: list[Sample], answer: dict[str, Any]) -> list[tuple[int, str]]:
    """Give the samples what the answer to their call says: (which, why) of those that it fails, the first where the
    whole call failed. They get 0."""
    each = answer.get("samples", [answer] * len(samples))
    if len(each) != len(samples):
        return _take(samples, {"error": f"{len(each)} answers for {len(samples)} samples"})
    failed: list[tuple[int, str]] = [] if "error" not in answer else [(0, answer["error"])]
    for i, (sample, scored) in enumerate(zip(samples, each)):
        mask, tokens = scored.get("loss_mask"), len(sample.response_ids)
        if mask is not None and len(mask) != tokens:
            scored = {"error": f"returned a loss mask of {len(mask)} for {tokens} response_ids"}
        sample.reward, sample.parts = scored.get("reward", 0.0), scored.get("parts", {})
        if mask is not None and "error" not in scored:  # what a tool said stays masked
            own = sample.loss_mask or [True] * tokens
            sample.loss_mask = [a and b for a, b in zip(own, mask)]
        if "error" in scored and "error" not in answer:
            failed.append((i, scored["error"]))
    return failed


class _Worker:
    """One child, and the calls that it was sent."""

    def __init__(self, kind: str, memory_mib: int) -> None:
        self.kind, self.memory_mib = kind, memory_mib
        self.loaded = False
        """It could be imported once: if it cannot the next time, that is no fault of the user's."""
        self.pending: dict[int, float] = {}
        """Deadlines of the calls that have no answer yet, by number."""
        self._start()

    def _start(self) -> None:
        self.killed = False
        self._buffer = b""
        self.pending, self._limit = {START: time.monotonic() + START_LIMIT_S}, NO_START
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "fp8slurm.rewards.worker", self.kind, str(self.memory_mib)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": python_path()},
            start_new_session=True,
        )
        assert process.stdin is not None and process.stdout is not None
        self.process, self._stdin, self._stdout = process, process.stdin, process.stdout

    def revive(self) -> None:
        """Start anew after a kill."""
        if self.killed:
            self._start()
            self.wait_ready()

    def wait_ready(self) -> Form:
        """How the function is called. InputError: it cannot be loaded; TransientInputError: not now."""
        ((_, answer),) = _answers([self])
        if "ready" not in answer:
            for_good = answer.get("refused") and not self.loaded
            error = InputError if for_good else TransientInputError
            raise error(f"reward.kind {self.kind!r} cannot be loaded: {answer['error']}")
        self.loaded = True
        form = answer["form"]
        return Form(tuple(form["names"]), form["positional"], form["asynchronous"])

    def send(self, number: int, request: dict[str, Any], form: Form, limit_s: float) -> None:
        """Values of a row that JSON has no form for, such as dates, go as text."""
        line = json.dumps({"number": number, "limit_s": limit_s, **request}, default=str) + "\n"
        self.pending[number], self._limit = time.monotonic() + limit_s, no_answer(limit_s)
        if form.asynchronous:  # the child has a clock of its own, which can tell its calls apart
            self.pending[number] += GRACE_S
            self._limit = f"no answer within {limit_s:g} s: an async function must not block"
        try:
            self._stdin.write(line.encode())
            self._stdin.flush()
        except BrokenPipeError:
            pass  # it died; reading finds out

    def fileno(self) -> int:
        return self._stdout.fileno()

    def receive(self) -> list[tuple[int, dict[str, Any]]]:
        """The answers that are complete. A child that died, or wrote what is none (a function can), is an error answer
        to every call that it had."""
        data = os.read(self.fileno(), 1 << 16)
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        answers: list[tuple[int, dict[str, Any]]] = []
        broken = "" if len(self._buffer) <= MOST_ANSWER_BYTES else "it writes an answer without an end"
        for line in lines:
            answer = _parsed(line)
            if answer is None or answer.get("number", START) not in self.pending:
                broken = f"something else than its answer was written where that goes: {line[:80]!r}"
                break
            answers.append((answer.get("number", START), answer))
            del self.pending[answers[-1][0]]
        if not data or broken:
            self.kill()
            ended = {"error": broken or f"its process ended with status {self.process.returncode}"}
            answers += [(number, ended) for number in self.pending]
            self.pending = {}
        elif any(answer.get("spent") for _, answer in answers):
            answers += self.end()
        return answers

    def expire(self, now: float) -> list[tuple[int, dict[str, Any]]]:
        """Past a deadline: the process is ended."""
        late = [number for number, deadline in self.pending.items() if deadline <= now]
        for number in late:
            del self.pending[number]
        return [(number, {"error": self._limit}) for number in late] + self.end()

    def end(self) -> list[tuple[int, dict[str, Any]]]:
        """Kill it for one call's sake: the others are lost, and made again."""
        self.kill()
        lost = [(number, {"lost": True}) for number in self.pending]
        self.pending = {}
        return lost

    def kill(self) -> None:
        """End the child and whatever it started."""
        if not self.killed:
            self.killed = True
            kill_group(self.process)
            for pipe in (self._stdin, self._stdout):
                try:
                    pipe.close()
                except BrokenPipeError:
                    pass


def _parsed(line: bytes) -> dict[str, Any] | None:
    """An answer of worker.py; None: it is none."""
    try:
        answer = json.loads(line)
    except (ValueError, RecursionError):
        return None
    started = isinstance(answer, dict) and answer.get("ready") is True and isinstance(answer.get("form"), dict)
    if not started and not is_answer(answer):
        return None
    if "error" in answer:
        answer["error"] = bounded(answer["error"])
    return answer if type(answer.get("number", START)) is int else None


def _answers(workers: list[_Worker]) -> list[tuple[int, dict[str, Any]]]:
    """Wait for the first answers or deadlines among workers that all have a call running; numbers with answers."""
    with selectors.DefaultSelector() as selector:
        for worker in workers:
            selector.register(worker, selectors.EVENT_READ, worker)
        while True:
            first = min(min(w.pending.values()) for w in workers)
            done: list[tuple[int, dict[str, Any]]] = []
            for key, _ in selector.select(max(0.0, first - time.monotonic())):
                done += key.data.receive()
            now = time.monotonic()
            for worker in workers:
                if worker.pending and min(worker.pending.values()) <= now:
                    done += worker.expire(now)
            if done:
                return done
