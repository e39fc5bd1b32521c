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

ALONE = ["one_rank", "recomputed", "mixture", "mixture_replayed"]
TOGETHER = ["two_stages", "two_replicas", "two_contexts", "two_shards", "two_shards_of_sequences", "two_expert_ranks",
            "two_stages_of_experts"]  # fmt: skip
OTHERS = ["faults", "gradients", "mixture_faults", "mixture_gradients"]
SECTION = EngineSection(max_running_requests=96, max_total_tokens=16384, context_length=256, ready_timeout_s=180)


def requests_at(temperature: float, n: int, routing: bool) -> list[GenerateRequest]:
    g = torch.Generator().manual_seed(int(100 * temperature))
    prompts = [torch.randint(256, (3 + 7 * i % 150,), generator=g).tolist() for i in range(n)]
    how = [{"max_tokens": 20 + 13 * i % 40, "seed": i} for i in range(n)]
    return [GenerateRequest(p, temperature=temperature, routing=routing, **h) for p, h in zip(prompts, how)]


def decoded(fp8: Path, ranks: int, counts: dict[float, int], routing: bool = False) -> list[dict[str, Any]]:
    """What an exact engine decoded at these temperatures: half in one batch, the others as they come, five one by one."""
    section = SECTION.model_copy(update={"tensor_parallel_size": ranks})
    settings = EngineSettings(section, cpu=True, cpu_threads=3 - ranks, exact=True, return_routing=routing)
    engine = Engine(fp8, fp8.parent, settings, f"{fp8.name}_tp{ranks}")
    engine.start()
    rows = []
    try:
        engine.wait_ready()
        client = EngineClient(engine.url, engine.api_key, timeout_s=300)
        for temperature, n in counts.items():
            requests = requests_at(temperature, n, routing)
            done = client.generate(requests[: n // 2], one_batch=True)
            done += client.generate(requests[n // 2 : -5])
            done += [client.generate([request])[0] for request in requests[-5:]]
            rows += [
                {"prompt": r.token_ids, "ids": d.token_ids, "logprobs": d.logprobs, "finish": d.finish_reason,
                 "temperature": temperature, "routing": None if d.routing is None else d.routing.tolist()}
                for r, d in zip(requests, done, strict=True)
            ]  # fmt: skip
    finally:
        engine.stop()
    return rows


@pytest.fixture(scope="session")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model, and what engines of one rank (with two threads) and of two ranks decoded from it; a mixture of 8 experts,
    4 for each token, and what an engine of one rank decoded from that, with the experts of every token."""
    folder = tmp_path_factory.mktemp("exact")
    found = {}
    for name in ("model", "mixture"):
        found[name] = folder / name
        found[name].mkdir()
        write_model(found[name], seed=5, moe=name == "mixture")
    config = found["mixture"] / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_experts_per_tok": 4}))
    for name, model, ranks, counts, least in (
        ("samples", "model", 1, {0.7: 80, 1.0: 80, 0.0: 20}, 5_000),
        ("samples_tp2", "model", 2, {0.7: 16, 1.0: 12, 0.0: 12}, 700),
        ("samples_mixture", "mixture", 1, {0.7: 36, 1.0: 20, 0.0: 12}, 2_000),
    ):
        fp8 = folder / f"{model}_fp8"
        if not fp8.exists():
            hf_to_fp8(found[model], fp8)
        rows = decoded(fp8, ranks, counts, routing=model == "mixture")
        tokens = sum(len(row["ids"]) - 1 for row in rows)  # the first token of a response is prefill's
        assert tokens >= least, tokens
        found[name] = folder / f"{name}.json"
        found[name].write_text(json.dumps(rows))
    return found


@pytest.fixture(scope="session")
def alone(launch: Callable[..., Any], paths: dict[str, Path]) -> Any:
    return launch("alone", 1, ALONE + OTHERS, "decoded_scenarios", **paths)


@pytest.fixture(scope="session")
def together(launch: Callable[..., Any], paths: dict[str, Path]) -> Any:
    return launch("together", 2, TOGETHER, "decoded_scenarios", **paths)


@pytest.mark.parametrize("scenario", [*ALONE, *TOGETHER])
def test_every_decoded_token_is_the_trainers(scenario: str, request: pytest.FixtureRequest, paths: Any) -> None:
    """At 0.7, at 1 and greedy, in packs of several sizes, in the pass before training and in training itself."""
    result = request.getfixturevalue("together" if scenario.startswith("two") else "alone").result(scenario)
    assert set(result["said"]) == {""}
    tokens, differ, grad_norm = result["training"]
    experts = "mixture" in scenario or "expert" in scenario
    source = paths["samples_tp2" if "shards" in scenario else "samples_mixture" if experts else "samples"]
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


@pytest.mark.parametrize("fault", ["weights of BF16 logits", "parts rounded before the sum", "router", "other experts"])
def test_a_mixtures_fault_is_caught_where_its_experts_are_replayed(fault: str, alone: Any, paths: Any) -> None:
    """Experts' ids alone make no equal sums. A choice that is not the engine's is named even where replay hides it."""
    result = alone.result("mixture_faults")
    assert result["nothing"] == "", "a fault was left in"
    row = json.loads(paths["samples_mixture"].read_text())[0]
    token = f"The first is token 0 (id {row['ids'][0]}) of sample 0 of prompt 0: "
    assert (token in result[fault]) == (fault != "other experts"), result[fault]
    where = re.search(r"other experts than the engine's for (\d+) tokens. The first is token (\d+) .* of sample 0 of "
                      r"prompt (\d+), in model.layers.([01])", result[fault])  # fmt: skip
    assert where, result[fault]
    if fault == "other experts":
        assert where.groups()[1:] == ("0", "0", "0") and int(where[1]) > 2000
    if fault == "router":
        assert where[4] == "1", "the first layer's router is the engine's"


@pytest.mark.parametrize("model", ["gradients", "mixture_gradients"])
def test_gradients_are_as_near_to_the_ordinary_ones_as_fp8_is_to_bf16(model: str, alone: Any) -> None:
    """Values differ in last bits, which flip codes of what is quantized next: FP8's own tolerance is the measure."""
    for to_ordinary, of_fp8 in alone.result(model):
        assert 0 < to_ordinary < of_fp8, (to_ordinary, of_fp8)
