"""The trainer's end of an update: whatever the cut, the buckets hold the converter's bytes."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from tiny import model_config
from two_ranks import laid_together

from fp8slurm.fp8.policy import decide
from fp8slurm.fp8.quantize import quantize
from fp8slurm.models.names import NameTable
from fp8slurm.models.spec import ModelSpec, QuantizationSpec
from fp8slurm.sync.bucket import WeightBucket, layout, payload_bytes
from fp8slurm.sync.plan import plan, source_names  # noqa: F401 (for the script below)
from fp8slurm.sync.stream import Cut, WeightStream, parse_description  # noqa: F401
from fp8slurm.sync.traffic import RankTraffic, traffic

FP8 = torch.float8_e4m3fn


def spec_of(moe: bool = False, family: str = "qwen3", **changes) -> ModelSpec:
    return ModelSpec.from_hf_config(model_config(moe, family) | changes)


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
    return {n: t.clone() for _, b in stream.buckets(version) if b is not None for n, t in b.views()}


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
@pytest.mark.parametrize(("moe", "family"), [(True, "qwen3"), (False, "qwen3"), (False, "qwen2"), (False, "llama")])
def test_one_rank_sends_the_converters_bytes(moe, family, fp8):
    table = NameTable(spec_of(moe, family))
    weights = weights_of(table)
    parameters = {e.name: e.merge(weights).clone() for e in table}
    quantization = QuantizationSpec() if fp8 else None
    stream = WeightStream(table, lambda: iter(parameters.items()), quantization, 300_000, torch.bfloat16)
    assert list(stream.sources) == (["stage0", "stage0.experts0"] if moe else ["stage0"])
    assert_same_bytes(collect(stream), expected(weights, fp8))
    for name, source in stream.sources.items():
        assert len(source.buckets) > 3
        assert parse_description(stream.describe(name)) == list(source.buckets)
    assert_counted(stream, traffic(table, quantization, 300_000).ranks[0])
    with torch.no_grad():  # as an optimizer does it: in place
        for p in parameters.values():
            p.mul_(2)
    assert_same_bytes(collect(stream, 2), expected({n: w * 2 for n, w in weights.items()}, fp8))
    parameters.update({n: p * 2 for n, p in parameters.items()})  # and new tensors are noticed
    assert_same_bytes(collect(stream, 3), expected({n: w * 4 for n, w in weights.items()}, fp8))


def assert_counted(stream: WeightStream, rank: RankTraffic) -> None:
    assert stream.counts == {k: getattr(rank, k) for k in ("gathered", "gathers", "broadcast", "buckets")}


def test_a_buffer_is_filled_again_only_after_its_bucket_arrived():
    table = NameTable(spec_of())
    weights = weights_of(table)
    parameters = {e.name: e.merge(weights) for e in table}
    stream = WeightStream(table, lambda: iter(parameters.items()), QuantizationSpec(), 100_000, torch.bfloat16)
    events, arrived = [], {}

    class Travelling:
        def __init__(self, number, bucket):
            self.number, self.bucket = number, bucket
            events.append(("start", number))

        def wait(self):  # what is read only now is still what was sent
            events.append(("arrived", self.number))
            arrived.update({n: t.clone() for n, t in self.bucket.views()})

    numbers = iter(range(100))
    stream.send(1, lambda source, bucket: Travelling(next(numbers), bucket))
    assert_same_bytes(arrived, expected(weights, True))
    last = next(numbers) - 1
    assert last > 5 and events[:5] == [("start", 0), ("start", 1), ("arrived", 0), ("start", 2), ("arrived", 1)]
    assert events[-1] == ("arrived", last) and set(stream.seconds) == {"quantize", "copy", "gather", "wait"}
    assert all(p.stride()[-1] == 1 for p in parameters.values()) and stream.seconds["quantize"] > 0


@pytest.mark.parametrize("bucket_bytes", [2**16, 100_000, 2**20])
def test_slices_that_follow_one_another_lie_in_buffers_of_their_own(bucket_bytes):
    """Two sends are under way at a time, and buckets of norms alone hand nothing over."""
    table = NameTable(spec_of())
    weights = weights_of(table)
    held = {e.name: e.shard(weights, 1, 2) for e in table}
    stream = WeightStream(
        table, lambda: iter(held.items()), QuantizationSpec(), bucket_bytes, torch.bfloat16, Cut(1, 2, None)
    )
    stream._bind()
    (lane,) = stream._lanes
    handed = [fill.outgoing.data_ptr() for fill in lane.fills if fill.outgoing is not None]
    assert len(handed) > 1 and all(a != b for a, b in zip(handed, handed[1:]))
    if bucket_bytes == 2**16:
        assert len(handed) < len(lane.fills), "no bucket without pieces: this test would show nothing"


def test_biases_are_cut_and_gathered_with_their_rows():
    table = NameTable(spec_of(family="qwen2"))
    weights = weights_of(table)
    shards = laid_together(table, lambda rank: {e.name: e.shard(weights, rank, 2).contiguous() for e in table})
    assert_same_bytes({n: t.clone() for bucket in shards for n, t in bucket.views()}, expected(weights, True))
    methods = {p.name: p.method for p in plan(table, [e.name for e in table], 2, QuantizationSpec())}
    assert methods["model.layers.1.self_attn.k_proj.bias"] == "gather"


@pytest.mark.parametrize("width", [512, 384])
def test_a_trainer_in_fp32_is_quantized_from_fp32_whatever_the_engine_holds_the_rest_in(width):
    """Two ranks without a group: rank 1's message is put where it would arrive. Cuts of 384 fall inside a block, so that
    those slices travel; in BF16 they would be rounded twice."""
    table = NameTable(spec_of(intermediate_size=width))
    weights = {
        n: w.float() + torch.randn(w.shape, generator=torch.Generator().manual_seed(1)) * 1e-4
        for n, w in weights_of(table).items()
    }
    shards = laid_together(table, lambda rank: {e.name: e.shard(weights, rank, 2).contiguous() for e in table})
    got = {n: t.clone() for bucket in shards for n, t in bucket.views()}
    want = expected(weights, True)
    assert_same_bytes(
        got,
        {n: t.bfloat16() if t.dtype == torch.float32 and not n.endswith("_scale_inv") else t for n, t in want.items()},
    )


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
    methods = {p.name: p for p in plan(table, [e.name for e in table], 2, QuantizationSpec())}
    assert methods["model.layers.0.self_attn.q_proj.weight"].method == "shard-fp8"
    assert methods["model.layers.0.mlp.gate_proj.weight"].method == "gather-quantize"
    assert "192" in methods["model.layers.0.mlp.gate_proj.weight"].reason
    assert methods["model.embed_tokens.weight"].method == "gather"
    assert methods["model.norm.weight"].method == "local"


def test_a_plan_that_does_not_fit_together_is_refused():
    table = NameTable(spec_of())
    weights = weights_of(table)
    stream = WeightStream(table, lambda: ((e.name, e.merge(weights)) for e in table), None, 2**20, torch.bfloat16)
    raw = json.loads(stream.describe("stage0"))
    raw[0][1][3] += 2
    with pytest.raises(ValueError, match="begins at byte"):
        parse_description(json.dumps(raw))


def test_a_weight_that_is_not_finite_is_named():
    table = NameTable(spec_of())
    weights = weights_of(table)
    weights["model.layers.1.self_attn.k_proj.weight"][130, 7] = float("nan")
    stream = WeightStream(
        table, lambda: ((e.name, e.merge(weights)) for e in table), QuantizationSpec(), 2**20, torch.bfloat16
    )
    with pytest.raises(ValueError, match="model.layers.1.self_attn.k_proj.weight holds nan"):
        collect(stream)


CASES = {
    # name: (changes to the tiny model, TP, ETP, EP)
    "aligned": ({}, 2, 1, 1),
    "cut-inside-a-block": ({"intermediate_size": 384}, 2, 1, 1),
    "experts-on-two-ranks": ({"moe": True}, 2, 1, 2),
    "experts-cut": ({"moe": True}, 2, 2, 1),
    "experts-cut-inside-a-block": ({"moe": True, "moe_intermediate_size": 128}, 2, 2, 1),
}

WORKER = """
import sys, torch, torch.distributed as dist
from pathlib import Path
sys.path[:0] = {paths!r}
from test_stream import *
from fp8slurm.sync.groups import Group, connect_store, host_store, publish

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
where = folder / "store.json"
if rank == 0:
    store, port = host_store("127.0.0.1")
    publish(where, "127.0.0.1", port)
