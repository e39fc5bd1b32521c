"""What needs no running Megatron: refusals, the shim's guard, schedules, reading weights, log-probabilities."""

from __future__ import annotations

import json
import math
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from trainer_reference import run_config, write_model

from fp8slurm.core.errors import BadCheckpoint, InputError
from fp8slurm.models.names import NameTable
from fp8slurm.models.spec import ModelSpec
from fp8slurm.rl.schedule import learning_rate
from fp8slurm.trainer import optimizer_state
from fp8slurm.trainer.build import allocate_fused_state
from fp8slurm.trainer.logprobs import vocab_parallel_logprobs
from fp8slurm.trainer.start import check_context_parallel, check_machine
from fp8slurm.trainer.weights import HfReader, ParameterShards


@pytest.mark.parametrize(
    ("fp8", "dtype", "cuda", "te", "message"),
    [
        ({"backend": "transformer_engine"}, "bfloat16", False, False,
         "TransformerEngine is not installed, and training would silently be bfloat16; allowed here: emulated, off"),
        ({"backend": "transformer_engine"}, "bfloat16", True, False, "not installed"),
        ({"backend": "transformer_engine"}, "bfloat16", False, True, "needs a GPU; allowed here: emulated, off"),
        ({"backend": "emulated"}, "bfloat16", True, True, "without a GPU; allowed here: transformer_engine, off"),
        ({"backend": "off"}, "bfloat16", True, False, "needs TransformerEngine"),
        ({"backend": "emulated", "param_gather": True}, "float32", False, False, "--model.dtype float32: FP8 weights"),
        ({"backend": "off", "param_gather": True}, "bfloat16", True, True, "would silently stay bfloat16"),
        ({"backend": "transformer_engine", "param_gather": True}, "bfloat16", False, True,
         "needs a GPU and TransformerEngine; here"),
        ({"backend": "transformer_engine", "param_gather": True}, "bfloat16", True, False,
         "needs a GPU and TransformerEngine; here"),
        ({"backend": "transformer_engine"}, "float32", True, True, "--model.dtype float32"),
    ],
)  # fmt: skip
def test_never_silently_bf16(fp8: dict[str, Any], dtype: str, cuda: bool, te: bool, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check_machine(run_config(fp8=fp8, model={"dtype": dtype}), cuda, te)


@pytest.mark.parametrize(
    ("fp8", "cuda", "te"),
    [
        ({"backend": "emulated"}, False, False),
        ({"backend": "emulated", "param_gather": True}, False, False),
        ({"backend": "off"}, False, False),
        ({"backend": "off"}, True, True),
        ({"backend": "transformer_engine"}, True, True),
        ({"backend": "transformer_engine", "param_gather": True}, True, True),
    ],
)
def test_settings_that_work(fp8: dict[str, Any], cuda: bool, te: bool) -> None:
    check_machine(run_config(fp8=fp8, model={"dtype": "bfloat16"}), cuda, te)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"optim": {"cpu_offload": True, "distributed": False}}, "allowed: --optim.distributed"),
        ({"optim": {"cpu_offload": True}, "model": {"dtype": "float32"}}, "--model.dtype float32"),
        ({"optim": {"moments": "bfloat16"}}, "only TransformerEngine's FusedAdam on a GPU"),
        ({"optim": {"moments": "bfloat16", "cpu_offload": True}}, "the CPU's Adam keeps FP32 moments"),
        ({"optim": {"sleep": True}}, "engines on the trainer's GPUs: it needs --slurm.gpus-per-node"),
        ({"optim": {"sleep": True}, "slurm": {"gpus_per_node": 1}, "engine": {"sleep": False}}, "engines that sleep"),
        ({"optim": {"sleep": True, "cpu_offload": True}, "slurm": {"gpus_per_node": 1}}, "in host memory already"),
        ({"moe": {"dispatcher": "flex"}}, "DeepEP (package deep_ep) is not installed; allowed here: alltoall"),
    ],
)
def test_optimizer_and_dispatcher_that_this_machine_does_not_have(sections: dict[str, Any], message: str) -> None:
    config = run_config(**{"model": {"dtype": "bfloat16"}} | sections)
    with pytest.raises(ValueError, match=re.escape(message)):
        check_machine(config, False, False)


