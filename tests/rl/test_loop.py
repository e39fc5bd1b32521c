"""Parts of the loop that whole runs seldom meet: steps that were not made, and where a resume starts."""

from __future__ import annotations

import json
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fp8slurm.config import RunConfig
from fp8slurm.core.stopping import NeverStop, StepAbandoned
from fp8slurm.core.types import Prompt, Sample, SampleGroup
from fp8slurm.data.prompts import SftExample
from fp8slurm.rl import loop as loop_module
from fp8slurm.rl import recompute as recompute_module
from fp8slurm.rl import recorder as recorder_module
from fp8slurm.rl import supervised
from fp8slurm.rl.boundary import StepBoundary
from fp8slurm.rl.loop import Loop
from fp8slurm.rl.loss import sft_loss
from fp8slurm.rl.recompute import ImpossibleGap, check_equal, check_gap, recompute, recompute_reference, save_logprobs
from fp8slurm.rl.recorder import Recorder
from fp8slurm.rl.saving import Saver, first_state, load_newest
from fp8slurm.rl.stopwatch import Stopwatch
from fp8slurm.rollout.serialization import encode_groups
from fp8slurm.rollout.tally import Tally
from fp8slurm.run.checkpoint_writer import Saved
from fp8slurm.run.directory import RunDirectory, RunState
from fp8slurm.run.step_times import StepTimes
from fp8slurm.trainer.trainer import StepResult

NAN = math.nan


def rank_of(**calls) -> SimpleNamespace:
    """The trainer of a run with one rank; `calls`: what a test needs of it."""
    one = {"rank": 0, "data_parallel_rank": 0, "data_parallel_size": 1, "pad_multiple": 1, "memory": {}}
    one["logprobs"] = lambda batches, reference=False: []
    return SimpleNamespace(**one | calls)


def engines_that_answer(*answers: tuple[dict, torch.Tensor], sent_version: int = 0) -> SimpleNamespace:
    """Engines that answer every command so; what they were asked and sent is in `commands` and `sent`."""
    engines = SimpleNamespace(sent_version=sent_version, sleep=lambda: None, take_figures=dict, commands=[], sent=[])

    def ask(kind: str, version: int, abandon, **arguments) -> list[tuple[dict, torch.Tensor]]:
        engines.commands.append((kind, arguments))
        return list(answers)

    engines.ask, engines.sync = ask, engines.sent.append
    engines.advance_scales, engines.calibrate = dict, lambda version: None
    return engines


def saver_of(config: RunConfig, run_dir: Any, times: StepTimes | None = None) -> Saver:
    return Saver(config, run_dir, rank_of(), dist.HashStore(), 1, Stopwatch(), times or StepTimes(), None)


def loop_with(
    config: RunConfig, trainer: Any = None, weights: Any = None, state: RunState = RunState("rl", 0), run_dir: Any = None,
    recorder: Any = None, saver: Any = None, boundary: Any = None, watch: Stopwatch | None = None,
) -> Loop:  # fmt: skip
    """A loop on one rank that is never told to stop; every part can be given."""
    watch, saver = watch or Stopwatch(), saver or saver_of(config, run_dir)
    recorder = recorder or Recorder(config, run_dir, watch, False, None)
    boundary = boundary or StepBoundary(dist.HashStore(), True, NeverStop(), saver, saver.times)
    weights = weights or engines_that_answer()
    return Loop(config, run_dir, trainer or rank_of(), weights, recorder, saver, boundary, watch, state)


