"""A Megatron parameter and the Hugging Face tensors that it is made of, and the parameters of a layer's parts.

Every fused parameter is cut along one dimension, and a tensor-parallel rank's piece of it splits into one contiguous
slice of each HF tensor; the slices of ranks 0, 1, ... laid end to end are that tensor. So each rank can quantize what
it holds, wherever the cut falls on a block boundary (`SliceSpec.on_block_boundary`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fp8slurm.core.errors import InputError
from fp8slurm.fp8 import BLOCK

if TYPE_CHECKING:
    import torch

    from fp8slurm.models.spec import ModelSpec

Kind = Literal["plain", "qkv", "gate_up"]


@dataclass(frozen=True)
class HfTensor:
    """A tensor of the Hugging Face form, whole."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class SliceSpec:
    """Where a rank's slice lies in an HF tensor: [start, start + length) along `dim`; all of it if dim is None."""

    tensor: HfTensor
    dim: int | None
    start: int
    length: int
    """Elements along `dim`; the whole tensor's first dimension if dim is None."""

    @property
    def name(self) -> str:
        return self.tensor.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the slice."""
        if self.dim is None:
            return self.tensor.shape
        return tuple(self.length if d == self.dim else n for d, n in enumerate(self.tensor.shape))

    @property
    def is_whole(self) -> bool:
        return self.dim is None or self.length == self.tensor.shape[self.dim]

    def on_block_boundary(self, block: int = BLOCK) -> bool:
        """True where both ends of the slice are ends of FP8 blocks: quantized alone it gives the whole's bytes."""
        if self.is_whole:
            return True
        assert self.dim is not None
        end = self.start + self.length
        return self.start % block == 0 and (end % block == 0 or end == self.tensor.shape[self.dim])


@dataclass(frozen=True)
class Slice:
    """A rank's slice of an HF tensor, with its data (a view where the layout permits)."""

    spec: SliceSpec
    data: torch.Tensor

    @property
    def name(self) -> str:
        return self.spec.name


