"""`fp8slurm plan`: what a person gets to see."""

import io
import json
import re

import pytest
from rich.console import Console

from fp8slurm.cli import main
from fp8slurm.config import parse, recipe_names
from fp8slurm.models.known import find_spec, known_models
from fp8slurm.plan import make_plan
from fp8slurm.plan.parameters import Layout
from fp8slurm.plan.report import row, show, summary


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    """No checkpoint and no data are here."""
    monkeypatch.chdir(tmp_path)


def plan_of(recipe, *flags):
    return make_plan(parse(recipe, flags))


HEADLINE = ["qwen3-4b-fp8", "qwen3-30b-a3b-fp8"]


@pytest.mark.parametrize("name", [n for n in recipe_names() if not n.startswith("tiny")])
def test_every_recipe_of_a_known_model_is_planned_and_fits(name):
    plan = plan_of(name)
    assert plan.fits and all(fit.fits for fit in plan.fits)
    assert plan.traffic.ratio <= 0.55 and plan.traffic.quantized / plan.traffic.quantized_bf16 <= 0.502
    assert not plan.traffic.unaligned
    # Every sample of a step at its longest at once on an H200; on an H100 nearly: the last few wait in the engine's
    # queue, and docs/qwen3-4b.md says so.
    for fit in plan.fits:
        whole = fit.engine.kv_tokens // plan.longest_sequence
        assert whole >= plan.samples_per_engine * (1 if fit.gpu == "H200" else 0.9)


@pytest.mark.parametrize("width", [80, 100, 160])
@pytest.mark.parametrize("name", HEADLINE)
def test_tables_fit_the_terminal_and_cut_no_number(name, width):
    console = Console(width=width, record=True, file=io.StringIO())
    plan = plan_of(name)
    show(plan, console)
    text = console.export_text()
    assert max(len(line) for line in text.splitlines()) <= width
    assert "…" not in text
    for words in (
        "output layer",
        "gradients",
        "H100 of 80.0",
        "KV cache, tokens",
        "252 matrices" if "4b" in name else "18,624 matrices",
    ):
        assert words in re.sub(r"\s+", " ", text), words
    assert "by the folder's name" in re.sub(r"\s+", " ", text)


def test_json_has_the_same_figures(capsys):
    assert main(["plan", "--recipe", "qwen3-4b-fp8", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    plan = plan_of("qwen3-4b-fp8")
    assert values["traffic"]["payload"] == plan.traffic.payload == 4_412_507_392
    assert values["layout"]["data"] == 4 and values["fits"][0]["fits"] is True
    assert values["stages"][0]["memory"]["state"][0] == {
        "name": "weights", "bytes": plan.stages[0].memory.state[0].bytes, "basis": "exact", "note": "BF16",
    }  # fmt: skip


def test_a_gpu_that_is_too_small_is_said_to_be(capsys):
    assert main(["plan", "--recipe", "qwen3-4b-fp8", "--gpu-memory", "30"]) == 0
    assert "does not fit" in capsys.readouterr().out
    assert "no room for a KV cache" in summary(make_plan(parse("qwen3-4b-fp8", []), {"tiny": 9_000_000_000}))


def test_a_row_for_comparisons(capsys):
    assert main(["plan", "--recipe", "qwen3-4b-fp8", "--row", "as it is"]) == 0
    line = capsys.readouterr().out.strip()
    assert line.startswith("| as it is | 2.011 G |") and line.endswith("| H100, H200 |") and line.count("|") == 12
    assert line == row(plan_of("qwen3-4b-fp8"), "as it is")


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--model.hf-checkpoint", "models/Qwen9-1B"], ["models/Qwen9-1B", "Qwen3-4B", "--model.hf-checkpoint"]),
        (["--model.hf-checkpoint", "None"], ["--model.hf-checkpoint is not set", "Qwen3-4B"]),
        (["--parallel.tensor-parallel-size", "8"], ["9728", "128", "1, 2, 4"]),
        (["--parallel.pipeline-parallel-size", "8"], ["36", "layers"]),
        (["--slurm.ranks-per-node", "4"], ["--slurm.ranks-per-node 4", "--slurm.gpus-per-node 8"]),
        (["--engine.tensor-parallel-size", "8", "--engine.per-node", "1"], ["--engine.tensor-parallel-size 8", "FFN"]),
        (["--gpu-memory", "0"], ["--gpu-memory"]),
    ],
)
def test_refusals(flags, says, capsys):
    assert main(["plan", "--recipe", "qwen3-4b-fp8", *flags]) == 2
    err = capsys.readouterr().err
    assert err.startswith("fp8slurm plan: ") and "Traceback" not in err
    for words in says:
        assert words in err, err


