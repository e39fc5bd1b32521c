"""Several engines that take work from one queue; one that fails is restarted, and its work is given to the others."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, Generic, Self, TypeVar

from fp8slurm.config.schema import EngineSection
from fp8slurm.engine.client import EngineClient, GenerateRequest, Generation
from fp8slurm.engine.server import Engine, EngineError
from fp8slurm.run.events import RESTART, record_event

log = logging.getLogger(__name__)

T = TypeVar("T")
POLL_S = 2.0
"""How often engines at work are asked how far they are."""
PAUSE_S = 0.05
"""Shorter pauses of an engine between two requests are not told."""
DYING_S = 2.0
"""A server whose connection broke may be about to end; after this it is taken to live on."""


class WeightsLost(Exception):
    """Work is left, and every engine that could do it runs with the weights of its checkpoint folder."""


class Member:
    """One engine of a pool."""

    def __init__(self, engine: Engine, title: str) -> None:
        self.engine, self.title = engine, title
        self.client: EngineClient | None = None
        """Of the server that runs now; a restarted one gets a new client."""
        self.failures = 0
        """In a row, without an answer in between: one that only comes back and takes its weights has not worked."""
        self.behind = False
        """It lost its weights: nothing may be asked of it until the next update."""
        self._busy, self._since = 0, 0.0
        self._spans: list[tuple[float, float]] = []
        self.answers = 0
        self._mark: tuple[Any, ...] | None = None
        self._moved = time.monotonic()

    @property
    def busy(self) -> int:
        """Requests on their way."""
        return self._busy

    @busy.setter
    def busy(self, requests: int) -> None:
        now = time.time()
        if requests and not self._busy:
            self._since = now
        elif self._busy and not requests:
            if self._spans and self._since - self._spans[-1][1] < PAUSE_S:
                self._since = self._spans.pop()[0]
            self._spans.append((self._since, now))
        self._busy = requests

    def take_spans(self) -> list[tuple[float, float]]:
        """When it had requests since this was last asked: begin and end, Unix seconds; what goes on is told later."""
        spans, self._spans = self._spans, []
        return spans

    def done(self) -> None:
        self.failures = 0
        self.moved()

    def moved(self) -> None:
        self._moved = time.monotonic()

    def take(self, requests: int) -> None:
        if not self.busy:
            self._moved = time.monotonic()
        self.busy += requests

    def has_moved(self) -> bool | None:
        """Whether the server has computed anything since this was last asked; None where it does not say."""
        assert self.client is not None
        try:
            mark = self.client.progress()
        except EngineError as error:  # too slow to answer, or gone: no sign of life
            log.debug("%s: %s", self.title, error)
            return False
        mark, tells = (*(mark or ()), self.answers), mark is not None
        moved, self._mark = mark != self._mark, mark
        if moved:
            self._moved = time.monotonic()
        return moved if moved or tells else None

    def silent_s(self) -> float:
        return time.monotonic() - self._moved


M = TypeVar("M", bound=Member)
"""What a pool's members are."""


class WorkQueue(Generic[T]):
    """What is to be answered in one call of EnginePool.ask: pieces of work, taken from the front."""

    def __init__(self, work: Sequence[list[T]], most: int, engines: int, one_by_one: bool) -> None:
        """most: requests that an engine can work on; one_by_one: an engine has one piece at a time."""
        self.waiting, self.left = deque(work), len(work)
        self.one_by_one, self._most = one_by_one, most
        # equal shares to begin with, so that no engine takes what another one has room for
        self._room = min(most, math.ceil(sum(map(len, work)) / engines))
        self.error: BaseException | None = None
        self.changed = threading.Condition()

    @property
    def over(self) -> bool:
        return self.error is not None or not self.left

    def take(self, busy: int) -> list[list[T]]:
        """The next pieces for an engine with `busy` requests on their way: a whole one where it has none."""
        pieces: list[list[T]] = []
        with self.changed:
            while self.waiting and not self.over:
                if busy and (self.one_by_one or busy + len(self.waiting[0]) > self._room):
                    break
                pieces.append(self.waiting.popleft())
                busy += len(pieces[-1])
        return pieces

    def give_back(self, pieces: Sequence[list[T]]) -> None:
        with self.changed:
            self.waiting.extendleft(reversed(pieces))
            self._room = self._most
            self.changed.notify_all()

    def answered(self) -> None:
        with self.changed:
            self.left -= 1
            self.changed.notify_all()

    def fail(self, error: BaseException) -> None:
        with self.changed:
            self.error = self.error or error
            self.changed.notify_all()

    def wait_for_work(self, timeout_s: float) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.waiting or self.over, timeout_s)


