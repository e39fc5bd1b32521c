"""Saves in the background: sealed by rank 0 when all have written, one at a time, waited for by a stop."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from fp8slurm.config import RunConfig
from fp8slurm.core.stopping import NeverStop, StopRequested
from fp8slurm.rl.boundary import StepBoundary
from fp8slurm.rl.saving import Saver
from fp8slurm.rl.stopwatch import Stopwatch
from fp8slurm.run.checkpoint_writer import CheckpointWriter
from fp8slurm.run.directory import FencedError, RunDirectory, RunState
from fp8slurm.run.step_times import StepTimes
from fp8slurm.sync.groups import host_store
from fp8slurm.sync.signed_store import SignedStore, new_key


class Part:
    """A snapshot of one rank: writes a file once it may, or says that it cannot."""

    def __init__(self, folder, rank: int, error: str = "") -> None:
        self.folder, self.rank, self.error, self.may = folder, rank, error, threading.Event()
        self.may.set()

    def write(self) -> bytes:
        assert self.may.wait(60)
        if not self.error:
            (self.folder / f"part{self.rank}").write_text("weights")
        return json.dumps(self.error).encode()

    def finish(self, written: list[bytes]) -> None:
        errors = [f"rank {i}: {e}" for i, text in enumerate(written) if (e := json.loads(text))]
        if errors:
            raise OSError("; ".join(errors))
        (self.folder / "index").write_text("all")


@pytest.fixture
def run(tmp_path):
    run = RunDirectory(tmp_path / "r")
    run.acquire()
    return run


@pytest.fixture
def savers(run):
    store, port = host_store("127.0.0.1")
    stores = [store, dist.TCPStore("127.0.0.1", port, None, is_master=False, wait_for_workers=False)]
    key, settings = new_key(), RunConfig().checkpoint
    yield [CheckpointWriter(run, SignedStore(s, key), rank, 2, settings) for rank, s in enumerate(stores)]
    del stores, store  # the host's process serves the others until here


def start(run, savers, step: int, errors=("", "")) -> list[Part]:
    """Begin the save of a step on both ranks; rank 1's part has to be let go."""
    state = RunState("rl", step)
    folder = run.begin_checkpoint(state)
    parts = [Part(folder, rank, error) for rank, error in enumerate(errors)]
    parts[1].may.clear()
    for saver, part in zip(savers, parts):
        saver.start(state, folder, part, time.monotonic())
    return parts


def test_the_checkpoint_appears_when_the_last_rank_has_written(run, savers):
    parts = start(run, savers, 3)
    assert [s.take(wait=False) for s in savers] == [None, None] and savers[0].left(1e6) > 0
    assert run.newest_checkpoint() == ""
    parts[1].may.set()
    saved = [s.take(wait=True) for s in savers]
    assert [(s.state.step, s.error) for s in saved] == [(3, ""), (3, "")]
    folder = run.checkpoints / "step_000003"
    assert sorted(p.name for p in folder.iterdir()) == ["COMPLETE", "index", "part0", "part1", "state.json"]
    assert savers[0].take(wait=True) is None and savers[0].left(1e6) == 0


def test_old_checkpoints_are_removed_only_after_the_new_one_is_there(run, savers):
    for step in (1, 2):
        start(run, savers, step)[1].may.set()
        assert [s.take(wait=True).error for s in savers] == ["", ""]
    parts = start(run, savers, 3)
    assert run.checkpoint_names() == ["step_000002", "step_000001"]
    parts[1].may.set()
    for s in savers:
        s.take(wait=True)
    assert run.checkpoint_names() == ["step_000003", "step_000002"]


def test_a_full_disk_on_one_rank_is_reported_by_all_and_the_next_save_works(run, savers):
    start(run, savers, 1)[1].may.set()
    [s.take(wait=True) for s in savers]
    start(run, savers, 2, ("", "No space left on device"))[1].may.set()
    assert [s.take(wait=True).error for s in savers] == ["rank 1: No space left on device"] * 2
    assert [p.name for p in run.checkpoints.iterdir()] == ["step_000001"]
    start(run, savers, 3)[1].may.set()
    assert [s.take(wait=True).error for s in savers] == ["", ""]
    assert run.newest_checkpoint() == "step_000003"


