import json

import pytest
import torch

from fp8slurm.core.types import NOT_GENERATED, Prompt, Sample, SampleGroup
from fp8slurm.rl.packing import pack
from fp8slurm.rollout.files import (
    is_saved,
    logprob_rows,
    rollout_file,
    trainer_file,
    write_rollout,
    write_trainer_logprobs,
)


def make_groups():
    """Three groups with samples of many lengths; one is masked, one is empty; every log-probability is another."""
    groups, value = [], 0
    for index, lengths in ((7, [3, 11, 1]), (2, [5, 0, 2]), (9, [4, 6, 8])):
        group = SampleGroup(Prompt(index, tuple(range(1, index + 2)), f"label {index}"))
        for n in lengths:
            logprobs = [-(value + i) / 64 for i in range(n)]
            value += n
            group.samples.append(Sample(list(range(n)), logprobs, [0] * n, "stop", f"text {n}", n / 8, train=n != 11))
        groups.append(group)
    return groups


@pytest.mark.parametrize(("updates", "ranks", "budget", "multiple"), [(1, 1, 64, 1), (2, 2, 16, 8), (3, 4, 8, 2)])
def test_every_token_finds_its_sample_again(tmp_path, updates, ranks, budget, multiple):
    groups = make_groups()
    groups[2].samples[1].loss_mask = [True, False, False, True, True, False]
    packed = pack(
        groups, [[0.0] * 3] * 3, updates=updates, data_parallel_size=ranks, tokens_per_micro_batch=budget, pad_multiple=multiple
    )  # fmt: skip
    parts = []
    for rank in reversed(range(ranks)):  # the order of the ranks must not matter
        batches = [b for update in packed for b in update[rank]]
        for b in batches:
            b.trainer_logprobs = b.rollout_logprobs + 100
        parts.append(logprob_rows(batches))
    path = trainer_file(tmp_path, 4)
    write_trainer_logprobs(path, groups, torch.cat(parts))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    samples = [(g.prompt.index, s) for g in groups for s in g.samples]
    assert len(lines) == len(samples)
    for line, (index, sample) in zip(lines, samples):
        trained = sample.train and sample.response_ids
        mask = sample.loss_mask or [True] * len(sample.logprobs)
        of_tokens = [p + 100 if m else None for p, m in zip(sample.logprobs, mask)]
        assert line == {"index": index, "trainer_logprobs": of_tokens if trained else None}


def test_a_conversation_says_which_tokens_are_the_models(tmp_path):
    said = Sample([5, 6, 7], [-1.0, 0.0, -2.0], [3, NOT_GENERATED, 3], "error", rollout=1, error="a tool hung")
    said.loss_mask, said.prompt_ids = [True, False, True], [9, 8]
    write_rollout(tmp_path / "r.jsonl", [SampleGroup(Prompt(0, (1,), ""), [said])], ["p"])
    row = json.loads((tmp_path / "r.jsonl").read_text())
    assert (row["rollout"], row["turns"], row["prompt_tokens"]) == (1, [[0, 1], [2, 3]], [9, 8])
    assert (row["loss_mask"], row["error"]) == ([1, 0, 1], "a tool hung")


def test_rollouts_keep_the_samples_order_and_are_replaced_whole(tmp_path):
    groups = make_groups()
    groups[0].samples[2].loss_mask, groups[0].samples[2].parts = [False], {"a": 0.5}
    path = rollout_file(tmp_path, 12)
    assert path.name == "step_000012.jsonl" and rollout_file(tmp_path, 12, 1, 2).name == "step_000012.1.jsonl"
    for _ in range(2):
        write_rollout(path, groups, ["p\u202e", "q", "r"])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["response"] for r in rows] == [s.text for g in groups for s in g.samples]
    assert [(r["loss_mask"], r["parts"]) for r in rows if len(r) > 8] == [([0], {"a": 0.5})] and len(rows[0]) == 8
    assert [r["prompt"] for r in rows] == ["p\u202e"] * 3 + ["q"] * 3 + ["r"] * 3
    assert sorted(p.name for p in path.parent.iterdir()) == ["step_000012.jsonl"]


def test_which_steps_are_saved():
    assert [s for s in range(9) if is_saved(s, 4)] == [4, 8] and not any(is_saved(s, 0) for s in range(9))
