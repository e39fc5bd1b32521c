"""Updates into a real engine with two tensor-parallel ranks: bytes, versions, and updates that fail."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import requests
import torch

from fp8slurm.config.schema import EngineSection
from fp8slurm.engine.client import EngineClient, GenerateRequest
from fp8slurm.engine.server import Engine, EngineError, EngineSettings
from fp8slurm.sync.bucket import WeightBucket, layout, payload_bytes
from fp8slurm.sync.delta import LastSent
from fp8slurm.sync.engine_link import EngineLink

pytestmark = pytest.mark.slow

SECTION = EngineSection(tensor_parallel_size=2, max_running_requests=32, max_total_tokens=4096, ready_timeout_s=120)
BATCH = [GenerateRequest([7 * i % 300, 3, i], 6, seed=i) for i in range(24)]


@pytest.fixture(scope="module")
def engine(tmp_path_factory, write_fp8_model) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("link")
    engine = Engine(folder / "a", folder / "log", EngineSettings(SECTION, cpu=True, cpu_threads=1))
    engine.first, engine.second = (write_fp8_model(folder / name, seed) for name, seed in (("a", 1), ("b", 2)))
    engine.start()
    engine.wait_ready()
    yield engine
    engine.stop()


def client_of(engine: Engine) -> EngineClient:
    return EngineClient(engine.url, engine.api_key, timeout_s=60)


def buckets(tensors: dict[str, torch.Tensor], version: int) -> list[WeightBucket]:
    made = []
    for specs in layout([[(n, t.dtype, tuple(t.shape))] for n, t in tensors.items()], 400_000):
        made.append(WeightBucket(version, specs, torch.empty(payload_bytes(specs), dtype=torch.uint8)))
        for name, view in made[-1].views():
            view.copy_(tensors[name])
    return made


def test_updates_arrive_byte_for_byte(engine: Engine) -> None:
    client = client_of(engine)
    link = EngineLink(client, 2)
    link.open()
    at_start = client.generate(BATCH, one_batch=True)
    assert {v for g in at_start for v in g.weight_versions} == {-1}
    second = buckets(engine.second, 5)
    assert len(second) > 3
    link.update(5, second, verify=True)
    updated = client.generate(BATCH, one_batch=True)
    assert {v for g in updated for v in g.weight_versions} == {5}
    assert sum(a.token_ids != b.token_ids for a, b in zip(at_start, updated)) > 20
    # back to what it loaded from disk: no value of the second model is left anywhere
    link.update(6, iter(buckets(engine.first, 6)))
    link.verify(buckets(engine.first, 6))
    back = client.generate(BATCH, one_batch=True)
    assert [(g.token_ids, g.logprobs) for g in back] == [(g.token_ids, g.logprobs) for g in at_start]

    scales = engine.first["model.layers.0.mlp.down_proj.weight_scale_inv"].clone()
    scales.view(torch.int32)[0, -1] += 1
    changed = {**engine.first, "model.layers.0.mlp.down_proj.weight_scale_inv": scales}
    with pytest.raises(EngineError, match=r"down_proj.weight_scale_inv on the engine's rank 1 differs"):
        link.verify(buckets(changed, 6))
    assert link.broken
    link.close()


def test_failed_update_serves_nothing_until_a_restart(engine: Engine) -> None:
    client = client_of(engine)
    link = EngineLink(client, 2)
    link.open()
    bad = dict(engine.second)
    name = "model.layers.1.self_attn.o_proj.weight"
    bad[name] = bad[name][:128]
    with pytest.raises(EngineError, match="update_weights_from_distributed answered 400"):
        link.update(7, buckets(bad, 7))
    with pytest.raises(EngineError, match="must not generate: the update to version 7 failed"):
        client.generate(BATCH)
    with pytest.raises(EngineError, match="needs a restart"):
        link.update(8, buckets(engine.second, 8))
    with pytest.raises(requests.exceptions.ReadTimeout):  # nor does the server, for anybody
        body = {"input_ids": [1, 2], "sampling_params": {"max_new_tokens": 1}}
        key = {"Authorization": f"Bearer {engine.api_key}"}
        requests.post(engine.url + "/generate", json=body, headers=key, timeout=2)

    engine.restart()
    link.close()
    link = EngineLink(client_of(engine), 2)
    link.open()
    link.update(8, buckets(engine.second, 8), verify=True)
    assert {v for g in link.client.generate(BATCH) for v in g.weight_versions} == {8}


def states(engine: Engine, count: int) -> Iterator[list[WeightBucket]]:
    """Updates 1, 2, ... of a sender with sync.delta: the first whole, a few bytes of every tensor changed before each
    of the others."""
    last = LastSent(SimpleNamespace(set=lambda *_: None, delete_key=lambda _: None))
    generator = torch.Generator().manual_seed(3)
    tensors = {name: t.clone() for name, t in engine.first.items()}
    for number in range(1, count + 1):
        last.begin(number > 1)
        made = [replace(b, number=number) for b in buckets(tensors, 20 + number)]
        yield [last.changes(number, "stage0", b) for b in made]
        last.done(number, True)
        for t in tensors.values():
            flat = t.view(-1).view(torch.uint8)
            flat[torch.randint(0, flat.numel(), (1 + flat.numel() // 500,), generator=generator)] ^= 1


def test_changes_alone_reach_both_ranks_and_damaged_ones_end_the_link(engine: Engine) -> None:
    link = EngineLink(client_of(engine), 2)
    link.open()
    *good, last = states(engine, 5)
    for i, update in enumerate(good):
        assert all((b.delta is not None) == (i > 0) for b in update)
        link.update(update[0].version, update, verify=True)
    assert link.client.changes_refused() == []
    whole = EngineLink(client_of(engine), 2)  # a link that knows nothing of the engine sends all of it
    whole.open()
    whole.update(99, [replace(b, version=99) for b in good[-1]], verify=True)
    whole.close()

    bad = last[1].delta
    assert bad is not None
    bad.payload[-1] ^= 1
    with pytest.raises(EngineError, match="arrived damaged: their checksum differs"):
        link.update(last[0].version, last)
    assert link.broken
    engine.restart()
    link.close()
    link = EngineLink(client_of(engine), 2)
    link.open()
    link.update(last[0].version, last, verify=True)  # of the changes, the damaged ones too, none is sent
    link.close()


def test_dead_engine_ends_an_update(engine: Engine) -> None:
    link = EngineLink(client_of(engine), 2)
    link.open()

    def dying():
        sent = iter(buckets(engine.first, 9))
        yield next(sent)
        engine.stop()
        yield from sent

    with pytest.raises(EngineError, match="the connection broke"):
        link.update(9, dying())
    link.close()
    with pytest.raises(EngineError):
        EngineLink(client_of(engine), 2).open()
