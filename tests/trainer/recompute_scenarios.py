"""RL steps of a real trainer on samples that are made up: what ranks do for test_recompute_logprobs.py."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from trainer_scenarios import Ranks

from fp8slurm.core.stopping import NeverStop
from fp8slurm.core.types import Prompt, Sample, SampleGroup
from fp8slurm.rl.boundary import StepBoundary
from fp8slurm.rl.loop import Loop
from fp8slurm.rl.recorder import Recorder
from fp8slurm.rl.saving import Saver
from fp8slurm.rl.stopwatch import Stopwatch
from fp8slurm.rollout.serialization import encode_groups
from fp8slurm.rollout.tally import Tally
from fp8slurm.run.directory import RunState
from fp8slurm.run.step_times import StepTimes
from fp8slurm.trainer.trainer import Trainer

STEPS = 3
SECTIONS: dict[str, Any] = {
    "fp8": {"backend": "emulated"}, "algorithm": {"kl_coef": 0.01}, "optim": {"lr": 1e-3},
    "rollout": {"n_samples": 2, "max_gap": 0, "drop_no_signal": False, "save_every": 1},
}  # fmt: skip


def groups(seed: int, spec: Any, routing: bool) -> list[SampleGroup]:
    g = torch.Generator().manual_seed(seed)

    def sample(before: int, length: int) -> Sample:
        ids = torch.randint(3, 250, (length,), generator=g).tolist()
        logprobs, reward = (-torch.rand(length, generator=g) - 5).tolist(), float(torch.rand(1, generator=g))
        made = Sample(ids, logprobs, [0] * length, "stop", reward=reward)
        made.teacher_logprobs = (-torch.rand(length, generator=g) - 4).tolist()
        if routing:
            scores = torch.rand(before + length - 1, spec.num_layers, spec.num_experts, generator=g)
            made.routing = scores.topk(2).indices.to(torch.uint8)
        return made

    prompts = [tuple(torch.randint(3, 250, (5 + i,), generator=g).tolist()) for i in range(4)]
    return [SampleGroup(Prompt(i, p, "x"), [sample(len(p), 4 + k) for k in range(2)]) for i, p in enumerate(prompts)]


def steps(ranks: Ranks, folder: str, how: str, replay: bool) -> dict[str, Any]:
    """Records, SHA-256 of this rank's weights afterwards and of what was saved, and the order of the trainer's calls."""
    train = {"recompute_logprobs": how, "tokens_per_micro_batch": 48}
    rollout = SECTIONS["rollout"] | {"routing_replay": replay}
    with ranks.trainer(folder=folder, **SECTIONS | {"rollout": rollout, "train": train}) as trainer:
        trainer.snapshot_reference()
        calls = watched(trainer)
        path = ranks.folder / f"{folder}-{how}-{ranks.world_size}"
        loop = loop_of(trainer, path)
        records = []
        for step in range(1, STEPS + 1):
            answer = {"cursor": 4, "dropped": 0, "figures": Tally().sums, "reward_failures": 0, "seconds": 0.5}
            payload = encode_groups(groups(step, trainer.spec, replay))
            loop.weights.ask = lambda *_, **__: [(answer, payload)]
            records.append(loop.step(step))
        dist.barrier()
        shards = [s for _, s in sorted(trainer.named_shards(), key=lambda item: item[0])]
        weights = hashlib.sha256(b"".join(s.contiguous().view(torch.uint8).numpy().tobytes() for s in shards))
        saved = {str(p.relative_to(path)): p.read_text() for p in sorted(path.rglob("*.jsonl"))}
        times = sorted(loop.watch.seconds)
        return {"records": records, "weights": weights.hexdigest(), "saved": saved, "calls": calls, "times": times}


def watched(trainer: Trainer) -> list[str]:
    """Names of the calls that the loop makes, as they come."""
    calls: list[str] = []
    forward, update = trainer.logprobs, trainer.train_step

    def logprobs(batches: Any, reference: bool = False) -> Any:
        calls.append("reference" if reference else "logprobs")
        return forward(batches, reference)

    def train_step(*arguments: Any, **more: Any) -> Any:
        calls.append("train")
        return update(*arguments, **more)

    trainer.logprobs, trainer.train_step = logprobs, train_step  # type: ignore[method-assign]
    return calls


def loop_of(trainer: Trainer, path: Path) -> Loop:
    config, watch, run = trainer.config, Stopwatch(), SimpleNamespace(path=path)
    saver = Saver(config, run, trainer, dist.HashStore(), 1, watch, StepTimes(), None)
    engines = SimpleNamespace(sent_version=0, sleep=lambda: None, sync=lambda version: None, advance_scales=dict)
    boundary = StepBoundary(dist.HashStore(), True, NeverStop(), saver, saver.times)
    recorder = Recorder(config, run, watch, False, None)
    return Loop(config, run, trainer, engines, recorder, saver, boundary, watch, replace(RunState("rl", 0)))


def dense(ranks: Ranks) -> list[dict[str, Any]]:
    return [steps(ranks, "dense", how, False) for how in ("auto", "always")]


def experts_replayed(ranks: Ranks) -> list[dict[str, Any]]:
    return [steps(ranks, "moe", how, True) for how in ("auto", "always")]
