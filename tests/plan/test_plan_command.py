"""`fp8slurm plan`: what a person gets to see."""

import io
import json
import re

import pytest
from rich.console import Console
from tiny import model_config

from fp8slurm.cli import main
from fp8slurm.config import RunConfig, parse, recipe_names
from fp8slurm.models.known import find_spec, known_models
from fp8slurm.models.names import NameTable
from fp8slurm.models.spec import ModelSpec
from fp8slurm.plan import make_plan, memory
from fp8slurm.plan.engine import engine_memory, weights_on_gpu
from fp8slurm.plan.parameters import Layout, stages
from fp8slurm.plan.report import row, show, summary


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    """No checkpoint and no data are here."""
    monkeypatch.chdir(tmp_path)


def plan_of(recipe, *flags):
    return make_plan(parse(recipe, flags))


HEADLINE = ["qwen3-4b-fp8", "qwen3-30b-a3b-fp8"]
SPLIT = "--engine.placement split --engine.gpus 4 --engine.per-node 4 --slurm.ranks-per-node 4".split()


@pytest.mark.parametrize("name", [n for n in recipe_names() if not n.startswith("tiny")])
def test_every_recipe_of_a_known_model_is_planned_and_fits(name):
    plan = plan_of(name)
    assert plan.fits and all(fit.fits for fit in plan.fits)
    assert plan.traffic.ratio <= 0.55 and plan.traffic.quantized / plan.traffic.quantized_bf16 <= 0.502
    assert not plan.traffic.unaligned
    # Every sample of a step at its longest at once on an H200; on an H100 nearly: the last few wait in the engine's
    # queue, and docs/qwen3-4b.md says so.
    for fit in plan.fits:
        whole = fit.engine.kv_tokens // plan.longest_sequence
        assert whole >= plan.samples_per_engine * (1 if fit.gpu == "H200" else 0.9)


@pytest.mark.parametrize("width", [80, 100, 160])
@pytest.mark.parametrize("name", HEADLINE)
def test_tables_fit_the_terminal_and_cut_no_number(name, width):
    console = Console(width=width, record=True, file=io.StringIO())
    plan = plan_of(name)
    show(plan, console)
    text = console.export_text()
    assert max(len(line) for line in text.splitlines()) <= width
    assert "…" not in text
    for words in (
        "output layer",
        "gradients",
        "H100 of 80.0",
        "KV cache, tokens",
        "252 matrices" if "4b" in name else "18,624 matrices",
    ):
        assert words in re.sub(r"\s+", " ", text), words
    assert "by the folder's name" in re.sub(r"\s+", " ", text)


def test_json_has_the_same_figures(capsys):
    assert main(["plan", "--recipe", "qwen3-4b-fp8", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    plan = plan_of("qwen3-4b-fp8")
    assert values["traffic"]["payload"] == plan.traffic.payload == 4_412_507_392
    assert values["layout"]["data"] == 4 and values["fits"][0]["fits"] is True
    assert values["stages"][0]["memory"]["state"][0] == {
        "name": "weights",
        "bytes": plan.stages[0].memory.state[0].bytes,
        "basis": "exact",
        "note": "BF16",
    }


def test_a_gpu_that_is_too_small_is_said_to_be(capsys):
    assert main(["plan", "--recipe", "qwen3-4b-fp8", "--gpu-memory", "30"]) == 0
    assert "does not fit" in capsys.readouterr().out
    assert "no room for a KV cache" in summary(make_plan(parse("qwen3-4b-fp8", []), {"tiny": 9_000_000_000}))


def test_a_row_for_comparisons(capsys):
    assert main(["plan", "--recipe", "qwen3-4b-fp8", "--row", "as it is"]) == 0
    line = capsys.readouterr().out.strip()
    assert line.startswith("| as it is | 2.011 G |") and line.endswith("| H100, H200 |") and line.count("|") == 12
    assert line == row(plan_of("qwen3-4b-fp8"), "as it is")


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--model.hf-checkpoint", "models/Qwen9-1B"], ["models/Qwen9-1B", "Qwen3-4B", "--model.hf-checkpoint"]),
        (["--model.hf-checkpoint", "None"], ["--model.hf-checkpoint is not set", "Qwen3-4B"]),
        (["--parallel.tensor-parallel-size", "8"], ["9728", "128", "1, 2, 4"]),
        (["--parallel.pipeline-parallel-size", "8"], ["36", "layers"]),
        (["--slurm.ranks-per-node", "4"], ["--slurm.ranks-per-node 4", "--slurm.gpus-per-node 8"]),
        (["--engine.tensor-parallel-size", "8", "--engine.per-node", "1"], ["--engine.tensor-parallel-size 8", "FFN"]),
        (["--gpu-memory", "0"], ["--gpu-memory"]),
    ],
)
def test_refusals(flags, says, capsys):
    assert main(["plan", "--recipe", "qwen3-4b-fp8", *flags]) == 2
    err = capsys.readouterr().err
    assert err.startswith("fp8slurm plan: ") and "Traceback" not in err
    for words in says:
        assert words in err, err


