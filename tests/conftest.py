"""Fixtures that several rooms use."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import save_file

from fp8slurm.fp8.policy import decide
from fp8slurm.fp8.quantize import quantize

if not torch.cuda.is_available():  # one built for CUDA would not load here, and the CPU set has none
    sys.modules["torchvision"] = None  # type: ignore[assignment]


@pytest.fixture(scope="session")
def write_fp8_model() -> Callable[..., dict[str, torch.Tensor]]:
    """write(folder, seed, moe=False, family="qwen3"): a tiny random checkpoint in block FP8 with logits that differ clearly between
    tokens; returns its tensors by Hugging Face name."""

    def write(folder: Path, seed: int, moe: bool = False, family: str = "qwen3") -> dict[str, torch.Tensor]:
        folder.mkdir()
        tiny.write_model(folder, seed, moe, family)
        config = json.loads((folder / "config.json").read_text())
        weights = tiny.random_weights(config, seed)
        if moe:  # SGLang does not tie the embeddings of a Qwen3-MoE
            config["tie_word_embeddings"] = False
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"].flip(0)
        tensors = {}
        for name, weight in weights.items():
            weight = (weight * 3).contiguous() if weight.dim() > 1 else weight
            if decide(name, weight.shape).quantize:
                fp8 = quantize(weight, name=name)
                tensors[name], tensors[f"{name}_scale_inv"] = fp8.data, fp8.scale_inv
            else:
                tensors[name] = weight
        for file in folder.glob("*.safetensors*"):
            file.unlink()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
        }
        (folder / "config.json").write_text(json.dumps(config))
        return tensors

    return write


@pytest.fixture(scope="session")
def run_ranks() -> Callable[[Path, Path, int], None]:
    """run(script, folder, world_size): `python SCRIPT FOLDER RANK` for every rank at once, until all have ended.

    Their output goes to FOLDER/rankN.log; what they leave besides is the caller's to read, and to miss.
    """

    def run(script: Path, folder: Path, world_size: int) -> None:
        path = os.pathsep.join([str(script.parent), str(Path(__file__).parents[1])])
        env = dict(os.environ) | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        ranks = []
        for rank in range(world_size):
            with open(folder / f"rank{rank}.log", "w") as log:
                command = [sys.executable, str(script), str(folder), str(rank)]
                ranks.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
        try:
            for process in ranks:
                process.wait(timeout=600)
        finally:
            for process in ranks:
                process.kill()
                process.wait()

    return run


@pytest.fixture(scope="session")
def install_packages() -> Callable[..., None]:
    """install(*packages, program=NAME): see to it that a program of the system is there.

    Where it is not, the packages are installed by apt-get if CI=true or INSTALL=1 is set; otherwise the test is skipped.
    With CI=true nothing is skipped: what cannot be installed fails.
    """

    def install(*packages: str, program: str) -> None:
        if shutil.which(program):
            return
        ci = os.environ.get("CI") == "true"
        why = f"{program} is not installed: INSTALL=1 installs {' '.join(packages)} with apt-get"
        if ci or os.environ.get("INSTALL") == "1":
            as_root = [] if os.geteuid() == 0 else ["sudo", "--non-interactive"]
            environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
            for step in (["update"], ["install", "--yes", "--no-install-recommends", *packages]):
                try:
                    subprocess.run(
                        [*as_root, "apt-get", *step], check=True, capture_output=True, text=True, env=environment
                    )
                except (OSError, subprocess.CalledProcessError) as error:
                    why = f"{' '.join(packages)} could not be installed: {error} {getattr(error, 'stderr', '')}"
                    break
            else:
                if shutil.which(program):
                    return
                why = f"{' '.join(packages)} brought no {program}"
        pytest.fail(why) if ci else pytest.skip(why)

    return install
