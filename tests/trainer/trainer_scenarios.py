"""What the ranks of a launch do: functions from Ranks to tensors, numbers, or lists and dicts of them."""

from __future__ import annotations

import itertools
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from trainer_reference import LENGTHS, LR, cross_entropy, pack, run_config

from fp8slurm.core.patches import applied
from fp8slurm.core.types import PackedBatch
from fp8slurm.models.spec import ModelSpec
from fp8slurm.trainer.start import start, stop
from fp8slurm.trainer.trainer import Trainer

_sessions = itertools.count()
FP8 = {"fp8": {"backend": "emulated"}}
BF16 = {"model": {"dtype": "bfloat16"}}
OFFLOAD = {"optim": {"cpu_offload": True}}
TP2 = {"parallel": {"tensor_parallel_size": 2}}
TP2SP = {"parallel": {"tensor_parallel_size": 2, "sequence_parallel": True}}
PP2 = {"parallel": {"pipeline_parallel_size": 2}}
CP2 = {"parallel": {"context_parallel_size": 2}}
CP2TP2SP = {"parallel": CP2["parallel"] | TP2SP["parallel"]}
CP2PP2 = {"parallel": CP2["parallel"] | PP2["parallel"]}


def save(trainer: Trainer, path: Path) -> None:
    """Write everything that `load` needs into the existing, empty folder `path`; blocks until it is on disk.

    OSError on all ranks where one of them could not write its part (disk full).
    """
    snapshot = trainer.snapshot(path, copy=False)
    written: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(written, snapshot.write())
    failure = [""]
    if dist.get_rank() == 0:
        try:
            snapshot.finish(written)
        except OSError as error:
            failure = [str(error)]
    dist.broadcast_object_list(failure, src=0)
    if failure[0]:
        raise OSError(f"the checkpoint in {path} could not be written: {failure[0]}")


@dataclass
class Ranks:
    """This rank, and where things are."""

    rank: int
    world_size: int
    store: dist.Store
    folder: Path
    paths: dict[str, Path]

    @contextmanager
    def trainer(self, folder: str = "dense", load: bool = True, **sections: Any) -> Iterator[Trainer]:
        """A trainer of the model in paths[folder], its weights loaded; everything is torn down afterwards."""
        config = run_config(**sections)
        start(config, self.rank, self.world_size, dist.PrefixStore(f"session/{next(_sessions)}", self.store))
        try:
            trainer = Trainer(config, ModelSpec.from_hf_dir(self.paths[folder]))
            if load:
                trainer.load_hf(self.paths[folder])
            yield trainer
        finally:
            stop()

    def make(self, name: str) -> Path:
        """A folder of this launch, made by rank 0."""
        path = self.folder / name
        if self.rank == 0:
            path.mkdir()
        dist.barrier()
        return path


def batches(trainer: Trainer, seed: int = 0) -> list[PackedBatch]:
    """This data-parallel rank's share of the four packs that all tests use."""
    packs = [pack(lengths, 10 * seed + i, trainer.pad_multiple) for i, lengths in enumerate(LENGTHS)]
    return packs[trainer.data_parallel_rank :: trainer.data_parallel_size]


def steps(trainer: Trainer, seeds: range, first: list[torch.Tensor] | None = None) -> list[list[float]]:
    """[loss, grad norm] of a step on every seed's data. `first` gets the log-probabilities of the first one's forward."""
    out = []
    for seed in seeds:
        keep = first.extend if first is not None and seed == seeds[0] else None
        result = trainer.train_step(batches(trainer, seed), cross_entropy, LR, before_update=keep)
        assert result.ok
        out.append([result.loss, result.grad_norm, result.metrics["tokens"]])
    return out


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: shard.clone() for name, shard in trainer.named_shards()}


def train(ranks: Ranks, **sections: Any) -> dict[str, Any]:
    """Log-probabilities before and after three steps, those of the first step's own forward, what the steps said."""
    with ranks.trainer(**sections) as trainer:
        before = trainer.logprobs(batches(trainer))
        first: list[torch.Tensor] = []
        history = steps(trainer, range(3), first)
        return {"before": before, "first": first, "steps": history, "after": trainer.logprobs(batches(trainer))}


# One rank.