def test_shape_comes_from_the_checkpoint_where_there_is_one(tmp_path):
    folder = tmp_path / "Qwen3-4B"
    folder.mkdir()
    known, source = find_spec(folder)
    assert "published shape" in source and known.hidden_size == 2560
    from tiny import model_config

    (folder / "config.json").write_text(json.dumps(model_config()))
    spec, source = find_spec(folder)
    assert spec.hidden_size == 256 and source == f"{folder}/config.json"
    assert known_models() == ["Llama-3.1-8B", "Qwen2.5-7B", "Qwen3-0.6B", "Qwen3-30B-A3B", "Qwen3-4B"]


def test_more_tensor_parallelism_than_blocks_is_listed_as_gathered():
    plan = plan_of(
        "qwen3-4b-fp8", "--parallel.tensor-parallel-size", "8", "--fp8.backend", "off", "--fp8.engine", "fp8"
    )
    assert len(plan.traffic.unaligned) == 3 * 36
    inside = {a.matrix for a in plan.alignment if a.cut_by in a.not_aligned}
    assert inside == {"gate_proj", "up_proj", "down_proj"}


def test_engines_that_do_not_sleep_keep_their_memory_while_the_trainer_works():
    asleep, awake = (plan_of("qwen3-4b-fp8", "--engine.sleep", value).fits[0] for value in ("True", "False"))
    assert "KV cache" not in asleep.phases[0].parts and awake.phases[0].parts["KV cache"] == awake.engine.kv_bytes
    assert "gradients" not in asleep.phases[1].parts and awake.phases[1].parts["gradients"]
    assert awake.phases[0].bytes > asleep.phases[0].bytes + awake.engine.weights + awake.engine.kv_bytes - 1


def test_split_placement_lists_two_kinds_of_gpus():
    plan = plan_of("qwen3-4b-fp8", *SPLIT)
    assert [p.name for p in plan.fits[0].phases] == [
        "train (trainer's GPU)",
        "sync (trainer's GPU)",
        "sync and rollout (engine's GPU)",
    ]
    assert plan.layout == Layout(4, 2, 1, 1, 1, True)


def test_a_teacher_takes_its_share_before_the_engine_beside_it():
    teacher = ["--teacher.checkpoint", "models/Qwen2.5-7B", "--teacher.mem-fraction", "0.4"]
    without, plan = plan_of("qwen3-4b-fp8", *SPLIT), plan_of("qwen3-4b-fp8", *SPLIT, *teacher)
    resident = memory.engine_resident(1)
    for fit, other in zip(plan.fits, without.fits):
        its = int((fit.gpu_bytes - resident) * 0.4)
        assert fit.teacher.weights > other.engine.weights and other.teacher is None
        taken = resident + its - (its - fit.teacher.weights) % fit.teacher.kv_bytes_per_token
        phase = fit.phases[-1]
        assert phase.parts["teacher"] == taken and fit.phases[0] == other.phases[0]
        left = int((fit.gpu_bytes - resident - taken) * parse("qwen3-4b-fp8", SPLIT).engine.mem_fraction)
        assert fit.engine.kv_tokens == (left - fit.engine.weights) // fit.engine.kv_bytes_per_token
    tight = plan_of("qwen3-4b-fp8", *SPLIT, *teacher[:2], "--teacher.mem-fraction", "0.05")
    assert not any(fit.fits for fit in tight.fits)


def test_what_was_sent_last_is_kept_on_the_trainers_gpus():
    flags = ["--engine.placement", "split", "--engine.gpus", "8", "--slurm.gpus-per-node", "16"]
    without, plan = plan_of("qwen3-30b-a3b-fp8", *flags), plan_of("qwen3-30b-a3b-fp8", *flags, "--sync.delta")
    kept = max(rank.broadcast for rank in plan.traffic.ranks)
    assert 0 < kept < plan.traffic.payload  # no rank sends all of it
    for fit, other in zip(plan.fits, without.fits):
        more = {p.name: p.bytes - q.bytes for p, q in zip(fit.phases, other.phases)}
        assert more == {
            "train (trainer's GPU)": kept, "sync (trainer's GPU)": kept, "sync and rollout (engine's GPU)": 0
        }  # fmt: skip


