import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from fp8slurm.core.types import Prompt, Sample, SampleGroup
from fp8slurm.rollout.serialization import decode_groups, encode_groups

int32 = st.integers(-(2**31), 2**31 - 1)
float32 = st.floats(width=32, allow_nan=False)
samples = st.lists(st.tuples(int32, float32, int32), max_size=6).flatmap(
    lambda tokens: st.builds(
        Sample,
        response_ids=st.just([t for t, _, _ in tokens]),
        logprobs=st.just([p for _, p, _ in tokens]),
        weight_versions=st.just([v for _, _, v in tokens]),
        finish_reason=st.sampled_from(["stop", "length", "abort"]),
        text=st.text(max_size=9),
        reward=st.floats(allow_nan=False),
        train=st.booleans(),
        parts=st.dictionaries(st.text(min_size=1, max_size=3), st.floats(allow_nan=False), max_size=2),
        loss_mask=st.none() | st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens)),
    )
)
prompts = st.builds(
    Prompt, index=st.integers(0, 2**60), token_ids=st.lists(int32, max_size=6).map(tuple), label=st.text(max_size=9),
    source=st.text(max_size=3),
)  # fmt: skip
some_groups = st.lists(st.builds(SampleGroup, prompts, st.lists(samples, max_size=3)), max_size=3)


@settings(max_examples=100, deadline=None)
@given(some_groups)
def test_round_trip(groups):
    data = encode_groups(groups)
    assert data.dtype == torch.uint8 and data.dim() == 1
    assert decode_groups(data) == groups


@settings(max_examples=100, deadline=None)
@given(some_groups, st.data())
def test_anything_else_is_a_value_error_or_groups(groups, data):
    good = encode_groups(groups)
    cut = data.draw(st.integers(0, len(good) - 1))
    with pytest.raises(ValueError, match="sample groups"):
        decode_groups(good[:cut])
    with pytest.raises(ValueError, match="sample groups"):
        decode_groups(torch.cat([good, torch.zeros(4, dtype=torch.uint8)]))
    flipped = good.clone()
    flipped[cut] ^= data.draw(st.integers(1, 255))
    try:
        decode_groups(flipped)
    except ValueError:
        pass


def forged(header):
    """The tensors of no group, and another header."""
    tensors = load(encode_groups([]).numpy().tobytes())
    return torch.frombuffer(bytearray(save(tensors, {"groups": json.dumps(header)})), dtype=torch.uint8)


@pytest.mark.parametrize(
    "header",
    [
        {"a": 1},
        [1],
        7,
        [{"tokens": -1, "samples": []}],
        [{"tokens": 2**62, "samples": []}],
        [{"tokens": True, "samples": []}],
        [{"tokens": 0, "samples": [{"tokens": 0}], "index": 0, "label": ""}],
        [{"tokens": 0, "samples": []}],
    ],
)
def test_a_forged_header_is_refused(header):
    with pytest.raises(ValueError, match="sample groups"):
        decode_groups(forged(header))


def test_a_header_longer_than_the_data_and_a_wrong_dtype_are_refused():
    data = encode_groups([])
    data[:8] = 255
    with pytest.raises(ValueError, match="sample groups: .*header"):
        decode_groups(data)
    with pytest.raises(ValueError, match="uint8"):
        decode_groups(torch.zeros(40))


def test_lists_that_differ_in_length_are_a_bug():
    with pytest.raises(AssertionError, match="differ in length"):
        encode_groups([SampleGroup(Prompt(0, (1,), ""), [Sample([1, 2], [0.0], [0, 0], "stop")])])
    with pytest.raises(AssertionError, match="differ in length"):
        encode_groups([SampleGroup(Prompt(0, (1,), ""), [Sample([1], [0.0], [0], "stop", loss_mask=[True] * 2)])])


def test_a_mask_of_another_length_is_refused():
    data = encode_groups([SampleGroup(Prompt(0, (1,), ""), [Sample([1], [0.0], [0], "stop", loss_mask=[True])])])
    raw = data.numpy().tobytes()
    tensors = load(raw) | {"mask/0": torch.ones(2, dtype=torch.uint8)}
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    forged = save(tensors, header)
    with pytest.raises(ValueError, match="mask/0 is"):
        decode_groups(torch.frombuffer(bytearray(forged), dtype=torch.uint8))
