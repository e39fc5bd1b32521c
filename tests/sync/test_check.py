"""Refusals before the first update, and buckets that did not arrive as they were sent."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from queue import Queue

import pytest
import tiny
import torch

from fp8slurm.checkpoint import hf_to_fp8
from fp8slurm.config import RunConfig
from fp8slurm.models.names import NameTable
from fp8slurm.models.spec import ModelSpec, QuantizationSpec
from fp8slurm.rollout.worker import engine_checkpoint
from fp8slurm.run.directory import RunDirectory
from fp8slurm.sync.bucket import WeightBucket, WeightSpec, layout, payload_bytes
from fp8slurm.sync.check import check_engine_checkpoint, check_rollout_checkpoint
from fp8slurm.sync.groups import host_store
from fp8slurm.sync.plan import source_plans, stage_names
from fp8slurm.sync.receiver import CorruptUpdate, HostReceiver, checksum, publish_checksums
from fp8slurm.sync.traffic import traffic


def planned(config: dict, quantization: QuantizationSpec | None) -> list[WeightSpec]:
    table = NameTable(ModelSpec.from_hf_config(config))
    dense, experts = source_plans(table, stage_names(table, 1)[0], "stage0", quantization, torch.bfloat16, 2**20)
    return [s for source in (dense, experts) if source for specs in source.buckets for s in specs]


@pytest.fixture(scope="module", params=[False, True], ids=["dense", "experts"])
def folders(request, tmp_path_factory) -> tuple[dict, Path, Path]:
    folder = tmp_path_factory.mktemp("engine")
    (folder / "bf16").mkdir()
    tiny.write_model(folder / "bf16", moe=request.param)
    hf_to_fp8(folder / "bf16", folder / "fp8")
    return json.loads((folder / "bf16/config.json").read_text()), folder / "bf16", folder / "fp8"


def test_an_engine_that_takes_what_is_sent_passes(folders) -> None:
    config, bf16, fp8 = folders
    check_engine_checkpoint(bf16, planned(config, None))
    check_engine_checkpoint(fp8, planned(config, QuantizationSpec()))
    check_rollout_checkpoint(fp8, ModelSpec.from_hf_dir(bf16))
    other = ModelSpec.from_hf_config({**config, "num_key_value_heads": 4})
    with pytest.raises(ValueError, match="model.layers.0.self_attn.k_proj.weight is"):
        check_rollout_checkpoint(fp8, other)


@pytest.mark.parametrize("key, name, value", [
    ("rope_theta", "rope_theta", 5e6), ("rms_norm_eps", "rms_norm_eps", 1e-5), ("num_experts_per_tok", "experts_per_token", 1),
    ("norm_topk_prob", "norm_topk_prob", False),
])  # fmt: skip
def test_settings_that_no_update_changes_are_compared(folders, key: str, name: str, value: float) -> None:
    """An engine that rotates or routes otherwise would show only as a gap."""
    config, _, fp8 = folders
    if key not in config:
        pytest.skip("a model without experts")
    with pytest.raises(
        ValueError, match=f"{name} is .*, the trainer's model has {value}; give another --model.rollout-ch"
    ):
        check_rollout_checkpoint(fp8, ModelSpec.from_hf_config({**config, key: value}))
    check_rollout_checkpoint(fp8, ModelSpec.from_hf_config({**config, "max_position_embeddings": 64}))


def test_an_engine_model_that_another_model_left_is_made_anew(folders, tmp_path: Path) -> None:
    """Until its first checkpoint a run may be started again with another model; updates bring its weights, no settings."""
    _, bf16, _ = folders
    run = RunDirectory(tmp_path / "run")

    def start(model: Path) -> tuple[ModelSpec, int]:
        made = engine_checkpoint(RunConfig(model={"hf_checkpoint": model}, fp8={"engine": "fp8"}), run, 0)
        return ModelSpec.from_hf_dir(made), (made / "config.json").stat().st_mtime_ns

    first = start(bf16)
    assert start(bf16) == first, "made once"
    other = shutil.copytree(bf16, tmp_path / "other")
    text = (other / "config.json").read_text()
    (other / "config.json").write_text(text.replace('"rope_theta": 10000.0', '"rope_theta": 5000000.0'))
    assert start(other)[0].rope_theta == 5e6 and start(other)[0].quantization is not None


def test_the_first_tensor_that_differs_is_named(folders) -> None:
    config, bf16, fp8 = folders
    with pytest.raises(ValueError, match=r"model.layers.0.\S+ is bfloat16, the trainer sends as float8_e4m3fn"):
        check_engine_checkpoint(bf16, [s for s in planned(config, QuantizationSpec()) if "scale_inv" not in s.name])
    with pytest.raises(ValueError, match="model.layers.0.*down_proj.weight is float8_e4m3fn, .* as bfloat16"):
        check_engine_checkpoint(fp8, planned(config, None))
    wide = {**config, "num_attention_heads": 8}
    with pytest.raises(ValueError, match=r"model.layers.0.self_attn.o_proj.weight is \[256, 512\], .* \[256, 1024\]"):
        check_engine_checkpoint(bf16, planned(wide, None))
    with pytest.raises(ValueError, match="has no tensor model.layers.2.*--model.rollout-checkpoint"):
        check_engine_checkpoint(bf16, planned({**config, "num_hidden_layers": 3}, None))
    with pytest.raises(ValueError, match="has a tensor model.layers.1.*does not send"):
        check_engine_checkpoint(bf16, planned({**config, "num_hidden_layers": 1}, None))
    kept = QuantizationSpec(modules_to_not_convert=("model.layers.1.self_attn.o_proj",))
    with pytest.raises(ValueError, match="model.layers.1.self_attn.o_proj.weight"):
        check_engine_checkpoint(fp8, planned(config, kept))


class Pipe:
    """A group of two in one process: what rank 0 broadcasts, rank 1 gets when it waits for it, in order."""

    def __init__(self) -> None:
        self.queue: Queue[torch.Tensor] = Queue()

    def broadcast(self, payload: torch.Tensor, root: int) -> None:
        self.queue.put(payload.clone())

    def start_broadcast(self, payload: torch.Tensor, root: int) -> Pipe:
        payload.fill_(255)  # from now on it may be written to
        self.target = payload
        return self

    def wait(self) -> None:
        self.target.copy_(self.queue.get(timeout=60))


class Sender:
    """The other end of a Receiver."""

    def __init__(self, sizes: list[int], keep: bool) -> None:
        self.store, _ = host_store("127.0.0.1")
        forms = [[(f"t{i}", torch.uint8, (n,))] for i, n in enumerate(sizes)]
        self.plan = layout(forms, 1)
        self.group = Pipe()
        self.receiver = HostReceiver(self.store, [("stage0", self.group, self.plan)], keep)

    def send(self, number: int, value: int, damaged: int | None = None) -> None:
        sums = []
        for i, specs in enumerate(self.plan):
            payload = torch.full((payload_bytes(specs),), value + i, dtype=torch.uint8)
            sums.append(checksum(payload))
            if i == damaged:
                payload[-1] ^= 64
            self.group.broadcast(payload, 0)
        publish_checksums(self.store, number, "stage0", sums)


@pytest.mark.parametrize("keep", [True, False])
def test_buckets_arrive_in_order_and_last_as_long_as_promised(keep: bool) -> None:
    sender = Sender([10, 70_000, 3, 500, 9], keep)
    for number in (1, 2):
        sender.send(number, 10 * number)
        before: WeightBucket | None = None
        seen = []
        for i, bucket in enumerate(sender.receiver.receive(number, number, verify=number == 2)):
            if before is not None:
                assert set(before.payload.tolist()) == {10 * number + i - 1}
            assert set(bucket.payload.tolist()) == {10 * number + i} and bucket.version == number
            assert not sender.receiver.held, (
                "an engine that restarts now must not get the update before, half overwritten"
            )
            before = bucket
            seen.append(bucket)
        assert len(seen) == 5 and len(sender.receiver.held) == (5 if keep else 0)
    for i, bucket in enumerate(seen):  # an update that is compared lasts as a whole
        assert set(bucket.payload.tolist()) == {20 + i}


@pytest.mark.parametrize("keep", [True, False])
def test_a_bucket_damaged_between_trainer_and_worker_is_named(keep: bool) -> None:
    sender = Sender([10, 20, 30], keep)
    sender.send(1, 5, damaged=1)
    with pytest.raises(CorruptUpdate, match=r"bucket 1 of stage0 \(t1 and 0 more\) is not what was sent"):
        list(sender.receiver.receive(1, 1, verify=True))
    assert not sender.receiver.held


def known(name: str) -> NameTable:
    from fp8slurm.models import known as folder

    return NameTable(ModelSpec.from_hf_config(json.loads((Path(folder.__file__).parent / f"{name}.json").read_text())))


def test_what_travels_of_the_real_models() -> None:
    dense = traffic(known("Qwen3-4B"), QuantizationSpec(), 512 * 2**20, tensor_parallel_size=2)
    assert dense.methods["shard-fp8"] == 252 and dense.bf16 == 8_044_936_192 and not dense.unaligned
    assert dense.quantized <= 0.502 * dense.quantized_bf16 and dense.ratio <= 0.55
    assert [r.gathered > 0 for r in dense.ranks] == [False, True] and dense.ranks[1].gathered < 0.56 * dense.gather_bf16
    assert dense.gathers == dense.buckets == dense.ranks[1].gathers
    whole = traffic(known("Qwen3-4B"), QuantizationSpec(), 512 * 2**20, tensor_parallel_size=8)
    assert whole.unaligned and whole.payload == dense.payload and "down_proj" in " ".join(whole.unaligned)
    layout = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "expert_parallel_size": 4}
    experts = traffic(known("Qwen3-30B-A3B"), QuantizationSpec(), 512 * 2**20, **layout)
    assert experts.quantized / (128 * 128 + 4) % 1 == 0 and experts.ratio < 0.52
    assert len(experts.ranks) == 8 and all(r.broadcast > 3e9 for r in experts.ranks)  # every rank sends its own experts
    assert sum(r.broadcast for r in experts.ranks) == experts.payload == experts.loaded
    assert sum(w for w in experts.methods.values()) == sum(len(e.tensors) for e in known("Qwen3-30B-A3B"))
