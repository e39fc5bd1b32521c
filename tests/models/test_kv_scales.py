"""Where an FP8 KV cache can be used, and its scales by name."""

from __future__ import annotations

import pytest

from fp8slurm.config import parse
from fp8slurm.models.known import known_model
from fp8slurm.models.kv_scales import check_kv_cache, engine_name, is_scale, layer_of, missing_scales, scale_entries
from fp8slurm.models.names import NameTable

FP8 = "--engine.kv-cache fp8"


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--engine.kv-scales unit", "--engine.kv-scales unit without --engine.kv-cache fp8"),
        ("--train.quantize-kv", "--train.quantize-kv without --engine.kv-cache fp8"),
        (f"{FP8} --sync.pause-mode in_place", "allowed: retract, abort"),
        (f"{FP8} --engine.extra-args=--attention-backend triton", "triton: that backend .* allowed: torch_native"),
        (f"{FP8} --slurm.gpus-per-node 1 --engine.extra-args=--decode-attention-backend=flashinfer", "allowed: fa3"),
        (f"{FP8} --engine.extra-args=--speculative-algorithm EAGLE", "a draft model"),
    ],
)
def test_refused(flags: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        check_kv_cache(parse("tiny-fp8", flags.split()))


def test_taken() -> None:
    for flags in ("", FP8, f"{FP8} --engine.kv-scales unit --train.quantize-kv --sync.pause-mode abort",
                  f"{FP8} --slurm.gpus-per-node 1 --engine.extra-args=--attention-backend fa3"):  # fmt: skip
        check_kv_cache(parse("tiny-fp8", flags.split()))


def test_names() -> None:
    name = "model.layers.11.self_attn.v_scale"
    assert is_scale(name) and layer_of(name) == (11, 1)
    assert engine_name(name) == "model.layers.11.self_attn.attn.v_scale"
    assert layer_of("model.layers.2.self_attn.k_proj.k_scale") == (2, 0)
    assert not is_scale("model.layers.2.self_attn.k_proj.weight_scale_inv")
    sent = [t.name for e in scale_entries(1) for t in e.tensors]
    assert missing_scales(["model.layers.0.self_attn.k_proj.k_scale", "model.layers.0.self_attn.v_scale"], 2) == sent


def test_updates_have_two_scales_a_layer() -> None:
    spec = known_model("Qwen3-4B")
    plain, scaled = NameTable(spec).hf_tensors(), NameTable(spec, kv_scales=True).hf_tensors()
    assert len(scaled) - len(plain) == 2 * spec.num_layers and plain.items() <= scaled.items()
    assert all(is_scale(name) and scaled[name].shape == (1,) for name in scaled.keys() - plain.keys())
