"""Scales from the keys and values that pass by the trainer's attention."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fp8slurm.config import RunConfig
from fp8slurm.core.errors import BadCheckpoint
from fp8slurm.fp8.kv_cache import through_cache
from fp8slurm.models.known import known_model
from fp8slurm.trainer.kv_scales import FILE, KvScales, scales_in

Q, K, V = (torch.randn(6, heads, 8, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 2))


class Attention(torch.nn.Module):
    """Keeps what it is called with."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: None = None, **more: int
    ) -> torch.Tensor:
        self.seen = (q, k, v, mask, more)
        return q.sum() + (k * 2).sum() + (v * 3).sum()


def stage(first: int) -> torch.nn.Module:
    """A pipeline stage of two layers, as far as it is looked at."""
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(torch.zeros(1))
    module.decoder = torch.nn.Module()
    module.decoder.layers = torch.nn.ModuleList()
    for number in (first, first + 1):
        layer = torch.nn.Module()
        layer.layer_number = number + 1
        layer.self_attention = torch.nn.Module()
        layer.self_attention.core_attention = Attention()
        module.decoder.layers.append(layer)
    return module


def attention(module: torch.nn.Module, layer: int) -> Attention:
    return module.decoder.layers[layer].self_attention.core_attention


@pytest.fixture
def made(tmp_path: Path):
    """made(KEY=VALUE of [engine] or [train], ...): (a stage, its scales) of a model of four layers."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    spec = replace(known_model("Qwen3-4B"), num_layers=4)

    def make(quantize: bool = False, kind: str = "calibrated") -> tuple[torch.nn.Module, KvScales]:
        sections = {"engine": {"kv_cache": "fp8", "kv_scales": kind}, "train": {"quantize_kv": quantize}}
        module = stage(2)
        return module, KvScales(RunConfig.model_validate(sections), spec, module)

    yield make
    dist.destroy_process_group()


def test_scales_follow_the_largest_key_and_value_of_all_that_passed(made) -> None:
    module, scales = made()
    for factor in (1.0, 64.0, 2.0):  # micro-batches
        attention(module, 0)(Q, factor * K, -factor * V, None, packed=1)
    attention(module, 1)(Q, K, 448 * V / V.abs().max())
    seen = attention(module, 0).seen
    assert seen[0] is Q and seen[3:] == (None, {"packed": 1})
    full = scales.advance()
    assert full["kv_cache/v_full"] == pytest.approx(1.0)
    assert scales.values[:2].tolist() == [[1.0, 1.0], [1.0, 1.0]], "of another stage: kept"
    assert scales.values[3, 1] == 2.0
    for x, scale in ((64 * K, scales.values[2, 0]), (64 * V, scales.values[2, 1])):
        assert 0.25 < x.abs().max() / (448 * float(scale)) <= 0.5
    before = scales.values.clone()
    assert scales.advance() == {"kv_cache/k_full": 0.0, "kv_cache/v_full": 0.0}
    assert torch.equal(scales.values, before)
    attention(module, 0)(Q, K * float("nan"), V)
    scales.advance()
    assert scales.values[2, 0] == before[2, 0] and scales.values[2, 1] < before[2, 1]
    names = [name for name, _ in scales.named()]
    assert names == [f"decoder.layers.{n}.self_attention.{x}_scale" for n in (2, 3) for x in "kv"]
    assert all(t.shape == (1,) for _, t in scales.named())


def test_unit_scales_stay(made) -> None:
    module, scales = made(kind="unit")
    attention(module, 0)(Q, 1000 * K, V)
    assert scales.advance()["kv_cache/k_full"] > 1 and (scales.values == 1).all()


def test_attention_sees_what_the_cache_gives_back_and_gradients_pass(made) -> None:
    module, scales = made(quantize=True)
    attention(module, 0)(Q, 64 * K, V)
    scales.advance()
    q, k, v = (x.clone().requires_grad_() for x in (Q, 64 * K, V))
    attention(module, 0)(q, k, v).backward()
    seen = attention(module, 0).seen
    for x, given, scale in zip((q, k, v), seen, (torch.tensor(1.0), *scales.values[2].float())):
        assert torch.equal(given, through_cache(x.detach(), scale)) and not torch.equal(given, x)
    assert [float(x.grad.unique()) for x in (q, k, v)] == [1.0, 2.0, 3.0]


def test_a_checkpoint_has_them(made, tmp_path: Path) -> None:
    module, scales = made()
    attention(module, 0)(Q, 300 * K, V)
    scales.advance()
    scales.write(tmp_path)
    _, other = made()
    other.read(tmp_path)
    assert torch.equal(other.values, scales.values)
    _, unit = made(kind="unit")
    unit.read(tmp_path)
    assert (unit.values == 1).all()
    for text in ("{}", '{"scales": [[1, 1]]}', '{"scales": [[1, 1], [1, 1], [1, 1], [1, -1]]}', '{"scales": "x"}'):
        (tmp_path / FILE).write_text(text)
        with pytest.raises(BadCheckpoint, match=FILE):
            other.read(tmp_path)


def test_scales_of_a_folder_are_rounded_up() -> None:
    tensors = {
        "model.layers.1.self_attn.k_scale": torch.tensor([0.3]),
        "model.layers.0.self_attn.v_proj.v_scale": torch.tensor(2.0),
    }
    assert scales_in(tensors, torch.ones(2, 2)).tolist() == [[1.0, 2.0], [0.5, 1.0]]
    with pytest.raises(BadCheckpoint, match="one positive number"):
        scales_in({"model.layers.1.self_attn.k_scale": torch.tensor([0.3, 0.4])}, torch.ones(2, 2))
