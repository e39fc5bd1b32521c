"""Intervals of a step: offsets of clocks, who waits for whom, what is read back of a file."""

from __future__ import annotations

import json
import threading
from types import SimpleNamespace

import pytest

from fp8slurm.config import read_recipe
from fp8slurm.engine.pool import Member
from fp8slurm.rl.recorder import Recorder
from fp8slurm.rl.stopwatch import Stopwatch
from fp8slurm.rollout.channel import RankChannel, WorkerChannel
from fp8slurm.run import timeline
from fp8slurm.run.directory import RunState
from fp8slurm.run.timeline import Answered
from fp8slurm.sync.groups import host_store


def answered(kind: str, posted: float, taken: float, done: float, read: float, ahead: float = 0.0, worker: int = 0,
             engines: tuple = ()) -> Answered:  # fmt: skip
    """On rank 0's clock, of a worker whose own is `ahead`."""
    spans = [[(begin + ahead, end + ahead) for begin, end in one] for one in engines]
    return Answered(kind, worker, posted, read, taken + ahead, done + ahead, spans)


def test_a_clocks_offset_is_that_of_the_tightest_command():
    """100 s ahead; a long rollout whose answer is read late says little, a short command says it to half a millisecond."""
    rollout = answered("rollout", 10.0, 10.002, 14.0, 20.0, 100.0, 1)
    update = answered("update", 20.0, 20.001, 21.0, 21.0, 100.0, 1)
    (offset,) = timeline.clocks_of([rollout, update]).values()
    assert abs(offset[0] - 100) <= offset[1] == pytest.approx(5e-4)
    for one in (rollout, update):
        assert abs(one.offset[0] - 100) <= one.offset[1] + 1e-9
    assert timeline.clocks_of([answered("update", 0, 0, 1, 1, -3.0)]) == {0: (-3.0, 0.0)}


def test_a_step_is_drawn_on_one_clock(tmp_path):
    """Also what engines did in it for the step after, which is told with that one."""
    first = timeline.line("rl", 1, 10.0, 20.0, [("rollout", 10.0, 12.0), ("train", 12.0, 20.0)], [
        answered("rollout", 5.0, 5.0, 12.0, 12.0, 100.0, 1, ([(6.0, 11.0)],)),
    ])  # fmt: skip
    second = timeline.line("rl", 2, 20.0, 30.0, [("train", 21.0, 29.0)], [
        answered("rollout", 13.0, 13.0, 25.0, 25.0, 100.0, 1, ([(14.0, 24.0)],)),
    ])  # fmt: skip
    for entry in (first, second):
        timeline.append(tmp_path, entry)
    with (tmp_path / timeline.FILE).open("a") as file:
        file.write('{"phase":"rl","step":3,"begin":1,"end":2,"spans":[["<b>","x",1,2]],"clocks":{}}\n[1]\n{"phase":"r')
    entries = timeline.read_timeline(tmp_path)
    assert [e["step"] for e in entries] == [1, 2], "half a line and another's are left out"
    assert timeline.around(entries, 1) == [
        ("trainer", "rollout", 0.0, 2.0), ("trainer", "train", 2.0, 10.0), ("worker 1", "rollout", 0.0, 2.0),
        ("engine 1.0", "requests", 0.0, 1.0), ("worker 1", "rollout", 3.0, 10.0), ("engine 1.0", "requests", 4.0, 10.0),
    ]  # fmt: skip
    assert timeline.read_timeline(tmp_path / "none") == []


def test_the_file_does_not_grow_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(timeline, "MOST_BYTES", 1000)
    for step in range(200):
        timeline.append(tmp_path, timeline.line("rl", step, step, step + 1.0, [("train", step, step + 0.5)], []))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 2500
    steps = [e["step"] for e in timeline.read_timeline(tmp_path)]
    assert steps == list(range(steps[0], 200)) and len(steps) > 5


def test_who_waits():
    assert timeline.who_waits({"time/step": 10.0, "time/trainer_waits": 4.0, "time/engines_idle": 2.5}) == (
        "trainer for engines 40% of the last step, engines for the trainer 25%"
    )
    assert (
        timeline.who_waits({"time/step": 10.0, "time/trainer_waits": 4.0}) == "trainer for engines 40% of the last step"
    )
    for record in ({}, {"time/step": 10.0}, {"time/step": None, "time/trainer_waits": 1.0}):
        assert timeline.who_waits(record) == ""


def test_an_engine_is_busy_while_it_has_requests():
    member = Member(SimpleNamespace(), "engine 0")
    member.take(2)
    member.busy -= 1
    assert member.take_spans() == [], "what goes on is told when it ends"
    member.busy -= 1
    member.take(1)  # at once: one interval
    member.busy = 0
    ((begin, end),) = member.take_spans()
    assert begin <= end and member.take_spans() == []


def test_a_record_has_who_waited(tmp_path):
    """From a real command to the record and the file."""
    store, _ = host_store("127.0.0.1")
    rank = RankChannel(store, SimpleNamespace(rank=0), 1, 1)
    worker = WorkerChannel(store.clone(), SimpleNamespace(rank=1, size=2), 1, 0)
    worker.engines_busy = lambda: [[(5.0, 7.0)], [(5.0, 6.0)]]
    thread = threading.Thread(target=lambda: (worker.next(), worker.answer({"cursor": 1})))
    thread.start()
    watch = Stopwatch()
    config = read_recipe("tiny-fp8").model_copy(update={"observe": SimpleNamespace(tensorboard=False, wandb=False)})
    (tmp_path / "attempt").mkdir()
    run = SimpleNamespace(
        own_copy=lambda name: tmp_path / name, publish=lambda name: None, attempt_dir=tmp_path / "attempt"
    )
    recorder = Recorder(config, run, watch, True, None, rank.answered)
    recorder.begin()
    with watch.timed("rollout"):
        ((answer, _),) = rank.call("rollout")
    thread.join(30)
    assert answer == {"cursor": 1, "bytes": 0}
    recorder.write(RunState("rl", 1), {})
    recorder.close()
    record = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert record["time/trainer_waits"] == record["time/rollout"] > 0 and record["time/engines_idle"] >= 0
    (entry,) = timeline.read_timeline(tmp_path / "attempt")
    assert {lane for lane, *_ in entry["spans"]} == {"trainer", "worker 0", "engine 0.0", "engine 0.1"}
    assert rank.answered == [] and abs(entry["clocks"]["0"][0]) <= entry["clocks"]["0"][1] + 0.01
