"""Attempts as their files tell: events of several tasks, holders that cannot be seen, what state a run is in."""

import json
import os
import socket

import pytest

from fp8slurm.core.processes import process_start
from fp8slurm.run import events
from fp8slurm.run.attempts import Attempt, read_attempts, run_state


@pytest.fixture
def run(tmp_path):
    (tmp_path / "attempts" / "0").mkdir(parents=True)
    return tmp_path


@pytest.fixture
def record(run, monkeypatch):
    """record(task, kind, text): as that task of attempt 0."""
    monkeypatch.setattr(events, "_file", None)

    def record(task, kind, text):
        events.keep_events(run / "attempts" / "0", task)
        events.record_event(kind, text)

    return record


def one(run):
    (attempt,) = read_attempts(run, notes := [])
    return attempt, notes


def own(run, **owner):
    (run / "attempts/0/owner.json").write_text(json.dumps(owner))


def test_events_of_all_tasks_are_told_in_the_order_of_time(run, record):
    record(0, events.SKIPPED, "checkpoint step_000010 was skipped: a.bin is missing")
    record(2, events.RESTART, "engine 0 failed (it died); restart 1")
    record(0, events.CONTINUED, "step_000005")
    record(0, events.NO_UPDATE, "step 6: no group with signal; no update")
    a, notes = one(run)
    assert (a.recorded, a.began_at, a.engine_restarts, notes) == (True, "step_000005", 1, [])
    assert [f.split()[0] for f in a.faults] == ["checkpoint", "engine", "step"]


def test_a_torn_line_is_noted_and_the_rest_is_told(run, record):
    record(0, events.RESTART, "engine 0 failed (it died); restart 1")
    with open(run / "attempts/0/events/task_0.jsonl", "a") as f:
        f.write('{"time": 1.0, "kind": "engi')
    a, notes = one(run)
    assert a.engine_restarts == 1 and len(notes) == 1 and "attempts/0/events" in notes[0]


def test_many_faults_are_cut_and_restarts_all_counted(run, record):
    for n in range(60):
        record(1, events.RESTART, f"engine 0 failed; restart {n}")
    a, _ = one(run)
    assert a.engine_restarts == 60 and len(a.faults) == 51 and a.faults[-1] == "... and 10 more in events/"


def test_a_process_that_keeps_no_events_and_a_full_disk_are_no_reason_to_fail(run, record, monkeypatch, caplog):
    events.record_event(events.RESTART, "nobody keeps it")
    assert not one(run)[0].recorded
    record(0, events.RESTART, "kept")
    monkeypatch.setattr(events, "_file", run / "gone" / "task_0.jsonl")
    events.record_event(events.RESTART, "lost")
    assert "could not be recorded" in caplog.text and one(run)[0].engine_restarts == 1


@pytest.mark.parametrize(
    ("owner", "state"),
    [
        ({"host": socket.gethostname(), "pid": os.getpid(), "start": process_start(os.getpid())}, "running"),
        ({"host": socket.gethostname(), "pid": os.getpid(), "start": "another time"}, "failed"),
        ({"host": "elsewhere", "pid": 1, "start": "1"}, "held"),
        ({"host": "node1", "pid": 1, "start": "1", "job": "7"}, "held"),
    ],
)
def test_a_holder_that_cannot_be_seen_has_not_failed(run, owner, state):
    own(run, **owner)
    (run / "attempts/0/tasks").mkdir()
    (run / "attempts/0/tasks/0.json").write_text("{}")
    a, _ = one(run)
    assert a.state == state and ("fp8slurm status" in a.why) == (state == "held")
    assert ("job 7" in a.why) == ("job" in owner)


@pytest.mark.parametrize(
    ("steps", "checkpoint", "last", "state", "expected"),
    [
        (10, "", None, None, "new"),
        (10, "step_000010", 10, "unknown", "finished"),
        (10, "step_000010", 10, "running", "running"),
        (10, "", 10, "done", "finished"),  # its checkpoints were moved away
        (10, "", 10, "failed", "failed"),  # the last checkpoint was not written
        (10, "step_000005", 7, "failed", "failed"),
        (10, "step_000005", 7, "stopped", "stopped"),
        (None, "step_000005", 7, "done", "stopped"),
        (10, "step_000005", 7, "held", "held"),
    ],
)
def test_the_state_of_a_run(steps, checkpoint, last, state, expected):
    assert run_state(steps, checkpoint, last, None if state is None else Attempt(0, state=state)) == expected