class EnginePool(Generic[M]):
    """Engines of one model on this machine. EngineError: one of them cannot be kept alive (engine.max_restarts)."""

    def __init__(
        self, members: Sequence[M], section: EngineSection, one_by_one: bool = False,
        on_progress: Callable[[], None] | None = None, silent_s: float = math.inf,
    ) -> None:  # fmt: skip
        """one_by_one: an engine computes one piece of work at a time, and nothing beside it. on_progress is called
        every POLL_S in which an engine has computed something. An engine that has work and computes nothing for
        silent_s is restarted."""
        self.members, self.section, self.one_by_one = list(members), section, one_by_one
        self.on_progress, self.silent_s = on_progress, silent_s
        self.restarts = 0
        self.control = threading.RLock()
        """Held by who changes what engines run with: an update, or a restart beside requests (completions.py)."""
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    @property
    def engines(self) -> list[Engine]:
        return [member.engine for member in self.members]

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # -- life ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start all of them, without waiting."""
        try:
            for engine in self.engines:
                engine.start()
        except BaseException:
            self.stop()
            raise

    def wait_ready(self) -> None:
        """Block until all of them answer. EngineError: one died while starting, or was too slow."""
        deadline = time.monotonic() + self.section.ready_timeout_s
        for member in self.members:
            member.engine.wait_ready(max(1.0, deadline - time.monotonic()))
            member.client = self.client(member.engine)

    def stop(self) -> None:
        """End all of them, and what waits for them."""
        self._stopped.set()
        for engine in self.engines:
            engine.stop()

    @property
    def stopped(self) -> bool:
        return self._stopped.is_set()

    def client(self, engine: Engine) -> EngineClient:
        return EngineClient(engine.url, engine.api_key, self.section.request_timeout_s)

    def restart_once(self, member: M) -> None:
        """Restart an engine that failed, with the weights that it should have. EngineError: it failed again."""
        member.engine.restart()
        member.client = self.client(member.engine)

    def restart(self, member: M, error: EngineError) -> None:
        """Restart an engine that failed with `error`, which is raised after engine.max_restarts failures in a row."""
        if member.engine.wait_exit(DYING_S):
            why = member.engine.obituary()
            error = EngineError(f"{error}; {why}") if why else error
        while not self._stopped.is_set():
            member.failures += 1
            if member.failures > self.section.max_restarts:
                raise error
            first, _, rest = str(error).partition("\n")
            more = f"\n{rest}" if rest else ""
            message = f"{member.title} failed ({first}); restart {member.failures}"
            log.warning("%s%s", message, more)
            record_event(RESTART, message)
            with self._lock:
                self.restarts += 1
            try:
                self.restart_once(member)
                if self._stopped.is_set():  # between its stop and its start
                    member.engine.stop()
                return
            except EngineError as again:
                error = again

    def each(self, work: Callable[[M], Any], members: Sequence[M] | None = None) -> dict[M, EngineError]:
        """Call work(member) for all members at once; what failed, and why. Other errors are raised."""
        chosen = self.members if members is None else list(members)
        with ThreadPoolExecutor(max(1, len(chosen))) as pool:
            return engine_errors({member: pool.submit(work, member) for member in chosen})

    def restart_failed(self, failed: dict[M, EngineError]) -> None:
        """Restart all engines that failed, at once. EngineError: one of them failed too often."""
        for error in self.each(lambda member: self.restart(member, failed[member]), list(failed)).values():
            raise error

    # -- work ----------------------------------------------------------------------------------------------------

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """EngineClient.score by an engine that has the weights; WeightsLost: none has."""
        while ready := [m for m in self.members if not m.behind]:
            member = ready[0]
            assert member.client is not None
            try:
                scores = member.client.score(sequences)
            except EngineError as error:
                with self.control:
                    self.restart_failed({member: error})
            else:
                member.done()
                return scores
        raise WeightsLost

    def queue_of(self, work: Sequence[list[T]]) -> WorkQueue[T]:
        """How the work of one call of `ask` is handed out."""
        return WorkQueue(work, self.section.max_running_requests, len(self.members), self.one_by_one)

    def ask(
        self,
        work: Sequence[list[T]],
        request: Callable[[T], GenerateRequest],
        answered: Callable[[list[T], list[Generation]], None],
    ) -> None:
        """Have every piece of work answered, each as one batch: an engine takes the next one as soon as it has room.

        answered(piece, generations) is called from several threads, once for a piece. An engine that fails is
        restarted while the others go on with its work; at the end all of them are back. Raises EngineError: one failed
        engine.max_restarts + 1 times without an answer in between; InputError: a refused request; WeightsLost.
        """
        queue = self.queue_of(work)
        threads = [
            threading.Thread(target=self._drive, args=(m, queue, request, answered), name=m.title, daemon=True)
            for m in self.members
        ]
        with self.watched():
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.5)  # so that Ctrl-C is heard
        if queue.error is not None:
            raise queue.error
        if queue.left:
            raise EngineError("the engines were ended with work left") if self._stopped.is_set() else WeightsLost

    def _drive(self, member: M, queue: WorkQueue, request: Callable, answered: Callable) -> None:
        """Thread of one engine: keeps it full until everything is answered."""
        try:
            while not queue.over and not member.behind and not self._stopped.is_set():
                error = self._until_it_fails(member, queue, request, answered)
                if error is not None and not self._stopped.is_set():
                    self.restart(member, error)
                queue.wait_for_work(1.0)  # what another engine gives back
        except BaseException as error:
            queue.fail(error)

    def _until_it_fails(self, member: M, queue: WorkQueue, request: Callable, answered: Callable) -> EngineError | None:
        """Work until the queue is empty (None), or until the engine fails, with its unanswered pieces given back."""
        running: dict[Future, list] = {}
        client = member.client
        assert client is not None
        with ThreadPoolExecutor(self.section.max_running_requests) as pool:
            while not queue.error and not self._stopped.is_set():
                for piece in queue.take(member.busy):
                    member.take(len(piece))
                    running[pool.submit(client.generate, [request(one) for one in piece], True)] = piece
                if not running:
                    return None
                done, _ = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
                failed = None
                for future in done:
                    if isinstance(error := future.exception(), EngineError):
                        failed = error
                    else:
                        self._accept(member, queue, future, running.pop(future), answered)
                if failed is not None:
                    if not member.engine.wait_exit(DYING_S):  # a broken answer: end the other requests too
                        member.engine.stop()
                    self._give_back(member, queue, running, answered)
                    return failed
            member.engine.stop()  # another engine failed for good: nobody waits for these any more
            member.busy = 0
        return None

    def _accept(self, member: M, queue: WorkQueue, future: Future, piece: list, answered: Callable) -> None:
        generations = future.result()
        member.busy -= len(piece)
        member.answers += 1
        member.done()
        answered(piece, generations)
        queue.answered()

    def _give_back(self, member: M, queue: WorkQueue, running: dict[Future, list], answered: Callable) -> None:
        """Wait for what was on its way; what is without an answer goes to the front of the queue."""
        left = []
        for future, piece in running.items():
            if future.exception() is None:
                self._accept(member, queue, future, piece, answered)
            else:
                left.append(piece)
        member.busy = 0
        queue.give_back(left)

    # -- progress ------------------------------------------------------------------------------------------------

    @contextmanager
    def watched(self) -> Iterator[None]:
        """While this is open progress is reported, and an engine without any is ended: its requests then fail."""
        over = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(over,), name="engines-progress", daemon=True)
        if self.on_progress is not None or self.silent_s < math.inf:
            watcher.start()
        try:
            yield
        finally:
            over.set()

    def _watch(self, over: threading.Event) -> None:
        while not over.wait(min(POLL_S, self.silent_s / 4)):
            moved = False
            for member in self.members:
                if not member.busy or over.is_set():
                    continue
                says = member.has_moved()
                if over.is_set():
                    return
                moved = moved or bool(says)
                if says is False and member.busy and member.silent_s() > self.silent_s:
                    log.warning("%s has computed nothing for %.0f s and is ended", member.title, member.silent_s())
                    member.engine.stop()
            if moved and self.on_progress is not None:
                self.on_progress()


def engine_errors(done: dict[M, Future[Any]]) -> dict[M, EngineError]:
    """The EngineErrors among what was done, waiting for all of it; any other error is raised."""
    errors: dict[M, EngineError] = {}
    for member, future in done.items():
        if isinstance(error := future.exception(), EngineError):
            errors[member] = error
        elif error is not None:
            raise error
    return errors


def shares(count: int, engines: int) -> list[list[int]]:
    """The numbers 0 to count - 1 in one block for each engine, equal but for one: what an engine gets is fixed."""
    boundaries = [count * i // engines for i in range(engines + 1)]
    return [list(range(a, b)) for a, b in zip(boundaries, boundaries[1:]) if a < b]
