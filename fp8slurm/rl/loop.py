"""The main loop, run by every training rank.

    load -> rollout -> advantages -> pack -> log-probabilities -> train -> sync -> record -> save

With rollout.max_staleness = 1 sync comes right behind rollout, and engines begin the next step's (ahead.py).

The order of things is here, and each part is a file: saving.py (load, save), advantages.py, packing.py, recompute.py
(log-probabilities), loss.py (train), weights.py (rollout, sync), recorder.py; boundary.py (stops), supervised.py.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fp8slurm.config import RunConfig
from fp8slurm.config.derived import engines_start_after_trainer, recomputes_logprobs
from fp8slurm.core.stopping import NeverStop, StepAbandoned, StopPolicy, StopRequested
from fp8slurm.core.types import NOT_GENERATED, PackedBatch, SampleGroup, runs
from fp8slurm.core.user_code import is_user_function
from fp8slurm.data.prompts import SftExample
from fp8slurm.models.precision import gap_bound
from fp8slurm.rl import controls
from fp8slurm.rl.advantages import advantages_of
from fp8slurm.rl.ahead import OpenPrompts, RolloutAhead, gap_of_scored, scored_numbers
from fp8slurm.rl.boundary import StepBoundary
from fp8slurm.rl.exchange import SampleExchange
from fp8slurm.rl.lag import token_lags
from fp8slurm.rl.loss import make_policy_loss
from fp8slurm.rl.packing import Deal, deal, fill, pack_sft, packing_of
from fp8slurm.rl.recompute import (
    check_equal,
    check_gap,
    compare,
    from_first,
    meet,
    recompute,
    recompute_reference,
    save_logprobs,
)
from fp8slurm.rl.recorder import Recorder
from fp8slurm.rl.saving import Saver, first_state, load_newest
from fp8slurm.rl.schedule import learning_rate
from fp8slurm.rl.stopwatch import Stopwatch
from fp8slurm.rl.supervised import SupervisedPhase
from fp8slurm.rl.weights import Answers, EngineWeights
from fp8slurm.rollout import evaluation
from fp8slurm.rollout.channel import RankChannel
from fp8slurm.rollout.files import is_saved, trainer_file
from fp8slurm.rollout.groups import merge, merge_scores, positions_after
from fp8slurm.run.directory import RunDirectory, RunState
from fp8slurm.run.events import NO_UPDATE, record_event
from fp8slurm.run.phases import FIRST_UPDATE, READY, START, TRAINING, enter_phase
from fp8slurm.run.step_times import StepTimes

log = logging.getLogger(__name__)


class TooManyBadSteps(RuntimeError):
    """run.max_bad_steps steps in a row had a NaN or infinite loss or gradient."""

    permanent = True
    """Another attempt would only meet it again."""


def run(
    config: RunConfig, run_dir: RunDirectory, trainer: Any, channel: RankChannel, store: dist.Store, address: str,
    heartbeat: Callable[[], None], stop_policy: StopPolicy = NeverStop(),
) -> None:  # fmt: skip
    """Train from the newest usable checkpoint to the last step, or to where `stop_policy` says, and save."""
    watch, times, first = Stopwatch(heartbeat), StepTimes.read(run_dir), trainer.rank == 0
    on_disk = load_newest(config, run_dir, trainer, store)
    weights = EngineWeights(config, trainer, channel, store, address, run_dir.attempt_dir, watch)
    recorder = Recorder(config, run_dir, watch, first, on_disk, channel.answered)
    ahead, open_prompts, ranks = RolloutAhead(weights), OpenPrompts(), dist.get_world_size()

    def first_beside(folder: Path) -> None:
        open_prompts.write(folder)
        if trainer.kv_scales is not None:
            trainer.kv_scales.write(folder)

    saver = Saver(config, run_dir, trainer, store, ranks, watch, times, on_disk, ahead.write, first_beside)
    boundary = StepBoundary(store, first, stop_policy, saver, times, run_dir.attempt_dir, meet, channel.forget)
    state = first_state(config, on_disk)
    loop = Loop(config, run_dir, trainer, weights, recorder, saver, boundary, watch, state, ahead, open_prompts)
    enter_phase(READY)
    weights.connect()
    if engines_start_after_trainer(config):
        _take_memory(config, trainer, weights.sleeps)
        store.set(f"resident/{trainer.rank}", "true")
    enter_phase(FIRST_UPDATE)
    weights.sync(loop.state.version)
    if state.phase == "rl" and 0 < state.step < config.run.steps:
        if loop.one_ahead:
            ahead.read(run_dir.checkpoints / state.name)
        open_prompts.read(run_dir.checkpoints / state.name)
    workers_are_free = True
    try:
        if loop.state.phase == "sft":
            enter_phase(TRAINING)
            loop.warm_start()
        loop.reinforce()
        saver.check_saved(loop.state)
    except StopRequested as reason:
        if config.run.deterministic and not isinstance(reason, StepAbandoned):
            reason = loop.finish_rollout() or reason
        boundary.stop(loop.state, reason)
        # Workers that are busy are ended with the job.
        workers_are_free = not isinstance(reason, StepAbandoned) and not ahead.under_way
    if workers_are_free:
        channel.call("stop")
    recorder.close()
    weights.close()


class Loop:
    """The phases of a run, and what one RL step is. All ranks make the same calls in the same order."""

    def __init__(
        self, config: RunConfig, run_dir: RunDirectory, trainer: Any, weights: EngineWeights, recorder: Recorder,
        saver: Saver, boundary: StepBoundary, watch: Stopwatch, state: RunState, ahead: RolloutAhead | None = None,
        open_prompts: OpenPrompts | None = None,
    ) -> None:  # fmt: skip
        self.config, self.run_dir, self.trainer, self.weights = config, run_dir, trainer, weights
        self.recorder, self.saver, self.boundary, self.watch = recorder, saver, boundary, watch
        self.state, self.ahead = state, ahead or RolloutAhead(weights)
        self.scores = config.rollout.temperature == 1 and not config.rollout.routing_replay
        """Whether engines can score for the policy that sampled: they do at temperature 1, and choose experts anew."""
        self.exchange = SampleExchange(weights, trainer)
        self.open_prompts = open_prompts or OpenPrompts()
        r = config.rollout
        self.one_ahead = r.max_staleness == 1 and r.oversample == 1
        self.steps_ahead = r.max_staleness if r.max_staleness > 1 and r.oversample == 1 else 0
        """Steps whose groups are asked before the trainer comes to them, and go on over updates."""
        self.asked = 0
        """The last step whose groups were asked so."""
        self.policy_loss = make_policy_loss(config.algorithm, config.teacher.kl_coef)
        self.advantages = advantages_of(config.algorithm)
        self.recomputes = recomputes_logprobs(config)
        self.gap_bound = math.inf if config.control.freeze_engine else gap_bound(config)

    # -- phases --------------------------------------------------------------------------------------------------

    def warm_start(self) -> None:
        """The supervised phase. RL begins with its weights and an optimizer of its own."""
        phase = SupervisedPhase(self.config, self.trainer)
        over = self.state.step >= self.config.sft.max_steps
        while not over:
            if self.boundary.cross():
                self._save(due=False)
            self.recorder.begin()
            self.weights.sleep()
            with self.boundary.trace(self.trainer.rank, f"sft_{self.state.step + 1:06d}"), self.watch.timed("train"):
                self.state, record = phase.step(self.state)
            record |= self.weights.advance_scales()
            if phase.is_evaluated(self.state.step):
                self.weights.sync(self.state.version)
                record |= self.evaluate()
            over = phase.is_over(self.state.step, record)
            self._end_step(record, save=not over and self.state.step % self.config.checkpoint.every == 0)
        log.info("supervised phase: %d steps", self.state.step)
        self.state = replace(self.state, phase="rl", step=0, sft_steps=self.state.step)
        self.weights.sleep()  # a new optimizer takes memory
        if self.config.algorithm.kl_coef:  # the reference is the model that RL starts from
            self.trainer.snapshot_reference()
        self.trainer.new_optimizer()
        self.saver.save(self.state)

    def reinforce(self) -> None:
        """RL steps up to run.steps. Record 0 is the start, before any update."""
        c, steps = self.config, self.config.run.steps
        if not steps:
            return
        self.weights.sync(self.state.version)
        if self.state.step == 0:
            enter_phase(START)
            self.recorder.begin()
            record = self.probe_gap()
            self.weights.calibrate(self.state.version)
            self._record(record | self.evaluate())
        enter_phase(TRAINING)
        while self.state.step < steps:
            if self.boundary.cross():
                self._save(due=False)
            self.recorder.begin()
            step = self.state.step + 1
            with self.boundary.trace(self.trainer.rank, f"step_{step:06d}"):
                record = self.step(step)
            try:
                if step == steps or (c.eval.every and step % c.eval.every == 0):
                    record |= self.evaluate()
            except StepAbandoned:  # the step is whole, and is saved; its record must not be missing then
                log.warning("RL step %d is recorded without its evaluation", step)
                self._record(record)
                raise
            if step == steps:
                record |= {f"final_{key}": value for key, value in self.probe_gap().items()}
            self._end_step(record, save=step == steps or step % c.checkpoint.every == 0)

    def step(self, step: int) -> dict[str, float]:
        """One RL step; returns its metrics."""
        c, version = self.config, self.state.version
        with self.watch.timed("rollout"):
            groups, record = self.rollout(step)
        self.state = replace(self.state, step=step)
        trained = (s for g in groups for s in g.samples if s.train)
        versions = {v for s in trained for v, _ in runs(s.weight_versions)} - {NOT_GENERATED}
        stale = bool(c.rollout.max_staleness and versions) and version not in versions
        rescored = scored_numbers(groups) if stale and self.scores else []
        deals = self.deal(groups, c.train.updates_per_step)
        with self.watch.timed("deal"):
            record |= self.fetch(groups, deals, rescored)
        scored = self.score(groups, rescored, version) if rescored else {}
        if self.steps_ahead:
            self._ask_ahead(step)
        if self.one_ahead and step < c.run.steps:
            self.ahead.begin(version, **self._request(step + 1), keep_all=False)
        if c.control.shuffle_rewards:
            controls.shuffle_rewards(groups, f"{c.run.seed}/{step}")
        values = self.advantages_of_all(groups)
        if c.control.negate_advantage:
            values = controls.negate(values)
        updates = self.pack(deals, groups, values)
        if not updates:
            reason = "no sample to train on" if groups else "no group with signal"
            log.warning("step %d: %s; no update", step, reason)
            record_event(NO_UPDATE, f"step {step}: {reason}; no update")
            return record | {"skipped": 1.0}
        self.weights.sleep()
        batches = [batch for update in updates for batch in update]

        def measure(logprobs: list[torch.Tensor]) -> None:
            """The gap of the trainer's log-probabilities, before a weight changes for what was sampled."""
            nonlocal record
            lags = token_lags(batches, groups, version) if self.config.rollout.max_staleness else None
            record |= compare(self.trainer, batches, logprobs, lags)
            record |= gap_of_scored(self.trainer, scored, batches)
            self.check(record, batches, groups, step)
            if is_saved(step, c.rollout.save_every):
                save_logprobs(self.trainer, trainer_file(self.run_dir.path, step), groups, batches)

        if self.recomputes or c.algorithm.kl_coef:
            with self.watch.timed("logprobs"):
                if self.recomputes:
                    measure(self.trainer.logprobs(batches))
                if c.algorithm.kl_coef:
                    recompute_reference(self.trainer, batches)
        with self.watch.timed("train"):
            figures = self.train(updates * c.train.epochs_per_step, step, None if self.recomputes else measure)
        record |= figures | self.weights.advance_scales()
        if not c.control.freeze_engine and not self.ahead.under_way:
            self.weights.sync(self.state.version)
        return record

    # -- parts of a step -----------------------------------------------------------------------------------------

    def rollout(self, step: int, keep_all: bool = False) -> tuple[list[SampleGroup], dict[str, float]]:
        """The groups of all rollout workers, in their order, and metrics; keep_all: groups without signal too."""
        # Only before a step has changed anything: the weights are then those of the boundary before it.
        abandon = self.boundary.too_late if step > self.state.step and self.state.phase == "rl" else None
        begun = self.ahead.take(self.state.version, abandon) if step else None
        if begun is not None:
            self._move_on(begun.answers)
            return merge(begun.answers, begun.version)
        r, version = self.config.rollout, self.state.version
        if self.steps_ahead and step:
            if self.asked < step:
                self._ask_ahead(step)
            answers = self.weights.ask("take", version, abandon, step=step, prompts=r.prompts_per_step)
            self._move_on(answers)
            return merge(answers, self.weights.sent_version, r.max_staleness)
        if self.one_ahead:
            self.weights.sync(version)
        answers = self.weights.ask("rollout", version, abandon, **self._request(step), keep_all=keep_all)
        if step:
            self._move_on(answers)
        return merge(answers, self.weights.sent_version, 0 if r.oversample == 1 or keep_all else r.max_staleness)

    def _ask_ahead(self, step: int) -> None:
        """Have engines begin the groups of the steps up to `steps_ahead` behind this one, under the present weights:
        the last of them is trained on by weights that are as many versions newer."""
        first, last = max(self.asked, step - 1), min(step + self.steps_ahead, self.config.run.steps)
        if last > first:
            self.weights.sync(self.state.version)
            where: dict[str, Any] = {"cursor": self.state.cursor, "open": self.open_prompts.positions}
            prompts = self.config.rollout.prompts_per_step
            self._move_on(self.weights.ask("ask", self.state.version, **where, prompts=prompts, steps=last - first))
            self.asked = last

    def _request(self, step: int) -> dict[str, Any]:
        """The "rollout" command of a step (rollout/worker.py)."""
        request = {"step": step, "cursor": self.state.cursor, "prompts": self.config.rollout.prompts_per_step}
        if self.config.rollout.oversample > 1:
            request["trainer_version"] = self.state.version
        return request | ({"open": self.open_prompts.positions} if step and self.open_prompts.positions else {})

    def _move_on(self, answers: Answers) -> None:
        """What these answers took of the data is taken."""
        cursor, self.open_prompts.positions = positions_after(answers)
        self.state = replace(self.state, cursor=cursor)

    def finish_rollout(self) -> StepAbandoned | None:
        """Wait for the next step's rollout, and keep it; why it was given up, where that would take too long."""
        try:
            with self.watch.timed("rollout"):
                self.ahead.finish(self.state.version, self.boundary.too_late)
        except StepAbandoned as reason:
            log.warning("the next step's rollout is given up: %s", reason)
            return reason
        return None

    def deal(self, groups: list[SampleGroup], updates: int) -> list[Deal]:
        """Who trains on what: the same on all ranks."""
        how: dict[str, Any] = {"loss_mean": self.config.algorithm.loss_mean, "constant": self.config.rollout.max_tokens}
        return deal(groups, updates=updates, **how, **packing_of(self.config, self.trainer))

    def fetch(self, groups: list[SampleGroup], deals: list[Deal], also: list[int]) -> dict[str, float]:
        """This rank's samples; on rank 0 `also` these, and all of them where a user's advantage wants to see them."""
        everything = is_user_function(self.config.algorithm.advantage)
        if everything:
            also = list(range(sum(len(g.samples) for g in groups)))
        return self.exchange.fetch(groups, deals, also, texts=everything)

    def advantages_of_all(self, groups: list[SampleGroup]) -> list[list[float]]:
        """An advantage for every sample, on all ranks; a user's function is called on rank 0, which has all samples."""
        if not is_user_function(self.config.algorithm.advantage) or dist.get_world_size() == 1:
            return self.advantages(groups)
        sizes = [len(g.samples) for g in groups]
        flat = torch.zeros(sum(sizes), dtype=torch.float64)
        if self.trainer.rank == 0:
            flat = torch.tensor([a for values in self.advantages(groups) for a in values], dtype=torch.float64)
        return [part.tolist() for part in from_first(flat).split(sizes)]

    def score(self, groups: list[SampleGroup], numbers: list[int], version: int) -> dict[int, torch.Tensor]:
        """The engines' log-probabilities, under `version`, of samples that older weights generated: number of the
        sample -> float32 [tokens of its response]. Rank 0 has these samples."""
        samples = [(g.prompt, s) for g in groups for s in g.samples]
        chosen = [samples[n] for n in numbers]
        sequences = []
        if self.trainer.rank == 0:
            sequences = [[list(s.prompt_of(prompt)), list(s.response_ids)] for prompt, s in chosen]
        self.weights.sync(version)
        with self.watch.timed("score"):
            answers = self.weights.ask("score", version, sequences=sequences)
        scores = merge_scores([payload for _, payload in answers], [len(s.response_ids) for _, s in chosen])
        return dict(zip(numbers, scores, strict=True))

    def pack(self, deals: list[Deal], groups: list[SampleGroup], values: list[list[float]]) -> list[list[PackedBatch]]:
        """This data-parallel rank's [update][micro-batch], for the policy that the engines sampled from."""
        c, t = self.config, self.trainer
        own = [fill(each, t.data_parallel_rank, groups, values, t.pad_multiple) for each in deals]
        for batch in (batch for batches in own for batch in batches):
            batch.temperature = c.rollout.temperature
            assert (batch.routing is not None) == c.rollout.routing_replay
        return own

    def check(self, record: dict[str, float], batches: list[PackedBatch], groups: list[SampleGroup], step: int) -> None:
        """Refuse to train on what another policy than the trainer's sampled. ImpossibleGap."""
        if self.config.model.exact:
            check_equal(self.trainer, batches, groups, step)
        check_gap(record, self.gap_bound, step)

    def train(
        self, updates: list[list[PackedBatch]], step: int, measure: Callable[[list[torch.Tensor]], None] | None = None
    ) -> dict[str, float]:
        """One optimizer step for each update; metrics are means of those that were made. measure: called before each
        with the log-probabilities of its forward."""
        run, o = self.config.run, self.config.optim
        lr = learning_rate(step - 1, run.steps, o.lr, o.min_lr, o.warmup_steps, o.schedule)
        results = []
        for update in updates:
            how: dict[str, Any] = {"with_entropy": True, "before_update": measure}
            results.append(self.trainer.train_step(update, self.policy_loss, lr, **how))
            self.watch.heartbeat()
        made = [r for r in results if r.ok]
        shown = made or results  # if none was made: what they would have been, so that the record has no invented zeros
        figures = [{**r.metrics, "loss": r.loss, "grad_norm": r.grad_norm} for r in shown]
        self.state = replace(self.state, bad_steps=0 if made else self.state.bad_steps + 1)
        means = {key: sum(f[key] for f in figures) / len(figures) for key in figures[0]}
        return means | {"lr": lr, "skipped": float(len(made) < len(results))}

    def probe_gap(self) -> dict[str, float]:
        """The gap of the present weights, on a rollout that nothing is trained on and that moves no cursor."""
        groups, _ = self.rollout(0, keep_all=True)
        deals = self.deal(groups, 1)
        self.exchange.fetch(groups, deals)
        updates = self.pack(deals, groups, [[0.0] * len(g.samples) for g in groups])
        if not updates:
            return {}
        (batches,) = updates
        self.weights.sleep()
        record = recompute(self.trainer, batches)
        self.check(record, batches, groups, self.state.step)
        if self.config.rollout.routing_replay:
            for batch in batches:
                batch.routing = None
            without = recompute(self.trainer, batches)
            record |= {key.replace("gap/", "gap_no_replay/"): value for key, value in without.items()}
        return record

    def evaluate(self) -> dict[str, float]:
        """Held-out accuracy and, in the RL phase, the figures of eval.tasks; no random state or cursor moves."""
        c, state = self.config, self.state
        checkpoint = state.name if state.phase == "rl" else None
        if c.data.eval is None and not c.eval.tasks:
            return {}
        # The last step's figures would never be made up for, and a supervised phase ends by them.
        abandon = self.boundary.too_late if state.phase == "rl" and state.step < c.run.steps else None
        if self.ahead.under_way:
            with self.watch.timed("rollout"):
                self.ahead.finish(state.version, abandon)
        if self.one_ahead:
            self.weights.sync(state.version)
        with self.watch.timed("eval"):
            answers = [a for a, _ in self.weights.ask("evaluate", state.version, abandon, checkpoint=checkpoint)]
            return evaluation.merge(c, self.run_dir, answers, checkpoint, state.step, writes=self.trainer.rank == 0)

    def _record(self, record: dict[str, float]) -> None:
        others = self.weights.take_figures() | self.trainer.memory | self.saver.figures()
        self.recorder.write(self.state, {**record, **others})

    def _end_step(self, record: dict[str, float], save: bool) -> None:
        # The record first: a checkpoint without its record would leave a hole after a crash between the two.
        self._record(record)
        if self.state.bad_steps >= self.config.run.max_bad_steps:
            self.saver.save(self.state)
            self.saver.collect()
            raise TooManyBadSteps(
                f"{self.state.bad_steps} steps in a row had a NaN or infinite loss or gradient (run.max_bad_steps); "
                f"the last good weights are in {self.run_dir.checkpoints / self.state.name}"
            )
        if save:
            self._save()

    def _save(self, due: bool = True) -> None:
        late = self.finish_rollout()
        self.saver.save(self.state, due)
        if late is not None:
            raise late


def _take_memory(config: RunConfig, trainer: Any, engines_sleep: bool) -> None:
    """Have the trainer take the memory that it keeps, before engines on the same GPUs count what is free."""
    examples = [SftExample((0,), (0,) * 7)] * trainer.data_parallel_size
    trainer.warm_up(pack_sft(examples, **packing_of(config, trainer))[trainer.data_parallel_rank])
    trainer.settle_memory(room=engines_sleep)