else:
    store = connect_store(where, 60)
if rank < 2:
    dist.init_process_group("gloo", store=dist.PrefixStore("ranks", store), rank=rank, world_size=2)
for case, (changes, tp, etp, ep) in CASES.items():
    table = NameTable(spec_of(**changes))
    weights = weights_of(table)
    layout = dict(tensor_parallel_size=tp, expert_parallel_size=ep, expert_tensor_parallel_size=etp)
    counted = traffic(table, QuantizationSpec(), 300_000, **layout)
    sources = source_names(1, ep if table.spec.is_moe else 0)
    if rank < 2:
        held = {{}}
        for e in table:
            if e.expert is None:
                held[e.name] = e.shard(weights, rank, tp)
            elif e.expert // (table.spec.num_experts // ep) == (rank if ep > 1 else 0):
                held[e.name] = e.shard(weights, rank if etp > 1 else 0, etp)
        experts = Cut(rank, 2, dist.group.WORLD) if etp > 1 else Cut()
        cut = Cut(rank, tp, dist.group.WORLD)
        stream = WeightStream(
            table, lambda: iter(held.items()), QuantizationSpec(), 300_000, torch.bfloat16, cut, 0, experts,
            rank if ep > 1 else 0,
        )
        for name in stream.sources:
            store.set(f"{{case}}/{{name}}", stream.describe(name))
        groups = {{name: Group(store, f"{{case}}/{{name}}", 0, 2, "127.0.0.1") for name in stream.sources}}
        for version in (1, 2):
            stream.send(version, lambda name, bucket: groups[name].start_broadcast(bucket.payload, 0))
            assert_counted(stream, counted.ranks[rank])
    else:
        plans = {{name: parse_description(store.get(f"{{case}}/{{name}}").decode()) for name in sources}}
        groups = {{name: Group(store, f"{{case}}/{{name}}", 1, 2, "127.0.0.1") for name in sources}}
        for version in (1, 2):
            got, received = {{}}, 0
            for name in sources:
                for s in plans[name]:
                    bucket = WeightBucket(version, s, torch.empty(payload_bytes(s), dtype=torch.uint8))
                    groups[name].broadcast(bucket.payload, 0)
                    got |= {{n: t.clone() for n, t in bucket.views()}}
                    received += bucket.payload.numel()
            assert_same_bytes(got, expected(weights, True))
            assert received == counted.payload == counted.loaded
        print("same bytes:", case)
store.set(f"left/{{rank}}", "")
if rank == 0:
    store.wait(["left/1", "left/2"])
"""


def test_two_ranks_send_the_converters_bytes(tmp_path):
    """Two ranks and a rollout worker over real gloo, dense and experts; slices quantized where they lie, where the cut permits;
    bytes and messages are those of `traffic`."""
    tests = Path(__file__).parent
    paths = [str(tests), str(tests.parents[1] / "tools")]
    script = textwrap.dedent(WORKER).format(paths=paths)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(r), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for r in range(3)
    ]
    try:
        outputs = [p.communicate(timeout=240) for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert [p.returncode for p in processes] == [0, 0, 0], outputs
    assert [line.removeprefix("same bytes: ") for line in outputs[2][0].splitlines()] == list(CASES), outputs
