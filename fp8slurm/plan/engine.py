"""What an engine GPU holds: weights as SGLang cuts them, and the KV cache."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fp8slurm.config import RunConfig
from fp8slurm.fp8.block import scale_shape
from fp8slurm.fp8.policy import decide
from fp8slurm.models.engine_layout import EngineLayout
from fp8slurm.models.names import NameTable
from fp8slurm.models.spec import QuantizationSpec


@dataclass(frozen=True)
class EngineMemory:
    """One engine GPU."""

    weights: int
    """Bytes of codes, scales and what stays in high precision."""
    kv_bytes_per_token: int
    """SGLang's cell size (0.5.21, model_executor/pool_configurator.py): key and value of every layer's heads here."""
    kv_tokens: int
    """Tokens for which there is room in mem_fraction of the memory, or engine.max_total_tokens if that is less."""

    @property
    def kv_bytes(self) -> int:
        return self.kv_tokens * self.kv_bytes_per_token


def quantized(name: str, shape: tuple[int, ...], quantization: QuantizationSpec | None) -> bool:
    """Whether the engine's checkpoint has this tensor in FP8."""
    return quantization is not None and decide(name, shape, quantization.modules_to_not_convert).quantize


def tensor_bytes(name: str, shape: tuple[int, ...], quantization: QuantizationSpec | None, itemsize: int) -> int:
    """Bytes of a tensor, or of a piece of it: one an element and 4 a 128x128 block, or `itemsize` an element."""
    n = math.prod(shape)
    return n + 4 * math.prod(scale_shape(shape)) if quantized(name, shape, quantization) else n * itemsize


def weights_on_gpu(
    table: NameTable, quantization: QuantizationSpec | None, itemsize: int, tensor: int, expert: int = 1
) -> int:
    """Bytes of weights on one GPU of an engine of `tensor` GPUs, of which `expert` share the experts."""
    layout = EngineLayout(table.spec.num_kv_heads, tensor, expert)
    held = layout.experts(0, table.spec.num_experts)
    return sum(
        tensor_bytes(t.name, layout.cut(t.name).shape(t.shape), quantization, itemsize)
        for entry in table
        if entry.expert is None or entry.expert in held
        for t in entry.tensors
    )


def engine_memory(
    config: RunConfig, table: NameTable, quantization: QuantizationSpec | None, gpu_bytes: int, resident: int
) -> EngineMemory:
    """Memory of one engine GPU of `gpu_bytes`, of which `resident` are taken when the engine comes up."""
    e, spec = config.engine, table.spec
    itemsize = 2 if e.dtype == "bfloat16" else 4
    weights = weights_on_gpu(table, quantization, itemsize, e.tensor_parallel_size, e.expert_parallel_size)
    stored = 1 if e.kv_cache == "fp8" else itemsize
    cell = max(1, spec.num_kv_heads // e.tensor_parallel_size) * 2 * spec.head_dim * spec.num_layers * stored
    room = int((gpu_bytes - resident) * e.mem_fraction) - weights
    tokens = max(0, room) // cell
    return EngineMemory(weights, cell, min(tokens, e.max_total_tokens) if e.max_total_tokens else tokens)
