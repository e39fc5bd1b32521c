"""Parts of the loop that whole runs seldom meet: steps that were not made, and where a resume starts."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from fp8slurm.checkpoint.run import RunDirectory, RunState
from fp8slurm.config import RunConfig
from fp8slurm.rl import loop as loop_module
from fp8slurm.rl.loop import Loop
from fp8slurm.rl.types import Prompt, Sample, SampleGroup
from fp8slurm.trainer.trainer import StepResult

NAN = math.nan


def loop_with(config: RunConfig, **attributes) -> Loop:
    """A loop on one rank, of which only what a test needs is there."""
    loop = object.__new__(Loop)
    loop.config, loop.state, loop.seconds, loop.policy_loss = config, RunState("rl", 0), {}, None
    loop.sleeps = loop.asleep = False
    loop.beat = loop.sync = lambda: None
    for name, value in attributes.items():
        setattr(loop, name, value)
    return loop


def stepping(results: list[StepResult], events: list[str]) -> Loop:
    """A loop whose updates have these results."""
    config = RunConfig.model_validate({"rollout": {"n_samples": 2}, "train": {"updates_per_step": 2, "epochs_per_step": 2}})
    groups = [
        SampleGroup(Prompt(i, (1, 2), "x"), [Sample([3, 4], [-0.1, -0.1], [0, 0], "stop", reward=float(k)) for k in range(2)])
        for i in range(2)
    ]
    given = iter(results)

    def train_step(*_, **__) -> StepResult:
        events.append("update")
        return next(given)

    trainer = SimpleNamespace(data_parallel_rank=0, data_parallel_size=1, pad_multiple=1, train_step=train_step)
    return loop_with(
        config, trainer=trainer, beat=lambda: events.append("beat"), rollout=lambda *_: (groups, {"cursor": 2}),
        recompute=lambda batches: {},
    )  # fmt: skip


def test_a_step_that_was_not_made_records_no_invented_zeros_and_every_update_beats():
    events: list[str] = []
    bad = StepResult(NAN, math.inf, False, {"entropy": NAN, "tokens": 4.0})
    record = stepping([bad] * 4, events).step(1)
    assert math.isnan(record["loss"]) and math.isinf(record["grad_norm"]) and math.isnan(record["entropy"])
    assert record["skipped"] == 1.0 and record["tokens"] == 4.0
    assert events.count("update") == 4 and all(events[i + 1] == "beat" for i, e in enumerate(events) if e == "update")


def test_of_several_updates_those_that_were_made_are_averaged():
    bad, good = StepResult(NAN, NAN, False, {"entropy": NAN}), StepResult(2.0, 1.0, True, {"entropy": 3.0})
    loop = stepping([good, bad, good, bad], [])
    record = loop.step(1)
    assert (record["loss"], record["grad_norm"], record["entropy"], record["skipped"]) == (2.0, 1.0, 3.0, 1.0)
    assert loop.state.bad_steps == 0


def test_weights_that_a_rollout_has_to_send_first_are_not_counted_twice(monkeypatch):
    now = iter((0.0, 1.0, 1.5, 4.5, 5.0, 7.0, 10.0, 10.5))  # of rollout, sync within it, sleep within sync; then of sync alone
    monkeypatch.setattr(loop_module.time, "perf_counter", lambda: next(now))
    loop = loop_with(RunConfig())
    with loop.timed("rollout"):
        with loop.timed("sync"):
            with loop.timed("sleep"):
                pass
    with loop.timed("sync"):
        pass
    assert loop.seconds == {"sleep": 3.0, "sync": 4.0 - 3.0 + 0.5, "rollout": 7.0 - 4.0}


def resumed(tmp_path, state: RunState, has_reference: bool = True, damaged: bool = False, **sections) -> Loop:
    """A loop that continues from a checkpoint with this state."""
    first = RunDirectory(tmp_path / "r")
    first.acquire()
    folder = first.commit_checkpoint(first.begin_checkpoint(state), state)
    first.release()
    run = RunDirectory(first.path)
    run.acquire()
    if damaged:
        (folder / "state.json").write_text(json.dumps({"phase": "rl", "step": 99}))
    trainer = SimpleNamespace(load_hf=lambda path: None, snapshot_reference=lambda: None, load=lambda path: has_reference)
    loop = loop_with(
        RunConfig.model_validate(sections), run_dir=run, trainer=trainer, first=True, store=dist.HashStore(),
        _open_metrics=lambda resumed: None,
    )  # fmt: skip
    loop.resume()
    return loop


def test_a_run_that_ended_for_bad_steps_starts_their_count_anew(tmp_path):
    assert resumed(tmp_path / "ended", RunState("rl", 7, bad_steps=3), run={"max_bad_steps": 3}).state.bad_steps == 0
    assert resumed(tmp_path / "going", RunState("rl", 7, bad_steps=2), run={"max_bad_steps": 3}).state.bad_steps == 2


def test_a_reference_that_is_gone_is_not_made_up(tmp_path):
    kl = {"algorithm": {"kl_coef": 0.1}}
    with pytest.raises(ValueError, match=r"--algorithm.kl-coef 0.1: .*step_000007 was saved without a reference"):
        resumed(tmp_path / "a", RunState("rl", 7, sft_steps=6), has_reference=False, **kl)
    # where RL starts from the Hugging Face weights they are the reference; the supervised phase takes its own at its end
    resumed(tmp_path / "b", RunState("rl", 7), has_reference=False, **kl)
    resumed(tmp_path / "c", RunState("sft", 7), has_reference=False, **kl)
    resumed(tmp_path / "d", RunState("rl", 7, sft_steps=6), has_reference=True, **kl)


def test_a_damaged_checkpoint_is_set_aside(tmp_path):
    loop = resumed(tmp_path, RunState("rl", 7), damaged=True)
    assert loop.state.step == 0 and loop.run_dir.checkpoint_names() == []
    assert [p.name for p in loop.run_dir.checkpoints.iterdir()] == ["step_000007.damaged.1"]
