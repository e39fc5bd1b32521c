"""Packed (THD) sequences for Megatron's local layer spec, whose own attention refuses them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.dot_product_attention import DotProductAttention

from fp8slurm.cpu import exact


@dataclass(frozen=True)
class _Rectangle:
    """Segments of similar length, to be laid out as [S, L] with padding at each segment's end."""

    tokens: torch.Tensor  # int64 [n], positions of the segments' tokens in the pack
    slots: torch.Tensor  # int64 [n], their places in the flattened rectangle
    segments: int
    length: int


def rectangles(cu_seqlens: torch.Tensor) -> list[_Rectangle]:
    """Group the segments of cu_seqlens [S+1] by length, rounded up to a power of two.

    So at most half of a group is padding (segments below 16 tokens aside, which are in one group).
    """
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).to(torch.int64)
    starts = cu_seqlens[:-1].to(torch.int64)
    kind = torch.ceil(torch.log2(lengths.clamp(min=16).float())).to(torch.int64)
    groups = []
    for k in kind.unique().tolist():
        chosen = ((kind == k) & (lengths > 0)).nonzero().flatten()
        if not len(chosen):
            continue
        n, length = lengths[chosen], int(lengths[chosen].max())
        column = torch.arange(length)
        inside = column[None, :] < n[:, None]
        tokens = (starts[chosen][:, None] + column[None, :])[inside]
        slots = inside.flatten().nonzero().flatten()
        groups.append(_Rectangle(tokens, slots, len(chosen), length))
    return groups


class _Move(torch.autograd.Function):
    """out [rows, ...], zero but for out[to[i]] = x[source[i]]; both index lists are without repeats.

    Its gradient is the same move backwards, which spares autograd's index_add.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, source: torch.Tensor, to: torch.Tensor, rows: int) -> torch.Tensor:
        ctx.save_for_backward(source, to)
        ctx.rows = x.shape[0]
        out = x.new_zeros((rows, *x.shape[1:]))
        return out.index_copy_(0, to, x.index_select(0, source))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        source, to = ctx.saved_tensors
        out = grad.new_zeros((ctx.rows, *grad.shape[1:]))
        return out.index_copy_(0, source, grad.index_select(0, to)), None, None, None


class PackedDotProductAttention(DotProductAttention):
    """Causal attention inside every segment of a pack; anything else goes to Megatron's own class."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """query [T, heads, d], key and value [T, groups, d] -> [T, heads * d]."""
        if packed_seq_params is None:
            return super().forward(query, key, value, attention_mask, attn_mask_type, attention_bias)
        tokens, heads, d = query.shape
        out = None
        for r in rectangles(packed_seq_params.cu_seqlens_q):
            # Padding stands after a segment's tokens, where causality already hides it. In fp32: on a CPU torch's BF16
            # kernel takes three times as long.
            q, k, v = (
                _Move.apply(x, r.tokens, r.slots, r.segments * r.length)
                .view(r.segments, r.length, -1, d)
                .transpose(1, 2)
                .float()
                for x in (query, key, value)
            )
            o = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=True
            )
            flat = o.to(query.dtype).transpose(1, 2).reshape(-1, heads * d)
            part = _Move.apply(flat, r.slots, r.tokens, tokens)
            out = part if out is None else out + part
        assert out is not None
        return out


def apply_packed_rotary(
    t: torch.Tensor, cu_seqlens: torch.Tensor, freqs: torch.Tensor, *, cp_group: Any = None, **options: Any
) -> torch.Tensor:
    """Megatron's rotary embedding of packed t [T, heads, d], for all segments at once.

    Takes the place of rope_utils._apply_rotary_pos_emb_thd, a Python loop over the segments: with hundreds of short
    ones it is most of a step. The values are the same: position p of every segment turns by freqs[p].
    """
    assert cp_group is None or cp_group.size() == 1
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).to(torch.int64)
    starts = cu_seqlens[:-1].to(torch.int64).repeat_interleave(lengths)
    positions = torch.arange(t.shape[0], device=t.device) - starts
    if freqs.dim() == 5:  # the table of model.exact (exact_layers.py), not angles
        return exact.rotate(t, freqs[positions, 0, 0])
    return _apply_rotary_pos_emb_bshd(t.unsqueeze(1), freqs.index_select(0, positions), **options).squeeze(1)
