"""Samples from two rollout workers to the ranks that train on them, over a real store and real groups."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fp8slurm.core.stopping import NeverStop
from fp8slurm.core.types import PackedBatch, Prompt, Sample, SampleGroup
from fp8slurm.rl.boundary import StepBoundary
from fp8slurm.rl.exchange import SampleExchange
from fp8slurm.rl.packing import deal, fill, pack
from fp8slurm.rollout.channel import RankChannel, WorkerChannel
from fp8slurm.rollout.dealing import Holder, fill_in
from fp8slurm.rollout.serialization import decode_groups, describe_groups, encode_groups
from fp8slurm.rollout.tally import Tally
from fp8slurm.run.step_times import StepTimes
from fp8slurm.sync import groups as sync_groups
from fp8slurm.sync.signed_store import SignedStore, new_key

WORKERS = 2
SIZES: dict[str, Any] = {"tokens_per_micro_batch": 96, "pad_multiple": 8}


def groups_of(worker: int) -> list[SampleGroup]:
    """16 groups of 4 samples with routing; some with a mask, one of samples that are not trained on."""
    g = torch.Generator().manual_seed(worker)

    def sample(n: int, prompt: int, length: int) -> Sample:
        ids, logprobs = (
            torch.randint(3, 999, (length,), generator=g).tolist(),
            (-torch.rand(length, generator=g)).tolist(),
        )
        routing = torch.randint(0, 8, (prompt + length - 1, 3, 2), generator=g).to(torch.uint8)
        mask = [i % 3 > 0 for i in range(length)] if n == 2 else None
        versions = [4] * (length // 2) + [5] * (length - length // 2)
        return Sample(ids, logprobs, versions, "stop", "text", float(n % 2), routing, n != 3, {"part": 1.0}, mask)

    groups = []
    for i in range(16):
        lengths = torch.randint(1, 40, (4,), generator=g).tolist()
        prompt = Prompt(100 * worker + i, tuple(range(5 + i % 7)), "label", source="s")
        groups.append(SampleGroup(prompt, [sample(n, len(prompt.token_ids), t) for n, t in enumerate(lengths)], worker))
    return groups


class Job:
    """Training ranks and rollout workers in threads."""

    def __init__(self, ranks: int) -> None:
        self.ranks, self.size = ranks, ranks + WORKERS
        self.plain, self.port = sync_groups.host_store("127.0.0.1")
        self.key, self.met = new_key(), threading.Barrier(ranks, timeout=60)
        self.errors: list[BaseException] = []

    def member(self, number: int) -> tuple[SignedStore, sync_groups.Group]:
        store = SignedStore(self.plain.clone(), self.key)
        return store, sync_groups.Group(store, "transport", number, self.size, "127.0.0.1")

    def run(self, rank: Callable[[int, Any, RankChannel], Any]) -> list[Any]:
        """rank(number, store, channel) of every rank, while the workers serve."""
        results: list[Any] = [None] * self.ranks

        def ranks_part(number: int) -> None:
            store, group = self.member(number)
            channel = RankChannel(store, group, self.ranks, WORKERS)
            results[number] = rank(number, store, channel)
            channel.call("stop")

        def guarded(part: Callable[[int], None], number: int) -> None:
            try:
                part(number)
            except BaseException as error:  # noqa: BLE001 - raised below
                self.errors.append(error)

        threads = [threading.Thread(target=guarded, args=(ranks_part, i), daemon=True) for i in range(self.ranks)]
        threads += [threading.Thread(target=guarded, args=(self.worker, i), daemon=True) for i in range(WORKERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        if self.errors:
            raise self.errors[0]
        assert not any(thread.is_alive() for thread in threads)
        return results

    def worker(self, number: int) -> None:
        store, group = self.member(self.ranks + number)
        channel, holder = WorkerChannel(store, group, self.ranks, number), Holder(number, WORKERS)
        while True:
            command = channel.next()
            kind = command.pop("kind")
            if kind == "rollout":
                for round_ in range(2):  # workers tell each other how many groups they have, as worker.py does
                    channel.tell(f"kept/{channel.count}/{round_}/{number}", "4")
                    assert [channel.get(f"kept/{channel.count}/{round_}/{w}") for w in range(WORKERS)] == [4, 4]
                answer = {"cursor": 9, "dropped": 0, "figures": Tally().sums, "reward_failures": 0, "seconds": 1.0}
                channel.answer(answer, holder.hold(answer, groups_of(number)))
            elif kind == "deal":
                parts = holder.parts(command["wanted"], command["first"][number], command["to"], command["texts"])
                channel.answer({}, None, parts)
            else:
                channel.answer({})
                return


class Trainer:
    def __init__(self, rank: int, ranks: int, data_parallel: int) -> None:
        self.rank, self.data_parallel_size = rank, data_parallel
        self.data_parallel_rank = rank // (ranks // data_parallel)  # neighbours cut one model


def same(got: list[PackedBatch], want: list[PackedBatch]) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want):
        assert a.samples == b.samples and a.weight_sum == b.weight_sum
        for name in ("tokens", "labels", "cu_seqlens", "loss_weights", "rollout_logprobs", "advantages", "loss_mask",
                     "routing"):  # fmt: skip
            assert torch.equal(getattr(a, name), getattr(b, name)), name


@pytest.mark.parametrize(("data_parallel", "cut"), [(1, 2), (2, 1), (4, 1), (2, 2)])
def test_a_rank_gets_its_samples_and_no_others(monkeypatch, data_parallel, cut):
    """The micro-batches of every rank are those of the whole batch, and what it receives falls with 1/DP."""
    ranks = data_parallel * cut
    exchanges: list[SampleExchange] = []
    monkeypatch.setattr(
        "fp8slurm.rl.exchange.ranks_values", lambda value: [Trainer(r, ranks, data_parallel).data_parallel_rank
                                                            for r in range(ranks)])  # fmt: skip
    whole = [group for worker in range(WORKERS) for group in groups_of(worker)]
    numbers = range(sum(len(g.samples) for g in whole))
    values = [[0.1 * i + 0.01 * k for k in range(4)] for i in range(len(whole))]
    how = {"updates": 2, "data_parallel_size": data_parallel, **SIZES}
    expected = pack(whole, values, **how)

    def rank(number: int, store: Any, channel: RankChannel) -> tuple[dict[str, float], int]:
        trainer = Trainer(number, ranks, data_parallel)
        weights = type("Weights", (), {"channel": channel})
        answers = channel.call("rollout")
        groups = [replace(g, worker=w) for w, (_, payload) in enumerate(answers) for g in decode_groups(payload)]
        assert not any(s.here for g in groups for s in g.samples)
        deals = deal(groups, **how)
        exchanges.append(exchange := SampleExchange(weights, trainer))
        record = exchange.fetch(groups, deals, also=[0, numbers[-1]])
        mine = {n for each in deals for batch in each.batches[trainer.data_parallel_rank] for n in batch}
        here = {n for n, s in enumerate(s for g in groups for s in g.samples) if s.here}
        assert here == mine | ({0, numbers[-1]} if number == 0 else set())
        for each, update in zip(deals, expected, strict=True):
            same(fill(each, trainer.data_parallel_rank, groups, values, 8), update[trainer.data_parallel_rank])
        return record, sum(s.routing.numel() for g in groups for s in g.samples if s.here)

    got = Job(ranks).run(rank)
    records = [record for record, _ in got]
    assert all(record == records[0] for record in records)
    share = records[0]["data/rank_bytes"] / records[0]["data/all_bytes"]
    assert 1 / data_parallel <= share < 1.25 / data_parallel, share
    kept, all_routing = [n for _, n in got], sum(s.routing.numel() for g in whole for s in g.samples if s.train)
    assert max(kept[1:], default=0) < 1.25 / data_parallel * all_routing, "rank 0 has two more"


def test_the_store_does_not_grow_with_steps():
    """Commands, answers, counts between workers, step boundaries."""
    job = Job(ranks=2)
    sizes: list[int] = []

    def rank(number: int, store: Any, channel: RankChannel) -> None:
        saver = type("Saver", (), {"collect": lambda self, wait: None, "left_s": lambda self: 0.0, "failed": False,
                                   "forget": lambda self: None})()  # fmt: skip
        boundary = StepBoundary(store, number == 0, NeverStop(), saver, StepTimes(), None, job.met.wait, channel.forget)
        for _ in range(12):
            boundary.cross()
            channel.call("rollout")
            to = [[0], [1]]
            answers = channel.call("deal", wanted=[[0, 1], [70]], first=[0, 64], to=to, texts=False)
            assert sum(map(len, channel.receive([a for a, _ in answers], to)[0]))
            job.met.wait()
            if number == 0:
                sizes.append(store.num_keys())
            job.met.wait()

    job.run(rank)
    assert max(sizes[3:]) <= max(sizes[:3]), sizes


def test_a_description_has_what_decides_and_nothing_else():
    groups = groups_of(0)
    payload = describe_groups(groups)
    assert b"label" not in bytes(payload.tolist()) and b"part" not in bytes(payload.tolist())
    assert payload.numel() < 0.4 * encode_groups(groups).numel()
    for got, group in zip(decode_groups(payload), groups, strict=True):
        assert len(got.prompt.token_ids) == len(group.prompt.token_ids) and got.prompt.source == "s"
        for a, b in zip(got.samples, group.samples, strict=True):
            assert len(a.response_ids) == len(b.response_ids) and list(a.weight_versions) == b.weight_versions
            assert (a.reward, a.train, a.finish_reason) == (b.reward, b.train, b.finish_reason)
            assert a.trained_tokens == b.trained_tokens and a.routing.shape == b.routing.shape
            assert (a.loss_mask is None) == (b.loss_mask is None) and (
                not b.loss_mask or list(a.loss_mask) == b.loss_mask
            )
            with pytest.raises(LookupError, match="the rank that trains on the sample"):
                a.response_ids[0]


@pytest.mark.parametrize(("old", "new"), [(b"tokens", b"tokenz"), (b"uint8", b"uint9"), (b"[[4,", b"[[4 "),
                                          (b"[[4,", b"[[4,9"), (b"reward", b"rewarm")])  # fmt: skip
def test_a_damaged_description_is_refused(old, new):
    data = bytes(describe_groups(groups_of(0)).tolist()).replace(old, new)
    data = (len(data.rstrip()) - 8).to_bytes(8, "little") + data.rstrip()[8:]
    with pytest.raises(ValueError, match="sample groups: "):
        decode_groups(torch.frombuffer(bytearray(data), dtype=torch.uint8))


def test_samples_that_do_not_belong_are_refused():
    groups = decode_groups(describe_groups(groups_of(0)))
    other = [SampleGroup(g.prompt, g.samples[:1]) for g in groups_of(1)[:1]]
    with pytest.raises(ValueError, match="a sample of prompt 100 came in place of 0"):
        fill_in(groups, [0], [encode_groups(other)])
    with pytest.raises(ValueError, match="fewer samples came"):
        fill_in(groups, [0], [torch.empty(0, dtype=torch.uint8)])
