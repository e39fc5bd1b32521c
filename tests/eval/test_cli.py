import json
import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file

from fp8slurm.checkpoint import hf_to_fp8, hf_to_torch_dist
from fp8slurm.checkpoint.formats.kv_scales import FILE
from fp8slurm.cli import main
from fp8slurm.config import RunConfig
from fp8slurm.eval.checkpoints import prepare, recognize
from fp8slurm.eval.flags import engine_section
from fp8slurm.models.kv_scales import missing_scales


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    (folder / "hf").mkdir()
    tiny.write_model(folder / "hf")
    hf_to_fp8(folder / "hf", folder / "fp8", modules_to_not_convert=["model.layers.0"])
    hf_to_torch_dist(folder / "hf", folder / "dist")
    (folder / "q.jsonl").write_text('{"prompt": "1|2=", "label": "2"}\n')
    return folder


def seen(path, **given):
    return recognize(path, None, None, given.get("origin"), given.get("eval_dir"))


def test_a_checkpoint_is_recognized_by_its_contents(models, tmp_path):
    assert seen(models / "hf").kind == "Hugging Face" and seen(models / "fp8").kind == "Hugging Face, block FP8"
    dist = seen(models / "dist", origin=models / "fp8")
    assert (
        dist.kind == "torch_dist"
        and "model.layers.0.mlp.up_proj" in dist.keep
        and dist.tokenizer_folder == models / "fp8"
    )
    with pytest.raises(ValueError, match="--origin-hf-dir"):
        seen(models / "dist")
    with pytest.raises(ValueError, match="not recognized; allowed: a run"):
        seen(tmp_path)
    (tmp_path / "config.json").write_text('{"run": {"na')
    with pytest.raises(ValueError, match="config.json: not JSON"):
        seen(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="no such folder"):
        seen(tmp_path / "none")
    with pytest.raises(ValueError, match="no config.json there"):
        recognize(None, tmp_path, None, None, None)


def test_conversions_are_kept_until_the_source_changes(models, tmp_path):
    source = tmp_path / "hf"
    shutil.copytree(models / "hf", source)
    checkpoint = seen(source, eval_dir=tmp_path / "eval")
    assert prepare(checkpoint, "bf16") == (source, "as it is")
    folder, how = prepare(checkpoint, "fp8")
    assert how.startswith("converted: ") and folder == tmp_path / "eval" / "models" / "hf-fp8"
    assert prepare(checkpoint, "fp8") == (folder, "converted earlier")
    _, how = prepare(checkpoint, "fp8", ("model.layers.1",))
    assert how.startswith("converted: ") and "model.layers.1.mlp.up_proj.weight_scale_inv" not in load_file(
        folder / "model.safetensors"
    )
    assert prepare(checkpoint, "fp8")[1].startswith("converted: ")
    tiny.write_model(models / "hf", seed=0)  # the same bytes in the original: nothing was written there by us
    shutil.copy(models / "hf" / "model.safetensors", source / "model.safetensors")
    assert prepare(checkpoint, "fp8")[1].startswith("converted: "), "a newer file is another source"
    (folder.parent / "hf-fp8.source.json").unlink()  # a crash between conversion and note
    assert prepare(checkpoint, "fp8")[1].startswith("converted: ")
    back, _ = prepare(seen(models / "fp8", eval_dir=tmp_path / "eval"), "bf16")
    assert "quantization_config" not in json.loads((back / "config.json").read_text())


def test_torch_dist_becomes_what_the_folder_would(models, tmp_path):
    dist, _ = prepare(seen(models / "dist", origin=models / "hf", eval_dir=tmp_path), "fp8", ("model.layers.0",))
    assert (dist / "model.safetensors").read_bytes() == (models / "fp8" / "model.safetensors").read_bytes()


