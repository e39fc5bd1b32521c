"""Commands in docs/install.md and docs/first-run.md: those marked `sh run` are run, the others' names must exist."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fp8slurm.cli import COMMANDS
from fp8slurm.config import parse, recipe_names

ROOT = Path(__file__).parents[2]
PAGES = ("install.md", "first-run.md")
TIMEOUT_S = 900


def blocks(page: str, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", (ROOT / "docs" / page).read_text(), re.M | re.S)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """What a user sees, with models, data and runs of its own."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in (
        "fp8slurm",
        "tools",
        "requirements",
        "container",
        "sbatch",
        "docs",
        ".venv",
        "pyproject.toml",
        "Makefile",
        "README.md",
    ):
        if (ROOT / name).exists():
            (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_marked_commands_run(page, checkout):
    found = blocks(page, "sh run")
    assert len(found) >= 4
    assert (ROOT / ".venv" / "bin" / "fp8slurm").exists(), "make setup makes the environment that the pages use"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "MAKE"))}
    for block in found:
        for command in block.splitlines():
            if command.startswith("make "):  # the environment is there: a newer file must not make it anew
                command = f"{command} --old-file=.venv/.complete"
            done = subprocess.run(
                ["bash", "-ec", command],
                cwd=checkout,
                env=environment,
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
            )
            assert done.returncode == 0, f"{page}: {command}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
    if page == "first-run.md":
        assert (checkout / "runs" / "first" / "metrics.jsonl").is_file()


@pytest.mark.parametrize("page", PAGES)
def test_other_commands_name_what_is_there(page, checkout):
    makefile = (ROOT / "Makefile").read_text()
    for block in blocks(page, "sh"):
        for line in block.splitlines():
            for target in re.findall(r"\bmake (?:\w+=\S+ )*([a-z0-9-]+)", line):
                assert re.search(rf"^{target}:", makefile, re.M), line
            for name in re.findall(r"fp8slurm ([a-z]+) --", line):
                assert name in COMMANDS, line
            for recipe in re.findall(r"--recipe (\S+)", line):
                assert recipe in recipe_names(), line
            for path in re.findall(r"\b(?:tools|container|sbatch|requirements)/[\w./-]+", line):
                assert (ROOT / path).is_file(), line


def test_settings_that_the_pages_name_exist():
    """Every --section.key in the text is a setting."""
    settings = {f"--{s}.{k.replace('_', '-')}" for s, values in parse(None, []).model_dump().items() for k in values}
    for page in PAGES + ("security.md",):
        for flag in re.findall(r"--[a-z0-9]+\.[a-z0-9-]+", (ROOT / "docs" / page).read_text()):
            assert flag in settings or flag.replace(".no-", ".") in settings, f"{page}: {flag}"


def test_example_lines_are_accepted(tmp_path):
    """The data formats of docs/first-run.md go through the reader that training uses."""
    from fp8slurm.data.prompts import load_prompts, load_sft, load_tokenizer
    from fp8slurm.models.tiny import write_model

    (tmp_path / "model").mkdir()
    write_model(tmp_path / "model")
    tokenizer = load_tokenizer(tmp_path / "model")
    config = parse("tiny-fp8", ["--data.max-prompt-tokens=4096"])
    groups = blocks("first-run.md", "json")
    assert [len(g.splitlines()) for g in groups] == [3, 3, 3]
    for number, group in enumerate(groups):
        assert all(json.loads(line) for line in group.splitlines())
        file = tmp_path / f"{number}.jsonl"
        file.write_text(group)
        if "response" in group:
            assert len(load_sft(config.data, config.sft, tokenizer, file)) == 3
        else:
            assert len(load_prompts(config.data, tokenizer, file)) == 3


def test_links_lead_somewhere():
    for page in (*PAGES, "security.md"):
        for link in re.findall(r"\]\(([^)#:]+)\)", (ROOT / "docs" / page).read_text()):
            assert (ROOT / "docs" / link).exists(), f"{page}: {link}"


@pytest.mark.slow
def test_data_for_the_recipe_out_of_parquet(tmp_path):
    """tools/prefetch.py on files in the shape of the published ones, each question several times."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    ask = [
        {"prompt": [{"role": "user", "content": f"{i}?"}], "reward_model": {"ground_truth": str(i)}} for i in (1, 2, 1)
    ]
    pq.write_table(pa.Table.from_pylist(ask), tmp_path / "dapo.parquet")
    pq.write_table(pa.Table.from_pylist([{"problem": "x", "answer": 7}]), tmp_path / "aime.parquet")
    python = shutil.which("python3", path=str(ROOT / ".venv" / "bin")) or "python3"
    command = [
        python,
        ROOT / "tools" / "prefetch.py",
        "--data",
        tmp_path,
        "--dapo",
        tmp_path / "dapo.parquet",
        "--aime",
        tmp_path / "aime.parquet",
    ]
    subprocess.run(command, check=True, capture_output=True)
    rows = [json.loads(line) for line in (tmp_path / "dapo-math-17k.jsonl").read_text().splitlines()]
    assert [(r["prompt"][0]["content"], r["label"]) for r in rows] == [("1?", "1"), ("2?", "2")]
    (row,) = [json.loads(line) for line in (tmp_path / "aime-2024.jsonl").read_text().splitlines()]
    assert (
        row["label"] == "7" and row["prompt"][0]["content"].startswith("x") and "boxed" in row["prompt"][0]["content"]
    )
