"""Bad input is refused before anything is started: the message names key, value and what is allowed."""

import json
import shutil
from pathlib import Path

import pytest
from fp8slurm.cli import main
from fp8slurm.config import parse
from fp8slurm.rl.tiny_task import write_data
from fp8slurm.models.tiny import write_model
from fp8slurm.slurm.preflight import preflight


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "model").mkdir()
    (folder / "data").mkdir()
    write_model(folder / "model")
    write_data(folder / "data")
    return folder


def flags(tiny: Path, *more: str) -> list[str]:
    d = tiny / "data"
    return ["--model.hf-checkpoint", str(tiny / "model"), "--data.train", str(d / "train.jsonl"), "--data.eval", str(d / "eval.jsonl"),
            "--sft.data", str(d / "sft.jsonl"), *more]  # fmt: skip


def refused(tiny: Path, *more: str) -> str:
    with pytest.raises(ValueError) as error:
        preflight(parse("tiny-fp8", flags(tiny, *more)))
    return str(error.value)


def test_the_recipe_passes(tiny):
    assert preflight(parse("tiny-fp8", flags(tiny))) == []


@pytest.mark.parametrize(
    "more, says",
    [
        (["--model.hf-checkpoint", "no/where"], ["--model.hf-checkpoint", "no/where"]),
        (["--data.train", "no/where.jsonl"], ["--data.train", "no/where.jsonl"]),
        (["--data.eval", "no/where.jsonl"], ["--data.eval"]),
        (["--fp8.backend", "transformer_engine"], ["transformer_engine", "emulated"]),
        (["--fp8-param-gather"], ["--fp8.param-gather", "--fp8.no-param-gather"]),
        (["--optim.cpu-offload"], ["--optim.cpu-offload"]),
        (["--parallel.tensor-parallel-size", "3", "--slurm.ranks-per-node", "3"], ["3", "heads"]),
        (["--parallel.tensor-parallel-size", "4", "--slurm.ranks-per-node", "4"], ["4"]),
        (["--parallel.pipeline-parallel-size", "4", "--slurm.ranks-per-node", "4"], ["4", "layers"]),
        (["--parallel.tensor-parallel-size", "2", "--slurm.ranks-per-node", "3"], ["3"]),
        (["--parallel.expert-parallel-size", "2"], ["--parallel.expert-parallel-size"]),
        (["--engine.tensor-parallel-size", "4"], ["--engine.tensor-parallel-size 4", "128"]),
        (["--slurm.nodes", "2"], ["--slurm.nodes 2"]),
        (["--data.label-key", "answer"], ["answer", "train.jsonl:1", "label"]),
        (["--reward.kind", "nonsense"], ["nonsense"]),
        (["--reward.kind", "no_such_module:f"], ["no_such_module"]),
        (["--run.steps", "0", "--sft.data", "None"], ["--run.steps 0"]),
        (["--rollout.temperature", "0"], ["--rollout.temperature 0"]),
        (["--rollout.n-samples", "1"], ["--rollout.n-samples 1", "2 or more"]),
        (["--sft.max-steps", "0"], ["--sft.max-steps"]),
        (["--algorithm.dual-clip", "0.5"], ["dual_clip 0.5", "above 1"]),
    ],
)
def test_refusals(tiny, more, says):
    text = refused(tiny, *more)
    for word in says:
        assert word in text, text


@pytest.mark.parametrize(
    "more, says",
    [
        (["--rollout.top-p", "0.9"], "rollout.top_p"),
        (["--engine.max-running-requests", "100"], "engine.max_running_requests 100"),
        (["--sft.eval-every", "0"], "sft.stop_accuracy"),
    ],
)
def test_warnings(tiny, more, says):
    (warning,) = preflight(parse("tiny-fp8", flags(tiny, *more)))
    assert says in warning


def test_an_ffn_that_cuts_a_block_at_this_tp(tiny, tmp_path):
    shutil.copytree(tiny / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["intermediate_size"] = 384  # 3 blocks
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    layout = ["--parallel.tensor-parallel-size", "2", "--model.hf-checkpoint", str(tmp_path / "model")]
    assert "384" in refused(tiny, *layout) and "128" in refused(tiny, *layout)
    preflight(parse("tiny-fp8", flags(tiny, *layout, "--fp8.backend", "off", "--fp8.engine", "bf16")))


def test_empty_data_and_bad_lines(tiny, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    assert "empty" in refused(tiny, "--data.train", str(empty))
    bad = tmp_path / "bad.jsonl"
    bad.write_text((tiny / "data" / "train.jsonl").read_text().splitlines()[0] + "\n{\n")
    assert f"{bad}:2" in refused(tiny, "--data.train", str(bad))
    preflight(parse("tiny-fp8", flags(tiny, "--data.train", str(bad), "--data.on-bad-line", "skip")))


def test_messages_without_a_chat_template(tiny, tmp_path):
    shutil.copytree(tiny / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(config))
    assert "chat template" in refused(tiny, "--model.hf-checkpoint", str(tmp_path / "model"))


def test_foreign_quantization_is_refused_naming_it(tiny, tmp_path):
    shutil.copytree(tiny / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [64, 64],
    }
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    text = refused(tiny, "--model.rollout-checkpoint", str(tmp_path / "model"))
    assert "[64, 64]" in text and "[128, 128]" in text


def test_contradicting_environment(tiny, monkeypatch):
    monkeypatch.setenv("NVTE_FP8_BLOCK_SCALING_FP32_SCALES", "0")
    assert "NVTE_FP8_BLOCK_SCALING_FP32_SCALES=0" in refused(tiny)


def test_dry_run_prints_and_starts_nothing(tiny, tmp_path, capsys):
    assert main(["train", "--recipe", "tiny-fp8", "--dry-run", *flags(tiny, "--run.root", str(tmp_path / "runs"))]) == 0
    out = capsys.readouterr().out
    assert 'backend = "emulated"' in out and "2 ranks + 1 agent" in out and "nothing was started" in out
    assert not (tmp_path / "runs").exists()


def test_bad_input_gives_one_sentence_and_status_2(tiny, capsys):
    assert main(["train", "--recipe", "tiny-fp8", *flags(tiny, "--data.train", "no/where.jsonl")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("fp8slurm train: --data.train") and "Traceback" not in err