BAD = {
    "": "say what to evaluate",
    "--checkpoint {m}/hf": "say what to ask",
    "--checkpoint {m}/hf --tasks {m}/q.jsonl": "say how its answers are graded",
    "--checkpoint {m}/hf --tasks gsm8k": "--tasks gsm8k: give its questions: gsm8k=FILE or --data (nothing is downloaded)",
    "--checkpoint {m}/hf --tasks gsm8k=none.jsonl": "--tasks gsm8k=none.jsonl: there is no file none.jsonl",
    "--checkpoint {m}/hf --tasks {m}/q.jsonl --grader exact --chat-template-kwargs {{": "--chat-template-kwargs { is not JSON",
    "--checkpoint {m}/hf --tasks {m}/q.jsonl --grader exact --chat-template-kwargs x false": "--chat-template-kwargs x 'false' is text",
    "--checkpoint {m}/hf --tasks gsm8k math500 --data {m}/q.jsonl": "give each its own",
    "--checkpoint {m}/hf --tasks {m}/q.jsonl --grader maths": "not one of exact",
    "--checkpoint {m}/hf --tasks {m}/q.jsonl --grader exact --n-samples 4": "at temperature 0 are all the same",
    "--checkpoint {m}/hf --tasks {m}/q.jsonl --grader exact --n-samples 0": "--n-samples 0; allowed: 1 or more",
    "--checkpoint {m}/hf --tasks {m}/q.jsonl --grader exact --temperature=-1": "--temperature",
    "--checkpoint {m}/hf --tasks {m}/q.jsonl --grader exact --top-p 0": "--top-p",
    "--checkpoint {m}/hf --tasks {m}/q.jsonl --grader exact --fail-if-worse 0.1": "needs --precision both",
    "--checkpoint {m}/hf --tasks {m}/q.jsonl --grader exact --precision both --out x": "give --eval-dir",
    "--checkpoint {m}/hf --tasks {m}/q.jsonl --grader exact --nonsense 3": "--nonsense: no such flag",
    "--checkpoint {m}/hf --tasks {m}/q.jsonl {m}/q.jsonl --grader exact": "q is there twice",
    "--checkpoint {m}/hf --tasks {m}/q.jsonl --grader choice": "is no letter",
    "--checkpoint {m}/hf --tasks {m}/q.jsonl --grader exact --max-prompt-tokens 2": "has no question",
    "--checkpoint {m}/hf --tasks {m}/q.jsonl --grader generate": "keeps the rewards of --generate, which is not given",
    "--checkpoint {m}/hf --tasks {m}/q.jsonl --grader exact --generate json:dumps": "--generate json:dumps is called as",
    "--checkpoint {m}/hf --tasks {m}/q.jsonl --grader exact --nodes 2 --generate examples.lookup:generate": "leave --nodes out",
    "--run {m}/hf": "",
    "--checkpoint {m}/fp8 --tasks {m}/q.jsonl --grader exact --engine.kv-cache fp8": "fp8 has no model.layers.0.self_attn.k_scale",
    "--checkpoint {m}/dist --origin-hf-dir {m}/hf --tasks {m}/q.jsonl --grader exact --both-kv-caches": "dist/kv_scales.json, which",
    "--checkpoint {m}/hf --tasks {m}/q.jsonl --grader exact --both-kv-caches --precision both": "one difference at a time",
    "--checkpoint {m}/hf --tasks {m}/q.jsonl --grader exact --both-kv-caches --engine.kv-cache auto": "leave one of the two out",
    "--checkpoint {m}/hf --tasks {m}/q.jsonl --grader exact --engine.kv-scales unit": "takes the checkpoint's own scales",
    "--checkpoint {m}/hf --tasks {m}/q.jsonl --grader exact --engine.kv-cache fp8 --engine.extra-args=--attention-backend triton": "that backend is not known",
}


@pytest.mark.parametrize("line", BAD, ids=lambda line: line.replace("{m}/", ""))
def test_a_mistake_is_one_sentence_and_status_two(models, capsys, line):
    assert main(["eval", *line.format(m=models).split()]) == 2
    output = capsys.readouterr().err
    assert output.startswith("fp8slurm eval: ") and BAD[line] in output and "Traceback" not in output


