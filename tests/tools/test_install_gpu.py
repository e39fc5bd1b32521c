"""The set gpu: what the install script would do, the containers, requirements/gpu.txt and pyproject.toml agree."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from fp8slurm.check.doctor import versions

ROOT = Path(__file__).resolve().parents[2]
CONTAINERS = ("container/Dockerfile", "container/apptainer.def")
LAST = ["transformer-engine-torch", "megatron-core"]
"""Not among the wheels that come first: compiled for their torch, and without heed to the Python it asks for."""


def pins() -> dict[str, str]:
    lines = (ROOT / "requirements" / "gpu.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def printed(*arguments: str) -> list[list[str]]:
    done = subprocess.run(
        [ROOT / "tools" / "install_gpu.sh", *arguments], capture_output=True, text=True, check=True, env={"DRY_RUN": "1", "PATH": "/usr/bin:/bin"}
    )  # fmt: skip
    return [shlex.split(line) for line in done.stdout.splitlines()]


def test_the_script_installs_every_pin_once_and_nothing_else_in_a_version_of_its_own() -> None:
    commands = printed("VENV", "python3.12")
    asked = [word for command in commands for word in command if "==" in word]
    assert sorted(asked) == sorted(f"{name}=={version}" for name, version in pins().items())
    installs = [command for command in commands if "install" in command]
    wheels, te, megatron = (next(c for c in installs if f"{name}=={pins()[name]}" in c) for name in ("torch", *LAST))
    assert installs.index(wheels) < installs.index(te) < installs.index(megatron)
    assert {"--no-deps", "--only-binary"} <= set(wheels) and {"--no-deps", "--no-build-isolation"} <= set(te)
    assert commands[0] == ["python3.12", "-m", "venv", "VENV"]
    assert commands[-1] == ["VENV/bin/fp8slurm", "doctor", "--quick"]


def test_every_command_writes_into_the_environment_and_nowhere_else() -> None:
    for command in printed("ELSEWHERE/VENV", "python3.12")[1:]:
        while command[0] == "env" or re.match(r"\w+=", command[0]):
            command = command[1:]
        assert command[0].startswith("ELSEWHERE/VENV/bin/"), command


def test_headers_for_the_compiler_come_out_of_the_wheels() -> None:
    (te,) = (c for c in printed("VENV") if any("transformer-engine-torch" in word for word in c))
    (headers,) = (word for word in te if word.startswith("CPATH="))
    wheels = {"cudnn": "nvidia-cudnn-cu13", "nccl": "nvidia-nccl-cu13", "cu13": "nvidia-cublas"}
    assert headers == "CPATH=" + ":".join(f"VENV/lib/python3.12/site-packages/nvidia/{f}/include" for f in wheels)
    assert set(wheels.values()) <= pins().keys()


def test_the_set_has_what_the_project_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in [*project["dependencies"], *project["optional-dependencies"]["gpu"]]:
        asked = Requirement(text)
        assert asked.name in pins(), text
        assert asked.specifier.contains(pins()[asked.name]), f"{text}, requirements/gpu.txt has {pins()[asked.name]}"


def test_another_python_than_the_wheels_are_for_is_refused_by_name(tmp_path: Path) -> None:
    for name, text in {
        "nvcc": "",
        "python3.11": f'exec {sys.executable} -c "import sys; sys.version_info = (3, 11, 7); $2"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(
        [ROOT / "tools" / "install_gpu.sh", tmp_path / "VENV", "python3.11"], capture_output=True, text=True, env=environment
    )  # fmt: skip
    assert done.returncode == 1 and "Python 3.11; the set has wheels for 3.12 only" in done.stderr
    assert not (tmp_path / "VENV").exists()


@pytest.mark.parametrize("file", CONTAINERS)
def test_containers_run_the_script_on_a_base_with_the_cuda_of_the_set(file: str) -> None:
    text = (ROOT / file).read_text()
    (gpu,) = (s for s in versions.SETS if s.name == "gpu")
    bases = re.findall(r"nvidia/cuda:(\S+?)-devel-\S+", text)
    assert bases and all(base.startswith(gpu.cuda + ".") for base in bases), bases
    (venv, python) = re.search(r"tools/install_gpu\.sh (\S+) (\S+)", text).groups()
    assert f"PATH={venv}/bin" in text and f"{python}-venv" in text and f"{python}-dev" in text
    assert "pip install" not in text, "versions stand in requirements/gpu.txt alone"
    for needed in ("pyproject.toml", "README.md", "requirements", "tools", "fp8slurm"):
        assert re.search(rf"(COPY|^   ).*\b{re.escape(needed)}\b", text, re.M), needed
