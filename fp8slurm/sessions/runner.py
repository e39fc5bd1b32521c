"""Runs rollout.generate: many conversations at a time, on one event loop in a thread of its own.

A function of the user's may await whatever it likes, such as a tool. It has rollout.tool_timeout_s between two turns;
one that takes longer, or raises, ends its conversation, and no other. One that blocks the loop holds all of them up:
it is named with the line that it stands in, and ends the run.

With run.deterministic the turns of all conversations are asked for in batches (engine/completions.py, run_in_turns).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import logging
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from fp8slurm.config.schema import RolloutSection
from fp8slurm.core.errors import InputError, bounded
from fp8slurm.core.types import NOT_GENERATED, Prompt, Sample
from fp8slurm.core.user_code import is_user_function, load_user_function
from fp8slurm.engine import completions as turns
from fp8slurm.engine.client import GenerateRequest, Generation
from fp8slurm.sessions.endpoint import Endpoint
from fp8slurm.sessions.session import Model, Session

log = logging.getLogger(__name__)

FLAG = "--rollout.generate"
POLL_S = 0.5
"""How often the loop is asked whether it turns."""
CLOSE_S = 5.0
THREADS = 64
"""Calls of asyncio.to_thread that go on at a time. Python's own limit is the cores and four."""
WARNINGS = 5
"""Failed conversations that are logged one by one in each converse(); all are counted."""

Generate = Callable[[Session, Prompt], Awaitable[Sample | list[Sample]]]
Batch = Callable[[list[GenerateRequest]], list[Generation]]


class Complete(Protocol):
    """One turn, awaited on the sessions' loop; those with lower numbers come first where there is no room for all."""

    def __call__(self, request: GenerateRequest, number: int) -> Awaitable[Generation]: ...


class SessionError(RuntimeError):
    """rollout.generate raised, took too long, blocked, or returned something else than samples."""


def load_generate(name: str, flag: str = FLAG) -> Generate:
    """The function that rollout.generate names. InputError: there is none, or it is not async."""
    if not is_user_function(name):
        raise InputError(f"{flag} {name!r}: allowed: module:function")
    function = load_user_function(name, flag, "session", "prompt")
    if not (inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)):
        raise InputError(f"{flag} {name} is not async; allowed: async def {name.partition(':')[2]}(session, prompt)")
    return function


@dataclass(frozen=True)
class Asked:
    """One conversation that is to be had."""

    prompt: Prompt
    number: int
    """Which of the prompt's conversations."""
    request: GenerateRequest
    """Its first turn's, whose max_tokens are those of all turns."""


@dataclass(eq=False)
class _Conversation:
    """One that goes on."""

    asked: Asked
    order: int
    over: asyncio.Future[list[Sample] | str] = field(init=False)
    session: Session | None = None
    outcome: list[Sample] | str | None = None
    """Its samples, or why there are none."""
    waiting: int = 0
    """Turns that it has asked for."""
    limit: asyncio.TimerHandle | None = None
    """Ends it where it takes too long between two turns."""


