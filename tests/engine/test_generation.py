"""FP8 servers, dense and mixture of experts: numbers against transformers, seeds, stops, the key, the digest."""

from __future__ import annotations

import http.client
import json
import os
import select
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import requests
import torch
from w8a8_reference import reference

from fp8slurm.config.schema import EngineSection
from fp8slurm.engine import server as server_module
from fp8slurm.engine.client import EngineClient, GenerateRequest
from fp8slurm.engine.inside.digest import expected_digests, first_difference
from fp8slurm.engine.server import Engine, EngineError, EngineSettings

pytestmark = pytest.mark.slow

SECTION = EngineSection(
    max_running_requests=64, max_total_tokens=8192, context_length=128, dtype="float32", ready_timeout_s=120
)


class Served:
    """A server, its client and the tensors that it loaded."""

    def __init__(self, folder: Path, log_dir: Path, tensors: dict[str, torch.Tensor]) -> None:
        self.folder, self.tensors = folder, tensors
        self.engine = Engine(folder, log_dir, EngineSettings(SECTION, cpu=True, cpu_threads=1))
        self.engine.start()
        self.engine.wait_ready()
        self.client = EngineClient(self.engine.url, self.engine.api_key, timeout_s=60)


@pytest.fixture(scope="module")
def dense(tmp_path_factory, write_fp8_model) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("dense")
    served = Served(folder / "model", folder / "log", write_fp8_model(folder / "model", seed=1))
    yield served
    served.engine.stop()


@pytest.fixture(scope="module")
def experts(tmp_path_factory, write_fp8_model) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("experts")
    served = Served(folder / "model", folder / "log", write_fp8_model(folder / "model", seed=2, moe=True))
    yield served
    served.engine.stop()


def prompts(n: int, max_tokens: int = 8, **kwargs) -> list[GenerateRequest]:
    generator = torch.Generator().manual_seed(n)
    token_ids = [torch.randint(320, (6 + i % 11,), generator=generator).tolist() for i in range(n)]
    return [GenerateRequest(ids, max_tokens, seed=1000 + i, **kwargs) for i, ids in enumerate(token_ids)]


def gap(served: Served, activations: bool, requests_: list[GenerateRequest], generations) -> torch.Tensor:
    """|engine - transformers| of the log-probability of every generated token."""
    model, gaps = reference(served.folder, served.tensors, activations), []
    for request, generation in zip(requests_, generations):
        ids = torch.tensor([[*request.token_ids, *generation.token_ids]])
        with torch.no_grad():
            logprobs = torch.log_softmax(model(ids).logits[0].float(), -1)
        start = len(request.token_ids) - 1
        own = logprobs[start:-1].gather(1, ids[0, start + 1 :, None])[:, 0]
        gaps.append((own - torch.tensor(generation.logprobs)).abs())
    return torch.cat(gaps)


@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_logprobs_are_those_of_w8a8(kind: str, request) -> None:
    served = request.getfixturevalue(kind)
    batch = prompts(12)
    generations = served.client.generate(batch, one_batch=True)
    emulated, weights_only = (gap(served, on, batch, generations) for on in (True, False))
    # a code that flips at a rounding boundary moves a token's log-probability by about 1e-3; most tokens meet none
    assert emulated.median() < 2e-5, emulated
    assert weights_only.median() > 20 * emulated.median()
    assert weights_only.mean() > 5 * emulated.mean()


HOLD_REQUESTS = """
import os, time
if os.environ.get("HOLD_REQUESTS"):
    from fp8slurm.cpu import sglang_plugin

    apply = sglang_plugin.apply

    def and_hold(*exact):
        apply(*exact)
        from sglang.srt.managers.scheduler import Scheduler

        ingest = Scheduler.ingest_requests

        def late(self):
            if self.running_batch.reqs and all(request.finished() for request in self.running_batch.reqs):
                time.sleep(0.5)  # the answers are out: the next requests come before SGLang has dropped the old ones
            return ingest(self)

        Scheduler.ingest_requests = late

    sglang_plugin.apply = and_hold
"""


def test_a_batch_draws_the_same_tokens_however_soon_it_follows_a_greedy_one(
    tmp_path: Path, write_fp8_model, monkeypatch
) -> None:
    """A rollout behind an evaluation, on a machine that is busy at the wrong moment."""
    (tmp_path / "sitecustomize.py").write_text(HOLD_REQUESTS)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("HOLD_REQUESTS", "yes")
    served = Served(tmp_path / "model", tmp_path / "log", write_fp8_model(tmp_path / "model", seed=1))
    try:
        alone = served.client.generate(prompts(24), one_batch=True)
        served.client.generate(prompts(12, temperature=0.0), one_batch=True)
        assert served.client.generate(prompts(24), one_batch=True) == alone
    finally:
        served.engine.stop()


