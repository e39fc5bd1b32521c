"""An environment of the real package: its data set, its rollout through the endpoint, its rubric."""

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest
import tiny

from fp8slurm.config.schema import DataSection, RolloutSection
from fp8slurm.core.errors import InputError
from fp8slurm.data.prompts import load_prompts, load_tokenizer
from fp8slurm.engine.client import GenerateRequest, Generation
from fp8slurm.models.spec import ModelSpec
from fp8slurm.sessions.runner import Asked, SessionRunner
from fp8slurm.sessions.session import Model

FOLDER = Path(__file__).parents[2] / ".cache" / "verifiers-0.1.8.post2"
END = 258
ENVIRONMENT = '''
import verifiers as vf
from datasets import Dataset

class Echo(vf.MultiTurnEnv):
    """Asks twice; the second question depends on the first answer."""

    async def env_response(self, messages, state, **kwargs):
        return [{"role": "user", "content": "you said " + messages[-1]["content"]}]

async def last_is_right(completion, answer, **kwargs):
    return float(completion[-1]["content"] == answer)

async def messages(completion, **kwargs):
    return float(len(completion))

def load_environment(words=("sum", "digits")):
    rows = [{"question": f"what is {w}", "answer": w, "info": {"word": w}} for w in words]
    rubric = vf.Rubric(funcs=[last_is_right, messages], weights=[1.0, 0.0])
    return Echo(max_turns=2, dataset=Dataset.from_list(rows), system_prompt="answer", rubric=rubric)
'''


@pytest.fixture(autouse=True)
def package(tmp_path, monkeypatch):
    if not FOLDER.is_dir():
        pytest.skip(
            f"verifiers is not in {FOLDER} (117 MB): pip install --no-deps --target {FOLDER} -r requirements/verifiers.txt"
        )
    (tmp_path / "echo_env.py").write_text(ENVIRONMENT)
    (tmp_path / "my_env.py").write_text(
        "from fp8slurm.agents.verifiers import Environment\ngenerate = Environment('echo-env', words=['sum', 'digits'])\n"
    )
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.chdir(tmp_path)
    yield
    for name in ("my_env", "echo_env"):
        sys.modules.pop(name, None)


def test_data_set_rollout_and_rubric(tmp_path, capsys):
    from fp8slurm.agents import verifiers as module

    assert module.main(["my_env:generate", "rows.jsonl"]) == 0
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    assert [r["label"] for r in rows] == ["sum", "digits"] and rows[0]["info"] == {"word": "sum"}
    (tmp_path / "model").mkdir()
    tiny.write_model(tmp_path / "model")
    tokenizer = load_tokenizer(tmp_path / "model")
    prompts = load_prompts(DataSection(), tokenizer, Path("rows.jsonl"))
    vocabulary, asked = tokenizer.get_vocab(), []

    async def complete(request: GenerateRequest, number: int) -> Generation:
        asked.append(request)
        words = [vocabulary[c] for c in "sum"]  # three tokens, where encoding gives one
        return Generation([*words, END], [-1.0] * 4, "stop", [1] * 4)

    spec = ModelSpec.from_hf_dir(tmp_path / "model")
    runner = SessionRunner(RolloutSection(generate="my_env:generate"), Model(tokenizer, [256, END], spec, 1000))
    try:
        requests = [Asked(p, 0, GenerateRequest(list(p.token_ids), 200, stop_token_ids=[END])) for p in prompts]
        held = runner.converse(requests, complete=complete)
    finally:
        runner.close()
    assert [len(samples) for samples in held] == [1, 1]
    (right,), (wrong,) = held
    assert (right.reward, wrong.reward) == (1.0, 0.0)
    assert right.parts == {"last_is_right": 1.0, "messages": 3.0}
    said = [vocabulary[c] for c in "sum"] + [END]
    assert [right.response_ids[s:e] for s, e in right.turns] == [said, said]
    second = next(r for r in asked if len(r.token_ids) > len(prompts[0].token_ids) + 4)
    assert tokenizer.decode(second.token_ids).endswith(
        "<|im_start|>user\nyou said sum<|im_end|>\n<|im_start|>assistant\n"
    )


def test_what_is_refused():
    from fp8slurm.agents import verifiers as module

    with pytest.raises(InputError, match="no environment 'no-such-env' that loads"):
        module.Environment("no-such-env")
    with pytest.raises(InputError, match="no environment 'echo-env' that loads with .*nonsense"):
        module.Environment("echo-env", nonsense=1)
    environment = module.Environment("echo-env")
    with pytest.raises(InputError, match="no data set for evaluation"):
        environment.rows(held_out=True)
    with pytest.raises(SystemExit) as ended:
        module.main(["os:getcwd", "rows.jsonl"])
    assert ended.value.code == 2 and asyncio.iscoroutinefunction(module.Environment.__call__) and os.getcwd()
