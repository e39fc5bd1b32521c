"""Bad input is refused before anything is started: the message names key, value and what is allowed."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import random_weights, write_model
from tiny_task import write_data

from fp8slurm.check.preflight import _lengths, _yarn_warnings, preflight
from fp8slurm.checkpoint import hf_to_fp8
from fp8slurm.cli import main
from fp8slurm.config import RunConfig, parse
from fp8slurm.models.config_json import Yarn
from fp8slurm.models.known import known_model


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


def test_a_teacher_that_cannot_score_the_samples_is_refused(tiny, tmp_path):
    teacher = tmp_path / "teacher"
    shutil.copytree(tiny / "model", teacher)
    asked = ("--teacher.checkpoint", str(teacher), "--rollout.no-drop-no-signal")
    preflight(parse("tiny-fp8", flags(tiny, *asked, "--algorithm.advantage", "none", "--rollout.n-samples", "1")))
    assert "--rollout.drop-no-signal: groups of equal rewards" in refused(tiny, *asked[:2])
    assert "--rollout.temperature 0.7" in refused(tiny, *asked, "--rollout.temperature", "0.7")
    assert "no config.json" in refused(tiny, "--teacher.checkpoint", str(tmp_path), *asked[2:])
    tokenizer = json.loads((teacher / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    (first, a), (second, b) = list(vocabulary.items())[:2]
    vocabulary |= {first: b, second: a}
    (teacher / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert f"{first!r} is {b} there and {a} here" in refused(tiny, *asked)


def test_the_trainers_folder_is_checked_before_anything_is_queued(tiny, tmp_path):
    """It was read by the job's ranks only."""
    model = tmp_path / "model"
    shutil.copytree(tiny / "model", model)
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"

    def says(changed: dict) -> str:
        save_file(changed, model / "model.safetensors", metadata={"format": "pt"})
        return refused(tiny, "--model.hf-checkpoint", str(model))

    assert f"{model}: no tensor {name}, which Qwen3ForCausalLM needs" in says(
        {k: v for k, v in tensors.items() if k != name}
    )
    assert f"{name} is [512, 256], config.json makes it [256, 512]" in says(
        tensors | {name: tensors[name].T.contiguous()}
    )
    assert f"{name} is int8; allowed: bfloat16" in says(tensors | {name: tensors[name].to(torch.int8)})
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:100_000])
    assert "truncated" in refused(tiny, "--model.hf-checkpoint", str(model))


def test_two_ways_of_asking_for_memory_are_refused(tiny):
    more = ["--slurm.memory", "8G", "--slurm.sbatch", "mem-per-cpu", "2G"]
    assert "--slurm.memory 8G with --slurm.sbatch mem-per-cpu 2G: sbatch takes one of them" in refused(tiny, *more)


def test_the_end_of_a_turn_that_no_config_lists_is_said(tiny, tmp_path):
    shutil.copytree(tiny / "model", tmp_path / "model")
    for name in ("config.json", "generation_config.json"):
        file = tmp_path / "model" / name
        file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": 256}))
    (warning,) = preflight(parse("tiny-fp8", flags(tiny, "--model.hf-checkpoint", str(tmp_path / "model"))))
    assert warning.startswith("token 258 (<|im_end|>) ends responses too")


def test_text_where_a_chat_template_is_gets_one_warning(tiny, tmp_path):
    plain, mixed = tmp_path / "plain.jsonl", tmp_path / "mixed.jsonl"
    plain.write_text(json.dumps({"prompt": "1|1=", "label": "1"}) + "\n")
    mixed.write_text(
        plain.read_text().replace("1|1", "2|1") + (tiny / "data" / "eval.jsonl").read_text().splitlines()[0] + "\n"
    )
    more = ["--data.train", str(plain), "--data.eval", str(mixed)]
    more += ["--rollout.prompts-per-step", "1", "--train.updates-per-step", "1"]
    (warning,) = preflight(parse("tiny-fp8", flags(tiny, *more)))
    assert warning.startswith("prompts that are text (1 of 1 of --data.train, 1 of 2 of --data.eval) are tokenized as")


def test_the_recipe_passes(tiny):
    assert preflight(parse("tiny-fp8", flags(tiny))) == []


