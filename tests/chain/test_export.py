"""`fp8slurm export`: the converters' weights, and what makes others ask the model as its run did."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from fp8slurm.chain.serving import serving_files, with_defaults
from fp8slurm.checkpoint import hf_to_torch_dist, torch_dist_to_fp8, torch_dist_to_hf
from fp8slurm.cli import main
from fp8slurm.config import RunConfig
from fp8slurm.eval.checkpoints import files_stamp
from fp8slurm.run.directory import RunDirectory, RunState

ASKED = [{"role": "user", "content": "473|829="}]
THINKING = {"enable_thinking": False}


def save(run: RunDirectory, hf: Path, step: int) -> Path:
    """A checkpoint of a run with the weights of `hf`."""
    saving = run.begin_checkpoint(RunState("rl", step))
    hf_to_torch_dist(hf, saving / "made")
    for file in (saving / "made").iterdir():
        file.rename(saving / file.name)
    (saving / "made").rmdir()
    return run.commit_checkpoint(saving, RunState("rl", step))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two checkpoints with records, and its model beside it."""
    hf, path = tmp_path / "hf", tmp_path / "run"
    hf.mkdir()
    tiny.write_model(hf, seed=4)
    values = {
        "run": {"name": "run", "steps": 2, "root": str(tmp_path)}, "model": {"hf_checkpoint": str(hf)},
        "data": {"train": str(tmp_path / "train.jsonl"), "chat_template_kwargs": THINKING},
        "slurm": {"setup": ["export WANDB_API_KEY=secret"]},
    }  # fmt: skip
    directory = RunDirectory(path)
    directory.acquire()
    (path / "config.json").write_text(RunConfig.model_validate(values).model_dump_json())
    record = {"phase": "rl", "reward/mean": 0.25, "gap/mean_abs": 0.005, "eval/accuracy": 0.5}
    lines = [record | {"step": step, "reward/mean": 0.25 * step} for step in (0, 1, 2)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in (1, 2):
        save(directory, hf, step)
    return path


@pytest.mark.parametrize("form", ["hf", "fp8"])
def test_the_weights_are_the_converters_and_the_run_is_only_read(run: Path, tmp_path: Path, form: str, capsys) -> None:
    before = files_stamp(run)
    convert = torch_dist_to_fp8 if form == "fp8" else torch_dist_to_hf
    convert(run / "checkpoints" / "step_000002", tmp_path / "converted", origin_hf_dir=tmp_path / "hf")
    assert main(["export", str(run), *(["--fp8"] if form == "fp8" else [])]) == 0
    out = run / "export" / f"step_000002-{form}"
    assert f"{out}: step_000002 of {run}" in capsys.readouterr().out
    assert [x for x in files_stamp(run) if not x[0].startswith("export")] == before
    files = {p.name: p.read_bytes() for p in out.iterdir()}
    plain = {p.name: p.read_bytes() for p in (tmp_path / "converted").iterdir()}
    assert files.pop("README.md") and {n for n in plain if plain[n] != files[n]} == {"tokenizer_config.json"}
    assert sorted(files) == sorted(plain)

    assert main(["export", str(run), str(out)]) == 2
    assert "exists; give another folder, or --overwrite to replace it" in capsys.readouterr().err
    assert main(["export", str(run), str(out), "--checkpoint", "step_000001", "--overwrite"]) == 0
    assert "# run, step_000001" in (out / "README.md").read_text()


@pytest.mark.parametrize("where", ["tokenizer_config.json", "chat_template.jinja", "by name", "both"])
def test_whoever_serves_it_without_flags_asks_as_the_run_did(run: Path, tmp_path: Path, where: str) -> None:
    """Wherever the base model has its template; a request that says otherwise is obeyed."""
    hf = tmp_path / "hf"
    values = json.loads((hf / "tokenizer_config.json").read_text())
    template = values["chat_template"]
    if where in ("chat_template.jinja", "both"):
        (hf / "chat_template.jinja").write_text(template)
        if where == "chat_template.jinja":
            del values["chat_template"]
    elif where == "by name":
        values["chat_template"] = [{"name": n, "template": template} for n in ("default", "tool_use")]
    (hf / "tokenizer_config.json").write_text(json.dumps(values))
    assert main(["export", str(run), str(tmp_path / "out"), "--fp8"]) == 0
    base, out = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("hf", "out"))

    def asked(tokenizer: Any, **arguments: Any) -> str:
        return tokenizer.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True, **arguments)

    assert asked(out) == asked(base, **THINKING) != asked(base)
    assert asked(out, enable_thinking=True) == asked(base, enable_thinking=True) == asked(base)


VALUES = st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()