@pytest.fixture
def no_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probabilities are not recomputed: the trainer has none to give."""
    monkeypatch.setattr(loop_module, "compare", lambda *_: {})


def stepping(results: list[StepResult], events: list[str], state: RunState = RunState("rl", 0)) -> Loop:
    """A loop whose updates have these results."""
    config = RunConfig.model_validate(
        {"rollout": {"n_samples": 2}, "train": {"updates_per_step": 2, "epochs_per_step": 2}}
    )
    groups = [
        SampleGroup(
            Prompt(i, (1, 2), "x"), [Sample([3, 4], [-0.1, -0.1], [0, 0], "stop", reward=float(k)) for k in range(2)]
        )
        for i in range(2)
    ]
    given = iter(results)

    def train_step(*_, **__) -> StepResult:
        events.append("update")
        return next(given)

    watch = Stopwatch(heartbeat=lambda: events.append("beat"))
    engines = engines_that_answer(answer_of(groups, cursor=2))
    return loop_with(config, rank_of(train_step=train_step), engines, state, watch=watch)


@pytest.mark.usefixtures("no_gap")
def test_a_step_that_was_not_made_records_no_invented_zeros_and_every_update_beats():
    events: list[str] = []
    bad = StepResult(NAN, math.inf, False, {"entropy": NAN, "tokens": 4.0})
    record = stepping([bad] * 4, events).step(1)
    assert math.isnan(record["loss"]) and math.isinf(record["grad_norm"]) and math.isnan(record["entropy"])
    assert record["skipped"] == 1.0 and record["tokens"] == 4.0
    assert events.count("update") == 4 and all(events[i + 1] == "beat" for i, e in enumerate(events) if e == "update")


@pytest.mark.usefixtures("no_gap")
def test_of_several_updates_those_that_were_made_are_averaged():
    bad, good = StepResult(NAN, NAN, False, {"entropy": NAN}), StepResult(2.0, 1.0, True, {"entropy": 3.0})
    loop = stepping([good, bad, good, bad], [], RunState("rl", 0, bad_steps=2))
    record = loop.step(1)
    assert (record["loss"], record["grad_norm"], record["entropy"], record["skipped"]) == (2.0, 1.0, 3.0, 1.0)
    assert loop.state.bad_steps == 0, "bad steps count while they are in a row"


def resumed(
    tmp_path, state: RunState, has_reference: bool = True, damaged: bool = False, **sections
) -> tuple[RunState, RunDirectory]:
    """Where a run goes on that has a checkpoint with this state, and its directory."""
    first = RunDirectory(tmp_path / "r")
    first.acquire()
    folder = first.commit_checkpoint(first.begin_checkpoint(state), state)
    first.release()
    run = RunDirectory(first.path)
    run.acquire()
    if damaged:
        (folder / "state.json").write_text(json.dumps({"phase": "rl", "step": 99}))
    trainer = rank_of(load_hf=lambda path: None, snapshot_reference=lambda: None, load=lambda path: has_reference)
    config = RunConfig.model_validate(sections)
    return first_state(config, load_newest(config, run, trainer, dist.HashStore())), run


def test_a_run_that_ended_for_bad_steps_starts_their_count_anew(tmp_path):
    assert resumed(tmp_path / "ended", RunState("rl", 7, bad_steps=3), run={"max_bad_steps": 3})[0].bad_steps == 0
    assert resumed(tmp_path / "going", RunState("rl", 7, bad_steps=2), run={"max_bad_steps": 3})[0].bad_steps == 2


def test_a_reference_that_is_gone_is_not_made_up(tmp_path):
    kl = {"algorithm": {"kl_coef": 0.1}}
    with pytest.raises(ValueError, match=r"--algorithm.kl-coef 0.1: .*step_000007 was saved without a reference"):
        resumed(tmp_path / "a", RunState("rl", 7, sft_steps=6), has_reference=False, **kl)
    # where RL starts from the Hugging Face weights they are the reference; the supervised phase takes its own at its end
    resumed(tmp_path / "b", RunState("rl", 7), has_reference=False, **kl)
    resumed(tmp_path / "c", RunState("sft", 7), has_reference=False, **kl)
    resumed(tmp_path / "d", RunState("rl", 7, sft_steps=6), has_reference=True, **kl)


def test_a_damaged_checkpoint_is_set_aside(tmp_path):
    state, run = resumed(tmp_path, RunState("rl", 7), damaged=True)
    assert state.step == 0 and run.checkpoint_names() == []
    assert [p.name for p in run.checkpoints.iterdir()] == ["step_000007.damaged.1"]


def test_engines_that_were_to_keep_their_weights_cannot_do_so_over_a_resume(tmp_path):
    frozen = {"control": {"freeze_engine": True}}
    with pytest.raises(ValueError, match=r"--control.freeze-engine: .*step_000007 has other weights"):
        resumed(tmp_path / "a", RunState("rl", 7), **frozen)
    assert resumed(tmp_path / "b", RunState("sft", 7), **frozen)[0].step == 7
    assert resumed(tmp_path / "c", RunState("rl", 0), **frozen)[0].step == 0


def test_a_run_that_cannot_save_ends_and_says_why(tmp_path, caplog):
    """A full disk: the state of a run that goes on for hundreds of steps would be lost."""
    errors = iter(["no space", "", "no space", "no space", "no space"])
    saver = saver_of(RunConfig(), RunDirectory(tmp_path))
    saver.writer = SimpleNamespace(take=lambda wait: Saved(RunState("rl", 4), next(errors), 1.0))
    for failed in (1, 0, 1, 2):
        saver.collect()
        assert saver.figures().get("checkpoint/failed", 0) == failed
    with pytest.raises(
        OSError,
        match=r"3 checkpoints in a row could not be written; the newest is step_000004: no space .* are free in",
    ):
        saver.collect()


@pytest.mark.parametrize("step, steps, given_up", [(4, 9, True), (9, 9, False)])
def test_an_evaluation_that_leaves_no_time_to_save_is_given_up(step: int, steps: int, given_up: bool):
    """The step before it is whole: its record is written, without figures. The last step's would never be made up for."""
    config = RunConfig.model_validate({"run": {"steps": steps}, "data": {"eval": "there"}, "eval": {"every": 1}})
    policy = SimpleNamespace(in_rollout=lambda save_s: f"{save_s:g} s for a save")
    saver = SimpleNamespace(left_s=lambda: 3.0, figures=dict)
    recorded: list[dict[str, float]] = []
    boundary = StepBoundary(dist.HashStore(), True, policy, saver, StepTimes(save_s=3.0))
    recorder = SimpleNamespace(begin=lambda: None, write=lambda state, record: recorded.append(record))
    engines = engines_that_answer()
    loop = loop_with(config, None, engines, RunState("rl", step), saver=saver, boundary=boundary, recorder=recorder)
    reasons: list[str] = []

    def ask(kind, version, abandon, checkpoint):
        assert (kind, version, checkpoint) == ("evaluate", loop.state.version, loop.state.name)
        reasons.append(abandon() if abandon else "")
        raise StepAbandoned("too late")

    engines.ask = ask
    with pytest.raises(StepAbandoned):
        loop.evaluate()
    assert reasons == ["6 s for a save" if given_up else ""]
    loop.state = RunState("rl", step - 1)

    def make(number: int) -> dict[str, float]:
        loop.state = RunState("rl", number)
        return {"loss": 1.0}

    boundary.cross, loop.step = lambda: False, make
    with pytest.raises(StepAbandoned):
        loop.reinforce()
    assert recorded == [{"loss": 1.0}]


