"""The experts of every token on their way from the engine's answer into the trainer's micro-batches."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import model_config

from fp8slurm.core.types import Prompt, Sample, SampleGroup
from fp8slurm.engine.client import Generation
from fp8slurm.models.spec import ModelSpec
from fp8slurm.rl.packing import pack
from fp8slurm.rollout.serialization import decode_groups, encode_groups
from fp8slurm.sessions.session import routing_of

LAYERS, K = 3, 2


def sample(prompt: int, response: int, seed: int, dtype=torch.uint8) -> Sample:
    """Experts of token t of sample `seed` are all `100 * seed + t` (modulo 251), so that each can be told."""
    rows = (100 * seed + torch.arange(prompt + response - 1)) % 251
    routing = rows[:, None, None].expand(-1, LAYERS, K).to(dtype).contiguous()
    return Sample(list(range(1, response + 1)), [-0.5] * response, [0] * response, "stop", routing=routing)


def groups(shapes: list[tuple[int, list[int]]], dtype=torch.uint8) -> list[SampleGroup]:
    out, seed = [], 0
    for index, (prompt, responses) in enumerate(shapes):
        group = SampleGroup(Prompt(index, tuple(range(10, 10 + prompt)), ""))
        for n in responses:
            group.samples.append(sample(prompt, n, seed, dtype))
            seed += 1
        out.append(group)
    return out


shapes = st.lists(st.tuples(st.integers(1, 5), st.lists(st.integers(1, 9), min_size=1, max_size=3)), max_size=4)


@settings(max_examples=60, deadline=None)
@given(shapes, st.sampled_from([torch.uint8, torch.int16]))
def test_round_trip_on_the_wire(shapes, dtype):
    sent = groups(shapes, dtype)
    for group in sent[::2]:
        group.samples[0].routing = None
    got = decode_groups(encode_groups(sent))
    assert got == sent
    for a, b in zip((s for g in sent for s in g.samples), (s for g in got for s in g.samples), strict=True):
        if a.routing is None:
            assert b.routing is None
        else:
            assert a.routing.dtype == b.routing.dtype and torch.equal(a.routing, b.routing)


def test_a_forged_shape_is_refused():
    data = bytes(encode_groups(groups([(2, [3])])).tolist())
    for old, new in (("[4,3,2]", "[4,3,3]"), ("[4,3,2]", "[-4,32]"), ('"U8"', '"I8"')):
        assert len(old) == len(new) and data.count(old.encode()) == 1
        with pytest.raises(ValueError, match="sample groups"):
            decode_groups(torch.frombuffer(bytearray(data.replace(old.encode(), new.encode())), dtype=torch.uint8))


@settings(max_examples=60, deadline=None)
@given(shapes.filter(bool), st.integers(1, 2), st.sampled_from([1, 4]))
def test_every_token_keeps_its_experts_when_packed(shapes, ranks, multiple):
    sent = groups(shapes)
    updates = pack(
        sent, [[0.0] * len(g.samples) for g in sent], updates=2, data_parallel_size=ranks, tokens_per_micro_batch=20,
        pad_multiple=multiple,
    )  # fmt: skip
    samples = [s for g in sent for s in g.samples]
    seen = []
    for batch in (b for update in updates for rank in update for b in rank):
        assert batch.routing.shape == (len(batch.tokens), LAYERS, K) and batch.routing.dtype == torch.uint8
        boundaries = batch.cu_seqlens.tolist()
        for number, start, end in zip(batch.samples, boundaries, boundaries[1:]):
            assert torch.equal(batch.routing[start : end - 1], samples[number].routing)
            seen.append(number)
        for end in boundaries[1 : len(batch.samples) + 1]:  # a last token's experts are any, but k different ones
            assert (batch.routing[end - 1].diff(dim=-1) != 0).all()
    assert sorted(seen) == list(range(len(samples)))


def test_padding_is_shared_out_among_all_experts():
    """All of it at one expert would be that expert's load, and the load-balancing loss would answer to it."""
    sent = groups([(2, [3])])
    sent[0].samples[0].routing[0, 0, 0] = 7
    ((((batch,),),)) = pack(sent, [[0.0]], updates=1, data_parallel_size=1, tokens_per_micro_batch=64, pad_multiple=12)
    padding = batch.routing[5:, 0].flatten().tolist()
    assert len(padding) == 14 and set(padding) == set(range(8)) and max(padding.count(e) for e in range(8)) == 2


def test_a_sample_without_routing_among_others_is_refused():
    sent = groups([(2, [3, 4])])
    sent[0].samples[1].routing = None
    with pytest.raises(ValueError, match="a sample of 6 tokens has routing none"):
        pack(sent, [[0.0, 0.0]], updates=1, data_parallel_size=1, tokens_per_micro_batch=64)
    sent = groups([(2, [3])])
    sent[0].samples[0].routing = sent[0].samples[0].routing[1:]
    with pytest.raises(ValueError, match=r"routing \[3, 3, 2\], not \[4, 3, 2\]"):
        pack(sent, [[0.0]], updates=1, data_parallel_size=1, tokens_per_micro_batch=64)


def test_the_engines_answer():
    spec = ModelSpec.from_hf_config(model_config(moe=True))
    flat = np.arange(6 * 2 * 2, dtype=np.int32) % 8
    made = Generation([5, 6, 7], [-1.0] * 3, "stop", [0] * 3, flat)
    routing = routing_of(made, 4, spec)
    assert routing.dtype == torch.uint8 and routing.shape == (6, 2, 2)
    assert routing.flatten().tolist() == flat.tolist()
    with pytest.raises(RuntimeError, match="24 experts for 7 tokens of 2 layers with 2 experts each; 28 were expected"):
        routing_of(made, 5, spec)
    with pytest.raises(RuntimeError, match="returned no experts"):
        routing_of(Generation([5], [-1.0], "stop", [0]), 4, spec)
    many = ModelSpec.from_hf_config(json.loads(json.dumps(model_config(moe=True) | {"num_experts": 512})))
    assert routing_of(made, 4, many).dtype == torch.int16
