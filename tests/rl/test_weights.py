"""When engines have which weights, and where the seconds of a step go."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from fp8slurm.config import RunConfig
from fp8slurm.rl import stopwatch
from fp8slurm.rl.stopwatch import Stopwatch
from fp8slurm.rl.weights import EngineWeights


def weights_with(config: RunConfig, channel: SimpleNamespace, **attributes) -> EngineWeights:
    """Nothing is sent through any group."""
    weights = EngineWeights(config, None, channel, None, "", None, Stopwatch())
    weights._groups, weights._stream = {}, SimpleNamespace(send=lambda *_: None, seconds={})
    for name, value in attributes.items():
        setattr(weights, name, value)
    return weights


def test_weights_that_engines_lost_are_sent_again_before_the_question() -> None:
    events: list = []
    answers = iter([[({"weights_lost": True}, None), ({}, None)], [({"n": 1}, None), ({"n": 2}, None)]])
    channel = SimpleNamespace(
        post=lambda kind, **_: events.append(kind),
        collect=lambda _: next(answers),
        call=lambda kind: events.append(kind),
    )
    weights = weights_with(RunConfig(), channel, sent_version=4, sleeps=True)
    arrived = iter([False, True, True])  # the first time an engine is lost again while they are sent

    def send(version: int) -> bool:
        events.append(version)
        weights._asleep = False
        return next(arrived)

    weights._send = send
    assert weights.ask("rollout", 4) == [({"n": 1}, None), ({"n": 2}, None)]
    assert events == ["rollout", 4, 4, "rollout"] and weights.sent_version == 4
    weights.sleep()
    weights.sleep()
    assert events[4:] == ["sleep"] and weights.sent_version is None, "what sleeps has given its weights up"
    weights.sync(4)
    assert events[5:] == [4] and weights.sent_version == 4
    weights.sync(4)
    assert events[5:] == [4], "once a version"


def test_engines_that_sleep_are_sent_their_weights_before_they_are_asked() -> None:
    events: list = []
    channel = SimpleNamespace(
        post=lambda kind, **_: events.append(kind),
        collect=lambda *_: [({}, None)],
        call=lambda kind: events.append(kind),
    )
    weights = weights_with(
        RunConfig(),
        channel,
        sent_version=4,
        sleeps=True,
        trainer=SimpleNamespace(make_room=lambda: events.append("room")),
    )
    weights.sleep()
    weights.ask("evaluate", 5)
    assert events == ["sleep", "room", "update", "evaluate"] and weights.sent_version == 5


def test_weights_that_engines_were_to_keep_are_not_replaced_in_silence() -> None:
    frozen = RunConfig.model_validate({"control": {"freeze_engine": True}})
    channel = SimpleNamespace(post=lambda *_, **__: None, collect=lambda _: [({"weights_lost": True}, None)])
    weights = weights_with(frozen, channel, sent_version=4)
    with pytest.raises(RuntimeError, match="lost the weights that it was to keep"):
        weights.ask("rollout", 7)
    weights._send = lambda version: [][0]
    with pytest.raises(IndexError):  # those that it was to keep can be sent again
        weights.ask("rollout", 4)


@pytest.mark.parametrize(
    ("verify", "compared"), [("off", [0, 0, 0, 0]), ("first", [1, 1, 1, 0]), ("always", [1, 1, 1, 1])]
)
def test_which_updates_are_compared(verify: str, compared: list[int]) -> None:
    """Two that arrived, of which the second is the first that engines copy into place; one that was lost counts for nothing."""
    answers = iter([[{}], [{"weights_lost": True}], [{}], [{}]])
    posted = []
    channel = SimpleNamespace(
        post=lambda kind, **a: posted.append(a), collect=lambda: [(a, None) for a in next(answers)]
    )
    weights = weights_with(RunConfig.model_validate({"sync": {"verify": verify}}), channel)
    assert [weights._send(5) for _ in range(4)] == [True, False, True, True]
    assert [p["verify"] for p in posted] == [bool(c) for c in compared] and [p["number"] for p in posted] == [
        1,
        2,
        3,
        4,
    ]


def test_weights_that_a_rollout_has_to_send_first_are_not_counted_twice(monkeypatch) -> None:
    now = iter(
        (0.0, 1.0, 1.5, 4.5, 5.0, 7.0, 10.0, 10.5)
    )  # of rollout, sync within it, sleep within sync; then of sync alone
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: next(now))
    beats: list[str] = []
    watch = Stopwatch(lambda: beats.append("beat"))
    with watch.timed("rollout"):
        with watch.timed("sync"):
            with watch.timed("sleep"):
                pass
    with watch.timed("sync"):
        pass
    assert watch.seconds == {"sleep": 3.0, "sync": 4.0 - 3.0 + 0.5, "rollout": 7.0 - 4.0} and len(beats) == 4
    watch.clear(keep=["sleep"])
    assert watch.seconds == {"sleep": 3.0}
