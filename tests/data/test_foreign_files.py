"""Files in the forms of verl, DAPO and TRL, as docs/data.md shows them, in JSONL and in parquet."""

import json
import re
import shlex
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import tiny

from fp8slurm.check.preflight import preflight
from fp8slurm.config import parse
from fp8slurm.core.types import Sample, SampleGroup
from fp8slurm.data.prompts import load_prompts, load_sft, load_tokenizer
from fp8slurm.rewards.pool import RewardPool

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
SECTION = re.search(r"## Files of verl.*?(?=^## )", PAGE.read_text(), re.M | re.S)[0]
ROWS = [[json.loads(line) for line in b.splitlines()] for b in re.findall(r"```json\n(.*?)```", SECTION, re.S)]
VERL, DAPO, SOLUTION, BARE, COMPLETION, MESSAGES = ROWS
FLAGS = [shlex.split(f.replace("\n", " ")) for f in re.findall(r"`(--[^`]*)`", SECTION)]
VERL_FLAGS, VERL_SFT, DAPO_FLAGS, SOLUTION_FLAGS, BARE_FLAGS, COMPLETION_FLAGS, MESSAGES_FLAGS = FLAGS


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.write_model(folder)
    return folder


@pytest.fixture(params=["jsonl", "parquet"])
def write(request, tmp_path):
    def write(rows):
        path = tmp_path / f"rows.{request.param}"
        if request.param == "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.mark.parametrize(
    "rows, flags, kind, label, right, wrong",
    [
        (VERL, VERL_FLAGS, "numeric", "7", "#### 7", "#### 8"),
        (DAPO, DAPO_FLAGS, "math", "5/6", "Answer: $\\frac{5}{6}$", "Answer: $\\frac{1}{6}$"),
        (SOLUTION, SOLUTION_FLAGS, "math", "$\\frac{5}{6}$", "\\boxed{5/6}", "\\boxed{5}"),
    ],
    ids=["verl", "dapo", "trl"],
)
def test_prompts_with_answers(model, write, rows, flags, kind, label, right, wrong):
    config, tokenizer = parse("tiny-fp8", flags), load_tokenizer(model)
    (prompt,) = load_prompts(config.data.model_copy(update={"max_prompt_tokens": 999}), tokenizer, write(rows))
    assert config.reward.kind == kind and prompt.label == label
    assert prompt.content == rows[0]["prompt"] and prompt.row == rows[0]
    assert f"user\n{rows[0]['prompt'][0]['content']}<|im_end|>" in tokenizer.decode(prompt.token_ids)
    group = SampleGroup(prompt, [Sample([], [], [], "stop", text=text) for text in (right, wrong)])
    with RewardPool(config.reward.model_copy(update={"timeout_s": 60.0}), workers=1) as pool:
        pool.score([group])
    assert [s.reward for s in group.samples] == [1, 0]


def test_prompts_without_answers_need_a_reward_that_reads_the_row(model, write, tmp_path, monkeypatch):
    (tmp_path / "by_row.py").write_text("def reward(response, row): return len(response.split()) <= row['most_words']")
    monkeypatch.chdir(tmp_path)
    path = str(write(BARE))
    more = ["--model.hf-checkpoint", str(model), "--data.train", path, "--sft.data", "None", "--sft.max-steps", "0",
            "--data.eval", "None", "--rollout.prompts-per-step", "1", "--train.updates-per-step", "1",
            "--data.max-prompt-tokens", "100", *BARE_FLAGS]  # fmt: skip
    assert preflight(parse("tiny-fp8", [*more, "--reward.kind", "by_row:reward"])) == []
    with pytest.raises(ValueError, match=r"rows.\w+:1: the label is empty, and exact compares the answer with it"):
        preflight(parse("tiny-fp8", [*more, "--reward.kind", "exact"]))


@pytest.mark.parametrize(
    "rows, flags, expected",
    [
        (VERL, VERL_SFT, [("How many are 3 and 4?", "#### 7")]),
        (COMPLETION[:1], COMPLETION_FLAGS, [("user\nWhat color is the sky?<|im_end|>", "It is blue.")]),
        (COMPLETION[1:], COMPLETION_FLAGS, [("The sky is", " blue.")]),
        (MESSAGES, MESSAGES_FLAGS, [("user\nWhat color is the sky?<|im_end|>\n<|im_start|>assistant\n", "It is blue.")]),
    ],
    ids=["verl", "completion", "text", "messages"],
)  # fmt: skip
def test_supervised_examples(model, write, rows, flags, expected):
    config, tokenizer = parse("tiny-fp8", flags), load_tokenizer(model)
    data = config.data.model_copy(update={"max_prompt_tokens": 999})
    found = load_sft(data, config.sft, tokenizer, write(rows))
    for example, (prompt, response) in zip(found, expected, strict=True):
        assert prompt in tokenizer.decode(example.prompt_ids)
        assert tokenizer.decode(example.response_ids) == response + "<|im_end|>"


@pytest.mark.parametrize(
    "row, says",
    [
        ({"messages": [{"role": "assistant", "content": "x"}]}, "no 'response' among its keys"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no 'response' among its keys"),
        ({"messages": "x", "response": [{"role": "user", "content": "x"}]}, "'response' is text or one message of the"),
        ({"messages": "x", "response": [{"role": "assistant", "content": "x"}] * 2}, "'response' is text or one message"),
        ({"messages": "x", "response": [{"role": "assistant"}]}, "no 'content' among its keys"),
    ],
)  # fmt: skip
def test_what_is_no_response_is_refused(model, tmp_path, row, says):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row) + "\n")
    config = parse("tiny-fp8", MESSAGES_FLAGS)
    with pytest.raises(ValueError, match=says):
        load_sft(config.data, config.sft, load_tokenizer(model), path)
