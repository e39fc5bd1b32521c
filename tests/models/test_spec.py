"""Configurations that are read, and those that are refused."""

import json
from pathlib import Path

import pytest

from fp8slurm.config.schema import ParallelSection
from fp8slurm.models.layout import check_layout
from fp8slurm.models.spec import ModelSpec, QuantizationSpec

DENSE = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 384, "hidden_size": 256,
    "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 128, "intermediate_size": 512,
    "rms_norm_eps": 1e-6, "rope_theta": 1000000, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip
MOE = DENSE | {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 8,
    "num_experts_per_tok": 2, "moe_intermediate_size": 256,
    "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def test_reads_both_spellings_of_rope(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(DENSE))
    old = ModelSpec.from_hf_dir(tmp_path)
    new = {k: v for k, v in DENSE.items() if k != "rope_theta"}
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": 1000000}
    assert ModelSpec.from_hf_config(new) == old
    assert old.rope_theta == 1e6 and not old.is_moe and old.quantization is None


def test_reads_experts() -> None:
    spec = ModelSpec.from_hf_config(MOE)
    assert (spec.num_experts, spec.experts_per_token, spec.moe_ffn_hidden_size) == (8, 2, 256)
    assert spec.transformer_config_arguments()["moe_router_pre_softmax"] is False


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--model.hf-checkpoint"):
        ModelSpec.from_hf_dir(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architectures": ["MistralForCausalLM"]},
            r"architectures\[0\] = 'MistralForCausalLM' is not supported; allowed: 'Qwen3ForCausalLM', "
            "'Qwen3MoeForCausalLM', 'Qwen2ForCausalLM', 'LlamaForCausalLM'",
        ),
        ({"architectures": ["LlamaForCausalLM"]}, "model_type .of LlamaForCausalLM. = 'qwen3'.* allowed: 'llama'"),
        ({"architectures": None}, "architectures"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, "linear"),
        ({"rope_scaling": "yarn"}, "config.json: rope_scaling = 'yarn' is not supported; allowed: an object, or null"),
        ({"rope_parameters": ["yarn"]}, "rope_parameters"),
        ({"quantization_config": "fp8"}, "quantization_config = 'fp8' is not supported"),
        ({"num_attention_heads": None}, "config.json: num_attention_heads = None; a number of at least 1 is needed"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0"),
        ({"num_key_value_heads": "2"}, "num_key_value_heads = '2'"),
        ({"head_dim": True}, "head_dim = True"),
        ({"attention_bias": True}, "attention_bias"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"hidden_act": "gelu"}, "hidden_act"),
    ],
)
def test_other_models_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelSpec.from_hf_config(DENSE | change)


NEEDED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
NEEDED_BY_EXPERTS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")


@pytest.mark.parametrize(
    ("key", "config"), [*((k, DENSE) for k in NEEDED), *((k, MOE) for k in (*NEEDED, *NEEDED_BY_EXPERTS))]
)
def test_a_missing_size_is_named_with_the_file(tmp_path: Path, key: str, config: dict) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({k: v for k, v in config.items() if k != key}))
    with pytest.raises(ValueError, match=f"{file}: {key} is missing"):
        ModelSpec.from_hf_dir(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "config.json: not JSON"), ("[]", "config.json: not a JSON object")]
)
def test_a_config_that_is_none(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        ModelSpec.from_hf_dir(tmp_path)


@pytest.mark.parametrize("change", [{"mlp_only_layers": [0]}, {"decoder_sparse_step": 2}])
def test_half_dense_experts_are_refused(change: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        ModelSpec.from_hf_config(MOE | change)


def test_quantization_round_trip() -> None:
    spec = ModelSpec.from_hf_config(DENSE | {"quantization_config": FP8 | {"modules_to_not_convert": ["lm_head"]}})
    assert spec.quantization == QuantizationSpec((128, 128), ("lm_head",))
    assert QuantizationSpec.from_config(spec.quantization.to_config()) == spec.quantization


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_block_size": [64, 64]}, r"weight_block_size = \[64, 64\].*\[128, 128\]"),
        ({"weight_block_size": None}, "weight_block_size"),
        ({"scale_fmt": "ue8m0"}, "ue8m0"),
        ({"fmt": "e5m2"}, "e5m2"),
        ({"quant_method": "awq"}, "awq"),
        ({"activation_scheme": "static"}, "static"),
    ],
)
def test_quantization_that_cannot_be_made_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelSpec.from_hf_config(DENSE | {"quantization_config": FP8 | change})


def layout(tp: int = 1, pp: int = 1, ep: int = 1, etp: int = 1, sp: bool = False) -> ParallelSection:
    return ParallelSection(
        tensor_parallel_size=tp,
        pipeline_parallel_size=pp,
        expert_parallel_size=ep,
        expert_tensor_parallel_size=etp,
        sequence_parallel=sp,
    )


def test_layouts_that_fit() -> None:
    spec = ModelSpec.from_hf_config(DENSE)
    for parallel in (layout(), layout(tp=2), layout(tp=2, pp=2, sp=True), layout(pp=4)):
        check_layout(spec, parallel, fp8=True, world_size=4)
    check_layout(ModelSpec.from_hf_config(MOE), layout(tp=2, ep=4, sp=True), fp8=True, world_size=4)


@pytest.mark.parametrize(
    ("config", "parallel", "fp8", "message"),
    [
        ({"num_attention_heads": 6}, layout(tp=4), False, r"tensor-parallel-size 4 .*heads \(2\); allowed: 1, 2"),
        ({}, layout(tp=4), False, r"key-value heads \(2\); allowed: 1, 2"),
        ({"vocab_size": 383}, layout(tp=2), False, r"vocabulary \(383\)"),
        ({"intermediate_size": 511}, layout(tp=2), False, r"FFN width \(511\)"),
        ({}, layout(pp=3), False, r"pipeline-parallel-size 3 .*layers \(4\); allowed: 1, 2, 4"),
        ({"num_key_value_heads": 4, "intermediate_size": 384}, layout(tp=2), True,
         r"tensor-parallel-size 2 cuts.*FFN width \(384\).*allowed with FP8: 1, 3; or --fp8.backend off"),
        ({"intermediate_size": 100}, layout(), True, "no size is allowed with FP8"),
        ({"head_dim": 64}, layout(), True, "head_dim 64"),
        ({}, layout(sp=True), False, "sequence-parallel"),
        ({}, layout(ep=2), False, "no experts"),
        (MOE, layout(ep=3), False, r"expert-parallel-size 3 .*experts \(8\)"),
        (MOE, layout(etp=4), True, r"expert-tensor-parallel-size 4 cuts"),
        (MOE, layout(tp=2), False, "needs --parallel.sequence-parallel"),
    ],
)  # fmt: skip
def test_layouts_that_do_not(config: dict, parallel: ParallelSection, fp8: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_layout(ModelSpec.from_hf_config(DENSE | config), parallel, fp8)


def test_world_size() -> None:
    with pytest.raises(ValueError, match="3 ranks .*multiple of 2"):
        check_layout(ModelSpec.from_hf_config(DENSE), layout(tp=2), False, world_size=3)