def test_a_prompt_that_fills_the_context_is_refused_before_an_engine_starts(models, tmp_path, capsys):
    arguments = (
        f"--checkpoint {models}/hf --tasks {models}/q.jsonl --grader exact --precision bf16 --eval-dir {tmp_path}"
    )
    arguments += " --engine.context-length 4"
    assert main(["eval", *arguments.split()]) == 2
    assert "question 0 of q has 4 tokens, the engine's context 4" in capsys.readouterr().err


def test_dry_run_says_what_would_be_asked(models, tmp_path, capsys):
    arguments = f"--checkpoint {models}/hf --tasks {models}/q.jsonl --grader numeric --dry-run --eval-dir {tmp_path}/e"
    assert main(["eval", *arguments.split()]) == 0
    out = capsys.readouterr().out
    assert "q: 1 question of" in out and "grader numeric" in out and "'1|2='" in out and not (tmp_path / "e").exists()
    assert "\n1 sample in FP8, by 1 engine; results in " in out
    assert main(["eval", *arguments.split(), "--nodes", "2", "--precision", "both"]) == 0
    output = capsys.readouterr().out.splitlines()
    assert output[-2].startswith(
        "1 sample in BF16 and in FP8, by as many engines as the GPUs carry on each of 2 nodes; results in "
    )
    assert output[-1].startswith("as this step: srun --nodes=2 ") and "--dry-run" not in output[-1]


def test_scales_of_an_fp8_kv_cache_travel_in_the_checkpoint(models, tmp_path, capsys):
    """From a run's file beside torch_dist into the folders made of it, and from those into others."""
    shutil.copytree(models / "dist", tmp_path / "dist")
    (tmp_path / "dist" / FILE).write_text(json.dumps({"scales": [[0.5, 0.25], [4.0, 1.0]]}))
    dist = seen(tmp_path / "dist", origin=models / "hf", eval_dir=tmp_path)
    made = {precision: prepare(dist, precision)[0] for precision in ("fp8", "bf16")}
    hf_to_fp8(made["bf16"], tmp_path / "fp8")
    hf_to_torch_dist(made["fp8"], tmp_path / "again")
    wanted = {f"model.layers.{n}.self_attn.{x}_scale": s for n, pair in enumerate([(0.5, 0.25), (4.0, 1.0)])
              for x, s in zip("kv", pair)}  # fmt: skip
    for folder in (*made.values(), tmp_path / "fp8"):
        tensors = load_file(folder / "model.safetensors")
        assert {n: tensors[n].tolist() for n in wanted} == {n: [s] for n, s in wanted.items()}
        assert not missing_scales(tensors, 2) and all(tensors[n].dtype == torch.float32 for n in wanted)
    flags = f"--tasks {models}/q.jsonl --grader exact --dry-run --eval-dir {tmp_path}/e --checkpoint"
    for more in ("--engine.kv-cache fp8", "--both-kv-caches", "--both-kv-caches --precision bf16"):
        assert main(["eval", *flags.split(), str(made["fp8"]), *more.split()]) == 0
    assert "1 sample in FP8 with FP8 KV, by 1 engine" in (out := capsys.readouterr().out)
    assert "1 sample in FP8 and in FP8 with FP8 KV, by" in out and "in BF16 and in BF16 with FP8 KV" in out
    for text in ('{"scales": [[1, 1]]}', '{"scales": [[1, 1], [1, -1]]}'):
        (tmp_path / "dist" / FILE).write_text(text)
        with pytest.raises(ValueError, match="two positive scales for each of 2 layers"):
            prepare(dist, "fp8")


def test_a_run_with_an_fp8_kv_cache_is_evaluated_with_it() -> None:
    run = RunConfig.model_validate({"engine": {"kv_cache": "fp8", "kv_scales": "fixed", "per_node": 2}})
    assert (engine_section(run, []).kv_cache, engine_section(run, []).per_node) == ("fp8", 2)
    assert engine_section(run, ["--engine.kv-cache", "auto"]).kv_cache == "auto"