def test_shape_comes_from_the_checkpoint_where_there_is_one(tmp_path):
    folder = tmp_path / "Qwen3-4B"
    folder.mkdir()
    known, source = find_spec(folder)
    assert "published shape" in source and known.hidden_size == 2560
    from fp8slurm.models.tiny import model_config

    (folder / "config.json").write_text(json.dumps(model_config()))
    spec, source = find_spec(folder)
    assert spec.hidden_size == 256 and source == f"{folder}/config.json"
    assert known_models() == ["Qwen3-0.6B", "Qwen3-30B-A3B", "Qwen3-4B"]


def test_more_tensor_parallelism_than_blocks_is_listed_as_gathered():
    plan = plan_of(
        "qwen3-4b-fp8", "--parallel.tensor-parallel-size", "8", "--fp8.backend", "off", "--fp8.engine", "fp8"
    )
    assert len(plan.traffic.unaligned) == 3 * 36
    inside = {a.matrix for a in plan.alignment if a.cut_by in a.not_aligned}
    assert inside == {"gate_proj", "up_proj", "down_proj"}


def test_split_placement_lists_two_kinds_of_gpus():
    flags = [
        "--engine.placement",
        "split",
        "--engine.gpus",
        "4",
        "--engine.per-node",
        "4",
        "--slurm.ranks-per-node",
        "4",
    ]
    plan = plan_of("qwen3-4b-fp8", *flags)
    assert [p.name for p in plan.fits[0].phases] == [
        "train (trainer's GPU)", "sync (trainer's GPU)", "sync and rollout (engine's GPU)",
    ]  # fmt: skip
    assert plan.layout == Layout(4, 2, 1, 1, 1, True)


def test_recomputation_offload_and_stages_move_what_they_should():
    def on_gpu(plan, kind):
        return [sum(i.bytes for i in (*s.memory.state, *s.memory.working) if i.name == kind) for s in plan.stages]

    full, none = plan_of("qwen3-4b-fp8"), plan_of("qwen3-4b-fp8", "--train.recompute", "none")
    assert on_gpu(none, "activations")[0] > 10 * on_gpu(full, "layer inputs")[0]
    offloaded = plan_of("qwen3-4b-fp8", "--optim.cpu-offload")
    (held,) = (i.bytes for i in offloaded.host if i.name == "offloaded optimizer")
    # FP32 master, two moments and gradients on the host, for 12 bytes a parameter on each of 8 GPUs.
    assert on_gpu(offloaded, "optimizer") == [0] and held * 12 == 16 * 8 * on_gpu(full, "optimizer")[0]
    assert "offloaded optimizer" not in [i.name for i in full.host]
    staged = plan_of("qwen3-4b-fp8", "--parallel.pipeline-parallel-size", "4")
    assert (
        on_gpu(staged, "layer inputs")[0] == 4 * on_gpu(staged, "layer inputs")[3]
    )  # 4 micro-batches in flight, then 1
    assert on_gpu(staged, "output layer")[:3] == [0, 0, 0] < on_gpu(staged, "output layer")[3:]
    assert 0 < staged.pipeline[0].bubble < staged.pipeline[1].bubble < 1