@given(
    st.dictionaries(st.sampled_from(["a", "enable_thinking", "reasoning_effort"]), VALUES),
    st.sampled_from(["", "\n", " \n"]),
)
def test_a_template_with_defaults_is_the_template_with_arguments(arguments: dict[str, Any], lead: str) -> None:
    template = lead + "{% for m in messages %}{{ m.content }}{% endfor %}"
    template += "".join(f"[{{{{ {name} | string }}}}]" for name in arguments)
    want, _ = render_jinja_template([ASKED], chat_template=template, **arguments)
    got, _ = render_jinja_template([ASKED], chat_template=with_defaults(template, arguments))
    assert got == want
    others = dict.fromkeys(arguments, "another")
    want, _ = render_jinja_template([ASKED], chat_template=template, **others)
    got, _ = render_jinja_template([ASKED], chat_template=with_defaults(template, arguments), **others)
    assert got == want


def test_what_cannot_be_a_default_is_refused_before_anything_is_written(run: Path, tmp_path: Path, capsys) -> None:
    config = json.loads((run / "config.json").read_text())
    config["data"]["chat_template_kwargs"] = {"not": 1}  # no name in Jinja; as an argument it is never looked at
    (run / "config.json").write_text(json.dumps(config))
    assert main(["export", str(run)]) == 2
    assert 'data.chat_template_kwargs {"not": 1} cannot be made the defaults' in capsys.readouterr().err
    assert not (run / "export").exists()


@pytest.mark.parametrize(
    "listed, written", [(None, [256, 258]), (256, [256, 258]), ([258, 256], None), (258, [256, 258])]
)
def test_every_token_that_ended_a_response_is_an_end_for_servers(tmp_path: Path, listed: Any, written: Any) -> None:
    """The engines also end at config.json's, the template's and rollout.stop_token_ids."""
    tiny.write_model(tmp_path)
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"temperature": 0.6} | ({} if listed is None else {"eos_token_id": listed})))
    config = RunConfig.model_validate({"rollout": {"stop_token_ids": [256]}})
    texts = serving_files(tmp_path, config)
    got = json.loads(texts[path.name]) if path.name in texts else None
    assert got == (None if written is None else {"temperature": 0.6, "eos_token_id": written})
    path.unlink()
    assert json.loads(serving_files(tmp_path, config)[path.name]) == {
        "bos_token_id": 256, "pad_token_id": 256, "eos_token_id": [256, 258],
    }  # fmt: skip
    assert serving_files(tmp_path, RunConfig()) == {}, "config.json says it already"


def test_the_card_has_the_figures_of_its_checkpoint_and_no_place(run: Path, tmp_path: Path) -> None:
    assert main(["export", str(run), str(tmp_path / "out"), "--checkpoint", "step_000001"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    for said in ("| 0.125 ", "train.jsonl", "| 0.500 ", "0.005 nats", "`enable_thinking = false`", "1 steps of rein"):
        assert said in card, said
    assert "steps 0 to 1" in card and str(tmp_path) not in card and "secret" not in card


def test_the_newest_that_is_whole_is_taken_and_said(run: Path, tmp_path: Path, capsys) -> None:
    data = next((run / "checkpoints" / "step_000002").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1])
    origin = ["--origin-hf-dir", str(tmp_path / "hf")]
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    assert main(["convert", "torch-dist-to-hf", str(run), str(tmp_path / "converted"), *origin]) == 0
    said = capsys.readouterr()
    assert "out: step_000001 of" in said.out and said.err.count("step_000002 is skipped") == 2
    assert f"{run} is a run: step_000001, its newest complete checkpoint, is converted" in said.err
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "converted")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    "flags, says",
    [
        (["{hf}"], "is no run directory"),
        (["{run}", "--checkpoint", "step_9"], "--checkpoint step_9: cannot be used, it does not exist; in"),
        (["{run}", "--power-of-two"], "--power-of-two needs --fp8"),
        (["{run}", "--modules-to-not-convert", "q_proj"], "--modules-to-not-convert needs --fp8"),
        (["{run}", "--origin-hf-dir", "nowhere"], "nowhere: no Hugging Face folder there"),
        (["{run}", "{run}/checkpoints/step_000002/out"], "must lie outside the input"),
    ],
)
def test_bad_input(run: Path, tmp_path: Path, flags: list[str], says: str, capsys) -> None:
    flags = [flag.format(run=run, hf=tmp_path / "hf") for flag in flags]
    assert main(["export", *flags]) == 2
    assert says in capsys.readouterr().err and not (run / "export").exists()


def test_a_moved_base_model_is_named(run: Path, tmp_path: Path, capsys) -> None:
    shutil.move(tmp_path / "hf", tmp_path / "moved")
    assert main(["export", str(run)]) == 2 and "--origin-hf-dir" in capsys.readouterr().err
    assert main(["export", str(run), "--origin-hf-dir", str(tmp_path / "moved")]) == 0