def replaced(ranks: Ranks) -> list[list[str]]:
    """What is replaced once a rank has started, saved and resumed, and the private names that are not there."""
    sys.path.append(str(Path(__file__).parents[1]))
    from patch_list import missing, rows

    with ranks.trainer() as trainer:
        path = ranks.make("patches")
        save(trainer, path)
        trainer.load(path)
    with ranks.trainer(fp8={"backend": "emulated", "param_gather": True}, **OFFLOAD, **BF16):
        pass
    names = [name for names, _ in rows("Private names that are used, not replaced") for name in names]
    return [applied(), missing([n for n in names if n.startswith(("megatron.", "torch."))])]


def one_rank(ranks: Ranks) -> dict[str, Any]:
    return train(ranks)


def one_rank_plain_optimizer(ranks: Ranks) -> dict[str, Any]:
    return train(ranks, optim={"distributed": False})


def one_rank_untied(ranks: Ranks) -> dict[str, Any]:
    return train(ranks, folder="untied")


def one_rank_recompute(ranks: Ranks) -> dict[str, Any]:
    return train(ranks, train={"recompute": "full"})


def one_rank_fp8(ranks: Ranks) -> dict[str, Any]:
    return train(ranks, **FP8)


def one_rank_bf16(ranks: Ranks) -> dict[str, Any]:
    return train(ranks, **BF16)


def one_rank_bf16_fp8(ranks: Ranks) -> dict[str, Any]:
    return train(ranks, **FP8, **BF16)


def entropy(ranks: Ranks) -> dict[str, Any]:
    """Entropy, and the gradient of its sum with respect to the embedding."""
    with ranks.trainer(optim={"clip_grad": 0.0}) as trainer:
        seen = []

        def loss(logprobs: torch.Tensor, entropy: torch.Tensor, batch: PackedBatch) -> tuple[torch.Tensor, dict]:
            seen.append(entropy.detach())
            return entropy.sum(), {}

        trainer.train_step(batches(trainer)[:1], loss, 0.0, with_entropy=True)
        (entry, parameter, _), *_ = trainer.shards.parameters
        assert entry.name == "embedding.word_embeddings.weight"
        return {"entropy": seen[0], "gradient": parameter.main_grad.clone()}


def reference_model(ranks: Ranks) -> dict[str, Any]:
    with ranks.trainer(**FP8) as trainer:
        before = trainer.logprobs(batches(trainer))
        trainer.snapshot_reference()
        steps(trainer, range(1))
        kept, moved = trainer.logprobs(batches(trainer), reference=True), trainer.logprobs(batches(trainer))
        folder = ranks.make("with_reference")
        save(trainer, folder)
        with_reference = trainer.logprobs(batches(trainer), reference=True)
    with ranks.trainer(load=False, **FP8, algorithm={"kl_coef": 0.1}) as trainer:
        assert trainer.load(folder)
        loaded = trainer.logprobs(batches(trainer), reference=True)
    with ranks.trainer(load=False, **FP8) as trainer:
        assert not trainer.load(folder) and trainer.reference is None, "at kl_coef 0 no reference is loaded"
        alone = trainer.logprobs(batches(trainer))
    return {
        "before": before,
        "reference": kept,
        "after": moved,
        "same": with_reference,
        "loaded": loaded,
        "alone": alone,
    }


def bad_loss(ranks: Ranks) -> dict[str, Any]:
    """A NaN in one data-parallel rank's loss, then an infinite gradient, then a sound step."""
    with ranks.trainer(**FP8, **BF16) as trainer:
        untouched = weights(trainer)
        mine = batches(trainer)

        def nan(logprobs: torch.Tensor, entropy: None, batch: PackedBatch) -> tuple[torch.Tensor, dict]:
            bad = float("nan") if trainer.data_parallel_rank == trainer.data_parallel_size - 1 else 1.0
            return logprobs.sum() * bad, {"tokens": batch.loss_mask.sum()}

        def infinite_gradient(logprobs: torch.Tensor, entropy: None, batch: PackedBatch) -> tuple[torch.Tensor, dict]:
            # x + 0 * sqrt(x - x) is x, with an infinite slope
            return (logprobs + (logprobs - logprobs.detach()).sqrt()).sum(), {}

        first = trainer.train_step(mine, nan, LR)
        second = trainer.train_step(mine, infinite_gradient, LR)
        kept = {n: bool(torch.equal(w, untouched[n])) for n, w in weights(trainer).items()}
        third = trainer.train_step(mine, cross_entropy, LR)
        changed = [n for n, w in weights(trainer).items() if not torch.equal(w, untouched[n])]
    with ranks.trainer(**FP8, **BF16) as trainer:
        alone = trainer.train_step(batches(trainer), cross_entropy, LR)
    return {
        "ok": [first.ok, second.ok, third.ok],
        "kept": kept,
        "changed": len(changed),
        "third": [third.loss, third.grad_norm],
        "alone": [alone.loss, alone.grad_norm],
    }


