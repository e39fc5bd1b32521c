"""Single requests from coroutines: places, order, failures, aborts, and sessions in turns (the servers are stand-ins)."""

from __future__ import annotations

import asyncio
import random
import threading

import numpy as np
import pytest

from fp8slurm.config.schema import EngineSection
from fp8slurm.core.errors import InputError
from fp8slurm.engine import completions as module
from fp8slurm.engine.client import GenerateRequest, Generation
from fp8slurm.engine.completions import Completions, continued, joined, run_in_turns
from fp8slurm.engine.pool import EnginePool, Member, WeightsLost
from fp8slurm.engine.server import EngineError

PATIENCE = 60


class Server:
    """A stand-in for engine and client; `answer(server, request)` may wait, raise, or return a Generation."""

    def __init__(self, answer=None) -> None:
        self.answer, self.asked, self.starts = answer, [], 1
        self.running = self.most = self.aborts = 0
        self.gone = self.aborted = False

    async def complete(self, http, request):
        self.asked.append(request.seed)
        self.running += 1
        self.most = max(self.most, self.running)
        starts = self.starts
        try:
            done = await self.answer(self, request) if self.answer else None
            if self.gone or starts != self.starts:
                raise EngineError("the connection broke")
        finally:
            self.running -= 1
        return done or Generation([request.seed], [0.0], "stop", [0])

    def abort_all(self) -> None:
        self.aborted = True

    def wait_exit(self, timeout_s: float) -> bool:
        return self.gone

    def obituary(self) -> str:
        return ""

    def stop(self) -> None:
        self.gone = True

    def restart(self) -> None:
        self.gone = False
        self.starts += 1

    def progress(self):
        return None


class Pool(EnginePool):
    def __init__(self, *servers, most=8, restarts=3) -> None:
        section = EngineSection(max_running_requests=most, max_restarts=restarts)
        super().__init__([Member(s, f"engine {i}") for i, s in enumerate(servers)], section)
        for member in self.members:
            member.client = member.engine
        self.completions = Completions(self)

    def client(self, engine):
        return engine


@pytest.fixture
def pool_of():
    pools = []

    def make(*servers, **more):
        pools.append(Pool(*servers, **more))
        return pools[-1]

    yield make
    for pool in pools:
        pool.stop()
        pool.completions.close()


def requests(count: int) -> list[GenerateRequest]:
    return [GenerateRequest([1], 8, seed=i) for i in range(count)]


async def ask_all(completions, count, number=lambda i: i):
    asked = (completions.complete(r, number(i)) for i, r in enumerate(requests(count)))
    return [g.token_ids[0] for g in await asyncio.gather(*asked)]


def test_thousands_wait_for_places_without_threads(pool_of):
    most_threads = 0

    async def answer(server, request):
        nonlocal most_threads
        most_threads = max(most_threads, threading.active_count())
        await asyncio.sleep(0)

    servers = [Server(answer), Server(answer)]
    pool, before = pool_of(*servers, most=4), threading.active_count()
    assert pool.completions.run(ask_all(pool.completions, 5000)) == list(range(5000))
    assert [s.most for s in servers] == [4, 4] and most_threads <= before + 2
    assert all(m.busy == 0 for m in pool.members)


def test_lower_numbers_get_free_places_first(pool_of):
    server = Server(lambda s, r: asyncio.sleep(0.001))
    pool = pool_of(server, most=1)
    pool.completions.run(ask_all(pool.completions, 6, number=lambda i: -i))
    assert server.asked == [0, 5, 4, 3, 2, 1], "the first one took the free place at once"


def test_what_an_engine_had_when_it_died_is_asked_elsewhere_while_it_restarts(pool_of):
    both = asyncio.Event()

    async def dies(server, request):
        if server.starts == 1:
            await both.wait()
            server.stop()

    async def works(server, request):
        both.set()
        await asyncio.sleep(0.001)

    bad, good = Server(dies), Server(works)
    pool = pool_of(bad, good, most=4)
    assert pool.completions.run(ask_all(pool.completions, 40)) == list(range(40))
    assert bad.starts == 2 and pool.restarts == 1 and all(m.busy == 0 for m in pool.members)
    assert sorted({*good.asked, *bad.asked}) == list(range(40))


def test_an_engine_that_always_fails_ends_everything(pool_of, monkeypatch):
    monkeypatch.setattr(module, "DYING_S", 0.0)

    async def fails(server, request):
        raise EngineError("broken")

    pool = pool_of(Server(fails), restarts=2)
    with pytest.raises(EngineError, match="broken"):
        pool.completions.run(ask_all(pool.completions, 4))
    assert pool.restarts == 2


def test_a_refused_request_is_its_askers_mistake(pool_of):
    async def refuses(server, request):
        if request.seed == 1:
            raise InputError("too long")

    pool = pool_of(Server(refuses))

    async def one_by_one():
        return [await asyncio.gather(pool.completions.complete(r), return_exceptions=True) for r in requests(3)]

    (first,), (second,), (third,) = pool.completions.run(one_by_one())
    assert first.token_ids == [0] and isinstance(second, InputError) and third.token_ids == [2]


def test_without_weights_requests_wait_for_the_next_update(pool_of):
    pool = pool_of(Server())
    pool.members[0].behind = True
    work = pool.completions.start(ask_all(pool.completions, 3))
    for _ in range(2):
        with pytest.raises(WeightsLost):
            pool.completions.wait(work)
    pool.members[0].behind = False
    pool.completions.updated()
    assert pool.completions.wait(work) == [0, 1, 2]


