"""One error of the file system at a time, in one process: what a run meets often must cost it nothing."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from injection import ERRORS, Fault, arm, fired, left

from fp8slurm.observe.metrics import read_metrics

WRITES = """
from pathlib import Path
from fp8slurm.observe.metrics import MetricsWriter
from fp8slurm.run.directory import RunDirectory
run = RunDirectory(Path({path!r}), 0)
writer = MetricsWriter(run.own_copy("metrics.jsonl"), None)
for step in range(3):
    run.publish("metrics.jsonl") if step else None
    writer.write({{"phase": "rl", "step": step, "text": "x" * 100}})
"""
FOLLOWS = """
from pathlib import Path
from types import SimpleNamespace
from fp8slurm.config import RunConfig
from fp8slurm.observe.metrics import MetricsTail
from fp8slurm.run.directory import RunDirectory
from fp8slurm.slurm import launch
seen, polls = [], [None] * 8 + [0]
tail = MetricsTail(Path({path!r}) / "metrics.jsonl")
launch.LocalTasks = lambda *_: SimpleNamespace(poll=lambda: polls.pop(0), end=lambda: None)
launch.run_here(RunConfig(), RunDirectory(Path({path!r}), 0), lambda: seen.extend(r["step"] for r in tail.poll()))
assert seen == [0, 1, 2], seen
"""


DRAWS = """
from pathlib import Path
from fp8slurm.observe.tensorboard import TensorBoard
board = TensorBoard(Path({path!r}) / "tb")
for step in range(4):
    board.write({{"phase": "rl", "step": step, "loss": 1.0}})
board.close()
"""
READS = """
from pathlib import Path
from fp8slurm.core.files import patiently
from fp8slurm.data.prompts import read_rows
path = Path({path!r}) / "train.jsonl"
rows = patiently(lambda: [read()["n"] for _, read in read_rows(path)])
assert rows == list(range(3000)), len(rows)
"""
SAVES = """
import torch
from fp8slurm.trainer.checkpoint import _first_cause
try:
    with open({path!r}, "wb") as file:
        torch.save([torch.zeros(100_000) for _ in range(4)], file)
except Exception as error:
    print(error)
    print(_first_cause(error))
"""


def meets(injector: Path, folder: Path, code: str, faults: list[Fault]) -> None:
    """The code ends well although it meets all of these faults."""
    environment = os.environ | arm(injector, folder / "faults", faults) | {"FAULTS_ROLE": "rank"}
    path = folder / "run"
    command = [sys.executable, "-c", code.format(path=str(path))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(fired(folder / "faults")) == len(faults) and not left(folder / "faults")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two tasks that have ended well."""
    folder = tmp_path / "run" / "attempts" / "0" / "tasks"
    folder.mkdir(parents=True)
    for index in range(2):
        (folder / f"{index}.json").write_text('{"host": "elsewhere", "pid": 1, "start": "1"}')
        (folder / f"{index}.done").touch()
    return tmp_path / "run"


@pytest.mark.parametrize("error", ERRORS)
def test_a_record_that_cannot_be_written_at_once_is_there_once(tmp_path, injector, run, error):
    """After a failed fsync the record is written again, from its beginning."""
    calls = [("write", 0), ("fsync", 1), ("write", 1), ("fsync", 2)]
    meets(injector, tmp_path, WRITES, [Fault("rank", c, "*/metrics.jsonl", error, skip) for c, skip in calls])
    assert [r["step"] for r in read_metrics(run / "attempts" / "0")] == [0, 1, 2]


@pytest.mark.parametrize("error", ERRORS)
def test_what_a_command_shows_of_a_run_does_not_end_it(tmp_path, injector, run, error):
    """Its progress display, its look into errors/, and what it reads when the tasks have ended."""
    lines = [f'{{"phase": "rl", "step": {step}}}\n' for step in range(3)]
    (run / "metrics.jsonl").write_text("".join(lines))
    (run / "attempts" / "0" / "errors").mkdir()
    calls = [("open", "*/metrics.jsonl"), ("read", "*/metrics.jsonl"), ("open", "*/errors"), ("open", "*/tasks")]
    calls += [("open", "*/errors"), ("open", "*/tasks")]
    meets(injector, tmp_path, FOLLOWS, [Fault("rank", call, pattern, error) for call, pattern in calls])


@pytest.mark.parametrize("error", ERRORS)
def test_no_row_of_a_data_file_is_lost(tmp_path, injector, run, error):
    """Python reads on after EAGAIN as if the file had ended there."""
    (run / "train.jsonl").write_text("".join(f'{{"n": {n}}}\n' for n in range(3000)))
    meets(injector, tmp_path, READS, [Fault("rank", "read", "*/train.jsonl", error, skip) for skip in (0, 2)])


@pytest.mark.parametrize("skip", [1, 2])
def test_tensorboard_ends_no_run(tmp_path, injector, run, skip):
    meets(injector, tmp_path, DRAWS, [Fault("rank", "write", "*/tb/*", errno.ENOSPC, skip)])


def test_a_save_that_fails_is_named_by_the_file_systems_error(tmp_path, injector):
    """torch answers a write that fails with an `unexpected pos` of its own."""
    faults = [Fault("rank", "write", "*/part", errno.ENOSPC, 1)]
    environment = os.environ | arm(injector, tmp_path / "faults", faults) | {"FAULTS_ROLE": "rank"}
    command = [sys.executable, "-c", SAVES.format(path=str(tmp_path / "part"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and fired(tmp_path / "faults"), done.stderr
    assert "unexpected pos" in done.stdout and done.stdout.endswith("[Errno 28] No space left on device\n")