def test_context_parallel_ranks_share_tokens_and_nothing_else_but_the_optimizer():
    two, alone = plan_of("qwen3-4b-fp8-32k"), plan_of("qwen3-4b-fp8-32k", "--parallel.context-parallel-size", "1")
    assert (two.layout.data, two.layout.replicas, alone.layout.data) == (4, 8, 8)
    a, b = ({i.name: i.bytes for s in p.stages for i in (*s.memory.state, *s.memory.working)} for p in (two, alone))
    assert all(a[k] == b[k] for k in ("weights", "gradients", "optimizer", "FP8 copies"))
    assert a["layer inputs"] == b["layer inputs"] // 2
    # keys and values of 36 layers, 2 x 1024 wide, in BF16: half of them, gathered three times and summed once
    assert two.context_traffic == 36 * 4 * 34816 * 2048 * 2 // 2 and alone.context_traffic == 0
    assert two.pipeline[0].micro_batches == 2 * alone.pipeline[0].micro_batches


def test_what_tensor_parallelism_moves_and_when_context_parallelism_would_move_less(capsys):
    """docs/context.md has the formulas, and 35,840 bytes a token and layer for the recipe's shape."""
    cut = ["--parallel.context-parallel-size", "1", "--parallel.tensor-parallel-size", "2"]
    plan = plan_of("qwen3-4b-fp8-32k", *cut, "--parallel.sequence-parallel")
    assert plan.tensor_traffic == 36 * 34816 * 35840 and plan.context_traffic == 0
    assert plan.context_instead == plan_of("qwen3-4b-fp8-32k").context_traffic
    alone = plan_of("qwen3-4b-fp8-32k", *cut, "--parallel.no-sequence-parallel")
    assert alone.tensor_traffic == plan.tensor_traffic * 12 // 14
    assert plan_of("qwen3-30b-a3b-fp8").tensor_traffic == 0
    for flags, said in (([], True), (["--rollout.max-tokens", "8192", "--rollout.overlong-buffer", "4096"], False)):
        assert main(["plan", "--recipe", "qwen3-4b-fp8-32k", *cut, "--parallel.sequence-parallel", *flags]) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert "tensor parallelism moves 44.9 GB of hidden states to a rank in a micro-batch" in out
        assert ("; --parallel.context-parallel-size 2 in its place would move 10.3 GB in all" in out) == said


def test_recomputation_offload_and_stages_move_what_they_should():
    def on_gpu(plan, kind):
        return [sum(i.bytes for i in (*s.memory.state, *s.memory.working) if i.name == kind) for s in plan.stages]

    full, none = plan_of("qwen3-4b-fp8"), plan_of("qwen3-4b-fp8", "--train.recompute", "none")
    assert on_gpu(none, "activations")[0] > 10 * on_gpu(full, "layer inputs")[0]
    offloaded = plan_of("qwen3-4b-fp8", "--optim.cpu-offload")
    (held,) = (i.bytes for i in offloaded.host if i.name == "offloaded optimizer")
    # FP32 master, two moments and gradients on the host, for 12 bytes a parameter on each of 8 GPUs.
    assert on_gpu(offloaded, "optimizer") == [0] and held * 12 == 16 * 8 * on_gpu(full, "optimizer")[0]
    assert "offloaded optimizer" not in [i.name for i in full.host]
    staged = plan_of("qwen3-4b-fp8", "--parallel.pipeline-parallel-size", "4")
    assert (
        on_gpu(staged, "layer inputs")[0] == 4 * on_gpu(staged, "layer inputs")[3]
    )  # 4 micro-batches in flight, then 1
    assert on_gpu(staged, "output layer")[:3] == [0, 0, 0] < on_gpu(staged, "output layer")[3:]
    assert 0 < staged.pipeline[0].bubble < staged.pipeline[1].bubble < 1


ONE = ["--parallel.tensor-parallel-size=1", "--parallel.no-sequence-parallel"]


def parts_of(plan, phase):
    """Of the first GPU's phase whose name begins so."""
    (found,) = (p.parts for p in plan.fits[0].phases if p.name.startswith(phase))
    return found


def test_micro_batches_and_the_bubble_by_hand():
    flags = [
        *ONE, "--parallel.pipeline-parallel-size=4", "--slurm.gpus-per-node=4", "--slurm.ranks-per-node=4", "--engine.per-node=4",
        "--rollout.prompts-per-step=6", "--rollout.n-samples=4", "--train.updates-per-step=4", "--train.tokens-per-micro-batch=4096",
        "--rollout.max-tokens=1000", "--data.max-prompt-tokens=1048",
    ]  # fmt: skip
    longest, quarter = plan_of("qwen3-4b-fp8", *flags).pipeline
    # the largest update has two of the six groups: 8 samples, two of 2048 tokens in a micro-batch, or eight of 512
    assert (longest.response_tokens, longest.micro_batches, longest.bubble) == (1000, 4, 3 / 7)
    assert (quarter.response_tokens, quarter.micro_batches, quarter.bubble) == (250, 1, 3 / 4)