def test_stop_keeps_what_there_is_and_turns_away_what_waits(pool_of):
    begun = threading.Event()

    async def until_aborted(server, request):
        begun.set()
        while not server.aborted:
            await asyncio.sleep(0.005)
        return Generation([5, 6], [-1.0, -2.0], "abort", [3, 3])

    pool = pool_of(Server(until_aborted), most=2)

    async def all_of_them():
        return await asyncio.gather(*(pool.completions.complete(r) for r in requests(5)))

    work = pool.completions.start(all_of_them())
    assert begun.wait(PATIENCE)
    pool.completions.stop(work)
    assert [g.token_ids for g in work.result()] == [[5, 6], [5, 6], [], [], []]
    assert {g.finish_reason for g in work.result()} == {"abort"}
    assert pool.members[0].busy == 0 and not pool.completions.stopping


def test_what_an_update_aborts_goes_on_behind_it(pool_of):
    seen = []

    async def aborts_once(server, request):
        seen.append(request)
        if len(seen) == 1:
            pool.completions.interrupted()
            return Generation([7], [-1.0], "abort", [1])
        return Generation([8, 9], [-2.0, -3.0], "stop", [2, 2])

    pool = pool_of(Server(aborts_once))
    (whole,) = pool.completions.run(asyncio.wait_for(gathered(pool, [GenerateRequest([1, 2], 5, seed=0)]), PATIENCE))
    assert (whole.token_ids, whole.weight_versions, whole.finish_reason) == ([7, 8, 9], [1, 2, 2], "stop")
    assert seen[1].token_ids == [1, 2, 7] and seen[1].max_tokens == 4


async def gathered(pool, asked):
    return await asyncio.gather(*(pool.completions.complete(r) for r in asked))


def test_an_abort_that_nobody_asked_for_is_the_answer(pool_of):
    async def aborts(server, request):
        return Generation([7], [-1.0], "abort", [1])

    pool = pool_of(Server(aborts))
    (one,) = pool.completions.run(gathered(pool, requests(1)))
    assert one.finish_reason == "abort" and one.token_ids == [7]


def test_experts_of_two_parts_are_those_that_sampled_the_tokens():
    """Prompt of 2, then 2 and 1 tokens; 3 values a token: the rows behind the first part's last are the second's."""
    first = Generation([5, 6], [-1.0, -2.0], "abort", [1, 1], np.arange(9, dtype="<i4"))
    rest = Generation([7], [-3.0], "stop", [2], np.arange(100, 112, dtype="<i4"))
    whole = joined(first, rest)
    assert whole.routing.tolist() == [*range(9), 109, 110, 111]
    assert whole.logprobs == [-1.0, -2.0, -3.0] and whole.weight_versions == [1, 1, 2]
    request = GenerateRequest([1, 2], 9, seed=4, routing=True)
    assert continued(request, None) is request
    assert continued(request, first) == GenerateRequest([1, 2, 5, 6], 7, seed=4, routing=True)
    assert joined(first, Generation([], [], "abort", [])).routing is first.routing


def conversation(number: int, turns: int, after: list[str] | None = None):
    async def talk(complete):
        ids = [number]
        for turn in range(turns):
            await asyncio.sleep(random.random() / 100)  # a tool
            ids += (await complete(GenerateRequest(list(ids), 8, seed=100 * turn + number))).token_ids
        return ids

    return talk


def test_sessions_in_turns_are_batches_that_no_clock_decides():
    batches = []

    def generate(batch):
        batches.append([r.seed for r in batch])
        return [Generation([r.seed], [0.0], "stop", [0]) for r in batch]

    for _ in range(2):
        done = asyncio.run(run_in_turns([conversation(n, 1 + n % 3) for n in range(5)], generate))
        assert done[2] == [2, 2, 102, 202]
    assert batches[:3] == batches[3:] == [[0, 1, 2, 3, 4], [101, 102, 104], [202]]


def test_a_session_that_raises_ends_alone():
    async def raises(complete):
        await complete(GenerateRequest([1], 8, seed=0))
        raise ValueError("no such tool")

    async def two_at_once(complete):
        both = await asyncio.gather(*(complete(GenerateRequest([1], 8, seed=s)) for s in (1, 2)))
        return [g.token_ids[0] for g in both]

    def generate(batch):
        return [Generation([r.seed], [0.0], "stop", [0]) for r in batch]

    done = asyncio.run(run_in_turns([raises, conversation(3, 2), two_at_once], generate))
    assert isinstance(done[0], ValueError) and done[1:] == [[3, 3, 103], [1, 2]]


def test_engines_that_are_gone_end_all_sessions_though_one_catches_everything():
    async def catches(complete):
        try:
            await complete(GenerateRequest([1], 8, seed=0))
        except Exception:
            return "as if nothing had happened"

    def generate(batch):
        raise EngineError("gone")

    with pytest.raises(EngineError, match="gone"):
        asyncio.run(run_in_turns([catches, catches], generate))


def test_empty_places_are_counted_over_time(pool_of, monkeypatch):
    """Two places in each of two engines: three taken for 2 s, none for 1 s."""
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    pool = pool_of(Server(), Server(), most=2)
    completions = pool.completions
    completions.idle_share()
    pool.members[0].busy, pool.members[1].busy = 2, 1
    now += 2
    completions._count()
    pool.members[0].busy = pool.members[1].busy = 0
    now += 1
    assert completions.idle_share() == 0.5 and completions.idle_share() == 0.0
