"""The next step's rollout: what is kept, what a checkpoint has of it, and what becomes of it when engines lose weights."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save

from fp8slurm.core.stopping import StepAbandoned
from fp8slurm.core.types import Prompt, Sample, SampleGroup
from fp8slurm.rl.ahead import RolloutAhead, scored_numbers
from fp8slurm.rollout.dealing import KEPT, Holder
from fp8slurm.rollout.groups import merge, positions_after
from fp8slurm.rollout.serialization import decode_groups, encode_groups
from fp8slurm.rollout.tally import Tally
from fp8slurm.rollout.worker import RolloutWorker


def group(index: int, version: int = 3) -> SampleGroup:
    return SampleGroup(Prompt(index, (1, 2), "x"), [Sample([5, index], [-0.5] * 2, [version] * 2, "stop", "y", 1.0)])


class Engines:
    """rl/weights.py's calls, in order, and rollout workers that answer with a group each; `version` is what engines have
    when they answer."""

    def __init__(self, version: int, workers: int = 2) -> None:
        self.sent_version, self.calls, self.channel = version, [], self
        self.workers = [SimpleNamespace(holder=Holder(w, workers), channel=RolloutWorker) for w in range(workers)]
        for worker in self.workers:
            worker.channel = SimpleNamespace(at_work=lambda: torch.no_grad())

    def sync(self, version):
        self.calls.append(("sync", version))

    def post(self, kind, **request):
        self.calls.append((kind, request))

    def collect(self, kind, version, abandon, **request):
        self.calls.append(("collect", version))
        if abandon is not None and abandon():
            raise StepAbandoned(abandon())
        answers = []
        for number, worker in enumerate(self.workers):
            answer = {"cursor": 8, "dropped": number, "figures": Tally().sums, "reward_failures": 0, "seconds": 1.0}
            answers.append((answer, worker.holder.hold(answer, [group(10 + number)])))
        return answers

    def call(self, kind, **arguments):
        do = {"keep": RolloutWorker.do_keep, "restore": RolloutWorker.do_restore}[kind]
        answers = [do(worker, **arguments) for worker in self.workers]
        return [(a, torch.empty(0, dtype=torch.uint8) if p is None else p) for a, p in answers]

    @property
    def held(self) -> list[int]:
        return [g.samples[0].response_ids[1] for worker in self.workers for g in worker.holder.groups]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob(f"{KEPT}*"))


@pytest.mark.parametrize("resumed", [1, 2, 3])
def test_a_rollout_that_was_begun_is_collected_once_and_survives_in_a_checkpoint(tmp_path, resumed):
    """Whatever the number of rollout workers of the attempt that goes on."""
    engines = Engines(3)
    ahead = RolloutAhead(engines)
    assert ahead.take(3) is None and engines.calls == []
    ahead.begin(3, step=4, cursor=4)
    assert ahead.under_way and engines.calls == [("sync", 3), ("rollout", {"step": 4, "cursor": 4})]
    assert ahead.write(tmp_path) == "" and not files(tmp_path), "what engines are still at is not written"
    ahead.finish(4)
    ahead.finish(4)
    assert engines.calls[2:] == [("collect", 4)]
    assert ahead.write(tmp_path) == "" and files(tmp_path) == [f"{KEPT}.{w}.safetensors" for w in range(2)]
    again = RolloutAhead(later := Engines(9, workers=resumed))
    again.read(tmp_path)
    kept, restored = ahead.take(4), again.take(4)
    assert kept.version == restored.version == 3 and later.held == engines.held == [10, 11]
    for one in (kept, restored):
        groups, record = merge(one.answers, one.version)
        assert [g.prompt.index for g in groups] == [10, 11] and record["rollout/dropped"] == 1
        assert positions_after(one.answers) == (8, [])
        assert record["time/generate"] == 1 and record["tokens"] == 8 and not groups[0].samples[0].here
    assert ahead.take(4) is None
    if resumed > 1:
        (folder := tmp_path / "once more").mkdir()
        again._kept = restored
        assert again.write(folder) == "" and len(files(folder)) == resumed
        once_more = RolloutAhead(Engines(9))
        once_more.read(folder)
        assert merge(once_more.take(4).answers, 3)[1]["rollout/dropped"] == 1


def test_a_checkpoint_of_an_earlier_state_is_read(tmp_path):
    """One file for all workers, written by rank 0."""
    answers = [{"cursor": 8, "dropped": w, "figures": Tally().sums, "reward_failures": 0, "seconds": 2.0, "bytes": 7}
               for w in range(2)]  # fmt: skip
    metadata = {"version": "3", "answers": json.dumps(answers)}
    payloads = {str(w): encode_groups([group(20 + w)]) for w in range(2)}
    (tmp_path / f"{KEPT}.safetensors").write_bytes(save(payloads, metadata))
    ahead = RolloutAhead(engines := Engines(9))
    ahead.read(tmp_path)
    kept = ahead.take(4)
    assert kept.version == 3 and engines.held == [20, 21]
    groups, record = merge(kept.answers, 3)
    assert (
        [g.worker for g in groups] == [0, 1]
        and record["rollout/dropped"] == 1
        and positions_after(kept.answers) == (8, [])
    )
    assert decode_groups(encode_groups(engines.workers[0].holder.groups)) == [group(20)]


def test_a_full_disk_is_said_by_all_ranks(tmp_path):
    ahead = RolloutAhead(Engines(3))
    ahead.begin(3, step=4)
    ahead.finish(3)
    assert "No such file" in ahead.write(tmp_path / "gone")


def test_a_rollout_that_is_given_up_leaves_nothing(tmp_path):
    ahead = RolloutAhead(Engines(3))
    ahead.begin(3, step=4)
    with pytest.raises(StepAbandoned, match="no time"):
        ahead.finish(4, lambda: "no time")
    assert ahead.write(tmp_path) == "" and not files(tmp_path)
    ahead.read(tmp_path)
    assert ahead.take(4) is None, "a checkpoint without one: the prompts are asked anew"


def test_scored_samples_are_those_that_are_trained_on():
    def sample(n: int, train: bool) -> Sample:
        return Sample([n], [-0.1], [2 if n % 2 else 3], "stop", train=train)

    samples = SampleGroup(Prompt(0, (7, 8), "x"), [sample(n, n != 5) for n in range(40)])
    chosen = scored_numbers([samples])
    assert len(chosen) == 16 and 5 not in chosen and min(chosen) == 0 and max(chosen) > 36
    assert scored_numbers([SampleGroup(samples.prompt, [SimpleNamespace(train=False)])]) == []
