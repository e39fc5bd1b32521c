"""Weights between a Hugging Face folder and this rank's shards of the Megatron model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fp8slurm.checkpoint.formats.hf_folder import open_hf
from fp8slurm.checkpoint.formats.sources import HfSource
from fp8slurm.checkpoint.formats.torch_dist_source import EMBEDDING, HEAD
from fp8slurm.core.errors import InputError
from fp8slurm.fp8.block import BlockFP8
from fp8slurm.models.entries import Entry
from fp8slurm.models.names import NameTable
from fp8slurm.trainer import primary_fp8

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel


class HfReader(Mapping[str, torch.Tensor]):
    """The tensors of a Hugging Face folder by name, each read when it is asked for (safetensors, sharded or not).

    Experts are there one by one, also where the folder holds them fused.
    """

    def __init__(self, path: str | Path) -> None:
        """Errors as for the converters' `open_hf`: BadCheckpoint for a missing or damaged shard or a wrong index."""
        self._source = HfSource(open_hf(path))

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._source.whole(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._source.tensors)

    def __len__(self) -> int:
        return len(self._source.tensors)


class ParameterShards:
    """This rank's parameters under their global names, with the rank and size of the group that cuts each."""

    def __init__(
        self, table: NameTable, parameters: list[tuple[Entry, torch.nn.Parameter, bool]],
        tensor_parallel: tuple[int, int], expert_tensor_parallel: tuple[int, int],
    ) -> None:  # fmt: skip
        """parameters: (entry, parameter, whether it is a tied model's second copy of the embedding)."""
        self.table, self.parameters = table, parameters
        self.tensor_parallel, self.expert_tensor_parallel = tensor_parallel, expert_tensor_parallel

    @classmethod
    def of(cls, module: GPTModel, table: NameTable) -> ParameterShards:
        """Those of a Megatron model."""
        from megatron.core import parallel_state as ps

        layers = module.decoder.layers
        layer_offset = layers[0].layer_number - 1 if len(layers) else 0
        experts = table.spec.num_experts // ps.get_expert_model_parallel_world_size()
        expert_offset = experts * ps.get_expert_model_parallel_rank()
        parameters = []
        for name, parameter in module.named_parameters():
            entry = table[table.canonical(name, layer_offset, expert_offset)]
            copy = name == "output_layer.weight" and table.spec.tie_word_embeddings
            parameters.append((entry, parameter, copy))
        dense = (ps.get_tensor_model_parallel_rank(), ps.get_tensor_model_parallel_world_size())
        experts_cut = (ps.get_expert_tensor_parallel_rank(), ps.get_expert_tensor_parallel_world_size())
        return cls(table, parameters, dense, experts_cut)

    def cut(self, entry: Entry) -> tuple[int, int]:
        """(rank, size) of the group that cuts this parameter."""
        return self.tensor_parallel if entry.expert is None else self.expert_tensor_parallel

    def named(self) -> Iterator[tuple[str, torch.Tensor | BlockFP8]]:
        """(global Megatron name, this rank's shard, an FP8 weight as its codes and scales); a tied output layer on a
        stage of its own is left out."""
        for entry, parameter, copy in self.parameters:
            if copy:
                continue
            if primary_fp8.is_primary(parameter):
                yield entry.name, primary_fp8.codes_and_scales(parameter, entry.name)
            else:
                yield entry.name, parameter.detach()

    @torch.no_grad()
    def load(
        self, hf: Mapping[str, torch.Tensor], where: str = "checkpoint",
        loaded: Callable[[torch.nn.Parameter, torch.Tensor], None] | None = None,
    ) -> None:  # fmt: skip
        """Fill every parameter from HF tensors; a tied model's may hold the head all the same.

        `loaded` is called with every parameter and the values that it was filled with, before any quantizing.

        InputError for a missing tensor, a wrong shape, one in FP8, or a tied head that is not the embedding.
        """
        if self.table.spec.tie_word_embeddings and HEAD in hf:
            head, embedding = hf[HEAD], hf[EMBEDDING]
            if head.dtype != embedding.dtype or not torch.equal(head, embedding):
                raise InputError(f"{where}: {HEAD} is not {EMBEDDING}, but config.json says tie_word_embeddings")
        for entry, parameter, _ in self.parameters:
            for t in entry.tensors:
                if t.name not in hf:
                    raise InputError(f"{where}: no tensor {t.name}, which {self.table.spec.architecture} needs")
            try:
                shard = entry.shard(hf, *self.cut(entry))
            except InputError as error:
                raise InputError(f"{where}: {error}") from None
            if not shard.is_floating_point() or shard.dtype.itemsize < 2:
                raise InputError(
                    f"{where}: {entry.tensors[0].name} is {shard.dtype}; "
                    f"--model.hf-checkpoint must hold BF16, FP16 or FP32"
                )
            if primary_fp8.is_primary(parameter):
                primary_fp8.fill(parameter, shard)
            else:
                parameter.copy_(shard)
            if loaded is not None:
                loaded(parameter, shard)
