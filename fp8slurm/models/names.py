"""One two-way table between Megatron's parameters and Hugging Face's tensors: names, cuts, fused layouts.

Megatron names are global (layer and expert numbers count over all stages and ranks) and in the form of the
TransformerEngine layer spec, which is also that of the checkpoints, except that experts are numbered:
`decoder.layers.L.mlp.experts.local_experts.E.linear_fc1.weight`. `canonical` maps a module's own parameter names to it.

Every fused parameter is cut along one dimension, and a tensor-parallel rank's piece of it splits into one contiguous
slice of each HF tensor; the slices of ranks 0, 1, ... laid end to end are that tensor. So each rank can quantize what
it holds, wherever the cut falls on a block boundary (`SliceSpec.on_block_boundary`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from fp8slurm.core.errors import InputError
from fp8slurm.fp8 import BLOCK
from fp8slurm.models.qwen3 import ModelSpec

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


class NameTable:
    """All parameters of a model, in model order (embedding, layers, final norm, output layer).

    The output layer of a model with tied embeddings has no entry of its own: it is the embedding.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.entries: tuple[Entry, ...] = tuple(_entries(spec))
        self._by_name = {e.name: e for e in self.entries}

    def __getitem__(self, megatron_name: str) -> Entry:
        """The entry of a global Megatron name; KeyError if the model has none."""
        return self._by_name[megatron_name]

    def __contains__(self, megatron_name: str) -> bool:
        return megatron_name in self._by_name

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def hf_tensors(self) -> dict[str, HfTensor]:
        """Every HF tensor of the model by name, in model order."""
        return {t.name: t for e in self.entries for t in e.tensors}

    def stage(self, entry: Entry, stages: int) -> int:
        """The pipeline stage of `stages` that holds a parameter: equally many layers each, the embedding with the
        first, the final norm and an output layer of its own with the last."""
        if entry.layer is None:
            return 0 if entry is self.entries[0] else stages - 1
        return entry.layer // (self.spec.num_layers // stages)

    def expert_rank(self, entry: Entry, ranks: int) -> int | None:
        """The expert-parallel rank of `ranks` that holds a parameter; None: all of them do."""
        return None if entry.expert is None else entry.expert // (self.spec.num_experts // ranks)

    def canonical(self, module_name: str, layer_offset: int = 0, expert_offset: int = 0) -> str:
        """Global name of a parameter of a Megatron GPTModel, local or TransformerEngine spec.

        `module_name` is from named_parameters() (any `module.` prefix is dropped); the offsets are the numbers of
        layers on earlier pipeline stages and of experts on earlier expert-parallel ranks. KeyError for an unknown one.
        """
        name = re.sub(r"^(module\.)+", "", module_name)
        if name == "output_layer.weight" and self.spec.tie_word_embeddings:
            return "embedding.word_embeddings.weight"
        name = re.sub(r"^decoder\.layers\.(\d+)\.", lambda m: f"decoder.layers.{int(m[1]) + layer_offset}.", name)
        name = re.sub(r"\.experts\.(linear_fc[12])\.weight(\d+)$", r".experts.local_experts.\2.\1.weight", name)
        name = re.sub(r"\.local_experts\.(\d+)\.", lambda m: f".local_experts.{int(m[1]) + expert_offset}.", name)
        name = name.replace(".input_layernorm.weight", ".self_attention.linear_qkv.layer_norm_weight")
        if not self.spec.is_moe:
            name = name.replace(".pre_mlp_layernorm.weight", ".mlp.linear_fc1.layer_norm_weight")
        return self._by_name[name].name


def _entries(spec: ModelSpec) -> Iterator[Entry]:
    hidden, d = spec.hidden_size, spec.head_dim
    q_rows, kv_rows = spec.num_heads * d, spec.num_kv_heads * d

    def plain(name: str, hf: str, shape: tuple[int, ...], tp_dim: int | None = None, layer: int | None = None) -> Entry:
        return Entry(name, "plain", (HfTensor(hf, shape),), tp_dim, layer=layer)

    def ffn(prefix: str, hf: str, width: int, layer: int, expert: int | None) -> Iterator[Entry]:
        gate_up = (HfTensor(hf + "gate_proj.weight", (width, hidden)), HfTensor(hf + "up_proj.weight", (width, hidden)))
        down = (HfTensor(hf + "down_proj.weight", (hidden, width)),)
        yield Entry(prefix + "linear_fc1.weight", "gate_up", gate_up, 0, layer=layer, expert=expert)
        yield Entry(prefix + "linear_fc2.weight", "plain", down, 1, layer=layer, expert=expert)

    yield plain("embedding.word_embeddings.weight", "model.embed_tokens.weight", (spec.vocab_size, hidden), 0)
    for i in range(spec.num_layers):
        m, h = f"decoder.layers.{i}.", f"model.layers.{i}."
        attention, a = m + "self_attention.", h + "self_attn."
        yield plain(attention + "linear_qkv.layer_norm_weight", h + "input_layernorm.weight", (hidden,), layer=i)
        rows = {"q": q_rows, "k": kv_rows, "v": kv_rows}
        qkv = tuple(HfTensor(f"{a}{x}_proj.weight", (n, hidden)) for x, n in rows.items())
        yield Entry(attention + "linear_qkv.weight", "qkv", qkv, 0, groups=spec.num_kv_heads, layer=i)
        yield plain(attention + "q_layernorm.weight", a + "q_norm.weight", (d,), layer=i)
        yield plain(attention + "k_layernorm.weight", a + "k_norm.weight", (d,), layer=i)
        yield plain(attention + "linear_proj.weight", a + "o_proj.weight", (hidden, q_rows), 1, layer=i)
        norm = "pre_mlp_layernorm.weight" if spec.is_moe else "mlp.linear_fc1.layer_norm_weight"
        yield plain(m + norm, h + "post_attention_layernorm.weight", (hidden,), layer=i)
        if spec.is_moe:
            yield plain(m + "mlp.router.weight", h + "mlp.gate.weight", (spec.num_experts, hidden), layer=i)
            for e in range(spec.num_experts):
                prefix, hf = f"{m}mlp.experts.local_experts.{e}.", f"{h}mlp.experts.{e}."
                yield from ffn(prefix, hf, spec.moe_ffn_hidden_size, i, e)
        else:
            yield from ffn(m + "mlp.", h + "mlp.", spec.ffn_hidden_size, i, None)
    yield plain("decoder.final_layernorm.weight", "model.norm.weight", (hidden,))
    if not spec.tie_word_embeddings:
        yield plain("output_layer.weight", "lm_head.weight", (spec.vocab_size, hidden), 0)
