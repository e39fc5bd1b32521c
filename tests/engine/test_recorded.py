"""Loads that are recorded once and made again as copies."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from fp8slurm.engine.inside import delta
from fp8slurm.engine.inside.recorded import (
    KNOWN,
    FlatBucket,
    bucket_id,
    delta_name,
    in_bytes,
    load_bucket,
    loads_of,
    merged,
    refusals,
)
from fp8slurm.sync.bucket import WeightBucket, layout, payload_bytes

Pairs = Iterable[tuple[str, torch.Tensor]]


class Model(torch.nn.Module):
    """Loads as SGLang's models do: fused rows, a slice of columns, an expert, a transposed one, a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = torch.nn.Parameter(torch.zeros(12, 8, dtype=torch.bfloat16), requires_grad=False)
        self.column = torch.nn.Parameter(torch.zeros(6, 5), requires_grad=False)
        self.experts = torch.nn.Parameter(torch.zeros(3, 4, 4, dtype=torch.float8_e4m3fn), requires_grad=False)
        self.turned = torch.nn.Parameter(torch.zeros(7, 3).t(), requires_grad=False)
        self.norm = torch.nn.Parameter(torch.zeros(9), requires_grad=False)
        self.register_buffer("buffer", torch.zeros(4))
        self.calls = 0

    def load_weights(self, pairs: Pairs) -> None:
        self.calls += 1
        for name, w in pairs:
            if name in "qkv":
                self.fused.data.narrow(0, "qkv".index(name) * 4, 4).copy_(w)
            elif name == "column":
                self.column.data.copy_(w.narrow(1, 5, 5))
            elif name.startswith("expert"):
                self.experts.data[int(name[-1])].copy_(w)
            elif name == "converted":
                self.norm.data.copy_(w.float())
            elif name == "cast":
                self.norm.data.copy_(w)
            elif name == "filled":
                self.norm.data.fill_(w.item())
            elif name == "buffer":
                self.buffer.copy_(w)
            elif name == "padded":
                self.norm.data[:9].copy_(w)
                self.norm.data[9:].fill_(0)  # nothing
            elif name == "rebound":
                self.norm.data = w.clone()
            elif name == "listed":
                torch._foreach_copy_([self.norm.data], [w])
            elif name == "overlapping":
                self.norm.data[:6].copy_(w[3:])
                self.norm.data[3:].copy_(w[:6])
            elif name == "turned16":
                self.turned.data.copy_(w)
            elif name != "elsewhere":  # another rank's
                getattr(self, name).data.copy_(w)


SHAPES: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
    "q": (torch.bfloat16, (4, 8)), "k": (torch.bfloat16, (4, 8)), "v": (torch.bfloat16, (4, 8)), "column": (torch.float32, (6, 15)),
    "expert0": (torch.float8_e4m3fn, (4, 4)), "expert2": (torch.float8_e4m3fn, (4, 4)), "turned": (torch.float32, (3, 7)),
    "norm": (torch.float32, (9,)), "elsewhere": (torch.float32, (2, 2)), "converted": (torch.bfloat16, (9,)),
    "cast": (torch.bfloat16, (9,)), "filled": (torch.float32, (1,)), "buffer": (torch.float32, (4,)), "padded": (torch.bfloat16, (9,)), "turned16": (torch.bfloat16, (3, 7)),
    "rebound": (torch.float32, (9,)), "listed": (torch.float32, (9,)), "overlapping": (torch.float32, (9,)),
}  # fmt: skip
GOOD = ["q", "k", "v", "column", "expert0", "expert2", "turned", "norm", "elsewhere"]


def bucket(names: list[str], seed: int) -> WeightBucket:
    (specs,) = layout([[(name, *SHAPES[name])] for name in names], 2**20)
    generator = torch.Generator().manual_seed(seed)
    payload = torch.randint(0, 255, (payload_bytes(specs),), generator=generator, dtype=torch.uint8)
    out = WeightBucket(seed, specs, payload)
    for _, view in out.views():  # numbers, not bytes: a NaN would not equal itself
        view.copy_(torch.randn(view.shape, generator=generator))
    return out