@pytest.mark.parametrize(
    "more, says",
    [
        (["--model.hf-checkpoint", "no/where"], ["--model.hf-checkpoint", "no/where"]),
        (["--data.train", "no/where.jsonl"], ["--data.train", "no/where.jsonl"]),
        (["--data.eval", "no/where.jsonl"], ["--data.eval"]),
        (["--fp8.backend", "transformer_engine"], ["transformer_engine", "emulated"]),
        (["--fp8.param-gather", "--fp8.backend", "off"], ["--fp8.param-gather", "--fp8.no-param-gather"]),
        (["--fp8.param-gather", "--model.dtype", "float32"], ["--model.dtype float32", "--fp8.no-param-gather"]),
        (["--optim.cpu-offload", "--optim.no-distributed"], ["--optim.cpu-offload", "--optim.distributed"]),
        (["--optim.moments", "bfloat16"], ["--optim.moments bfloat16", "FusedAdam"]),
        (["--fp8.grouped", "deep_gemm"], ["--fp8.grouped deep_gemm", "--fp8.backend transformer_engine"]),
        (["--moe.aux-loss-coef", "0.01"], ["--moe.aux-loss-coef 0.01", "no experts"]),
        (["--moe.dispatcher", "flex"], ["--moe.dispatcher flex", "no experts"]),
        (["--rollout.routing-replay"], ["--rollout.routing-replay", "no experts"]),
        (["--parallel.tensor-parallel-size", "3", "--slurm.ranks-per-node", "3"], ["3", "heads"]),
        (["--parallel.tensor-parallel-size", "4", "--slurm.ranks-per-node", "4"], ["4"]),
        (["--parallel.pipeline-parallel-size", "4", "--slurm.ranks-per-node", "4"], ["4", "layers"]),
        (["--parallel.tensor-parallel-size", "2", "--slurm.ranks-per-node", "3"], ["3"]),
        (
            ["--parallel.context-parallel-size", "2", "--slurm.ranks-per-node", "3"],
            ["3 ranks", "--parallel.context-parallel-size 2", "a multiple of 2", "--slurm.ranks-per-node"],
        ),
        (
            ["--parallel.context-parallel-size", "64", "--slurm.ranks-per-node", "64", "--rollout.max-tokens", "32"],
            ["--parallel.context-parallel-size 64", "128 pieces", "longest has 96 tokens", "allowed: at most 48"],
        ),
        (["--parallel.expert-parallel-size", "2"], ["--parallel.expert-parallel-size"]),
        (["--engine.tensor-parallel-size", "8"], ["--engine.tensor-parallel-size 8", "128"]),
        (["--engine.expert-parallel-size", "2"], ["--engine.expert-parallel-size 2", "without experts"]),
        (
            ["--rollout.max-tokens", "65"],
            ["--data.max-prompt-tokens 64", "--rollout.max-tokens 65", "129", "--engine.context-length 128"],
        ),
        (
            ["--rollout.stop-token-ids", "0", "151645", "-1"],
            ["--rollout.stop-token-ids 151645 -1", "tokens; allowed: 0 to"],
        ),
        (["--rollout.truncated", "soft"], ["--rollout.truncated soft with --rollout.overlong-buffer None", "4096"]),
        (["--rollout.overlong-buffer", "4"], ["--rollout.truncated mask with --rollout.overlong-buffer 4", "neither"]),
        (
            ["--rollout.truncated", "soft", "--rollout.overlong-buffer", "64", "--rollout.max-tokens", "32"],
            ["--rollout.overlong-buffer 64", "--rollout.max-tokens 32", "at most that"],
        ),
        (["--eval.tasks", "gsm8k"], ["--eval.tasks gsm8k: give its questions: gsm8k=FILE (nothing"]),
        (["--eval.tasks", "nope"], ["--eval.tasks nope: no such task; allowed: aime-2024", "(with =FILE), a file"]),
        (["--eval.tasks", "gsm8k=no.jsonl"], ["--eval.tasks gsm8k=no.jsonl: there is no file no.jsonl"]),
        (["--eval.max-tokens", "100"], ["--eval.max-tokens 100", "164"]),
        (["--engine.context-length", "2048"], ["--engine.context-length 2048", "1024 positions"]),
        (["--data.max-prompt-tokens", "1020", "--engine.context-length", "None"], ["the model's 1024 positions"]),
        (
            ["--slurm.gpus-per-node", "2"],
            ["--slurm.gpus-per-node 2", "this machine has 0 GPUs", "--slurm.executor slurm"],
        ),
        (
            ["--engine.per-node", "3", "--slurm.gpus-per-node", "2"],
            ["--engine.per-node 3", "= 3 GPUs", "--slurm.gpus-per-node 2"],
        ),
        (
            ["--engine.placement", "split", "--engine.gpus", "2", "--slurm.gpus-per-node", "3"],
            ["--engine.placement split", "--slurm.gpus-per-node 3"],
        ),
        (
            ["--rollout.max-staleness", "1", "--slurm.gpus-per-node", "2", "--fp8.backend", "off"],
            ["--rollout.max-staleness 1", "--engine.placement shared", "allowed: 0", "--engine.placement split"],
        ),
        (["--rollout.max-staleness", "1", "--control.freeze-engine"], ["--control.freeze-engine"]),
        (["--rollout.max-staleness", "2", "--run.deterministic"], ["--run.deterministic", "depends on the clock"]),
        (
            ["--rollout.max-staleness", "2", "--run.no-deterministic", "--sync.pause-mode", "in_place"],
            ["in_place", "allowed: 0 or 1"],
        ),
        (["--rollout.oversample", "1.5"], ["--rollout.oversample 1.5", "--rollout.max-staleness 1 or more"]),
        (["--rollout.partial", "mask"], ["--rollout.partial mask without --rollout.oversample"]),
        (
            ["--rollout.oversample", "2", "--rollout.max-staleness", "1", "--run.deterministic"],
            ["--rollout.oversample 2", "--run.deterministic"],
        ),
        (["--sync.transport", "nccl"], ["--sync.transport nccl", "shared", "--engine.placement split"]),
        (["--slurm.nodes", "2"], ["--slurm.nodes 2"]),
        (["--slurm.gpu-type", "h100"], ["--slurm.gpu-type h100", "--slurm.gpus-per-node"]),
        (["--slurm.sbatch", "array", "0-3"], ["--slurm.sbatch array 0-3", "a run is one job"]),
        (["--sync.transport", "cuda-ipc"], ["--sync.transport cuda-ipc", "--slurm.gpus-per-node", "gloo"]),
        (
            ["--sync.transport", "shared-memory", "--sync.keep-last-update", "True"],
            ["--sync.keep-last-update", "nothing to keep"],
        ),
        (["--sync.delta", "--sync.transport", "shared-memory"], ["--sync.delta", "shared-memory", "--sync.no-delta"]),
        (["--sync.delta", "--sync.keep-last-update", "False"], ["--sync.delta", "--sync.keep-last-update=False"]),
        (
            ["--sync.delta", "--slurm.gpus-per-node", "2", "--fp8.backend", "off", "--sync.transport", "gloo"],
            ["--sync.delta", "engines that sleep", "--engine.sleep=False"],
        ),
        (
            ["--sync.delta", "--slurm.gpus-per-node", "2", "--fp8.backend", "off"],
            ["--sync.delta", "--sync.transport cuda-ipc", "allowed: --sync.no-delta"],
        ),
        (["--sync.delta", "--control.freeze-engine"], ["--sync.delta", "--control.freeze-engine"]),
        (["--engine.sleep", "True"], ["--engine.sleep", "share GPUs"]),
        (["--data.label-key", "answer"], ["answer", "train.jsonl:1", "label"]),
        (["--reward.kind", "nonsense"], ["nonsense"]),
        (["--reward.kind", "no_such_module:f"], ["no_such_module"]),
        (["--run.steps", "0", "--sft.data", "None"], ["--run.steps 0"]),
        (["--rollout.temperature", "0"], ["--rollout.temperature 0"]),
        (["--rollout.n-samples", "1"], ["--rollout.n-samples 1", "2 or more"]),
        (["--sft.max-steps", "0"], ["--sft.max-steps"]),
        (["--algorithm.dual-clip", "0.5"], ["--algorithm.dual-clip 0.5", "above 1"]),
        (["--optim.schedule", "cosine", "--optim.min-lr", "1"], ["--optim.min-lr 1", "would rise"]),
        (
            ["--train.updates-per-step", "65"],
            ["--train.updates-per-step 65", "--rollout.prompts-per-step 64", "whole groups"],
        ),
        (["--slurm.sbatch", "job-name", "mine"], ["--slurm.sbatch job-name"]),
        (["--slurm.sbatch", "no_requeue", "True"], ["--slurm.sbatch no_requeue"]),
        (["--slurm.sbatch", "chdir", "/scratch"], ["--slurm.sbatch chdir /scratch", "relative paths"]),
        (["--slurm.time", "99999999999"], ["--slurm.time 99999999999", "35791394 minutes"]),
        (["--slurm.executor", "slurm", "--run.name", "a%j"], ["--run.name a%j", "paths of logs"]),
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
        (["--sft.data", "None"], "sft.max_steps 200 without sft.data"),
        (
            ["--slurm.executor", "slurm", "--slurm.time", "5", "--slurm.signal-delay-s", "200"],
            "slurm.signal_delay_s 200: the notice comes 100 s",
        ),
        (["--optim.min-lr", "1e-7"], "optim.min_lr 1e-07 with optim.schedule constant"),
        (["--run.steps", "3"], "optim.warmup_steps 3 of run.steps 3"),
        (["--rollout.max-replacements", "2", "--rollout.no-drop-no-signal"], "rollout.max_replacements 2 without"),
        (["--checkpoint.every", "20", "--checkpoint.keep-every", "50"], "multiples of 100"),
    ],
)
def test_warnings(tiny, more, says):
    (warning,) = preflight(parse("tiny-fp8", flags(tiny, *more)))
    assert says in warning


