"""Run directories: one holder, attempts, checkpoints that are whole or not used."""

import errno
import json
import os
import re
import subprocess
import sys
from unittest.mock import MagicMock

import pytest

from fp8slurm.checkpoint.formats.complete import damage
from fp8slurm.core.errors import BadCheckpoint
from fp8slurm.run.directory import FencedError, RunBusyError, RunDirectory, RunState
from fp8slurm.run.step_times import StepTimes


def saved(run: RunDirectory, state: RunState, text: str = "weights"):
    tmp = run.begin_checkpoint(state)
    (tmp / "shard").write_text(text)
    (tmp / "sub").mkdir()
    (tmp / "sub" / "more").write_bytes(b"\0" * 1000)
    return run.commit_checkpoint(tmp, state)


def usable(run):
    return [f.name for f, why in run.checked_checkpoints() if why is None]


@pytest.fixture
def run(tmp_path):
    run = RunDirectory(tmp_path / "r")
    run.acquire()
    return run


def test_state_and_folder_survive_a_round_trip(run):
    state = RunState("rl", 10, cursor=320, sft_steps=55)
    folder = saved(run, state)
    assert folder.name == "step_000010" and RunState.read(folder) == state and state.version == 65
    assert damage(folder) is None
    assert oct(run.path.stat().st_mode)[-3:] == "700"


def test_order_sft_before_rl_newest_first(run):
    for state in (RunState("sft", 90), RunState("rl", 0), RunState("rl", 5)):
        saved(run, state)
    assert usable(run) == ["step_000005", "step_000000", "sft_000090"]


