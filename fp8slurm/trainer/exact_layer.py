"""Qwen3's dense layer as the engine computes it, for runs in which trainer and engine say the same bits (model.exact).

SGLang adds a layer's output to the residual in the kernel that normalizes the sum, and it is the unrounded sum that it
normalizes. Megatron adds at the end of one layer, rounds, and normalizes at the beginning of the next one. So what
travels from layer to layer, and from stage to stage, is the pair: [T, 1, 2H] is (output of the last product, residual).

Which kernels compute it is a `Kernels` (trainer/exact_cuda.py on a GPU): this file has the order of the calls, and the
backward passes around those that have none. A backward pass differentiates the formula at the forward's rounded values;
its bits are the trainer's own affair.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer

Tensor = torch.Tensor


class Kernels(Protocol):
    """What a machine computes a layer with. Hidden states are [T, H], heads [T, heads, d], in the model's dtype."""

    @property
    def column_parallel_linear(self) -> type:
        """Class of linear_qkv and linear_fc1."""

    @property
    def row_parallel_linear(self) -> type:
        """Class of linear_proj and linear_fc2."""

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """weight * x / sqrt(mean(x^2) + eps), a new tensor."""

    def add_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(norm of the unrounded sum, the rounded sum); x may be overwritten, residual is left alone."""

    def norm_backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, eps: float, out: Tensor, more: Tensor | None = None
    ) -> Tensor:
        """Fills out with the gradient of x, plus `more`; returns the weight's, fp32 (trainer/norm_backward.py)."""

    def norm_heads(self, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float) -> None:
        """Normalize q and k [T, heads, d] over d, in place."""

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, scale: float
    ) -> tuple[Tensor, Any]:
        """Causal attention inside every segment: ([T, heads, d], what attention_backward needs besides)."""

    def attention_backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: Any, cu_seqlens: Tensor, longest: int,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients of q, k and v."""

    def swiglu(self, x: Tensor) -> Tensor:
        """silu(x[:, : I]) * x[:, I :] of [T, 2I]."""

    def swiglu_backward(self, grad: Tensor, x: Tensor) -> Tensor:
        """Gradient of x."""


def accumulate(weight: torch.nn.Parameter, grad: Tensor) -> Tensor:
    """Add grad (fp32) to Megatron's gradient buffer; what autograd gets for it: nothing new, or outside Megatron's DDP
    the gradient itself."""
    if not hasattr(weight, "main_grad"):
        return grad.to(weight.dtype)
    weight.main_grad.add_(grad)
    return added(weight)


def added(weight: torch.nn.Parameter) -> Tensor:
    """Tells Megatron's hook that main_grad has this weight's gradient already; a placeholder for autograd."""
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return torch.empty(1, dtype=weight.dtype, device=weight.device).expand(weight.shape)


def _as_rows(x: Tensor) -> Tensor:
    """[..., W] -> [rows, 1, 1, W], as norm_backward takes hidden states."""
    return x.reshape(-1, 1, 1, x.shape[-1])


class _Norm(torch.autograd.Function):
    """y = norm(x) of the first layer's input [T, 1, H]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: torch.nn.Parameter, eps: float, kernels: Kernels) -> Tensor:
        ctx.weight, ctx.eps, ctx.kernels = weight, eps, kernels
        ctx.save_for_backward(x)
        return kernels.norm(x.reshape(-1, x.shape[-1]), weight, eps).view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        out = torch.empty_like(x)
        dw = ctx.kernels.norm_backward(grad.contiguous(), _as_rows(x), ctx.weight, ctx.eps, _as_rows(out))
        return out, accumulate(ctx.weight, dw) if ctx.needs_input_grad[1] else None, None, None


