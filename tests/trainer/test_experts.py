"""Mixtures of experts in the trainer, on one, two and four ranks, against transformers and against one another."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trainer_reference
from fp8_formula import tiles
from safetensors.torch import load_file
from trainer_reference import (
    AUX_LOSS,
    check_continued,
    expected_training,
    fuse_experts,
    load_balancing_loss,
    packs,
    replayed_logprobs,
    transformers_model,
    with_ends_repeated,
    write_model,
)

from fp8slurm.models.names import NameTable
from fp8slurm.models.spec import ModelSpec

pytestmark = pytest.mark.slow

check = functools.partial(trainer_reference.check, after=1e-3)

ONE = [
    "one_rank", "one_rank_fused", "one_rank_not_normalized", "one_rank_fp8", "fp8_layers", "few_tokens",
    "one_rank_balanced", "one_rank_replayed", "one_rank_replayed_recomputed", "replay_is_only_replay", "save_one_rank",
    "offloaded", "offloaded_before_any_step", "save_one_rank_offloaded",
]  # fmt: skip
TWO = [
    "ep2", "ep2_plain_optimizer", "etp2", "ep2_fp8", "ep2_fp8_layers", "ep2_balanced", "ep2_resume", "save_ep2",
    "one_to_ep2", "one_to_tp2", "ep2_to_tp2", "ep2_to_etp2", "ep2_offloaded_resume", "one_to_ep2_offloaded",
    "cp2ep2", "cp2ep2_balanced", "one_to_ep2_ordinary", "ep2_snapshot_bytes",
]  # fmt: skip
FOUR = [
    "tp2ep2", "pp2ep2", "tp2ep2_replayed", "pp2ep2_replayed_recomputed", "tp2ep2_balanced", "pp2ep2_balanced",
    "ep2_to_tp2ep2", "save_pp2ep2", "cp2dp2ep2_replayed_recomputed",
]  # fmt: skip
BACK = ["ep2_to_one", "pp2ep2_to_one"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    moe = write_model(folder / "moe", seed=2, tie=False, moe=True)
    return {
        "moe": moe,
        "fused": fuse_experts(moe, folder / "fused"),
        "not_normalized": write_model(folder / "not_normalized", seed=2, tie=False, moe=True, norm_topk_prob=False),
    }


@pytest.fixture(scope="module")
def one(launch: Callable[..., Any], models: dict[str, Path]) -> Any:
    return launch("one", 1, ONE, "expert_scenarios", **models)


@pytest.fixture(scope="module")
def two(launch: Callable[..., Any], models: dict[str, Path], one: Any) -> Any:
    paths = {name: one.folder / name for name in ("one", "one_offloaded")}
    return launch("two", 2, TWO, "expert_scenarios", **models, **paths)


@pytest.fixture(scope="module")
def four(launch: Callable[..., Any], models: dict[str, Path], two: Any) -> Any:
    return launch("four", 4, FOUR, "expert_scenarios", **models, ep2=two.folder / "ep2")


@pytest.fixture(scope="module")
def back(launch: Callable[..., Any], models: dict[str, Path], two: Any, four: Any) -> Any:
    paths = {"ep2": two.folder / "ep2", "pp2ep2": four.folder / "pp2ep2"}
    return launch("back", 1, BACK, "expert_scenarios", **models, **paths)


@pytest.fixture(scope="module")
def expected(models: dict[str, Path]) -> Callable[..., dict[str, Any]]:
    """What `train` has to return for a model, by transformers."""
    return functools.cache(lambda name="moe": expected_training(models[name]))


@pytest.fixture(scope="module")
def expected_replayed(models: dict[str, Path]) -> dict[str, Any]:
    return expected_training(models["moe"], replayed_logprobs)


@pytest.fixture(scope="module")
def expected_balanced(models: dict[str, Path]) -> dict[int, list[float]]:
    """[loss, grad norm, mean load-balancing loss of a layer] of the first step, by the pads' multiple; 4: of every
    segment, of two context-parallel ranks."""
    out = {}
    for multiple in (1, 2, 4):

        def balanced(step: int, multiple: int = multiple) -> list[Any]:
            return [with_ends_repeated(b, 4) for b in packs(step)] if multiple == 4 else packs(step, multiple)

        def aux(model: Any, step: int, balanced: Any = balanced) -> torch.Tensor:
            return AUX_LOSS * load_balancing_loss(model, balanced(step))

        wanted = expected_training(models["moe"], further_loss=aux, steps=1)
        model = transformers_model(models["moe"])
        with torch.no_grad():
            each = [float(load_balancing_loss(model, [b])) / 2 for b in balanced(0)]
        out[multiple] = [*wanted["steps"][0][:2], sum(each) / len(each)]
    return out


@pytest.mark.parametrize(("scenario", "model"), [("one_rank", "moe"), ("one_rank_not_normalized", "not_normalized")])
def test_one_rank_is_transformers_and_adamw(one: Any, expected: Any, scenario: str, model: str) -> None:
    check(one.result(scenario), expected(model))


def test_fused_experts_are_the_same_model(one: Any) -> None:
    for a, b in zip(one.result("one_rank")["before"], one.result("one_rank_fused")["before"], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("scenario", ["ep2", "ep2_plain_optimizer"])
@pytest.mark.parametrize("rank", [0, 1])
def test_ep2_is_transformers_and_adamw(two: Any, expected: Any, scenario: str, rank: int) -> None:
    check(two.result(scenario, rank), expected(), slice(rank, None, 2))


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("scenario", ["etp2", "cp2ep2"])
def test_ranks_with_the_same_sequences_are_transformers_and_adamw(
    two: Any, expected: Any, scenario: str, rank: int
) -> None:
    check(two.result(scenario, rank), expected())


@pytest.mark.parametrize("rank", range(4))
def test_tp2_ep2_with_sequence_parallelism_is_transformers_and_adamw(four: Any, expected: Any, rank: int) -> None:
    check(four.result("tp2ep2", rank), expected(), slice(rank // 2, None, 2))


@pytest.mark.parametrize("rank", range(4))
def test_pp2_ep2_is_transformers_and_adamw(four: Any, expected: Any, rank: int) -> None:
    check(four.result("pp2ep2", rank), expected(), slice(rank % 2, None, 2))


# FP8.


def test_every_expert_multiplies_with_quantized_weights(one: Any, two: Any, models: dict[str, Path]) -> None:
    hf, table = load_file(models["moe"] / "model.safetensors"), NameTable(ModelSpec.from_hf_dir(models["moe"]))
    linears = {e.name for e in table if len(e.shape) == 2 and ".layers." in e.name and "router" not in e.name}
    whole = {table.canonical(f"{n}.weight"): q for n, q in one.result("fp8_layers").items()}
    assert set(whole) == linears
    for name, quantized in whole.items():
        assert torch.equal(quantized, tiles(table[name].merge(hf))), name
    seen: set[str] = set()
    for rank in (0, 1):
        layers = two.result("ep2_fp8_layers", rank)
        held = {table.canonical(f"{n}.weight", expert_offset=2 * rank): q for n, q in layers.items()}
        for name, quantized in held.items():
            assert torch.equal(quantized, whole[name]), name
        assert sum(".experts." in name for name in held) == 2 * 2 * 2
        seen |= set(held)
    assert seen == linears


def test_ep2_in_fp8_is_one_rank_in_fp8(one: Any, two: Any) -> None:
    """Sums over ranks differ in the last bit of fp32, which can move a value to the next e4m3 code, rarely."""
    single, plain = one.result("one_rank_fp8"), one.result("one_rank")
    gap_to_fp32 = (torch.cat(plain["before"]) - torch.cat(single["before"])).abs().mean()
    assert gap_to_fp32 > 1e-3
    for rank in (0, 1):
        got = two.result("ep2_fp8", rank)
        gap = (torch.cat(got["before"]) - torch.cat(single["before"][rank::2])).abs()
        assert gap.mean() < gap_to_fp32 / 20
        assert got["steps"][0][0] == pytest.approx(single["steps"][0][0], rel=1e-3)
        # the products for the weight gradients quantize 128 tokens of an expert together, and ranks' tokens mix
        assert got["steps"][0][1] == pytest.approx(single["steps"][0][1], rel=3e-2)


def test_experts_without_tokens(one: Any) -> None:
    got = one.result("few_tokens")
    assert got["ok"] and got["loss"] > 0


# Load balancing.


@pytest.mark.parametrize(
    ("size", "scenario", "multiple"),
    [(1, "one_rank_balanced", 1), (2, "ep2_balanced", 1), (4, "tp2ep2_balanced", 2), (4, "pp2ep2_balanced", 1),
     (2, "cp2ep2_balanced", 4)],
)  # fmt: skip
def test_load_balancing_loss(
    one: Any, two: Any, four: Any, expected: Any, expected_balanced: Any, size: int, scenario: str, multiple: int
) -> None:
    loss, norm, aux = expected_balanced[multiple]
    assert norm != pytest.approx(expected()["steps"][0][1], rel=1e-3)
    for rank in range(size):
        got = {1: one, 2: two, 4: four}[size].result(scenario, rank)
        assert got["step"] == pytest.approx([loss, norm], rel=1e-5)
        assert got["aux"] == pytest.approx(aux, rel=1e-5)
        assert 1 <= got["second"] < 1.5 * aux, "every step's sum starts afresh"


# Routing replay.


@pytest.mark.parametrize(
    ("size", "scenario"),
    [(1, "one_rank_replayed"), (1, "one_rank_replayed_recomputed"), (4, "tp2ep2_replayed"),
     (4, "pp2ep2_replayed_recomputed"), (4, "cp2dp2ep2_replayed_recomputed")],
)  # fmt: skip
def test_replayed_routing(one: Any, four: Any, expected: Any, expected_replayed: Any, size: int, scenario: str) -> None:
    assert (torch.cat(expected()["before"]) - torch.cat(expected_replayed["before"])).abs().mean() > 1e-2
    for rank in range(size):
        data_rank = rank % 2 if scenario.startswith("pp2") else rank // 2
        share = slice(None) if size == 1 else slice(data_rank, None, 2)
        check((one if size == 1 else four).result(scenario, rank), expected_replayed, share)


def test_replay_touches_nothing_else(one: Any) -> None:
    got, own = one.result("replay_is_only_replay"), one.result("one_rank")["before"]
    for a, reference, replayed, b in zip(got["own"], got["reference"], got["replayed"], own, strict=True):
        assert torch.equal(a, b) and torch.equal(reference, b) and not torch.equal(replayed, b)


# Checkpoints.


def test_a_snapshot_is_megatrons_own_checkpoint_whatever_comes_after_it(two: Any) -> None:
    got = two.result("ep2_snapshot_bytes")
    assert got["names"][0] == got["names"][1] and sum(n.endswith(".distcp") for n in got["names"][0]) == 2
    assert got["differ"] == [] and got["same index"]


@pytest.mark.parametrize("scenario", ["ep2_resume", "ep2_offloaded_resume"])
@pytest.mark.parametrize("rank", [0, 1])
def test_resume_to_the_bit(two: Any, scenario: str, rank: int) -> None:
    got = two.result(scenario, rank)
    straight, resumed = got["straight"], got["resumed"]
    assert {entry[0] for entry in straight["adam"]} == {4.0}
    for key in ("steps", "random", "adam"):
        assert straight[key] == resumed[key], key
    assert any(".experts." in name for name in straight["weights"])
    for name, weight in straight["weights"].items():
        assert torch.equal(weight, resumed["weights"][name]), name


@pytest.mark.parametrize(
    ("scenario", "shares"), [("one_to_ep2", True), ("one_to_tp2", False), ("ep2_to_tp2", False), ("ep2_to_etp2", False)]
)
@pytest.mark.parametrize("rank", [0, 1])
def test_continues_on_two_ranks(one: Any, two: Any, scenario: str, shares: bool, rank: int) -> None:
    share = slice(rank, None, 2) if shares else slice(None)
    check_continued(two.result(scenario, rank), one.result("save_one_rank"), share)


@pytest.mark.parametrize("rank", range(4))
def test_continues_on_four_ranks(one: Any, four: Any, rank: int) -> None:
    wanted = one.result("save_one_rank")
    check_continued(four.result("ep2_to_tp2ep2", rank), wanted, slice(rank // 2, None, 2))


@pytest.mark.parametrize("scenario", ["ep2_to_one", "pp2ep2_to_one"])
def test_continues_on_one_rank(one: Any, back: Any, scenario: str) -> None:
    check_continued(back.result(scenario), one.result("save_one_rank"))


# Adam on the host.


def test_offloaded_adam_is_the_ordinary_one(one: Any) -> None:
    """The host's Adam is torch's fused kernel, which rounds in another order: a unit or two in the last place of the
    FP32 masters, which now and then is one of a BF16 weight."""
    got = one.result("offloaded")
    here, there = got["offloaded"], got["ordinary"]
    assert here["dtypes"] == ["torch.bfloat16"]
    assert len(here["masters"]) == len(there["masters"]) > 20
    moved = 0
    for a, b in zip(here["masters"], there["masters"], strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.flatten(), b.flatten(), rtol=2e-7, atol=5e-8)
        moved += int((a.flatten() != a.flatten().bfloat16()).sum())
    assert moved > 1000, "the masters are no more than the BF16 weights"
    for mine, theirs in zip(here["steps"], there["steps"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
    different = sum(int((w != there["weights"][n]).sum()) for n, w in here["weights"].items())
    assert different <= 1e-4 * sum(w.numel() for w in here["weights"].values())


def test_offloaded_adam_saved_before_any_step(one: Any) -> None:
    got = one.result("offloaded_before_any_step")
    assert got["straight"] == got["resumed"]


@pytest.mark.parametrize("scenario", ["one_to_ep2_offloaded", "one_to_ep2_ordinary"])
@pytest.mark.parametrize("rank", [0, 1])
def test_offloaded_adam_continues_on_another_layout_and_as_the_ordinary_one(
    one: Any, two: Any, scenario: str, rank: int
) -> None:
    got, wanted = two.result(scenario, rank), one.result("save_one_rank_offloaded")
    assert {entry[0] for entry in got["adam"]} == {4.0}
    # in BF16 sums over ranks differ by more than in FP32
    assert got["steps"][0] == pytest.approx(wanted["steps"][0], rel=1e-3)
    assert got["steps"][1] == pytest.approx(wanted["steps"][1], rel=1e-2)
    for mine, theirs in zip(got["after"], wanted["after"][rank::2], strict=True):
        assert (mine - theirs).abs().mean() < 0.05
