"""Streamed safetensors, torch_dist checkpoints, the converters, run checkpoints.

The names are imported when they are first used: fp8slurm.slurm.task needs checkpoint.run before torch may be imported.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "BadCheckpoint": "errors",
    "ConvertOptions": "stream",
    "fp8_to_hf": "convert_hf",
    "hf_to_fp8": "convert_hf",
    "hf_to_torch_dist": "convert_torch_dist",
    "torch_dist_to_fp8": "convert_torch_dist",
    "torch_dist_to_hf": "convert_torch_dist",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
