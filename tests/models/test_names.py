"""The name table against plain, independent index arithmetic."""

import pytest
import torch
import transformers

from fp8slurm.fp8.policy import decide
from fp8slurm.models.families import FAMILIES
from fp8slurm.models.families.qwen3_moe import QWEN3_MOE
from fp8slurm.models.names import NameTable
from fp8slurm.models.spec import ModelSpec


def spec_of(**overrides) -> ModelSpec:
    base = dict(
        architecture="Qwen3ForCausalLM", vocab_size=64, hidden_size=12, num_layers=2, num_heads=4, num_kv_heads=2,
        head_dim=4, ffn_hidden_size=8, rms_norm_eps=1e-6, rope_theta=1e6, max_position_embeddings=64,
        tie_word_embeddings=True,
    )  # fmt: skip
    return ModelSpec(**(base | overrides))


EXPERTS = dict(num_experts=3, experts_per_token=2, moe_ffn_hidden_size=6)
MOE = dict(architecture="Qwen3MoeForCausalLM", tie_word_embeddings=False, **EXPERTS)
QWEN2 = dict(architecture="Qwen2ForCausalLM")


def weights(table: NameTable) -> dict[str, torch.Tensor]:
    """Every element of the model is another number, so that any misplaced row shows."""
    out, start = {}, 0
    for name, tensor in table.hf_tensors().items():
        n = torch.Size(tensor.shape).numel()
        out[name] = torch.arange(start, start + n).view(tensor.shape)
        start += n
    return out


