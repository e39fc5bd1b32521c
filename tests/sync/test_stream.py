"""The trainer's end of an update: whatever the cut, the buckets hold the converter's bytes."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from fp8slurm.fp8.policy import decide
from fp8slurm.fp8.quantize import quantize
from fp8slurm.models.names import NameTable
from fp8slurm.models.qwen3 import ModelSpec, QuantizationSpec
from fp8slurm.models.tiny import model_config
from fp8slurm.sync.bucket import WeightBucket, layout, payload_bytes
from fp8slurm.sync.stream import WeightStream, parse_description, plan

FP8 = torch.float8_e4m3fn


def spec_of(moe: bool = False, **changes) -> ModelSpec:
    return ModelSpec.from_hf_config(model_config(moe) | changes)


def weights_of(table: NameTable, seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {n: (torch.randn(t.shape, generator=g) * 0.05).bfloat16() for n, t in table.hf_tensors().items()}


def expected(weights: dict[str, torch.Tensor], fp8: bool) -> dict[str, torch.Tensor]:
    out = {}
    for name, w in weights.items():
        if fp8 and decide(name, tuple(w.shape)).quantize:
            q = quantize(w)
            out[name], out[name + "_scale_inv"] = q.data, q.scale_inv
        else:
            out[name] = w
    return out


def collect(stream: WeightStream, version: int = 1) -> dict[str, torch.Tensor]:
    return {n: t.clone() for b in stream.buckets(version) for n, t in b.views()}


def assert_same_bytes(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert sorted(got) == sorted(want)
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype and got[name].shape == tensor.shape, name
        assert torch.equal(got[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_layout_is_gapless_aligned_and_keeps_codes_with_scales():
    items = [
        [("a", FP8, (256, 128)), ("a_s", torch.float32, (2, 1))],
        [("norm", torch.bfloat16, (3,))],
        [("b", FP8, (128, 128)), ("b_s", torch.float32, (1, 1))],
        [("big", torch.bfloat16, (1024, 1024))],
        [("c", FP8, (1, 1))],
    ]
    buckets = layout(items, bucket_bytes=70_000)
    assert [sorted(s.name for s in b) for b in buckets] == [["a", "a_s", "b", "b_s", "norm"], ["big"], ["c"]]
    for specs in buckets:
        end = 0
        for s in specs:
            assert s.offset == end and s.offset % s.dtype.itemsize == 0
            end += s.nbytes
        bucket = WeightBucket(0, specs, torch.zeros(payload_bytes(specs), dtype=torch.uint8))
        for (_, view), s in zip(bucket.views(), specs):
            assert tuple(view.shape) == s.shape
            view.view(torch.uint8).fill_(1)
        assert bucket.payload.min() == 1, "views cover every byte"


@pytest.mark.parametrize("fp8", [True, False])
@pytest.mark.parametrize("moe", [True, False])
def test_one_rank_sends_the_converters_bytes(moe, fp8):
    table = NameTable(spec_of(moe))
    weights = weights_of(table)
    shards = lambda: ((e.name, e.merge(weights)) for e in table)  # noqa: E731
    stream = WeightStream(table, shards, QuantizationSpec() if fp8 else None, 300_000, torch.bfloat16)
    assert len(stream.specs) > 3
    assert_same_bytes(collect(stream), expected(weights, fp8))
    assert parse_description(stream.describe()) == [tuple(s) for s in stream.specs]


def test_modules_to_not_convert_are_sent_as_they_are():
    table = NameTable(spec_of())
    names = [e.name for e in table]
    kept = plan(table, names, 1, QuantizationSpec(modules_to_not_convert=("model.layers.0.mlp.down_proj",)))
    by_name = {p.name: p for p in kept}
    assert not by_name["model.layers.0.mlp.down_proj.weight"].quantized
    assert by_name["model.layers.1.mlp.down_proj.weight"].quantized
    assert not by_name["model.embed_tokens.weight"].quantized and not by_name["model.norm.weight"].quantized


def test_the_plan_says_which_way_and_why():
    table = NameTable(spec_of(intermediate_size=384))
    ways = {p.name: p for p in plan(table, [e.name for e in table], 2, QuantizationSpec())}
    assert ways["model.layers.0.self_attn.q_proj.weight"].way == "shard-fp8"
    assert ways["model.layers.0.mlp.gate_proj.weight"].way == "gather-quantize"
    assert "192" in ways["model.layers.0.mlp.gate_proj.weight"].reason
    assert ways["model.embed_tokens.weight"].way == "gather"
    assert ways["model.norm.weight"].way == "local"


def test_a_plan_that_does_not_fit_together_is_refused():
    table = NameTable(spec_of())
    weights = weights_of(table)
    stream = WeightStream(table, lambda: ((e.name, e.merge(weights)) for e in table), None, 2**20, torch.bfloat16)
    raw = json.loads(stream.describe())
    raw[0][1][3] += 2
    with pytest.raises(ValueError, match="begins at byte"):
        parse_description(json.dumps(raw))


WORKER = """
import sys, torch, torch.distributed as dist
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_stream import *
from fp8slurm.sync.groups import Group, connect_store, host_store, publish

rank, folder, ffn = int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
where = folder / "store.json"
if rank == 0:
    store, port = host_store("127.0.0.1")
    publish(where, "127.0.0.1", port)
else:
    store = connect_store(where, 60)
table = NameTable(spec_of(intermediate_size=ffn))
weights = weights_of(table)
if rank < 2:
    dist.init_process_group("gloo", store=dist.PrefixStore("ranks", store), rank=rank, world_size=2)
    shards = lambda: ((e.name, e.shard(weights, rank, 2)) for e in table)
    stream = WeightStream(table, shards, QuantizationSpec(), 300_000, torch.bfloat16, rank, 2, dist.group.WORLD)
    if stream.is_source:
        store.set("plan", stream.describe())
        group = Group(store, "sync", 0, 2, "127.0.0.1")
    for version in (1, 2):
        for bucket in stream.buckets(version):
            group.broadcast(bucket.payload, 0)
    store.set(f"left/{{rank}}", "")
    if rank == 0:
        store.wait(["left/1", "left/2"])
else:
    specs = parse_description(store.get("plan").decode())
    group = Group(store, "sync", 1, 2, "127.0.0.1")
    for version in (1, 2):
        got = {{}}
        for s in specs:
            bucket = WeightBucket(version, s, torch.empty(payload_bytes(s), dtype=torch.uint8))
            group.broadcast(bucket.payload, 0)
            got |= {{n: t.clone() for n, t in bucket.views()}}
        assert_same_bytes(got, expected(weights, True))
    print("same bytes")
    store.set("left/2", "")
"""


@pytest.mark.parametrize("ffn", [512, 384], ids=["aligned", "cut-inside-a-block"])
def test_two_ranks_send_the_converters_bytes(tmp_path, ffn):
    """Two tensor-parallel ranks and an agent over real gloo; each slice quantized where it lies, where the cut permits."""
    from pathlib import Path

    script = textwrap.dedent(WORKER).format(tests=str(Path(__file__).parent))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(r), str(tmp_path), str(ffn)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(3)
    ]
    outputs = [p.communicate(timeout=120) for p in processes]
    assert [p.returncode for p in processes] == [0, 0, 0], outputs
    assert "same bytes" in outputs[2][0]
