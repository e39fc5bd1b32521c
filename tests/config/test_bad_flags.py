"""What a flag's value is refused with: the flag, the value, what is allowed, and nothing else."""

import pytest
from fp8slurm.cli import main
from fp8slurm.config import parse


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--rollout.n-samples", "0"], "--rollout.n-samples 0: allowed: greater than or equal to 1"),
        (["--optim.lr=-1"], "--optim.lr -1.0: allowed: greater than 0"),
        (["--engine.mem-fraction", "1.5"], "--engine.mem-fraction 1.5: allowed: less than 1"),
        (["--run.seed=-1"], "--run.seed -1: allowed: greater than or equal to 0"),
        (["--run.name", "../x"], "--run.name '../x' leads out of"),
        (["--run.name", "/x"], "--run.name '/x' leads out of"),
        (["--run.name", "a\n#SBATCH --x"], "--run.name 'a.n#SBATCH --x' leads out of"),
        (["--run.name", "x" * 300], "--run.name of 300 characters"),
        (["--data.chat-template-kwargs", "enable_thinking", "false"], "enable_thinking 'false' is text; allowed: True and False"),
    ],
)
def test_a_value_out_of_range_names_its_flag(flags, said):
    with pytest.raises(ValueError, match=f"(?s)^.*{said}") as refused:
        parse("tiny-fp8", flags)
    assert "pydantic" not in str(refused.value) and "\n" not in str(refused.value)


def test_truth_values_for_the_template():
    flags = ["--data.chat-template-kwargs", "enable_thinking", "False"]
    assert parse("tiny-fp8", flags).data.chat_template_kwargs == {"enable_thinking": False}


def test_a_recipe_that_cannot_be_read(tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "mine.toml"
    recipe.write_text("")
    monkeypatch.setattr("pathlib.Path.read_text", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "Permission denied", str(recipe))))
    assert main(["train", "--recipe", str(recipe)]) == 2
    assert capsys.readouterr().err == f"fp8slurm train: --recipe {recipe}: cannot be read: Permission denied\n"


def test_a_path_of_somebody_else_is_no_traceback(monkeypatch, capsys):
    def refused(_):
        raise PermissionError(13, "Permission denied", "/theirs/config.json")

    monkeypatch.setitem(__import__("fp8slurm.cli").cli.COMMANDS, "plot", (refused, ""))
    assert main(["plot", "x"]) == 2
    assert capsys.readouterr().err == "fp8slurm plot: /theirs/config.json: Permission denied\n"
    monkeypatch.setitem(__import__("fp8slurm.cli").cli.COMMANDS, "plot", (lambda _: (_ for _ in ()).throw(OSError("own fault")), ""))
    with pytest.raises(OSError):
        main(["plot", "x"])


def test_version(capsys):
    assert main(["--version"]) == 0 and capsys.readouterr().out.startswith("fp8slurm ")
