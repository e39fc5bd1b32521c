"""How work is dealt out to several engines, and what happens to it when one of them fails (the servers are stand-ins)."""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import Any

import pytest

from fp8slurm.config.schema import EngineSection
from fp8slurm.engine import pool as pool_module
from fp8slurm.engine.client import GenerateRequest, Generation
from fp8slurm.engine.pool import EnginePool, Member, WeightsLost, shares
from fp8slurm.engine.server import EngineError, share_of

PATIENCE = 60


class Server:
    """A stand-in for engine and client: `answer` decides what becomes of a batch."""

    def __init__(self, answer=lambda server, batch: None) -> None:
        self.answer, self.batches, self.starts = answer, [], 1
        self.ended = threading.Event()
        self.running = self.most = self.computed = 0
        self.tells = True
        self.last_words = ""
        self.restarting = lambda: None
        self._lock = threading.Lock()

    def alive(self) -> bool:
        return not self.ended.is_set()

    def wait_exit(self, timeout_s: float) -> bool:
        return self.ended.is_set()

    def obituary(self) -> str:
        return self.last_words if self.ended.is_set() else ""

    def stop(self) -> None:
        self.last_words = ""
        self.ended.set()

    def restart(self) -> None:
        self.restarting()
        self.ended = threading.Event()
        self.starts += 1

    def generate(self, batch: list[GenerateRequest], one_batch: bool) -> list[Generation]:
        assert one_batch
        ended = self.ended
        with self._lock:
            self.running += len(batch)
            self.most = max(self.most, self.running)
        try:
            self.answer(self, batch)
            if ended.is_set():
                raise EngineError("the connection broke")
            self.batches.append([r.seed for r in batch])
            self.computed += 1
        finally:
            with self._lock:
                self.running -= len(batch)
        return [Generation([r.seed], [0.0], "stop", [0]) for r in batch]

    def progress(self) -> tuple[Any, ...] | None:
        return (self.computed,) if self.tells else None


class Pool(EnginePool):
    def __init__(self, *servers: Server, most: int = 8, restarts: int = 3, **more: Any) -> None:
        section = EngineSection(max_running_requests=most, max_restarts=restarts)
        super().__init__([Member(s, f"engine {i}") for i, s in enumerate(servers)], section, **more)
        for member in self.members:
            member.client = member.engine

    def client(self, engine):
        return engine

    def answers(self, requests: list[GenerateRequest], work: list[list[int]]) -> list[int]:
        found = [None] * len(requests)

        def answered(numbers, generations):
            for n, g in zip(numbers, generations, strict=True):
                assert found[n] is None, "answered twice"
                found[n] = g.token_ids[0]

        self.ask(work, requests.__getitem__, answered)
        return found


def asked(groups: int, n: int) -> list[GenerateRequest]:
    return [GenerateRequest([g], 8, seed=g * n + k) for g in range(groups) for k in range(n)]


@pytest.mark.parametrize(
    "count, engines, expected", [(5, 2, [[0, 1], [2, 3, 4]]), (2, 4, [[0], [1]]), (0, 2, []), (4, 1, [[0, 1, 2, 3]])]
)
def test_shares(count, engines, expected):
    assert shares(count, engines) == expected