def new_optimizer(ranks: Ranks) -> dict[str, Any]:
    """After steps and new_optimizer, a step equals the first step of a trainer that was loaded with those weights."""
    with ranks.trainer() as trainer:
        steps(trainer, range(2))
        middle = weights(trainer)
        trainer.new_optimizer()
        steps(trainer, range(2, 3))
        reset = weights(trainer)
    with ranks.trainer() as trainer:
        with torch.no_grad():
            for name, shard in trainer.named_shards():
                shard.copy_(middle[name])
        trainer.optimizer.reload_model_params()
        steps(trainer, range(2, 3))
        return {"reset": reset, "fresh": weights(trainer)}


def optimizer_settings(ranks: Ranks) -> dict[str, Any]:
    """A step that only decays; then the settings of a run that continues another's checkpoint with its own."""

    def nothing(logprobs: torch.Tensor, entropy: None, batch: PackedBatch) -> tuple[torch.Tensor, dict]:
        return logprobs.sum() * 0, {}

    def groups(trainer: Trainer) -> list[list[float]]:
        every = [g for part in trainer.optimizer.chained_optimizers for g in part.optimizer.param_groups]
        return [[g["wd_mult"], g["weight_decay"], *g["betas"], g["eps"]] for g in every]

    with ranks.trainer(optim={"weight_decay": 100.0}) as trainer:
        folder = ranks.make("other_settings")
        before = weights(trainer)
        trainer.train_step(batches(trainer), nothing, LR)
        kept = {name: float((w / before[name])[before[name] != 0].mean()) for name, w in weights(trainer).items()}
        save(trainer, folder)
    with ranks.trainer(optim={"weight_decay": 0.5, "beta1": 0.5, "beta2": 0.999, "eps": 1e-3}, load=False) as trainer:
        trainer.load(folder)
        trainer.train_step(batches(trainer), nothing, LR)
        return {"kept": kept, "groups": groups(trainer)}


def emulated_linear(ranks: Ranks) -> dict[str, Any]:
    """The emulated FP8 product and its two gradients, against the formula written out."""
    from fp8_formula import columnwise, rowwise, tiles

    from fp8slurm.cpu.fp8_linear import FP8Matmul
    from fp8slurm.fp8.quantize import fake_quantize_block

    out = {}
    with ranks.trainer(**FP8):
        for dtype in (torch.float32, torch.bfloat16):
            g = torch.Generator().manual_seed(1)
            # 200 tokens: the second block along the tokens is ragged; values of very different sizes
            x = (torch.randn(200, 1, 384, generator=g) * torch.logspace(-3, 2, 200)[:, None, None]).to(dtype)
            w = (torch.randn(256, 384, generator=g) * torch.logspace(-2, 0, 256)[:, None]).to(dtype)
            dy = (torch.randn(200, 1, 256, generator=g) * torch.logspace(1, -4, 200)[:, None, None]).to(dtype)
            x.requires_grad_()
            w.requires_grad_()
            y = FP8Matmul.apply(x, w, fake_quantize_block(w), fake_quantize_block(w), None, False)
            y.backward(dy)
            x2, dy2 = x.detach().squeeze(1).float(), dy.squeeze(1).float()
            wq = tiles(w.detach().float())
            wanted = {
                "y": rowwise(x2) @ wq.t(),
                "dx": rowwise(dy2) @ wq,
                "dw": columnwise(dy2).t() @ columnwise(x2),
                "dw of the row-wise copies": rowwise(dy2).t() @ rowwise(x2),
                "y without FP8": x2 @ w.detach().float().t(),
                "dx without FP8": dy2 @ w.detach().float(),
                "dw without FP8": dy2.t() @ x2,
            }
            got = {"y": y.squeeze(1), "dx": x.grad.squeeze(1), "dw": w.grad}
            out[str(dtype)] = {
                "got": {k: v.detach() for k, v in got.items()},
                "wanted": {k: v.to(dtype) for k, v in wanted.items()},
            }
    return out


