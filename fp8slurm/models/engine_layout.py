"""How SGLang cuts a model over tensor- and expert-parallel ranks, and which cuts block FP8 allows."""

from __future__ import annotations

from fp8slurm.config import RunConfig
from fp8slurm.models.precision import engine_in_fp8
from fp8slurm.models.qwen3 import ModelSpec


def check_engine_layout(config: RunConfig, spec: ModelSpec) -> None:
    """SGLang's block FP8 wants every tensor-parallel piece of q, k, v, gate and up to be whole 128 blocks.

    Of key-value heads each GPU keeps at least one; of an expert it holds 1 / (tensor / expert parallel size).
    """
    e = config.engine
    tp, ep = e.tensor_parallel_size, e.expert_parallel_size
    if ep > 1 and (not spec.is_moe or tp % ep or spec.num_experts % ep):
        what = f"{spec.num_experts} experts" if spec.is_moe else "a model without experts"
        raise ValueError(
            f"--engine.expert-parallel-size {ep} with --engine.tensor-parallel-size {tp} and {what}: "
            f"it must divide both"
        )
    if not engine_in_fp8(config):
        return
    kv = tp if spec.num_kv_heads % tp == 0 else spec.num_kv_heads if tp % spec.num_kv_heads == 0 else tp
    ffn = (spec.moe_ffn_hidden_size, tp // ep) if spec.is_moe else (spec.ffn_hidden_size, tp)
    sizes = {
        "query heads": (spec.num_heads * spec.head_dim, tp),
        "key-value heads": (spec.num_kv_heads * spec.head_dim, kv),
        "experts' FFN" if spec.is_moe else "FFN": ffn,
    }
    for what, (size, cut) in sizes.items():
        if size % (128 * cut):
            more = " or --engine.expert-parallel-size above 1" if what.startswith("experts") else ""
            raise ValueError(
                f"--engine.tensor-parallel-size {tp}: the {what} ({size} rows) are cut inside a 128 block of FP8; "
                f"the size must be a multiple of {128 * cut}{more}"
            )