@pytest.mark.parametrize("harm", ["truncate", "flip", "complete", "remove", "garble", "empty", "no object"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(run, harm):
    saved(run, RunState("rl", 1))
    newest = saved(run, RunState("rl", 2))
    shard = newest / "sub" / "more"
    if harm == "truncate":
        shard.write_bytes(b"\0" * 999)
    elif harm == "flip":
        shard.write_bytes(b"\0" * 500 + b"\1" + b"\0" * 499)
    elif harm == "complete":
        (newest / "COMPLETE").unlink()
    elif harm == "remove":
        shard.unlink()
    else:
        text = {"garble": "{", "empty": '{"files": {}}', "no object": '{"files": {"shard": 7}}'}[harm]
        (newest / "COMPLETE").write_text(text)
    reasons = {f.name: why for f, why in run.checked_checkpoints()}
    assert reasons["step_000001"] is None and reasons["step_000002"]
    assert usable(run) == ["step_000001"]


def test_an_interrupted_save_is_no_checkpoint_and_is_cleaned_up_later(run):
    tmp = run.begin_checkpoint(RunState("rl", 3))
    (tmp / "shard").write_text("half")
    assert usable(run) == []
    run.release()
    again = RunDirectory(run.path)
    again.acquire()
    saved(again, RunState("rl", 3))
    again.prune(1, 0)
    assert sorted(p.name for p in again.checkpoints.iterdir()) == ["step_000003"]


def test_keep_last_and_keep_every(run):
    for step in range(1, 9):
        saved(run, RunState("rl", step))
        run.prune(keep_last=2, keep_every=3)
    assert usable(run) == ["step_000008", "step_000007", "step_000006", "step_000003"]


def test_damaged_checkpoints_that_were_set_aside_do_not_count(run):
    for step in (6, 8, 10):
        saved(run, RunState("rl", step))
    for name in ("step_000008", "step_000010"):
        (run.checkpoints / name / "shard").write_text("damaged")
    asides = [run.set_aside(folder).name for folder, why in run.checked_checkpoints() if why]
    assert asides == ["step_000010.damaged.0", "step_000008.damaged.0"] and run.newest_checkpoint() == "step_000006"
    saved(run, RunState("rl", 7))
    run.prune(keep_last=2, keep_every=0)
    assert usable(run) == ["step_000007", "step_000006"]
    assert {p.name for p in run.checkpoints.iterdir()} == {*asides, *usable(run)}
    run.release()
    RunDirectory(run.path).acquire()
    with pytest.raises(FencedError):
        run.set_aside(run.checkpoints / "step_000007")
    assert usable(run) == ["step_000007", "step_000006"]


def test_a_resumed_run_sets_damaged_checkpoints_aside(run, caplog):
    import torch.distributed as dist

    from fp8slurm.config import RunConfig
    from fp8slurm.rl.saving import load_newest

    saved(run, RunState("rl", 1))
    (saved(run, RunState("rl", 2)) / "shard").write_text("damaged")
    trainer, store = MagicMock(rank=0), dist.HashStore()
    state = load_newest(RunConfig(), run, trainer, store)
    assert store.get("resume") == b"step_000001" and trainer.load.call_args.args == (run.checkpoints / "step_000001",)
    assert run.checkpoint_names() == ["step_000001"] and state == RunState("rl", 1)
    assert "step_000002 is skipped: shard was altered (SHA-256); set aside as step_000002.damaged.0" in caplog.text


def test_other_folders_beside_the_checkpoints_are_the_users(run):
    for step in (999_998, 999_999, 1_000_000):
        saved(run, RunState("rl", step))
    for name in ("best_000008", "backup_step_000010", "step_000008.damaged.0"):
        (run.checkpoints / name).mkdir()
    run.prune(keep_last=2, keep_every=0)
    assert run.checkpoint_names() == ["step_1000000", "step_999999"]
    assert len(list(run.checkpoints.iterdir())) == 5


def test_some_files_of_a_checkpoint_can_be_checked_alone(run):
    folder = saved(run, RunState("rl", 1))
    (folder / "shard").write_text("altered")
    assert damage(folder, ["sub/more"]) is None
    assert damage(folder, ["sub/more", "shard"]) == "shard was altered (SHA-256)"
    assert damage(folder, ["stray"]) == "stray is not among the files that COMPLETE names"


def test_a_held_directory_is_refused_naming_the_holder(run):
    with pytest.raises(RunBusyError, match=f"process {os.getpid()}.*--run.name"):
        RunDirectory(run.path).acquire()
    run.release()
    RunDirectory(run.path).acquire()


def test_a_dead_holder_does_not_block(run):
    run.release()
    code = "import sys; from pathlib import Path; from fp8slurm.run.directory import RunDirectory; RunDirectory(Path(sys.argv[1])).acquire()"
    subprocess.run([sys.executable, "-c", code, str(run.path)], check=True)
    assert json.loads((run.attempts / "1" / "owner.json").read_text())["pid"] != os.getpid()
    again = RunDirectory(run.path)
    again.acquire()
    assert again.attempt == 2


def test_an_old_attempts_file_is_not_the_runs_any_more(run):
    """The old attempt appends to a file that nobody reads; the new one goes on behind what it found."""
    old = open(run.own_copy("metrics.jsonl"), "a")
    old.write("1\n2\n")
    old.flush()
    run.publish("metrics.jsonl")
    shown = run.path / "metrics.jsonl"
    run.release()
    newer = RunDirectory(run.path)
    newer.acquire()
    with open(newer.own_copy("metrics.jsonl"), "a") as new:
        new.write("3\n")
    newer.publish("metrics.jsonl")
    old.write("3 of the old attempt\n")
    old.flush()
    assert shown.read_text() == "1\n2\n3\n"
    with pytest.raises(FencedError):
        run.publish("metrics.jsonl")
    with pytest.raises(FencedError):
        run.own_copy("metrics.jsonl")
    os.replace(run.attempt_dir / "metrics.jsonl", shown)  # the old one had looked at the fence a moment before
    newer.publish("metrics.jsonl")
    assert shown.read_text() == "1\n2\n3\n"


def test_a_full_disk_leaves_the_checkpoint_before_in_use(run, monkeypatch):
    saved(run, RunState("rl", 1))
    tmp = run.begin_checkpoint(RunState("rl", 2))
    (tmp / "shard").write_text("half")

    def full(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fp8slurm.run.directory.write_atomic", full)
    with pytest.raises(OSError, match="No space left"):
        run.commit_checkpoint(tmp, RunState("rl", 2))
    assert usable(run) == ["step_000001"] and run.newest_checkpoint() == "step_000001"


def test_a_checkpoint_that_an_older_attempt_sealed_late_is_replaced(run):
    state = RunState("rl", 4)
    saved(run, state, "sealed by the old attempt")
    run.release()
    newer = RunDirectory(run.path)
    newer.acquire()
    saved(newer, state, "new")
    assert (newer.checkpoints / "step_000004" / "shard").read_text() == "new" and usable(newer) == ["step_000004"]
    newer.prune(1, 0)
    assert [p.name for p in newer.checkpoints.iterdir()] == ["step_000004"]


def test_an_old_attempt_that_still_writes_loses(run):
    state = RunState("rl", 4)
    tmp = run.begin_checkpoint(state)
    (tmp / "shard").write_text("old")
    run.release()
    newer = RunDirectory(run.path)
    newer.acquire()
    saved(newer, state, "new")
    with pytest.raises(FencedError, match="attempt 1"):
        run.commit_checkpoint(tmp, state)
    assert (newer.checkpoints / "step_000004" / "shard").read_text() == "new"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "state.json: not JSON"),
        ('{"phase": "rl", "step": 1, "colour": 3}', "state.json: unknown: colour; known are phase, step, cursor"),
        ('{"phase": "ppo", "step": 1}', "state.json: phase 'ppo': allowed are 'sft' and 'rl'"),
        ('{"phase": "rl"}', "state.json: step None: allowed is a whole number"),
        ('{"phase": "rl", "step": 1, "cursor": -2}', "state.json: cursor -2: allowed"),
        ('{"phase": "rl", "step": true}', "state.json: step True: allowed"),
    ],
)
def test_a_state_that_is_none_is_named(tmp_path, text, said):
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(BadCheckpoint, match=re.escape(said)):
        RunState.read(tmp_path)


