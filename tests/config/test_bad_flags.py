"""What a flag's value is refused with: the flag, the value, what is allowed, and nothing else."""

import pytest

from fp8slurm.cli import main
from fp8slurm.config import parse


@pytest.mark.parametrize(
    "flags, output",
    [
        (["--rollout.n-samples", "0"], "--rollout.n-samples 0: allowed: greater than or equal to 1"),
        (["--optim.lr=-1"], "--optim.lr -1.0: allowed: greater than 0"),
        (["--engine.mem-fraction", "1.5"], "--engine.mem-fraction 1.5: allowed: less than 1"),
        (["--run.seed=-1"], "--run.seed -1: allowed: greater than or equal to 0"),
        (["--run.name", "../x"], "--run.name '../x' leads out of"),
        (["--run.name", "/x"], "--run.name '/x' leads out of"),
        (["--run.name", "a\n#SBATCH --x"], "--run.name 'a.n#SBATCH --x' leads out of"),
        (["--run.name", "x" * 300], "--run.name of 300 characters"),
        (["--rollout.top-k", "0"], "--rollout.top-k 0: 0 tokens to choose from; allowed: 1 or more, or -1"),
        (["--eval.max-tokens", "0"], "--eval.max-tokens 0: allowed: greater than or equal to 1"),
        (["--engine.max-total-tokens=-7"], "--engine.max-total-tokens -7: allowed"),
        (["--engine.context-length", "0"], "--engine.context-length 0: allowed"),
        (["--run.name", "a/b/c"], "--run.name 'a/b/c' is a path; allowed: --run.root ROOT/a/b --run.name c"),
        (["--run.name", "a/"], "--run.name 'a/' is a path; allowed: --run.root ROOT --run.name a"),
        (
            ["--data.chat-template-kwargs", "enable_thinking", "false"],
            "enable_thinking 'false' is text; allowed: True and False",
        ),
        (
            ["--data.chat-template-kwargs", '{"enable_thinking": "False"}'],
            "enable_thinking 'False' is text; allowed: True and False",
        ),
        (
            ["--data.chat-template-kwargs", '{"tools": [1]}'],
            "tools .1. is neither .* allowed: enable_thinking False, or as JSON",
        ),
    ],
)
def test_a_value_out_of_range_names_its_flag(flags, output):
    with pytest.raises(ValueError, match=f"(?s)^.*{output}") as refused:
        parse("tiny-fp8", flags)
    assert "pydantic" not in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "words, values",
    [
        (["enable_thinking", "False"], {"enable_thinking": False}),
        (
            ['{"enable_thinking": false, "effort": "1", "budget": 0.5}'],
            {"enable_thinking": False, "effort": "1", "budget": 0.5},
        ),
        (["budget", "512", "effort", "high"], {"budget": 512, "effort": "high"}),
        (["{}"], {}),
        ([], {}),
    ],
)
def test_arguments_of_the_template_are_pairs_or_json(words, values):
    got = parse("tiny-fp8", ["--data.chat-template-kwargs", *words, "--run.steps", "3"])
    assert got.data.chat_template_kwargs == values and got.run.steps == 3
    kinds = [type(v) for v in got.data.chat_template_kwargs.values()]
    assert kinds == [type(v) for v in values.values()]


def test_flags_of_sbatch_without_a_value():
    flags = ["--slurm.sbatch", "exclusive", "True", "mail-type", "END", "begin", "0800"]
    assert parse("tiny-fp8", flags).slurm.sbatch == {"exclusive": True, "mail-type": "END", "begin": "0800"}


@pytest.mark.parametrize("words", [["enable_thinking"], ["enable_thinking=False"], ['{"enable_thinking": }']])
def test_other_forms_are_refused_with_those_that_are_allowed(words, capsys):
    with pytest.raises(SystemExit) as ended:
        parse("tiny-fp8", ["--data.chat-template-kwargs", *words])
    output = " ".join(line.strip("\u2502 ") for line in capsys.readouterr().err.splitlines())
    assert ended.value.code == 2 and "allowed: enable_thinking False, or as JSON" in " ".join(output.split())


def test_a_recipe_that_cannot_be_read(tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "mine.toml"
    recipe.write_text("")
    monkeypatch.setattr(
        "pathlib.Path.read_text",
        lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "Permission denied", str(recipe))),
    )
    assert main(["train", "--recipe", str(recipe)]) == 2
    assert capsys.readouterr().err == f"fp8slurm train: --recipe {recipe}: cannot be read: Permission denied\n"


def test_a_path_of_somebody_else_is_no_traceback(monkeypatch, capsys):
    def refused(_):
        raise PermissionError(13, "Permission denied", "/theirs/config.json")

    monkeypatch.setitem(__import__("fp8slurm.cli").cli.COMMANDS, "plot", (refused, ""))
    assert main(["plot", "x"]) == 2
    assert capsys.readouterr().err == "fp8slurm plot: /theirs/config.json: Permission denied\n"
    monkeypatch.setitem(
        __import__("fp8slurm.cli").cli.COMMANDS, "plot", (lambda _: (_ for _ in ()).throw(OSError("own fault")), "")
    )
    with pytest.raises(OSError):
        main(["plot", "x"])


def test_version(capsys):
    assert main(["--version"]) == 0 and capsys.readouterr().out.startswith("fp8slurm ")
