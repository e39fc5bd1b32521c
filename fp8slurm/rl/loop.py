"""The main loop, run by every training rank.

A prompt's way: rollout worker (data, engine, reward) -> samples to every rank -> advantages -> packing -> log-probabilities ->
policy-gradient updates -> weights to the engines, under one new version.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fp8slurm.config import RunConfig
from fp8slurm.config.derived import engines_start_after_trainer
from fp8slurm.core.gap import gap_metrics
from fp8slurm.core.stopping import NeverStop, StepAbandoned, StopPolicy, StopRequested
from fp8slurm.core.types import PackedBatch, SampleGroup
from fp8slurm.data.prompts import PromptOrder, SftExample, load_sft, load_tokenizer
from fp8slurm.observe.metrics import MetricsWriter
from fp8slurm.rl import controls
from fp8slurm.rl.advantages import advantages
from fp8slurm.rl.loss import make_policy_loss, sft_loss
from fp8slurm.rl.packing import pack, pack_sft
from fp8slurm.rl.schedule import learning_rate
from fp8slurm.rl.stopwatch import Stopwatch
from fp8slurm.rl.weights import EngineWeights
from fp8slurm.rollout.channel import RankChannel
from fp8slurm.rollout.evaluation import merge
from fp8slurm.rollout.files import is_saved, logprob_rows, trainer_file, write_trainer_logprobs
from fp8slurm.rollout.serialization import decode_groups
from fp8slurm.run.checkpoint_writer import CheckpointWriter
from fp8slurm.run.directory import RunDirectory, RunState
from fp8slurm.run.step_times import StepTimes

log = logging.getLogger(__name__)
MAX_FAILED_SAVES = 3
"""Checkpoints in a row that may fail to be written. A run that goes on for longer works for nothing."""


class TooManyBadSteps(RuntimeError):
    """run.max_bad_steps steps in a row had a NaN or infinite loss or gradient."""

    permanent = True
    """Another attempt would only meet it again."""


def run(
    config: RunConfig, run_dir: RunDirectory, trainer: Any, channel: RankChannel, store: dist.Store, address: str,
    heartbeat: Callable[[], None], stop_policy: StopPolicy = NeverStop(),
) -> None:  # fmt: skip
    """Train from the newest usable checkpoint to the last step, or to where `stopping` ends it; everything is on disk then."""
    loop = Loop(config, run_dir, trainer, channel, store, address, heartbeat, stop_policy)
    loop.resume()
    loop.connect()
    try:
        if loop.state.phase == "sft":
            loop.warm_start()
        loop.reinforce()
    except StopRequested as reason:
        loop.stop(reason)
        return
    loop.collect_finished_save()
    if loop.saves and loop.on_disk != loop.state:  # another attempt may find room for it
        raise OSError(
            f"the run is over, but its last checkpoint, {loop.state.name}, could not be written: {loop.save_error}"
        )
    channel.call("stop")
    loop.close()


class Loop:
    """State and parts of the loop; the order of things is in `run`, `warm_start`, `reinforce` and `step`."""

    def __init__(
        self, config: RunConfig, run_dir: RunDirectory, trainer: Any, channel: RankChannel, store: dist.Store, address: str,
        heartbeat: Callable[[], None], stop_policy: StopPolicy = NeverStop(),
    ) -> None:  # fmt: skip
        self.config, self.run_dir, self.trainer, self.channel, self.store = config, run_dir, trainer, channel, store
        self.address, self.heartbeat, self.stop_policy = address, heartbeat, stop_policy
        self.first = trainer.rank == 0
        self.state = RunState("sft" if config.sft.data is not None else "rl", 0)
        self.policy_loss = make_policy_loss(config.algorithm)
        self.watch = Stopwatch(heartbeat)
        self.weights = EngineWeights(config, trainer, channel, store, address, run_dir.attempt_dir, self.watch)
        self.sinks: list[Any] = []
        self.saved = False
        self.saves = self.failed_saves = 0
        self.save_error = ""
        self.writer = CheckpointWriter(run_dir, store, trainer.rank, dist.get_world_size(), config.checkpoint)
        self.write_s: float | None = None
        self.on_disk: RunState | None = None
        self.boundaries = 0
        self.step_times = StepTimes.read(run_dir)
        self.boundary_at = time.monotonic()

    # -- start ---------------------------------------------------------------------------------------------------

    def resume(self) -> None:
        """Load the newest complete checkpoint, or the Hugging Face weights where there is none; set newer, damaged ones aside."""
        name = ""
        if self.first:
            for folder, damage in self.run_dir.checked_checkpoints():
                if damage is None:
                    name = folder.name
                    break
                log.warning(
                    "checkpoint %s is skipped: %s; set aside as %s", folder, damage, self.run_dir.set_aside(folder).name
                )
            self.store.set("resume", name)
        self.store.wait(["resume"])
        name = self.store.get("resume").decode()
        self.trainer.load_hf(self.config.model.hf_checkpoint)
        if self.config.algorithm.kl_coef:
            self.trainer.snapshot_reference()
        if name:
            folder = self.run_dir.checkpoints / name
            has_reference = self.trainer.load(folder)
            self.state = self.on_disk = RunState.read(folder)
            if self.config.control.freeze_engine and self.state.phase == "rl" and self.state.step:
                raise ValueError(
                    f"--control.freeze-engine: {folder} has other weights than those that the engines kept; such a run cannot go on; "
                    f"allowed: another --run.name"
                )
            if (
                self.config.algorithm.kl_coef
                and not has_reference
                and self.state.phase == "rl"
                and self.state.sft_steps
            ):
                raise ValueError(
                    f"--algorithm.kl-coef {self.config.algorithm.kl_coef:g}: {folder} was saved without a reference model, which "
                    f"would have to be the one that its supervised phase ended with; allowed: 0, or another --run.name"
                )
            if (
                self.state.bad_steps >= self.config.run.max_bad_steps
            ):  # the run ended for it; somebody has changed a setting
                self.state = replace(self.state, bad_steps=0)
            log.info("continuing from %s", folder)
        if self.first:
            self._open_metrics(resumed=bool(name))

    def _open_metrics(self, resumed: bool) -> None:
        """Go on behind the last record that the checkpoint covers: no step is missing, none is there twice."""
        # The checkpoint between the phases is older than the record of RL step 0.
        at = (
            ("sft", self.state.sft_steps)
            if (self.state.phase, self.state.step) == ("rl", 0)
            else (self.state.phase, self.state.step)
        )
        at = at if resumed else None
        self.sinks = [MetricsWriter(self.run_dir.own_copy("metrics.jsonl"), at)]
        self.run_dir.publish("metrics.jsonl")
        if self.config.observe.tensorboard:
            from fp8slurm.observe.tensorboard import TensorBoard

            self.sinks.append(TensorBoard(self.run_dir.path / "tb", at))
        if self.config.observe.wandb:
            from fp8slurm.observe.weights_and_biases import WeightsAndBiases

            c, settings = self.config, self.config.model_dump(mode="json")
            self.sinks.append(WeightsAndBiases(self.run_dir.path, c.run.name, c.observe.wandb_project, settings))

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()
        self.weights.close()

    # -- stop ----------------------------------------------------------------------------------------------------

    def step_boundary(self) -> None:
        """Between two steps, on all ranks: go on together or stop together. Raises StopRequested."""
        self.collect_finished_save(wait=False)
        now = time.monotonic()
        key, self.boundaries = f"boundary/{self.boundaries}", self.boundaries + 1
        if self.first:
            if self.boundaries > 1:
                self.step_times = replace(
                    self.step_times, step_s=max(now - self.boundary_at, 0.8 * self.step_times.step_s)
                )
            noticed = self.stop_policy.noticed() or self.store.check(["noticed"])
            busy = max(
                self.step_times.step_s, self.writer.left(self.step_times.save_s)
            )  # the next save waits for this one
            self.store.set(key, self.stop_policy.at_step_boundary(noticed, busy, self.step_times.save_s))
        elif self.stop_policy.noticed():
            self.store.set("noticed", "")
        self.boundary_at = now
        self.store.wait([key])
        reason = self.store.get(key).decode()
        if reason:
            raise StopRequested(reason)

    def stop(self, reason: StopRequested) -> None:
        """Save what is not saved yet, and leave."""
        self.collect_finished_save()
        if self.first:
            log.warning("stopping after %s step %d: %s", self.state.phase, self.state.step, reason)
            self.store.set("stop/saved", "yes" if self.on_disk == self.state else "no")
        self.store.wait(["stop/saved"])
        if self.store.get("stop/saved") == b"no":
            self.save()
            self.collect_finished_save()
        if self.first:
            self.stop_policy.stopped(self.state.name, self.on_disk == self.state)
        if not isinstance(reason, StepAbandoned):  # else the rollout workers are busy, and are ended with the job
            self.channel.call("stop")
        self.close()

    def connect(self) -> None:
        """Plan the weight updates, let the engines start where they come after the trainer, and bring them to its weights."""
        t = self.trainer
        self.weights.connect()
        if engines_start_after_trainer(self.config):
            examples = [SftExample((0,), (0,) * 7)] * t.data_parallel_size
            t.warm_up(pack_sft(examples, **self._packing())[t.data_parallel_rank])
            t.settle_memory(room=self.weights.sleeps)
            self.store.set(f"resident/{t.rank}", "true")
        self.weights.sync(self.state.version)

    # -- phases --------------------------------------------------------------------------------------------------

    def warm_start(self) -> None:
        """Supervised steps until sft.max_steps, or until the held-out accuracy reaches sft.stop_accuracy."""
        c, s = self.config, self.config.sft
        examples = load_sft(c.data, s, load_tokenizer(c.model.hf_checkpoint))
        order = PromptOrder(len(examples), c.run.seed, c.data.shuffle)
        while self.state.step < s.max_steps:
            self.step_boundary()
            started, step = self._begin(), self.state.step + 1
            indices, cursor = order.take(self.state.sft_cursor, s.batch_size)
            self.weights.sleep()
            with self.watch.timed("train"):
                batch = pack_sft([examples[i] for i in indices], **self._packing())
                lr = learning_rate(step - 1, s.max_steps, s.lr, warmup_steps=s.warmup_steps)
                result = self.trainer.train_step(batch[self.trainer.data_parallel_rank], sft_loss, lr)
            self.state = replace(self.state, step=step, sft_cursor=cursor)
            self._count_bad(result.ok)
            record = {
                "skipped": float(not result.ok),
                "lr": lr,
                "loss": result.loss,
                "grad_norm": result.grad_norm,
                **result.metrics,
            }
            done = step == s.max_steps
            if s.eval_every and (done or (step >= s.eval_from and step % s.eval_every == 0)):
                self.weights.sync(self.state.version)
                record |= self.evaluate()
                done = done or record["eval/accuracy"] >= s.stop_accuracy
            self._record(record, started)
            self._stop_if_bad()
            if done:
                break
            if step % c.checkpoint.every == 0:
                self.save()
        log.info("supervised phase: %d steps", self.state.step)
        self.state = replace(self.state, phase="rl", step=0, sft_steps=self.state.step)
        self.weights.sleep()  # a new optimizer takes memory
        if c.algorithm.kl_coef:  # the reference is the model that RL starts from
            self.trainer.snapshot_reference()
        self.trainer.new_optimizer()
        self.save()

    def reinforce(self) -> None:
        """RL steps up to run.steps. Record 0 is the start, before any update."""
        steps = self.config.run.steps
        if not steps:
            return
        self.weights.sync(self.state.version)
        if self.state.step == 0:
            started = self._begin()
            self._record(self.probe_gap() | self.evaluate(), started)
        while self.state.step < steps:
            self.step_boundary()
            started = self._begin()
            record = self.step(self.state.step + 1)
            step = self.state.step
            try:
                if step == steps or (self.config.eval.every and step % self.config.eval.every == 0):
                    record |= self.evaluate()
            except StepAbandoned:  # the step is whole, and is saved; its record must not be missing then
                log.warning("RL step %d is recorded without its evaluation", step)
                self._record(record, started)
                raise
            if step == steps:
                record |= {f"final_{key}": value for key, value in self.probe_gap().items()}
            # The record first: a checkpoint without its record would leave a hole after a crash between the two.
            self._record(record, started)
            self._stop_if_bad()
            if step == steps or step % self.config.checkpoint.every == 0:
                self.save()

    def step(self, step: int) -> dict[str, float]:
        """One RL step; returns its metrics."""
        c = self.config
        with self.watch.timed("rollout"):
            groups, record = self.rollout(step, c.rollout.prompts_per_step)
        self.state = replace(self.state, step=step, cursor=int(record.pop("cursor")))
        if not groups:
            log.warning("step %d: no group with signal; no update", step)
            return record | {"skipped": 1.0}
        if c.control.shuffle_rewards:
            controls.shuffle_rewards(groups, f"{c.run.seed}/{step}")
        values = advantages(groups, c.algorithm)
        if c.control.negate_advantage:
            values = controls.negate(values)
        t = self.trainer
        updates = self.pack(groups, values, c.train.updates_per_step)
        if not updates:
            log.warning("step %d: no sample to train on; no update", step)
            return record | {"skipped": 1.0}
        mine = [ranks[t.data_parallel_rank] for ranks in updates]
        self.weights.sleep()
        with self.watch.timed("logprobs"):
            record |= self.recompute([b for update in mine for b in update])
            if is_saved(step, c.rollout.save_every):
                self.save_logprobs(step, groups, [b for update in mine for b in update])
        o = c.optim
        lr = learning_rate(step - 1, c.run.steps, o.lr, o.min_lr, o.warmup_steps, o.schedule)
        with self.watch.timed("train"):
            results = []
            for update in mine * c.train.epochs_per_step:
                results.append(t.train_step(update, self.policy_loss, lr, with_entropy=True))
                self.heartbeat()
        ok = [r for r in results if r.ok]
        shown = ok or results  # if none was made: what they would have been, so that the record has no invented zeros
        for key in results[0].metrics:
            record[key] = sum(r.metrics[key] for r in shown) / len(shown)
        record |= {
            "lr": lr,
            "loss": sum(r.loss for r in shown) / len(shown),
            "grad_norm": sum(r.grad_norm for r in shown) / len(shown),
            "skipped": float(len(ok) < len(results)),
        }
        self._count_bad(bool(ok))
        if not c.control.freeze_engine:
            self.weights.sync(self.state.version)
        return record

    # -- parts ---------------------------------------------------------------------------------------------------

    def rollout(self, step: int, prompts: int, keep_all: bool = False) -> tuple[list[SampleGroup], dict[str, float]]:
        """Samples of all rollout workers, in the order of the rollout workers, and what they say about them."""
        # Only before a step has changed anything: the weights are then those of the boundary before it.
        training = step > self.state.step and self.state.phase == "rl"
        asked = {"step": step, "cursor": self.state.cursor, "prompts": prompts, "keep_all": keep_all}
        answers = self.weights.ask("rollout", self.state.version, self._too_late if training else None, **asked)
        groups = [g for _, payload in answers for g in decode_groups(payload)]
        said = [a for a, _ in answers]
        total, count = (sum(a["rewards"][i] for a in said) for i in (0, 1))
        samples = [s for g in groups for s in g.samples]
        stale = {v for s in samples for v in s.weight_versions} - {self.weights.sent_version}
        if stale:
            raise RuntimeError(
                f"tokens were generated under weight versions {sorted(stale)}; the engines were sent {self.weights.sent_version}"
            )
        record = {
            "cursor": said[0]["cursor"],
            "reward/mean": total / max(1, count),
            "reward/failures": sum(a["reward_failures"] for a in said),
            "rollout/groups": len(groups),
            "rollout/dropped": sum(a["dropped"] for a in said),
            "rollout/tokens": sum(a["generated"] for a in said),
            "rollout/response_length": sum(len(s.response_ids) for s in samples) / max(1, len(samples)),
            "rollout/truncated": sum(s.finish_reason == "length" for s in samples) / max(1, len(samples)),
            "tokens": sum((len(g.prompt.token_ids) + len(s.response_ids)) for g in groups for s in g.samples),
        }
        return groups, record

    def pack(self, groups: list[SampleGroup], values: list[list[float]], updates: int) -> list[list[list[PackedBatch]]]:
        """[update][data-parallel rank][micro-batch], for the policy that the engine sampled from."""
        packed = pack(groups, values, updates=updates, loss_mean=self.config.algorithm.loss_mean, **self._packing())
        for batch in (b for ranks in packed for batches in ranks for b in batches):
            batch.temperature = self.config.rollout.temperature
            assert (batch.routing is not None) == self.config.rollout.routing_replay
        return packed

    def recompute(self, batches: list[PackedBatch]) -> dict[str, float]:
        """Fill in the trainer's (and the reference's) log-probabilities; returns the trainer-engine gap over all ranks."""
        for batch, logprobs in zip(batches, self.trainer.logprobs(batches)):
            batch.trainer_logprobs = logprobs.cpu()
        if self.config.algorithm.kl_coef:
            for batch, logprobs in zip(batches, self.trainer.logprobs(batches, reference=True)):
                batch.reference_logprobs = logprobs.cpu()
        pairs = [
            torch.stack([b.trainer_logprobs[b.loss_mask], b.rollout_logprobs[b.loss_mask]], 1) for b in batches
        ]  # [N, 2]
        mine = torch.cat(pairs) if self.trainer.is_data_parallel_leader else pairs[0][:0]
        every = gather_rows(mine.float())
        return gap_metrics(every[:, 0], every[:, 1])

    def save_logprobs(self, step: int, groups: list[SampleGroup], batches: list[PackedBatch]) -> None:
        """The trainer's log-probabilities of a saved rollout, next to it."""
        mine = logprob_rows(batches)
        every = gather_rows(mine if self.trainer.is_data_parallel_leader else mine[:0])
        if self.first:
            write_trainer_logprobs(trainer_file(self.run_dir.path, step), groups, every)

    def probe_gap(self) -> dict[str, float]:
        """The gap of the present weights, on a rollout that nothing is trained on and that moves no cursor."""
        groups, _ = self.rollout(0, self.config.rollout.prompts_per_step, keep_all=True)
        updates = self.pack(groups, [[0.0] * len(g.samples) for g in groups], 1)
        if not updates:
            return {}
        batches = updates[0][self.trainer.data_parallel_rank]
        self.weights.sleep()
        record = self.recompute(batches)
        if self.config.rollout.routing_replay:
            for batch in batches:
                batch.routing = None
            record |= {key.replace("gap/", "gap_no_replay/"): value for key, value in self.recompute(batches).items()}
        return record

    def evaluate(self) -> dict[str, float]:
        """Held-out accuracy and, in the RL phase, the figures of eval.tasks; the sampling state of the run is not touched."""
        c, checkpoint = self.config, self.state.name if self.state.phase == "rl" else None
        if c.data.eval is None and not c.eval.tasks:
            return {}
        # The last step's figures would never be made up for, and a supervised phase ends by them.
        given_up = self.state.phase == "rl" and self.state.step < c.run.steps
        with self.watch.timed("eval"):
            said = [
                a
                for a, _ in self.weights.ask(
                    "evaluate", self.state.version, self._too_late if given_up else None, checkpoint=checkpoint
                )
            ]
            return merge(c, self.run_dir, said, checkpoint, self.state.step, writes=self.first)

    def _too_late(self) -> str:
        """Why what the engines generate is not waited for any longer, or ""."""
        return self.stop_policy.in_rollout(self.step_times.save_s + self.writer.left(self.step_times.save_s))

    def save(self) -> None:
        """Begin a checkpoint of the present state; a full disk is reported, and the run goes on with the older one, but not for
        ever (MAX_FAILED_SAVES)."""
        tag, self.saves = f"save/{self.saves}", self.saves + 1
        with self.watch.timed("checkpoint"):
            self.collect_finished_save()
            begun = time.monotonic()
            if self.first:
                try:
                    said = {"folder": str(self.run_dir.begin_checkpoint(self.state))}
                except OSError as error:
                    said = {"error": str(error)}
                self.store.set(tag, json.dumps(said))
            self.store.wait([tag])
            said = json.loads(self.store.get(tag))
            if "error" in said:
                self._save_failed(self.state, said["error"])
            else:
                snapshot = self.trainer.snapshot(said["folder"], copy=self.config.checkpoint.asynchronous)
                self.writer.start(self.state, Path(said["folder"]), snapshot, begun)
                if not self.config.checkpoint.asynchronous:
                    self.collect_finished_save()
        self.saved = True

    def collect_finished_save(self, wait: bool = True) -> None:
        """Take note of a save that has ended; wait: for the one under way."""
        saved = self.writer.take(wait)
        if saved is None:
            return
        self.write_s = saved.seconds
        if saved.error:
            self._save_failed(saved.state, saved.error)
            return
        self.on_disk, self.failed_saves = saved.state, 0
        if self.first:
            self.step_times = replace(self.step_times, save_s=saved.seconds)
            try:
                self.step_times.write(self.run_dir)
            except OSError as error:
                log.error("%s", error)

    def _save_failed(self, state: RunState, error: str) -> None:
        """On all ranks. Raises OSError after too many in a row: another attempt may find room."""
        free = shutil.disk_usage(self.run_dir.path).free
        self.failed_saves, self.save_error = (
            self.failed_saves + 1,
            f"{error} ({free / 1e9:.2f} GB are free in {self.run_dir.path})",
        )
        log.error("checkpoint %s was not written, the one before is kept: %s", state.name, self.save_error)
        if self.failed_saves >= MAX_FAILED_SAVES:
            kept = self.on_disk.name if self.on_disk is not None else "none"
            raise OSError(
                f"{self.failed_saves} checkpoints in a row could not be written; the newest is {kept}: {self.save_error}"
            )

    def _packing(self) -> dict[str, int]:
        return {
            "data_parallel_size": self.trainer.data_parallel_size,
            "tokens_per_micro_batch": self.config.train.tokens_per_micro_batch,
            "pad_multiple": self.trainer.pad_multiple,
        }

    def _begin(self) -> float:
        # The save after a step is counted with the step after it, whose record is still open.
        self.watch.clear(keep=("checkpoint",) if self.saved else ())
        self.saved = False
        return time.perf_counter()

    def _record(self, record: dict[str, float], started: float) -> None:
        times = {f"time/{k}": v for k, v in self.watch.seconds.items()}
        if self.write_s is not None:
            times["time/checkpoint_write"], self.write_s = self.write_s, None
        whole = time.perf_counter() - started
        line = {
            "phase": self.state.phase,
            "step": self.state.step,
            **record,
            **self.trainer.memory,
            **times,
            "time/step": whole,
        }
        if self.failed_saves:
            line["checkpoint/failed"] = float(self.failed_saves)
        if "tokens" in record:
            line["throughput/tokens_per_s"] = record["tokens"] / whole
        if self.first:
            self.run_dir.publish("metrics.jsonl")  # an attempt that has been replaced ends here
        for sink in self.sinks:
            sink.write(line)

    def _count_bad(self, ok: bool) -> None:
        self.state = replace(self.state, bad_steps=0 if ok else self.state.bad_steps + 1)

    def _stop_if_bad(self) -> None:
        if self.state.bad_steps >= self.config.run.max_bad_steps:
            self.save()
            self.collect_finished_save()
            raise TooManyBadSteps(
                f"{self.state.bad_steps} steps in a row had a NaN or infinite loss or gradient (run.max_bad_steps); the last good "
                f"weights are in {self.run_dir.checkpoints / self.state.name}"
            )


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """float32 [N_r, C] of every rank -> [sum N_r, C], in the order of the ranks, on all of them (in host memory)."""
    world = dist.get_world_size()
    if dist.get_backend() == "nccl":
        rows = rows.cuda()
    sizes = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor([rows.shape[0]], device=rows.device))
    longest = max(int(s) for s in sizes)
    padded = torch.zeros(longest, rows.shape[1], device=rows.device)
    padded[: rows.shape[0]] = rows
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded)
    return torch.cat([p[: int(n)] for p, n in zip(parts, sizes)]).cpu()
