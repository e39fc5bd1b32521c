"""Single requests to a pool's engines, thousands at once, from one asyncio loop in a thread of its own.

    complete    waits for a place (engine.max_running_requests in each engine, the least busy first, in the order of the
                requests' numbers), asks, and asks again elsewhere where the engine fails meanwhile
    run, start, wait   coroutines that call it, from the thread that owns the engines
    run_in_turns       conversations of deterministic runs: their requests are asked in batches

An engine that failed is restarted in another thread while the others go on. Where no engine has weights, requests wait
for the next update: `wait` raises WeightsLost then, and may be called again when it has come.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Generic, TypeVar

import aiohttp
import numpy as np

from fp8slurm.engine.client import GenerateRequest, Generation
from fp8slurm.engine.pool import DYING_S, EnginePool, M, WeightsLost
from fp8slurm.engine.server import EngineError

log = logging.getLogger(__name__)

T = TypeVar("T")
Complete = Callable[[GenerateRequest], Awaitable[Generation]]
Session = Callable[[Complete], Awaitable[T]]
"""A conversation or anything else that asks an engine several times, one after the other."""
IDLE_CONNECTION_S = 2.0
"""Below the 5 s after which SGLang's server closes one: a request on a connection that is being closed would fail."""


class Completions(Generic[M]):
    """Of one pool. All but `complete` are called from the pool's own thread, and no work is given to
    the pool in another way while requests are on their way (EnginePool.ask)."""

    def __init__(self, pool: EnginePool[M]) -> None:
        self.pool = pool
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="completions", daemon=True)
        self._http: aiohttp.ClientSession | None = None
        self._waiting: list[tuple[int, int, asyncio.Future[M | None]]] = []
        """A heap: (number of the request, how many were asked before it, who waits)."""
        self._asked = 0
        self._failed: dict[M, EngineError] = {}
        self._restarting = False
        self._error: BaseException | None = None
        self._watch = ExitStack()
        self.stopping = False
        """Whether requests that the engines abort are to end with the tokens so far."""
        self._aborts, self._aborting = 0, False
        """Updates that aborted what ran; whether one does."""
        self._busy_s = self._idle_s = 0.0
        self._counted = time.monotonic()

    # -- from the thread that owns the engines -------------------------------------------------------------------

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Have `work`, which may call `complete`, run in the loop."""
        if not self._thread.is_alive():
            self._thread.start()
            self._watch.enter_context(self.pool.watched())
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def wait(self, work: Future[T]) -> T:
        """Its result. WeightsLost: no engine has weights; `work` goes on behind the next update."""
        while True:
            try:
                return work.result(timeout=0.5)
            except TimeoutError:
                if work.done():  # its own
                    raise
            self.check()

    def check(self) -> None:
        """WeightsLost: no engine has weights, and requests go on only behind the next update."""
        if self._error is None and not self._restarting and all(m.behind for m in self.pool.members):
            raise WeightsLost

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """start and wait; where the wait ends with an exception `work` is cancelled."""
        future = self.start(work)
        try:
            return self.wait(future)
        except BaseException:
            future.cancel()
            raise

    def interrupted(self) -> None:
        """An update is about to abort what runs: all that is answered so until it is over goes on behind it."""
        self._aborting = True

    def updated(self) -> None:
        """Engines have new weights."""
        self._aborts, self._aborting = self._aborts + self._aborting, False
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._hand_out)

    def stop(self, work: Future[Any]) -> None:
        """Have all engines end what they work on: requests return with the tokens so far, "abort" for a reason, and
        `work` is waited for. Those that wait for a place end with none."""
        self.stopping = True
        try:
            while not work.done():
                for member in self.pool.members:
                    if member.busy and member.client is not None:
                        try:
                            member.client.abort_all()
                        except EngineError as error:  # its requests fail, and end with nothing
                            log.debug("%s: %s", member.title, error)
                self._loop.call_soon_threadsafe(self._turn_away)
                try:
                    work.result(timeout=0.2)
                except TimeoutError:
                    if work.done():
                        raise
        finally:
            self.stopping = False

    def close(self) -> None:
        """End the loop, and what runs in it."""
        if not self._thread.is_alive():
            return
        self._watch.close()

        async def end() -> None:
            if self._http is not None:
                await self._http.close()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(timeout=10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)

    def idle_share(self) -> float:
        """Share of the engines' places that were empty since this was last asked, over time."""
        self._count()
        busy, idle = self._busy_s, self._idle_s
        self._busy_s = self._idle_s = 0.0
        return idle / (busy + idle) if busy + idle else 0.0

    # -- in the loop ---------------------------------------------------------------------------------------------

    async def complete(self, request: GenerateRequest, number: int | None = None) -> Generation:
        """The response. number: requests with lower ones get free places first; left out: in the order of asking.

        EngineError: an engine cannot be kept alive; InputError: the request is refused.
        """
        order = (self._asked if number is None else number, self._asked)
        self._asked += 1
        whole: Generation | None = None
        while True:
            aborts = self._aborts
            part = await self._ask(continued(request, whole), order)
            if request.routing and part.routing is None:  # aborted while it waited: they could not be replayed
                part = replace(part, token_ids=[], logprobs=[], weight_versions=[])
            whole = part if whole is None else joined(whole, part)
            if whole.finish_reason != "abort" or self.stopping or (aborts == self._aborts and not self._aborting):
                return whole

    async def _ask(self, request: GenerateRequest, order: tuple[int, int]) -> Generation:
        while True:
            if self.stopping:
                return nothing()
            member = await self._place(order)
            if member is None:
                return nothing()
            client = member.client
            assert client is not None and self._http is not None
            try:
                generation = await client.complete(self._http, request)
            except EngineError as error:
                if member.client is client:
                    self._fail(member, error)
            else:
                member.answers += 1
                member.done()
                return generation
            finally:
                self._free(member)

    def _free(self, member: M) -> None:
        self._count()
        member.busy -= 1
        self._hand_out()

    async def _place(self, order: tuple[int, int]) -> M | None:
        """An engine, with one more request on its way; None: there is to be none any more (`stop`)."""
        if self._http is None:
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_CONNECTION_S)
            self._http = aiohttp.ClientSession(connector=connector)
        got: asyncio.Future[M | None] = self._loop.create_future()
        heapq.heappush(self._waiting, (*order, got))
        self._hand_out()
        try:
            return await got
        except asyncio.CancelledError:
            if got.done() and not got.cancelled() and (member := got.result()) is not None:
                self._free(member)
            raise

    def _hand_out(self) -> None:
        """Free places to those that wait."""
        while self._waiting:
            *_, got = self._waiting[0]
            if got.done():
                heapq.heappop(self._waiting)
                continue
            if self._error is not None:
                heapq.heappop(self._waiting)
                got.set_exception(self._error)
                continue
            member = min(self._ready(), key=lambda m: m.busy, default=None)
            if member is None:
                return
            heapq.heappop(self._waiting)
            self._count()
            member.take(1)
            got.set_result(member)

    def _ready(self) -> list[M]:
        most = self.pool.section.max_running_requests
        return [m for m in self.pool.members if not m.behind and m not in self._failed and m.busy < most]

    def _turn_away(self) -> None:
        for *_, got in self._waiting:
            if not got.done():
                got.set_result(None)
        self._waiting = []

    def _count(self) -> None:
        now, most = time.monotonic(), self.pool.section.max_running_requests
        passed, self._counted = now - self._counted, now
        busy = sum(min(m.busy, most) for m in self.pool.members)
        self._busy_s += passed * busy
        self._idle_s += passed * (most * len(self.pool.members) - busy)

    # -- engines that fail ---------------------------------------------------------------------------------------

    def _fail(self, member: M, error: EngineError) -> None:
        if member not in self._failed:
            self._failed[member] = error
            if not self._restarting:
                self._restarting = True
                self._restarts = self._loop.create_task(self._restart())

    async def _restart(self) -> None:
        """Restart what has failed, all at once, and what fails meanwhile after it."""
        try:
            while self._failed:
                failed = dict(self._failed)
                clients = {m: m.client for m in failed}
                await asyncio.to_thread(self._restart_these, failed, clients)
                if self.pool.stopped:
                    raise EngineError("the engines were ended with work left")
                for member in failed:
                    del self._failed[member]
                self._hand_out()
        except BaseException as error:
            self._error = error
            self._hand_out()
        finally:
            self._restarting = False

    def _restart_these(self, failed: dict[M, EngineError], clients: dict[M, Any]) -> None:
        for member in failed:
            if not member.engine.wait_exit(DYING_S):  # a broken answer: end its other requests too
                member.engine.stop()
        with self.pool.control:  # an update under way restarts it itself
            self.pool.restart_failed({m: e for m, e in failed.items() if m.client is clients[m]})