@pytest.mark.parametrize(
    "cores, count, expected",
    [
        ([0, 1], 1, [[0, 1]]),
        ([0, 1], 2, [[0], [1]]),
        ([2, 3, 5], 2, [[2], [3]]),  # as many for each: the number of threads is part of the result
        ([4, 6], 3, [[4], [6], [4]]),
        (list(range(8)), 2, [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ],
)
def test_cores(cores, count, expected):
    assert [share_of(cores, i, count) for i in range(count)] == expected


def test_what_fits_is_dealt_out_at_once_in_equal_shares_and_in_order():
    started = threading.Barrier(8)
    servers = [Server(lambda s, b: started.wait(PATIENCE)) for _ in range(4)]  # nobody answers before all are asked
    requests = asked(8, 4)
    assert Pool(*servers, most=16).answers(requests, shares(32, 8)) == list(range(32))
    assert all(sum(map(len, s.batches)) == 8 and s.most == 8 for s in servers)


def test_the_one_that_is_done_takes_the_next():
    fast, slow, quick_is_done = Server(), Server(), threading.Event()
    slow_has_some = threading.Event()

    def hold(s, b):
        slow_has_some.set()
        quick_is_done.wait(PATIENCE)

    slow.answer = hold
    count = []

    def answer(s, b):
        slow_has_some.wait(PATIENCE)
        count.append(1)
        if len(count) == 36:
            quick_is_done.set()

    fast.answer = answer
    requests = asked(10, 4)
    assert Pool(fast, slow, most=4).answers(requests, shares(40, 40)) == list(range(40))
    assert fast.most <= 4 and slow.most <= 4
    assert len(fast.batches) == 36 and len(slow.batches) == 4


def test_one_by_one_computes_fixed_batches_alone():
    servers = [Server(lambda s, b: time.sleep(0.01)) for _ in range(2)]
    requests = asked(6, 4)
    assert Pool(*servers, one_by_one=True).answers(requests, shares(24, 6)) == list(range(24))
    assert all(s.most <= 4 for s in servers)
    assert sorted(b for s in servers for b in s.batches) == [list(range(i, i + 4)) for i in range(0, 24, 4)]


def test_work_of_an_engine_that_dies_is_done_by_the_others_while_it_restarts():
    both = threading.Barrier(2)
    good, bad, all_done = Server(), Server(), threading.Event()

    def dies(s, b):
        if s.starts == 1:
            both.wait(PATIENCE)
            s.stop()

    def works(s, b):
        if not s.batches:
            both.wait(PATIENCE)

    bad.answer, good.answer = dies, works
    bad.restarting = lambda: all_done.wait(PATIENCE)  # it is back only after the good one has done everything
    pool = Pool(good, bad, one_by_one=True)
    found: list[int] = []

    def answered(numbers, generations):
        found.extend(g.token_ids[0] for g in generations)
        if len(found) == 8:
            all_done.set()

    requests = asked(4, 2)
    pool.ask(shares(8, 2), requests.__getitem__, answered)
    assert sorted(found) == list(range(8)) and bad.starts == 2 and not bad.batches and pool.restarts == 1
    assert good.batches == [[0, 1, 2, 3], [4, 5, 6, 7]] or good.batches == [[4, 5, 6, 7], [0, 1, 2, 3]]
    assert pool.members[1].client is bad and pool.members[1].failures == 1


def test_the_only_engine_is_waited_for_and_success_forgives():
    server = Server()

    def fails_twice_each_time(s, b):
        if s.starts % 3:
            raise EngineError("broken")

    server.answer = fails_twice_each_time
    pool = Pool(server, restarts=2)
    for _ in range(3):
        server.starts = 1
        assert pool.answers(asked(1, 2), [[0, 1]]) == [0, 1]
    assert pool.restarts == 6 and pool.members[0].failures == 0


def test_too_many_failures_in_a_row_end_it():
    bad, good = Server(), Server()
    seen = Counter()

    def fails(s, b):
        seen["bad"] += 1
        raise EngineError(f"failure {seen['bad']}")

    bad.answer = fails
    good.answer = lambda s, b: s.ended.wait(PATIENCE)  # would work for long; nobody waits for it then
    with pytest.raises(EngineError, match="failure 4"):
        Pool(bad, good, most=4, restarts=3).answers(asked(4, 2), shares(8, 2))
    assert seen["bad"] == 4 and bad.starts == 4


def test_a_server_that_ended_by_itself_is_quoted(caplog):
    dying, broken = Server(), Server()
    dying.last_words = "sglang::scheduler (pid 7) ended; the end of engine_0.log:\nCUDA error: an illegal memory access"

    both = threading.Barrier(2, timeout=PATIENCE)

    def dies(s, b):
        if s.starts == 1:
            both.wait()
            s.ended.set()

    def breaks(s, b):
        if s.starts == 1:
            both.wait()
            raise EngineError("answered 500")

    dying.answer, broken.answer, broken.last_words = dies, breaks, "nothing: it lived"
    Pool(dying, broken).answers(asked(4, 2), shares(8, 2))
    assert {r.getMessage() for r in caplog.records} == {
        "engine 0 failed (the connection broke; sglang::scheduler (pid 7) ended; the end of engine_0.log:); restart 1\n"
        "CUDA error: an illegal memory access",
        "engine 1 failed (answered 500); restart 1",
    }


def test_an_engine_that_does_not_come_back_counts_as_well():
    bad = Server()

    def refuses():
        raise EngineError("died while starting")

    bad.restarting = refuses
    bad.answer = lambda s, b: s.stop()
    with pytest.raises(EngineError, match="died while starting"):
        Pool(bad, restarts=2).answers(asked(1, 2), [[0, 1]])


def test_a_refused_request_is_the_callers_mistake():
    def refuses(s, b):
        raise ValueError("too long")

    other = Server(lambda s, b: s.ended.wait(PATIENCE))
    with pytest.raises(ValueError, match="too long"):
        Pool(Server(refuses), other).answers(asked(2, 2), shares(4, 2))


def test_an_engine_without_weights_is_left_out_and_without_any_the_work_is_handed_back():
    class Forgets(Pool):
        def restart_once(self, member):
            super().restart_once(member)
            member.behind = True

    asked_too = threading.Event()

    def dies(s, b):
        asked_too.set()
        s.stop()

    good = Server(lambda s, b: asked_too.wait(PATIENCE))
    pool = Forgets(good, Server(dies))
    assert pool.answers(asked(4, 2), shares(8, 2)) == list(range(8))
    assert [m.behind for m in pool.members] == [False, True]
    assert pool.answers(asked(4, 2), shares(8, 2)) == list(range(8)), "and it is asked for nothing afterwards"
    good.answer = dies
    with pytest.raises(WeightsLost):
        pool.answers(asked(4, 2), shares(8, 2))


def test_a_silent_engine_is_ended_and_one_that_moves_is_not(monkeypatch):
    """The silent one answers no request and computes nothing; the other is as slow, but its counters move."""
    monkeypatch.setattr(pool_module, "POLL_S", 0.05)
    silent, slow, told = Server(), Server(), []
    restarted = threading.Event()

    def hangs(s, b):
        if s.starts == 1:
            s.ended.wait(PATIENCE)

    def moves(s, b):
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and not restarted.is_set():
            s.computed += 1
            time.sleep(0.02)

    silent.answer, slow.answer, silent.restarting = hangs, moves, restarted.set
    pool = Pool(silent, slow, on_progress=lambda: told.append(1), silent_s=3.0)
    assert pool.answers(asked(2, 2), shares(4, 2)) == list(range(4))
    assert (silent.starts, slow.starts) == (2, 1) and told, "the moving engine kept the watchdog quiet"


def test_nothing_is_ended_that_cannot_say_how_far_it_is(monkeypatch):
    monkeypatch.setattr(pool_module, "POLL_S", 0.05)
    server = Server(lambda s, b: time.sleep(1.0))
    server.tells = False
    told: list[int] = []
    pool = Pool(server, on_progress=lambda: told.append(1), silent_s=0.2)
    assert pool.answers(asked(2, 2), [[0, 1], [2, 3]]) == list(range(4))
    assert server.starts == 1
