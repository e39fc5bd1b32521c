"""Shapes of published models, for planning without a checkpoint: the shape fields of their public config.json."""

from __future__ import annotations

import json
from pathlib import Path

from fp8slurm.core.errors import InputError
from fp8slurm.models.spec import ModelSpec

FOLDER = Path(__file__).parent


def known_models() -> list[str]:
    """Names of the models whose shape is known."""
    return sorted(p.stem for p in FOLDER.glob("*.json"))


def known_model(name: str) -> ModelSpec:
    """The shape of a published model by its name, such as Qwen3-4B. InputError lists the known ones."""
    if name not in known_models():
        raise InputError(f"no shape is known for a model named {name!r}; known: {', '.join(known_models())}")
    file = FOLDER / f"{name}.json"
    return ModelSpec.from_hf_config(json.loads(file.read_text()), str(file))


def find_spec(checkpoint: Path | None, flag: str = "--model.hf-checkpoint") -> tuple[ModelSpec, str]:
    """(shape, where it comes from): from CHECKPOINT/config.json, else the known model that the folder is named after.

    InputError where neither is there: it names the folder, the known models and the flag.
    """
    if checkpoint is None:
        raise InputError(
            f"{flag} is not set: give a Hugging Face folder, or a known model ({', '.join(known_models())}), "
            f"or a --recipe that names one"
        )
    if (checkpoint / "config.json").is_file():
        return ModelSpec.from_hf_dir(checkpoint), f"{checkpoint}/config.json"
    if checkpoint.name in known_models():
        return known_model(checkpoint.name), (
            f"the published shape of {checkpoint.name}, by the folder's name: {checkpoint}/config.json is not there"
        )
    made = (
        f"; make {checkpoint.name}-data writes the one of the recipes"
        if checkpoint.name in ("tiny", "tiny-moe")
        else ""
    )
    raise InputError(
        f"{flag} {checkpoint}: there is no config.json, and the folder is not named after a known model "
        f"({', '.join(known_models())}){made}"
    )
