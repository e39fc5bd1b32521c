"""A trace that is asked for: of the next step, by the ranks that were named, whole or not at all."""

import gzip
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fp8slurm.cli import main
from fp8slurm.core.stopping import NeverStop
from fp8slurm.rl.boundary import StepBoundary
from fp8slurm.rl.tracing import traced
from fp8slurm.run.directory import RunDirectory
from fp8slurm.run.step_times import StepTimes
from fp8slurm.run.trace import request


class NoSaver:
    failed = False

    def collect(self, wait: bool) -> None:
        pass

    def left_s(self) -> float:
        return 0.0


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run on two ranks, held by this process."""
    directory = RunDirectory(tmp_path / "runs" / "r")
    directory.acquire()
    (directory.path / "config.json").write_text(json.dumps({"run": {"steps": 5}, "slurm": {"ranks_per_node": 2}}))
    return directory


def test_all_ranks_learn_at_one_boundary_who_traces_the_step_behind_it(run: RunDirectory) -> None:
    store = dist.HashStore()
    boundaries = [
        StepBoundary(store, rank == 0, NeverStop(), NoSaver(), StepTimes(), run.attempt_dir) for rank in range(2)
    ]
    for asked, traced_ranks in ((None, []), ([1, 0, 1], [0, 1]), (None, [])):
        if asked is not None:
            assert request(run.path, asked) == run.attempt_dir / "trace"
        for boundary in boundaries:
            boundary.cross()
        assert [b.traced for b in boundaries] == [traced_ranks] * 2


def test_a_torn_request_is_no_request(run: RunDirectory) -> None:
    boundary = StepBoundary(dist.HashStore(), True, NeverStop(), NoSaver(), StepTimes(), run.attempt_dir)
    for text in ("{", "[]", '{"ranks": 3}', '{"ranks": ["0", true]}'):
        (run.attempt_dir / "trace.json").write_text(text)
        boundary.cross()
        assert boundary.traced == []


def test_a_step_is_written_by_the_ranks_that_were_named(tmp_path: Path) -> None:
    boundary = StepBoundary(dist.HashStore(), True, NeverStop(), NoSaver(), StepTimes(), tmp_path)
    boundary.traced = [1]
    for rank in range(2):
        with boundary.trace(rank, "step_000003"):
            torch.ones(64, 64) @ torch.ones(64, 64)
    (file,) = (tmp_path / "trace").rglob("*.*")
    assert file == tmp_path / "trace/step_000003/rank_1.json.gz"
    names = {event.get("name") for event in json.loads(gzip.open(file).read())["traceEvents"]}
    assert "aten::mm" in names


def test_a_trace_that_cannot_be_written_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "trace").write_text("a file where the folder should be")
    with traced(tmp_path, 0, "step_000003"):
        done = True
    assert done and "the trace of step_000003 could not be written" in caplog.text


def test_an_error_in_the_step_is_the_steps(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), traced(tmp_path, 0, "step_000003"):
        1 / 0  # noqa: B018
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    "words, says",
    [
        ("runs/r --rank 0 2", "--rank 2: runs/r has 2 training ranks; allowed: 0 to 1"),
        ("runs/none", "no run directory"),
        ("runs/over", "only the steps of a running run can be traced"),
    ],
)
def test_refused(
    run: RunDirectory, words: str, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(run.path.parents[1])
    over = run.path.parent / "over"
    (over / "attempts").mkdir(parents=True)
    assert main(["trace", *words.split()]) == 2
    assert says in capsys.readouterr().err


def test_the_command_says_where_it_will_be(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(run.path.parents[1])
    assert main(["trace", "r", "--rank", "1"]) == 0
    assert "the next step of rank 1 will be in runs/r/attempts/0/trace" in capsys.readouterr().out
    assert json.loads((run.attempt_dir / "trace.json").read_text()) == {"ranks": [1]}
