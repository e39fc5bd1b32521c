"""A checkpoint of a known shape with random weights: all that can be had where nothing can be downloaded."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

import tiny  # noqa: E402

KNOWN = Path(__file__).resolve().parents[2] / "fp8slurm" / "models" / "known"


def write_random_model(name: str, folder: Path, layers: int | None = None, seed: int = 0) -> None:
    """Write a Hugging Face folder (BF16) in the shape `name`: "tiny" or one of fp8slurm/models/known.

    layers: fewer than the shape has. Weights are normal with standard deviation 0.02, norms are 1; no tokenizer.
    """
    from safetensors.torch import save_file

    config = tiny.model_config() if name == "tiny" else json.loads((KNOWN / f"{name}.json").read_text())
    config = {"eos_token_id": 258, "bos_token_id": 256, **config}
    if layers is not None:
        config["num_hidden_layers"] = layers
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    weights = {}
    for key, shape in tiny.weight_shapes(config).items():
        w = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator, device=device) * 0.02
        weights[key] = w.to(torch.bfloat16).cpu()
    if device == "cuda":
        torch.cuda.empty_cache()  # what others want to have
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
