"""The trainer on one and on two ranks against transformers and torch's AdamW, and against itself."""

from __future__ import annotations

import functools
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_reference import (
    LLAMA,
    NARROW,
    QWEN2,
    SHORT_YARN,
    YARN,
    check,
    check_continued,
    expected_training,
    packs,
    reference_logprobs,
    transformers_model,
    write_model,
)

pytestmark = pytest.mark.slow

ONE_RANK = [
    "one_rank", "one_rank_plain_optimizer", "one_rank_untied", "one_rank_recompute", "one_rank_fp8", "one_rank_bf16",
    "one_rank_bf16_fp8", "entropy", "reference_model", "bad_loss", "new_optimizer", "emulated_linear",
    "main_grad", "fp8_layers", "packed_modules", "tied_head", "refused", "resume_one_rank", "save_before_any_step",
    "save_one_rank", "full_disk", "snapshot_bytes", "hostile_checkpoint",
    "optimizer_sleep", "plain_optimizer_sleep", "warm_up", "optimizer_settings",
    "one_rank_yarn", "one_rank_yarn_qwen2", "yarn_frequencies", "yarn_frequencies_qwen2", "one_rank_qwen2", "one_rank_qwen2_untied", "one_rank_llama", "one_rank_qwen2_fp8",
]  # fmt: skip
TWO_RANKS = [
    "dp2", "dp2_plain_optimizer", "tp2", "tp2_sequence_parallel", "pp2", "pp2_untied", "tp2_fp8",
    "tp2_sequence_parallel_fp8", "tp2_fp8_layers", "dp2_bad_loss", "dp2_resume", "save_dp2", "save_tp2",
    "save_pp2", "one_to_dp2", "one_to_tp2", "one_to_pp2", "tp2_full_disk", "dp2_snapshot_bytes",
    "tp2_snapshot_bytes", "dp2_optimizer_sleep", "tp2_warm_up", "tp2_qwen2", "tp2_sequence_parallel_qwen2",
    "tp2_qwen2_fp8", "pp2_qwen2_untied", "tp2_sequence_parallel_llama", "pp2_llama",
    "cp2", "cp2_recompute", "cp2_fp8", "cp2_yarn", "cp2_resume", "save_cp2", "one_to_cp2",
]  # fmt: skip
FOUR_RANKS = ["cp2tp2", "cp2pp2", "cp2dp2", "cp2_to_cp2tp2"]
BACK_TO_ONE = ["dp2_to_one", "tp2_to_one", "pp2_to_one", "cp2_to_one"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    from safetensors.torch import load_file, save_file

    def changed(name: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
        path = write_model(folder / name)
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors")
        return path

    def head(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}

    return {
        "dense": write_model(folder / "dense"),
        "untied": write_model(folder / "untied", seed=1, tie=False),
        "narrow": write_model(folder / "narrow", **NARROW),
        "qwen2": write_model(folder / "qwen2", seed=2, **QWEN2),
        "qwen2_untied": write_model(folder / "qwen2_untied", seed=3, tie=False, **QWEN2),
        "llama": write_model(folder / "llama", seed=4, tie=False, **LLAMA),
        "yarn": write_model(folder / "yarn", **YARN),
        "yarn_qwen2": write_model(folder / "yarn_qwen2", **QWEN2 | YARN),
        "short_yarn": write_model(folder / "short_yarn", seed=5, **SHORT_YARN),
        "short_yarn_qwen2": write_model(folder / "short_yarn_qwen2", seed=6, **QWEN2 | SHORT_YARN),
        "truncated": changed("truncated", lambda t: t.pop("model.layers.1.mlp.up_proj.weight")),
        "tied_head": changed("tied_head", lambda t: t.update(head(t))),
        "other_head": changed("other_head", lambda t: t.update({n: w + 1 for n, w in head(t).items()})),
    }


@pytest.fixture(scope="module")
def one(launch: Callable[..., Any], models: dict[str, Path]) -> Any:
    return launch("one", 1, ONE_RANK, **models)


@pytest.fixture(scope="module")
def two(launch: Callable[..., Any], models: dict[str, Path], one: Any) -> Any:
    return launch("two", 2, TWO_RANKS, **models, one=one.folder / "one")


@pytest.fixture(scope="module")
def four(launch: Callable[..., Any], models: dict[str, Path], two: Any) -> Any:
    return launch("four", 4, FOUR_RANKS, **models, cp2=two.folder / "cp2")


@pytest.fixture(scope="module")
def back(launch: Callable[..., Any], models: dict[str, Path], two: Any) -> Any:
    return launch("back", 1, BACK_TO_ONE, **models, **{n: two.folder / n for n in ("dp2", "tp2", "pp2", "cp2")})


@pytest.fixture(scope="module")
def expected(models: dict[str, Path]) -> Callable[[str], dict[str, Any]]:
    """What `train` has to return for a model."""
    return functools.cache(lambda name: expected_training(models[name]))


@pytest.mark.parametrize(
    ("scenario", "model"),
    [("one_rank", "dense"), ("one_rank_plain_optimizer", "dense"), ("one_rank_recompute", "dense"),
     ("one_rank_untied", "untied"), ("one_rank_qwen2", "qwen2"), ("one_rank_qwen2_untied", "qwen2_untied"),
     ("one_rank_llama", "llama"), ("one_rank_yarn", "short_yarn"), ("one_rank_yarn_qwen2", "short_yarn_qwen2")],
)  # fmt: skip
def test_one_rank_is_transformers_and_adamw(one: Any, expected: Any, scenario: str, model: str) -> None:
    check(one.result(scenario), expected(model))


@pytest.mark.parametrize(
    ("scenario", "model"),
    [("tp2", "dense"), ("tp2_sequence_parallel", "dense"), ("pp2", "dense"), ("pp2_untied", "untied"),
     ("tp2_qwen2", "qwen2"), ("tp2_sequence_parallel_qwen2", "qwen2"), ("pp2_qwen2_untied", "qwen2_untied"),
     ("tp2_sequence_parallel_llama", "llama"), ("pp2_llama", "llama"), ("cp2", "dense"), ("cp2_recompute", "dense"),
     ("cp2_yarn", "short_yarn")],
)  # fmt: skip
@pytest.mark.parametrize("rank", [0, 1])
def test_model_parallel_ranks_are_transformers_and_adamw(
    two: Any, expected: Any, scenario: str, model: str, rank: int
) -> None:
    check(two.result(scenario, rank), expected(model))


@pytest.mark.parametrize(("scenario", "model"), [("dp2", "dense"), ("dp2_plain_optimizer", "dense")])
@pytest.mark.parametrize("rank", [0, 1])
def test_data_parallel_ranks_are_transformers_and_adamw(
    two: Any, expected: Any, scenario: str, model: str, rank: int
) -> None:
    check(two.result(scenario, rank), expected(model), slice(rank, None, 2))


@pytest.mark.parametrize(("scenario", "replicas"), [("cp2tp2", 1), ("cp2pp2", 1), ("cp2dp2", 2)])
@pytest.mark.parametrize("rank", range(4))
def test_context_parallel_ranks_are_transformers_and_adamw(
    four: Any, expected: Any, scenario: str, replicas: int, rank: int
) -> None:
    """Packs have sequences that are shorter than a rank's part, as long as it, and longer."""
    check(four.result(scenario, rank), expected("dense"), slice(rank * replicas // 4, None, replicas))


def test_entropy_and_its_gradient(one: Any, models: dict[str, Path]) -> None:
    got = one.result("entropy")
    model = transformers_model(models["dense"])
    batch, total = packs(0)[0], []
    cu = batch.cu_seqlens.tolist()
    for s, e in zip(cu, cu[1:]):
        log_p = model(batch.tokens[None, s:e]).logits[0].log_softmax(-1)
        total.append(-(log_p.exp() * log_p).sum(-1))
    torch.testing.assert_close(got["entropy"], torch.cat(total).detach(), atol=1e-5, rtol=1e-5)
    torch.cat(total).sum().backward()
    gradient = model.model.embed_tokens.weight.grad
    scale = float(gradient.norm())
    torch.testing.assert_close(got["gradient"] / scale, gradient / scale, atol=1e-6, rtol=0)


def test_reference_keeps_the_weights_it_was_taken_from(one: Any) -> None:
    got = one.result("reference_model")
    columns = (got[k] for k in ("before", "reference", "after", "same", "loaded", "alone"))
    for before, reference, after, same, loaded, alone in zip(*columns, strict=True):
        assert torch.equal(before, reference) and torch.equal(before, same) and torch.equal(before, loaded)
        assert not torch.equal(before, after) and torch.equal(alone, after)


@pytest.mark.parametrize(("size", "scenario"), [(1, "bad_loss"), (2, "dp2_bad_loss")])
def test_a_bad_step_changes_nothing_on_any_rank(one: Any, two: Any, size: int, scenario: str) -> None:
    for rank in range(size):
        got = (one if size == 1 else two).result(scenario, rank)
        assert got["ok"] == [False, False, True]
        assert all(got["kept"].values())
        assert got["changed"] > 0
        assert got["third"] == got["alone"]


def test_new_optimizer_forgets_everything_but_the_weights(one: Any) -> None:
    got = one.result("new_optimizer")
    for name, weight in got["reset"].items():
        assert torch.equal(weight, got["fresh"][name]), name


# Emulated FP8.


@pytest.mark.parametrize(("dtype", "tolerance"), [("torch.float32", 1e-5), ("torch.bfloat16", 2**-8)])
def test_emulated_products_follow_the_formula(one: Any, dtype: str, tolerance: float) -> None:
    result = one.result("emulated_linear")[dtype]
    got, wanted = result["got"], result["wanted"]

    def distance(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a.float() - b.float()).norm() / b.float().norm())

    for name in ("y", "dx", "dw"):
        assert distance(got[name], wanted[name]) < tolerance, name
        assert distance(got[name], wanted[f"{name} without FP8"]) > 4 * 2**-8, f"{name}: no FP8 in it"
    assert distance(got["dw"], wanted["dw of the row-wise copies"]) > 4 * 2**-8


def test_weight_gradients_stay_in_fp32(one: Any) -> None:
    for name, (is_fp32, is_bf16_rounded) in one.result("main_grad").items():
        assert is_fp32 and not is_bf16_rounded, name


def test_the_model_is_not_silently_in_high_precision(one: Any) -> None:
    plain, fp8 = one.result("one_rank"), one.result("one_rank_fp8")
    bf16, both = one.result("one_rank_bf16"), one.result("one_rank_bf16_fp8")
    for a, b in ((plain, fp8), (bf16, both)):
        gap = max(float((x - y).abs().max()) for x, y in zip(a["before"], b["before"]))
        assert 1e-2 < gap < 2.0
        assert a["steps"][0][1] != pytest.approx(b["steps"][0][1], rel=1e-4)


def test_every_linear_multiplies_with_quantized_weights(one: Any, models: dict[str, Path]) -> None:
    from fp8_formula import tiles
    from safetensors.torch import load_file

    from fp8slurm.models.names import NameTable
    from fp8slurm.models.spec import ModelSpec

    hf, table = load_file(models["dense"] / "model.safetensors"), NameTable(ModelSpec.from_hf_dir(models["dense"]))
    layers = one.result("fp8_layers")
    wanted = {e.name.removesuffix(".weight") for e in table if len(e.shape) == 2 and ".layers." in e.name}
    assert set(layers) == wanted
    for name, quantized in layers.items():
        assert torch.equal(quantized, tiles(table[f"{name}.weight"].merge(hf))), name


def test_tensor_parallel_ranks_multiply_with_the_same_bytes(one: Any, two: Any, models: dict[str, Path]) -> None:
    from fp8slurm.models.names import NameTable
    from fp8slurm.models.spec import ModelSpec

    table = NameTable(ModelSpec.from_hf_dir(models["dense"]))
    whole = one.result("fp8_layers")
    for rank in (0, 1):
        shards = two.result("tp2_fp8_layers", rank)
        assert set(shards) == set(whole)
        for name, shard in shards.items():
            assert torch.equal(shard, table[f"{name}.weight"].shard_of(whole[name], rank, 2)), name


def test_llamas_scaled_frequencies_show_in_these_sequences(models: dict[str, Path], tmp_path: Path) -> None:
    """What is compared with transformers above would differ a hundred times as much without the scaling."""
    plain = write_model(tmp_path / "plain", seed=4, tie=False, **LLAMA | {"rope_scaling": None})
    with torch.no_grad():
        scaled, without = (
            torch.cat([reference_logprobs(transformers_model(path), b) for b in packs(0)])
            for path in (models["llama"], plain)
        )
    assert (scaled - without).abs().max() > 1e-3


def test_yarn_turns_by_what_transformers_and_sglang_turn_by_at_every_position(
    one: Any, models: dict[str, Path], tmp_path: Path
) -> None:
    """Beyond 32,768 positions, too; in another process, because SGLang's modules are not to be imported in this one."""
    from safetensors.torch import load_file
    from transformers import AutoConfig
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    script, root = Path(__file__).with_name("sglang_yarn.py"), Path(__file__).parents[2]
    out, kinds = tmp_path / "tables.safetensors", {"": Qwen3RotaryEmbedding, "_qwen2": Qwen2RotaryEmbedding}
    command = [sys.executable, str(script), str(out), *(str(models[f"yarn{kind}"]) for kind in kinds)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for kind, rotary in kinds.items():
        got, engine = one.result(f"yarn_frequencies{kind}"), load_file(out)[f"yarn{kind}"]
        config = AutoConfig.from_pretrained(models[f"yarn{kind}"])
        cos, sin = rotary(config)(torch.zeros(1), torch.arange(131072)[None])
        for name, theirs, engines in (("cos", cos, engine[:, :64]), ("sin", sin, engine[:, 64:])):
            assert len(engines) >= 131072
            torch.testing.assert_close(got[name], theirs[0, :, :64], atol=1e-6, rtol=0)
            torch.testing.assert_close(got[name], engines[:131072], atol=1e-6, rtol=0)
        assert float(got["cos"][0, 0]) == pytest.approx(0.1 * math.log(4) + 1)


@pytest.mark.parametrize(
    ("ranks", "scenario"),
    [(1, "one_rank_fp8"), (1, "one_rank_bf16"), (1, "one_rank_bf16_fp8"), (2, "tp2_fp8"),
     (2, "tp2_sequence_parallel_fp8")],
)  # fmt: skip
def test_a_steps_own_forward_is_the_separate_one(one: Any, two: Any, ranks: int, scenario: str) -> None:
    """In other layouts `check` compares them."""
    got = (one if ranks == 1 else two).result(scenario)
    assert got["first"] and all(torch.equal(a, b) for a, b in zip(got["first"], got["before"], strict=True))


@pytest.mark.parametrize(
    ("scenario", "alone"),
    [("tp2_fp8", "one_rank"), ("tp2_sequence_parallel_fp8", "one_rank"), ("tp2_qwen2_fp8", "one_rank_qwen2"),
     ("cp2_fp8", "one_rank")],
)  # fmt: skip
def test_model_parallel_fp8_is_one_rank_fp8(one: Any, two: Any, scenario: str, alone: str) -> None:
    """Sums over ranks differ in the last bit of fp32, which can move a value to the next e4m3 code, rarely."""
    single = one.result(f"{alone}_fp8")
    gap_to_fp32 = (torch.cat(one.result(alone)["before"]) - torch.cat(single["before"])).abs().mean()
    for rank in (0, 1):
        got = two.result(scenario, rank)
        gap = torch.cat([(a[: len(b)] - b).abs() for a, b in zip(got["before"], single["before"])])
        assert gap.mean() < gap_to_fp32 / 20
        assert got["steps"][0][0] == pytest.approx(single["steps"][0][0], rel=1e-3)
        assert got["steps"][0][1] == pytest.approx(single["steps"][0][1], rel=1e-2)


def test_packed_modules_are_megatrons_segment_by_segment(one: Any) -> None:
    got = one.result("packed_modules")
    torch.testing.assert_close(*got["attention"], atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(*got["gradients"]):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert torch.equal(*got["rotary"])


def test_a_tied_folder_may_hold_the_head_all_the_same(one: Any) -> None:
    got = one.result("tied_head")
    assert len(got) > 10 and all(got.values()), got


# Refusals that need a trainer.


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no reference", "snapshot_reference"),
        ("no batches", "no micro-batches"),
        ("missing tensor", "no tensor model.layers.1.mlp.up_proj.weight"),
        ("other head", "lm_head.weight is not model.embed_tokens.weight"),
        ("dtype", "--model.dtype float32, this run has bfloat16"),
        ("layout", r"tensor-parallel-size 1 cuts the model's FFN width \(192\)"),
    ],
)
def test_refused(one: Any, case: str, message: str) -> None:
    import re

    assert re.search(message, one.result("refused")[case])


# Checkpoints.


def assert_same(straight: dict[str, Any], resumed: dict[str, Any]) -> None:
    for key in ("steps", "random", "adam"):
        assert straight[key] == resumed[key], key
    for name, weight in straight["weights"].items():
        assert torch.equal(weight, resumed["weights"][name]), name
    for a, b in zip(straight["logprobs"], resumed["logprobs"], strict=True):
        assert torch.equal(a, b)


def test_resume_to_the_bit_on_one_rank(one: Any) -> None:
    got = one.result("resume_one_rank")
    assert {entry[0] for entry in got["straight"]["adam"]} == {4.0}
    assert_same(**got)


@pytest.mark.parametrize("scenario", ["dp2_resume", "cp2_resume"])
@pytest.mark.parametrize("rank", [0, 1])
def test_resume_to_the_bit_on_two_ranks(two: Any, scenario: str, rank: int) -> None:
    assert_same(**two.result(scenario, rank))


def test_a_resume_runs_nothing_that_is_in_a_checkpoint(one: Any) -> None:
    said = one.result("hostile_checkpoint")
    assert said["metadata"].startswith("BadCheckpoint") and ".metadata: refers to" in said["metadata"]
    assert said["object"].startswith("BadCheckpoint") and "random_state" in said["object"]
    assert said["good"] == "" and said["ran"] is False


def test_save_before_any_step(one: Any) -> None:
    got = one.result("save_before_any_step")
    assert got["straight"] == got["resumed"]


@pytest.mark.parametrize(
    ("scenario", "shares"), [("one_to_dp2", True), ("one_to_tp2", False), ("one_to_pp2", False), ("one_to_cp2", False)]
)
@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_continues_on_two(one: Any, two: Any, scenario: str, shares: bool, rank: int) -> None:
    share = slice(rank, None, 2) if shares else slice(None)
    check_continued(two.result(scenario, rank), one.result("save_one_rank"), share)


@pytest.mark.parametrize("rank", range(4))
def test_two_ranks_continue_on_four(one: Any, four: Any, rank: int) -> None:
    check_continued(four.result("cp2_to_cp2tp2", rank), one.result("save_one_rank"))


@pytest.mark.parametrize("layout", ["dp2", "tp2", "pp2", "cp2"])
def test_two_ranks_continue_on_one(one: Any, back: Any, layout: str) -> None:
    check_continued(back.result(f"{layout}_to_one"), one.result("save_one_rank"))


@pytest.mark.parametrize(("size", "scenario"), [(1, "full_disk"), (2, "tp2_full_disk")])
def test_a_full_disk_is_an_error_on_every_rank_and_no_more(one: Any, two: Any, size: int, scenario: str) -> None:
    for rank in range(size):
        got = (one if size == 1 else two).result(scenario, rank)
        assert "could not be written" in got["said"]
        assert f"rank {size - 1}: " in got["said"]
        assert len(got["step"]) == 1


@pytest.mark.parametrize("scenario", ["snapshot_bytes", "dp2_snapshot_bytes", "tp2_snapshot_bytes"])
def test_a_snapshot_is_megatrons_own_checkpoint_whatever_comes_after_it(one: Any, two: Any, scenario: str) -> None:
    got = (one if scenario == "snapshot_bytes" else two).result(scenario)
    assert got["names"][0] == got["names"][1] and any(n.endswith(".distcp") for n in got["names"][0])
    assert got["differ"] == [] and got["same index"]


@pytest.mark.parametrize("scenario", ["optimizer_sleep", "plain_optimizer_sleep", "dp2_optimizer_sleep"])
def test_an_optimizer_that_sleeps_between_steps_takes_the_same_steps(one: Any, two: Any, scenario: str) -> None:
    got = (two if scenario.startswith("dp2") else one).result(scenario)
    assert got["awake"]["steps"] == got["asleep"]["steps"]
    for kind in ("weights", "files"):
        awake, asleep = got["awake"][kind], got["asleep"][kind]
        assert awake.keys() == asleep.keys() and awake
        assert [k for k in awake if not torch.equal(awake[k], asleep[k])] == []


@pytest.mark.parametrize("scenario", ["warm_up", "tp2_warm_up"])
def test_a_warm_up_changes_nothing(one: Any, two: Any, scenario: str) -> None:
    got = (two if scenario.startswith("tp2") else one).result(scenario)
    assert got["cold"]["steps"] == got["warm"]["steps"]
    assert [k for k, v in got["cold"]["weights"].items() if not torch.equal(v, got["warm"]["weights"][k])] == []


def test_matrices_decay_and_norms_do_not_and_settings_are_this_runs_own(one: Any) -> None:
    got = one.result("optimizer_settings")
    for name, kept in got["kept"].items():  # 1 - lr * weight_decay of every weight; as in Megatron's own training
        assert kept == pytest.approx(1.0 if "norm" in name else 0.9, abs=1e-5), name
    assert sorted(got["groups"]) == [[0.0, 0.0, 0.5, 0.999, 1e-3], [1.0, 0.5, 0.5, 0.999, 1e-3]]
