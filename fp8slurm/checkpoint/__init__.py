"""Streamed safetensors, torch_dist checkpoints, the converters, run checkpoints."""

from fp8slurm.checkpoint.convert_hf import fp8_to_hf, hf_to_fp8
from fp8slurm.checkpoint.convert_torch_dist import (
    hf_to_torch_dist,
    torch_dist_to_fp8,
    torch_dist_to_hf,
)
from fp8slurm.checkpoint.errors import BadCheckpoint
from fp8slurm.checkpoint.stream import ConvertOptions

__all__ = [
    "BadCheckpoint",
    "ConvertOptions",
    "fp8_to_hf",
    "hf_to_fp8",
    "hf_to_torch_dist",
    "torch_dist_to_fp8",
    "torch_dist_to_hf",
]
