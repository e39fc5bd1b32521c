"""Exact runs on the CPU: the engine's decoded log-probabilities are the trainer's, bit by bit, and every fault shows."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import write_model

from fp8slurm.checkpoint import hf_to_fp8
from fp8slurm.config.schema import EngineSection
from fp8slurm.engine.client import EngineClient, GenerateRequest
from fp8slurm.engine.server import Engine, EngineSettings

pytestmark = pytest.mark.slow

TOGETHER = ["two_stages", "two_replicas", "two_contexts", "two_shards", "two_shards_of_sequences"]
SECTION = EngineSection(max_running_requests=96, max_total_tokens=16384, context_length=256, ready_timeout_s=180)


def requests_at(temperature: float, n: int) -> list[GenerateRequest]:
    g = torch.Generator().manual_seed(int(100 * temperature))
    prompts = [torch.randint(256, (3 + 7 * i % 150,), generator=g).tolist() for i in range(n)]
    return [GenerateRequest(p, 20 + 13 * i % 40, temperature, seed=i) for i, p in enumerate(prompts)]


def decoded(folder: Path, ranks: int, counts: dict[float, int]) -> list[dict[str, Any]]:
    """What an exact engine decoded at these temperatures: half in one batch, the others as they come, five one by one."""
    section = SECTION.model_copy(update={"tensor_parallel_size": ranks})
    settings = EngineSettings(section, cpu=True, cpu_threads=3 - ranks, exact=True)
    engine = Engine(folder / "fp8", folder, settings, f"tp{ranks}")
    engine.start()
    rows = []
    try:
        engine.wait_ready()
        client = EngineClient(engine.url, engine.api_key, timeout_s=300)
        for temperature, n in counts.items():
            requests = requests_at(temperature, n)
            done = client.generate(requests[: n // 2], one_batch=True)
            done += client.generate(requests[n // 2 : -5])
            done += [client.generate([request])[0] for request in requests[-5:]]
            rows += [
                {"prompt": r.token_ids, "ids": d.token_ids, "logprobs": d.logprobs, "finish": d.finish_reason,
                 "temperature": temperature}
                for r, d in zip(requests, done, strict=True)
            ]  # fmt: skip
    finally:
        engine.stop()
    return rows


@pytest.fixture(scope="session")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model, and what engines of one rank (with two threads) and of two ranks decoded from it."""
    folder = tmp_path_factory.mktemp("exact")
    (folder / "model").mkdir()
    write_model(folder / "model", seed=5)
    hf_to_fp8(folder / "model", folder / "fp8")
    found = {"model": folder / "model"}
    for name, ranks, counts in (
        ("samples", 1, {0.7: 80, 1.0: 80, 0.0: 20}),
        ("samples_tp2", 2, {0.7: 16, 1.0: 12, 0.0: 12}),
    ):
        rows = decoded(folder, ranks, counts)
        tokens = sum(len(row["ids"]) - 1 for row in rows)  # the first token of a response is prefill's
        assert tokens >= (5_000 if ranks == 1 else 700), tokens
        found[name] = folder / f"{name}.json"
        found[name].write_text(json.dumps(rows))
    return found


@pytest.fixture(scope="session")
def alone(launch: Callable[..., Any], paths: dict[str, Path]) -> Any:
    return launch("alone", 1, ["one_rank", "recomputed", "faults", "gradients"], "decoded_scenarios", **paths)


@pytest.fixture(scope="session")
def together(launch: Callable[..., Any], paths: dict[str, Path]) -> Any:
    return launch("together", 2, TOGETHER, "decoded_scenarios", **paths)


@pytest.mark.parametrize("scenario", ["one_rank", "recomputed", *TOGETHER])
def test_every_decoded_token_is_the_trainers(scenario: str, request: pytest.FixtureRequest, paths: Any) -> None:
    """At 0.7, at 1 and greedy, in packs of several sizes, in the pass before training and in training itself."""
    result = request.getfixturevalue("together" if scenario.startswith("two") else "alone").result(scenario)
    assert set(result["said"]) == {""}
    tokens, differ, grad_norm = result["training"]
    source = paths["samples_tp2" if "shards" in scenario else "samples"]
    rows = [row for row in json.loads(source.read_text()) if row["temperature"] == 0.7]
    assert (tokens, differ) == (sum(len(row["ids"]) for row in rows), 0) and grad_norm > 0


@pytest.mark.parametrize("fault", ["quantizer", "weights", "rope", "temperature", "missed update", "chat template"])
def test_a_fault_is_caught_at_the_first_token(fault: str, alone: Any, paths: Any) -> None:
    """SGLang's own activation quantizer among them: the test of equality is not empty."""
    said = alone.result("faults")[fault]
    row = json.loads(paths["samples"].read_text())[0]
    first = re.search(
        r"The first is token (\d+) \(id (\d+)\) of sample 0 of prompt (\d+): trainer (\S+), engine (\S+)\.", said
    )
    assert first, said
    assert (first[1], int(first[2]), first[3]) == ("0", row["ids"][0], "0"), said
    assert float(first[5]) == pytest.approx(row["logprobs"][0], rel=1e-8) and first[4] != first[5]
    assert "step 3: --model.exact, and " in said and "Nothing was trained on it" in said


def test_gradients_are_as_near_to_the_ordinary_ones_as_fp8_is_to_bf16(alone: Any) -> None:
    """Values differ in last bits, which flip codes of what is quantized next: FP8's own tolerance is the measure."""
    for to_ordinary, of_fp8 in alone.result("gradients"):
        assert 0 < to_ordinary < of_fp8, (to_ordinary, of_fp8)
