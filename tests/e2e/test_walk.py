"""What a stranger does, in one go: an own task, an own reward and an own model, trained, killed, resumed, exported, served."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import requests
import tiny
import torch
from tiny_runs import TinyRuns, task_pids
from transformers import AutoModelForCausalLM, AutoTokenizer

from fp8slurm.cli import main
from fp8slurm.config.schema import EngineSection
from fp8slurm.engine import server
from fp8slurm.observe.metrics import read_metrics

ROOT = Path(__file__).parents[2]
REWARD = '''
def graded(response, label, prompt, row):
    """As the example that it was copied from; the question is asked of the prompt, the number of digits of the row."""
    question = prompt[-1]["content"]
    assert row["data_source"] == "mine/last-digits" and question.startswith(row["extra_info"]["question"])
    value, parts = score(response, label, prompt, "stop")
    return value, parts | {"short": float(len(response.strip()) <= row["extra_info"]["digits"])}
'''
QUESTIONS = 48
UNDECIDED_NATS = 0.2
"""FP8 products in the engine, BF16 ones of the same weights in transformers: the second knows better by less than that."""


def write_task(path: Path, numbers: Sequence[int]) -> None:
    """The last two digits of a number, in the columns of verl's files."""
    table = []
    for i, n in enumerate(numbers):
        number = f"{n:04d}"
        table.append(
            {
                "data_source": "mine/last-digits",
                "prompt": [{"role": "user", "content": f"{number}="}],
                "ability": "math",
                "reward_model": {"style": "rule", "ground_truth": number[-2:]},
                "extra_info": {"index": i, "question": number, "answer": number[-2:], "digits": 2},
            }
        )
    pq.write_table(pa.Table.from_pylist(table), path)


class Walk(TinyRuns):
    """An own folder: TinyRuns' model and data are replaced, as are the flags that name them."""

    def __init__(self, folder: Path) -> None:
        super().__init__(
            folder, 1, "--data.chat-template-kwargs", "enable_thinking", "False", run__steps=4, checkpoint__every=2,
            eval__every=0, sft__max_steps=30, sft__batch_size=64, sft__stop_accuracy=1, sft__response_key="extra_info.answer",
            data__label_key="reward_model.ground_truth", reward__kind="my_reward:graded", slurm__ranks_per_node=1,
            rollout__prompts_per_step=16, rollout__n_samples=4, rollout__max_tokens=4,
        )  # fmt: skip
        shutil.rmtree(folder / "model")
        (folder / "model").mkdir()
        tiny.write_model(folder / "model", seed=11)
        numbers = random.Random(0).sample(range(10000), 2000)
        for name, some in {"train": numbers[QUESTIONS:], "held_out": numbers[:QUESTIONS]}.items():
            write_task(folder / "data" / f"{name}.parquet", some)
        (folder / "my_reward.py").write_text((ROOT / "examples" / "reward.py").read_text() + REWARD)
        data = folder / "data"
        self.more |= {
            "data__train": data / "train.parquet", "sft__data": data / "train.parquet", "data__eval": data / "held_out.parquet",
        }  # fmt: skip
        self.environment = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}

    def begin(self, name: str) -> Any:
        return self.start(name, environment=self.environment)


def served(folder: Path, log: Path, questions: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What SGLang's own chat endpoint answers to plain requests, greedily, and how many tokens it made of each question
    with its own tokenizer and the folder's template."""
    arguments = server.server_arguments
    monkeypatch.setattr(
        server, "server_arguments", lambda *a: [x for x in arguments(*a) if x != "--skip-tokenizer-init"]
    )
    section = EngineSection(max_running_requests=64, max_total_tokens=4096, context_length=128, ready_timeout_s=300)
    engine = server.Engine(folder, log, server.EngineSettings(section, cpu=True, cpu_threads=1))

    def ask(question: str) -> tuple[str, int]:
        body = {"model": "any", "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 4}
        key = {"Authorization": f"Bearer {engine.api_key}"}
        reply = requests.post(f"{engine.url}/v1/chat/completions", headers=key, json=body, timeout=200).json()
        return reply["choices"][0]["message"]["content"], reply["usage"]["prompt_tokens"]

    try:
        engine.start()
        engine.wait_ready()
        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(ask, questions))
    finally:
        engine.stop()


def behind_the_best(folder: Path, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
    """For each answer how many nats transformers likes its least liked token less than the token that it would take."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    behind = []
    for prompt, answer in zip(prompts, answers, strict=True):
        asked = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        said = torch.tensor(tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id])[:4]
        with torch.no_grad():
            logits = model(torch.tensor([[*asked, *said.tolist()]])).logits[0, len(asked) - 1 : -1].float()
        behind.append((logits.amax(-1) - logits.gather(1, said[:, None])[:, 0]).max().item())
    return behind


@pytest.mark.slow
def test_from_an_own_task_to_a_served_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's last evaluation is what SGLang answers on the exported folder without a flag, to the letter, and what
    transformers would answer, as far as FP8 products and BF16 ones agree."""
    walk = Walk(tmp_path)
    process, run = walk.begin("mine"), walk.path("mine")
    walk.wait_for_step(process, "mine", 3)
    for pid in task_pids(run, 0).values():
        os.kill(pid, signal.SIGKILL)
    walk.finish(process, status=1)
    assert "rl 4/4" in walk.finish(walk.begin("mine"))
    records = [r for r in read_metrics(run) if r["phase"] == "rl"]
    assert [r["step"] for r in records] == [0, 1, 2, 3, 4]
    log = "".join(p.read_text() for p in (run / "attempts" / "1" / "logs").glob("*_log.err"))
    assert re.search(r"continuing from .*step_000002", log)
    for r in records[1:]:
        assert {"reward/parts/right", "reward/parts/copied", "reward/parts/short"} <= r.keys()

    rows = [json.loads(line) for line in (run / "eval/step_000004-fp8-training/samples.jsonl").read_text().splitlines()]
    assert len(rows) == QUESTIONS and len({row["response"] for row in rows}) > 5, "answers that tell questions apart"
    questions = [re.findall(r"user\n(.*?)<", row["prompt"])[0] for row in rows]
    prompts, answers = [row["prompt"] for row in rows], [row["response"] for row in rows]
    assert all(prompt.endswith("<think>\n\n</think>\n\n") for prompt in prompts), "the run's template argument"

    out = tmp_path / "served"
    assert main(["export", str(run), str(out), "--fp8"]) == 0
    tokenizer = AutoTokenizer.from_pretrained(out)
    turns = [[{"role": "user", "content": question}] for question in questions]
    assert tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == prompts
    replies = served(out, tmp_path / "log", questions, monkeypatch)
    assert [answer for answer, _ in replies] == answers
    assert [count for _, count in replies] == [len(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    behind = behind_the_best(out, prompts, answers)
    assert max(behind) < UNDECIDED_NATS and behind.count(0) > 0.8 * QUESTIONS, behind