# -- what a step hands on ---------------------------------------------------------------------------------------


def trained(step: int = 1, rank: int = 0, ranks: int = 1, **sections) -> tuple[list[SimpleNamespace], Loop]:
    """The updates of a step, as the trainer of a data-parallel rank got them: (batches, learning rate, with_entropy).

    Two groups: responses of 1 and 3 tokens, of rewards 1 and 0, to prompts 10 and 20."""
    groups = [
        SampleGroup(
            Prompt(i, (10 * (i + 1), 2), "x"),
            [Sample([3] * n, [-0.5] * n, [0] * n, "stop", reward=r) for n, r in ((1, 1.0), (3, 0.0))],
        )
        for i in range(2)
    ]
    seen: list[SimpleNamespace] = []

    def train_step(batches, loss, lr, with_entropy, before_update=None) -> StepResult:
        if before_update is not None:
            before_update([])
        seen.append(SimpleNamespace(batches=batches, loss=loss, lr=lr, with_entropy=with_entropy))
        return StepResult(1.0, 1.0, True, {})

    trainer = rank_of(data_parallel_rank=rank, data_parallel_size=ranks, train_step=train_step)
    config = RunConfig.model_validate({"rollout": {"n_samples": 2}} | sections)
    loop = loop_with(config, trainer, engines_that_answer(answer_of(groups, cursor=2)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop_module, "compare", lambda *_: {})
        loop.step(step)
    return seen, loop


def test_the_learning_rate_of_a_step_is_the_schedules() -> None:
    optim = {"lr": 1.0, "min_lr": 0.1, "warmup_steps": 1, "schedule": "linear"}
    rates = [trained(step, run={"steps": 4}, optim=optim)[0][0].lr for step in (1, 2, 3, 4)]
    assert rates == pytest.approx([0.5, 1.0, 0.55, 0.1])  # the first step is number 0 of the schedule


def test_updates_of_a_step_are_cut_and_repeated_in_order() -> None:
    seen, loop = trained(train={"updates_per_step": 2, "epochs_per_step": 2})
    prompts = [[b.tokens[0].item() for b in s.batches] for s in seen]
    assert prompts == [[10], [20], [10], [20]]
    assert all(s.loss is loop.policy_loss and s.with_entropy for s in seen)
    assert (loop.state.step, loop.state.cursor, loop.weights.sent) == (1, 2, [1])
    assert trained(control={"freeze_engine": True})[1].weights.sent == []


def test_batches_are_for_the_policy_that_was_sampled_from_and_the_mean_that_is_asked_for() -> None:
    for mean, weights in (("token", [1 / 8] * 8), ("sequence", [1 / 12] * 6 + [1 / 4] * 2)):
        ((update,), _) = trained(rollout={"temperature": 0.7}, algorithm={"loss_mean": mean})
        assert [b.temperature for b in update.batches] == [0.7]
        used = [w for b in update.batches for w in b.loss_weights[b.loss_mask].tolist()]
        assert sorted(used) == pytest.approx(weights)


def test_every_data_parallel_rank_trains_on_its_own_share() -> None:
    shares = [trained(rank=rank, ranks=2)[0][0].batches for rank in (0, 1)]
    samples = [number for batches in shares for b in batches for number in b.samples]
    assert all(shares) and sorted(samples) == [0, 1, 2, 3]


def advantages_of(**sections) -> list[float]:
    """Of the four samples, in order."""
    ((update,), _) = trained(**sections)
    (batch,) = update.batches
    values = {n: batch.advantages[end - 2].item() for n, end in zip(batch.samples, batch.cu_seqlens.tolist()[1:])}
    return [values[n] for n in range(4)]


def test_advantages_follow_the_settings_and_the_controls(monkeypatch: pytest.MonkeyPatch) -> None:
    assert advantages_of() == pytest.approx([0.5**0.5, -(0.5**0.5)] * 2, abs=1e-5)
    plain = {"algorithm": {"divide_by_std": False}}
    assert advantages_of(**plain) == [0.5, -0.5] * 2
    assert advantages_of(control={"negate_advantage": True}, **plain) == [-0.5, 0.5] * 2
    seeds = []

    def turned(groups: list[SampleGroup], seed: str) -> None:
        seeds.append(seed)
        for group in groups:
            group.samples[0].reward, group.samples[1].reward = 0.0, 1.0

    monkeypatch.setattr(loop_module.controls, "shuffle_rewards", turned)
    for step in (1, 2):
        assert advantages_of(step=step, run={"seed": 7}, control={"shuffle_rewards": True}, **plain) == [-0.5, 0.5] * 2
    assert seeds == ["7/1", "7/2"], "every step has a permutation of its own"


# -- what a rollout says ----------------------------------------------------------------------------------------


def answer_of(groups: list[SampleGroup], **values) -> tuple[dict, torch.Tensor]:
    """A rollout worker's answer."""
    plain = {"cursor": 9, "dropped": 0, "figures": Tally().sums, "reward_failures": 0, "seconds": 0.5}
    return plain | values, encode_groups(groups)


def figures(rewards: float, samples: int, tokens: int, truncated: int) -> dict[str, list[float]]:
    """A rollout worker's sums."""
    values = {"reward/mean": rewards, "rollout/response_length": tokens, "rollout/truncated": truncated}
    return {key: [value, samples] for key, value in values.items()}


def group_of(index: int, *samples: Sample) -> SampleGroup:
    return SampleGroup(Prompt(index, (1, 2, 3), "x"), list(samples))


def test_a_rollouts_figures_are_those_of_all_workers() -> None:
    stopped = Sample([5, 6], [-0.1] * 2, [4] * 2, "stop", reward=1.0)
    cut, aborted = Sample([5] * 4, [-0.1] * 4, [4] * 4, "length"), Sample([], [], [], "abort")
    answers = [
        answer_of(
            [group_of(3, stopped, cut)],
            dropped=1,
            figures=figures(4.0, 4, 20, 3),
            reward_failures=1,
            lengths=[9, 4, 3, 4],
        ),
        answer_of(
            [group_of(8, aborted, stopped)],
            dropped=2,
            figures=figures(0.0, 2, 5, 0) | {"reward/parts/tidy": [1.5, 2]},
            seconds=2.5,
            reward_failures=2,
            lengths=[5, 0],
        ),
    ]
    loop = loop_with(RunConfig(), weights=engines_that_answer(*answers, sent_version=4))
    groups, record = loop.rollout(1)
    assert [g.prompt.index for g in groups] == [3, 8]
    assert loop.state.cursor == 9
    assert record == {
        "reward/mean": 4 / 6, "reward/failures": 3, "rollout/groups": 2, "rollout/dropped": 3,
        "rollout/tokens": 25, "rollout/response_length": 25 / 6, "rollout/truncated": 3 / 6, "tokens": 4 * 3 + 8,
        "data/metadata_bytes": sum(float(payload.numel()) for _, payload in answers),
        "time/generate": 2.5,
        "reward/parts/tidy": 0.75,
        "rollout/response_length_p50": 4, "rollout/response_length_p90": 9, "rollout/response_length_p99": 9,
    }  # fmt: skip  # means count groups that were dropped; `tokens` are those of the groups that are here
    assert loop_with(RunConfig(), weights=engines_that_answer(answer_of([]))).rollout(1)[1]["reward/mean"] == 0


def test_a_token_of_other_weights_than_were_sent_ends_the_run() -> None:
    mixed = Sample([5, 6, 7], [-0.1] * 3, [4, 4, 3], "stop")  # only the last token is stale
    loop = loop_with(RunConfig(), weights=engines_that_answer(answer_of([group_of(0, mixed)]), sent_version=4))
    with pytest.raises(RuntimeError, match=r"under weight versions \[3\]; the engines were sent 4"):
        loop.rollout(1)


def test_a_users_advantage_is_called_where_all_samples_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """On rank 0, which asks for all of them with their text; the others are told."""
    groups = [group_of(i, *(Sample([5], [-1.0], [0], "stop", reward=float(k)) for k in range(2))) for i in range(2)]
    asked: list[tuple[list[int], bool]] = []
    told = torch.tensor([1.5, -1.5, 0.5, -0.5], dtype=torch.float64)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(loop_module, "from_first", lambda values: values if values.any() else told)
    loop = loop_with(RunConfig(), rank_of())
    loop.config = RunConfig.model_validate({"algorithm": {"advantage": "examples.advantage:against_median"}})
    loop.exchange = SimpleNamespace(fetch=lambda groups, deals, also, texts: asked.append((also, texts)) or {})
    loop.advantages = lambda groups: [[g.samples[0].reward - 1, g.samples[1].reward] for g in groups]
    loop.fetch(groups, [], [3])
    assert asked == [([0, 1, 2, 3], True)]
    assert loop.advantages_of_all(groups) == [[-1.0, 1.0]] * 2
    loop.trainer.rank = 1
    loop.advantages = lambda groups: pytest.fail("another rank has only its own samples")
    assert loop.advantages_of_all(groups) == [[1.5, -1.5], [0.5, -0.5]]


# -- the gap ----------------------------------------------------------------------------------------------------


def gap_loop(monkeypatch: pytest.MonkeyPatch, leader: bool = True, **sections) -> tuple[Loop, list, list]:
    """A loop whose trainer's log-probabilities are 0.5 above the engine's, and the reference's 2; what ranks gather."""
    config = RunConfig.model_validate({"algorithm": {"kl_coef": 0.1}, "rollout": {"n_samples": 1}} | sections)
    trainer = rank_of(
        logprobs=lambda batches, reference=False: [b.rollout_logprobs + (2.0 if reference else 0.5) for b in batches],
        is_data_parallel_leader=leader,
        replay=None,
    )
    groups = [group_of(i, Sample([5, 6, 258], [-1.0, -2.0, -0.25], [0] * 3, "stop")) for i in range(2)]
    for group in groups if config.rollout.routing_replay else ():
        group.samples[0].routing = torch.zeros(5, 1, 1, dtype=torch.uint8)
    loop = loop_with(config, trainer, engines_that_answer(answer_of(groups)))
    gathered: list[torch.Tensor] = []
    # another rank's token: a gap of 2.5, as a row and in the sums by position
    other = {2: [[-1.0, -3.5]], 14: [[0.0, 0.0, 2.5, 1.0, *[0.0] * 10]]}
    monkeypatch.setattr(
        recompute_module,
        "gather_rows",
        lambda rows: gathered.append(rows) or torch.cat([rows, torch.tensor(other[rows.shape[1]])]),
    )
    return loop, groups, gathered


def test_the_gap_counts_trained_tokens_of_all_ranks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, groups, gathered = gap_loop(monkeypatch)
    (batches,) = loop.pack(loop.deal(groups, 1), groups, [[0.0], [0.0]])
    record = recompute(loop.trainer, batches)
    recompute_reference(loop.trainer, batches)
    assert [rows.shape for rows in gathered] == [(6, 2), (1, 14)]
    assert (record["gap_position/0"], record["gap_position/16"]) == (pytest.approx(0.5), 2.5)
    assert record["gap/mean_abs"] == pytest.approx((6 * 0.5 + 2.5) / 7) and record["gap/max"] == 2.5
    assert record["gap/k1"] == pytest.approx(-(6 * 0.5 + 2.5) / 7)  # of KL(engine || trainer): the trainer's are higher
    for b in batches:
        assert torch.equal(b.trainer_logprobs, b.rollout_logprobs + 0.5)
        assert torch.equal(b.reference_logprobs, b.rollout_logprobs + 2)
    loop, groups, gathered = gap_loop(monkeypatch, leader=False)  # its tokens are the leader's: nothing to add
    (batches,) = loop.pack(loop.deal(groups, 1), groups, [[0.0], [0.0]])
    assert recompute(loop.trainer, batches)["gap/mean_abs"] == 2.5 and gathered[0].shape == (0, 2)


def test_saved_log_probabilities_are_written_once_a_sample(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    for leader, rows in ((True, 6), (False, 0)):
        loop, groups, gathered = gap_loop(monkeypatch, leader)
        loop.trainer.rank = 1
        (batches,) = loop.pack(loop.deal(groups, 1), groups, [[0.0], [0.0]])
        recompute(loop.trainer, batches)
        save_logprobs(loop.trainer, tmp_path / "rows", groups, batches)
        assert gathered[-1].shape == (rows, 2)
    assert list(tmp_path.iterdir()) == [], "rank 0 writes"


def test_rows_of_all_ranks_however_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks in threads: the longer one comes second, and what one has less than the other is no row of zeros."""
    slots: dict[tuple[int, int], torch.Tensor] = {}
    barrier, mine, calls = threading.Barrier(2, timeout=60), threading.local(), threading.local()

    def all_gather(out: list[torch.Tensor], tensor: torch.Tensor) -> None:
        calls.n = getattr(calls, "n", 0) + 1
        slots[calls.n, mine.rank] = tensor
        barrier.wait()
        for rank, into in enumerate(out):
            assert into.shape == slots[calls.n, rank].shape, "every rank has to bring as much as the longest"
            into.copy_(slots[calls.n, rank].view_as(into))

    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_backend", lambda: "gloo")
    monkeypatch.setattr(dist, "all_gather", all_gather)

    def rank(number: int) -> torch.Tensor:
        mine.rank = number
        return recompute_module.gather_rows(torch.full((1 + 2 * number, 2), float(number + 1)))

    with ThreadPoolExecutor(2) as pool:
        for rows in pool.map(rank, range(2)):
            assert rows.tolist() == [[1.0, 1.0]] + [[2.0, 2.0]] * 3


def test_a_probe_keeps_every_group_and_is_made_without_replay_too(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, _, _ = gap_loop(monkeypatch, rollout={"n_samples": 1, "prompts_per_step": 2, "routing_replay": True})
    replayed: list[list[bool]] = []

    def count(trainer, batches) -> dict[str, float]:
        replayed.append([b.routing is not None for b in batches])
        return {"gap/k3": float(len(replayed))}

    monkeypatch.setattr(loop_module, "recompute", count)
    assert loop.probe_gap() == {"gap/k3": 1.0, "gap_no_replay/k3": 2.0}
    assert loop.weights.commands == [("rollout", {"step": 0, "cursor": 0, "prompts": 2, "keep_all": True})]
    assert replayed == [[True], [False]]


@pytest.mark.parametrize("recompute_logprobs", ["auto", "always"])
@pytest.mark.parametrize("fp8, bound", [({"backend": "off"}, 0.3), ({"backend": "emulated"}, 0.5)])
def test_a_gap_that_cannot_be_ends_the_run_before_it_trains(
    monkeypatch: pytest.MonkeyPatch, fp8: dict[str, str], bound: float, recompute_logprobs: str
) -> None:
    """0.5 on every token and 2.5 on another rank's: mean 0.79. At record 0 every attempt would meet it, later none may."""
    train = {"recompute_logprobs": recompute_logprobs}
    loop, *_ = gap_loop(monkeypatch, rollout={"n_samples": 1, "drop_no_signal": False}, fp8=fp8, train=train)
    events: list[str] = []

    def train_step(batches, loss, lr, with_entropy, before_update) -> StepResult:
        events.append("forward")
        before_update(loop.trainer.logprobs(batches))
        events.append("update")
        return StepResult(1.0, 1.0, True)

    loop.trainer.train_step = train_step
    with pytest.raises(ImpossibleGap, match=f"step 0: .* 0.786 nats .* --rollout.max-gap {bound}: .*rope") as at_start:
        loop.probe_gap()
    with pytest.raises(ImpossibleGap, match="step 1: ") as later:
        loop.step(1)
    assert (at_start.value.permanent, later.value.permanent) == (True, False)
    assert events == (["forward"] if recompute_logprobs == "auto" else []), "no weight was changed"


@pytest.mark.parametrize(
    "train, separate",
    [({}, 0), ({"recompute_logprobs": "always"}, 1), ({"updates_per_step": 2}, 1), ({"epochs_per_step": 2}, 1)],
)
def test_the_pass_of_its_own_is_left_out_where_the_one_update_gives_the_same(
    monkeypatch: pytest.MonkeyPatch, train: dict[str, Any], separate: int
) -> None:
    loop, *_ = gap_loop(monkeypatch, rollout={"n_samples": 1, "max_gap": 0}, train=train)
    passes: list[bool] = []
    values = loop.trainer.logprobs

    def logprobs(batches, reference=False) -> list[torch.Tensor]:
        passes.append(reference)
        return values(batches, reference)

    def train_step(batches, loss, lr, with_entropy, before_update) -> StepResult:
        assert all((b.trainer_logprobs is None) == (separate == 0) for b in batches)
        assert all(b.reference_logprobs is not None for b in batches) and (before_update is None) == (separate == 1)
        if before_update is not None:
            before_update(values(batches))
        return StepResult(1.0, 1.0, True)

    loop.trainer.logprobs, loop.trainer.train_step = logprobs, train_step
    record = loop.step(1)
    assert passes == [False] * separate + [True] and record["gap/mean_abs"] == pytest.approx(0.786, abs=1e-3)
    assert record["loss"] == 1.0


@pytest.mark.parametrize(
    "sections", [{"rollout": {"max_gap": 0.8}}, {"rollout": {"max_gap": 0}}, {"control": {"freeze_engine": True}}]
)
def test_a_wider_bound_none_and_frozen_engines(monkeypatch: pytest.MonkeyPatch, sections: dict[str, Any]) -> None:
    loop, *_ = gap_loop(monkeypatch, **sections)
    assert loop.probe_gap()["gap/mean_abs"] == pytest.approx(0.786, abs=1e-3)


def test_an_exact_run_ends_at_one_token_that_differs_in_one_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the bound for the mean says, and with frozen engines too: that is one of the faults it is for."""
    exact = {"model": {"exact": True}, "control": {"freeze_engine": True}, "rollout": {"n_samples": 1, "max_gap": 0}}
    engines = torch.tensor([-1.0, -2.0, -0.25])
    for sample, position in ((1, 2), (0, 1), (0, None)):
        loop, *_ = gap_loop(monkeypatch, algorithm={}, **exact)
        monkeypatch.setattr(recompute_module, "gather_rows", lambda rows: rows)

        def logprobs(batches: list, reference: bool = False) -> list[torch.Tensor]:
            out = [b.rollout_logprobs.clone() for b in batches]
            for b, own in zip(batches, out):
                for number, start in zip(b.samples, b.cu_seqlens.tolist()):
                    if position is not None and number >= sample:
                        own[start + 2 + position] = torch.nextafter(engines[position], torch.tensor(0.0))
                own[~b.loss_mask] = 7.0  # of prompts: nobody compares them
            return out

        def train_step(batches, loss, lr, with_entropy, before_update) -> StepResult:
            before_update(logprobs(batches))
            raise AssertionError("a weight would be changed")

        loop.trainer.logprobs, loop.trainer.train_step = logprobs, train_step
        if position is None:
            loop.probe_gap()
            continue
        value = float(torch.nextafter(engines[position], torch.tensor(0.0)))
        says = (
            f"The first is token {position} \\(id {[5, 6, 258][position]}\\) of sample 0 of prompt {sample}: trainer "
        )
        with pytest.raises(
            ImpossibleGap, match=rf"step 0: .* {2 - sample} of them. {says}{value:.9g}, engine "
        ) as start:
            loop.probe_gap()
        assert start.value.permanent
        with pytest.raises(ImpossibleGap, match="step 1: ") as later:
            loop.step(1)
        assert not later.value.permanent


def test_an_exact_run_leaves_nan_on_both_sides_to_the_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, groups, _ = gap_loop(monkeypatch)
    monkeypatch.setattr(recompute_module, "gather_rows", lambda rows: rows)
    (batches,) = loop.pack(loop.deal(groups, 1), groups, [[0.0], [0.0]])
    for b in batches:
        b.rollout_logprobs = torch.full_like(b.rollout_logprobs, NAN)
        b.trainer_logprobs = b.rollout_logprobs.clone()
    check_equal(loop.trainer, batches, groups, 1)
    batches[0].trainer_logprobs[:] = -1.0
    with pytest.raises(ImpossibleGap, match="trainer -1, engine nan"):
        check_equal(loop.trainer, batches, groups, 1)


def test_an_exact_run_ends_at_a_token_that_goes_to_other_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its log-probability may be the engine's. A sequence's last token and padding go anywhere."""
    loop, groups, _ = gap_loop(monkeypatch)
    monkeypatch.setattr(recompute_module, "gather_rows", lambda rows: rows)
    (batches,) = loop.pack(loop.deal(groups, 1), groups, [[0.0], [0.0]])
    for b in batches:
        b.trainer_logprobs = b.rollout_logprobs.clone()
    nowhere = [torch.zeros(len(b.tokens), dtype=torch.int32) for b in batches]
    for b, differing in zip(batches, nowhere):
        differing[b.cu_seqlens[1:].long() - 1] = 1
        differing[b.cu_seqlens[len(b.samples)] :] = 1
    loop.trainer.replay = SimpleNamespace(differing=nowhere)
    check_equal(loop.trainer, batches, groups, 1)
    number, start = batches[-1].samples[-1], int(batches[-1].cu_seqlens[len(batches[-1].samples) - 1])
    nowhere[-1][start + 1], nowhere[-1][start + 2] = 2, 1
    with pytest.raises(ImpossibleGap) as error:
        check_equal(loop.trainer, batches, groups, 1)
    says = f"2 tokens. The first is token 1 of prompt and response of sample 0 of prompt {number}, in model.layers.1. "
    assert "choose other experts" in str(error.value) and says in str(error.value), error.value


def test_a_gap_of_nothing_but_nan_is_the_optimizers_to_skip() -> None:
    check_gap({"gap/mean_abs": float("nan")}, 0.5, 0)
    check_gap({}, 0.5, 0)


# -- the supervised phase ---------------------------------------------------------------------------------------


def warming_up(monkeypatch: pytest.MonkeyPatch, state: RunState, accuracy: float = 0.0, **sft) -> tuple[Loop, list]:
    """A supervised phase on five examples, whose prompts are 1 to 5; what happened in it."""
    examples = [SftExample((i,), (9, 258)) for i in range(1, 6)]
    monkeypatch.setattr(supervised, "load_sft", lambda *_: examples)
    monkeypatch.setattr(supervised, "load_tokenizer", lambda _: None)
    events: list = []

    def train_step(batches, loss, lr) -> StepResult:
        assert loss is sft_loss
        events.append((sorted(b.tokens[s].item() for b in batches for s in b.cu_seqlens[:-1]), round(lr, 6)))
        return StepResult(1.0, 1.0, True, {})

    trainer = rank_of(
        train_step=train_step, new_optimizer=lambda: events.append("optimizer"), snapshot_reference=lambda: events.append("reference")
    )  # fmt: skip
    settings = {"max_steps": 3, "batch_size": 2, "lr": 1.0, "warmup_steps": 1} | sft
    sections = {
        "sft": settings, "data": {"shuffle": False}, "algorithm": {"kl_coef": 0.1}, "checkpoint": {"every": 2},
        "model": {"hf_checkpoint": "tiny"},
    }  # fmt: skip
    loop = loop_with(RunConfig.model_validate(sections), trainer, state=state)
    loop.evaluate = lambda: {"eval/accuracy": accuracy}
    loop.saver.save = lambda state, due=True: events.append(state.name)
    loop.warm_start()
    return loop, events


END = ["reference", "optimizer", "step_000000"]
"""The reference is what was trained, and RL starts with an optimizer of its own, in the checkpoint between the phases."""


def test_the_supervised_phase_takes_every_example_in_order_and_hands_over(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, events = warming_up(monkeypatch, RunState("sft", 0))
    assert events == [([1, 2], 0.5), ([3, 4], 1.0), "sft_000002", ([1, 5], 1.0), *END]
    assert loop.state == RunState("rl", 0, sft_cursor=6, sft_steps=3)


def test_the_supervised_phase_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    _, events = warming_up(monkeypatch, RunState("sft", 2, sft_cursor=4))
    assert events == [([1, 5], 1.0), *END]


def test_the_supervised_phase_ends_at_the_accuracy_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for accuracy, steps in ((0.5, 2), (0.49, 3)):
        loop, _ = warming_up(monkeypatch, RunState("sft", 0), accuracy, stop_accuracy=0.5, eval_every=1, eval_from=2)
        assert loop.state.sft_steps == steps


# -- from step to step ------------------------------------------------------------------------------------------


def test_the_last_step_is_saved_and_evaluated_whatever_the_intervals_are() -> None:
    events: list = []
    recorder = SimpleNamespace(begin=lambda: None, write=lambda state, record: events.append((state.step, record)))
    config = RunConfig.model_validate({"run": {"steps": 5}, "checkpoint": {"every": 3}, "eval": {"every": 2}})
    loop = loop_with(config, recorder=recorder)
    loop.saver.save = lambda state, due=True: events.append(state.name)

    def step(number: int) -> dict[str, float]:
        loop.state = RunState("rl", number)
        return {}

    loop.step, loop.probe_gap, loop.evaluate = step, lambda: {"gap/k3": 1.0}, lambda: {"eval/accuracy": 0.5}
    loop.reinforce()
    accuracy = {"eval/accuracy": 0.5}
    assert events == [
        (0, {"gap/k3": 1.0} | accuracy), (1, {}), (2, accuracy), (3, {}), "step_000003", (4, accuracy),
        (5, accuracy | {"final_gap/k3": 1.0}), "step_000005",
    ]  # fmt: skip  # each record before its checkpoint


def test_a_stop_is_planned_with_the_longest_of_late_steps_and_with_the_save_under_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = iter((0.0, 10.0, 11.0, 12.0))  # steps of 10 s, 1 s, 1 s
    told, left = [], [0.0, 0.0, 0.0, 50.0]
    stop_policy = SimpleNamespace(
        noticed=lambda: False, at_step_boundary=lambda noticed, step_s, save_s: told.append((step_s, save_s)) or ""
    )
    saver = SimpleNamespace(collect=lambda wait: None, left_s=lambda: left[len(told)], failed=False)
    boundary = StepBoundary(dist.HashStore(), True, stop_policy, saver, StepTimes(0.0, 7.0))
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    for _ in range(4):
        boundary.cross()
    # a long step is forgotten slowly; where a save will take longer than a step, the next save waits for that
    assert told == [(0.0, 7.0), (10.0, 7.0), (8.0, 7.0), (50.0, 7.0)] and boundary.times.step_s == 6.4


def test_a_record_has_what_passed_through_the_trainer_in_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now, written = iter((10.0, 14.0, 12.0, 14.0)), []
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    watch, saver = Stopwatch(), saver_of(RunConfig(), None)
    saver.writer = SimpleNamespace(take=lambda wait: Saved(RunState("rl", 2), "", 5.0))
    saver.trainer.rank = 1  # rank 0 writes pace.json
    saver.collect()
    recorder = Recorder(RunConfig(), None, watch, False, None)
    recorder.sinks.append(SimpleNamespace(write=written.append))
    loop = loop_with(RunConfig(), rank_of(memory={"memory/peak": 2.0}), None, RunState("rl", 3), None, recorder, saver)
    for figures in ({"tokens": 100, "rollout/tokens": 9}, {}):
        recorder.begin()
        watch.spent("train", 1.5)
        loop._record(figures)
    first = {
        "tokens": 100,
        "rollout/tokens": 9,
        "time/checkpoint_write": 5.0,
        "throughput/tokens_per_s": 25.0,
        "time/step": 4.0,
    }
    both = {"phase": "rl", "step": 3, "memory/peak": 2.0, "time/train": 1.5}
    assert written == [first | both, {"time/step": 2.0} | both], "a save's time stands in one record"


# -- records, and updates that are compared ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "at"),
    [(RunState("rl", 0, sft_steps=6), ("sft", 6)), (RunState("rl", 4, sft_steps=6), ("rl", 4)), (RunState("sft", 3), ("sft", 3))],
)  # fmt: skip
def test_records_go_on_behind_the_checkpoints(
    monkeypatch: pytest.MonkeyPatch, state: RunState, at: tuple[str, int]
) -> None:
    """The checkpoint between the phases is older than the record of RL step 0, which is made again."""
    opened = []
    monkeypatch.setattr(recorder_module, "MetricsWriter", lambda path, at: opened.append(at))
    run = SimpleNamespace(own_copy=lambda name: name, publish=lambda name: None, path=None)
    config = RunConfig.model_validate({"observe": {"tensorboard": False}})
    for resumed_from in (state, None):
        Recorder(config, run, Stopwatch(), True, resumed_from)
    assert opened == [at, None]
