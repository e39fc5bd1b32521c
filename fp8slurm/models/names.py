"""One two-way table between Megatron's parameters and Hugging Face's tensors: names, cuts, fused layouts.

Megatron names are global (layer and expert numbers count over all stages and ranks) and in the form of the
TransformerEngine layer spec, which is also that of the checkpoints, except that experts are numbered:
`decoder.layers.L.mlp.experts.local_experts.E.linear_fc1.weight`. `canonical` maps a module's own parameter names to it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from fp8slurm.models.entries import Entry, HfTensor, plain
from fp8slurm.models.kv_scales import scale_entries
from fp8slurm.models.spec import ModelSpec


class NameTable:
    """All parameters of a model, in model order (embedding, layers, final norm, output layer).

    The output layer of a model with tied embeddings has no entry of its own: it is the embedding.
    """

    def __init__(self, spec: ModelSpec, kv_scales: bool = False) -> None:
        """kv_scales: with the scales of an FP8 KV cache, which weight updates bring (trainer/kv_scales.py)."""
        self.spec = spec
        self.entries: tuple[Entry, ...] = tuple(_entries(spec, kv_scales))
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


def _entries(spec: ModelSpec, kv_scales: bool) -> Iterator[Entry]:
    matrix = (spec.vocab_size, spec.hidden_size)
    yield plain("embedding.word_embeddings.weight", "model.embed_tokens.weight", matrix, 0)
    for layer in range(spec.num_layers):
        yield from spec.family.layer(spec, layer)
        if kv_scales:
            yield from scale_entries(layer)
    yield plain("decoder.final_layernorm.weight", "model.norm.weight", (spec.hidden_size,))
    if not spec.tie_word_embeddings:
        yield plain("output_layer.weight", "lm_head.weight", matrix, 0)