class _AddNorm(torch.autograd.Function):
    """(norm(x + residual), x + residual rounded) of [T, 1, H] each; the sum is normalized as it is before rounding."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: torch.nn.Parameter, eps: float, kernels: Kernels
    ) -> tuple[Tensor, Tensor]:
        ctx.weight, ctx.eps, ctx.kernels = weight, eps, kernels
        # detached: y is written over x, which its maker does not keep, and must be another tensor for autograd
        width = x.shape[-1]
        y, total = kernels.add_norm(x.detach().view(-1, width), residual.detach().view(-1, width), weight, eps)
        ctx.save_for_backward(total)
        return y.view(x.shape), total.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        (total,) = ctx.saved_tensors
        out = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
        more = grad_total.reshape(-1, grad.shape[-1])
        dw = ctx.kernels.norm_backward(grad.contiguous(), _as_rows(total), ctx.weight, ctx.eps, _as_rows(out), more)
        return out, out, accumulate(ctx.weight, dw) if ctx.needs_input_grad[2] else None, None, None


class _Split(torch.autograd.Function):
    """[T, 1, 2H] -> the pair of [T, 1, H]."""

    @staticmethod
    def forward(ctx: Any, state: Tensor) -> tuple[Tensor, Tensor]:
        x, residual = state.chunk(2, dim=-1)
        return x.contiguous(), residual.contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_residual: Tensor) -> Tensor:
        return torch.cat((grad, grad_residual), dim=-1)


class _SplitHeads(torch.autograd.Function):
    """(q, k, v), q and k normalized, out of Megatron's fused [T, 1, groups * (heads of a group + 2) * d]."""

    @staticmethod
    def forward(
        ctx: Any, mixed: Tensor, q_weight: torch.nn.Parameter, k_weight: torch.nn.Parameter, groups: int, eps: float,
        kernels: Kernels,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        d, tokens = len(q_weight), mixed.shape[0]
        heads = mixed.view(tokens, groups, -1, d)
        q = heads[:, :, :-2].reshape(tokens, -1, d)
        k, v = heads[:, :, -2].contiguous(), heads[:, :, -1].contiguous()
        kernels.norm_heads(q, k, q_weight, k_weight, eps)
        ctx.weights, ctx.eps, ctx.kernels = (q_weight, k_weight), eps, kernels
        ctx.save_for_backward(heads)
        return q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor | None, ...]:
        (heads,) = ctx.saved_tensors
        out = torch.empty_like(heads)
        weights: list[Tensor | None] = []
        for i, (grad, part) in enumerate(((grad_q, slice(0, -2)), (grad_k, slice(-2, -1)))):
            dw = ctx.kernels.norm_backward(
                grad.contiguous(), heads[:, :, part], ctx.weights[i], ctx.eps, out[:, :, part]
            )
            weights.append(accumulate(ctx.weights[i], dw) if ctx.needs_input_grad[1 + i] else None)
        out[:, :, -1] = grad_v.view(out[:, :, -1].shape)
        return out.view(out.shape[0], 1, -1), *weights, None, None, None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, scale: float, kernels: Kernels
    ) -> Tensor:
        out, kept = kernels.attention(q, k, v, cu_seqlens, longest, scale)
        ctx.longest, ctx.scale, ctx.kernels = longest, scale, kernels
        ctx.save_for_backward(q, k, v, out, kept, cu_seqlens)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, kept, cu_seqlens = ctx.saved_tensors
        grads = ctx.kernels.attention_backward(
            grad.contiguous(), q, k, v, out, kept, cu_seqlens, ctx.longest, ctx.scale
        )
        return *grads, None, None, None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kernels: Kernels) -> Tensor:
        ctx.kernels = kernels
        ctx.save_for_backward(x)
        return kernels.swiglu(x.view(-1, x.shape[-1])).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return ctx.kernels.swiglu_backward(grad.view(-1, grad.shape[-1]), x.view(-1, x.shape[-1])).view(x.shape), None


class Norm(torch.nn.Module):
    """The weight of an RMSNorm; as the last one of the model it takes the pair of the last layer."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, *, kernels: Kernels) -> None:
        super().__init__()
        self.eps, self.kernels = eps, kernels
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = False  # type: ignore[attr-defined]

    def first(self, x: Tensor) -> Tensor:
        """The norm of the embeddings [T, 1, H]."""
        return _Norm.apply(x, self.weight, self.eps, self.kernels)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of the sum, the sum) of [T, 1, H] each."""
        return _AddNorm.apply(x, residual, self.weight, self.eps, self.kernels)

    def forward(self, state: Tensor) -> Tensor:
        """[T, 1, 2H] -> [T, 1, H]."""
        return self.add(*_Split.apply(state))[0]


