"""What the plan says against what is there: built trainers on four ranks, the converter's output, SGLang, the code."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch.profiler import ProfilerActivity, profile

from fp8slurm.checkpoint import hf_to_fp8
from fp8slurm.checkpoint.formats.hf_folder import open_hf
from fp8slurm.config import RunConfig, parse
from fp8slurm.models import known
from fp8slurm.models.known import known_model, known_models
from fp8slurm.models.names import NameTable
from fp8slurm.models.spec import ModelSpec, QuantizationSpec
from fp8slurm.plan import make_plan, memory, saving
from fp8slurm.plan.engine import engine_memory, tensor_bytes, weights_on_gpu
from fp8slurm.plan.parameters import Layout, stages
from fp8slurm.sync.traffic import traffic
from fp8slurm.trainer.logprobs import vocab_parallel_logprobs

HERE = Path(__file__).parent
RANKS = 4
LAYOUTS: dict[str, dict[str, dict[str, Any]]] = {
    "tp2_pp2": {"parallel": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}},
    "tp2_sp_dp2": {"parallel": {"tensor_parallel_size": 2, "sequence_parallel": True}},
    "pp2_dp2": {"parallel": {"pipeline_parallel_size": 2}},
    "dp4_not_distributed": {"optim": {"distributed": False}},
    "dp4_fp32_not_distributed": {"optim": {"distributed": False}, "model": {"dtype": "float32"}},
    "dp4_offload": {"optim": {"cpu_offload": True}},
    "pp2_dp2_reference": {"parallel": {"pipeline_parallel_size": 2}, "algorithm": {"kl_coef": 0.1}},
    "tp2_fp32": {"parallel": {"tensor_parallel_size": 2}, "model": {"dtype": "float32"}},
    "qwen2_tp2_pp2": {"parallel": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}},
    "moe_ep2": {"parallel": {"expert_parallel_size": 2}},
    "moe_pp2_ep2": {"parallel": {"pipeline_parallel_size": 2, "expert_parallel_size": 2}},
    "moe_tp2_ep4": {"parallel": {"tensor_parallel_size": 2, "sequence_parallel": True, "expert_parallel_size": 4}},
    "moe_tp2_etp2": {
        "parallel": {"tensor_parallel_size": 2, "sequence_parallel": True, "expert_tensor_parallel_size": 2}
    },
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = {}
    for name in ("dense", "moe", "qwen2"):
        out[name] = tmp_path_factory.mktemp("models") / name
        out[name].mkdir()
        tiny.write_model(out[name], moe=name == "moe", family=name)
    return out


def configuration(name: str, models: dict[str, Path]) -> RunConfig:
    values = {s: dict(v) for s, v in LAYOUTS[name].items()}
    model = {"hf_checkpoint": str(models.get(name.split("_")[0], models["dense"]))}
    values["model"] = model | values.get("model", {})
    values |= {"fp8": {"backend": "emulated"}, "slurm": {"ranks_per_node": RANKS}}
    return RunConfig.model_validate(values)


@pytest.fixture(scope="module")
def held(
    tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path], run_ranks: Callable[[Path, Path, int], None]
) -> list[dict[str, dict[str, int]]]:
    """[rank][layout]: what a built trainer holds."""
    folder = tmp_path_factory.mktemp("held")
    layouts = {name: configuration(name, models).model_dump(mode="json") for name in LAYOUTS}
    (folder / "layouts.json").write_text(json.dumps(layouts))
    run_ranks(HERE / "held_worker.py", folder, RANKS)
    for rank in range(RANKS):
        if not (folder / f"held.{rank}.json").is_file():
            pytest.fail((folder / f"rank{rank}.log").read_text()[-3000:], pytrace=False)
    return [json.loads((folder / f"held.{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_built_trainer_holds_what_the_plan_says(name, models, held):
    config = configuration(name, models)
    plan = make_plan(config)
    by_stage: dict[int, list[dict[str, int]]] = {}
    for rank in held:
        by_stage.setdefault(rank[name]["stage"], []).append(rank[name])
    assert sorted(by_stage) == [s.stage for s in plan.stages]
    for stage in plan.stages:
        planned = {i.name: i.bytes for i in stage.memory.state}
        if config.optim.cpu_offload:  # a quarter of it are the gradients, which come with the first step
            planned["optimizer"] = stage.memory.host[0].bytes * 12 // 16
        for rank in by_stage[stage.stage]:
            for key in ("parameters", "expert_parameters"):
                assert rank[key] == getattr(stage, key), key
            assert rank["weights"] == planned["weights"]
            assert rank["gradients"] == planned["gradients"]
            # The last data-parallel rank's share holds the padding: the plan counts the fullest.
            assert rank["optimizer"] <= planned["optimizer"] < 1.01 * max(r["optimizer"] for r in by_stage[stage.stage])
        each = 12 if config.model.dtype == "bfloat16" else 8
        replicas = plan.layout.data if not config.optim.distributed else 1
        total = sum(r["optimizer"] for r in by_stage[stage.stage])
        dense, experts = stage.dense_parameters, stage.expert_parameters
        cut = plan.layout.expert * plan.layout.expert_tensor
        assert total == replicas * each * (dense * plan.layout.tensor + experts * cut)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_checkpoint_takes_the_host_memory_that_the_plan_says(name, models, held):
    config = configuration(name, models)
    layout = Layout.of(config.parallel, RANKS)
    parts = stages(NameTable(ModelSpec.from_hf_dir(config.model.hf_checkpoint)), layout)
    took = [rank[name]["checkpoint"] for rank in held]
    for rank, counted in enumerate(took):
        planned = saving.rank_bytes(config, parts, rank)
        # Norms and the router, which all tensor-parallel ranks hold, are written by the first of them.
        assert 0.98 * planned <= counted <= planned, rank
    (item,) = [i for i in make_plan(config).host if i.name == "checkpoint being written"]
    assert 0.98 * item.bytes <= sum(took) <= item.bytes


def test_whole_parameters_are_those_of_the_checkpoint(models):
    for name, folder in models.items():
        layout = {"dense": "pp2_dp2", "moe": "moe_ep2", "qwen2": "qwen2_tp2_pp2"}[name]
        plan = make_plan(configuration(layout, models))
        assert plan.parameters == sum(math.prod(t.info.shape) for t in open_hf(folder).tensors.values())


@pytest.mark.parametrize("name", ["dense", "moe", "qwen2"])
def test_engine_weights_and_payload_are_the_converters_bytes(name, models, tmp_path):
    hf_to_fp8(models[name], tmp_path / "fp8")
    written = sum(t.info.nbytes for t in open_hf(tmp_path / "fp8").tensors.values())
    table = NameTable(ModelSpec.from_hf_dir(models[name]))
    quantization = ModelSpec.from_hf_dir(tmp_path / "fp8").quantization
    assert weights_on_gpu(table, quantization, 2, tensor=1) == written
    assert traffic(table, quantization, 2**20).payload == written
    unquantized = sum(t.info.nbytes for t in open_hf(models[name]).tensors.values())
    assert weights_on_gpu(table, None, 2, tensor=1) == unquantized


def test_a_block_at_the_edge_has_a_whole_scale():
    linear, norm = "model.layers.0.mlp.down_proj.weight", "model.norm.weight"
    assert tensor_bytes(linear, (200, 300), QuantizationSpec(), 2) == 200 * 300 + 4 * 2 * 3
    assert tensor_bytes(linear, (200, 300), None, 2) == tensor_bytes(norm, (200, 300), QuantizationSpec(), 2) == 120_000


@pytest.mark.slow
def test_kv_cache_as_sglang_counts_it(models, tmp_path):
    folders = dict(models)
    for name in ("Qwen3-4B", "Qwen3-30B-A3B", "Qwen2.5-7B", "Llama-3.1-8B"):
        folders[name] = tmp_path / name
        folders[name].mkdir()
        source = Path(sys.modules["fp8slurm.models.known"].__file__).parent / f"{name}.json"
        (folders[name] / "config.json").write_text(source.read_text())
    env = dict(os.environ) | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}
    command = [sys.executable, str(HERE / "sglang_cell_size.py"), *map(str, folders.values())]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    sizes = json.loads(done.stdout.splitlines()[-1])
    for folder in folders.values():
        table = NameTable(ModelSpec.from_hf_dir(folder))
        for tp, expected in sizes[str(folder)].items():
            for kind, size in expected.items():
                engine = {"tensor_parallel_size": int(tp), "kv_cache": kind}
                config = RunConfig.model_validate({"engine": engine})
                assert engine_memory(config, table, None, 10**12, 0).kv_bytes_per_token == size, (folder, tp, kind)


@pytest.mark.parametrize("chunks", [1, 16])
def test_output_layer_peaks_are_those_of_the_code(chunks: int, monkeypatch: pytest.MonkeyPatch):
    tokens, vocabulary = 256, 4096
    monkeypatch.setattr("fp8slurm.trainer.logprobs.CHUNK_LOGITS", tokens * vocabulary // chunks)
    logits = torch.randn(tokens, vocabulary, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, vocabulary, (tokens,))
    kept: list[Any] = []

    def peak(work: Any) -> float:
        """Bytes a logit that were allocated at most, above those at the start."""
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
            work()
        events = [e for e in p.profiler.kineto_results.events() if e.name() == "[memory]"]
        now = most = 0
        for e in sorted(events, key=lambda e: e.start_ns()):
            now += e.nbytes()
            most = max(most, now)
        return most / (tokens * vocabulary)

    held_logits = 2
    forward = held_logits + peak(lambda: kept.append(vocab_parallel_logprobs(logits, labels, None, with_entropy=True)))
    backward = held_logits + peak(lambda: (kept[0][0] + kept[0][1]).sum().backward())
    assert backward == pytest.approx(memory.OUTPUT_LAYER + memory.OUTPUT_LAYER_CHUNK / chunks, rel=0.02)
    assert forward <= backward


def test_known_models_have_the_published_sizes():
    payloads = {}
    for name in known_models():
        table = NameTable(known_model(name))
        t = traffic(table, QuantizationSpec(), 2**29)
        payloads[name] = (round(t.bf16 / 1e9, 2), round(t.payload / 1e9, 2))
        assert t.quantized / t.quantized_bf16 <= 0.502
    assert payloads["Qwen3-4B"] == (8.04, 4.41)
    assert payloads["Qwen3-30B-A3B"] == (61.06, 31.17)
    assert payloads["Qwen3-0.6B"][0] == 1.19
    assert payloads["Qwen2.5-7B"][0] == 15.23 and payloads["Llama-3.1-8B"][0] == 16.06


TWO, FOUR = (
    [f"--slurm.{name}={n}" for name in ("gpus-per-node", "ranks-per-node")] + [f"--engine.per-node={n}"] for n in (2, 4)
)
BF16 = ["--fp8.backend=off", "--fp8.engine=bf16"]
EXPERTS = ["--slurm.nodes=1", *TWO[:2], "--engine.per-node=1", "--engine.tensor-parallel-size=2", "--engine.expert-parallel-size=2",
           "--engine.context-length=1024", "--parallel.tensor-parallel-size=2", "--parallel.expert-parallel-size=2", "--parallel.pipeline-parallel-size=1"]  # fmt: skip
SPLIT = ["--slurm.gpus-per-node=2", "--slurm.ranks-per-node=1", "--engine.per-node=1", "--engine.gpus=1", "--engine.placement=split",
         "--engine.context-length=2048", "--parallel.tensor-parallel-size=1", "--parallel.no-sequence-parallel", "--optim.moments=bfloat16",
         "--train.tokens-per-micro-batch=8192", "--engine.mem-fraction=0.6"]  # fmt: skip
# GB by nvidia-smi on the fullest GPU, training and with engines awake, in runs on H100s (2026-11-28, docs/plan.md). Of the one that
# is missing here, Qwen3-0.6B, plan is 12% too high in training.
SHOWN = {
    "4B, two GPUs": ("qwen3-4b-fp8", TWO, 62.8, 78.4),
    "4B, four GPUs": ("qwen3-4b-fp8", FOUR, 50.3, 76.2),
    "4B in BF16": ("qwen3-4b-fp8", [*TWO, *BF16], 52.6, 78.2),
    "4B, optimizer asleep": ("qwen3-4b-fp8", [*TWO, "--optim.sleep"], 61.5, 74.5),
    "eight layers of 30B-A3B": ("qwen3-30b-a3b-fp8", EXPERTS, 43.0, 74.2),
    "4B split": ("qwen3-4b-fp8", SPLIT, 68.3, 54.5),
}


@pytest.mark.parametrize("run", SHOWN)
def test_memory_is_within_a_tenth_of_what_gpus_showed(run: str, tmp_path: Path):
    recipe, flags, training, awake = SHOWN[run]
    if recipe != "qwen3-4b-fp8":
        shape = json.loads((Path(known.__file__).parent / "Qwen3-30B-A3B.json").read_text()) | {"num_hidden_layers": 8}
        (tmp_path / "config.json").write_text(json.dumps(shape))
        flags = [*flags, f"--model.hf-checkpoint={tmp_path}"]
    else:
        flags = ["--engine.mem-fraction=0.85", *flags]
    flags = [*flags, "--data.max-prompt-tokens=64", "--rollout.max-tokens=512"]
    train, *_, rollout = make_plan(parse(recipe, flags)).fits[0].phases
    assert train.name.startswith("train") and rollout.name.startswith("sync and rollout")
    assert train.bytes / 1e9 == pytest.approx(training, rel=0.1)
    assert rollout.bytes / 1e9 == pytest.approx(awake, rel=0.1)


def test_in_reserve_is_a_share_of_what_only_a_step_takes():
    memory_of = lambda *flags: make_plan(parse("qwen3-4b-fp8", flags)).stages[0].memory  # noqa: E731
    one = ["--parallel.tensor-parallel-size=1", "--parallel.no-sequence-parallel"]
    bf16 = ["--fp8.backend=off", "--fp8.engine=bf16"]
    for flags, share in (([], 0.25), (one, 0.15), (bf16, 0.10), ([*one, *bf16], 0.02)):
        m = memory_of(*flags)
        (item,) = [i for i in m.working if i.name == "in reserve"]
        passing = m.working_bytes - item.bytes + sum(i.bytes for i in m.state if i.name in memory.PASSING)
        assert item.bytes == pytest.approx(share * passing)
