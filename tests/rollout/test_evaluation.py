"""The rollout workers' shares and their merged summary; the answers come from a function (real engines: test_evaluation.py)."""

import json
import random
import re

import numpy as np
import pytest
import tiny
import torch

from fp8slurm.config import RunConfig
from fp8slurm.engine.client import Generation
from fp8slurm.rollout.evaluation import TrainingEval, merge
from fp8slurm.rollout.sampler import Sampler, model_of
from fp8slurm.run.directory import RunDirectory
from fp8slurm.sessions.runner import SessionRunner


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    (folder / "model").mkdir()
    tiny.write_model(folder / "model")
    for name, count in (("eval", 5), ("more", 3)):
        rows = [{"prompt": f"{i}=", "label": str(i)} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return RunConfig(
        run={"deterministic": True, "root": folder},
        model={"hf_checkpoint": folder / "model"},
        data={"eval": folder / "eval.jsonl"},
        eval={"tasks": [str(folder / "more.jsonl")], "n_samples": 2, "temperature": 1.0},
        fp8={"backend": "emulated"},
        reward={"kind": "digits"},
        engine={"max_running_requests": 4},
    )


class Generator:
    """Answers with the question where its number is even; the second sample is always wrong."""

    def __init__(self, sampler):
        self.sampler, self.seeds, self.sizes = sampler, [], []

    def __call__(self, batches):
        return [self.answer(requests) for requests in batches]

    def answer(self, requests):
        self.sizes.append(len(requests))
        out = []
        for i, r in enumerate(requests):
            number = self.sampler.tokenizer.decode(r.token_ids).rstrip("=")
            first = self.seeds.count(r.seed) == 0 and i % 2 == 0
            self.seeds.append(r.seed)
            text = number if first and int(number) % 2 == 0 else "no"
            ids = self.sampler.tokenizer(text, add_special_tokens=False)["input_ids"]
            out.append(
                Generation([*ids, self.sampler.stop_ids[0]], [0.0] * (len(ids) + 1), "stop", [0] * (len(ids) + 1))
            )
        return out


@pytest.mark.parametrize("workers", [1, 2])
def test_shares_make_one_summary(config, tmp_path, workers):
    run, sampler = RunDirectory(tmp_path / "run"), Sampler.load(config)
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    generators = [Generator(sampler) for _ in range(workers)]
    parts = [TrainingEval(config, run, sampler, number, workers) for number in range(workers)]
    answers = [json.loads(json.dumps(p.evaluate(g, "step_000004"))) for p, g in zip(parts, generators)]
    found = merge(config, run, answers, "step_000004", 4, writes=True)
    assert found == {
        "eval/accuracy": 0.3, "eval/truncated": 0.0, "eval/pass_at_n": 0.6, "eval/more/accuracy": 2 / 6,
        "eval/more/truncated": 0.0, "eval/more/pass_at_n": 2 / 3,
        "eval/more/response_length": found["eval/more/response_length"],
    }  # fmt: skip
    seeds = [seed for g in generators for seed in g.seeds]
    assert len(set(seeds)) == len(seeds) == 16 and max(size for g in generators for size in g.sizes) <= 4
    folder = run.path / "eval" / "step_000004-fp8-training"
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["made_by"], summary["step"], summary["precision"]) == ("training", 4, "fp8")
    assert summary["tasks"]["held_out"]["correct"] == 3 and summary["tasks"]["held_out"]["questions"] == 5
    names = ["samples.jsonl"] if workers == 1 else ["samples.0.jsonl", "samples.1.jsonl"]
    rows = [json.loads(line) for name in names for line in (folder / name).read_text().splitlines()]
    assert len(rows) == 16 and {"prompt", "response", "score", "correct", "tokens"} <= rows[0].keys()

    short = [p.evaluate(g, None) for p, g in zip(parts, [Generator(sampler) for _ in parts])]
    assert merge(config, run, short, None, 9, writes=True) == {k: found[k] for k in found if "more" not in k}
    assert [p.name for p in (run.path / "eval").iterdir()] == [folder.name], "the supervised phase writes nothing"
    after = random.getstate(), np.random.get_state()[1], torch.get_rng_state()
    assert after[0] == states[0] and (after[1] == states[1]).all() and torch.equal(after[2], states[2])
    for part in parts:
        part.close()


async def asks_a_tool(session, prompt):
    """Its row tells it what it is to be told; the second sample asks nothing."""
    turn = await session.complete(prompt.token_ids)
    if session.number == 0:
        await session.complete(turn.ids + session.tokenize(f"[{prompt.row['label']}]"))
    return session.sample()


def test_conversations_are_graded_by_what_was_said_last_and_kept_whole(config, tmp_path):
    run, sampler = RunDirectory(tmp_path / "run"), Sampler.load(config)
    section = config.rollout.model_copy(update={"generate": f"{__name__}:asks_a_tool"})
    runner = SessionRunner(section, model_of(config, sampler.tokenizer, sampler.stop_ids))
    sizes = []

    def batch(requests):
        """The label where there is one, else that it does not know."""
        sizes.append(len(requests))
        out = []
        for r in requests:
            found = re.search(r"\[(.*)\]", sampler.tokenizer.decode(r.token_ids))
            ids = [*sampler.tokenizer(found[1] if found else "no")["input_ids"], sampler.stop_ids[0]]
            out.append(Generation(ids, [-1.0] * len(ids), "stop", [4] * len(ids)))
        return out

    sampler.converse = lambda asked: runner.converse(asked, batch=batch)
    part = TrainingEval(config, run, sampler, 0, 1)
    answers = [json.loads(json.dumps(part.evaluate(None, "step_000004")))]
    found = merge(config, run, answers, "step_000004", 4, writes=True)
    assert found["eval/accuracy"] == 0.5 and found["eval/pass_at_n"] == 1.0 and max(sizes) == 4
    path = run.path / "eval" / "step_000004-fp8-training" / "samples.jsonl"
    first, second = [json.loads(line) for line in path.read_text().splitlines()][2:4]
    end = sampler.tokenizer.decode([sampler.stop_ids[0]])
    assert first["conversation"] == [["model", f"no{end}"], ["tool", "[1]"], ["model", f"1{end}"]]
    assert (first["response"], first["tokens"], second["conversation"]) == ("1", 5, [["model", f"no{end}"]])
    part.close()
    runner.close()
