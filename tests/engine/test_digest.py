"""The engine's parameters, built from Hugging Face tensors without an engine."""

from __future__ import annotations

import pytest
import torch

from fp8slurm.engine.inside.digest import expected_digests, first_difference, overall, raw_digest


def tensor(rows: int, columns: int, start: int = 0) -> torch.Tensor:
    return torch.arange(start, start + rows * columns, dtype=torch.float32).view(rows, columns)


def attention() -> dict[str, torch.Tensor]:
    prefix = "model.layers.0.self_attn."
    return {
        f"{prefix}v_proj.weight": tensor(4, 3, 200),
        f"{prefix}q_proj.weight": tensor(8, 3),
        f"{prefix}k_proj.weight": tensor(4, 3, 100),
        f"{prefix}o_proj.weight": tensor(3, 8, 300),
    }


def test_bytes_dtype_and_shape_count() -> None:
    x = torch.zeros(4, dtype=torch.float32)
    assert raw_digest(x) == raw_digest(torch.zeros(4))
    others = [x.view(2, 2), x.view(torch.int32), torch.tensor([0.0, 0.0, -0.0, 0.0]), torch.zeros(5)]
    assert len({raw_digest(t) for t in [x, *others]}) == 5
    assert raw_digest(tensor(4, 6)[:, ::2]) == raw_digest(tensor(4, 6)[:, ::2].contiguous())


def test_fused_parameters_and_shards() -> None:
    parts, p = attention(), "model.layers.0.self_attn."
    q, k, v, o = (parts[f"{p}{x}_proj.weight"] for x in "qkvo")
    whole = expected_digests(parts.items(), num_key_value_heads=2)
    assert whole == [{f"{p}qkv_proj.weight": raw_digest(torch.cat([q, k, v])), f"{p}o_proj.weight": raw_digest(o)}]
    two = expected_digests(parts.items(), num_key_value_heads=2, tensor_parallel_size=2)
    assert two[1] == {
        f"{p}qkv_proj.weight": raw_digest(torch.cat([q[4:], k[2:], v[2:]])),
        f"{p}o_proj.weight": raw_digest(o[:, 4:]),
    }
    four = expected_digests(parts.items(), num_key_value_heads=2, tensor_parallel_size=4)  # two ranks share a head
    assert four[2][f"{p}qkv_proj.weight"] == raw_digest(torch.cat([q[4:6], k[2:], v[2:]]))


def test_experts_are_stacked() -> None:
    p = "model.layers.0.mlp.experts."
    parts = {f"{p}{e}.{x}_proj.weight": tensor(4, 2, 10 * i) for e in (1, 0) for i, x in enumerate(("gate", "up"))}
    parts |= {f"{p}{e}.down_proj.weight": tensor(2, 4, 50 + e) for e in (1, 0)}
    one = expected_digests(parts.items(), num_key_value_heads=1, tensor_parallel_size=2)[1]
    gate_up = torch.stack([torch.cat([tensor(4, 2)[2:], tensor(4, 2, 10)[2:]])] * 2)
    down = torch.stack([tensor(2, 4, 50)[:, 2:], tensor(2, 4, 51)[:, 2:]])
    assert one == {f"{p}w13_weight": raw_digest(gate_up), f"{p}w2_weight": raw_digest(down)}
    del parts[f"{p}0.up_proj.weight"]
    with pytest.raises(ValueError, match="w13_weight is made of 4 tensors, only 3"):
        expected_digests(parts.items(), num_key_value_heads=1)


def test_vocabulary_is_padded_and_a_tied_head_left_out() -> None:
    embedding = tensor(65, 2)
    parts = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding}
    padded = torch.cat([embedding, torch.zeros(63, 2)])
    tied = expected_digests(parts.items(), num_key_value_heads=1, tensor_parallel_size=2, tie_word_embeddings=True)
    assert tied[1] == {"model.embed_tokens.weight": raw_digest(padded[64:])}
    assert set(expected_digests(parts.items(), num_key_value_heads=1)[0]) == set(parts)


def test_first_difference_names_it() -> None:
    want = [{"a": "1" * 64, "b": "2" * 64}]
    assert first_difference([dict(want[0])], want) is None
    assert "b on the engine's rank 0 differs" in first_difference([{"a": "1" * 64, "b": "3" * 64}], want)
    assert "no parameter b" in first_difference([{"a": "1" * 64}], want)
    assert "parameter c" in first_difference([{**want[0], "c": ""}], want)
    assert "2 ranks, 1" in first_difference(want * 2, want)
    assert overall({"a": "1", "b": "2"}) == overall({"b": "2", "a": "1"}) != overall({"a": "2", "b": "1"})


def test_expert_parallel_ranks_hold_their_experts() -> None:
    p = "model.layers.0.mlp.experts."
    parts = {
        f"{p}{e}.{x}_proj.weight": tensor(4, 2, 10 * e + 5 * i) for e in range(4) for i, x in enumerate(("gate", "up"))
    }
    name = f"{p}w13_weight"
    facts = {"num_key_value_heads": 1, "tensor_parallel_size": 4}
    ranks = expected_digests(parts.items(), expert_parallel_size=2, **facts)
    halves = [torch.cat([parts[f"{p}{e}.gate_proj.weight"][2:], parts[f"{p}{e}.up_proj.weight"][2:]]) for e in (2, 3)]
    assert ranks[3] == {name: raw_digest(torch.stack(halves))}
    apart = expected_digests(parts.items(), expert_parallel_size=4, **facts)
    whole = torch.cat([parts[f"{p}1.gate_proj.weight"], parts[f"{p}1.up_proj.weight"]])
    assert apart[1] == {name: raw_digest(whole[None])}