def main_grad(ranks: Ranks) -> dict[str, Any]:
    """The weight gradient reaches Megatron's fp32 buffer without being rounded to BF16, over two micro-batches."""
    with ranks.trainer(**FP8, **BF16) as trainer:
        trainer.train_step(batches(trainer)[:2], cross_entropy, 0.0)
        fused = ("fc1.weight", "qkv.weight")
        found = {e.name: p.main_grad for e, p, _ in trainer.shards.parameters if e.name.endswith(fused)}
        return {n: [g.dtype == torch.float32, bool(torch.equal(g, g.bfloat16().float()))] for n, g in found.items()}


def fp8_layers(ranks: Ranks) -> dict[str, Any]:
    """Which linears are emulated, and what they multiply with."""
    return quantized_weights(ranks, **FP8)


def quantized_weights(ranks: Ranks, **sections: Any) -> dict[str, Any]:
    """The weights that the emulated linears multiply with, by module name."""
    with ranks.trainer(**sections) as trainer:
        trainer.logprobs(batches(trainer))
        found = {n: getattr(m, "_quantized", None) for n, m in trainer.module.named_modules()}
        return {n: q[0] for n, q in found.items() if q is not None}


def packed_modules(ranks: Ranks) -> dict[str, Any]:
    """Our packed attention and rotary embedding against Megatron's own, one segment at a time; and their gradients."""
    import megatron.core.models.common.embeddings.rope_utils as rope
    from megatron.core.packed_seq_params import PackedSeqParams

    from fp8slurm.cpu.packed_attention import apply_packed_rotary

    with ranks.trainer() as trainer:
        attention = trainer.module.decoder.layers[0].self_attention.core_attention
        lengths = [3, 40, 16, 17, 1, 40]
        cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        total = sum(lengths)
        g = torch.Generator().manual_seed(3)
        q, k, v = (torch.randn(total, h, 128, generator=g).requires_grad_() for h in (4, 2, 2))
        weight = torch.randn(total, 512, generator=g)
        freqs = torch.randn(40, 1, 1, 128, generator=g)
        ours = attention(q, k, v, None, packed_seq_params=PackedSeqParams("thd", cu_seqlens_q=cu, cu_seqlens_kv=cu))
        (ours * weight).sum().backward()
        gradients = [t.grad.clone() for t in (q, k, v)]
        pieces = []
        for s, e in zip(cu.tolist(), cu.tolist()[1:]):
            keys, values = k[s:e].repeat_interleave(2, 1), v[s:e].repeat_interleave(2, 1)
            scores = torch.einsum("qhd,khd->hqk", q[s:e], keys) / 128**0.5
            scores = scores.masked_fill(torch.ones(e - s, e - s).triu(1).bool(), float("-inf"))
            pieces.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).reshape(e - s, -1))
        theirs = torch.cat(pieces)
        for t in (q, k, v):
            t.grad = None
        (theirs * weight).sum().backward()
        turned = apply_packed_rotary(q.detach(), cu, freqs, cp_group=None)
        each = [
            rope._apply_rotary_pos_emb_bshd(q.detach()[s:e].unsqueeze(1), freqs[: e - s]).squeeze(1)
            for s, e in zip(cu.tolist(), cu.tolist()[1:])
        ]
        return {
            "attention": [ours.detach(), theirs.detach()],
            "rotary": [turned, torch.cat(each)],
            "gradients": [gradients, [t.grad for t in (q, k, v)]],
        }


def tied_head(ranks: Ranks) -> dict[str, bool]:
    """Whether each parameter is the dense folder's after loading the folder that holds the tied head as well."""
    with ranks.trainer() as trainer:
        wanted = weights(trainer)
        with torch.no_grad():
            for _, shard in trainer.named_shards():
                shard.zero_()
        trainer.load_hf(ranks.paths["tied_head"])
        return {name: bool(torch.equal(w, wanted[name])) for name, w in weights(trainer).items()}