def test_a_newer_attempt_fences_the_save_that_is_under_way(run, savers):
    parts = start(run, savers, 1)
    run.release()
    RunDirectory(run.path).acquire()
    parts[1].may.set()
    with pytest.raises(FencedError, match="attempt 1 has begun"):
        savers[0].take(wait=True)
    assert run.newest_checkpoint() == ""


def saving(run, store, rank: int, errors: list[str], ranks: int = 2):
    """(saver, boundary, steps that were snapshot) of a rank whose n-th save fails with the n-th error."""
    steps: list[str] = []

    def snapshot(folder: str, copy: bool):
        steps.append(Path(folder).name.partition(".")[0])
        return Part(run.checkpoints / folder, rank, errors[len(steps) - 1] if len(steps) <= len(errors) else "")

    trainer, times = SimpleNamespace(rank=rank, snapshot=snapshot), StepTimes()
    saver = Saver(RunConfig(), run, trainer, store, ranks, Stopwatch(), times, None)
    return saver, StepBoundary(store, rank == 0, NeverStop(), saver, times), steps


def test_a_save_that_failed_is_made_up_for_at_the_next_boundary_by_all_ranks(run):
    """Rank 0 says so: the others may not know yet how the save has ended."""
    store, port = host_store("127.0.0.1")
    stores = [store, dist.TCPStore("127.0.0.1", port, None, is_master=False, wait_for_workers=False)]
    ranks = [saving(run, s, rank, ["No space left on device"] * rank) for rank, s in enumerate(stores)]

    def work(rank: int) -> None:
        saver, boundary, _ = ranks[rank]
        saver.save(RunState("rl", 4))
        if rank == 0:  # it knows at the boundary
            saver.collect()
        for step in (5, 6, 7):
            if boundary.cross():
                saver.save(RunState("rl", step), due=False)
            if step == 6:
                saver.collect()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert [steps for _, _, steps in ranks] == [["step_000004", "step_000005"]] * 2
    assert run.checkpoint_names() == ["step_000005"]
    assert all(saver.figures().get("checkpoint/failed") is None for saver, _, _ in ranks)


def test_only_checkpoints_that_were_due_count_as_failed_in_a_row(run):
    """A disk that is full for ten steps costs no attempt where one checkpoint was due meanwhile."""
    store, _ = host_store("127.0.0.1")
    saver, boundary, steps = saving(run, store, 0, ["No space left on device"] * 11, ranks=1)
    saver.save(RunState("rl", 1))
    for step in range(2, 12):
        saver.collect()
        assert boundary.cross()
        saver.save(RunState("rl", step), due=False)
    saver.collect()
    assert len(steps) == 11 and saver.figures()["checkpoint/failed"] == 1
    saver.check_saved(RunState("rl", 12))
    assert steps[-1] == "step_000012" and run.newest_checkpoint() == "step_000012"


class Noticed(NeverStop):
    """Stops the run, and remembers what was on disk then."""

    def __init__(self) -> None:
        self.told = None

    def stopped(self, where: str, saved: bool) -> None:
        self.told = (where, saved)


@pytest.mark.parametrize("same_state", [True, False])
def test_a_stop_waits_for_the_save_under_way_and_saves_what_is_new(run, same_state):
    """Of the same state: that save is enough. Of a step before: another one follows it."""
    store, _ = host_store("127.0.0.1")
    policy = Noticed()
    parts = []

    def snapshot(folder: str, copy: bool):
        assert copy
        parts.append(Part(run.checkpoints / folder, 0))
        if len(parts) == 1:
            parts[0].may.clear()
        return parts[-1]

    trainer, times = SimpleNamespace(rank=0, snapshot=snapshot), StepTimes()
    saver = Saver(RunConfig(), run, trainer, store, 1, Stopwatch(), times, None)
    boundary = StepBoundary(store, True, policy, saver, times)
    saver.save(RunState("rl", 4))
    state = RunState("rl", 4 if same_state else 5)
    stop = threading.Thread(target=boundary.stop, args=(state, StopRequested("notice")))
    stop.start()
    stop.join(0.5)
    assert stop.is_alive() and policy.told is None and run.newest_checkpoint() == ""
    parts[0].may.set()
    stop.join(60)
    name = "step_000004" if same_state else "step_000005"
    assert policy.told == (name, True) and run.newest_checkpoint() == name
    assert len(parts) == (1 if same_state else 2)
    assert times.save_s > 0 and StepTimes.read(run) == times