async def run_in_turns(
    sessions: Sequence[Session[T]], generate: Callable[[list[GenerateRequest]], list[Generation]]
) -> list[T | Exception]:
    """What each session returns, or the exception that it raises, in their order, where nothing depends on a clock:
    once every session that is not over waits for an answer, all requests that wait are one batch, in the order of their
    sessions. `generate` computes it, in another thread. EngineError, InputError: as Completions.complete.

    A session may ask for several answers at once (asyncio.gather). One that waits for something else, such as a tool,
    holds the batch up; one that does both at the same time is not reproducible.
    """
    turns = _Turns(generate, len(sessions))

    async def follow(number: int, session: Session[T]) -> T:
        try:
            return await session(lambda request: turns.complete(number, request))
        finally:
            turns.over(number)

    done = await asyncio.gather(*(follow(n, s) for n, s in enumerate(sessions)), return_exceptions=True)
    return _checked(done, turns.error)


class _Turns:
    def __init__(self, generate: Callable[[list[GenerateRequest]], list[Generation]], sessions: int) -> None:
        self.generate = generate
        self._live = set(range(sessions))
        self._thread = ThreadPoolExecutor(1, "turns")  # the loop's own threads are the sessions'
        self._waiting: list[tuple[int, GenerateRequest, asyncio.Future[Generation]]] = []
        self._batch: asyncio.Task[None] | None = None
        self.error: BaseException | None = None

    async def complete(self, number: int, request: GenerateRequest) -> Generation:
        if self.error is not None:
            raise self.error
        got: asyncio.Future[Generation] = asyncio.get_running_loop().create_future()
        self._waiting.append((number, request, got))
        self._look()
        return await got

    def over(self, number: int) -> None:
        self._live.discard(number)
        self._look()

    def _look(self) -> None:
        asyncio.get_running_loop().call_soon(self._begin)  # behind whatever else a session asks at once

    def _begin(self) -> None:
        self._waiting = [entry for entry in self._waiting if not entry[2].done()]  # one may have been given up
        if self._batch is not None or not self._waiting or {n for n, *_ in self._waiting} < self._live:
            return
        batch, self._waiting = sorted(self._waiting, key=lambda entry: entry[0]), []  # stable: as a session asked
        self._batch = asyncio.get_running_loop().create_task(self._compute(batch))

    async def _compute(self, batch: list[tuple[int, GenerateRequest, asyncio.Future[Generation]]]) -> None:
        try:
            requests = [request for _, request, _ in batch]
            done = await asyncio.get_running_loop().run_in_executor(self._thread, self.generate, requests)
        except BaseException as error:
            self.error = error
            for *_, got in (*batch, *self._waiting):
                if not got.done():
                    got.set_exception(error)
        else:
            for (*_, got), generation in zip(batch, done, strict=True):
                if not got.done():
                    got.set_result(generation)
        self._batch = None
        self._look()