def refused(ranks: Ranks) -> dict[str, str]:
    """Messages of the settings that have to be refused."""

    def message(action: Callable[[], Any]) -> str:
        try:
            action()
        except ValueError as error:
            return str(error)
        return ""

    out = {}
    with ranks.trainer() as trainer:
        out["no reference"] = message(lambda: trainer.logprobs(batches(trainer), reference=True))
        out["no batches"] = message(lambda: trainer.logprobs([]))
        out["missing tensor"] = message(lambda: trainer.load_hf(ranks.paths["truncated"]))
        out["other head"] = message(lambda: trainer.load_hf(ranks.paths["other_head"]))
        folder = ranks.make("fp32")
        save(trainer, folder)
    with ranks.trainer(**BF16) as trainer:
        out["dtype"] = message(lambda: trainer.load(folder))

    def wrong_layout(**sections: Any) -> None:
        with ranks.trainer(**sections):
            pass

    out["layout"] = message(lambda: wrong_layout(folder="narrow", **FP8))
    return out


# Resuming.


def resume_exactly(ranks: Ranks, **sections: Any) -> dict[str, Any]:
    """Four steps in one go, and two, a save, a load in a new trainer, and two: everything must be equal to the bit."""
    with ranks.trainer(**sections) as trainer:
        steps(trainer, range(2))
        path = ranks.make("resume_" + "_".join(sorted(sections)))
        save(trainer, path)
        straight = {"steps": steps(trainer, range(2, 4)), "weights": weights(trainer)}
        straight["random"] = torch.rand(3).tolist()
        straight["adam"] = adam_state(trainer)
        last = trainer.logprobs(batches(trainer))
    with ranks.trainer(load=False, **sections) as trainer:
        torch.rand(5)
        trainer.load(path)
        resumed = {"steps": steps(trainer, range(2, 4)), "weights": weights(trainer)}
        resumed["random"] = torch.rand(3).tolist()
        resumed["adam"] = adam_state(trainer)
        again = trainer.logprobs(batches(trainer))
    return {"straight": straight | {"logprobs": last}, "resumed": resumed | {"logprobs": again}}


def adam_state(trainer: Trainer) -> list[list[Any]]:
    """[step, sum |exp_avg|, sum exp_avg_sq, sum |master weight|] of every parameter that this rank updates."""
    out = []
    for part in trainer.optimizer.chained_optimizers:
        for p, s in part.optimizer.state.items():
            tensors = (s["exp_avg"], s["exp_avg_sq"], p.detach())
            out.append([float(s["step"]), *(float(t.double().abs().sum()) for t in tensors)])
    return out


def resume_one_rank(ranks: Ranks) -> dict[str, Any]:
    return resume_exactly(ranks, **FP8, **BF16)


def save_before_any_step(ranks: Ranks, **sections: Any) -> dict[str, Any]:
    with ranks.trainer(**sections) as trainer:
        path = ranks.make("zero_" + "_".join(sorted(sections)))
        save(trainer, path)
        first = steps(trainer, range(1))
    with ranks.trainer(load=False, **sections) as trainer:
        trainer.load(path)
        return {"straight": first, "resumed": steps(trainer, range(1))}


def save_here(ranks: Ranks, name: str, **sections: Any) -> dict[str, Any]:
    """Two steps, a save under NAME, two more."""
    with ranks.trainer(**sections) as trainer:
        steps(trainer, range(2))
        save(trainer, ranks.make(name))
        return next_two(trainer)


def next_two(trainer: Trainer) -> dict[str, Any]:
    history = steps(trainer, range(2, 4))
    return {"steps": history, "after": trainer.logprobs(batches(trainer)), "adam": adam_state(trainer)}


def continue_here(ranks: Ranks, name: str, **sections: Any) -> dict[str, Any]:
    """The two steps after the save at paths[name]; `folder`, as in all of these, is the model's."""
    with ranks.trainer(load=False, **sections) as trainer:
        trainer.load(ranks.paths[name])
        return next_two(trainer)


