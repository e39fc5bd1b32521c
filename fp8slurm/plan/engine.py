"""What an engine GPU holds: weights as SGLang cuts them, and the KV cache."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from fp8slurm.config import RunConfig
from fp8slurm.fp8.policy import decide
from fp8slurm.models.names import NameTable
from fp8slurm.models.qwen3 import BLOCK, QuantizationSpec

COLUMN = re.compile(r".*\.(gate_proj|up_proj)\.weight|lm_head\.weight|.*embed_tokens\.weight")
ROW = re.compile(r".*\.(o_proj|down_proj)\.weight")
HEADS = re.compile(r".*\.(q|k|v)_proj\.weight")


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
    if not quantized(name, shape, quantization):
        return n * itemsize
    return n + 4 * math.prod(-(-size // BLOCK) for size in shape)


def weights_on_gpu(
    table: NameTable, quantization: QuantizationSpec | None, itemsize: int, tensor: int, expert: int = 1
) -> int:
    """Bytes of weights on one GPU of an engine of `tensor` GPUs, of which `expert` share the experts.

    SGLang cuts embedding, head, gate and up along their rows, o and down along their columns, q, k and v by heads (each
    GPU keeps at least one key-value head), and replicates norms and routers. Experts are dealt out over `expert` GPUs
    and cut over tensor / expert.
    """
    spec = table.spec
    total = 0
    for entry in table:
        if entry.expert is not None and entry.expert >= spec.num_experts // expert:
            continue
        cut = tensor if entry.expert is None else tensor // expert
        for t in entry.tensors:
            shape = list(t.shape)
            if m := HEADS.fullmatch(t.name):
                heads = spec.num_heads if m[1] == "q" else spec.num_kv_heads
                shape[0] = max(1, heads // cut) * spec.head_dim
            elif COLUMN.fullmatch(t.name):
                shape[0] = -(-shape[0] // cut)
            elif ROW.fullmatch(t.name):
                shape[1] = -(-shape[1] // cut)
            total += tensor_bytes(t.name, tuple(shape), quantization, itemsize)
    return total


def engine_memory(
    config: RunConfig, table: NameTable, quantization: QuantizationSpec | None, gpu_bytes: int, resident: int
) -> EngineMemory:
    """Memory of one engine GPU of `gpu_bytes`, of which `resident` are taken when the engine comes up."""
    e, spec = config.engine, table.spec
    itemsize = 2 if e.dtype == "bfloat16" else 4
    weights = weights_on_gpu(table, quantization, itemsize, e.tensor_parallel_size, e.expert_parallel_size)
    cell = max(1, spec.num_kv_heads // e.tensor_parallel_size) * 2 * spec.head_dim * spec.num_layers * itemsize
    room = int((gpu_bytes - resident) * e.mem_fraction) - weights
    tokens = max(0, room) // cell
    return EngineMemory(weights, cell, min(tokens, e.max_total_tokens) if e.max_total_tokens else tokens)
