"""The policy: every tensor of a Qwen3 model falls on the right side, with a reason."""

import pytest

from fp8slurm.fp8.policy import decide, engine_matrix, has_effect, kept_name

LAYER = "model.layers.11."


@pytest.mark.parametrize(
    "name",
    [LAYER + f"self_attn.{p}_proj.weight" for p in "qkvo"]
    + [LAYER + f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")]
    + [LAYER + f"mlp.experts.127.{p}_proj.weight" for p in ("gate", "up", "down")],
)
def test_linear_weights_are_quantized(name: str) -> None:
    assert decide(name, (256, 256)).quantize


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("model.embed_tokens.weight", "embedding"),
        ("lm_head.weight", "output head"),
        (LAYER + "mlp.gate.weight", "router"),
        (LAYER + "input_layernorm.weight", "norm"),
        (LAYER + "post_attention_layernorm.weight", "norm"),
        (LAYER + "self_attn.q_norm.weight", "norm"),
        (LAYER + "self_attn.k_norm.weight", "norm"),
        ("model.norm.weight", "norm"),
        (LAYER + "self_attn.q_proj.bias", "bias"),
        ("model.visual.blocks.0.attn.qkv.weight", "vision tower"),
        ("visual.merger.mlp.0.weight", "vision tower"),
        ("mtp.layers.0.eh_proj.weight", "multi-token prediction head"),
        ("model.layers.48.eh_proj.weight", "multi-token prediction head"),
        (LAYER + "something_new.weight", "not a Linear weight of a layer"),
    ],
)
def test_the_rest_is_kept_with_its_reason(name: str, reason: str) -> None:
    decision = decide(name, (256, 256))
    assert not decision.quantize
    assert decision.reason == reason


def test_fused_experts() -> None:
    assert decide(LAYER + "mlp.experts.gate_up_proj", (8, 512, 256)).quantize
    assert decide(LAYER + "mlp.experts.down_proj", (8, 256, 256)).quantize
    with pytest.raises(ValueError, match="3 dimensions"):
        decide(LAYER + "mlp.experts.down_proj", (256, 256))


def test_a_linear_weight_with_another_rank_is_refused() -> None:
    with pytest.raises(ValueError, match=r"q_proj.*\[256\]"):
        decide(LAYER + "self_attn.q_proj.weight", (256,))


@pytest.mark.parametrize(
    ("entry", "kept"),
    [
        ("model.layers.11.self_attn.q_proj", True),
        ("model.layers.11", True),
        ("model.layers.11.", True),
        ("q_proj", True),
        ("self_attn.q_proj", True),
        ("model.layers.1", False),
        ("proj", False),
        ("lm_head", False),
    ],
)
def test_modules_to_not_convert(entry: str, kept: bool) -> None:
    decision = decide(LAYER + "self_attn.q_proj.weight", (256, 256), [entry])
    assert decision.quantize is not kept
    assert not kept or entry in decision.reason


@pytest.mark.parametrize(
    ("module", "matrix", "name"),
    [
        ("self_attn.k_proj", "self_attn.qkv_proj", None),
        ("self_attn.o_proj", "self_attn.o_proj", None),
        ("mlp.up_proj", "mlp.gate_up_proj", None),
        ("mlp.down_proj", "mlp.down_proj", None),
        ("mlp.experts.3.up_proj", "mlp.experts", "mlp.experts"),
        ("mlp.experts.gate_up_proj", "mlp.experts", "mlp.experts"),
    ],
)
def test_what_the_engine_holds_a_module_in(module: str, matrix: str, name: str | None) -> None:
    assert engine_matrix(LAYER + module) == LAYER + matrix
    assert kept_name(LAYER + module) == LAYER + (name or module)
    assert not decide(LAYER + module + ".weight", (256, 256), [kept_name(LAYER + module)]).quantize


@pytest.mark.parametrize(
    ("entry", "effect"),
    [
        ("model.layers.11", True), ("q_proj", True), ("lm_head", True), ("model.layers.0.mlp.gate", True),
        ("model.layers.1", False), ("self_attn", False), ("", False),
    ],
)  # fmt: skip
def test_entries_without_an_effect(entry: str, effect: bool) -> None:
    assert has_effect(entry, [LAYER + "self_attn.q_proj"]) is effect