@dataclass(frozen=True)
class Entry:
    """One Megatron parameter and the HF tensors it is made of."""

    name: str
    """Global Megatron name."""
    kind: Kind
    tensors: tuple[HfTensor, ...]
    """One for plain; q, k, v for qkv; gate, up for gate_up."""
    tp_dim: int | None
    """Dimension that tensor parallelism cuts (expert-tensor parallelism for an expert); None: every rank has it all."""
    groups: int = 0
    """Query groups of a qkv entry (key-value heads)."""
    layer: int | None = None
    expert: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole Megatron parameter."""
        return (sum(t.shape[0] for t in self.tensors), *self.tensors[0].shape[1:])

    @property
    def checkpoint_key(self) -> str:
        """Key in a torch_dist checkpoint with stacked layers (Megatron's default): without layer and expert numbers."""
        key = re.sub(r"^decoder\.layers\.\d+\.", "decoder.layers.", self.name)
        return re.sub(r"\.local_experts\.\d+\.", ".experts.", key)

    @property
    def checkpoint_index(self) -> tuple[int, ...]:
        """Leading indices of this parameter in that stacked tensor: (), (layer,) or (layer, expert)."""
        return tuple(i for i in (self.layer, self.expert) if i is not None)

    def _check(self, rank: int, world: int) -> None:
        assert 0 <= rank < world, (rank, world)
        if self.tp_dim is None:
            return
        cut = self.groups if self.kind == "qkv" else self.tensors[0].shape[self.tp_dim]
        if cut % world:
            raise InputError(f"{self.name}: {cut} along dimension {self.tp_dim} cannot be cut into {world} shards")

    def merge(self, hf: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """HF -> Megatron: the whole parameter from whole HF tensors, looked up by name.

        KeyError for a tensor that is missing, InputError for one of another shape.
        """
        return self._fuse([self._checked(hf, t) for t in self.tensors], self.groups)

    def _checked(self, hf: Mapping[str, torch.Tensor], tensor: HfTensor) -> torch.Tensor:
        data = hf[tensor.name]
        if tuple(data.shape) != tensor.shape:
            raise InputError(f"{tensor.name}: shape {tuple(data.shape)}, the model's config says {tensor.shape}")
        return data

    def _fuse(self, parts: Sequence[torch.Tensor], groups: int) -> torch.Tensor:
        import torch  # names, sizes and slices are asked for where torch is not, or not yet, loaded

        if self.kind == "plain":
            return parts[0]
        if self.kind == "gate_up":
            return torch.cat(list(parts), 0)
        tail = parts[0].shape[1:]
        return torch.cat([p.reshape(groups, -1, *tail) for p in parts], 1).reshape(-1, *tail)

    def shard(self, hf: Mapping[str, torch.Tensor], rank: int = 0, world: int = 1) -> torch.Tensor:
        """HF -> Megatron: tensor-parallel rank `rank`'s shard of the parameter, from whole HF tensors."""
        parts = [self._checked(hf, s.tensor) for s in self.slices(rank, world)]
        cut = [
            p if s.dim is None else p.narrow(s.dim, s.start, s.length) for p, s in zip(parts, self.slices(rank, world))
        ]
        return self._fuse(cut, self.groups // world)

    def shard_of(self, full: torch.Tensor, rank: int, world: int) -> torch.Tensor:
        """Tensor-parallel rank `rank`'s shard of the whole Megatron parameter."""
        return self.shard({s.name: s.data for s in self.split(full)}, rank, world)

    def shard_shape(self, world: int = 1) -> tuple[int, ...]:
        """Shape of every rank's shard."""
        self._check(0, world)
        return tuple(n // world if d == self.tp_dim else n for d, n in enumerate(self.shape))

    def slices(self, rank: int = 0, world: int = 1) -> tuple[SliceSpec, ...]:
        """Which slices of its HF tensors rank `rank`'s shard holds, in the order of `tensors`."""
        self._check(rank, world)
        out = []
        for t in self.tensors:
            if self.tp_dim is None:
                out.append(SliceSpec(t, None, 0, t.shape[0]))
            else:
                length = t.shape[self.tp_dim] // world
                out.append(SliceSpec(t, self.tp_dim, rank * length, length))
        return tuple(out)

    def split(self, shard: torch.Tensor, rank: int = 0, world: int = 1) -> tuple[Slice, ...]:
        """Megatron -> HF: a rank's shard (the whole parameter for world 1) as slices of the HF tensors."""
        if tuple(shard.shape) != self.shard_shape(world):
            raise ValueError(f"{self.name}: shard of shape {tuple(shard.shape)}, expected {self.shard_shape(world)}")
        specs = self.slices(rank, world)
        if self.kind == "plain":
            return (Slice(specs[0], shard),)
        rows = [s.shape[0] for s in specs]
        if self.kind == "gate_up":
            parts = shard.split(rows, 0)
        else:
            groups = self.groups // world
            grouped = shard.reshape(groups, -1, *shard.shape[1:]).split([r // groups for r in rows], 1)
            parts = tuple(p.reshape(-1, *shard.shape[1:]) for p in grouped)
        return tuple(Slice(s, p) for s, p in zip(specs, parts))


def plain(name: str, hf: str, shape: tuple[int, ...], tp_dim: int | None = None, layer: int | None = None) -> Entry:
    """A parameter that is one HF tensor."""
    return Entry(name, "plain", (HfTensor(hf, shape),), tp_dim, layer=layer)


def attention(spec: ModelSpec, layer: int, *, qk_norm: bool = False, bias: bool = False) -> Iterator[Entry]:
    """Norm, q, k and v (fused by query group) and the output projection; qk_norm: a norm over every head of q and k;
    bias: one of q, k and v."""
    hidden, d = spec.hidden_size, spec.head_dim
    m, h = f"decoder.layers.{layer}.self_attention.", f"model.layers.{layer}."
    a = h + "self_attn."
    rows = {"q": spec.num_heads * d, "k": spec.num_kv_heads * d, "v": spec.num_kv_heads * d}

    def qkv(what: str, *tail: int) -> Entry:
        tensors = tuple(HfTensor(f"{a}{x}_proj.{what}", (n, *tail)) for x, n in rows.items())
        return Entry(f"{m}linear_qkv.{what}", "qkv", tensors, 0, groups=spec.num_kv_heads, layer=layer)

    yield plain(m + "linear_qkv.layer_norm_weight", h + "input_layernorm.weight", (hidden,), layer=layer)
    yield qkv("weight", hidden)
    if bias:
        yield qkv("bias")
    if qk_norm:
        yield plain(m + "q_layernorm.weight", a + "q_norm.weight", (d,), layer=layer)
        yield plain(m + "k_layernorm.weight", a + "k_norm.weight", (d,), layer=layer)
    yield plain(m + "linear_proj.weight", a + "o_proj.weight", (hidden, rows["q"]), 1, layer)


def dense_ffn(spec: ModelSpec, layer: int) -> Iterator[Entry]:
    """Norm, gate and up (fused), down."""
    m, h = f"decoder.layers.{layer}.mlp.", f"model.layers.{layer}."
    norm = h + "post_attention_layernorm.weight"
    yield plain(m + "linear_fc1.layer_norm_weight", norm, (spec.hidden_size,), layer=layer)
    yield from _swiglu(m, h + "mlp.", spec.hidden_size, spec.ffn_hidden_size, layer)


def experts(spec: ModelSpec, layer: int) -> Iterator[Entry]:
    """Norm, router, and gate, up and down of every expert."""
    m, h = f"decoder.layers.{layer}.", f"model.layers.{layer}."
    hidden, width = spec.hidden_size, spec.moe_ffn_hidden_size
    yield plain(m + "pre_mlp_layernorm.weight", h + "post_attention_layernorm.weight", (hidden,), layer=layer)
    yield plain(m + "mlp.router.weight", h + "mlp.gate.weight", (spec.num_experts, hidden), layer=layer)
    for e in range(spec.num_experts):
        prefix, hf = f"{m}mlp.experts.local_experts.{e}.", f"{h}mlp.experts.{e}."
        yield from _swiglu(prefix, hf, hidden, width, layer, e)


def _swiglu(prefix: str, hf: str, hidden: int, width: int, layer: int, expert: int | None = None) -> Iterator[Entry]:
    gate_up = (HfTensor(hf + "gate_proj.weight", (width, hidden)), HfTensor(hf + "up_proj.weight", (width, hidden)))
    down = (HfTensor(hf + "down_proj.weight", (hidden, width)),)
    yield Entry(prefix + "linear_fc1.weight", "gate_up", gate_up, 0, layer=layer, expert=expert)
    yield Entry(prefix + "linear_fc2.weight", "plain", down, 1, layer=layer, expert=expert)
