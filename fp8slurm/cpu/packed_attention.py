"""Packed (THD) sequences for Megatron's local layer spec, whose own attention refuses them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch.distributed import ProcessGroup

from fp8slurm.core.context_cut import own_positions
from fp8slurm.cpu import exact
from fp8slurm.cpu.fp8_linear import gather_sequence, scatter_sequence


class _Grid(NamedTuple):
    """Where tokens of S segments stand in a rectangle [S, length], with padding at each segment's end."""

    tokens: torch.Tensor  # int64 [n], their positions in the pack, or among a rank's tokens
    slots: torch.Tensor  # int64 [n], their places in the flattened rectangle
    length: int


@dataclass(frozen=True)
class _Rectangle:
    """Segments of similar length."""

    segments: int
    keys: _Grid
    """All their tokens."""
    queries: _Grid
    """The same; with context parallelism those that this rank has."""
    query_positions: torch.Tensor  # int64 [S, queries.length], in their segments


def rectangles(cu_seqlens: torch.Tensor, rank: int = 0, size: int = 1) -> list[_Rectangle]:
    """Group the segments of cu_seqlens [S+1] by length, rounded up to a power of two.

    So at most half of a group is padding (segments below 16 tokens aside, which are in one group). rank, size: in the
    context-parallel group.
    """
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).to(torch.int64)
    starts = cu_seqlens[:-1].to(torch.int64)
    kind = torch.ceil(torch.log2(lengths.clamp(min=16).float())).to(torch.int64)
    groups = []
    for k in kind.unique().tolist():
        chosen = ((kind == k) & (lengths > 0)).nonzero().flatten()
        if not len(chosen):
            continue
        s, n = starts[chosen], lengths[chosen]
        keys = queries = _grid(s, n)
        positions = torch.arange(keys.length).expand(len(chosen), -1)
        if size > 1:
            queries = _grid(s // size, n // size)
            ends = torch.cat([n.new_zeros(1), n.cumsum(0)])
            own = torch.zeros(len(chosen) * queries.length, dtype=torch.int64)
            own[queries.slots] = own_positions(ends, rank, size) - ends[queries.slots // queries.length]
            positions = own.view(len(chosen), -1)
        groups.append(_Rectangle(len(chosen), keys, queries, positions))
    return groups


def _grid(starts: torch.Tensor, lengths: torch.Tensor) -> _Grid:
    length = int(lengths.max())
    column = torch.arange(length)
    inside = column[None, :] < lengths[:, None]
    return _Grid((starts[:, None] + column[None, :])[inside], inside.flatten().nonzero().flatten(), length)


class _GatherSequences(torch.autograd.Function):
    """Each rank's tokens [T / size, ...] -> the pack [T, ...]. Every rank's queries use all of it: its gradient is the
    sum over the ranks, of which each gets its own tokens'."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cu_seqlens: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
        ctx.group = group
        ctx.places = torch.cat([own_positions(cu_seqlens, r, group.size()) for r in range(group.size())])
        gathered = gather_sequence(x, group)
        return torch.empty_like(gathered).index_copy_(0, ctx.places, gathered)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return scatter_sequence(grad[ctx.places], ctx.group), None, None


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

    def __init__(self, config: Any, *args: Any, **named: Any) -> None:
        alone = copy.copy(config)
        alone.context_parallel_size = 1  # Megatron's own class refuses more
        super().__init__(alone, *args, **named)

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
        """query [T, heads, d], key and value [T, groups, d] -> [T, heads * d]; of a context-parallel rank's tokens."""
        if packed_seq_params is None:
            return super().forward(query, key, value, attention_mask, attn_mask_type, attention_bias)
        ends, group = packed_seq_params.cu_seqlens_q, parallel_state.get_context_parallel_group()
        if group.size() > 1:
            key, value = (_GatherSequences.apply(x, ends, group) for x in (key, value))
        return self.attend(query, key, value, rectangles(ends, group.rank(), group.size()))

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, groups: list[_Rectangle]
    ) -> torch.Tensor:
        """query of this rank's tokens [T, heads, d], key and value of the whole pack -> [T, heads * d]."""
        tokens, heads, d = query.shape
        out = None
        for r in groups:
            # Padding stands after a segment's tokens, where causality already hides it. In fp32: on a CPU torch's BF16
            # kernel takes three times as long.
            q, k, v = (
                _Move.apply(x, grid.tokens, grid.slots, r.segments * grid.length)
                .view(r.segments, grid.length, -1, d)
                .transpose(1, 2)
                .float()
                for x, grid in ((query, r.queries), (key, r.keys), (value, r.keys))
            )
            whole = r.queries is r.keys
            seen = None if whole else (torch.arange(r.keys.length) <= r.query_positions[..., None])[:, None]
            o = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=seen, is_causal=whole, scale=self.softmax_scale, enable_gqa=True
            )
            flat = o.to(query.dtype).transpose(1, 2).reshape(-1, heads * d)
            part = _Move.apply(flat, r.queries.slots, r.queries.tokens, tokens)
            out = part if out is None else out + part
        assert out is not None
        return out


def apply_packed_rotary(
    t: torch.Tensor, cu_seqlens: torch.Tensor, freqs: torch.Tensor, *, cp_group: Any = None, **options: Any
) -> torch.Tensor:
    """Megatron's rotary embedding of packed t [T, heads, d], for all segments at once.

    Takes the place of rope_utils._apply_rotary_pos_emb_thd, a Python loop over the segments: with hundreds of short
    ones it is most of a step. The values are the same: position p of every segment turns by freqs[p].
    t is a context-parallel rank's part where cp_group has more than one; cu_seqlens are the whole pack's.
    """
    size = 1 if cp_group is None else cp_group.size()
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).to(torch.int64) // size
    starts = cu_seqlens[:-1].to(torch.int64).repeat_interleave(lengths)
    places = torch.arange(t.shape[0]) if size == 1 else own_positions(cu_seqlens, cp_group.rank(), size)
    positions = places - starts
    if freqs.dim() == 5:  # the table of model.exact (exact_layers.py), not angles
        return exact.rotate(t, freqs[positions, 0, 0])
    return _apply_rotary_pos_emb_bshd(t.unsqueeze(1), freqs.index_select(0, positions), **options).squeeze(1)