def arrives(b: WeightBucket, known: bool = False) -> FlatBucket:
    """As in an engine: somewhere inside a larger piece of memory."""
    room = torch.zeros(b.payload.numel() + 64, dtype=torch.uint8)
    room[48 : 48 + b.payload.numel()] = b.payload
    forms = [s.form for s in b.specs]
    if known:
        forms = [(KNOWN + bucket_id(forms), "uint8", (b.payload.numel(),), 0)]
    return FlatBucket(room[48 : 48 + b.payload.numel()], forms)


def expected(b: WeightBucket) -> dict[str, torch.Tensor]:
    model = Model()
    model.load_weights(b.views())
    return model.state_dict()


def check(model: Model, b: WeightBucket) -> None:
    for name, want in expected(b).items():
        assert torch.equal(model.state_dict()[name].float(), want.float()), name


def original(model: torch.nn.Module, pairs: Any) -> None:
    model.load_weights(pairs)


@pytest.mark.parametrize("known", [False, True])
def test_later_loads_are_the_same_copies_without_the_model(known: bool) -> None:
    model = Model()
    for seed in range(4):
        b = bucket(GOOD, seed)
        load_bucket(model, arrives(b, known and seed > 0), original)
        check(model, b)
    assert model.calls == 1
    (found,) = loads_of(model).values()
    assert found.replays == 3 and not found.refused
    # q, k and v lie side by side in the bucket and in the parameter
    assert sum(c.parameter == "fused" for c in found.copies) == 1
    assert len(found.copies) == 6


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("converted", "not in the bucket"),
        ("turned16", "it makes turned from torch.bfloat16"),
        ("filled", "fill_"),
        ("buffer", "no parameter"),
        ("rebound", "it gives norm other memory"),
        ("listed", "_foreach_copy_"),
        ("overlapping", "twice to the same place"),
    ],
)
def test_what_is_no_plain_copy_is_loaded_by_the_model_every_time(name: str, why: str) -> None:
    model = Model()
    for seed in range(3):
        b = bucket(["q", name, "expert2"], seed)
        load_bucket(model, arrives(b, seed > 0), original)
        check(model, b)
    assert model.calls == 3
    (found,) = loads_of(model).values()
    assert why in found.refused and found.replays == 0


@pytest.mark.parametrize(("names", "copies"), [(["q", "cast", "k"], 3), (["padded", "v"], 2), (["elsewhere"], 0)])
def test_copies_that_convert_and_buckets_of_other_ranks(names: list[str], copies: int) -> None:
    model = Model()
    for seed in range(3):
        b = bucket(names, seed)
        load_bucket(model, arrives(b, seed > 0), original)
        check(model, b)
    (found,) = loads_of(model).values()
    assert (model.calls, found.replays, len(found.copies)) == (1, 2, copies)


def test_parameters_that_were_replaced() -> None:
    model = Model()
    load_bucket(model, arrives(bucket(GOOD, 0)), original)
    old = model.fused
    model.fused = torch.nn.Parameter(torch.ones_like(old), requires_grad=False)  # the same form elsewhere
    model.norm.data = torch.ones(9)
    second = bucket(GOOD, 1)
    load_bucket(model, arrives(second, True), original)
    check(model, second)
    assert model.calls == 1 and torch.equal(old.float(), expected(bucket(GOOD, 0))["fused"].float())
    model.fused = torch.nn.Parameter(torch.ones(8, 12, dtype=torch.bfloat16).t(), requires_grad=False)  # another form
    third = bucket(GOOD, 2)
    load_bucket(model, arrives(third, True), original)
    check(model, third)
    assert model.calls == 2
    fourth = bucket(GOOD, 3)
    load_bucket(model, arrives(fourth, True), original)
    check(model, fourth)
    assert model.calls == 2


def test_several_buckets_and_one_that_is_not_known() -> None:
    model = Model()
    first, second = bucket(["q", "k"], 0), bucket(["v", "norm"], 1)
    for b in (first, second):
        load_bucket(model, arrives(b), original)
    assert len(loads_of(model)) == 2
    with pytest.raises(KeyError):
        load_bucket(model, arrives(bucket(["q", "v"], 0), True), original)
    other = bucket(["q", "k"], 0)
    assert bucket_id(s.form for s in other.specs) == bucket_id(s.form for s in first.specs)
    assert bucket_id(s.form for s in second.specs) != bucket_id(s.form for s in first.specs)


