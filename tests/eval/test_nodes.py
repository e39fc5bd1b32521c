"""What the tasks of a step tell each other, without engines (with them: tests/slurm/test_eval_nodes.py)."""

import json
import threading

import pytest

from fp8slurm.cli import main
from fp8slurm.engine.server import EngineError
from fp8slurm.eval import nodes
from fp8slurm.eval.cli import step_command
from fp8slurm.eval.nodes import Place, ResultCollector, SharedWorkQueue, StepRendezvous, Tail
from fp8slurm.eval.records import node_file

STEP = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "1",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NUM_NODES": "2",
}


@pytest.fixture(autouse=True)
def outside_slurm(monkeypatch):
    for name in (*STEP, "SLURM_RESTART_COUNT", "SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("more", "place"),
    [
        ({}, Place(1, 2, "7.0.0")),
        ({"SLURM_RESTART_COUNT": "3"}, Place(1, 2, "7.3.0")),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1", "SLURM_PROCID": "0"}, None),
        ({"SLURM_STEP_ID": ""}, None),  # the job script
        ({"SLURM_STEP_ID": "4294967291"}, None),  # the job script, as newer versions number it
    ],
)
def test_where_this_task_is(monkeypatch, more, place):
    for name, value in (STEP | more).items():
        monkeypatch.setenv(name, value)
    assert Place.here() == place


def test_two_tasks_a_node_are_refused(monkeypatch, tmp_path, capsys):
    for name, value in (STEP | {"SLURM_STEP_NUM_TASKS": "4"}).items():
        monkeypatch.setenv(name, value)
    assert main(["eval", "--run", str(tmp_path)]) == 2
    assert "4 tasks of this evaluation on 2 nodes" in capsys.readouterr().err


def take_all(queue, got):
    while pieces := queue.take(0):
        got += [(queue, p) for p in pieces]
        for _ in pieces:
            queue.answered()


