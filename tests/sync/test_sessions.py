"""Updates into servers with and without update sessions, while they generate, in every pause mode."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest
import requests
import torch
from test_engine_link import buckets

from fp8slurm.config.schema import EngineSection
from fp8slurm.engine.client import EngineClient, GenerateRequest
from fp8slurm.engine.server import Engine, EngineError, EngineSettings
from fp8slurm.sync.bucket import WeightBucket
from fp8slurm.sync.engine_link import EngineLink
from fp8slurm.sync.transport import BroadcastTransport

pytestmark = pytest.mark.slow

SECTION = EngineSection(
    max_running_requests=16, max_total_tokens=16384, context_length=1000, dtype="float32", ready_timeout_s=240
)
LONG = [GenerateRequest([5 + i, 7, 9 * i % 300], 900, seed=i) for i in range(16)]
SHORT = [GenerateRequest([11 * i % 300, 3, i], 5, seed=i) for i in range(8)]


@pytest.fixture(scope="module", params=["session", "no-session"])
def engine(request, tmp_path_factory, write_fp8_model) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("sessions")
    before = os.environ.get("PYTHONPATH")
    if request.param == "no-session":
        other = request.getfixturevalue("sglang_without_sessions")
        os.environ["PYTHONPATH"] = f"{other}{os.pathsep}{before}" if before else str(other)
    engine = Engine(folder / "a", folder / "log", EngineSettings(SECTION, cpu=True, cpu_threads=1))
    engine.first, engine.second = (write_fp8_model(folder / name, seed) for name, seed in (("a", 1), ("b", 2)))
    engine.start()
    try:
        engine.wait_ready()
        engine.has_sessions = request.param == "session"
        yield engine
    finally:
        engine.stop()
        os.environ.pop("PYTHONPATH", None) if before is None else os.environ.update(PYTHONPATH=before)


def client_of(engine: Engine) -> EngineClient:
    return EngineClient(engine.url, engine.api_key, timeout_s=240)


@pytest.fixture
def link(engine: Engine) -> Iterator[EngineLink]:
    if not engine.alive():
        engine.restart()
    link = EngineLink(client_of(engine), 1)
    link.open()
    yield link
    link.close()
    if link.broken:
        engine.stop()


def logprobs(client: EngineClient, batch) -> list[list[float]]:
    return client.score([request.token_ids + g.token_ids for request, g in batch])


def test_bytes_arrive_and_what_was_computed_from_the_old_ones_is_forgotten(engine: Engine, link: EngineLink) -> None:
    client = link.client
    link.update(1, buckets(engine.first, 1), verify=True)
    of_first = client.generate(SHORT, one_batch=True)
    link.update(2, buckets(engine.second, 2), verify=True)
    of_second = client.generate(SHORT, one_batch=True)
    link.update(3, buckets(engine.first, 3))
    assert client.recorded() == [[2] * len(buckets(engine.first, 3))]
    again = client.generate(SHORT, one_batch=True)
    assert [g.logprobs for g in again] == [g.logprobs for g in of_first]
    assert sum(a.token_ids != b.token_ids for a, b in zip(of_first, of_second)) >= 6
    assert {v for g in again for v in g.weight_versions} == {3}
    assert client.begin_update() is engine.has_sessions
    if engine.has_sessions:
        client.end_update()
    total = sum(b.payload.numel() for b in buckets(engine.first, 3))
    assert link.counts == {"loaded": total, "buckets": len(buckets(engine.first, 3))}
    assert link.seconds["load"] > 0 and link.seconds["session"] > 0


def updates_while_generating(engine: Engine, link: EngineLink, first: int) -> tuple[list, dict[int, str], int]:
    """(generations, name of the weights of each version, last version): the two models in turn, four times at most."""
    models = {"first": engine.first, "second": engine.second}
    link.update(first, buckets(engine.first, first))
    of, version = {first: "first"}, first
    with ThreadPoolExecutor(1) as pool:
        generating = pool.submit(link.client.generate, LONG, one_batch=True)
        for _ in range(4):
            if wait([generating], 0.5).done:
                break
            version += 1
            of[version] = "second" if of[version - 1] == "first" else "first"
            try:
                link.update(version, buckets(models[of[version]], version))
            except EngineError:
                engine.stop()  # it is paused: what it generates would never come back
                raise
        return generating.result(), of, version


def test_retract_goes_on_under_the_new_weights(engine: Engine, link: EngineLink) -> None:
    if not engine.has_sessions:  # it cannot forget the old keys and values while requests wait: refused, not served
        with pytest.raises(EngineError, match="--sync.pause-mode abort"):
            updates_while_generating(engine, link, 10)
        assert link.broken
        return
    generations, of, version = updates_while_generating(engine, link, 10)
    across = [g for g in generations if len(set(g.weight_versions)) > 1]
    assert len(across) >= 2, [set(g.weight_versions) for g in generations]
    checked = 0
    for name, tensors in (("first", engine.first), ("second", engine.second)):
        version += 1
        link.update(version, buckets(tensors, version))
        scores = logprobs(link.client, zip(LONG, generations))
        for request, g, score in zip(LONG, generations, scores):
            assert g.weight_versions == sorted(g.weight_versions) and len(g.weight_versions) == len(g.token_ids)
            score = score[len(request.token_ids) - 1 :]
            gaps = torch.tensor([abs(a - b) for a, b, v in zip(g.logprobs, score, g.weight_versions) if of[v] == name])
            checked += len(gaps)
            # every token is the work of the weights that its version names, the keys and values before it included
            assert gaps.numel() == 0 or gaps.median() < 2e-2, (name, gaps)
    assert checked == sum(len(g.token_ids) for g in generations)


def test_abort_ends_what_is_running_under_the_old_weights(engine: Engine, link: EngineLink) -> None:
    link.pause_mode = "abort"
    link.update(30, buckets(engine.first, 30))
    with ThreadPoolExecutor(1) as pool:
        generating = pool.submit(link.client.generate, LONG, one_batch=True)
        wait([generating], 0.5)
        link.update(31, buckets(engine.second, 31))
        generations = generating.result()
    aborted = [g for g in generations if g.finish_reason == "abort"]
    assert len(aborted) >= 2
    assert all(len(set(g.weight_versions)) <= 1 for g in generations)
    assert {v for g in link.client.generate(SHORT) for v in g.weight_versions} == {31}


def test_in_place_goes_on_with_the_old_keys_and_values(engine: Engine, link: EngineLink) -> None:
    link.pause_mode = "in_place"
    generations, of, version = updates_while_generating(engine, link, 50)
    assert sum(len(set(g.weight_versions)) > 1 for g in generations) >= 2
    link.update(version + 1, buckets(engine.first, version + 1), verify=True)
    scores = logprobs(link.client, zip(LONG, generations))
    before, after = [], []
    for request, g, score in zip(LONG, generations, scores):
        assert g.weight_versions == sorted(g.weight_versions)
        for a, b, v in zip(g.logprobs, score[len(request.token_ids) - 1 :], g.weight_versions):
            if v == 50:
                before.append(abs(a - b))
            elif of[v] == "first":  # the same weights again, on keys and values that are partly the other model's
                after.append(abs(a - b))
    assert before and torch.tensor(before).median() < 2e-2
    assert not after or torch.tensor(after).median() > 5e-2


class FlippedBit(BroadcastTransport):
    """Damages one bit on the way."""

    def start(self, bucket: WeightBucket) -> None:
        payload = bucket.payload.clone()
        spec = next((s for s in bucket.specs if s.name.endswith("layers.1.mlp.up_proj.weight_scale_inv")), None)
        if spec is not None:
            payload[spec.offset] ^= 1
        super().start(WeightBucket(bucket.version, bucket.specs, payload))


def test_a_bucket_damaged_on_the_way_is_noticed(engine: Engine, link: EngineLink) -> None:
    link.close()
    link.transport = FlippedBit()
    link.open()
    name = r"model.layers.1.mlp.gate_up_proj.weight_scale_inv on the engine's rank 0 differs"
    with pytest.raises(EngineError, match=name):
        link.update(70, buckets(engine.first, 70), verify=True)
    refuses(engine, link)


def test_a_failed_update_serves_nothing(engine: Engine, link: EngineLink) -> None:
    bad = dict(engine.second)
    bad["model.layers.1.self_attn.o_proj.weight"] = bad["model.layers.1.self_attn.o_proj.weight"][:128]
    with pytest.raises(EngineError, match="answered 400|the connection broke"):
        link.update(71, buckets(bad, 71))
    refuses(engine, link)


def refuses(engine: Engine, link: EngineLink) -> None:
    with pytest.raises(EngineError, match="must not generate"):
        link.client.generate(SHORT)
    body = {"input_ids": [1, 2], "sampling_params": {"max_new_tokens": 1}}
    with pytest.raises(requests.exceptions.RequestException):  # nor does the server, for anybody
        key = {"Authorization": f"Bearer {engine.api_key}"}
        requests.post(engine.url + "/generate", json=body, headers=key, timeout=2).raise_for_status()


def test_versions_of_a_server_that_does_not_stamp_its_tokens(monkeypatch) -> None:
    client = EngineClient("http://127.0.0.1:1", "key")
    client.weight_version = 4

    def answer(path: str, body: dict) -> list[dict]:
        client.weight_version = 5  # an update meanwhile
        meta = {"output_token_logprobs": [[-0.5, 7, None], [-0.25, 8, None]], "finish_reason": {"type": "length"}}
        return json.loads(json.dumps([{"meta_info": meta}]))

    monkeypatch.setattr(client, "_post", answer)
    assert client.generate([GenerateRequest([1], 2)])[0].weight_versions == [4, 4]


def test_where_the_other_server_is(sglang_without_sessions: Path) -> None:
    assert "begin_weight_update" not in (sglang_without_sessions / "sglang/srt/entrypoints/http_server.py").read_text()