def test_a_rollout_checkpoint_has_a_precision_of_its_own(tiny, tmp_path):
    hf_to_fp8(tiny / "model", tmp_path / "fp8")
    given = ["--model.rollout-checkpoint", str(tmp_path / "fp8")]
    assert preflight(parse("tiny-fp8", flags(tiny, *given, "--fp8.engine", "fp8"))) == []
    assert "--fp8.engine bf16" in refused(tiny, *given, "--fp8.engine", "bf16")


def test_a_full_disk_is_said_before_anything_starts(tiny, monkeypatch):
    usage = shutil.disk_usage(tiny)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=60_000_000))
    (warning,) = preflight(parse("tiny-fp8", flags(tiny)))
    assert "run.root runs has 0.1 GB free; checkpoint.keep_last + 1 checkpoints" in warning
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=80_000_000))
    assert preflight(parse("tiny-fp8", flags(tiny))) == []


def test_experts(tiny, tmp_path, monkeypatch):
    """The recipe's layout passes for a mixture of experts; what is wrong with one is said."""
    (tmp_path / "moe").mkdir()
    write_model(tmp_path / "moe", moe=True)
    given = [*flags(tiny), "--model.hf-checkpoint", str(tmp_path / "moe")]
    assert preflight(parse("tiny-moe-fp8", given)) == []
    assert preflight(parse("tiny-moe-fp8", [*given, "--moe.aux-loss-coef", "0.01"])) == []
    for more, says in [
        (["--moe.dispatcher", "flex"], "--moe.dispatcher flex: DeepEP"),
        (["--parallel.expert-parallel-size", "3", "--slurm.ranks-per-node", "3"], "--parallel.expert-parallel-size 3"),
        (["--parallel.expert-tensor-parallel-size", "4", "--slurm.ranks-per-node", "8"], "inside a 128-wide FP8 block"),
        (["--parallel.tensor-parallel-size", "2"], "--parallel.sequence-parallel"),
    ]:
        with pytest.raises(ValueError, match=says):
            preflight(parse("tiny-moe-fp8", [*given, *more]))
    monkeypatch.setattr("fp8slurm.check.preflight._installed", lambda package, file: False)
    with pytest.raises(ValueError, match="--rollout.routing-replay: the installed SGLang does not return the experts"):
        preflight(parse("tiny-moe-fp8", given))
    assert preflight(parse("tiny-moe-fp8", [*given, "--rollout.no-routing-replay"])) == []


