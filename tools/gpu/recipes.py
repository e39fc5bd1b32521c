"""Recipes for GPUs from those that come with the package, as TOML files, and models for them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from fp8slurm.config import RunConfig
from fp8slurm.config.load import read_recipe, to_toml

ENGINE = ["--attention-backend", "fa3", "--grammar-backend", "none", "--sampling-backend", "pytorch",
          "--enforce-disable-flashinfer-allreduce-fusion"]  # fmt: skip
"""FlashAttention 3, which SGLang takes on Hopper by itself, and no kernels that it compiles for four minutes."""


def engine_arguments(graphs: list[int], attention: str = "fa3") -> list[str]:
    """ENGINE with another attention, and CUDA graphs for decode batches of these sizes (none: without graphs).

    Graphs of the prefill are left out: SGLang takes 50 s to capture them."""
    own = [attention if text == "fa3" else text for text in ENGINE]
    if not graphs:
        return [*own, "--disable-cuda-graph"]
    return [*own, "--cuda-graph-bs-decode", *map(str, graphs), "--disable-prefill-cuda-graph"]


PRECISIONS: dict[str, dict[str, str]] = {
    "fp8-fp8": {"backend": "transformer_engine"},
    "bf16-fp8": {"backend": "off", "engine": "fp8"},
    "bf16-bf16": {"backend": "off"},
}
"""Trainer and engine -> the section [fp8]."""


def with_settings(config: RunConfig, sections: dict[str, dict[str, Any]]) -> RunConfig:
    """The configuration with some settings changed; they are checked."""
    values = config.model_dump()
    for section, changed in sections.items():
        values[section] |= changed
    return RunConfig.model_validate(values)


def write_recipe(path: Path, base: str, graphs: list[int], **sections: dict[str, Any]) -> Path:
    """`base` on one GPU with one rank, not deterministic, as a file. graphs: batch sizes of the engine's CUDA graphs."""
    own: dict[str, dict[str, Any]] = {
        "run": {"deterministic": False},
        "fp8": PRECISIONS["fp8-fp8"],
        "engine": {"extra_args": engine_arguments(graphs), "ready_timeout_s": 400.0},
        "slurm": {"executor": "local", "nodes": 1, "gpus_per_node": 1, "ranks_per_node": 1, "cpus_per_task": None, "memory": None,
                  "share_gpus": True},
        "watchdog": {"timeout_s": 180.0},
    }  # fmt: skip
    for section, changed in sections.items():
        own[section] = own.get(section, {}) | changed
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_toml(with_settings(read_recipe(base), own)))
    return path


def write_model(folder: Path, shape: str, tiny: Path, layers: int | None = None) -> Path:
    """A random model in a known shape, with the tiny model's tokenizer: its own could not be had."""
    from random_model import write_random_model

    if not folder.exists():
        write_random_model(shape, folder.with_suffix(".tmp"), layers)
        config = json.loads((folder.with_suffix(".tmp") / "config.json").read_text())
        config |= {"eos_token_id": 258, "bos_token_id": 256, "pad_token_id": 256}
        (folder.with_suffix(".tmp") / "config.json").write_text(json.dumps(config, indent=1))
        for file in tiny.iterdir():
            if file.suffix == ".json" and file.name != "config.json" and not file.name.startswith("made_by"):
                shutil.copy(file, folder.with_suffix(".tmp"))
        folder.with_suffix(".tmp").rename(folder)
    return folder
