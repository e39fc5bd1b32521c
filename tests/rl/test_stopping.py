"""Stopping before the end: all ranks at the same boundary, or out of the same rollout."""

import json
import threading
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from fp8slurm.core.stopping import NeverStop, StepAbandoned, StopRequested
from fp8slurm.rl.boundary import StepBoundary
from fp8slurm.rollout import channel
from fp8slurm.rollout.channel import RankChannel, WorkerChannel
from fp8slurm.run.step_times import StepTimes
from fp8slurm.sync.groups import host_store


class Told(NeverStop):
    """Noticed from the n-th question on; rank 0 stops where any rank was."""

    def __init__(self, at: int) -> None:
        self.left = at

    def noticed(self) -> bool:
        self.left -= 1
        return self.left < 0

    def at_step_boundary(self, noticed: bool, step_s: float, save_s: float) -> str:
        return "notice" if noticed else ""


@pytest.fixture
def stores():
    """A store's host and two more clients of it."""
    store, port = host_store("127.0.0.1")
    clients = [dist.TCPStore("127.0.0.1", port, None, is_master=False, wait_for_workers=False) for _ in range(2)]
    return [store, *clients]


def together(works) -> list:
    """Results (or exceptions) of functions that run at the same time."""
    results: list = [None] * len(works)

    def run(i: int) -> None:
        try:
            results[i] = works[i]()
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(works))]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    return results


@pytest.mark.parametrize("noticed_at", [(3, 99, 99), (99, 99, 3), (4, 3, 99)])
def test_all_ranks_stop_at_the_same_boundary(stores, noticed_at):
    step_over = threading.Barrier(3, timeout=60)  # a step's collectives keep the ranks together

    def rank(i: int):
        saver = SimpleNamespace(collect=lambda wait: None, left_s=lambda: 0.0, failed=False)
        boundary = StepBoundary(stores[i], i == 0, Told(noticed_at[i]), saver, StepTimes())

        def work() -> int:
            for step in range(50):
                try:
                    boundary.cross()
                except StopRequested:
                    return step
                step_over.wait()
            return -1

        return work

    steps = together([rank(i) for i in range(3)])
    assert len(set(steps)) == 1 and 3 <= steps[0] <= 4, steps


def test_a_rollout_is_abandoned_by_all_ranks_or_by_none(stores, monkeypatch):
    monkeypatch.setattr(channel, "ABANDON_POLL", timedelta(milliseconds=50))
    ranks = [RankChannel(s, SimpleNamespace(rank=i), ranks=2, workers=1) for i, s in enumerate(stores[:2])]
    for r in ranks:
        r.post("rollout", step=1)
    got = together([lambda: ranks[0].collect(lambda: "no time"), lambda: ranks[1].collect(lambda: "not asked")])
    assert [type(g) for g in got] == [StepAbandoned, StepAbandoned] and str(got[1]) == "no time"


def test_ranks_wait_patiently_for_a_worker_at_work(stores, monkeypatch):
    """An engine that restarts is progress for everybody; a rollout worker that says nothing is not."""
    monkeypatch.setattr(channel, "ABANDON_POLL", timedelta(milliseconds=50))
    monkeypatch.setattr(channel, "AT_WORK_S", 0.05)
    beats = threading.Semaphore(0)
    rank = RankChannel(stores[0], SimpleNamespace(rank=0), 1, 1, beats.release)
    worker = WorkerChannel(stores[1], SimpleNamespace(rank=1, size=2), 1, 0)
    rank.post("rollout", step=1)

    def answer() -> None:
        worker.next()
        with worker.at_work():
            assert all(beats.acquire(timeout=30) for _ in range(3))
        worker.answer({"cursor": 5})

    ((answered, _),), _ = together([rank.collect, answer])
    assert answered["cursor"] == 5


def test_two_workers_take_part_in_each_others_payloads(stores):
    """A broadcast that one member of the group does not know of would block the others."""
    import torch

    from fp8slurm.sync.groups import Group

    def rank():
        r = RankChannel(stores[0], Group(stores[0], "t", 0, 3, "127.0.0.1"), 1, 2)
        return [(a["n"], p.tolist()) for a, p in r.call("rollout")]

    def worker(i: int):
        def work() -> None:
            a = WorkerChannel(stores[1 + i], Group(stores[1 + i], "t", 1 + i, 3, "127.0.0.1"), 1, i)
            a.next()
            a.answer({"n": i}, torch.full([2 + i], i, dtype=torch.uint8))

        return work

    got, *_ = together([rank, worker(0), worker(1)])
    assert got == [(0, [0, 0]), (1, [1, 1, 1])]


def test_what_was_measured_is_there_for_the_next_attempt(tmp_path: Path):
    run = SimpleNamespace(path=tmp_path)
    assert StepTimes.read(tmp_path) == StepTimes()
    StepTimes(2.0, 3.0).write(run)
    assert (
        StepTimes.read(tmp_path) == StepTimes(2.0, 3.0)
        and json.loads((tmp_path / "pace.json").read_text())["save_s"] == 3.0
    )