def hostile_checkpoint(ranks: Ranks) -> dict[str, Any]:
    """What a resume says to a checkpoint whose metadata or random state would run something, and whether it ran."""
    import pickle

    from fp8slurm.checkpoint.formats.torch_dist import read_metadata

    ran = ranks.folder / "ran"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (ran,))

    said = {}
    with ranks.trainer() as trainer:
        path = ranks.make("hostile")
        save(trainer, path)
        good = (path / ".metadata").read_bytes()
        metadata, _ = read_metadata(path)
        index = next(i for i in metadata.storage_data if i.fqn.startswith("random_state"))
        torch.save([Evil()], path / "__9_0.distcp")
        place = metadata.storage_data[index]
        place.relative_path, place.offset, place.length = "__9_0.distcp", 0, (path / "__9_0.distcp").stat().st_size
        for name, content in (("metadata", pickle.dumps(Evil())), ("object", pickle.dumps(metadata)), ("good", good)):
            (path / ".metadata").write_bytes(content)
            try:
                trainer.load(path)
                said[name] = ""
            except ValueError as error:
                said[name] = f"{type(error).__name__}: {error}"
    return said | {"ran": ran.exists()}


def full_disk(ranks: Ranks, **sections: Any) -> dict[str, Any]:
    """The last rank cannot write: every rank is told, and a later save works."""
    with ranks.trainer(**sections) as trainer:
        folder = ranks.make("full")
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if ranks.rank == ranks.world_size - 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            save(trainer, folder)
            said = ""
        except OSError as error:
            said = str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        later = ranks.make("later")
        save(trainer, later)
        trainer.load(later)
        return {"said": said, "step": steps(trainer, range(1))}


def snapshot_bytes(ranks: Ranks, **sections: Any) -> dict[str, Any]:
    """Megatron's own save, and a snapshot that is written only after two more steps: names of files that differ, and
    whether the two indexes say the same."""
    import pickle
    import queue

    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from fp8slurm.trainer import checkpoint, optimizer_state

    filesystem_async._results_queue = filesystem_async._results_queue or queue.Queue()
    optimizer_state.PIECE = 4099  # elements: tensors begin and end inside a piece
    with ranks.trainer(**sections) as trainer:
        trainer.snapshot_reference()
        steps(trainer, range(2))
        folders = [ranks.make("_".join([name, *sorted(sections)])) for name in ("megatron", "snapshot")]
        state = checkpoint._state(trainer, False, True, True) | {"layout": checkpoint.layout(trainer)}
        dist_checkpointing.save(state, str(folders[0]))
        snapshot = trainer.snapshot(folders[1])
        steps(trainer, range(2, 4))
        said: list[Any] = [None] * ranks.world_size
        dist.all_gather_object(said, snapshot.write())
        if ranks.rank == 0:
            snapshot.finish(said)
        dist.barrier()
    names = [sorted(p.name for p in f.iterdir()) for f in folders]
    differ = [
        n for n in names[0] if n != ".metadata" and (folders[0] / n).read_bytes() != (folders[1] / n).read_bytes()
    ]
    a, b = (pickle.loads((f / ".metadata").read_bytes()) for f in folders)
    same = a.state_dict_metadata == b.state_dict_metadata and a.storage_data == b.storage_data
    return {"names": names, "differ": differ, "same index": same and len(a.storage_data) > 50}


def dp2_snapshot_bytes(ranks: Ranks) -> dict[str, Any]:
    return snapshot_bytes(ranks, **FP8, **BF16)


def tp2_snapshot_bytes(ranks: Ranks) -> dict[str, Any]:
    return snapshot_bytes(ranks, **TP2, **BF16, **OFFLOAD)


