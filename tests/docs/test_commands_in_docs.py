"""The pages: commands marked `sh run` are run, names in the others exist, links lead somewhere, tables are readable."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest

from fp8slurm.check.objective import check_objective
from fp8slurm.cli import COMMANDS
from fp8slurm.config import parse, read_recipe, recipe_names
from fp8slurm.config.schema import RewardSection
from fp8slurm.core.types import Prompt, Sample, SampleGroup
from fp8slurm.rewards.pool import RewardPool

ROOT = Path(__file__).parents[2]
RUN = ("docs/install.md", "docs/first-run.md")
PAGES = ("README.md", "CONTRIBUTING.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md")))
LONGEST_CELL = 150
TIMEOUT_S = 900


def blocks(page: str, *kinds: str) -> list[str]:
    """The page's blocks between ``` and ```, of these kinds (the words behind the first ```)."""
    every = re.findall(r"^```([^\n]*)\n(.*?)^```$", (ROOT / page).read_text(), re.M | re.S)
    return [text for kind, text in every if kind in kinds]


def without_blocks(page: str) -> str:
    return re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the page's headings: small letters, hyphens for spaces, no other signs."""
    headings = re.findall(r"^#+ (.*)", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"\]\([^)]*\)", "", h).lower()).strip().replace(" ", "-") for h in headings}


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
        "examples",
        ".venv",
        "pyproject.toml",
        "Makefile",
        "README.md",
    ):
        if (ROOT / name).exists():
            (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN)
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
            # The headline checkpoints are not here: a dry run describes the run, says so, and ends with 2.
            status = 2 if "--dry-run" in command else 0
            assert done.returncode == status, f"{page}: {command}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
    if page == "docs/first-run.md":
        assert (checkout / "runs" / "first" / "metrics.jsonl").is_file()


@pytest.mark.parametrize("page", PAGES)
def test_other_commands_name_what_is_there(page):
    makefile = (ROOT / "Makefile").read_text()
    for block in blocks(page, "sh", ""):
        for line in block.splitlines():
            for target in re.findall(r"^(?:\w+=\S+ )*make (?:\w+=\S+ )*([a-z0-9-]+)", line):
                assert re.search(rf"^{target}:", makefile, re.M), line
            for name in re.findall(r"fp8slurm ([a-z]+) --", line):
                assert name in COMMANDS, line
            for recipe in re.findall(r"--recipe ([\w./-]+)", line):
                assert recipe in recipe_names() or recipe.endswith(".toml"), line
                if recipe.startswith("examples/"):
                    read_recipe(ROOT / recipe)
            for path in re.findall(r"(?<![\w/.-])(?:tools|tests|container|sbatch|requirements)/[\w./-]*\w", line):
                assert (ROOT / path).exists(), line


@pytest.mark.parametrize("page", PAGES)
def test_settings_that_the_pages_name_exist(page):
    """Every --section.key in the text is a setting."""
    settings = {f"--{s}.{k.replace('_', '-')}" for s, values in parse(None, []).model_dump().items() for k in values}
    for flag in re.findall(r"--[a-z0-9]+\.[a-z0-9-]+", (ROOT / page).read_text()):
        assert flag in settings or flag.replace(".no-", ".") in settings, f"{page}: {flag}"


@pytest.mark.parametrize("page", (*PAGES, "CHANGELOG.md"))
def test_files_that_the_pages_name_are_there(page):
    """tests/x.py and the like from the project's folder, sync/plan.py and the like from fp8slurm/."""
    rooms = "|".join(p.parent.name for p in (ROOT / "fp8slurm").glob("*/__init__.py"))
    paths = rf"(?<![\w/.-])(?:fp8slurm|tests|tools|sbatch|container|requirements|{rooms})/[\w/.-]+\.\w+"
    for path in re.findall(paths, without_blocks(page)):
        if not path.startswith("data/"):  # a user's
            assert (ROOT / path).exists() or (ROOT / "fp8slurm" / path).exists(), f"{page}: {path}"


@pytest.mark.parametrize("page", (*PAGES, "CHANGELOG.md"))
def test_cells_of_tables_are_short(page):
    """A cell is read at a glance; what needs more room is a sentence below the table."""
    for line in without_blocks(page).splitlines():
        if line.startswith("|"):
            for cell in re.split(r"(?<!\\)\|", line.strip().strip("|")):
                assert len(cell.strip()) <= LONGEST_CELL, f"{page}: {len(cell.strip())} characters: {cell.strip()}"


