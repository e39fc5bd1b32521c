"""Updates of which only what changed travels: the sender's and the rollout worker's ends, over real groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fp8slurm.config import RunConfig
from fp8slurm.core.errors import InputError
from fp8slurm.engine.inside import delta as codec
from fp8slurm.engine.inside.recorded import DELTA, KNOWN
from fp8slurm.sync import paths
from fp8slurm.sync.bucket import WeightBucket, layout, payload_bytes
from fp8slurm.sync.delta import MOST, LastSent, _compare, elements_at
from fp8slurm.sync.direct import DirectReceiver
from fp8slurm.sync.groups import Group, host_store
from fp8slurm.sync.receiver import CorruptUpdate, HostReceiver, checksum, publish_checksums
from fp8slurm.sync.stream import Sender
from fp8slurm.sync.transport import Transport

FP8 = torch.float8_e4m3fn
PLAN = layout(
    [
        [("a.weight", FP8, (256, 256)), ("a.weight_scale_inv", torch.float32, (2, 2)), ("norm", torch.bfloat16, (99,))],
        [("b.weight", FP8, (130, 128)), ("b.weight_scale_inv", torch.float32, (2, 1))],
    ],
    66_000,
)
assert len(PLAN) == 2


@dataclass
class Link:
    """A rank and a rollout worker of one source in one process; what is sent is what `send` is given."""

    sender: Sender
    receiver: HostReceiver
    group: Group
    store: Any
    pool: ThreadPoolExecutor
    number: int = 0
    sent_bytes: list[int] = field(default_factory=list)

    def send(
        self, payloads: list[torch.Tensor], verify: bool = True, damage: Callable[[torch.Tensor], None] | None = None,
        arrives: bool = True,
    ) -> list[WeightBucket]:  # fmt: skip
        """One update; the buckets as engines get them, with copies of their payloads."""
        self.number += 1
        self.sender.prepare(lambda command, **asked: [self.receiver.prepare(SimpleNamespace(), asked)])
        sums, self.sent_bytes = [], []

        def to_hosts(source: str, bucket: WeightBucket) -> Any:
            sums.append(checksum(bucket.payload))
            sent = (bucket.payload if bucket.delta is None else bucket.delta.payload).clone()
            if damage is not None and bucket.delta is not None:
                damage(sent)
            self.sent_bytes.append(sent.numel())
            return self.group.start_broadcast(sent, 0)

        def stream(version: int, start: Callable[[str, WeightBucket], Any]) -> None:
            for specs, payload in zip(PLAN, payloads, strict=True):
                start("stage0", WeightBucket(version, specs, payload)).wait()
            publish_checksums(self.store, self.number, "stage0", sums)

        def receive() -> list[WeightBucket]:
            return [
                replace(b, payload=b.payload.clone()) for b in self.receiver.receive(self.number, self.number, verify)
            ]

        coming = self.pool.submit(receive)
        self.sender.send(self.number, self.number, SimpleNamespace(send=stream), to_hosts, verify)
        got = coming.result(20)
        self.sender.done(self.number, arrives)
        return got


@pytest.fixture
def link() -> Iterator[Link]:
    store, _ = host_store("127.0.0.1")
    with ThreadPoolExecutor(1) as pool:
        there = pool.submit(Group, store.clone(), "sync/stage0", 1, 2, "127.0.0.1")
        group = Group(store, "sync/stage0", 0, 2, "127.0.0.1")
        receiver = HostReceiver(store.clone(), [("stage0", there.result(), PLAN)], keep=True, delta=True)
        yield Link(Sender(LastSent(store)), receiver, group, store, pool)


def payloads(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (payload_bytes(s),), generator=generator, dtype=torch.uint8) for s in PLAN]


def changed(last: list[torch.Tensor], share: float, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    out = [p.clone() for p in last]
    for p in out:
        places = torch.randperm(p.numel(), generator=generator)[: int(share * p.numel())]
        p[places] += 1
    return out


def check(link: Link, got: list[WeightBucket], want: list[torch.Tensor]) -> None:
    assert [torch.equal(b.payload, p) for b, p in zip(got, want, strict=True)] == [True] * len(want)
    assert all(torch.equal(b.payload, p) for b, p in zip(link.receiver.held, want, strict=True))


def test_many_updates_leave_what_whole_ones_leave(link: Link) -> None:
    state = payloads(0)
    check(link, link.send(state), state)
    whole = sum(p.numel() for p in state)
    assert link.receiver.figures == {"sync/bytes": whole, "sync/sent_bytes": whole}  # nothing to compare with yet
    for i, share in enumerate((0.001, 0.01, 0.0, 0.05, 0.02)):
        last, state = state, changed(state, share, i)
        got = link.send(state)
        check(link, got, state)
        assert all(b.delta is not None and b.delta.base == link.number - 1 for b in got)
        assert sum(link.sent_bytes) == link.receiver.figures["sync/sent_bytes"] < whole / 4
        codes = sum(
            int((a.view(torch.uint8) != b.view(torch.uint8)).sum())
            for p, q, specs in zip(last, state, PLAN)
            for (_, a), (_, b) in zip(WeightBucket(0, specs, p).views(), WeightBucket(0, specs, q).views())
            if a.dtype == FP8
        )
        assert link.receiver.figures["sync/changed_codes"] == codes / (256 * 256 + 130 * 128)
    assert not link.store.check(["delta/1/stage0/0"]), "what was said of an update stays in the store"


def test_a_bucket_of_which_more_changed_than_pays_goes_whole(link: Link) -> None:
    state = payloads(0)
    link.send(state)
    state = [changed(state, 0.5, 1)[0], changed(state, 0.01, 1)[1]]
    got = link.send(state)
    check(link, got, state)
    assert [b.delta is None for b in got] == [True, False] and link.sent_bytes[0] == payload_bytes(PLAN[0])
    assert 0.3 < link.receiver.figures["sync/changed_codes"] < 0.5  # counted all the same
    most = int(MOST * state[0].numel()) // 3
    state = [p.clone() for p in state]
    state[0][: most + 1] += 1
    assert link.send(state)[0].delta is None
    state[0][:most] += 1
    assert link.send(state)[0].delta is not None


def test_whoever_may_have_missed_an_update_gets_a_whole_one(link: Link) -> None:
    state = payloads(0)
    link.send(state)
    state = changed(state, 0.01, 1)
    link.send(state, arrives=False)  # an engine lost it
    state = changed(state, 0.01, 2)
    got = link.send(state)
    check(link, got, state)
    assert all(b.delta is None for b in got)
    link.receiver.held = []  # the rollout worker has another one, or none
    got = link.send(changed(state, 0.01, 3))
    assert all(b.delta is None for b in got)
    link.sender = Sender(LastSent(link.store))  # a trainer that resumes knows of no update
    got = link.send(changed(state, 0.01, 4))
    assert all(b.delta is None for b in got)
    assert all(b.delta is not None for b in link.send(changed(state, 0.01, 5)))


def test_changes_that_arrive_damaged_end_the_update(link: Link) -> None:
    state = payloads(0)
    link.send(state, verify=False)

    def damage(sent: torch.Tensor) -> None:
        sent[-1] ^= 4

    with pytest.raises(CorruptUpdate, match="the changes to bucket 0 of stage0 are not what was sent"):
        link.send(changed(state, 0.01, 1), verify=False, damage=damage)
    assert not link.receiver.held


def test_a_base_that_is_not_what_was_sent_is_noticed_by_the_comparison(link: Link) -> None:
    state = payloads(0)
    link.send(state)
    link.receiver.held[0].payload[5] ^= 1
    with pytest.raises(CorruptUpdate, match=r"bucket 0 of stage0 .* is not what was sent"):
        link.send(changed(state, 0.001, 1))


@pytest.mark.parametrize("share", [0.0, 0.02, 0.9])
def test_changed_numbers_are_counted_by_kind_either_way(share: float) -> None:
    for specs, old in zip(PLAN, payloads(3)):
        (new,) = changed([old], share, 1)
        at = codec.positions(old, new, old.numel())
        assert at is not None
        assert elements_at(specs, at) == _compare(specs, old, new)


class Client:
    """An engine that says `refused` when asked whether it takes changes."""

    url = "http://engine"

    def __init__(self, refused: list[str]) -> None:
        self.refused, self.asked = refused, 0

    def changes_refused(self) -> list[str]:
        self.asked += 1
        return self.refused


def direct(refused: list[str]) -> tuple[DirectReceiver, SimpleNamespace, list[Transport]]:
    section = RunConfig().sync.model_copy(update={"transport": "gloo-direct", "delta": True})
    config = RunConfig().model_copy(update={"sync": section})
    transports = [paths.transport(config, ()) for _ in range(2)]
    for transport in transports:
        transport.open(Client(refused), 1)  # type: ignore[arg-type]
    receiver = paths.receiver(config, 0, SimpleNamespace(), [])  # type: ignore[arg-type]
    assert isinstance(receiver, DirectReceiver)
    return receiver, SimpleNamespace(transports=transports), transports


def test_engines_of_which_one_was_restarted_do_not_have_the_base() -> None:
    receiver, engines, transports = direct([])
    assert receiver.prepare(engines, {"base": 3}) == {"has": False}
    for transport in transports:
        transport.number = 3
    assert receiver.prepare(engines, {"base": 3}) == {"has": True} == receiver.prepare(engines, {"base": 3})
    assert [t._client.asked for t in transports] == [1, 1]  # type: ignore[union-attr]
    transports[1].open(Client([]), 1)  # type: ignore[arg-type]
    assert receiver.prepare(engines, {"base": 3}) == {"has": False}


def test_engines_that_take_no_changes_end_a_run_straight_into_them() -> None:
    receiver, engines, transports = direct(["the bucket from x on: it calls fill_"])
    for transport in transports:
        transport.number = 1
    with pytest.raises(InputError, match=r"--sync.delta: .*the bucket from x on: it calls fill_; --sync.no-delta"):
        receiver.prepare(engines, {"base": 1})


def test_an_engine_is_told_of_changes_by_the_bucket_that_it_knows() -> None:
    _, _, (transport, _) = direct([])
    transport.announce(PLAN[0])
    ((whole, *_),) = transport.announce(PLAN[0])
    last = LastSent(SimpleNamespace(set=lambda *_: None, delete_key=lambda _: None))
    first = payloads(0)
    for number, (state, *_) in enumerate((first, changed(first, 0.01, 1)), 1):
        last.begin(number > 1)
        change = last.changes(number, "s", WeightBucket(number, PLAN[0], state)).delta
        last.done(number, True)
    assert change is not None
    ((name, dtype, shape, start),) = transport.announce_changes(PLAN[0], change)
    assert name.removeprefix(DELTA).split(":") == [
        whole.removeprefix(KNOWN), str(change.changed), str(codec.checksum(change.payload))
    ]  # fmt: skip
    assert (dtype, shape, start) == ("uint8", (change.payload.numel(),), 0)