def test_seeded_batches_are_bit_equal(dense: Served) -> None:
    client = dense.client
    for batch in (prompts(48), prompts(150)):  # the second is more than max_running_requests
        first = client.generate(batch, one_batch=True)
        assert client.generate(batch, one_batch=True) == first
        client.generate(prompts(5), one_batch=False)
        client.flush_cache()
        assert client.generate(batch, one_batch=True) == first
    other = client.generate([replace(r, seed=r.seed + 7) for r in batch], one_batch=True)
    assert sum(a.token_ids != b.token_ids for a, b in zip(first, other)) > 140
    unseeded = [replace(r, seed=None) for r in batch]
    assert client.generate(unseeded) != client.generate(unseeded)


def test_samples_follow_the_distribution(dense: Served) -> None:
    request = GenerateRequest([5, 6, 7], 1)
    drawn = dense.client.generate([replace(request, seed=i) for i in range(2000)])
    counts = torch.bincount(torch.tensor([g.token_ids[0] for g in drawn]), minlength=320).double()
    expected = torch.zeros(320, dtype=torch.double)
    for g in drawn:
        expected[g.token_ids[0]] = torch.tensor(g.logprobs[0]).double().exp() * 2000
    often = expected >= 8
    chi2 = ((counts - expected)[often] ** 2 / expected[often]).sum()
    degrees = int(often.sum())
    assert degrees > 20 and chi2 < degrees + 5 * (2 * degrees) ** 0.5


def test_groups_keep_their_order(dense: Served) -> None:
    batch = [r for request in prompts(9) for r in (request, replace(request, max_tokens=3))]
    together, apart = dense.client.generate(batch, one_batch=True), dense.client.generate(batch)
    assert [g.token_ids for g in apart] == [g.token_ids for g in together]
    assert [len(g.token_ids) for g in apart] == [8, 3] * 9
    assert all(g.weight_versions == [-1] * len(g.token_ids) for g in apart)


def test_greedy_takes_the_likeliest_token(dense: Served) -> None:
    greedy = dense.client.generate(prompts(6, temperature=0.0), one_batch=True)
    again = dense.client.generate([replace(r, seed=r.seed + 1) for r in prompts(6, temperature=0.0)])
    assert [g.token_ids for g in again] == [g.token_ids for g in greedy]
    # at temperature 0 SGLang gives the log-probabilities of temperature 1
    model = reference(dense.folder, dense.tensors)
    for request, g in zip(prompts(6), greedy):
        with torch.no_grad():
            logits = model(torch.tensor([request.token_ids])).logits[0, -1]
        assert g.token_ids[0] == int(logits.argmax())


def test_stop_tokens_end_a_sample_and_are_part_of_it(dense: Served) -> None:
    free = dense.client.generate(prompts(24, max_tokens=12), one_batch=True)
    stop = free[0].token_ids[2]
    stopped = dense.client.generate(prompts(24, max_tokens=12, stop_token_ids=[stop]), one_batch=True)
    assert stopped[0].token_ids[-1] == stop and stopped[0].finish_reason == "stop"
    for g in stopped:
        assert (g.finish_reason == "stop") == (g.token_ids[-1] in (stop, 258, 256))  # 256 and 258 end Qwen's turns
        assert len(g.token_ids) == len(g.logprobs) == len(g.weight_versions)
        assert g.finish_reason == "stop" or len(g.token_ids) == 12


def test_scores_are_the_logprobs_of_generation(dense: Served) -> None:
    batch = prompts(10)
    generations = dense.client.generate(batch, one_batch=True)
    scores = dense.client.score([r.token_ids + g.token_ids for r, g in zip(batch, generations)])
    for request, generation, score in zip(batch, generations, scores):
        assert len(score) == len(request.token_ids) + len(generation.token_ids) - 1
        torch.testing.assert_close(
            torch.tensor(score[len(request.token_ids) - 1 :]), torch.tensor(generation.logprobs), atol=5e-3, rtol=0
        )


def test_a_prompt_that_does_not_fit_is_refused(dense: Served) -> None:
    with pytest.raises(ValueError, match="(?i)length|long|tokens"):
        dense.client.generate([GenerateRequest([1] * 200, 8)])
    assert dense.client.generate(prompts(1))


