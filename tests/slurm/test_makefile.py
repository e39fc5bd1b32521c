"""What the Makefile's Slurm targets call, and what they say where something is missing. Nothing is built here."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SLURM_TARGETS = ("train-4b-fp8", "train-30b-a3b-fp8", "all-4b-fp8", "all-tiny-fp8")
GPU_TARGETS = SLURM_TARGETS[:3]


class Project:
    """A copy of the Makefile and what it calls, with stand-ins for the commands."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.commands = folder / "project", folder / "commands"
        (self.folder / "tools").mkdir(parents=True)
        self.commands.mkdir()
        shutil.copy(ROOT / "Makefile", self.folder)
        for script in ("require_slurm.sh", "test_packages.sh", "environment.sh"):
            shutil.copy(ROOT / "tools" / script, self.folder / "tools")
        shutil.copytree(ROOT / "fp8slurm" / "config" / "recipes", self.folder / "fp8slurm" / "config" / "recipes")
        for name in ("bash", "sed", "grep", "tail", "timeout", "awk", "cat"):
            (self.commands / name).symlink_to(shutil.which(name))
        for name in (
            "sh",
            "make",
            "uname",
            "printf",
            "wc",
            "true",
            "mkdir",
            "expr",
            "echo",
            "dirname",
            "basename",
            "rm",
            "rmdir",
            "touch",
            "cksum",
        ):
            if shutil.which(name):
                (self.commands / name).symlink_to(shutil.which(name))
        self.command(self.commands / "python3", 'echo "environment built" >&2; exit 9')
        for name in ("model", "train.jsonl", "eval.jsonl"):
            (self.folder / name).touch()
        self.fp8slurm = self.command(self.folder / "own" / "fp8slurm", 'printf "%s\\n" "$@"')

    def command(self, path: Path, *lines: str) -> Path:
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    def environment(self) -> None:
        """.venv as `make setup` leaves it, its python a stand-in."""
        for name in ("requirements/torch.txt", "requirements/cpu.txt", "pyproject.toml"):
            (self.folder / name).parent.mkdir(exist_ok=True)
            (self.folder / name).touch()
        (self.folder / ".venv").mkdir()
        self.command(self.folder / ".venv" / "bin" / "python", 'printf "%s " python "$@"; echo')
        (self.folder / ".venv" / ".complete").touch()

    def slurm(self, gres: str = "gpu:8", status: int = 0) -> None:
        for name in ("sbatch", "srun", "squeue"):
            self.command(self.commands / name, "exit 0")
        self.command(self.commands / "sinfo", f"echo '{gres}'; exit {status}")

    def make(self, *arguments: str) -> subprocess.CompletedProcess:
        environment = {"PATH": str(self.commands), "HOME": str(self.folder), "LANG": "C"}
        return subprocess.run(
            ["make", "--silent", *arguments],
            cwd=self.folder, env=environment, capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    def refused(self, *arguments: str) -> str:
        """What is said; nothing may have been built or started."""
        done = self.make(*arguments)
        assert done.returncode == 2 and "environment built" not in done.stderr and not done.stdout, done
        return done.stderr


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


PATHS = ("HF_CHECKPOINT=model", "PROMPT_DATA=train.jsonl", "EVAL_DATA=eval.jsonl")


@pytest.mark.parametrize("target", SLURM_TARGETS)
def test_without_slurm(project, target):
    output = project.refused(target, *PATHS)
    assert "there is no sbatch on this machine" in output and "login node" in output and "make train-tiny-fp8" in output
    project.slurm("sinfo: error: Unable to contact slurm controller", status=1)
    output = project.refused(target, *PATHS)
    assert "Slurm does not answer (sinfo: error: Unable to contact slurm controller)" in output


@pytest.mark.parametrize("target", GPU_TARGETS)
def test_without_gpus_data_or_an_environment(project, target):
    project.slurm("(null)")
    assert "no node with GPUs" in project.refused(target, *PATHS)
    project.slurm()
    assert "HF_CHECKPOINT=nowhere: there is no such path" in project.refused(target, "HF_CHECKPOINT=nowhere")
    assert "give the Hugging Face folder of the model in BF16 with HF_CHECKPOINT=PATH" in project.refused(target)
    assert "with EVAL_DATA=PATH" in project.refused(target, *PATHS[:2])
    assert "TransformerEngine" in project.refused(target, *PATHS)


def test_the_tiny_chain_needs_no_gpus(project):
    project.slurm("(null)")
    project.environment()
    done = project.make("all-tiny-fp8", f"FP8SLURM={project.fp8slurm}", "RUN=runs/x")
    assert done.stdout.splitlines()[0].startswith("python tools/make_tiny.py"), done
    assert done.stdout.splitlines()[1:] == ["chain", "--recipe", "tiny-fp8", "--run.root=runs", "--run.name=x"]


@pytest.mark.parametrize(
    "target, command, recipe",
    [
        ("train-4b-fp8", "submit", "qwen3-4b-fp8"),
        ("train-30b-a3b-fp8", "submit", "qwen3-30b-a3b-fp8"),
        ("all-4b-fp8", "chain", "qwen3-4b-fp8"),
    ],
)
def test_variables_become_settings(project, target, command, recipe):
    project.slurm()
    more = ("RUN=some/where/mine/", "ARGS=--slurm.partition gpu --rollout.n-samples=16")
    done = project.make(target, f"FP8SLURM={project.fp8slurm}", *PATHS, *more)
    assert done.stdout.split() == [
        command, "--recipe", recipe, "--run.root=some/where", "--run.name=mine", "--model.hf-checkpoint=model",
        "--data.train=train.jsonl", "--data.eval=eval.jsonl", "--slurm.partition", "gpu", "--rollout.n-samples=16",
    ], done  # fmt: skip
    by_flags = "--model.hf-checkpoint model --prompt-data=train.jsonl --data.eval eval.jsonl"
    done = project.make(target, f"FP8SLURM={project.fp8slurm}", f"ARGS={by_flags}")
    assert done.stdout.split() == [command, "--recipe", recipe, *by_flags.split()], done


def test_settings_are_settings(project):
    """What the Makefile passes on is what the configuration takes."""
    from fp8slurm.config import parse

    flags = ["--run.root=a/b", "--run.name=c", "--model.hf-checkpoint=m", "--data.train=t", "--data.eval=e"]
    config = parse("qwen3-4b-fp8", flags)
    assert (config.run.root / config.run.name, config.model.hf_checkpoint) == (Path("a/b/c"), Path("m"))


def test_converting(project):
    assert "give the Hugging Face folder with HF_CHECKPOINT=models/X" in project.refused("convert-fp8")
    assert "HF_CHECKPOINT=nowhere: there is no such folder" in project.refused("convert-fp8", "HF_CHECKPOINT=nowhere")
    (project.folder / "folder").mkdir()
    own = f"FP8SLURM={project.fp8slurm}"
    done = project.make("convert-fp8", "HF_CHECKPOINT=folder/", own)
    assert done.stdout.split() == ["convert", "hf-to-fp8", "folder/", "folder-FP8"]
    done = project.make("convert-fp8", "HF_CHECKPOINT=folder", "FP8_CHECKPOINT=out", "ARGS=--jobs 2", own)
    assert done.stdout.split() == ["convert", "hf-to-fp8", "folder", "out", "--jobs", "2"]


def test_evaluating_and_status(project):
    own = f"FP8SLURM={project.fp8slurm}"
    assert "RUN=runs/tiny-fp8: there is no run" in project.refused("eval-fp8")
    (project.folder / "runs" / "a").mkdir(parents=True)
    (project.folder / "runs" / "a" / "config.json").touch()
    assert project.make("eval-fp8", "RUN=runs/a", own).stdout.split() == ["eval", "--run", "runs/a"]
    done = project.make("eval-fp8", "RUN=runs/a", "EVAL_DATA=eval.jsonl", own)
    assert done.stdout.split() == ["eval", "--run", "runs/a", "--tasks", "eval.jsonl"]
    assert project.make("eval-fp8", "RUN=runs/a", "NODES=2", own).stdout.split()[-2:] == ["--nodes", "2"]
    assert project.make("status", own).stdout.split() == ["status"]
    assert project.make("status", "RUN=runs/a", "ARGS=--json", own).stdout.split() == ["status", "runs/a", "--json"]


def test_help_lists_every_target(project):
    shown = project.make("help").stdout
    text = (ROOT / "Makefile").read_text()
    phony = text.partition(".PHONY:")[2].partition("\n\n")[0].replace("\\\n", " ").split()
    known = {*SLURM_TARGETS, "convert-fp8", "eval-fp8", "status", "test-faults", "help", "test", "train-tiny-fp8"}
    assert known <= set(phony)
    for target in phony:
        assert f"  {target} " in shown, target
    for variable in ("RUN=", "HF_CHECKPOINT=", "PROMPT_DATA=", "EVAL_DATA=", "ARGS=", "FP8SLURM="):
        assert variable in shown


def test_an_environment_of_somebody_else_is_never_rebuilt(project):
    """One that make did not build: older than the requirements, without make's mark, inside the project or outside."""
    project.environment()
    outside = project.folder.parent / "envs" / "mine"
    (project.folder / ".venv" / ".complete").unlink()
    project.command(project.folder / ".venv" / "bin" / "fp8slurm", 'printf "%s " "$@"')
    shutil.copytree(project.folder / ".venv", outside)
    os.utime(project.folder / ".venv" / "bin" / "fp8slurm", (1, 1))
    for more in ((), (f"VENV={outside}",)):
        assert project.make("plot", "RUN=runs/a", *more).stdout.split() == ["plot", "runs/a"]
        assert "make_tiny.py" in project.make("tiny-data", *more).stdout
        assert project.make("setup", *more).returncode == 0
    (project.folder / ".venv" / "bin" / "fp8slurm").unlink()
    done = project.make("setup")  # what an interrupted setup leaves is built anew
    assert "environment built" in done.stderr


def test_jobs_keep_their_environment(project):
    """Requirements that changed do not rebuild the environment that queued and running jobs use."""
    project.slurm()
    project.environment()
    project.command(project.folder / ".venv" / "bin" / "fp8slurm", 'printf "%s " "$@"')
    (project.folder / ".venv" / "lib" / "python3.12" / "site-packages" / "transformer_engine").mkdir(parents=True)
    os.utime(project.folder / ".venv" / ".complete", (1, 1))
    for target, output in (("train-4b-fp8", "submit"), ("all-4b-fp8", "chain"), ("status", "status")):
        done = project.make(target, *PATHS)
        assert done.returncode == 0 and done.stdout.startswith(output), done
    assert "environment built" in project.make("setup").stderr


def test_tests_are_chosen_by_their_markers(project):
    project.environment()
    side_by_side = "--numprocesses 2 --dist loadfile"
    for target, how in (
        ("test", f"{side_by_side} -m not faults"),
        ("test-fast", f"{side_by_side} -m not slow"),
        ("test-faults", f"{side_by_side} -m slurm or faults"),
    ):
        ran = project.make(target, "ARGS=-x").stdout.splitlines()[-1]
        assert ran.strip() == f"python -m pytest {how} -x"


def test_lint_stops_at_its_first_finding(project):
    project.environment()
    tools = {"ruff": "ruff $1", "lint-imports": "lint-imports", "mypy": "mypy"}
    for name, text in tools.items():
        project.command(project.folder / ".venv" / "bin" / name, f'echo "{text}"')
    assert project.make("lint").stdout.splitlines() == ["ruff format", "ruff check", "lint-imports", "mypy"]
    project.command(project.folder / ".venv" / "bin" / "lint-imports", "echo broken; exit 1")
    done = project.make("lint")
    assert done.returncode == 2 and done.stdout.splitlines() == ["ruff format", "ruff check", "broken"]


def test_a_folder_that_make_did_not_make_is_never_removed(project):
    project.environment()
    mine = project.folder / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("x")
    project.command(project.commands / "python3", '[ "$2" = venv ] && mkdir -p "$3" || exit 0')
    done = project.make("setup", "VENV=mine")
    assert done.returncode == 2 and "VENV=mine holds something that make did not put there" in done.stderr
    assert "stays" in project.make("clean", "VENV=mine").stdout and (mine / "notes.txt").read_text() == "x"
    (mine / ".made-by-make").touch()  # what an interrupted setup leaves
    project.make("setup", "VENV=mine")
    assert not (mine / "notes.txt").exists()
    assert project.make("clean").returncode == 0 and not (project.folder / ".venv").exists()


def test_paths_may_have_spaces(project):
    project.slurm()
    (project.folder / "my model").mkdir()
    done = project.make(
        "train-4b-fp8", f"FP8SLURM={project.fp8slurm}", "HF_CHECKPOINT=my model", *PATHS[1:], "RUN=my runs/the first/"
    )
    assert done.stdout.splitlines()[3:6] == [
        "--run.root=my runs",
        "--run.name=the first",
        "--model.hf-checkpoint=my model",
    ], done


def built(project: Project, *more: str) -> list[str]:
    """Which folders `make setup` has built an environment in; its python is a stand-in that makes it."""
    project.command(
        project.commands / "python3",
        'if [ "$2" = venv ]; then mkdir -p "$3/bin"; printf "#!/bin/sh\\n" > "$3/bin/pip"; chmod +x "$3/bin/pip"; '
        'cp "$3/bin/pip" "$3/bin/fp8slurm"; echo "built $3" >&2; fi; exit 0',
    )  # fmt: skip
    done = project.make("setup", *more)
    assert done.returncode == 0, done
    return [line.removeprefix("built ") for line in done.stderr.splitlines() if line.startswith("built")]


def test_the_contents_of_requirements_decide(project):
    """A checkout or a copy gives files other times; an environment of an earlier make, which kept no sum, goes by them."""
    for name in ("chmod", "cp"):
        (project.commands / name).symlink_to(shutil.which(name))
    project.environment()
    assert built(project) == [] and not (project.folder / ".venv" / ".complete").read_text()
    os.utime(project.folder / ".venv" / ".complete", (1, 1))
    assert built(project) == [".venv"] and built(project) == []
    for name in ("requirements/torch.txt", "requirements/cpu.txt", "pyproject.toml"):
        os.utime(project.folder / name)
        assert built(project) == [], "only its time is new"
        (project.folder / name).write_text("torch==3")
        os.utime(project.folder / name, (1, 1))
        assert built(project) == [".venv"], "its content is new, whatever its time"
    (project.folder / ".venv" / ".complete").unlink()  # interrupted
    assert built(project) == [".venv"]


@pytest.mark.parametrize("older_make", [False, True])
def test_the_environment_of_another_checkout_is_never_touched(project, tmp_path, older_make):
    """make VENV=X removed and rebuilt X, which was in use, because the other checkout's files had other times."""
    for name in ("chmod", "cp"):
        (project.commands / name).symlink_to(shutil.which(name))
    project.environment()
    shared = tmp_path / "envs" / "shared"
    assert built(project, f"VENV={shared}") == [str(shared)]
    project.command(shared / "bin" / "fp8slurm", 'printf "%s " "$@"')
    project.command(shared / "bin" / "python", 'printf "%s " python "$@"; echo')
    if older_make:
        for name in (".made-by-make", ".complete"):
            (shared / name).write_text("")
    other = tmp_path / "other"
    shutil.copytree(project.folder, other)
    (other / "requirements" / "torch.txt").write_text("torch==3")
    project.folder, first = other, project.folder
    assert built(project, f"VENV={shared}") == []
    assert project.make("plot", "RUN=runs/a", f"VENV={shared}").stdout.split() == ["plot", "runs/a"]
    assert "stays" in project.make("clean", f"VENV={shared}").stdout and (shared / "bin" / "python").exists()
    if not older_make:  # whose it is may build it anew, and remove it
        project.folder = first
        (first / "requirements" / "torch.txt").write_text("torch==4")
        assert built(project, f"VENV={shared}") == [str(shared)]
        assert project.make("clean", f"VENV={shared}").returncode == 0 and not shared.exists()
