"""Weights that the trainer holds in block FP8 are sent as they are: the same bytes, nothing quantized again."""

import re
from types import SimpleNamespace

import pytest
import torch
from tiny import model_config
from two_ranks import laid_together

from fp8slurm.fp8.block import BlockFP8
from fp8slurm.fp8.policy import decide
from fp8slurm.fp8.quantize import quantize
from fp8slurm.models.entries import Entry
from fp8slurm.models.names import NameTable
from fp8slurm.models.spec import ModelSpec, QuantizationSpec
from fp8slurm.sync import stream as stream_module
from fp8slurm.sync.stream import WeightStream
from fp8slurm.trainer import primary_fp8


class StandIn:
    """Float8BlockwiseQTensor's attributes on the CPU: scales padded to a multiple of four columns, garbage in the padding."""

    def __init__(self, weight: torch.Tensor) -> None:
        q = quantize(weight)
        n, k = q.scale_inv.shape
        self._rowwise_data = q.data.view(torch.uint8).clone()
        self._rowwise_scale_inv = torch.full((n, -(-k // 4) * 4), torch.nan)
        self._rowwise_scale_inv[:, :k] = q.scale_inv
        self._columnwise_data = None
        self._is_2D_scaled, self._fp8_dtype, self.dtype = True, "DType.kFloat8E4M3", torch.bfloat16
        self.quantizer = SimpleNamespace(block_len=128, force_pow_2_scales=False, amax_epsilon=0.0)

    def _get_quantizer(self) -> SimpleNamespace:
        return self.quantizer


def spec_of(moe: bool = False) -> ModelSpec:
    return ModelSpec.from_hf_config(model_config(moe))


def is_linear(entry: Entry) -> bool:
    return all(decide(t.name, t.shape).quantize for t in entry.tensors)


def weights_of(table: NameTable) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {n: (torch.randn(t.shape, generator=g) * 0.05).bfloat16() for n, t in table.hf_tensors().items()}


def in_bf16(table: NameTable) -> dict[str, torch.Tensor]:
    weights = weights_of(table)
    return {e.name: e.shard(weights, 0, 1) for e in table}


def held_by(table: NameTable, rank: int = 0, world: int = 1) -> dict[str, tuple[Entry, torch.Tensor | StandIn]]:
    weights = weights_of(table)
    out = {}
    for entry in table:
        shard = entry.shard(weights, *((rank, world) if entry.tp_dim is not None else (0, 1))).contiguous()
        out[entry.name] = (entry, StandIn(shard) if is_linear(entry) else shard)
    return out


def as_sent(held: dict[str, tuple[Entry, torch.Tensor | StandIn]]) -> dict[str, torch.Tensor | BlockFP8]:
    return {n: primary_fp8.codes_and_scales(t, n) if primary_fp8.is_primary(t) else t for n, (_, t) in held.items()}


def buckets(table: NameTable, held: dict[str, torch.Tensor | BlockFP8]) -> tuple[WeightStream, dict[str, torch.Tensor]]:
    stream = WeightStream(table, lambda: iter(held.items()), QuantizationSpec(), 2**20, torch.bfloat16)
    return stream, {n: t.clone() for _, b in stream.buckets(1) for n, t in b.views()}


@pytest.mark.parametrize("moe", [False, True])
def test_buckets_hold_the_primary_bytes(moe: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    table = NameTable(spec_of(moe))
    held = held_by(table)
    _, wanted = buckets(table, in_bf16(table))

    def refused(*_, **__):
        raise AssertionError("quantized again")

    monkeypatch.setattr(stream_module, "quantize", refused)
    stream, got = buckets(table, as_sent(held))
    assert got.keys() == wanted.keys() and any(n.endswith("_scale_inv") for n in got)
    for name, tensor in wanted.items():
        assert torch.equal(got[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert stream.seconds["quantize"] == 0
    # the stream reads the weights themselves: what a step changes is in the next update
    name, (_, weight) = next((n, x) for n, x in held.items() if primary_fp8.is_primary(x[1]))
    weight._rowwise_data.fill_(0x38)
    again = {n: t.clone() for _, b in stream.buckets(2) for n, t in b.views()}
    changed = [n for n in got if not torch.equal(got[n].view(torch.uint8), again[n].view(torch.uint8))]
    assert changed == [t.name for t in table[name].tensors]


def test_two_ranks_shards_laid_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slices of two tensor-parallel ranks, without a group: what rank 1 would send is put where it would arrive."""
    spec = spec_of()
    table = NameTable(spec)
    _, wanted = buckets(table, in_bf16(table))
    for bucket in laid_together(table, lambda rank: as_sent(held_by(table, rank, 2))):
        for name, tensor in bucket.views():
            assert torch.equal(tensor.view(torch.uint8), wanted[name].view(torch.uint8)), name


def test_an_engine_that_wants_bf16_is_refused() -> None:
    table = NameTable(spec_of())
    held = as_sent(held_by(table))
    with pytest.raises(
        ValueError, match="holds model.layers.0.self_attn.q_proj.weight in FP8 only.*--fp8.no-param-gather"
    ):
        WeightStream(table, lambda: iter(held.items()), None, 2**20, torch.bfloat16)


@pytest.mark.parametrize(
    ("changes", "parameter"),
    [
        ({"head_dim": 64}, "decoder.layers.0.self_attention.linear_qkv.weight"),
        ({"intermediate_size": 192}, "decoder.layers.0.mlp.linear_fc1.weight"),
    ],
)
def test_blocks_that_lie_across_two_tensors_are_refused(changes: dict[str, int], parameter: str) -> None:
    """A scale of the fused weight would be that of rows of both: sent as they are they would be other numbers."""
    table = NameTable(ModelSpec.from_hf_config(model_config() | changes))
    held = as_sent(held_by(table))
    with pytest.raises(
        ValueError, match=rf"blocks of the trainer's {re.escape(parameter)} are not those of .*--fp8.no-param-gather"
    ):
        WeightStream(table, lambda: iter(held.items()), QuantizationSpec(), 2**20, torch.bfloat16)


def test_the_expected_weights_are_fp8() -> None:
    table = NameTable(spec_of())
    held = held_by(table)
    names = primary_fp8.check_primary(held.values())
    assert names == sorted(n for n, (e, _) in held.items() if is_linear(e))
    assert not any("norm" in n or "embedding" in n or "router" in n for n in names) and len(names) == 8

    name = "decoder.layers.1.mlp.linear_fc1.weight"
    missing = held | {name: (held[name][0], torch.zeros(2, 2))}
    with pytest.raises(
        RuntimeError, match=re.escape(f"7 parameters are FP8, 8 should be; still in high precision: {name}")
    ):
        primary_fp8.check_primary(missing.values())
    too_many = held | {"output": (next(e for e, _ in held.values() if not is_linear(e)), held[name][1])}
    with pytest.raises(RuntimeError, match="FP8 but should not be: embedding"):
        primary_fp8.check_primary(too_many.values())
    with pytest.raises(RuntimeError, match="0 parameters are FP8, 8 should be"):
        primary_fp8.check_primary((e, torch.zeros(1)) for e, _ in held.values())
    held[name][1].quantizer.force_pow_2_scales = True
    with pytest.raises(RuntimeError, match="1 faults .*NVTE_FP8_BLOCK_SCALING_FP32_SCALES came too late"):
        primary_fp8.check_primary(held.values())