def optimizer_sleep(ranks: Ranks, **sections: Any) -> dict[str, Any]:
    """Three steps and a save, once with the optimizer's state away between the steps and while it is saved."""
    out: dict[str, Any] = {}
    for name in ("awake", "asleep"):
        with ranks.trainer(**FP8, **BF16, **sections) as trainer:
            said, sleeping = [], trainer.sleeping
            parameters = {p.data_ptr() for p in trainer.module.parameters()}
            for seed in range(3):
                before = [t.data_ptr() for t in sleeping._tensors()]
                if name == "asleep":
                    sleeping.to_host()
                    sleeping.to_host()  # again: nothing happens
                    host_bytes = sum(host.nbytes for _, host in sleeping._host.values())
                    assert sleeping._away and host_bytes == sum(t.nbytes for t in sleeping._tensors())
                    assert not set(before) & {t.data_ptr() for t in sleeping._tensors()}, "something did not move"
                assert before and not set(before) & parameters, "a weight would have been moved"
                said += steps(trainer, range(seed, seed + 1))
            if name == "asleep":
                sleeping.to_host()
            folder = ranks.make(f"sleep_{name}_{'_'.join(sections)}")
            save(trainer, folder)
            out[name] = {"steps": said, "weights": weights(trainer)}
            files = sorted(folder.glob("*.distcp"))
            out[name]["files"] = {p.name: torch.frombuffer(bytearray(p.read_bytes()), dtype=torch.uint8) for p in files}
    return out


def warm_up(ranks: Ranks, **sections: Any) -> dict[str, Any]:
    """Two steps, without and with a warm-up before each."""
    out: dict[str, Any] = {}
    for name in ("cold", "warm"):
        with ranks.trainer(**FP8, **BF16, **sections) as trainer:
            said = []
            for seed in range(2):
                if name == "warm":
                    before = weights(trainer)
                    trainer.warm_up(batches(trainer, 9)[:1])
                    assert all(torch.equal(before[k], v) for k, v in weights(trainer).items())
                said += steps(trainer, range(seed, seed + 1))
            out[name] = {"steps": said, "weights": weights(trainer)}
    return out


def tp2_warm_up(ranks: Ranks) -> dict[str, Any]:
    return warm_up(ranks, **TP2SP)


def dp2_optimizer_sleep(ranks: Ranks) -> dict[str, Any]:
    return optimizer_sleep(ranks)


def plain_optimizer_sleep(ranks: Ranks) -> dict[str, Any]:
    return optimizer_sleep(ranks, optim={"distributed": False})


def tp2_full_disk(ranks: Ranks) -> dict[str, Any]:
    return full_disk(ranks, **TP2)


def save_one_rank(ranks: Ranks) -> dict[str, Any]:
    return save_here(ranks, "one")


def save_dp2(ranks: Ranks) -> dict[str, Any]:
    return save_here(ranks, "dp2")


def save_tp2(ranks: Ranks) -> dict[str, Any]:
    return save_here(ranks, "tp2", **TP2SP)


def save_pp2(ranks: Ranks) -> dict[str, Any]:
    return save_here(ranks, "pp2", **PP2)


def save_cp2(ranks: Ranks) -> dict[str, Any]:
    return save_here(ranks, "cp2", **CP2)


def one_to_dp2(ranks: Ranks) -> dict[str, Any]:
    return continue_here(ranks, "one")


def one_to_tp2(ranks: Ranks) -> dict[str, Any]:
    return continue_here(ranks, "one", **TP2)


def one_to_pp2(ranks: Ranks) -> dict[str, Any]:
    return continue_here(ranks, "one", **PP2)


def one_to_cp2(ranks: Ranks) -> dict[str, Any]:
    return continue_here(ranks, "one", **CP2)


def dp2_to_one(ranks: Ranks) -> dict[str, Any]:
    return continue_here(ranks, "dp2")


def tp2_to_one(ranks: Ranks) -> dict[str, Any]:
    return continue_here(ranks, "tp2")


def pp2_to_one(ranks: Ranks) -> dict[str, Any]:
    return continue_here(ranks, "pp2")


def cp2_to_one(ranks: Ranks) -> dict[str, Any]:
    return continue_here(ranks, "cp2")


def one_rank_qwen2(ranks: Ranks) -> dict[str, Any]:
    return train(ranks, folder="qwen2")


def one_rank_qwen2_untied(ranks: Ranks) -> dict[str, Any]:
    return train(ranks, folder="qwen2_untied")


def one_rank_llama(ranks: Ranks) -> dict[str, Any]:
    return train(ranks, folder="llama")


def one_rank_yarn(ranks: Ranks) -> dict[str, Any]:
    return train(ranks, folder="short_yarn")


def one_rank_yarn_qwen2(ranks: Ranks) -> dict[str, Any]:
    return train(ranks, folder="short_yarn_qwen2")


