"""What people get wrong, each once: refused or said before anything is queued, in a sentence that names the value, what
is allowed and the flag. Every row goes through the command, `--dry-run`, as a person would."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tiny import write_model
from tiny_task import write_data

from fp8slurm.cli import main

LINES = 8


def user(text: str, label: str = "2") -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": text}], "label": label}


@dataclass
class Place:
    """A model and data that are right, and a folder for what is made wrong of them."""

    model: Path
    data: Path
    own: Path

    def file(self, *rows: dict[str, Any], name: str = "rows.jsonl") -> str:
        path = self.own / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    def changed(self, **edits: Callable[[dict[str, Any]], Any]) -> str:
        """A copy of the model in which JSON files are edited; their names without the ending."""
        folder = shutil.copytree(self.model, self.own / "model")
        for name, edit in edits.items():
            file = folder / f"{name}.json"
            values = json.loads(file.read_text())
            edit(values)
            file.write_text(json.dumps(values))
        return str(folder)

    def without(self, *names: str) -> str:
        folder = shutil.copytree(self.model, self.own / "model")
        for name in names:
            (folder / name).unlink()
        return str(folder)

    def truncated(self) -> str:
        weights = Path(self.without()) / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:100_000])
        return str(weights.parent)


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("right")
    for name in ("model", "data"):
        (folder / name).mkdir()
    write_model(folder / "model")
    write_data(folder / "data")
    for file in (folder / "data").iterdir():  # as few rows as the steps below take
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:LINES]))
    return folder


@pytest.fixture
def place(right: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(tmp_path)
    return Place(right / "model", right / "data", tmp_path)


def train(place: Place, *more: str) -> list[str]:
    files = {"model.hf-checkpoint": place.model, "data.train": place.data / "train.jsonl",
             "data.eval": place.data / "eval.jsonl", "sft.data": place.data / "sft.jsonl",
             "sft.batch-size": 4, "rollout.prompts-per-step": 4}  # fmt: skip
    flags = [word for name, value in files.items() for word in (f"--{name}", str(value))]
    return ["train", "--recipe", "tiny-fp8", "--dry-run", *flags, *more]


def evaluate(place: Place, *more: str) -> list[str]:
    return ["eval", "--checkpoint", str(place.model), "--dry-run", *more]


def empty_vocabulary(tokenizer: dict[str, Any]) -> None:
    tokenizer["model"] |= {"vocab": {}, "merges": []}


def own_task(place: Place, **keys: Any) -> str:
    definition = "".join(f"{key} = {json.dumps(value)}\n" for key, value in {"name": "mine", **keys}.items())
    (place.own / "mine.toml").write_text(definition)
    return f"mine.toml={place.file({'prompt': '1?', 'label': '2', 'b': '3'})}"


GSM8K = {"question": "1+1?", "answer": "it is #### 2"}
ANSWERED = {"prompt": [{"role": "user", "content": "1|2="}, {"role": "assistant", "content": "2"}], "label": "2"}
HUMAN = {"prompt": [{"role": "human", "content": "1|2="}], "label": "2"}
REFUSED, WARNED = 2, 0
MODEL, TASKS = "--model.hf-checkpoint", "--tasks"

ROWS: dict[str, tuple[int, Callable[[Place], list[str]], list[str]]] = {
    "no weights": (REFUSED, lambda p: train(p, MODEL, p.without("model.safetensors")), ["neither model.safetensors"]),
    "truncated weights": (REFUSED, lambda p: train(p, MODEL, p.truncated()), ["truncated: 100000 bytes"]),
    "vocab_size": (
        REFUSED, lambda p: train(p, MODEL, p.changed(config=lambda c: c.update(vocab_size=640))),
        ["model.embed_tokens.weight is [320, 256], config.json makes it [640, 256]"],
    ),
    "too many layers": (
        REFUSED, lambda p: train(p, MODEL, p.changed(config=lambda c: c.update(num_hidden_layers=3))),
        ["no tensor model.layers.2."],
    ),
    "too few layers": (
        REFUSED, lambda p: train(p, MODEL, p.changed(config=lambda c: c.update(num_hidden_layers=1))),
        ["holds model.layers.1.", "num_hidden_layers 1"],
    ),
    "empty vocabulary": (
        REFUSED, lambda p: train(p, MODEL, p.changed(tokenizer=empty_vocabulary)),
        ["its tokenizer has no vocabulary", "model.vocab is empty"],
    ),
    "no tokenizer": (
        REFUSED, lambda p: train(p, MODEL, p.without("tokenizer.json", "tokenizer_config.json")),
        ["its tokenizer has no vocabulary", "tokenizer.json, tokenizer_config.json is not there"],
    ),
    "a value that transformers refuses": (
        REFUSED, lambda p: train(p, MODEL, p.changed(config=lambda c: c.update(attention_dropout="a"))),
        ["model/config.json: transformers refuses it", "attention_dropout"],
    ),
    "prompts_per_step": (
        WARNED, lambda p: train(p, "--rollout.prompts-per-step", "64"),
        [f"rollout.prompts_per_step 64 with {LINES} prompts in --data.train", "more than once"],
    ),
    "sft.batch_size": (WARNED, lambda p: train(p, "--sft.batch-size", "64"), ["sft.batch_size 64 with 8 examples"]),
    "updates": (
        REFUSED, lambda p: train(p, "--train.updates-per-step", "5"),
        ["--train.updates-per-step 5", "--rollout.prompts-per-step 4", "at most one update a group"],
    ),
    "lr": (REFUSED, lambda p: train(p, "--optim.lr", "1"), ["--optim.lr 1: Adam", "allowed: below 0.1"]),
    "sft.lr": (REFUSED, lambda p: train(p, "--sft.lr", "10"), ["--sft.lr 10: Adam", "allowed: below 0.1"]),
    "large lr": (WARNED, lambda p: train(p, "--optim.lr", "0.01"), ["optim.lr 0.01: large models", "1e-7 to 1e-4"]),
    "lost lr": (WARNED, lambda p: train(p, "--optim.lr", "1e-12"), ["optim.lr 1e-12", "rounded away"]),
    "weight_decay": (
        REFUSED, lambda p: train(p, "--optim.weight-decay", "1e6"), ["--optim.weight-decay 1e+06 with --optim.lr 0.0001"],
    ),
    "clip_low in percent": (
        REFUSED, lambda p: train(p, "--algorithm.clip-low", "20"), ["--algorithm.clip-low 20", "allowed: 0 to 1"],
    ),
    "clip_high in percent": (
        WARNED, lambda p: train(p, "--algorithm.clip-high", "28"), ["algorithm.clip_high 28", "in percent it would be 0.28"],
    ),
    "clip_high 0": (
        WARNED, lambda p: train(p, "--algorithm.clip-high", "0"), ["algorithm.clip_high 0: 0 does not switch a bound off"],
    ),
    "tis_cap": (REFUSED, lambda p: train(p, "--algorithm.tis-cap", "0.2"), ["--algorithm.tis-cap 0.2", "1 or more, or 0"]),
    "kl_coef": (WARNED, lambda p: train(p, "--algorithm.kl-coef", "100"), ["algorithm.kl_coef 100 outweighs"]),
    "entropy_coef": (WARNED, lambda p: train(p, "--algorithm.entropy-coef=-5"), ["algorithm.entropy_coef -5 outweighs"]),
    "hot": (
        REFUSED, lambda p: train(p, "--rollout.temperature", "50"), ["--rollout.temperature 50", "allowed: up to 10"],
    ),
    "warm": (WARNED, lambda p: train(p, "--rollout.temperature", "3"), ["rollout.temperature 3: samples are nearly"]),
    "hot evaluation": (REFUSED, lambda p: train(p, "--eval.temperature", "60"), ["--eval.temperature 60"]),
    "beta1": (WARNED, lambda p: train(p, "--optim.beta2", "0.5"), ["optim.beta1 0.9 with optim.beta2 0.5", "Reddi"]),
    "max_gap": (WARNED, lambda p: train(p, "--rollout.max-gap", "1e-9"), ["rollout.max_gap 1e-09", "the first step"]),
    "minutes for seconds": (WARNED, lambda p: train(p, "--watchdog.timeout-s", "5"), ["watchdog.timeout_s 5: these are s"]),
    "milliseconds": (WARNED, lambda p: train(p, "--reward.timeout-s", "5000"), ["reward.timeout_s 5000: these are seconds"]),
    "save_every": (WARNED, lambda p: train(p, "--rollout.save-every", "99"), ["rollout.save_every 99 of run.steps 60"]),
    "KV cache": (
        REFUSED, lambda p: train(p, "--engine.max-total-tokens", "64"),
        ["--engine.max-total-tokens 64", "--data.max-prompt-tokens 64 + --rollout.max-tokens 8 = 72", "leave it out"],
    ),
    "empty label": (
        REFUSED, lambda p: train(p, "--data.train", p.file(user("1|2=", " "))), ["rows.jsonl:1: the label is empty"],
    ),
    "answered prompt": (
        REFUSED, lambda p: train(p, "--data.train", p.file(*[user("1|2=")] * 7, ANSWERED)),
        ["--data.train: 1 of 8 prompts end with a turn of 'assistant' (row 8 first)", "allowed: a last turn of 'user'"],
    ),
    "a role nobody has": (
        WARNED, lambda p: train(p, "--data.train", p.file(*[HUMAN] * 8)), ["8 of 8 prompts end with a turn of 'human'"],
    ),
    "held-out prompts that are trained on": (
        WARNED, lambda p: train(p, "--data.eval", str(p.data / "train.jsonl")),
        ["8 of 8 prompts of --data.eval are trained on too (the first in row 1)"],
    ),
    "template argument": (
        REFUSED, lambda p: train(p, "--data.chat-template-kwargs", "enable_thinkin", "False"),
        ["--data.chat-template-kwargs enable_thinkin: the chat template of", "allowed: enable_thinking"],
    ),
    "another task's file": (
        REFUSED,
        lambda p: train(p, "--data.max-prompt-tokens", "120", "--eval.tasks",
                        "gsm8k=" + p.file({"prompt": "Who?", "label": "Gauss, in 1796"})),
        ["--eval.tasks gsm8k=", "'Gauss, in 1796', which no question of gsm8k has", "allowed: gsm8k's questions"],
    ),
    "another task's name": (
        REFUSED,
        lambda p: train(p, "--data.max-prompt-tokens", "120", "--eval.tasks",
                        "gsm8k=" + p.file(user("1?"), name="aime_2024.jsonl")),
        ["that is the name of another task; allowed: aime-2024="],
    ),
    "half of a task": (
        WARNED, lambda p: train(p, "--data.max-prompt-tokens", "120", "--eval.tasks", "gsm8k=" + p.file(GSM8K)),
        ["gsm8k has 1319 questions, the file has 1"],
    ),
    "an argument SGLang has not": (
        REFUSED, lambda p: train(p, "--engine.extra-args=--schedule-polici", "fcfs"),
        ["--engine.extra-args --schedule-polici fcfs: SGLang's server refuses it", "did you mean --schedule-policy?"],
    ),
    "an argument that is a setting": (
        REFUSED, lambda p: train(p, "--engine.extra-args=--tp", "2"), ["tp_size", "--engine.tensor-parallel-size"],
    ),
    "eval: truncated weights": (
        REFUSED, lambda p: [*evaluate(p, TASKS, "gsm8k=" + p.file(GSM8K)), "--checkpoint", p.truncated()], ["truncated"],
    ),
    "eval: too few layers": (
        REFUSED,
        lambda p: [*evaluate(p, TASKS, "gsm8k=" + p.file(GSM8K)),
                   "--checkpoint", p.changed(config=lambda c: c.update(num_hidden_layers=1))],
        ["--checkpoint", "holds model.layers.1."],
    ),
    "eval: no tokenizer": (
        REFUSED,
        lambda p: [*evaluate(p, TASKS, "gsm8k=" + p.file(GSM8K)), "--checkpoint", p.without("tokenizer.json", "tokenizer_config.json")],
        ["its tokenizer has no vocabulary"],
    ),
    "eval: template argument": (
        REFUSED,
        lambda p: evaluate(p, TASKS, "gsm8k=" + p.file(GSM8K), "--chat-template-kwargs", "enable_thinkin", "False"),
        ["--chat-template-kwargs enable_thinkin", "allowed: enable_thinking"],
    ),
    "eval: another task's file": (
        REFUSED, lambda p: evaluate(p, TASKS, "aime-2024=" + p.file({"prompt": "1?", "label": "it is #### 2"})),
        ["--tasks aime-2024=", "'it is #### 2', which no question of aime-2024 has"],
    ),
    "eval: answered question": (
        REFUSED, lambda p: evaluate(p, TASKS, p.file(ANSWERED), "--grader", "exact"), ["end with a turn of 'assistant'"],
    ),
    "eval: half of a task": (
        WARNED, lambda p: evaluate(p, TASKS, "gsm8k=" + p.file(GSM8K)), ["gsm8k has 1319 questions, the file has 1"],
    ),
    "eval: an argument SGLang has not": (
        REFUSED, lambda p: evaluate(p, TASKS, "gsm8k=" + p.file(GSM8K), "--engine.extra-args=--page-size", "big"),
        ["--engine.extra-args --page-size big", "invalid int value"],
    ),
    "a job's settings, and no job": (
        WARNED, lambda p: train(p, "--slurm.partition", "gpu"),
        ["slurm.partition with slurm.executor local: the run starts on this machine"],
    ),
    "tasks with GPUs of their own": (
        REFUSED, lambda p: train(p, "--slurm.sbatch", "gpus-per-task", "1"),
        ["--slurm.sbatch gpus-per-task 1: every task of a node has to see all"],
    ),
    "tasks bound to GPUs by srun": (
        REFUSED, lambda p: train(p, "--slurm.srun=--gpu-bind=single:1"), ["--slurm.srun=--gpu-bind=single:1: every task"],
    ),
    "mounts without a container": (
        WARNED, lambda p: train(p, "--slurm.container-mounts", "/a:/b"), ["container_mounts without slurm.container_image"],
    ),
    "W&B that is off": (WARNED, lambda p: train(p, "--observe.wandb-project", "x"), ["observe.wandb_project x without"]),
    "a file for the folder of runs": (
        REFUSED, lambda p: train(p, "--run.root", p.file()), ["--run.root", "is a file: give the folder of the runs"],
    ),
    "eval: percent for a temperature": (
        REFUSED, lambda p: evaluate(p, TASKS, p.file(user("1?")), "--grader", "exact", "--temperature", "60"),
        ["--temperature 60; allowed: 0 (greedy) to 10"],
    ),
    "eval: two points": (
        REFUSED, lambda p: evaluate(p, TASKS, "gsm8k=" + p.file(GSM8K), "--precision", "both", "--fail-if-worse", "2"),
        ["--fail-if-worse 2.0", "0.02: two points"],
    ),
    "eval: a context that the model has not": (
        REFUSED, lambda p: evaluate(p, TASKS, "gsm8k=" + p.file(GSM8K), "--engine.context-length", "4096"),
        ["--engine.context-length 4096: the model has 1024 positions"],
    ),
    "eval: a KV cache smaller than a question": (
        REFUSED, lambda p: evaluate(p, TASKS, "gsm8k=" + p.file(GSM8K), "--engine.max-total-tokens", "8"),
        ["question 0 of gsm8k has", "tokens, the engine's context 8"],
    ),
    "eval: answers that are cut": (
        WARNED, lambda p: evaluate(p, TASKS, "gsm8k=" + p.file(GSM8K)),
        ["gsm8k: answers end where 1024 tokens are reached with the question, not at 4096"],
    ),
    "eval: too many GPUs an engine": (
        REFUSED, lambda p: evaluate(p, TASKS, "gsm8k=" + p.file(GSM8K), "--engine.tensor-parallel-size", "8"),
        ["--engine.tensor-parallel-size 8", "128 block"],
    ),
    "eval: BF16 for FP8": (
        REFUSED, lambda p: evaluate(p, TASKS, "gsm8k=" + p.file(GSM8K), "--fp8-checkpoint", str(p.model)),
        ["--fp8-checkpoint", "is Hugging Face, not block FP8"],
    ),
    "eval: a module nobody has": (
        REFUSED, lambda p: evaluate(p, TASKS, "gsm8k=" + p.file(GSM8K), "--modules-to-not-convert", "lm_hed"),
        ["--modules-to-not-convert lm_hed: the model has no such module"],
    ),
    "eval: a file for a folder": (
        REFUSED, lambda p: evaluate(p, TASKS, "gsm8k=" + p.file(GSM8K), "--eval-dir", p.file(name="e.jsonl")),
        ["--eval-dir", "is a file: give a folder"],
    ),
    "eval: a template that fills in nothing": (
        REFUSED, lambda p: evaluate(p, TASKS, own_task(p, template="{prompt} {question}")), ["has {question}, which nothing"],
    ),
    "eval: letters that are not shown": (
        REFUSED, lambda p: evaluate(p, TASKS, own_task(p, choice_columns=["label", "b"], label_keys=[])),
        ["choice_columns, and a template without {choices}"],
    ),
    "plot: no picture": (
        REFUSED, lambda p: ["plot", str(p.own), "--out", "plot.docx"], ["no picture is written as .docx; allowed: "],
    ),
    "report: no PDF": (REFUSED, lambda p: ["report", str(p.own), "--out", "r.pdf"], ["--out r.pdf: what is written is HTML"]),
    "convert: no config": (
        REFUSED,
        lambda p: ["convert", "torch-dist-to-hf", str(p.model), str(p.own / "out"), "--origin-hf-dir", str(p.data)],
        ["--origin-hf-dir", "there is no config.json in it"],
    ),
}  # fmt: skip


def test_what_is_right_is_silent(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(train(place)) == 0
    assert capsys.readouterr().err == ""
    assert main(evaluate(place, TASKS, place.file(GSM8K | user("1|2=")), "--grader", "exact")) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("row", ROWS)
def test_a_mistake_is_said(row: str, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    status, command, says = ROWS[row]
    assert main(command(place)) == status
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert "warning: " in err or status == REFUSED, err
    for words in says:
        assert words in err, err
    assert not (place.own / "runs").exists()
