"""The engines of a node: which GPUs each gets, and two real ones that share rollouts and updates."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import MagicMock

import psutil
import pytest
import torch

from fp8slurm.config import RunConfig
from fp8slurm.engine.client import GenerateRequest
from fp8slurm.engine.completions import continued, joined
from fp8slurm.engine.inside.digest import expected_digests, first_difference
from fp8slurm.engine.server import EngineError
from fp8slurm.rollout.engines import EngineSet, settings_of_engines
from fp8slurm.sync.bucket import WeightBucket, layout, payload_bytes
from fp8slurm.sync.engine_link import EngineLink

PATIENCE = 240
LONG = [GenerateRequest([7 * i % 300, 3, i], 100, seed=i) for i in range(24)]
"""Seconds of work for both."""


@pytest.mark.parametrize(
    "visible, gpus, expected",
    [
        ("0,1,2,3,4,5,6,7", [(i,) for i in range(8)], [(str(i),) for i in range(8)]),
        ("4,5,6,7", [(0, 1), (2, 3)], [("4", "5"), ("6", "7")]),  # what Slurm gave this job of the node's GPUs
        ("GPU-a,GPU-b,GPU-c,MIG-d", [(2,), (3,)], [("GPU-c",), ("MIG-d",)]),  # split: the first two train
        ("3", [(0,)], [("3",)]),
        (None, [(), ()], [None, None]),  # the CPU
    ],
)
def test_every_engine_gets_its_gpus_of_the_nodes_list(monkeypatch, visible, gpus, expected):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    settings = settings_of_engines(RunConfig(), gpus)
    assert [s.gpus for s in settings] == expected
    assert [s.share for s in settings] == [(i, len(gpus)) for i in range(len(gpus))]


def test_too_few_gpus_are_named(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    config = RunConfig(engine={"per_node": 2, "tensor_parallel_size": 2})
    with pytest.raises(
        ValueError, match="per-node 2 x --engine.tensor-parallel-size 2: .* take 4 GPUs .* 2 are visible"
    ):
        settings_of_engines(config, [(0, 1), (2, 3)])


@pytest.mark.parametrize(("log", "named"), [("cuMemCreate CUDA_ERROR: out of memory", True), ("Killed", False)])
def test_an_engine_that_finds_no_room_when_it_wakes_says_so(tmp_path, monkeypatch, log, named):
    """Stand-ins: only a GPU can have no room for a server that sleeps."""

    class Client:
        def resume_memory(self) -> None:
            raise EngineError("the connection broke")

    engines = EngineSet(RunConfig(engine={"per_node": 2}), tmp_path, tmp_path, 0, [(), ()], nullcontext, lambda: None)
    failed = {}
    monkeypatch.setattr(engines, "restart_failed", failed.update)
    asleep, awake = engines.members
    engines.asleep.add(asleep)
    for member in engines.members:
        member.client = Client()
        monkeypatch.setattr(member.engine, "log_tail", lambda: log)
    engines.wake()
    assert list(failed) == [asleep], "the one that is awake was woken"
    said = str(failed[asleep])
    assert ("lower --engine.mem-fraction, now 0.8" in said) == named and said.endswith("the connection broke")


def two_stand_ins(tmp_path, monkeypatch) -> EngineSet:
    """Two engines of which only the bookkeeping is there: a restart succeeds, whatever made it necessary."""
    config = RunConfig(engine={"per_node": 2, "max_restarts": 3})
    engines = EngineSet(config, tmp_path, tmp_path, 0, [(), ()], nullcontext, lambda: None)

    def restart_once(member) -> None:
        engines.asleep.discard(member)
        engines.loads(member)

    engines.loads = lambda member: None
    monkeypatch.setattr(engines, "restart_once", restart_once)
    return engines


def test_an_engine_that_only_comes_back_and_takes_its_weights_is_given_up(tmp_path, monkeypatch):
    engines = two_stand_ins(tmp_path, monkeypatch)
    member = engines.members[0]
    member.link = SimpleNamespace(update=lambda version, buckets, **_: None)
    engines.loads = lambda m: engines._load(m, iter(()), False)  # what a restart ends with
    for _ in range(3):
        engines.restart(member, EngineError("it died of this prompt"))
    with pytest.raises(EngineError, match="it died of this prompt"):
        engines.restart(member, EngineError("it died of this prompt"))
    member.done()  # an answer
    engines.restart(member, EngineError("it died of another one"))


def test_what_the_engines_of_a_node_should_hold_is_computed_once(tmp_path, monkeypatch):
    """Stand-ins for the servers; each is compared all the same."""
    (tmp_path / "config.json").write_text('{"num_key_value_heads": 1}')
    specs = layout([[("model.norm.weight", torch.bfloat16, (8,))]], 1 << 16)[0]
    sent = WeightBucket(3, specs, torch.arange(16, dtype=torch.uint8))
    right = expected_digests(sent.views(), num_key_value_heads=1)
    computed = []

    def count(*arguments, **more):
        computed.append(threading.current_thread())
        return expected_digests(*arguments, **more)

    monkeypatch.setattr("fp8slurm.sync.engine_link.expected_digests", count)
    engines = EngineSet(
        RunConfig(engine={"per_node": 3}), tmp_path, tmp_path, 0, [(), (), ()], nullcontext, lambda: None
    )
    failed = {}
    monkeypatch.setattr(engines, "restart_failed", failed.update)
    for number, member in enumerate(engines.members):
        held = right if number < 2 else [{"model.norm.weight": "0" * 64}]
        client = MagicMock(url=member.title)
        client.model_info.return_value, client.server_info.return_value = (
            {"model_path": str(tmp_path)},
            {"dtype": "bfloat16"},
        )
        client.digest.return_value = held
        transport = MagicMock(seconds={})
        member.link = EngineLink(client, transport=transport)
        member.link.open()
        assert member.link.transport is transport
    for version in (3, 4):
        sent.version = version
        computed.clear()
        engines.update(version, iter([sent]), verify=version == 3)
        assert len(computed) == (version == 3)
        if version == 3:
            (bad,) = failed
            assert bad is engines.members[2] and "model.norm.weight" in str(failed.pop(bad))


def test_an_engine_that_is_restarted_when_it_should_sleep_sleeps(tmp_path, monkeypatch):
    engines = two_stand_ins(tmp_path, monkeypatch)
    fails = [EngineError("it is gone")]

    def release() -> None:
        if fails:
            raise fails.pop()

    engines.members[0].client = SimpleNamespace(release_memory=lambda: None)
    engines.members[1].client = SimpleNamespace(release_memory=release)
    engines.sleep()
    assert engines.asleep == set(engines.members) and engines.restarts == 1
    fails += [EngineError("it is gone")] * 9
    engines.asleep.clear()
    with pytest.raises(EngineError, match="it is gone"):
        engines.sleep()


class Node:
    """Two engines as a rollout worker has them; `held` is its copy of the last update."""

    def __init__(self, folder, write_fp8_model) -> None:
        self.folder, self.progress, self.held = folder, 0, []
        self.first, self.second = (write_fp8_model(folder / name, seed) for name, seed in (("a", 1), ("b", 2)))
        config = RunConfig(
            run={"deterministic": True},
            engine={"per_node": 2, "max_running_requests": 32, "max_total_tokens": 8192, "ready_timeout_s": 200},
            slurm={"engine_threads": 1},
            watchdog={"timeout_s": 30},
            sync={"verify": "always"},
        )
        self.engines = EngineSet(config, folder / "a", folder, 0, [(), ()], nullcontext, self.moved)

    def moved(self) -> None:
        self.progress += 1

    def processes(self, number: int) -> list[psutil.Process]:
        return self.engines.members[number].engine._family()

    def scheduler(self, number: int) -> psutil.Process:
        def line(p: psutil.Process) -> str:
            try:
                return " ".join(p.cmdline())
            except psutil.ZombieProcess:  # one that was ended before this
                return ""

        return next(p for p in self.processes(number) if "scheduler" in line(p))

    def during(self, requests, act):
        """The responses, `act` called once both engines are at work on them."""
        timer = threading.Thread(target=self._act_when_busy, args=(act,))
        timer.start()
        done = self.engines.generate(requests)
        timer.join()
        return done

    def _act_when_busy(self, act) -> None:
        deadline = time.monotonic() + PATIENCE
        while not all(m.busy for m in self.engines.members) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        act()

    def update(self, version: int, tensors: dict[str, torch.Tensor], source=iter) -> None:
        self.held = []
        made = []
        for specs in layout([[(n, t.dtype, tuple(t.shape))] for n, t in tensors.items()], 400_000):
            made.append(WeightBucket(version, specs, torch.empty(payload_bytes(specs), dtype=torch.uint8)))
            for name, view in made[-1].views():
                view.copy_(tensors[name])

        def incoming():
            yield from source(made)
            self.held = made  # as sync/receiver.py: once all of it has arrived

        self.engines.update(version, incoming(), verify=True)

    def digests(self) -> list[dict]:
        return [json.loads((self.folder / f"digests_0_{i}.json").read_text()) for i in range(2)]


@pytest.fixture(scope="module")
def node(tmp_path_factory, write_fp8_model) -> Iterator[Node]:
    node = Node(tmp_path_factory.mktemp("node"), write_fp8_model)
    node.engines.start()
    try:
        node.engines.connect(lambda: node.held)
        yield node
    finally:
        node.engines.stop()


@pytest.fixture(scope="module")
def whole(node):
    """Undisturbed responses under version 5."""
    node.update(5, node.second)
    return node.engines.generate(LONG)


@pytest.mark.slow
def test_one_update_reaches_both_and_a_rollout_is_shared(node, whole):
    """Both hold the same bytes; each got a fixed half as one batch; the answers are in order and come again."""
    held = node.digests()
    assert held[0] == held[1] and held[0]["version"] == 5
    facts = {"num_key_value_heads": 2, "tie_word_embeddings": True}
    assert first_difference(held[0]["digests"], expected_digests(node.second.items(), **facts)) is None
    assert first_difference(held[0]["digests"], expected_digests(node.first.items(), **facts)) is not None
    assert {"receive", "handover", "load", "session", "verify"} == node.engines.update_seconds.keys()
    assert node.engines.update_counts["buckets"] > 3
    assert {v for g in whole for v in g.weight_versions} == {5}
    halves = [m.client.generate(half, one_batch=True) for m, half in zip(node.engines.members, (LONG[12:], LONG[:12]))]
    assert whole == halves[1] + halves[0], "the same batch has the same answers on either engine"
    assert node.engines.generate_batches([LONG[:12], [], LONG[12:]]) == [halves[1], [], halves[0]]
    assert (node.folder / "logs" / "engine_0_0.log").is_file() and (node.folder / "logs" / "engine_0_1.log").is_file()


@pytest.mark.slow
def test_an_engine_killed_in_the_middle_of_a_rollout_changes_nothing(node, whole):
    pids = [node.processes(i)[0].pid for i in range(2)]
    (node.folder / "digests_0_1.json").unlink()
    done = node.during(LONG, lambda: os.kill(node.scheduler(1).pid, signal.SIGKILL))
    assert done == whole and node.engines.restarts == 1
    assert node.processes(0)[0].pid == pids[0] and node.processes(1)[0].pid != pids[1]
    assert node.digests()[1] == node.digests()[0], "it was given the held update, and compared"
    assert node.engines.members[1].failures == 1, "coming back is no answer"
    assert node.engines.generate(LONG) == whole and node.engines.members[1].failures == 0


@pytest.mark.slow
def test_an_engine_that_hangs_is_restarted_and_one_that_dies_in_an_update_disturbs_nobody(node, whole):
    """A stopped scheduler computes nothing: its half goes to the other. Meanwhile the watchdog hears that work goes on."""
    restarts, node.progress = node.engines.restarts, 0
    first = node.processes(0)[0].pid
    stopped = node.scheduler(1)
    done = node.during(LONG, stopped.suspend)
    assert done == whole and node.engines.restarts == restarts + 1 and node.processes(0)[0].pid == first
    assert not psutil.pid_exists(stopped.pid) and node.progress > 0

    def dies_after_two(buckets):
        for i, bucket in enumerate(buckets):
            if i == 2:
                os.kill(node.processes(1)[0].pid, signal.SIGKILL)
                assert node.engines.members[1].engine.wait_exit(60)
            yield bucket

    node.update(6, node.first, dies_after_two)
    assert node.engines.restarts == restarts + 2 and node.processes(0)[0].pid == first
    assert [d["version"] for d in node.digests()] == [6, 6] and node.digests()[0] == node.digests()[1]
    after = node.engines.generate(LONG)
    assert {v for g in after for v in g.weight_versions} == {6} and after != whole


@pytest.mark.slow
def test_single_requests_go_on_over_an_update_a_dead_engine_and_a_stop(node):
    """Tokens from before an update keep their version; what a dead engine had is asked of the other; what a stop ends
    goes on from its tokens."""
    engines = node.engines
    node.update(7, node.first)

    async def ask(requests):
        return await asyncio.gather(*(engines.complete(request) for request in requests))

    def ended(g):
        return g.finish_reason == "stop" or g.finish_reason == "length" and len(g.token_ids) == 100

    def begun(requests):
        work = engines.completions.start(ask(requests))
        node._act_when_busy(lambda: None)
        return work

    work = begun(LONG)
    node.update(8, node.second)
    over = engines.completions.wait(work)
    assert all(ended(g) and len(g.token_ids) == len(g.logprobs) == len(g.weight_versions) for g in over)
    assert {v for g in over for v in g.weight_versions} == {7, 8}
    assert all(g.weight_versions == sorted(g.weight_versions) for g in over)

    restarts, work = engines.restarts, begun(LONG)
    os.kill(node.scheduler(1).pid, signal.SIGKILL)
    assert all(ended(g) for g in engines.completions.wait(work))
    assert all(m.busy == 0 for m in engines.members)
    deadline = time.monotonic() + PATIENCE
    while engines.completions._failed and time.monotonic() < deadline:  # the other one did all of it meanwhile
        time.sleep(0.05)

    work = begun(LONG)
    engines.completions.stop(work)
    parts = work.result()
    cut = [(r, g) for r, g in zip(LONG, parts) if g.finish_reason == "abort" and g.token_ids]
    assert len(cut) > 8 and all(len(g.token_ids) == len(g.logprobs) < 100 for _, g in cut)
    rest = engines.completions.run(ask([continued(r, g) for r, g in cut]))
    together = [joined(part, more) for (_, part), more in zip(cut, rest)]
    assert all(ended(g) for g in together)
    prompt, whole = cut[0][0].token_ids, together[0]
    scores = engines.score([prompt + whole.token_ids])[0][len(prompt) - 1 :]
    # rounding of prefill against decode, in FP8 with random weights; after other tokens they are a nat apart
    assert (torch.tensor(scores) - torch.tensor(whole.logprobs)).abs().mean() < 0.1
    assert engines.restarts == restarts + 1  # where the dead one had answered all it had, the next request met it