def _checked(done: list[Any], error: BaseException | None) -> list[Any]:
    """The sessions' own results and exceptions; what went wrong with the engines, or ends everything, is raised."""
    if error is not None:
        raise error
    for one in done:
        if isinstance(one, BaseException) and not isinstance(one, Exception):
            raise one
    return done


# -- responses in parts ------------------------------------------------------------------------------------------


def nothing() -> Generation:
    """What a request has that no engine has begun."""
    return Generation([], [], "abort", [])


def continued(request: GenerateRequest, so_far: Generation | None) -> GenerateRequest:
    """The request for the rest of a response of which there are tokens already."""
    if so_far is None or not so_far.token_ids:
        return request
    ids = [*request.token_ids, *so_far.token_ids]
    return replace(request, token_ids=ids, max_tokens=request.max_tokens - len(so_far.token_ids))


def joined(first: Generation, rest: Generation) -> Generation:
    """A response in two parts, `rest` the answer to `continued` behind `first`, as one: every token keeps the
    log-probability, the version and the experts that it was sampled with."""
    routing = rest.routing
    if not rest.token_ids:
        routing = first.routing
    elif routing is not None and first.routing is not None:
        # of all tokens but the last: as the first part has them, then of its last token and what follows
        routing = np.concatenate([first.routing, routing[first.routing.size :]])
    return Generation(
        [*first.token_ids, *rest.token_ids],
        [*first.logprobs, *rest.logprobs],
        rest.finish_reason,
        [*first.weight_versions, *rest.weight_versions],
        routing,
    )