@pytest.mark.parametrize("architecture", [a for a, family in FAMILIES.items() if family is not QWEN3_MOE])
@pytest.mark.parametrize("tied", [True, False])
def test_names_are_those_of_transformers(architecture: str, tied: bool) -> None:
    spec = spec_of(architecture=architecture, tie_word_embeddings=tied)
    config = transformers.AutoConfig.for_model(
        spec.family.model_type, vocab_size=64, hidden_size=12, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, intermediate_size=8, tie_word_embeddings=tied,
    )  # fmt: skip
    with torch.device("meta"):
        model = getattr(transformers, architecture)(config)
    expected = {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert {n: t.shape for n, t in NameTable(spec).hf_tensors().items()} == expected


@pytest.mark.parametrize("architecture", FAMILIES)
def test_fp8_takes_the_matrices_of_the_layers_and_nothing_else(architecture: str) -> None:
    """What Megatron's linears multiply with in FP8: a family whose matrices the policy does not know would be trained
    in FP8 and served in BF16."""
    spec = spec_of(architecture=architecture, **(EXPERTS if architecture == QWEN3_MOE.architecture else {}))
    for entry in NameTable(spec):
        linear = ".linear_" in entry.name and entry.name.endswith(".weight")
        assert {decide(t.name, t.shape).quantize for t in entry.tensors} == {linear}, entry.name


def test_a_bias_goes_with_the_rows_of_its_matrix() -> None:
    """Row numbers in place of weights: q, k and v's biases are cut and interleaved as their rows are."""
    table = NameTable(spec_of(architecture="Qwen2ForCausalLM"))
    matrix, bias = (table[f"decoder.layers.1.self_attention.linear_qkv.{what}"] for what in ("weight", "bias"))
    numbers = {t.name: torch.arange(t.shape[0]) + 100 * i for i, t in enumerate(bias.tensors)}
    rows = {n.replace("bias", "weight"): r[:, None].expand(-1, 12) for n, r in numbers.items()}
    for rank in range(2):
        assert torch.equal(matrix.shard(rows, rank, 2)[:, 0], bias.shard(numbers, rank, 2))


def test_qkv_is_interleaved_by_query_group() -> None:
    table = NameTable(spec_of())
    hf = weights(table)
    a = "model.layers.1.self_attn."
    q, k, v = (hf[f"{a}{x}_proj.weight"] for x in "qkv")
    merged = table["decoder.layers.1.self_attention.linear_qkv.weight"].merge(hf)
    # Two groups of two query heads, head_dim 4: rows q0 q1 k0 v0 | q2 q3 k1 v1.
    expected = torch.cat([q[:8], k[:4], v[:4], q[8:], k[4:], v[4:]])
    assert torch.equal(merged, expected)


@pytest.mark.parametrize("extra", [{}, MOE, QWEN2], ids=["dense", "moe", "bias"])
@pytest.mark.parametrize("world", [1, 2])
def test_shards_split_into_slices_that_lie_end_to_end(extra: dict, world: int) -> None:
    table = NameTable(spec_of(**extra))
    hf = weights(table)
    seen = set()
    for entry in table:
        shards = [entry.shard(hf, r, world) for r in range(world)]
        full = entry.merge(hf)
        assert tuple(full.shape) == entry.shape
        for r, shard in enumerate(shards):
            assert tuple(shard.shape) == entry.shard_shape(world)
            assert torch.equal(shard, entry.shard_of(full, r, world))
        for i, tensor in enumerate(entry.tensors):
            parts = [entry.split(s, r, world)[i] for r, s in enumerate(shards)]
            assert [p.name for p in parts] == [tensor.name] * world
            for p in parts:
                whole = hf[tensor.name]
                spec = p.spec
                cut = whole if spec.dim is None else whole.narrow(spec.dim, spec.start, spec.length)
                assert tuple(p.data.shape) == spec.shape
                assert torch.equal(p.data, cut), tensor.name
            if entry.tp_dim is not None:
                assert torch.equal(torch.cat([p.data for p in parts], entry.tp_dim), hf[tensor.name])
            seen.add(tensor.name)
    assert seen == set(hf)


def test_gate_up_shard_is_gate_slice_then_up_slice() -> None:
    table = NameTable(spec_of())
    hf = weights(table)
    gate, up = hf["model.layers.0.mlp.gate_proj.weight"], hf["model.layers.0.mlp.up_proj.weight"]
    shard = table["decoder.layers.0.mlp.linear_fc1.weight"].shard(hf, 1, 2)
    assert torch.equal(shard, torch.cat([gate[4:], up[4:]]))


@pytest.mark.parametrize(
    ("module_name", "layers", "experts", "extra", "expected"),
    [
        ("module.module.decoder.layers.0.input_layernorm.weight", 1, 0, {},
         "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight"),
        ("decoder.layers.1.pre_mlp_layernorm.weight", 0, 0, {}, "decoder.layers.1.mlp.linear_fc1.layer_norm_weight"),
        ("decoder.layers.1.pre_mlp_layernorm.weight", 0, 0, MOE, "decoder.layers.1.pre_mlp_layernorm.weight"),
        ("decoder.layers.0.mlp.experts.linear_fc1.weight1", 1, 1, MOE,
         "decoder.layers.1.mlp.experts.local_experts.2.linear_fc1.weight"),
        ("decoder.layers.0.mlp.experts.local_experts.0.linear_fc2.weight", 0, 1, MOE,
         "decoder.layers.0.mlp.experts.local_experts.1.linear_fc2.weight"),
        ("output_layer.weight", 0, 0, {}, "embedding.word_embeddings.weight"),
        ("output_layer.weight", 0, 0, MOE, "output_layer.weight"),
    ],
)  # fmt: skip
def test_canonical(module_name: str, layers: int, experts: int, extra: dict, expected: str) -> None:
    assert NameTable(spec_of(**extra)).canonical(module_name, layers, experts) == expected


def test_canonical_refuses_the_unknown() -> None:
    with pytest.raises(KeyError):
        NameTable(spec_of()).canonical("decoder.layers.7.self_attention.linear_qkv.weight")


def test_checkpoint_keys() -> None:
    table = NameTable(spec_of(**MOE))
    entry = table["decoder.layers.1.mlp.experts.local_experts.2.linear_fc1.weight"]
    assert entry.checkpoint_key == "decoder.layers.mlp.experts.experts.linear_fc1.weight"
    assert entry.checkpoint_index == (1, 2)
    entry = table["decoder.final_layernorm.weight"]
    assert (entry.checkpoint_key, entry.checkpoint_index) == ("decoder.final_layernorm.weight", ())


def test_block_borders() -> None:
    table = NameTable(spec_of(hidden_size=256, head_dim=128, ffn_hidden_size=512))
    down = table["decoder.layers.0.mlp.linear_fc2.weight"]
    (second,) = down.slices(1, 2)
    assert second.on_block_boundary()
    assert not down.slices(1, 8)[0].on_block_boundary()  # 512 / 8 = 64
    ragged = NameTable(spec_of(hidden_size=256, head_dim=128, ffn_hidden_size=200))
    # a ragged end of the tensor itself is the end of a block
    assert ragged["decoder.layers.0.mlp.linear_fc2.weight"].slices()[0].on_block_boundary()


def test_wrong_shapes_are_refused() -> None:
    table = NameTable(spec_of())
    hf = weights(table)
    hf["model.layers.0.self_attn.q_proj.weight"] = hf["model.layers.0.self_attn.q_proj.weight"][:8]
    with pytest.raises(ValueError, match=r"q_proj.weight: shape \(8, 12\)"):
        table["decoder.layers.0.self_attention.linear_qkv.weight"].merge(hf)
    with pytest.raises(ValueError, match="cannot be cut into 3"):
        table["decoder.layers.0.self_attention.linear_qkv.weight"].slices(0, 3)