@pytest.mark.parametrize("picture", sorted(p.name for p in (ROOT / "docs").glob("*.svg")))
def test_pictures_are_whole_and_load_nothing(picture):
    text = (ROOT / "docs" / picture).read_text()
    assert ElementTree.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
    assert re.findall(r"<script|https?://(?!www\.w3\.org/)|@import", text) == []


def test_every_page_is_listed():
    """docs/README.md says which page is for whom."""
    text = (ROOT / "docs/README.md").read_text()
    pages = [page.removeprefix("docs/") for page in PAGES if page.startswith("docs/") and page != "docs/README.md"]
    assert [page for page in pages if page not in text] == []


def test_rooms_in_the_tree_are_those_that_there_are():
    """README's tree has a line for every package of fp8slurm/."""
    listed = re.findall(r"^fp8slurm/(\w+)/ ", (ROOT / "README.md").read_text(), re.M)
    assert sorted(listed) == sorted(p.parent.name for p in (ROOT / "fp8slurm").glob("*/__init__.py"))


def test_the_reward_in_the_readme_works(tmp_path, monkeypatch):
    """The function and the flag as README.md gives them, through the pool that the rollout worker uses."""
    (source,) = blocks("README.md", "python")
    (flag,) = re.findall(r"--reward\.kind ([\w.:]+)", (ROOT / "README.md").read_text())
    module, _, name = flag.partition(":")
    assert f"`{module}.py`" in (ROOT / "README.md").read_text() and f"def {name}(" in source
    (tmp_path / f"{module}.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    responses = ["879", " 872\n", "8794", "8", ""]
    group = SampleGroup(Prompt(0, (1,), "879"), [Sample([], [], [], "stop", text=text) for text in responses])
    with RewardPool(RewardSection(kind=flag, timeout_s=60), workers=1) as pool:
        pool.score([group])
    assert [round(sample.reward, 3) for sample in group.samples] == [1.0, 0.667, 0.75, 0.333, 0.0]


def test_what_can_be_copied_is_what_is_shown(monkeypatch):
    """Each block of docs/customize.md that names a file of examples/ is in it; tests/e2e/test_customize.py runs them."""
    monkeypatch.chdir(ROOT)
    found = [block.split("\n", 1) for block in blocks("docs/customize.md", "python", "toml")]
    named = [(first.removeprefix("# "), text.strip()) for first, text in found if first.startswith("# examples/")]
    assert named and all(text in (ROOT / path).read_text() for path, text in named)
    for kind in re.findall(r"--reward\.kind ([\w.:]+)", (ROOT / "docs/customize.md").read_text()):
        RewardPool(RewardSection(kind=kind, timeout_s=60), workers=1).close()
    for flags in re.findall(r'ARGS="([^"]*--algorithm[^"]*)"', (ROOT / "docs/customize.md").read_text()):
        check_objective(parse("tiny-fp8", flags.split()))


def test_example_lines_are_accepted(tmp_path):
    """The data formats of docs/first-run.md go through the reader that training uses."""
    from tiny import write_model

    from fp8slurm.data.prompts import load_prompts, load_sft, load_tokenizer

    (tmp_path / "model").mkdir()
    write_model(tmp_path / "model")
    tokenizer = load_tokenizer(tmp_path / "model")
    config = parse("tiny-fp8", ["--data.max-prompt-tokens=4096"])
    groups = blocks("docs/first-run.md", "json")
    assert [len(g.splitlines()) for g in groups] == [3, 3, 3]
    for number, group in enumerate(groups):
        assert all(json.loads(line) for line in group.splitlines())
        file = tmp_path / f"{number}.jsonl"
        file.write_text(group)
        if "response" in group:
            assert len(load_sft(config.data, config.sft, tokenizer, file)) == 3
        else:
            assert len(load_prompts(config.data, tokenizer, file)) == 3


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = without_blocks(page)
    for link in re.findall(r"\]\(([^):]+)\)", text) + re.findall(r'src="([^":]+)"', text):
        path, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert target.exists(), f"{page}: {link}"
        assert not anchor or anchor in anchors(target), f"{page}: {link}"


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
