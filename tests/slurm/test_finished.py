"""A run that is finished stays what it is, whatever a second start asks for."""

import json

import pytest

from fp8slurm.config import parse
from fp8slurm.core.errors import InputError
from fp8slurm.run.directory import RunDirectory
from fp8slurm.slurm import attempt


@pytest.fixture
def done(tmp_path):
    config = parse("tiny-fp8", [f"--run.root={tmp_path}", "--run.name=r", "--run.steps=60"])
    run = RunDirectory(tmp_path / "r")
    (run.checkpoints / "step_000060").mkdir(parents=True)
    (run.checkpoints / "step_000060" / "COMPLETE").write_text("{}")
    (run.path / "config.json").write_text(config.model_dump_json())
    return config, run


@pytest.mark.parametrize("steps, expected", [(61, False), (60, True), (30, True), (0, True)])
def test_fewer_steps_than_were_made_is_finished(done, steps, expected):
    config, run = done
    changed = config.model_copy(update={"run": config.run.model_copy(update={"steps": steps})})
    assert attempt.finished(changed, run) == expected
    (run.checkpoints / "step_000060").rename(run.checkpoints / "sft_000060")
    assert not attempt.finished(changed, run)


def test_looking_writes_nothing(done):
    config, run = done
    before = (run.path / "config.json").read_text()
    other = config.model_copy(update={"rollout": config.rollout.model_copy(update={"n_samples": 16})})
    assert attempt.check_configuration(other, run) == ["rollout.n_samples: 8 -> 16"]
    assert (run.path / "config.json").read_text() == before


@pytest.mark.parametrize(
    "flags, status",
    [
        ([], 0),
        (["--slurm.time=60", "--slurm.partition=x"], 0),
        (["--rollout.n-samples=16"], 2),
        (["--run.steps=30"], 2),
    ],
)
def test_a_finished_run_submitted_with_other_settings_says_that_they_change_nothing(
    done, monkeypatch, capsys, flags, status
):
    """How a job is asked for is no setting of what was made."""
    from fp8slurm import cli
    from fp8slurm.check import cluster

    config, _ = done
    monkeypatch.setattr(cli, "_check", lambda *_: None)
    monkeypatch.setattr(cluster, "check_cluster", lambda _: [])
    run = [f"--run.root={config.run.root}", "--run.name=r", "--run.steps=60"]
    assert cli.main(["submit", "--recipe=tiny-fp8", *run, *flags]) == status
    said = capsys.readouterr()
    assert "is finished: 60 steps" in said.out and ("change nothing" in said.err) == (status == 2)


def test_a_second_start_changes_no_record(done, monkeypatch, capsys):
    from fp8slurm import cli

    config, run = done
    monkeypatch.setattr(attempt, "damage", lambda _: None)
    other = config.model_copy(update={"rollout": config.rollout.model_copy(update={"n_samples": 16})})
    assert cli._train_here(config) == 0
    assert "is finished: 60 steps" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"change nothing: rollout.n_samples: 8 -> 16\. .*--run.name"):
        cli._train_here(other)
    assert json.loads((run.path / "config.json").read_text())["rollout"]["n_samples"] == 8
    assert not run.attempts.exists()
    foreign = config.model_copy(update={"run": config.run.model_copy(update={"seed": 5})})
    with pytest.raises(ValueError, match="belongs to another run"):
        cli._train_here(foreign)
    assert not run.attempts.exists()