def test_an_ffn_that_cuts_a_block_at_this_tp(tiny, tmp_path):
    shutil.copytree(tiny / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["intermediate_size"] = 384  # 3 blocks
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    save_file(random_weights(config, 0), tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
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
    assert 'backend = "emulated"' in out and "2 ranks + 1 rollout worker" in out and "nothing was started" in out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("recipe", ["qwen3-4b-fp8", "qwen3-4b-fp8-32k", "qwen3-30b-a3b-fp8"])
def test_a_headline_recipe_is_refused_here_in_a_sentence_and_described_all_the_same(
    recipe, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)  # no checkpoint, no data
    assert main(["train", "--recipe", recipe]) == 2
    assert "--model.hf-checkpoint models/Qwen3-" in capsys.readouterr().err
    assert main(["train", "--recipe", recipe, "--dry-run"]) == 2, "a script that checks first must see it"
    out, err = capsys.readouterr()
    first, _, rest = err.partition("a start would be refused here: ")
    assert rest.startswith("--model.hf-checkpoint") and "--data.train" in rest
    assert "warning" in first and "warning" not in rest, "they come last"
    for words in ('backend = "transformer_engine"', "#SBATCH", "GB a GPU", "an update", "nothing was started"):
        assert words in out, words
    assert not list(tmp_path.iterdir())


def test_a_folder_without_config_is_refused_by_name(tiny, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused(tiny, "--model.hf-checkpoint", str(tmp_path / "empty"))
    assert "config.json" in refused(tiny, "--model.rollout-checkpoint", str(tmp_path / "empty"))


def test_a_dry_run_of_an_impossible_layout_is_an_error(tiny, capsys):
    layout = ["--parallel.tensor-parallel-size", "3", "--slurm.ranks-per-node", "3"]
    assert main(["train", "--recipe", "tiny-fp8", "--dry-run", *flags(tiny, *layout)]) == 2
    assert "heads" in capsys.readouterr().err


def test_bad_input_gives_one_sentence_and_status_2(tiny, capsys):
    assert main(["train", "--recipe", "tiny-fp8", *flags(tiny, "--data.train", "no/where.jsonl")]) == 2
    said, sentence = capsys.readouterr().err.splitlines()
    assert said.endswith("checking settings, model and data")
    assert sentence.startswith("fp8slurm train: --data.train")


def test_yarn_and_the_lengths_of_a_run():
    spec = replace(known_model("Qwen3-4B"), yarn=Yarn(2.0, 32768))
    assert spec.max_position_embeddings == 40960

    def run(prompt, response, **engine):
        return RunConfig(data={"max_prompt_tokens": prompt}, rollout={"max_tokens": response}, engine=engine)

    _lengths(run(1024, 32768), spec)
    with pytest.raises(ValueError, match="= 41025 do not fit the model's 40960 positions"):
        _lengths(run(1025, 40000), spec)
    with pytest.raises(ValueError, match="= 41025 do not fit the 40000 positions that config.json's YaRN reaches"):
        _lengths(run(1025, 40000), replace(spec, yarn=Yarn(1.25, 32000), max_position_embeddings=131072))
    (stop,) = _yarn_warnings(run(1024, 32768), spec)
    assert "factor 2 of 32768 positions) reaches 65536" in stop and "max_position_embeddings 40960" in stop
    (short,) = _yarn_warnings(run(1024, 1024), replace(spec, max_position_embeddings=65536))
    assert "has 2048 tokens" in short and "without rope_scaling" in short
    assert _yarn_warnings(run(1024, 1024), replace(spec, yarn=None)) == []


def test_fixed_scales_have_to_be_in_the_engines_folder(tiny, tmp_path):
    fixed = ("--engine.kv-cache", "fp8", "--engine.kv-scales", "fixed")
    assert "--engine.kv-scales fixed without --model.rollout-checkpoint" in refused(tiny, *fixed)
    hf_to_fp8(tiny / "model", tmp_path / "fp8", verify=False)
    asked = flags(tiny, *fixed, "--model.rollout-checkpoint", str(tmp_path / "fp8"))
    file = tmp_path / "fp8" / "model.safetensors"
    scales = {f"model.layers.{n}.self_attn.{x}_scale": torch.tensor([0.5]) for n in range(2) for x in "kv"}
    last = "model.layers.1.self_attn.v_scale"
    for left_out in (last, None):
        save_file(load_file(file) | {k: v for k, v in scales.items() if k != left_out}, file, metadata={"format": "pt"})
        if left_out:
            with pytest.raises(ValueError, match=rf"has no {last}; allowed with this folder: calibrated, unit"):
                preflight(parse("tiny-fp8", asked))
        else:
            preflight(parse("tiny-fp8", asked))