class SessionRunner:
    """Conversations of a rollout worker or an evaluation. converse() from one thread at a time; close() at the end."""

    def __init__(
        self, section: RolloutSection, model: Model, heartbeat: Callable[[], None] = lambda: None
    ) -> None:  # fmt: skip
        """section: generate, on_error and tool_timeout_s. heartbeat: called while functions of the user's work, which
        have a time limit. InputError: as load_generate."""
        assert section.generate is not None
        self.section, self.model, self.heartbeat = section, model, heartbeat
        self.function = load_generate(section.generate)
        self.failures = 0
        """Conversations that failed since the start and were left out."""
        self._endpoint: Endpoint | None = None
        self._loop = asyncio.new_event_loop()
        self._loop.set_default_executor(concurrent.futures.ThreadPoolExecutor(THREADS, "tools"))
        self._thread = threading.Thread(target=self._loop.run_forever, name="sessions", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the loop. A function that blocks it stays until the process ends."""
        if self._endpoint is not None:
            closed = asyncio.run_coroutine_threadsafe(self._endpoint.close(), self._loop)
            concurrent.futures.wait([closed], CLOSE_S)
        self._loop.call_soon_threadsafe(self._loop.stop)

    def reach(self, session: Session) -> tuple[str, str]:
        """Address and key of a session at the endpoint, which starts with the first that asks."""
        if self._endpoint is None:
            self._endpoint = Endpoint(self._loop)
        return self._endpoint.url, self._endpoint.open(session)

    def leave(self, session: Session) -> None:
        """It is over, and its key with it."""
        if self._endpoint is not None and session.reached:
            self._endpoint.shut(session.api_key)

    def converse(
        self, asked: Sequence[Asked], complete: Complete | None = None, batch: Batch | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> list[list[Sample]]:  # fmt: skip
        """The samples of every conversation, in their order. complete: answers one turn; batch, in its place: turns of
        all conversations at once, from a thread. check: called now and then; ends all of them by what it raises.

        Raises SessionError: one failed with rollout.on_error "error", or the loop is blocked; what the engines raise.
        With "leave_out" a conversation that failed has its turns so far, `error` and `train` False.
        """
        if not asked:
            return []
        work = _Work(self, asked, complete, batch)
        done = asyncio.run_coroutine_threadsafe(work.run(), self._loop)
        probe, turned = threading.Event(), time.monotonic()
        self._loop.call_soon_threadsafe(probe.set)
        try:
            while not concurrent.futures.wait([done], POLL_S).done:
                check()
                if probe.is_set():
                    probe, turned = threading.Event(), time.monotonic()
                    self._loop.call_soon_threadsafe(probe.set)
                    if work.functions_at_work:
                        self.heartbeat()
                elif time.monotonic() - turned > self.section.tool_timeout_s:
                    raise SessionError(self._blocked())
        except BaseException:
            done.cancel()  # nobody waits for the conversations any more
            raise
        return self._settle(asked, done.result())

    def _blocked(self) -> str:
        assert self._thread.ident is not None
        frames = traceback.extract_stack(sys._current_frames().get(self._thread.ident))
        where = "; ".join(f"{f.filename}:{f.lineno} in {f.name}" for f in frames[-3:])
        return (
            f"{FLAG} {self.section.generate} has blocked the event loop of all conversations for "
            f"{self.section.tool_timeout_s:g} s (rollout.tool_timeout_s), at {where}. It must await what takes time: "
            f"await asyncio.to_thread(tool, ...) for a function that blocks"
        )

    def _settle(self, asked: Sequence[Asked], outcomes: list[tuple[list[Sample], str]]) -> list[list[Sample]]:
        """outcomes: the samples of each conversation, and why it failed or ""."""
        failed = [(one, reason) for one, (_, reason) in zip(asked, outcomes) if reason]
        for one, reason in failed[:WARNINGS]:
            log.warning("%s; left out", self.told(one, reason))
        if len(failed) > WARNINGS:
            log.warning("%s failed in %d conversations, which are left out", self.section.generate, len(failed))
        self.failures += len(failed)
        return [samples for samples, _ in outcomes]

    def told(self, one: Asked, reason: str) -> str:
        """What failed, and why."""
        of = f" of source {one.prompt.source}" if one.prompt.source else ""
        return f"{FLAG} {self.section.generate} on prompt {one.prompt.index}{of}, sample {one.number}: {reason}"


class _Work:
    """The conversations of one converse(); all of it on the loop."""

    def __init__(
        self, runner: SessionRunner, asked: Sequence[Asked], complete: Complete | None, batch: Batch | None
    ) -> None:
        self.runner, self._complete, self._batch = runner, complete, batch
        self._held = [_Conversation(one, order) for order, one in enumerate(asked)]
        self.functions_at_work = False
        """Some function of the user's is not waiting for an engine."""
        self._at_work: set[_Conversation] = set()

    async def run(self) -> list[tuple[list[Sample], str]]:
        """The samples of each conversation, and why it failed or ""."""
        loop = asyncio.get_running_loop()
        self._broken: asyncio.Future[None] = loop.create_future()
        work = loop.create_task(self._in_turns() if self._batch is not None else self._at_once())
        try:
            await asyncio.wait({work, self._broken}, return_when=asyncio.FIRST_COMPLETED)
            if self._broken.done():
                self._broken.result()
            work.result()
        finally:
            work.cancel()
        return [self._samples(one) for one in self._held]

    async def _in_turns(self) -> None:
        assert self._batch is not None

        def of(one: _Conversation) -> turns.Session[None]:
            return lambda complete: self._converse(one, complete)

        await turns.run_in_turns([of(one) for one in self._held], self._batch)

    async def _at_once(self) -> None:
        def of(one: _Conversation) -> turns.Complete:
            assert self._complete is not None
            return partial(self._complete, number=one.order)

        await asyncio.gather(*(self._converse(one, of(one)) for one in self._held))

    async def _converse(self, one: _Conversation, complete: turns.Complete) -> None:
        """One conversation, until it has ended or its time is over: what goes on behind that is nobody's."""
        loop, asked = asyncio.get_running_loop(), one.asked
        one.over = loop.create_future()
        ask = partial(self._ask, one, complete)
        session = Session(asked.prompt, asked.number, asked.request, self.runner.model, ask, self.runner.reach)
        one.session = session
        self._start_clock(one)
        task = loop.create_task(self._hold(one, session))
        try:
            one.outcome = await one.over
        finally:
            self._stop_clock(one)
            self.runner.leave(session)
            task.cancel()

    async def _hold(self, one: _Conversation, session: Session) -> None:
        try:
            made = await self.runner.function(session, one.asked.prompt)
            outcome: list[Sample] | str = checked(made, one.asked.number)
        except asyncio.CancelledError:
            outcome = "it was cancelled"
        except BaseException as error:  # noqa: BLE001 - whatever the user's function raises
            outcome = f"{type(error).__name__}: {bounded(str(error))}{_place(error)}"
        self._end(one, outcome)

    def _end(self, one: _Conversation, outcome: list[Sample] | str) -> None:
        if one.over.done():
            return
        if isinstance(outcome, str) and self.runner.section.on_error == "error":
            hint = 'rollout.on_error = "leave_out" leaves such a conversation out'
            self._break(SessionError(f"{self.runner.told(one.asked, outcome)}. {hint}"))
        one.over.set_result(outcome)

    def _break(self, error: BaseException) -> None:
        """End all conversations."""
        if not self._broken.done():
            self._broken.set_exception(error)

    async def _ask(self, one: _Conversation, complete: turns.Complete, request: GenerateRequest) -> Generation:
        """A turn. What an engine raises ends all conversations, whatever the user's function does with it."""
        if one.over.done():
            raise SessionError("this conversation is over")
        if not one.waiting:
            self._stop_clock(one)
        one.waiting += 1
        try:
            return await complete(request)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self._break(error)
            await asyncio.get_running_loop().create_future()  # until it is cancelled
            raise
        finally:
            one.waiting -= 1
            if not one.waiting and not one.over.done():
                self._start_clock(one)

    def _samples(self, one: _Conversation) -> tuple[list[Sample], str]:
        assert one.session is not None and one.outcome is not None
        if not isinstance(one.outcome, str):
            return one.outcome, ""
        samples = one.session.samples() or [Sample([], [], [], "error", rollout=one.asked.number)]
        for sample in samples:
            sample.train, sample.finish_reason, sample.error = False, "error", one.outcome
        return samples, one.outcome

    def _start_clock(self, one: _Conversation) -> None:
        seconds = self.runner.section.tool_timeout_s
        why = f"no turn and no end within {seconds:g} s (rollout.tool_timeout_s)"
        one.limit = asyncio.get_running_loop().call_later(seconds, self._end, one, why)
        self._at_work.add(one)
        self.functions_at_work = True

    def _stop_clock(self, one: _Conversation) -> None:
        if one.limit is not None:
            one.limit.cancel()
        self._at_work.discard(one)
        self.functions_at_work = bool(self._at_work)


def through(completions: turns.Completions[Any]) -> Complete:
    """Turns from the pool's own loop: a function that blocks the sessions' does not hold up engines."""

    def complete(request: GenerateRequest, number: int) -> Awaitable[Generation]:
        return asyncio.wrap_future(completions.start(completions.complete(request, number)))

    return complete


def _place(error: BaseException) -> str:
    """Where a function of the user's raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""


def checked(made: object, number: int) -> list[Sample]:
    """What a function of the user's returned, as samples of conversation `number`. ValueError: something else."""
    samples = [made] if isinstance(made, Sample) else made
    if not isinstance(samples, list) or not samples or not all(isinstance(s, Sample) for s in samples):
        raise ValueError(f"it returned {made!r:.80}, no Sample and no list of Samples (session.sample(), .samples())")
    for s in samples:
        lists = (s.logprobs, s.weight_versions, *(() if s.loss_mask is None else (s.loss_mask,)))
        if any(len(values) != len(s.response_ids) for values in lists):
            raise ValueError("it returned a Sample whose logprobs, weight_versions and loss_mask are not one a token")
        mask = [True] * len(s.response_ids) if s.loss_mask is None else s.loss_mask
        if any(m and version == NOT_GENERATED for m, version in zip(mask, s.weight_versions)):
            raise ValueError("it returned a Sample that trains on tokens which no engine generated (loss_mask)")
        s.rollout = number
    return samples