def test_context_parallelism_needs_a_transformer_engine_that_gathers_packed_keys() -> None:
    two = run_config(parallel={"context_parallel_size": 2})
    check_context_parallel(two, "2.20.2")
    check_context_parallel(run_config(), "2.16.1")
    with pytest.raises(ValueError, match=r"context-parallel-size 2 with TransformerEngine 2.17.1.*allowed here: 1"):
        check_context_parallel(two, "2.17.1")


def test_optimizer_and_dispatcher_of_a_gpu() -> None:
    from fp8slurm.trainer.start import check_dispatcher, check_optimizer

    check_optimizer(run_config(optim={"moments": "bfloat16"}), True)
    check_optimizer(run_config(optim={"cpu_offload": True}, model={"dtype": "bfloat16"}), False)
    check_optimizer(run_config(optim={"sleep": True}, slurm={"gpus_per_node": 1}), True)
    with pytest.raises(ValueError, match="--optim.distributed"):
        check_optimizer(run_config(optim={"moments": "bfloat16", "distributed": False}), True)
    check_dispatcher("flex", True, True)
    with pytest.raises(ValueError, match="need a GPU"):
        check_dispatcher("flex", False, True)


GROUPED = {"fp8": {"backend": "transformer_engine", "grouped": "deep_gemm"}}


def test_grouped_products_by_deep_gemm() -> None:
    from fp8slurm.trainer.start import check_grouped

    moe = SimpleNamespace(is_moe=True, hidden_size=256)
    check_grouped(run_config(**GROUPED), moe)
    check_grouped(run_config(), SimpleNamespace(is_moe=False, hidden_size=80))


@pytest.mark.parametrize(
    ("fp8", "spec", "message"),
    [
        ({"backend": "emulated"}, {}, "with --fp8.backend emulated"),
        ({"backend": "off"}, {}, "allowed: --fp8.backend transformer_engine, or --fp8.grouped transformer_engine"),
        ({"param_gather": True}, {}, "allowed: --fp8.no-param-gather"),
        ({}, {"is_moe": False}, "the model has no experts"),
        ({}, {"hidden_size": 320}, "hidden_size 320; allowed: multiples of 128"),
    ],
)
def test_grouped_products_that_there_are_none_of(fp8: dict[str, Any], spec: dict[str, Any], message: str) -> None:
    from fp8slurm.trainer.start import check_grouped

    model = SimpleNamespace(**{"is_moe": True, "hidden_size": 256} | spec)
    with pytest.raises(InputError, match=re.escape(message)):
        check_grouped(run_config(fp8=GROUPED["fp8"] | fp8), model)


def test_the_shim_stays_away_from_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from fp8slurm.cpu import megatron

    before = torch.cuda.current_device, torch.Tensor.to, torch.zeros
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="GPU is in use"):
        megatron.install()
    assert before == (torch.cuda.current_device, torch.Tensor.to, torch.zeros)


def test_the_loop_does_not_load_megatron() -> None:
    import subprocess
    import sys

    code = (
        "import sys, fp8slurm.rl.loop, fp8slurm.rl.schedule, fp8slurm.models.names; "
        "heavy = 'megatron', 'sglang', 'transformer_engine'; "
        "sys.exit(str([m for m in sys.modules if m.split('.')[0] in heavy] or ''))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr.strip() == ""


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.25, 0.5, 0.75, 1.0, 0.775, 0.55, 0.325, 0.1]),
        ("cosine", [0.25, 0.5, 0.75, 1.0, 0.1 + 0.9 * (0.5 + 0.5 * math.cos(math.pi / 4)), 0.55,
                    0.1 + 0.9 * (0.5 + 0.5 * math.cos(3 * math.pi / 4)), 0.1]),
    ],
)  # fmt: skip
def test_schedule(schedule: Any, expected: list[float]) -> None:
    values = [learning_rate(i, 8, 1.0, 0.1, 3, schedule) for i in range(8)]
    assert values == pytest.approx(expected)
    assert learning_rate(20, 8, 1.0, 0.1, 3, schedule) == pytest.approx(expected[-1])


