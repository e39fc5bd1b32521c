"""Which parallel layouts a model can have."""

from __future__ import annotations

from typing import Any

from fp8slurm.core.errors import InputError
from fp8slurm.fp8 import BLOCK
from fp8slurm.models.spec import ModelSpec

MOST_SHARES = 1024
"""Up to here sizes that are allowed are looked for, to be named."""


def _divides(what: str, value: int, size: int, flag: str) -> None:
    if value % size:
        allowed = [d for d in range(1, min(value, MOST_SHARES) + 1) if value % d == 0]
        shown = ", ".join(map(str, allowed[:12])) + (", ..." if len(allowed) > 12 or value > MOST_SHARES else "")
        raise InputError(f"{flag} {size} does not divide the model's {what} ({value}); allowed: {shown}")


def _whole_blocks(what: str, value: int, size: int, flag: str) -> None:
    if value % (BLOCK * size):
        allowed = [d for d in range(1, min(value // BLOCK, MOST_SHARES) + 1) if value % (BLOCK * d) == 0]
        fix = f"allowed with FP8: {', '.join(map(str, allowed))}" if allowed else "no size is"
        raise InputError(
            f"{flag} {size} cuts the model's {what} ({value}) inside a {BLOCK}-wide FP8 block; {fix}"
            f"{'' if allowed else ' allowed with FP8'}; or --fp8.backend off"
        )


def check_layout(spec: ModelSpec, parallel: Any, fp8: bool, world_size: int | None = None) -> None:
    """Refuse a parallel layout that this model cannot have.

    `parallel` is a config.schema.ParallelSection; `fp8` says whether the trainer multiplies in FP8; `world_size`, if
    given, is the number of Megatron ranks. InputError names the value, what is allowed and the flag.
    """
    tp, pp, cp = parallel.tensor_parallel_size, parallel.pipeline_parallel_size, parallel.context_parallel_size
    ep, etp = parallel.expert_parallel_size, parallel.expert_tensor_parallel_size
    tp_flag, pp_flag = "--parallel.tensor-parallel-size", "--parallel.pipeline-parallel-size"
    cp_flag = "--parallel.context-parallel-size"
    ep_flag, etp_flag = "--parallel.expert-parallel-size", "--parallel.expert-tensor-parallel-size"
    _divides("key-value heads", spec.num_kv_heads, tp, tp_flag)  # first: its sizes divide the attention heads, too
    _divides("attention heads", spec.num_heads, tp, tp_flag)
    _divides("vocabulary", spec.vocab_size, tp, tp_flag)
    _divides("layers", spec.num_layers, pp, pp_flag)
    if spec.is_moe:
        _divides("experts", spec.num_experts, ep, ep_flag)
        _divides("expert FFN width", spec.moe_ffn_hidden_size, etp, etp_flag)
        if tp > 1 and not parallel.sequence_parallel:
            raise InputError(f"{tp_flag} {tp} with experts needs --parallel.sequence-parallel (a rule of Megatron)")
    else:
        _divides("FFN width", spec.ffn_hidden_size, tp, tp_flag)
        for flag, size in ((ep_flag, ep), (etp_flag, etp)):
            if size != 1:
                raise InputError(f"{flag} {size}: the model has no experts; allowed: 1")
    if parallel.sequence_parallel and tp == 1:
        raise InputError(f"--parallel.sequence-parallel needs {tp_flag} of at least 2; it is 1")
    if world_size is not None:
        if world_size % (tp * pp * cp):
            shares = f"{tp_flag} {tp} x {pp_flag} {pp}" + (f" x {cp_flag} {cp}" if cp > 1 else "")
            raise InputError(
                f"{world_size} ranks cannot be shared out over {shares}; "
                f"allowed: a multiple of {tp * pp * cp} (--slurm.nodes, --slurm.ranks-per-node)"
            )
        if world_size % (ep * etp * pp):
            raise InputError(
                f"{world_size} ranks cannot be shared out over {ep_flag} {ep} x {etp_flag} {etp} x {pp_flag} {pp}; "
                f"allowed: a multiple of {ep * etp * pp}"
            )
    if not fp8:
        return
    if spec.head_dim % BLOCK:
        # Megatron's fused qkv interleaves q, k and v by query group: a tile would hold rows of two of them, and the
        # trainer would multiply with other codes than the engine, which quantizes q, k and v apart.
        raise InputError(
            f"head_dim {spec.head_dim}: FP8 needs a multiple of {BLOCK}, else a block of the fused qkv holds rows of "
            f"both k and v; use another model or --fp8.backend off"
        )
    if spec.is_moe:
        _whole_blocks("expert FFN width", spec.moe_ffn_hidden_size, etp, etp_flag)
    else:
        _whole_blocks("FFN width", spec.ffn_hidden_size, tp, tp_flag)
    if spec.hidden_size % 16:
        raise InputError(f"hidden_size {spec.hidden_size}: FP8 GEMMs need a multiple of 16; or --fp8.backend off")