def test_a_state_of_an_earlier_version_is_read(tmp_path):
    (tmp_path / "state.json").write_text('{"phase": "rl", "step": 3, "cursor": 12}')
    assert RunState.read(tmp_path) == RunState("rl", 3, 12)


@pytest.mark.parametrize(
    ("text", "times", "said"),
    [
        ('{"step_s": 2.5, "save_s": 1}', (2.5, 1.0), ""),
        ('{"step_s": 2.5, "colour": 3}', (2.5, 0.0), "pace.json: left out: colour 3"),
        ('{"step_s": "fast", "save_s": -1}', (0.0, 0.0), "left out: step_s 'fast', save_s -1"),
        ('{"step_s": 2', (0.0, 0.0), "pace.json: not JSON"),
        ("[]", (0.0, 0.0), "pace.json: not a JSON object"),
    ],
)
def test_step_times_that_cannot_be_read_are_said_and_measured_anew(tmp_path, caplog, text, times, said):
    (tmp_path / "pace.json").write_text(text)
    assert StepTimes.read(tmp_path) == StepTimes(*times)
    assert (said in caplog.text) if said else not caplog.text


def test_a_folder_that_cannot_be_read_is_not_an_empty_one(tmp_path, monkeypatch):
    """A run would begin anew, or take itself for replaced."""
    run = RunDirectory(tmp_path / "r")
    run.acquire()

    def fails(path):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(os, "listdir", fails)
    monkeypatch.setattr(os, "scandir", fails)
    for look in (run.newest_attempt, run.newest_checkpoint, run.replaced, lambda: run.prune(1, 0)):
        with pytest.raises(OSError, match="Stale"):
            look()
