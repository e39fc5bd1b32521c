"""config.json is read as transformers reads it, or refused: the trainer must train the model that the engine serves.

transformers' own config classes say what is right; the engine reads the folder through them.
"""

import copy
import json
import random
from typing import Any

import pytest
from transformers import LlamaConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from fp8slurm.config import RunConfig
from fp8slurm.core.errors import InputError
from fp8slurm.models.config_json import Yarn
from fp8slurm.models.known import FOLDER as KNOWN
from fp8slurm.models.known import known_models
from fp8slurm.models.layout import check_layout
from fp8slurm.models.spec import ModelSpec

CLASSES = {"qwen3": Qwen3Config, "qwen3_moe": Qwen3MoeConfig, "qwen2": Qwen2Config, "llama": LlamaConfig}
COMMON = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
DENSE = COMMON | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
MOE = COMMON | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "num_experts_per_tok": 8,
}
QWEN2 = {key: value for key, value in COMMON.items() if key not in ("head_dim", "rope_scaling", "attention_bias")} | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "max_position_embeddings": 32768,
    "sliding_window": 32768,
    "use_mrope": False,
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 128256,
}
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


def dense(*sizes: int, **more: Any) -> dict[str, Any]:
    return DENSE | dict(zip(SIZES, sizes, strict=True)) | {"max_window_layers": sizes[2]} | more


def moe(experts: int, width: int, *sizes: int, **more: Any) -> dict[str, Any]:
    return MOE | dict(zip(SIZES, sizes, strict=True)) | {"num_experts": experts, "moe_intermediate_size": width} | more


def qwen2(*sizes: int, **more: Any) -> dict[str, Any]:
    return QWEN2 | dict(zip(SIZES, sizes, strict=True)) | {"max_window_layers": sizes[2]} | more


