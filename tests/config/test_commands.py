"""What the commands that take a recipe have in common."""

import pytest

from fp8slurm.cli import COMMANDS, main

WITH_SETTINGS = ["train", "submit", "chain", "plan", "worker", "after"]


def help_of(command: str, capsys, monkeypatch, width: int = 80) -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", WITH_SETTINGS)
def test_help_is_one_page(command, capsys, monkeypatch):
    for width in (80, 140):
        output = help_of(command, capsys, monkeypatch, width)
        assert output.count("usage:") == 1 and output.startswith(f"usage: fp8slurm {command} ")
        assert output.count("--recipe RECIPE") == 1 and "--run.name" in output
        assert ("--dry-run" in output) == (command in ("train", "submit", "chain"))
        assert max(map(len, output.splitlines())) <= width


@pytest.mark.parametrize("command", WITH_SETTINGS)
def test_one_recipe(command, capsys):
    status = ["0"] if command == "after" else []
    assert main([command, *status, "--recipe", "tiny-fp8", "--run.steps=3", "--recipe=qwen3-4b-fp8"]) == 2
    assert "--recipe qwen3-4b-fp8, and before it --recipe tiny-fp8; allowed: one of them" in capsys.readouterr().err


def test_every_command_is_listed_with_a_line(capsys):
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out.split("commands:")[1]
    for name, (_, what) in COMMANDS.items():
        assert f"    {name} " in listed and " ".join(what.split()[:4]) in listed
    with pytest.raises(SystemExit):
        main(["trian"])
    assert "invalid choice: 'trian' (choose from " in capsys.readouterr().err


def test_a_task_of_a_job_has_no_dry_run(capsys):
    assert main(["worker", "--recipe", "tiny-fp8", "--dry-run"]) == 2
    assert "fp8slurm submit --dry-run" in capsys.readouterr().err