def test_reader_of_a_sharded_folder(tmp_path: Path) -> None:
    a, b = torch.randn(3, 2), torch.randn(4)
    save_file({"a": a}, tmp_path / "1.safetensors")
    save_file({"b": b}, tmp_path / "2.safetensors")
    index = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text("{}")
    reader = HfReader(tmp_path)
    assert set(reader) == {"a", "b"} and torch.equal(reader["a"], a) and torch.equal(reader["b"], b)
    os.truncate(tmp_path / "1.safetensors", 80)
    with pytest.raises(BadCheckpoint, match="1.safetensors: truncated"):
        HfReader(tmp_path)
    (tmp_path / "2.safetensors").unlink()
    (tmp_path / "1.safetensors").unlink()
    save_file({"a": a}, tmp_path / "1.safetensors")
    with pytest.raises(BadCheckpoint, match="shard 2.safetensors is missing"):
        HfReader(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        HfReader(tmp_path / "nowhere")


def test_reader_and_table_agree(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    assert set(HfReader(folder)) == set(NameTable(ModelSpec.from_hf_dir(folder)).hf_tensors())


def test_a_ranks_shards_are_filled_with_nothing_else(tmp_path: Path) -> None:
    """On the second of two tensor-parallel ranks; what would be another model than config.json says is refused."""
    spec = ModelSpec.from_hf_dir(write_model(tmp_path / "m"))
    hf, table = dict(HfReader(tmp_path / "m")), NameTable(spec)
    parameters = {e.name: torch.nn.Parameter(torch.full(e.shard_shape(2), torch.nan)) for e in table}
    shards = ParameterShards(table, [(table[n], p, False) for n, p in parameters.items()], (1, 2), (0, 1))
    filled = []
    shards.load(hf, loaded=lambda parameter, shard: filled.append(parameter))
    for entry in table:
        assert torch.equal(parameters[entry.name].detach(), entry.shard(hf, 1, 2).float()), entry.name
    assert [id(p) for p in filled] == [id(p) for p in parameters.values()]

    assert spec.tie_word_embeddings
    head, embedding = "lm_head.weight", hf["model.embed_tokens.weight"]
    shards.load(hf | {head: embedding.clone()})
    norm = hf["model.norm.weight"]
    for changed, message in [
        ({head: embedding + 1}, "m: lm_head.weight is not model.embed_tokens.weight"),
        ({head: embedding.half()}, "m: lm_head.weight is not model.embed_tokens.weight"),
        ({"model.norm.weight": norm.to(torch.float8_e4m3fn)}, "m: model.norm.weight is torch.float8_e4m3fn"),
        ({"model.norm.weight": norm.to(torch.int32)}, "m: model.norm.weight is torch.int32"),
        ({"model.norm.weight": norm[1:]}, "m: model.norm.weight: shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            shards.load(hf | changed, "m")


@pytest.mark.parametrize("rows", [2, 100])
def test_logprobs_entropy_and_gradients(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fp8slurm.trainer.logprobs.CHUNK_LOGITS", 11 * rows)
    g = torch.Generator().manual_seed(0)
    logits = (torch.randn(7, 11, generator=g, dtype=torch.float32) * 3).requires_grad_()
    labels = torch.randint(0, 11, (7,), generator=g)
    weights = torch.randn(2, 7, generator=g)
    logprobs, entropy = vocab_parallel_logprobs(logits, labels, with_entropy=True)
    before = logits.detach().clone()
    (logprobs * weights[0] + entropy * weights[1]).sum().backward()
    assert torch.equal(logits.detach(), before)
    mine, logits.grad = logits.grad, None
    log_p = logits.log_softmax(-1)
    wanted = log_p.gather(1, labels[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)
    (wanted[0] * weights[0] + wanted[1] * weights[1]).sum().backward()
    torch.testing.assert_close(logprobs, wanted[0])
    torch.testing.assert_close(entropy, wanted[1])
    torch.testing.assert_close(mine, logits.grad)
    assert vocab_parallel_logprobs(logits, labels)[1] is None


def test_logprobs_of_a_vocabulary_on_two_ranks_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks are threads. Their parts' peaks lie far apart, and labels on both sides of the cut."""
    barrier, slots, here = threading.Barrier(2, timeout=60), {}, threading.local()

    def all_reduce(tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None) -> None:
        slots[here.rank] = tensor.clone()
        barrier.wait()
        both = torch.stack([slots[0], slots[1]])
        barrier.wait()
        tensor.copy_(both.sum(0) if op == dist.ReduceOp.SUM else both.amax(0))

    monkeypatch.setattr("fp8slurm.trainer.logprobs.dist.all_reduce", all_reduce)
    monkeypatch.setattr("fp8slurm.trainer.logprobs.dist.get_rank", lambda group: here.rank)
    monkeypatch.setattr("fp8slurm.trainer.logprobs.CHUNK_LOGITS", 6 * 3)
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 12, generator=g) * 3
    logits[:4, :6] += 120  # exp of it would overflow, and of what is left of the other part underflow
    logits = logits.requires_grad_()
    labels, weights = torch.tensor([0, 5, 6, 11, 0, 5, 6, 11]), torch.randn(2, 8, generator=g)
    parts = [logits.detach()[:, 6 * r : 6 * r + 6].clone().requires_grad_() for r in range(2)]

    def rank(r: int) -> tuple[torch.Tensor, torch.Tensor]:
        here.rank = r
        group = SimpleNamespace(size=lambda: 2)
        logprobs, entropy = vocab_parallel_logprobs(parts[r], labels, group, with_entropy=True, temperature=0.5)
        (logprobs * weights[0] + entropy * weights[1]).sum().backward()
        return logprobs, entropy

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(rank, range(2)))
    log_p = (logits / 0.5).log_softmax(-1)
    wanted = log_p.gather(1, labels[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)
    (wanted[0] * weights[0] + wanted[1] * weights[1]).sum().backward()
    for one in found:
        torch.testing.assert_close(one[0], wanted[0])
        torch.testing.assert_close(one[1], wanted[1])
    torch.testing.assert_close(torch.cat([p.grad for p in parts], 1), logits.grad)


def test_shares_of_the_optimizers_state_are_put_together_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two buckets of 7 and 5 elements on two ranks, each padded to an even number; what is wanted lies across all boundaries."""
    shares = [
        [torch.tensor(x) for x in bucket]
        for bucket in (([0.0, 1, 2, 3], [4.0, 5, 6, -1]), ([7.0, 8, 9], [10.0, 11, -1]))
    ]
    monkeypatch.setattr(optimizer_state, "PIECE", 3)
    sent: list[torch.Tensor] = []
    monkeypatch.setattr(dist, "get_global_rank", lambda group, rank: 10 + rank)
    monkeypatch.setattr(dist, "send", lambda piece, to, group: sent.append(piece.clone()))
    wanted = [(0, 2), (3, 6), (9, 3)]
    optimizer_state._gather(
        SimpleNamespace(rank=lambda: 1, size=lambda: 2), [(s[1], n) for s, n in zip(shares, (7, 5))], []
    )
    assert [piece.tolist() for piece in sent] == [[4, 5, 6], [-1], [10, 11, -1]]
    arriving = iter(list(sent))

    def recv(buffer: torch.Tensor, source: int, group: Any) -> None:
        assert source == 11
        buffer.copy_(next(arriving))

    monkeypatch.setattr(dist, "recv", recv)
    to = [(offset, torch.full((n,), -7.0)) for offset, n in wanted]
    optimizer_state._gather(
        SimpleNamespace(rank=lambda: 0, size=lambda: 2), [(s[0], n) for s, n in zip(shares, (7, 5))], to
    )
    assert [t.tolist() for _, t in to] == [list(range(offset, offset + n)) for offset, n in wanted]
    assert next(arriving, None) is None


def test_logprobs_of_impossible_tokens_stay_finite_in_the_entropy() -> None:
    logits = torch.tensor([[0.0, -1000.0, 1000.0]], requires_grad=True)
    logprobs, entropy = vocab_parallel_logprobs(logits, torch.tensor([0]), with_entropy=True)
    assert logprobs.item() == -1000.0 and entropy.item() == 0.0
    entropy.sum().backward()
    assert torch.equal(logits.grad, torch.zeros(1, 3))


def test_state_that_fused_adam_would_make_in_its_first_step_is_there_for_a_checkpoint() -> None:
    old, new = torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16)
    made = []

    class Adam:  # TransformerEngine's needs a GPU
        store_param_remainders = True
        param_groups = [{"params": [old], "step": 7}, {"params": [new]}]
        state = {old: {"exp_avg": old}, new: {}}

        def initialize_state(self, p: torch.Tensor, remainders: bool) -> None:
            made.append((p.dtype, remainders))

    parts = [SimpleNamespace(optimizer=Adam()), SimpleNamespace(optimizer=torch.optim.AdamW([old]))]
    allocate_fused_state(SimpleNamespace(chained_optimizers=parts))
    assert made == [(torch.bfloat16, True)], "what is there already stays"
    assert [g["step"] for g in Adam.param_groups] == [7, 0]