def test_what_is_kept_follows_the_settings():
    def state(*flags):
        return {i.name: i.bytes for i in plan_of("qwen3-4b-fp8", *flags).stages[0].memory.state}

    whole = plan_of("qwen3-4b-fp8", *ONE)
    n = whole.traffic.quantized_bf16 // 2
    plain = state(*ONE)
    assert plain["FP8 copies"] == 2 * n + 8 * (n // 128**2), "codes and scales, along rows and along columns"
    assert state(*ONE, "--optim.moments=bfloat16")["optimizer"] * 2 == plain["optimizer"]  # 6 and 12 bytes
    assert state(*ONE, "--algorithm.kl-coef=0.1")["reference model"] == 2 * whole.parameters
    primary = state(*ONE, "--fp8.param-gather")
    assert plain["weights"] - primary["weights"] == n and plain["FP8 copies"] - primary["FP8 copies"] == n
    hosted = plan_of("qwen3-4b-fp8", *ONE, "--fp8.param-gather", "--optim.cpu-offload")
    mine = {i.name: i.bytes for i in hosted.stages[0].memory.state}
    assert "optimizer" not in mine and mine["weights"] == primary["weights"]
    (held,) = (i.bytes for i in hosted.host if i.name == "offloaded optimizer")
    assert held == 8 * (primary["optimizer"] + 3 * mine["optimizer's staging"]), "of all ranks of the node"
    assert mine["optimizer's staging"] == 2 * 2 * 2560 * 2 * 9728, "two rounds in BF16, each of the largest matrix"
    experts = plan_of("qwen3-30b-a3b-fp8", "--algorithm.kl-coef=0.1")
    for stage in experts.stages:
        assert [i.bytes for i in stage.memory.state if i.name == "reference model"] == [2 * stage.parameters]
    assert memory.trainer_resident(1) == memory.TRAINER_ALONE < memory.trainer_resident(2) == memory.TRAINER_RESIDENT


def test_what_is_there_while_engines_work():
    awake, asleep, cut = (
        plan_of("qwen3-4b-fp8", *ONE),
        plan_of("qwen3-4b-fp8", *ONE, "--optim.sleep"),
        plan_of("qwen3-4b-fp8"),
    )
    assert "optimizer" in parts_of(awake, "sync") and "optimizer" in parts_of(asleep, "train")
    assert "optimizer" not in parts_of(asleep, "sync")
    (held,) = (i.bytes for i in asleep.host if i.name == "sleeping optimizer")
    assert held == 8 * parts_of(asleep, "train")["optimizer"], "of all ranks of the node"
    # two buckets, and where matrices are cut a third for the other ranks' slices
    assert parts_of(awake, "sync")["update buffers"] == 2 * awake.traffic.largest_bucket
    assert parts_of(cut, "sync")["update buffers"] == 3 * cut.traffic.largest_bucket
    assert awake.checkpoint_bytes == 14 * awake.parameters, "BF16 weights, FP32 masters and two moments"


def test_an_optimizers_buffer_is_shared_out_evenly():
    """megatron-core pads to a multiple of 128 and of the number of ranks, whatever that is."""
    table = NameTable(ModelSpec.from_hf_config(model_config()))
    for ranks in (3, 5, 7):
        (stage,) = stages(table, Layout(ranks, 1, 1, 1, 1, False))
        (buffer,) = stage.buffers
        assert buffer.data == ranks and buffer.padded % (ranks * 128) == 0
        assert 0 <= buffer.padded - buffer.elements < ranks * 128 + 64 * len(table.entries)


def test_an_engine_of_more_gpus_than_key_value_heads_by_hand():
    c = model_config()
    h, d, f, vocabulary, layers = 256, c["head_dim"], c["intermediate_size"], c["vocab_size"], c["num_hidden_layers"]
    assert (c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"]) == (h, 4, 2)
    table = NameTable(ModelSpec.from_hf_config(c))
    # on each of four GPUs one head of q, and one of k and of v, which two GPUs hold alike; norms are everywhere
    layer = 3 * d * h + h * d + 2 * (f // 4) * h + h * (f // 4) + 2 * h + 2 * d
    weights = 2 * (layers * layer + -(-vocabulary // 4) * h + h)
    assert weights_on_gpu(table, None, 2, tensor=4) == weights
    config = RunConfig.model_validate({"engine": {"tensor_parallel_size": 4, "mem_fraction": 0.5}})
    found = engine_memory(config, table, None, 10**9, 10**8)
    cell = 2 * d * layers * 2  # key and value of one head
    assert (found.weights, found.kv_bytes_per_token) == (weights, cell)
    assert found.kv_tokens == (450_000_000 - weights) // cell
    config = RunConfig.model_validate({"engine": {"tensor_parallel_size": 4, "max_total_tokens": 100}})
    assert engine_memory(config, table, None, 10**9, 10**8).kv_tokens == 100
