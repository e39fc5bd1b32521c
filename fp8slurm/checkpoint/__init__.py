"""Checkpoints: their formats on disk, and the converters between them. Runs anywhere; the trainer reads with it.

Names are imported at their first use: what begins an attempt needs checkpoint.formats before torch may be imported.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "BadCheckpoint": "fp8slurm.core.errors",
    "ConvertOptions": "fp8slurm.checkpoint.converters.stream",
    "fp8_to_hf": "fp8slurm.checkpoint.converters.convert_hf",
    "hf_to_fp8": "fp8slurm.checkpoint.converters.convert_hf",
    "hf_to_torch_dist": "fp8slurm.checkpoint.converters.convert_torch_dist",
    "torch_dist_to_fp8": "fp8slurm.checkpoint.converters.convert_torch_dist",
    "torch_dist_to_hf": "fp8slurm.checkpoint.converters.convert_torch_dist",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
