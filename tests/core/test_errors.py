"""Whose errors are whose: what commands show, and what the readers of a running job make of the file system's errors."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from fp8slurm.core.errors import BadCheckpoint, InputError, TransientInputError
from fp8slurm.core.files import read_json

PACKAGE = Path(__file__).parents[2] / "fp8slurm"
COMMAND = """
import sys
from fp8slurm import cli
from fp8slurm.core.errors import BadCheckpoint, InputError

def fails(argv):
    {code}

cli.COMMANDS["plan"] = (fails, "")
sys.exit(cli.main(["plan"]))
"""


@pytest.mark.parametrize("error", ["InputError", "BadCheckpoint"])
def test_a_command_shows_what_the_user_has_to_change_as_a_line(error: str) -> None:
    code = COMMAND.format(code=f'raise {error}("--run.steps -1: allowed: 0 or more")')
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "fp8slurm plan: --run.steps -1: allowed: 0 or more\n")


def test_a_command_shows_any_other_error_with_its_traceback() -> None:
    code = COMMAND.format(code='import json; json.loads("")')
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback") and done.stderr.endswith("Expecting value: line 1 column 1 (char 0)\n")


def test_a_file_that_is_no_json_object_is_named(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    with pytest.raises(FileNotFoundError):
        read_json(path)
    for content, message in ((b"", "Expecting value"), (b"\xff", "can't decode"), (b"[1]", "a JSON object")):
        path.write_bytes(content)
        with pytest.raises(TransientInputError, match=f"state.json: not .*{message}") as caught:
            read_json(path)
        assert not caught.value.permanent
    with pytest.raises(BadCheckpoint):
        read_json(path, BadCheckpoint)
    path.write_text('{"step": 3}')
    assert read_json(path) == {"step": 3}


IN_A_JOB = (
    "checkpoint/formats", "core", "data", "engine", "fp8", "models", "observe/metrics.py", "process", "rewards", "rl",
    "rollout", "run", "slurm", "sync", "trainer",
)  # fmt: skip
"""Rooms whose code runs in the tasks of a job."""
NO_FILES = {
    ("data/prompts.py", "render"),
    ("rollout/serialization.py", "decode_groups"),
    ("trainer/checkpoint.py", "_check_object"),
}
"""Functions that catch everything, but around what reads no file."""
OURS = {"ValueError", *(c.__name__ for c in (InputError, TransientInputError, BadCheckpoint)), "BadRow"}


def names(node: ast.expr | None) -> set[str]:
    """What an `except` catches; everything where it names nothing."""
    if node is None:
        return {"BaseException"}
    return {
        n.id if isinstance(n, ast.Name) else n.attr for n in ast.walk(node) if isinstance(n, ast.Name | ast.Attribute)
    }


def swallowed(function: ast.AST) -> list[ast.ExceptHandler]:
    """Handlers that catch an OSError of any kind and raise a ValueError in its place, always."""
    found = []
    for tried in (n for n in ast.walk(function) if isinstance(n, ast.Try)):
        passed_on = False
        for handler in tried.handlers:
            caught = names(handler.type)
            raised = [n.exc for n in ast.walk(handler) if isinstance(n, ast.Raise)]
            reraises = None in raised  # with a condition: the handler looks which one it is
            made = {c.func.id for c in raised if isinstance(c, ast.Call) and isinstance(c.func, ast.Name)}
            everything = caught & {"Exception", "BaseException"} and not passed_on
            if (everything or "OSError" in caught) and made & OURS and not reraises:
                found.append(handler)
            passed_on |= "OSError" in caught
    return found


def test_no_reader_of_a_job_makes_a_value_error_of_the_file_systems() -> None:
    """ESTALE or EIO of a shared file system would be shown as if the file were wrong, and its number would be lost."""
    wrong = []
    for room in IN_A_JOB:
        place = PACKAGE / room
        for path in [place] if place.suffix else sorted(place.rglob("*.py")):
            file = str(path.relative_to(PACKAGE))
            for function in ast.walk(ast.parse(path.read_text())):
                if isinstance(function, ast.FunctionDef) and (file, function.name) not in NO_FILES:
                    wrong += [f"{file}:{handler.lineno}" for handler in swallowed(function)]
    assert not wrong, wrong


def test_the_search_for_swallowed_errors_finds_them() -> None:
    code = """
def read(path):
    try:
        return path.read_text()
    except {caught} as error:
        raise {made}(str(error)) from None
"""
    for caught, made, count in (
        ("OSError", "BadCheckpoint", 1),
        ("(OSError, KeyError)", "ValueError", 1),
        ("Exception", "InputError", 1),
        ("OSError", "RuntimeError", 0),
        ("KeyError", "InputError", 0),
    ):
        assert len(swallowed(ast.parse(code.format(caught=caught, made=made)))) == count, (caught, made)