def test_every_piece_is_taken_by_one_task(tmp_path):
    work = [[i, i] for i in range(300)]
    queues = [SharedWorkQueue(work, 64, tmp_path, 6) for _ in range(3)]
    got: list = []
    threads = [threading.Thread(target=take_all, args=(q, got)) for q in queues for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(piece for _, piece in got) == work
    assert all(q.over and not q.left and not q.waiting for q in queues)


def test_the_first_task_leaves_the_others_their_share(tmp_path):
    first, second = (SharedWorkQueue([[i] for i in range(12)], 64, tmp_path, 4) for _ in range(2))
    assert first.take(0) == [[0], [1], [2]] and first.take(3) == [], "an engine holds a quarter"
    assert second.take(0) == [[3], [4], [5]]


def test_what_an_engine_gives_back_stays_with_its_task(tmp_path):
    mine, other = (SharedWorkQueue([[i] for i in range(4)], 1, tmp_path, 2) for _ in range(2))
    assert mine.take(0) == [[0]]
    mine.give_back([[0]])
    assert other.take(0) == [[1]] and other.take(0) == [[2]]
    assert mine.take(0) == [[0]] and mine.take(0) == [[3]] and mine.take(0) == []
    assert other.take(0) == [] and mine.left == 2 and other.left == 2
    for queue in (mine, other):
        queue.answered(), queue.answered()
    assert mine.over and other.over


def meetings(folder, count=2):
    return [StepRendezvous(folder, Place(i, count, "7.0.0")) for i in range(count)]


def test_what_is_announced_arrives_and_nobody_begins_alone(tmp_path):
    zero, one = meetings(tmp_path)
    zero.wait_started()
    answers: list = []

    def other():
        answers.append(one.work("fp8"))
        answers.append(one.all_ready("fp8", 3))
        one.done("fp8", 5, 3, 1)

    thread = threading.Thread(target=other)
    thread.start()
    zero.announce("fp8", {"batches": 2})
    assert zero.all_ready("fp8", 4) == 7
    assert zero.reports("fp8") == [{"rows": 5, "engines": 3, "restarts": 1}]
    thread.join()
    assert answers == [{"batches": 2}, 7]
    zero.remove()
    assert not list(tmp_path.iterdir())


def test_a_task_that_fails_ends_the_others_with_its_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(nodes, "HERE_S", 0.5)
    alone = StepRendezvous(tmp_path / "alone", Place(0, 3, "7.0.0"))
    with pytest.raises(EngineError, match=r"no here-1, here-2 in .* within 0.5 s: is it on a file system that all"):
        alone.wait_started()
    zero, one = meetings(tmp_path)
    one.fail("its GPU is gone")
    zero.announce("fp8", {})
    with pytest.raises(EngineError, match=r"node 1 \(.*\): its GPU is gone"):
        zero.all_ready("fp8", 1)
    zero.remove()
    for waiting in (lambda: one.work("fp8"), lambda: one.done("fp8", 1, 1, 0)):
        with pytest.raises(EngineError, match="node 0 has ended"):
            waiting()
    one.fail("too late")  # nobody is there to read it


def test_what_killed_steps_left_is_removed(tmp_path, monkeypatch):
    from fp8slurm.scheduler import queue

    known = {"5": queue.SlurmJob("5", "RUNNING"), "6": queue.SlurmJob("6", "COMPLETED")}
    monkeypatch.setattr(queue, "jobs", lambda ids: ({k: v for k, v in known.items() if k in ids}, ""))
    for name in ("7.0.0", "7.2.0", "5.0.0", "6.0.0", "4.0.0"):
        (tmp_path / f".step-{name}").mkdir()
    StepRendezvous(tmp_path, Place(0, 2, "7.1.0")).remove_old()
    assert {p.name for p in tmp_path.iterdir()} == {".step-7.1.0", ".step-7.2.0", ".step-5.0.0"}
    monkeypatch.setattr(queue, "jobs", lambda ids: ({}, "Slurm does not answer"))
    StepRendezvous(tmp_path, Place(0, 2, "9.0.0")).remove_old()
    assert {p.name for p in tmp_path.iterdir()} == {".step-7.1.0", ".step-7.2.0", ".step-5.0.0", ".step-9.0.0"}


def row(i):
    return {"task": "t", "id": str(i), "sample": 0}


def test_rows_of_other_nodes_are_handed_on_whole_and_once(tmp_path, monkeypatch):
    zero, one = meetings(tmp_path)
    zero.announce("fp8", {})
    got: list = []
    file = node_file(tmp_path, 1)
    lines = [json.dumps(row(i)) + "\n" for i in range(3)]
    with ResultCollector(zero, tmp_path, got.extend) as gatherer:
        file.write_text(lines[0] + lines[1][:5])
        gatherer._poll()
        assert got == [row(0)]
        with open(file, "a") as f:
            f.write(lines[1][5:] + lines[2])
        one.done("fp8", 3, 1, 0)
        assert gatherer.finish("fp8") == [{"rows": 3, "engines": 1, "restarts": 0}]
    assert got == [row(0), row(1), row(2)] and Tail(tmp_path / "none").poll() == []
    monkeypatch.setattr(nodes, "SEEN_S", 0.3)
    one.done("fp8", 4, 1, 0)
    with (
        ResultCollector(zero, tmp_path, got.extend) as gatherer,
        pytest.raises(EngineError, match=r"wrote \[4\].*\[3\] are seen"),
    ):
        gatherer.finish("fp8")


def test_the_command_of_a_step(monkeypatch):
    argv = ["--run", "r", "--nodes", "2", "--n-samples=4", "--srun=--partition=gpu", "--nodes=3"]
    command = step_command(3, ["--partition=gpu"], argv)
    assert command[:5] == ["srun", "--nodes=3", "--ntasks-per-node=1", "--kill-on-bad-exit=1", "--partition=gpu"]
    assert command[-4:] == ["eval", "--run", "r", "--n-samples=4"]
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "64")
    assert "--cpus-per-task=64" in step_command(3, [], argv)


def test_flags_of_a_step_are_checked(tmp_path, capsys):
    for flags, complaint in [
        (["--nodes", "0"], "--nodes 0; allowed: 1 or more"),
        (["--srun=--time=5"], "needs --nodes"),
        (["--nodes=2", "--srun=-p"], "--srun -p: flags of srun are written --name=value"),
    ]:
        assert main(["eval", "--run", str(tmp_path), *flags]) == 2
        assert complaint in capsys.readouterr().err