class ExactAttention(SelfAttention):
    """Megatron's attention with q and k normalized by the engine's kernel."""

    def __init__(self, *args: Any, kernels: Kernels, **named: Any) -> None:
        super().__init__(*args, **named)
        self.kernels = kernels

    def get_query_key_value_tensors(self, hidden_states: Tensor, *args: Any, **named: Any) -> Any:
        """(q [T, 1, heads, d], k and v [T, 1, groups, d])."""
        assert named["split_qkv"] and not named["output_gate"]
        mixed, _ = self.linear_qkv(hidden_states)
        weights = self.q_layernorm.weight, self.k_layernorm.weight
        return _SplitHeads.apply(
            mixed, *weights, self.num_query_groups_per_partition, self.q_layernorm.eps, self.kernels
        )


class PackedAttention(torch.nn.Module):
    """Causal attention inside every segment of a pack."""

    def __init__(self, config: TransformerConfig, *args: Any, kernels: Kernels, **named: Any) -> None:
        super().__init__()
        self.kernels, self.scale = kernels, config.kv_channels**-0.5

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
        packed_seq_params: PackedSeqParams, **_: Any,
    ) -> Tensor:  # fmt: skip
        """query [T, heads, d], key and value [T, groups, d] -> [T, heads * d]."""
        ends, longest = packed_seq_params.cu_seqlens_q, packed_seq_params.max_seqlen_q
        out = _Attention.apply(query, key, value, ends, longest, self.scale, self.kernels)
        return out.view(len(query), -1)


class ExactMLP(MLP):
    """Megatron's MLP with the engine's SwiGLU."""

    kernels: Kernels

    def forward(self, hidden_states: Tensor, *args: Any, **named: Any) -> tuple[Tensor, None]:
        """[T, 1, H] -> [T, 1, H]."""
        x, _ = self.linear_fc1(hidden_states)
        x, _ = self.linear_fc2(_SwiGLU.apply(x, self.kernels))
        return x, None


class ExactLayer(TransformerLayer):
    """[T, 1, H] into the first layer of the model, the pair [T, 1, 2H] into all others and out of all."""

    def __init__(self, *args: Any, kernels: Kernels, **named: Any) -> None:
        super().__init__(*args, **named)
        self.mlp.kernels = kernels

    def forward(self, hidden_states: Tensor, *args: Any, **named: Any) -> tuple[Tensor, None]:
        """As TransformerLayer's; of what else it is given the rotary frequencies and the segments count."""
        assert not args
        given = {k: named[k] for k in ("attention_mask", "rotary_pos_emb", "packed_seq_params")}
        if self.layer_number == 1:
            x, residual = self.input_layernorm.first(hidden_states), hidden_states
        else:
            x, residual = self.input_layernorm.add(*_Split.apply(hidden_states))
        x, _ = self.self_attention(x, **given)
        x, residual = self.pre_mlp_layernorm.add(x, residual)
        x, _ = self.mlp(x)
        return torch.cat((x, residual), dim=-1), None


def layer_spec(config: TransformerConfig, kernels: Kernels) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage, of a dense model."""
    norm = partial(Norm, kernels=kernels)
    layer = get_gpt_layer_local_submodules(qk_layernorm=True, normalization="RMSNorm")
    layer.input_layernorm = layer.pre_mlp_layernorm = norm
    attention = layer.self_attention
    attention.module, attention.params = ExactAttention, attention.params | {"kernels": kernels}
    parts = attention.submodules
    parts.linear_qkv, parts.linear_proj = kernels.column_parallel_linear, kernels.row_parallel_linear
    parts.q_layernorm = parts.k_layernorm = norm
    parts.core_attention = partial(PackedAttention, kernels=kernels)
    linears = MLPSubmodules(linear_fc1=kernels.column_parallel_linear, linear_fc2=kernels.row_parallel_linear)
    layer.mlp = partial(ExactMLP.as_mlp_submodule, submodules=linears)
    spec = ModuleSpec(module=ExactLayer, params={"kernels": kernels}, submodules=layer)
    return TransformerBlockSubmodules(layer_specs=[spec] * get_num_layers_to_build(config), layer_norm=norm)