def yarn_frequencies_qwen2(ranks: Ranks) -> dict[str, torch.Tensor]:
    return yarn_frequencies(ranks, "yarn_qwen2")


def yarn_frequencies(ranks: Ranks, folder: str = "yarn") -> dict[str, torch.Tensor]:
    """(cos, sin) [131072, d / 2] that queries and keys are turned by."""
    with ranks.trainer(folder=folder, load=False) as trainer:
        angles, scale = trainer.module.rotary_pos_emb(131072, packed_seq=True)
        assert scale == trainer.module.decoder.layers[0].self_attention._yarn_concentration_factor
        half = angles[:, 0, 0, :64]
        return {"cos": half.cos() * scale, "sin": half.sin() * scale}


def cp2_yarn(ranks: Ranks) -> dict[str, Any]:
    return train(ranks, folder="short_yarn", **CP2)


def one_rank_qwen2_fp8(ranks: Ranks) -> dict[str, Any]:
    return train(ranks, folder="qwen2", **FP8)


# Two ranks.


def tp2_qwen2(ranks: Ranks) -> dict[str, Any]:
    return train(ranks, folder="qwen2", **TP2)


def tp2_sequence_parallel_qwen2(ranks: Ranks) -> dict[str, Any]:
    return train(ranks, folder="qwen2", **TP2SP)


def tp2_qwen2_fp8(ranks: Ranks) -> dict[str, Any]:
    return train(ranks, folder="qwen2", **TP2, **FP8)


def pp2_qwen2_untied(ranks: Ranks) -> dict[str, Any]:
    return train(ranks, folder="qwen2_untied", **PP2)


def tp2_sequence_parallel_llama(ranks: Ranks) -> dict[str, Any]:
    return train(ranks, folder="llama", **TP2SP)


def pp2_llama(ranks: Ranks) -> dict[str, Any]:
    return train(ranks, folder="llama", **PP2)


def dp2(ranks: Ranks) -> dict[str, Any]:
    return train(ranks)


def dp2_plain_optimizer(ranks: Ranks) -> dict[str, Any]:
    return train(ranks, optim={"distributed": False})


def tp2(ranks: Ranks) -> dict[str, Any]:
    return train(ranks, **TP2)


def tp2_sequence_parallel(ranks: Ranks) -> dict[str, Any]:
    return train(ranks, **TP2SP)


def pp2(ranks: Ranks) -> dict[str, Any]:
    return train(ranks, **PP2)


def pp2_untied(ranks: Ranks) -> dict[str, Any]:
    return train(ranks, folder="untied", **PP2)


def cp2(ranks: Ranks) -> dict[str, Any]:
    return train(ranks, **CP2)


def cp2_recompute(ranks: Ranks) -> dict[str, Any]:
    return train(ranks, train={"recompute": "full"}, **CP2)


def cp2_fp8(ranks: Ranks) -> dict[str, Any]:
    return train(ranks, **CP2, **FP8)


def cp2_resume(ranks: Ranks) -> dict[str, Any]:
    return resume_exactly(ranks, **FP8, **BF16, **CP2)


def tp2_fp8(ranks: Ranks) -> dict[str, Any]:
    return train(ranks, **TP2, **FP8)


def tp2_sequence_parallel_fp8(ranks: Ranks) -> dict[str, Any]:
    return train(ranks, **TP2SP, **FP8)


def tp2_fp8_layers(ranks: Ranks) -> dict[str, Any]:
    return quantized_weights(ranks, **TP2SP, **FP8)


def dp2_bad_loss(ranks: Ranks) -> dict[str, Any]:
    return bad_loss(ranks)


def dp2_resume(ranks: Ranks) -> dict[str, Any]:
    return resume_exactly(ranks, **FP8, **BF16)


# Four ranks.


def cp2tp2(ranks: Ranks) -> dict[str, Any]:
    return train(ranks, **CP2TP2SP)


def cp2pp2(ranks: Ranks) -> dict[str, Any]:
    return train(ranks, **CP2PP2)


def cp2dp2(ranks: Ranks) -> dict[str, Any]:
    return train(ranks, **CP2)


def cp2_to_cp2tp2(ranks: Ranks) -> dict[str, Any]:
    return continue_here(ranks, "cp2", **CP2TP2SP)