def test_the_key_is_needed_and_nowhere_to_be_read(dense: Served) -> None:
    key, url = dense.engine.api_key, dense.engine.url
    for path in ("/generate", "/pause_generation", "/weights_checker"):
        assert requests.post(url + path, json={"input_ids": [1]}, timeout=10).status_code == 401
    assert requests.get(url + "/server_info", timeout=10).status_code == 401
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            assert key.encode() not in cmdline.read_bytes()
        except OSError:  # a process that is gone
            continue
    log = dense.engine.log_path.read_text()
    assert "server_args=" in log and key not in log
    assert key not in json.dumps(dense.client.server_info())


@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_digest_sees_one_ulp_and_one_code(kind: str, request) -> None:
    served = request.getfixturevalue(kind)
    config = json.loads((served.folder / "config.json").read_text())
    facts = {"num_key_value_heads": 2, "tie_word_embeddings": config["tie_word_embeddings"], "dtype": torch.float32}
    held = served.client.digest()
    assert first_difference(held, expected_digests(served.tensors.items(), **facts)) is None
    part = "mlp.experts.3.up_proj" if kind == "experts" else "self_attn.v_proj"
    engine_name = "w13_weight_scale_inv" if kind == "experts" else "qkv_proj.weight_scale_inv"
    scales = served.tensors[f"model.layers.1.{part}.weight_scale_inv"].clone()
    scales.view(torch.int32)[-1, -1] += 1
    changed = {**served.tensors, f"model.layers.1.{part}.weight_scale_inv": scales}
    difference = first_difference(held, expected_digests(changed.items(), **facts))
    assert difference and "model.layers.1." in difference and engine_name in difference
    codes = served.tensors[f"model.layers.1.{part}.weight"].clone()
    codes.view(torch.uint8)[0, 0] ^= 1
    changed = {**served.tensors, f"model.layers.1.{part}.weight": codes}
    assert first_difference(held, expected_digests(changed.items(), **facts))


def test_a_connection_lasts_longer_than_a_training_step(dense: Served) -> None:
    """SGLang would close it after 5 s, perhaps just as the next request is on its way."""
    connection = http.client.HTTPConnection("127.0.0.1", dense.engine.port, timeout=20)

    def asks() -> int:
        connection.request("GET", "/model_info", headers={"Authorization": f"Bearer {dense.engine.api_key}"})
        answer = connection.getresponse()
        answer.read()
        return answer.status

    assert asks() == 200
    socket = connection.sock
    assert not select.select([socket], [], [], 7)[0], "the server has closed the connection"
    assert asks() == 200 and connection.sock is socket
    connection.close()


def test_killed_scheduler_takes_the_server_along_and_a_restart_gives_the_same_bits(dense: Served) -> None:
    batch = prompts(48)
    before = dense.client.generate(batch, one_batch=True)
    old_url = dense.engine.url
    scheduler = next(p for p in dense.engine._family() if "scheduler" in " ".join(p.cmdline()))
    scheduler.kill()
    assert dense.engine.wait_exit(20) and not dense.engine.alive()
    first, log = dense.engine.obituary().split("\n", 1)
    assert f"(pid {scheduler.pid}) ended; the end of {dense.engine.log_path}:" in first and "scheduler" in first and log
    with pytest.raises(EngineError):
        dense.client.generate(batch)
    dense.engine.restart()
    assert dense.engine.alive() and dense.engine.obituary() == ""
    dense.client = EngineClient(dense.engine.url, dense.engine.api_key, timeout_s=60)
    assert dense.client.generate(batch, one_batch=True) == before
    with pytest.raises(EngineError):
        EngineClient(old_url, dense.engine.api_key, timeout_s=5).model_info()


def test_a_server_that_was_stopped_has_not_ended_by_itself(dense: Served, monkeypatch) -> None:
    leaving = threading.Event()
    monkeypatch.setattr(server_module, "_runs", lambda process: not leaving.is_set())  # a GPU takes seconds to be left
    stop_policy = threading.Thread(target=dense.engine.stop)
    stop_policy.start()
    assert dense.engine.wait_exit(20) and stop_policy.is_alive()
    said = dense.engine.obituary()
    leaving.set()
    stop_policy.join()
    assert said == "" == dense.engine.obituary()
    dense.engine.restart()
    dense.client = EngineClient(dense.engine.url, dense.engine.api_key, timeout_s=60)
