"""Scales of an FP8 KV cache that come with weight updates (engine.kv_cache fp8, docs/context.md).

SGLang (0.5.16 to 0.5.23) has attributes for them on its attention layers, but makes parameters of them only for models
that hand their quantization to attention: Qwen2 and Llama do, Qwen3 does not, and would be served with scales of 1
whatever a checkpoint says. Here every attention layer gets both. FlashAttention 3 reads them as tensors on the GPU,
when keys are written and when they are read, so CUDA graphs see every update; and nothing but `copy_` changes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from fp8slurm.core.patches import wrap
from fp8slurm.fp8.block import E4M3_MAX
from fp8slurm.fp8.kv_cache import codes, rounded_up
from fp8slurm.models.kv_scales import engine_name, is_scale

Pairs = Iterable[tuple[str, torch.Tensor]]
_on = False


def apply(on_gpu: bool) -> None:
    """Patch SGLang in a scheduler's process. on_gpu: the cache is e4m3; else cpu/sglang_plugin.py emulates it."""
    global _on
    _on = True
    _add_parameters()
    if on_gpu:
        _write_saturated()
        _clamp_queries()


def take_scales(model: torch.nn.Module, weights: Pairs, as_sent: bool) -> Pairs:
    """Copy the scales among these weights into their parameters; the others. Without an FP8 cache all of them.

    as_sent: the weights of an update, whose scales are powers of two; those of a folder are rounded up to them, as the
    trainer does. Not SGLang's own way: of its models some know one name of a scale, some another, some none, and say
    nothing."""
    return _without_scales(model, weights, as_sent) if _on else weights


def _without_scales(model: torch.nn.Module, weights: Pairs, as_sent: bool) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in weights:
        if is_scale(name):
            parameter = model.get_parameter(engine_name(name))
            parameter.data.copy_((tensor if as_sent else rounded_up(tensor)).reshape(parameter.shape))
        else:
            yield name, tensor


def _add_parameters() -> None:
    from sglang.srt.layers.radix_attention import RadixAttention

    @wrap(RadixAttention, "__init__")
    def init(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        for name in ("k_scale", "v_scale"):
            setattr(self, name, torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float32), requires_grad=False))


def _write_saturated() -> None:
    """Codes are made here: SGLang divides in place and casts, and what a key that does not fit becomes is up to torch's
    version."""
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    @wrap(MHATokenToKVPool, "set_kv_buffer")
    def set_kv_buffer(
        original: Any, self: Any, layer: Any, loc: Any, cache_k: torch.Tensor, cache_v: torch.Tensor,
        k_scale: Any = None, v_scale: Any = None, *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        if k_scale is not layer.k_scale or v_scale is not layer.v_scale:
            raise RuntimeError("engine.kv_cache fp8: this attention backend does not hand the layer's scales on")
        key, value = codes(cache_k, k_scale), codes(cache_v, v_scale)
        return original(self, layer, loc, key, value, None, None, *args, **kwargs)


def _clamp_queries() -> None:
    """FlashAttention 3 takes queries in e4m3 too, without a scale: one above 448 is
    cut off."""
    from sglang.srt.layers.attention.flashattention_backend import FlashAttentionBackend

    def forward(original: Any, self: Any, q: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return original(self, q.clamp(-E4M3_MAX, E4M3_MAX), *args, **kwargs)

    for name in ("forward_extend", "forward_decode"):
        wrap(FlashAttentionBackend, name)(forward)
