"""What model.exact cannot do is refused by name, with the reason and what is allowed."""

import pytest
from tiny import write_model

from fp8slurm.checkpoint import hf_to_fp8
from fp8slurm.config import parse
from fp8slurm.models import exact
from fp8slurm.models.exact import check_exact
from fp8slurm.models.spec import ModelSpec

GPU = "--slurm.gpus-per-node 1 --run.no-deterministic"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "hf"
    folder.mkdir()
    write_model(folder)
    return folder


@pytest.fixture(autouse=True)
def built(monkeypatch):
    monkeypatch.setattr(exact, "BUILT", frozenset({"cpu", "cuda"}))


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "moe"
    folder.mkdir()
    write_model(folder, moe=True)
    return folder


def checked(folder, *flags: str, exact: bool = True) -> None:
    spec = ModelSpec.from_hf_dir(folder)
    switch = ["--model.exact"] if exact else []
    check_exact(parse("tiny-fp8", ["--model.hf-checkpoint", str(folder), *switch, *flags]), spec)


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--fp8.backend off", "both sides multiply in FP8; allowed: transformer_engine"),
        ("--fp8.engine bf16", "an engine in BF16"),
        ("--engine.dtype float32", "--model.dtype bfloat16 and --engine.dtype float32"),
        ("--parallel.tensor-parallel-size 2", "size 2 and --engine.tensor-parallel-size 1: sums over .*1 or 2 on both"),
        ("--parallel.tensor-parallel-size 4 --engine.tensor-parallel-size 4", "size 4: sums over .*1 or 2 on both"),
        (
            "--parallel.tensor-parallel-size 2 --engine.tensor-parallel-size 2 --slurm.gpus-per-node 2",
            "size 2: sums over .* allowed here: 1 on both",
        ),
        (f"{GPU} --parallel.context-parallel-size 2", "--parallel.context-parallel-size 2: .*on GPUs.*allowed: 1"),
        ("--rollout.max-staleness 1", "--rollout.max-staleness 1: samples come from older weights"),
        ("--engine.tensor-parallel-size 2", "size 1 and --engine.tensor-parallel-size 2: sums over"),
        (f"{GPU} --engine.extra-args=--attention-backend triton", "allowed here: fa3"),
        (f"{GPU} --engine.extra-args=--attention-backend=triton", "allowed here: fa3"),
        ("--slurm.gpus-per-node 1", "--run.deterministic: on GPUs"),
        (f"{GPU} --fp8.param-gather", "--fp8.param-gather"),
        ("--engine.extra-args=--kv-cache-dtype fp8_e4m3", "--engine.extra-args --kv-cache-dtype"),
        ("--engine.extra-args=--speculative-algorithm EAGLE", "--engine.extra-args --speculative-algorithm"),
    ],
)
def test_refused(folder, flags, says):
    with pytest.raises(ValueError, match=says) as error:
        checked(folder, *flags.split())
    assert str(error.value).startswith("--model.exact with ") and "--model.no-exact" in str(error.value)
    checked(folder, *flags.split(), exact=False)


@pytest.mark.parametrize(
    "flags, says",
    [
        (GPU, "Qwen3MoeForCausalLM: on GPUs SGLang's routers .*no exact form of them has run; allowed there: dense"),
        ("--parallel.tensor-parallel-size 2 --engine.tensor-parallel-size 2 --parallel.sequence-parallel",
         "--parallel.tensor-parallel-size 2: a mixture's sum over experts"),
        ("--engine.tensor-parallel-size 2 --engine.expert-parallel-size 2", "--engine.tensor-parallel-size 2: a mixture"),
        ("--parallel.expert-tensor-parallel-size 2", "--parallel.expert-tensor-parallel-size 2: a mixture's .*allowed: 1"),
        ("--engine.extra-args=--moe-runner-backend triton", "--engine.extra-args --moe-runner-backend"),
    ],
)  # fmt: skip
def test_what_mixtures_cannot_do_is_refused(mixture, flags, says):
    with pytest.raises(ValueError, match=says):
        checked(mixture, *flags.split())
    checked(mixture, *flags.split(), exact=False)


def test_layouts_of_mixtures_that_can_be_exact_pass(mixture):
    for flags in ("", "--rollout.routing-replay", "--parallel.expert-parallel-size 2 --slurm.ranks-per-node 2",
                  "--parallel.pipeline-parallel-size 2", "--parallel.context-parallel-size 2 "
                  "--parallel.expert-parallel-size 2", "--moe.aux-loss-coef 0.01", "--train.recompute full"):  # fmt: skip
        checked(mixture, *flags.split())


def test_other_families_are_refused(tmp_path):
    write_model(tmp_path, family="llama")
    with pytest.raises(
        ValueError, match="LlamaForCausalLM: the exact layers are another family's; allowed: Qwen3ForCausalLM, Qwen3Moe"
    ):
        checked(tmp_path)
    checked(tmp_path, exact=False)


def test_an_engine_checkpoint_that_keeps_a_linear_is_refused(folder, tmp_path):
    kept = ["model.layers.1.mlp.down_proj"]
    hf_to_fp8(folder, tmp_path / "fp8", modules_to_not_convert=kept)
    with pytest.raises(ValueError, match=rf"{tmp_path}/fp8: it keeps {kept[0]} out of FP8"):
        checked(folder, "--model.rollout-checkpoint", str(tmp_path / "fp8"))


def test_an_engine_checkpoint_that_keeps_experts_is_refused(mixture, tmp_path):
    kept = ["model.layers.1.mlp.experts"]
    hf_to_fp8(mixture, tmp_path / "fp8", modules_to_not_convert=kept)
    with pytest.raises(ValueError, match=rf"{tmp_path}/fp8: it keeps {kept[0]}.0.gate_proj out of FP8"):
        checked(mixture, "--model.rollout-checkpoint", str(tmp_path / "fp8"))


def test_layouts_that_can_be_exact_pass(folder):
    for flags in ("", "--parallel.pipeline-parallel-size 2", "--parallel.tensor-parallel-size 2 "
                  "--engine.tensor-parallel-size 2 --parallel.sequence-parallel", "--slurm.ranks-per-node 4", "--train.recompute full",
                  "--engine.per-node 2", "--rollout.temperature 0.7", f"{GPU} --fp8.backend "
                  "transformer_engine --engine.extra-args=--attention-backend fa3"):  # fmt: skip
        checked(folder, *flags.split())


def test_where_it_is_not_built_it_is_refused(folder, monkeypatch):
    monkeypatch.setattr(exact, "BUILT", frozenset({"cpu"}))
    with pytest.raises(ValueError, match="--slurm.gpus-per-node 1: it is not there yet on GPUs; allowed: cpu"):
        checked(folder, "--slurm.gpus-per-node", "1")