def test_a_load_that_fails_leaves_nothing_to_be_made_again() -> None:
    model = Model()

    def broken(model: torch.nn.Module, pairs: Any) -> None:
        original(model, list(pairs)[:2])
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        load_bucket(model, arrives(bucket(GOOD, 0)), broken)
    b = bucket(GOOD, 1)
    load_bucket(model, arrives(b, True), original)
    check(model, b)
    assert model.calls == 2


@pytest.mark.parametrize(
    "cut", [lambda t: t, lambda t: t[1:3], lambda t: t[:, 2:5], lambda t: t[..., 1], lambda t: t.transpose(0, 1), lambda t: t[1, 2, 3],
            lambda t: t[:, :1]],
)  # fmt: skip
def test_in_bytes(cut: Callable[[torch.Tensor], torch.Tensor]) -> None:
    a = torch.randn(4, 5, 6).bfloat16()
    b = torch.zeros(7, 4, 5, 6).bfloat16()[2]
    to, source = in_bytes(cut(b), cut(a))
    storage = torch.empty(0, dtype=torch.uint8).set_(b.untyped_storage())
    to.view(storage).copy_(source.view(a.view(torch.uint8).flatten()))
    assert torch.equal(cut(b), cut(a)) and b.count_nonzero() <= cut(a).numel()
    assert merged([]) == []


def changes(old: WeightBucket, new: WeightBucket, damage: bool = False) -> FlatBucket:
    """What is sent of `new` to an engine that has `old`."""
    at = delta.positions(old.payload, new.payload, new.payload.numel())
    assert at is not None
    encoded = delta.encode(at, new.payload)
    name = delta_name(bucket_id(s.form for s in new.specs), at.numel(), delta.checksum(encoded))
    encoded[-at.numel() // 2] ^= int(damage)
    return FlatBucket(encoded, [(name, "uint8", (encoded.numel(),), 0)])


def next_state(b: WeightBucket, seed: int) -> WeightBucket:
    """The same bucket with every eleventh number of every tensor changed."""
    out = WeightBucket(b.version + 1, b.specs, b.payload.clone())
    for _, view in out.views():
        flat = view.reshape(-1)[seed % 3 :: 11]
        flat.copy_(torch.full(flat.shape, float(seed + 3)))
    return out


def test_changes_alone_give_what_the_whole_bucket_gives() -> None:
    model, last = Model(), bucket(GOOD, 0)
    load_bucket(model, arrives(last), original)
    assert refusals(model) == []
    for seed in range(1, 5):
        b = next_state(last, seed)
        load_bucket(model, changes(last, b), original)
        check(model, b)
        last = b
    model.norm.data = model.norm.data.clone()  # the same form elsewhere
    b = next_state(last, 5)
    load_bucket(model, changes(last, b), original)
    check(model, b)
    load_bucket(model, arrives(bucket(GOOD, 9), True), original)
    check(model, bucket(GOOD, 9))
    assert model.calls == 1


def test_changes_that_cannot_be_made_change_nothing() -> None:
    model, first = Model(), bucket(GOOD, 0)
    with pytest.raises(KeyError):
        load_bucket(model, changes(first, next_state(first, 1)), original)
    load_bucket(model, arrives(first), original)
    with pytest.raises(ValueError, match="changes to the bucket from .* arrived damaged"):
        load_bucket(model, changes(first, next_state(first, 1), damage=True), original)
    check(model, first)
    model.fused = torch.nn.Parameter(torch.ones(8, 12, dtype=torch.bfloat16).t(), requires_grad=False)
    with pytest.raises(ValueError, match="its parameters are not what they were"):
        load_bucket(model, changes(first, next_state(first, 1)), original)


@pytest.mark.parametrize(("name", "why"), [("filled", "fill_"), ("cast", "norm has another dtype in the engine")])
def test_a_bucket_that_takes_no_changes_says_why(name: str, why: str) -> None:
    model, first = Model(), bucket(["q", name], 0)
    load_bucket(model, arrives(first), original)
    (said,) = refusals(model)
    assert said.startswith("the bucket from ") and why in said
    with pytest.raises(ValueError, match="cannot be made"):
        load_bucket(model, changes(first, next_state(first, 1)), original)
    check(model, first)
