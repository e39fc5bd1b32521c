"""The layer of exact runs (trainer/exact_layer.py) on the CPU: its order of calls, backward passes and states, with
stand-ins for the GPU's kernels."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from trainer_scenarios import PP2, Ranks, train

from fp8slurm.trainer import build


class StandIns:
    """exact_layer.Kernels in plain fp32 torch. In place where the GPU's are, so that a value that is still needed shows."""

    def __init__(self) -> None:
        from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

        self.column_parallel_linear, self.row_parallel_linear = ColumnParallelLinear, RowParallelLinear

    @staticmethod
    def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight

    @classmethod
    def add_norm(cls, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> Any:
        total = x + residual
        x.copy_(cls.norm(total, weight, eps))
        return x, total

    @classmethod
    def norm_backward(
        cls, grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor, more: Any = None
    ) -> torch.Tensor:
        with torch.enable_grad():
            leaf, w = x.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
            cls.norm(leaf, w, eps).backward(grad.view(x.shape))
        assert leaf.grad is not None and w.grad is not None
        out.copy_(leaf.grad if more is None else leaf.grad + more.reshape(x.shape))
        return w.grad

    @classmethod
    def norm_heads(cls, q: torch.Tensor, k: torch.Tensor, q_weight: Any, k_weight: Any, eps: float) -> None:
        q.copy_(cls.norm(q, q_weight, eps))
        k.copy_(cls.norm(k, k_weight, eps))

    @staticmethod
    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, *how: Any) -> Any:
        return _attention(q, k, v, cu_seqlens, how[1]), q.new_zeros(1)

    @staticmethod
    def attention_backward(grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> Any:
        _out, _kept, cu_seqlens, _longest, scale = rest
        with torch.enable_grad():
            leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
            _attention(*leaves, cu_seqlens, scale).backward(grad)
        return tuple(leaf.grad for leaf in leaves)

    @staticmethod
    def swiglu(x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up

    @classmethod
    def swiglu_backward(cls, grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            leaf = x.detach().clone().requires_grad_()
            cls.swiglu(leaf).backward(grad)
        assert leaf.grad is not None
        return leaf.grad


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, scale: float) -> Any:
    out = []
    for a, b in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist()):
        one = [t[a:b].transpose(0, 1)[None] for t in (q, k, v)]
        o = torch.nn.functional.scaled_dot_product_attention(*one, is_causal=True, scale=scale, enable_gqa=True)
        out.append(o[0].transpose(0, 1))
    return torch.cat(out)


def _both(ranks: Ranks, **sections: Any) -> list[dict[str, Any]]:
    """What the ordinary layer makes of some steps, and what this one does."""
    ordinary = train(ranks, **sections)
    from fp8slurm.trainer.exact_layer import layer_spec  # Megatron can be imported once a rank has started

    with patch.object(build, "layer_spec", lambda config, tconfig: layer_spec(tconfig, StandIns())):
        return [ordinary, train(ranks, **sections)]


def exact_layer_one(ranks: Ranks) -> list[dict[str, Any]]:
    return _both(ranks)


def exact_layer_recompute(ranks: Ranks) -> list[dict[str, Any]]:
    return _both(ranks, train={"recompute": "full"})


def exact_layer_pp2(ranks: Ranks) -> list[dict[str, Any]]:
    return _both(ranks, **PP2)


def exact_layer_dp2(ranks: Ranks) -> list[dict[str, Any]]:
    return _both(ranks)