def llama(factor: float, *sizes: int, **more: Any) -> dict[str, Any]:
    scaling = {"factor": factor, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3"}
    scaling |= {"original_max_position_embeddings": 8192}
    return LLAMA | dict(zip(SIZES, sizes, strict=True)) | {"rope_scaling": scaling} | more


LONG = {"max_position_embeddings": 262144, "rope_theta": 5000000}
PUBLISHED = {
    "Qwen3-0.6B": dense(1024, 3072, 28, 16, 8, tie_word_embeddings=True),
    "Qwen3-1.7B": dense(2048, 6144, 28, 16, 8, tie_word_embeddings=True),
    "Qwen3-4B": dense(2560, 9728, 36, 32, 8, tie_word_embeddings=True),
    "Qwen3-4B-Instruct-2507": dense(2560, 9728, 36, 32, 8, tie_word_embeddings=True, **LONG),
    "Qwen3-4B-Thinking-2507": dense(2560, 9728, 36, 32, 8, tie_word_embeddings=True, **LONG),
    "Qwen3-8B": dense(4096, 12288, 36, 32, 8),
    "Qwen3-14B": dense(5120, 17408, 40, 40, 8),
    "Qwen3-32B": dense(5120, 25600, 64, 64, 8),
    "Qwen3-30B-A3B": moe(128, 768, 2048, 6144, 48, 32, 4),
    "Qwen3-30B-A3B-Thinking-2507": moe(128, 768, 2048, 6144, 48, 32, 4, **LONG | {"rope_theta": 10000000}),
    "Qwen3-Coder-30B-A3B": moe(128, 768, 2048, 6144, 48, 32, 4, **LONG | {"rope_theta": 10000000}, head_dim=128),
    "Qwen3-235B-A22B": moe(128, 1536, 4096, 12288, 94, 64, 4),
    "Qwen2.5-0.5B": qwen2(896, 4864, 24, 14, 2, tie_word_embeddings=True),
    "Qwen2.5-0.5B-Instruct": qwen2(896, 4864, 24, 14, 2, tie_word_embeddings=True, max_window_layers=21),
    "Qwen2.5-1.5B": qwen2(1536, 8960, 28, 12, 2, tie_word_embeddings=True, max_position_embeddings=131072),
    "Qwen2.5-3B": qwen2(2048, 11008, 36, 16, 2, tie_word_embeddings=True),
    "Qwen2.5-7B": qwen2(3584, 18944, 28, 28, 4, vocab_size=152064, max_position_embeddings=131072),
    "Qwen2.5-7B-Instruct": qwen2(3584, 18944, 28, 28, 4, vocab_size=152064),
    "Qwen2.5-Math-7B": qwen2(3584, 18944, 28, 28, 4, vocab_size=152064, rope_theta=10000, max_position_embeddings=4096),
    "Qwen2.5-14B": qwen2(5120, 13824, 48, 40, 8, vocab_size=152064, rms_norm_eps=1e-05),
    "Qwen2.5-32B": qwen2(5120, 27648, 64, 40, 8, vocab_size=152064, rms_norm_eps=1e-05),
    "Qwen2.5-72B": qwen2(8192, 29568, 80, 64, 8, vocab_size=152064, rms_norm_eps=1e-05),
    "Llama-3.2-1B": llama(32.0, 2048, 8192, 16, 32, 8, head_dim=64, tie_word_embeddings=True),
    "Llama-3.2-3B": llama(32.0, 3072, 8192, 28, 24, 8, head_dim=128, tie_word_embeddings=True),
    "Llama-3.1-8B": llama(8.0, 4096, 14336, 32, 32, 8),
    "Llama-3.1-70B": llama(8.0, 8192, 28672, 80, 64, 8),
    "Llama-3.1-405B": llama(8.0, 16384, 53248, 126, 128, 8),
    "Llama-3.3-70B": llama(8.0, 8192, 28672, 80, 64, 8, head_dim=128),
    "Llama-3-8B": llama(8.0, 4096, 14336, 32, 32, 8, rope_scaling=None, max_position_embeddings=8192),
}
"""The fields of the published config.json files."""

SCALED = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
ROPE = [
    None,
    {},
    {"rope_type": "default"},
    {"type": "default"},
    {"rope_theta": 7777.0},
    {"rope_type": "default", "rope_theta": 500},
    {"rope_type": "linear", "factor": 2.0},
    {"type": "linear", "factor": 2.0, "rope_theta": 3e4},
    {"rope_theta": None},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    {"rope_type": "dynamic", "factor": 2.0},
    {"full_attention": {"rope_type": "default", "rope_theta": 1e6}},
    {"rope_theta": "1e6"},
    {"rope_type": "default", "factor": 2.0},
    {"type": "linear", "rope_type": "default", "factor": 2.0},
    {"rope_type": "default", "partial_rotary_factor": 0.5},
    [],
    "yarn",
    {"rope_type": "llama3", **SCALED},
    {"type": "llama3", **SCALED},
    {"type": "llama3", "rope_type": "llama3", "rope_theta": 5e5, **SCALED},
    {"type": "linear", "rope_type": "llama3", **SCALED},
    {"rope_type": "llama3", **SCALED, "factor": 32},
    {"rope_type": "llama3", **SCALED, "factor": "8"},
    {"rope_type": "llama3", **SCALED, "low_freq_factor": 2.0},
    {"rope_type": "llama3", **SCALED, "low_freq_factor": 1, "high_freq_factor": 4},
    {"rope_type": "llama3", **SCALED, "original_max_position_embeddings": 4096},
    {"rope_type": "llama3", "factor": 8.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    {"type": "yarn", "factor": 2, "original_max_position_embeddings": 40960, "rope_theta": 5e5},
    {"rope_type": "yarn", "factor": 4.0},
    {"rope_type": "yarn", "factor": 0.5, "original_max_position_embeddings": 32768},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "beta_fast": 64},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "attention_factor": 1.0},
    {"rope_type": "llama3", **SCALED, "attention_factor": 1.0},
    SCALED,
]
MISSING = object()
CHANGES: dict[str, list[Any]] = {
    "rope_scaling": [MISSING, *ROPE],
    "rope_parameters": [MISSING, *ROPE],
    "rope_theta": [MISSING, None, 10000.0, 1000000, 5e6, "1e6", True, float("nan"), 0, -1.0],
    "partial_rotary_factor": [None, 0.5, 1.0],
    "head_dim": [MISSING, None, 64, 128, 128.0, "128", True, 0],
    "num_key_value_heads": [MISSING, None, 1, 4, 8, 8.0, "8"],
    "num_attention_heads": [16, "16", 16.0],
    "hidden_size": [MISSING, 2048, 2048.0, "2048", True],
    "num_hidden_layers": [4, "4", None],
    "vocab_size": [151936, "151936", 151936.0],
    "rms_norm_eps": [MISSING, 1e-5, 1, "1e-6", None, float("inf")],
    "tie_word_embeddings": [MISSING, True, False, "false", 0, 1, None],
    "max_position_embeddings": [MISSING, 4096, 4096.0, "4096", None],
    "attention_bias": [MISSING, False, True, 0, "false", None],
    "use_sliding_window": [MISSING, False, True, 0, None],
    "layer_types": [
        None,
        ["full_attention"] * 36,
        ["full_attention"] * 48,
        ["sliding_attention"] * 36,
        "full_attention",
    ],
    "mlp_bias": [MISSING, False, True, 0, None],
    "bias": [None, False, True],
    "rope_is_neox_style": [True, False],
    "original_max_position_embeddings": [4096, 8192],
    "original_num_attention_heads": [None, 32],
    "torch_dtype": [MISSING, "bfloat16", "float32", "bfloa16", "true", 1, None, []],
    "hidden_act": [MISSING, "silu", "gelu", None],
    "quantization_config": [
        None,
        {},
        [],
        "fp8",
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        {"quant_method": "fp8", "weight_block_size": 128},
        {"quant_method": "fp8", "weight_block_size": "128"},
        {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": "lm_head"},
        {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": [1]},
    ],
    "norm_topk_prob": [MISSING, True, False, "true", 0],
    "num_experts": [MISSING, 64, "64", 64.0],
    "num_local_experts": [32, 128],
    "num_experts_per_tok": [4, "4"],
    "mlp_only_layers": [MISSING, None, [], [0], "[]"],
    "decoder_sparse_step": [MISSING, 1, 2, True, 1.0],
    "model_type": [MISSING, "qwen3", "qwen3_moe", "qwen2", "llama"],
}


def as_transformers_reads(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of a ModelSpec out of transformers' own class, as its models and SGLang's use them."""
    c = CLASSES[config["model_type"]].from_dict(copy.deepcopy(config))
    rope, llama = dict(c.rope_parameters), config["model_type"] == "llama"
    scaling = yarn = None
    if llama and rope["rope_type"] == "llama3":
        scaling = rope.pop("factor")
        assert [rope.pop(key) for key in list(SCALED)[1:]] == list(SCALED.values())[1:], "Megatron knows no others"
    elif rope["rope_type"] == "yarn" and not llama:
        yarn = Yarn(rope.pop("factor"), rope.pop("original_max_position_embeddings"))
    else:
        assert rope["rope_type"] == "default", "no other kind is supported, so none may be taken"
    assert set(rope) <= {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    assert rope.get("partial_rotary_factor", 1.0) == 1.0 and c.hidden_act == "silu"
    if config["model_type"] != "qwen2":
        assert not c.attention_bias
    if llama:
        assert not c.mlp_bias
        # read by SGLang, not by transformers
        assert not getattr(c, "bias", False) and getattr(c, "rope_is_neox_style", None) in (None, True)
        assert getattr(c, "original_max_position_embeddings", None) is None
    assert getattr(c, "original_num_attention_heads", None) is None or config["model_type"] != "qwen2"
    assert llama or c.sliding_window is None
    assert set(getattr(c, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    fields = {
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "num_layers": c.num_hidden_layers,
        "num_heads": c.num_attention_heads,
        "num_kv_heads": c.num_key_value_heads,
        "ffn_hidden_size": c.intermediate_size,
        "head_dim": getattr(c, "head_dim", c.hidden_size // c.num_attention_heads),
        "rms_norm_eps": c.rms_norm_eps,
        "rope_theta": c.rope_parameters["rope_theta"],
        "rope_scaling": scaling,
        "yarn": yarn,
        "max_position_embeddings": c.max_position_embeddings,
        "tie_word_embeddings": c.tie_word_embeddings,
    }
    if config["model_type"] == "qwen3_moe":
        assert c.decoder_sparse_step == 1 and c.mlp_only_layers == []
        fields |= {
            "num_experts": c.num_experts,
            "experts_per_token": c.num_experts_per_tok,
            "moe_ffn_hidden_size": c.moe_intermediate_size,
            "norm_topk_prob": c.norm_topk_prob,
        }
    return fields


def check(config: dict[str, Any]) -> bool:
    """Whether a config is taken; then every field must be what transformers says."""
    try:
        spec = ModelSpec.from_hf_config(copy.deepcopy(config))
    except ValueError:
        return False
    expected = as_transformers_reads(config)
    assert {key: getattr(spec, key) for key in expected} == expected, json.dumps(config)
    return True


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_read(name: str) -> None:
    assert check(PUBLISHED[name])


@pytest.mark.parametrize("name", known_models())
def test_known_shapes_are_those_of_the_published_files(name: str) -> None:
    known = json.loads((KNOWN / f"{name}.json").read_text())
    assert ModelSpec.from_hf_config(known) == ModelSpec.from_hf_config(PUBLISHED[name])


@pytest.mark.parametrize("key", CHANGES)
@pytest.mark.parametrize("name", ["Qwen3-4B", "Qwen3-30B-A3B", "Qwen2.5-7B", "Llama-3.1-8B"])
def test_one_field_written_otherwise(name: str, key: str) -> None:
    for value in CHANGES[key]:
        check(changed(PUBLISHED[name], {key: value}))


def test_random_variations() -> None:
    rng, taken = random.Random(0), 0
    for _ in range(3000):
        keys = rng.sample(sorted(CHANGES), rng.choice([1, 2, 2, 3]))
        taken += check(
            changed(PUBLISHED[rng.choice(sorted(PUBLISHED))], {key: rng.choice(CHANGES[key]) for key in keys})
        )
    assert 600 < taken < 2400, "both outcomes are tried"


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {
                "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
                "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            },
            "rope_scaling: rope_type = 'linear'",
        ),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "original_max_position_embeddings = None"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 0.5, "original_max_position_embeddings": 32768}},
            "factor = 0.5; allowed: 1 or more",
        ),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "rope_theta": MISSING}, "'dynamic'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "rope_parameters has 'full_attention'"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings = 'false' is not supported; allowed: true or false"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps = '1e-6'"),
        ({"attention_bias": 0}, "attention_bias = 0 is not supported; allowed: False"),
        ({"num_experts": 128, "num_local_experts": 64}, "num_local_experts = 64 is not supported; allowed: 128"),
        ({"model_type": "qwen3"}, "model_type .* = 'qwen3' is not supported; allowed: 'qwen3_moe'"),
    ],
)
def test_what_is_refused_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelSpec.from_hf_config(changed(PUBLISHED["Qwen3-30B-A3B"], change))


@pytest.mark.parametrize(
    "key", [k for k in SIZES] + ["vocab_size", "rope_theta", "num_experts", "moe_intermediate_size"]
)
@pytest.mark.parametrize("digits", [10, 400])
def test_sizes_of_hundreds_of_digits_are_refused_at_once(key: str, digits: int) -> None:
    if key == "rope_theta" and digits == 10:
        return
    with pytest.raises(InputError, match=key) as caught:
        ModelSpec.from_hf_config(changed(PUBLISHED["Qwen3-30B-A3B"], {key: 10**digits}))
    assert len(str(caught.value)) <= 1000


def test_more_matrices_than_any_model_has_are_refused() -> None:
    with pytest.raises(InputError, match="1000 layers of 1000 experts"):
        ModelSpec.from_hf_config(changed(PUBLISHED["Qwen3-30B-A3B"], {"num_hidden_layers": 1000, "num_experts": 1000}))


def test_the_sizes_that_a_layout_may_have_are_found_in_any_model() -> None:
    spec = ModelSpec.from_hf_config(changed(PUBLISHED["Qwen3-4B"], {"num_key_value_heads": 2**31 - 1}))
    parallel = RunConfig.model_validate({"parallel": {"tensor_parallel_size": 2}}).parallel
    with pytest.raises(
        InputError, match=r"does not divide the model's key-value heads \(2147483647\); allowed: 1, ..."
    ):
        check_layout(spec, parallel, fp8=False)


def test_where_both_rope_keys_are_there_the_one_that_transformers_takes_wins() -> None:
    both = {"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": {"rope_type": "default", "rope_theta": 5e5}}
    assert ModelSpec.from_hf_config(changed(PUBLISHED["Qwen3-4B"], both)).rope_theta == 5e5
    without = both | {"rope_scaling": {"rope_type": "default"}, "rope_theta": MISSING}
    assert ModelSpec.from_hf_config(changed(PUBLISHED["Qwen3-4B"], without)).rope_theta == 10000.0
    assert ModelSpec.from_hf_config(changed(PUBLISHED["Qwen3-4B"], {"head_dim": MISSING})).head_dim == 128


def changed(config: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """A copy with other values; MISSING takes a key away."""
    return {key: copy.deepcopy(value) for key, value in {**config, **change}.items() if value is not MISSING}
