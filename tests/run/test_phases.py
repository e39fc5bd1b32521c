"""What tasks say of themselves until an attempt trains, and what GPUs do, as status finds it."""

from __future__ import annotations

import json
import stat
import time

import pytest

from fp8slurm.run import phases
from fp8slurm.run.gpu_use import ask_nvidia_smi, read_gpus, watch_gpus
from fp8slurm.run.phases import Phase, enter_phase, keep_phases, read_phases
from fp8slurm.run.status import phase_words


@pytest.fixture(autouse=True)
def no_other(monkeypatch):
    monkeypatch.setattr(phases, "_file", None)
    monkeypatch.setattr(phases, "_text", "")


def write(folder, task: int, text: str, since: float) -> None:
    (folder / "phases").mkdir(exist_ok=True)
    (folder / "phases" / f"task_{task}.json").write_text(json.dumps({"phase": text, "since": since}))


def test_a_task_says_what_it_does(tmp_path):
    enter_phase(phases.LOADING)  # of a process that is no task
    assert read_phases(tmp_path) == []
    keep_phases(tmp_path, 0)
    enter_phase(phases.LOADING)
    (first,) = read_phases(tmp_path)
    enter_phase(phases.LOADING)
    assert read_phases(tmp_path) == [first] and first.text == "loading ranks" and time.time() - first.since < 60
    enter_phase(phases.TRAINING)
    assert read_phases(tmp_path) == []


@pytest.mark.parametrize(
    "said, words",
    [
        ({}, ""),
        ({0: "loading ranks", 2: "starting engines"}, "loading ranks 0:40, starting engines 0:38"),
        ({0: "ready", 2: "compiling kernels", 5: "compiling kernels"}, "compiling kernels 0:38"),
        ({0: "ready", 2: "ready"}, ""),
        ({0: "training", 2: "compiling kernels"}, ""),
        ({0: "first update of the engines", 2: "ready", 3: "of another version"}, "first update of the engines 0:40"),
    ],
)
def test_what_keeps_an_attempt_from_training(tmp_path, said, words):
    for task, text in said.items():
        write(tmp_path, task, text, 100.0 + min(task, 2))
    assert phase_words(tmp_path, 140.0) == words


@pytest.mark.parametrize("end", ["errors/task_1.json", "stopped.json"])
def test_an_attempt_that_is_over_does_nothing(tmp_path, end):
    write(tmp_path, 0, "loading ranks", 1.0)
    assert read_phases(tmp_path) == [Phase("loading ranks", 1.0)]
    (tmp_path / end).parent.mkdir(exist_ok=True)
    (tmp_path / end).write_text("{}")
    assert read_phases(tmp_path) == []


def test_torn_files_say_nothing(tmp_path):
    (tmp_path / "phases").mkdir()
    (tmp_path / "phases" / "task_0.json").write_text('{"phase": "loa')
    (tmp_path / "phases" / "task_1.json").write_text('{"phase": 3, "since": 1}')
    (tmp_path / "gpus").mkdir()
    (tmp_path / "gpus" / "0.json").write_text('{"time": 1, "gpus": [3]}')
    assert read_phases(tmp_path) == [] and read_gpus(tmp_path, 2.0) == ()


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """nvidia_smi(shell lines): a stand-in; there is none before."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "bin").mkdir()

    def command(*lines: str) -> None:
        path = tmp_path / "bin" / "nvidia-smi"
        path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    return command


def test_what_gpus_do_is_written_for_status(tmp_path, nvidia_smi, monkeypatch):
    with pytest.raises(FileNotFoundError):
        ask_nvidia_smi()
    watch_gpus(tmp_path, 0).join(60)
    assert read_gpus(tmp_path, time.time()) == ()
    nvidia_smi('case "$*" in *--id=0,1*) echo "0, 62, 40960, 81920"; echo "1, 97, 61440, 81920";; esac')
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    watch_gpus(tmp_path, 0, every_s=3600)
    deadline = time.monotonic() + 60
    while not (nodes := read_gpus(tmp_path, time.time())) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert [(n.use, n.used_gib, n.total_gib) for n in nodes] == [((62.0, 97.0), (40.0, 60.0), (80.0, 80.0))]
    nvidia_smi('echo "0, [N/A], 1, 2"')
    with pytest.raises(ValueError):
        ask_nvidia_smi()
