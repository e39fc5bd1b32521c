"""The next step's rollout: what is kept, what a checkpoint has of it, and what becomes of it when engines lose weights."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fp8slurm.core.stopping import StepAbandoned
from fp8slurm.core.types import Prompt, Sample, SampleGroup
from fp8slurm.rl.ahead import FILE, RolloutAhead, scored_sequences, staleness


class Engines:
    """rl/weights.py's calls, in order; `version` is what engines have when they answer."""

    def __init__(self, version: int) -> None:
        self.sent_version, self.calls = version, []

    def sync(self, version):
        self.calls.append(("sync", version))

    def post(self, kind, **request):
        self.calls.append((kind, request))

    def collect(self, kind, version, abandon, **request):
        self.calls.append(("collect", version))
        if abandon is not None and abandon():
            raise StepAbandoned(abandon())
        return [({"cursor": 8}, torch.arange(5, dtype=torch.uint8)), ({"cursor": 8}, torch.empty(0, dtype=torch.uint8))]


def test_a_rollout_that_was_begun_is_collected_once_and_survives_in_a_checkpoint(tmp_path):
    engines = Engines(3)
    ahead = RolloutAhead(engines)
    assert ahead.take(3) is None and engines.calls == []
    ahead.begin(3, step=4, cursor=4)
    assert ahead.under_way and engines.calls == [("sync", 3), ("rollout", {"step": 4, "cursor": 4})]
    ahead.write(tmp_path)
    assert not (tmp_path / FILE).exists(), "what engines are still at is not written"
    ahead.finish(4)
    ahead.finish(4)
    assert engines.calls[2:] == [("collect", 4)]
    ahead.write(tmp_path)
    again = RolloutAhead(Engines(9))
    again.read(tmp_path)
    for one in (ahead.take(4), again.take(4)):
        assert one.version == 3 and [a for a, _ in one.answers] == [{"cursor": 8}] * 2
        assert one.answers[0][1].tolist() == [0, 1, 2, 3, 4] and one.answers[1][1].numel() == 0
    assert ahead.take(4) is None


def test_a_rollout_that_is_given_up_leaves_nothing(tmp_path):
    ahead = RolloutAhead(Engines(3))
    ahead.begin(3, step=4)
    with pytest.raises(StepAbandoned, match="no time"):
        ahead.finish(4, lambda: "no time")
    ahead.write(tmp_path)
    assert not (tmp_path / FILE).exists()
    ahead.read(tmp_path)
    assert ahead.take(4) is None, "a checkpoint without one: the prompts are asked anew"


def test_scored_samples_are_those_that_are_trained_on():
    def sample(n: int, train: bool) -> Sample:
        return Sample([n], [-0.1], [2 if n % 2 else 3], "stop", train=train)

    group = SampleGroup(Prompt(0, (7, 8), "x"), [sample(n, n != 5) for n in range(40)])
    chosen = scored_sequences([group])
    assert len(chosen) == 16 and 5 not in chosen and min(chosen) == 0 and max(chosen) > 36
    assert chosen[0] == [[7, 8], [0]]
    assert staleness([group], 3) == 0.5
    assert scored_sequences([SampleGroup(group.prompt, [SimpleNamespace(train=False)])]) == {}
