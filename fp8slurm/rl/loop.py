"""The main loop, run by every training rank.

A prompt's way: agent (data, engine, reward) -> samples to every rank -> advantages -> packing -> log-probabilities ->
policy-gradient updates -> weights to the engines, under one new version.
"""

from __future__ import annotations

import logging
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Iterator

import torch
import torch.distributed as dist

from fp8slurm.checkpoint.run import RunDirectory, RunState
from fp8slurm.config import RunConfig
from fp8slurm.config.derived import engines_sleep, engines_start_after_trainer, is_direct, is_mapped
from fp8slurm.eval.in_training import merge
from fp8slurm.models.names import NameTable
from fp8slurm.observe.metrics import MetricsWriter
from fp8slurm.rl import controls
from fp8slurm.rl.advantages import advantages
from fp8slurm.rl.channel import RankChannel
from fp8slurm.rl.data import PromptOrder, SftExample, load_sft, load_tokenizer
from fp8slurm.rl.loss import gap_metrics, make_policy_loss, sft_loss
from fp8slurm.rl.packing import pack, pack_sft
from fp8slurm.rl.pace import Pace
from fp8slurm.rl.precision import engine_quantization
from fp8slurm.rl.saved import is_saved, logprob_rows, trainer_file, write_trainer_logprobs
from fp8slurm.rl.saver import Saver
from fp8slurm.rl.stopping import Abandoned, Never, Stopped, Stopping
from fp8slurm.rl.types import PackedBatch, SampleGroup
from fp8slurm.rl.wire import decode_groups
from fp8slurm.sync.bucket import WeightBucket
from fp8slurm.sync.direct import DirectSender
from fp8slurm.sync.groups import Group
from fp8slurm.sync.mapped import MappedSender
from fp8slurm.sync.plan import source_names
from fp8slurm.sync.receiver import checksum, publish_checksums
from fp8slurm.sync.stream import Cut, WeightStream, parse_description
from fp8slurm.trainer.schedule import learning_rate

log = logging.getLogger(__name__)
VERIFIED_AT_FIRST = 2
"""Updates that sync.verify = "first" compares: SGLang's own load, and the first that is made again as copies (engine/recorded.py)."""


class TooManyBadSteps(RuntimeError):
    """run.max_bad_steps steps in a row had a NaN or infinite loss or gradient."""

    permanent = True
    """Another attempt would only meet it again."""


def run(
    config: RunConfig, run_dir: RunDirectory, trainer: Any, channel: RankChannel, store: dist.Store, address: str,
    beat: Callable[[], None], stopping: Stopping = Never(),
) -> None:  # fmt: skip
    """Train from the newest usable checkpoint to the last step, or to where `stopping` ends it; everything is on disk then."""
    loop = Loop(config, run_dir, trainer, channel, store, address, beat, stopping)
    loop.resume()
    loop.connect()
    try:
        if loop.state.phase == "sft":
            loop.warm_start()
        loop.reinforce()
    except Stopped as reason:
        loop.stop(reason)
        return
    loop.settle()
    if loop.saves and loop.on_disk != loop.state:  # another attempt may find room for it
        raise OSError(f"the run is over, but its last checkpoint, {loop.state.name}, could not be written")
    channel.call("stop")
    loop.close()


class Loop:
    """State and parts of the loop; the order of things is in `run`, `warm_start`, `reinforce` and `step`."""

    within_s = 0.0
    """Seconds of the phases within the one that is being timed."""

    def __init__(
        self, config: RunConfig, run_dir: RunDirectory, trainer: Any, channel: RankChannel, store: dist.Store, address: str,
        beat: Callable[[], None], stopping: Stopping = Never(),
    ) -> None:  # fmt: skip
        self.config, self.run_dir, self.trainer, self.channel, self.store = config, run_dir, trainer, channel, store
        self.address, self.beat, self.stopping = address, beat, stopping
        self.first = trainer.rank == 0
        self.state = RunState("sft" if config.sft.data is not None else "rl", 0)
        self.seconds: dict[str, float] = {}
        self.policy_loss = make_policy_loss(config.algorithm)
        self.sent_version: int | None = None
        self.sleeps = engines_sleep(config) and not config.control.freeze_engine
        self.asleep = False
        self.mapped: MappedSender | None = None
        self.direct: DirectSender | None = None
        self.sends = 0
        self.verified = 0
        self.sinks: list[Any] = []
        self.saved = False
        self.saves = 0
        self.saver = Saver(run_dir, store, trainer.rank, dist.get_world_size(), config.checkpoint)
        self.write_s: float | None = None
        self.on_disk: RunState | None = None
        self.borders = 0
        self.pace = Pace.read(run_dir)
        self.border_at = time.monotonic()

    # -- start ---------------------------------------------------------------------------------------------------

    def resume(self) -> None:
        """Load the newest complete checkpoint, or the Hugging Face weights where there is none; set newer, damaged ones aside."""
        name = ""
        if self.first:
            for folder, damage in self.run_dir.checked_checkpoints():
                if damage is None:
                    name = folder.name
                    break
                log.warning("checkpoint %s is skipped: %s; set aside as %s", folder, damage, self.run_dir.set_aside(folder).name)
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
            if self.config.algorithm.kl_coef and not has_reference and self.state.phase == "rl" and self.state.sft_steps:
                raise ValueError(
                    f"--algorithm.kl-coef {self.config.algorithm.kl_coef:g}: {folder} was saved without a reference model, which "
                    f"would have to be the one that its supervised phase ended with; allowed: 0, or another --run.name"
                )
            if self.state.bad_steps >= self.config.run.max_bad_steps:  # the run ended for it; somebody has changed a setting
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
        if self.mapped is not None:
            self.mapped.close()
        if self.direct is not None:
            self.direct.close()

    # -- stop ----------------------------------------------------------------------------------------------------

    def border(self) -> None:
        """Between two steps, on all ranks: go on together or stop together. Raises Stopped."""
        self.settle(wait=False)
        now = time.monotonic()
        key, self.borders = f"border/{self.borders}", self.borders + 1
        if self.first:
            if self.borders > 1:
                self.pace = replace(self.pace, step_s=max(now - self.border_at, 0.8 * self.pace.step_s))
            noticed = self.stopping.noticed() or self.store.check(["noticed"])
            busy = max(self.pace.step_s, self.saver.left(self.pace.save_s))  # the next save waits for this one
            self.store.set(key, self.stopping.at_border(noticed, busy, self.pace.save_s))
        elif self.stopping.noticed():
            self.store.set("noticed", "")
        self.border_at = now
        self.store.wait([key])
        reason = self.store.get(key).decode()
        if reason:
            raise Stopped(reason)

    def stop(self, reason: Stopped) -> None:
        """Save what is not saved yet, and leave."""
        self.settle()
        if self.first:
            log.warning("stopping after %s step %d: %s", self.state.phase, self.state.step, reason)
            self.store.set("stop/saved", "yes" if self.on_disk == self.state else "no")
        self.store.wait(["stop/saved"])
        if self.store.get("stop/saved") == b"no":
            self.save()
            self.settle()
        if self.first:
            self.stopping.stopped(self.state.name, self.on_disk == self.state)
        if not isinstance(reason, Abandoned):  # else the agents are busy, and are ended with the job
            self.channel.call("stop")
        self.close()

    def connect(self) -> None:
        """Plan the weight updates, tell the agents, and bring the engines to the trainer's weights."""
        c, t = self.config, self.trainer
        self.stream = WeightStream(
            NameTable(t.spec), t.named_shards, engine_quantization(c), c.sync.bucket_bytes, getattr(torch, c.engine.dtype),
            Cut(t.tensor_parallel_rank, t.tensor_parallel_size, t.tensor_parallel_group, t.data_parallel_rank == 0),
            t.pipeline_parallel_rank,
            Cut(*t.expert_tensor_parallel, t.expert_data_parallel_rank == 0),
            t.expert_parallel_rank,
        )  # fmt: skip
        if self.first:
            p = c.parallel
            names = source_names(p.pipeline_parallel_size, p.expert_parallel_size if t.spec.is_moe else 0)
            self.store.set("sync/sources", " ".join(names))
        for name in self.stream.sources:  # all plans before the first group: an agent wants all of them first
            self.store.set(f"sync/plan/{name}", self.stream.describe(name))
            self.store.set(f"sync/root/{name}", str(t.rank))
        size = 1 + self.channel.agents
        self.groups = {n: Group(self.store, f"sync/{n}", 0, size, self.address) for n in self.stream.sources}
        if is_direct(c):
            engine_ranks = c.slurm.nodes * c.engine.per_node * c.engine.tensor_parallel_size
            self.direct = DirectSender(self.store, list(self.stream.sources), engine_ranks, self.address)
        if is_mapped(c):
            names = self.store.get("sync/sources").decode().split()
            roots = {n: int(self.store.get(f"sync/root/{n}")) for n in names}
            plans = {n: parse_description(self.store.get(f"sync/plan/{n}").decode()) for n in names}
            sources = [(n, roots[n], plans[n]) for n in names]
            self.mapped = MappedSender(self.store, sources, self.run_dir.attempt_dir)
        if engines_start_after_trainer(c):
            examples = [SftExample((0,), (0,) * 7)] * t.data_parallel_size
            t.warm_up(pack_sft(examples, **self._packing())[t.data_parallel_rank])
            t.settle_memory()
            self.store.set(f"resident/{t.rank}", "true")
        self.sync()

    # -- phases --------------------------------------------------------------------------------------------------

    def warm_start(self) -> None:
        """Supervised steps until sft.max_steps, or until the held-out accuracy reaches sft.stop_accuracy."""
        c, s = self.config, self.config.sft
        examples = load_sft(c.data, s, load_tokenizer(c.model.hf_checkpoint))
        order = PromptOrder(len(examples), c.run.seed, c.data.shuffle)
        while self.state.step < s.max_steps:
            self.border()
            started, step = self._begin(), self.state.step + 1
            indices, cursor = order.take(self.state.sft_cursor, s.batch_size)
            self.sleep()
            with self.timed("train"):
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
                self.sync()
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
        self.sleep()  # a new optimizer takes memory
        if c.algorithm.kl_coef:  # the reference is the model that RL starts from
            self.trainer.snapshot_reference()
        self.trainer.new_optimizer()
        self.save()

    def reinforce(self) -> None:
        """RL steps up to run.steps. Record 0 is the start, before any update."""
        steps = self.config.run.steps
        if not steps:
            return
        self.sync()
        if self.state.step == 0:
            started = self._begin()
            self._record(self.probe_gap() | self.evaluate(), started)
        while self.state.step < steps:
            self.border()
            started = self._begin()
            record = self.step(self.state.step + 1)
            step = self.state.step
            if step == steps or (self.config.eval.every and step % self.config.eval.every == 0):
                record |= self.evaluate()
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
        with self.timed("rollout"):
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
        self.sleep()
        with self.timed("logprobs"):
            record |= self.recompute([b for update in mine for b in update])
            if is_saved(step, c.rollout.save_every):
                self.save_logprobs(step, groups, [b for update in mine for b in update])
        o = c.optim
        lr = learning_rate(step - 1, c.run.steps, o.lr, o.min_lr, o.warmup_steps, o.schedule)
        with self.timed("train"):
            results = []
            for update in mine * c.train.epochs_per_step:
                results.append(t.train_step(update, self.policy_loss, lr, with_entropy=True))
                self.beat()
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
            self.sync()
        return record

    # -- parts ---------------------------------------------------------------------------------------------------

    def rollout(self, step: int, prompts: int, keep_all: bool = False) -> tuple[list[SampleGroup], dict[str, float]]:
        """Samples of all agents, in the order of the agents, and what they say about them."""
        # Only before a step has changed anything: the weights are then those of the border before it.
        training = step > self.state.step and self.state.phase == "rl"

        def abandon() -> str:
            save_s = self.pace.save_s + self.saver.left(self.pace.save_s)
            return self.stopping.in_rollout(save_s) if training else ""

        asked = {"step": step, "cursor": self.state.cursor, "prompts": prompts, "keep_all": keep_all}
        answers = self._ask("rollout", abandon, **asked)
        groups = [g for _, payload in answers for g in decode_groups(payload)]
        said = [a for a, _ in answers]
        total, count = (sum(a["rewards"][i] for a in said) for i in (0, 1))
        samples = [s for g in groups for s in g.samples]
        stale = {v for s in samples for v in s.weight_versions} - {self.sent_version}
        if stale:
            raise RuntimeError(
                f"tokens were generated under weight versions {sorted(stale)}; the engines were sent {self.sent_version}"
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
        self.sleep()
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
        with self.timed("eval"):
            said = [a for a, _ in self._ask("evaluate", checkpoint=checkpoint)]
            return merge(c, self.run_dir, said, checkpoint, self.state.step, writes=self.first)

    def sync(self) -> None:
        """Send the trainer's weights to every engine, under a version that is the number of steps taken; once a version."""
        version = self.state.version
        while version != self.sent_version:
            if self._send(version):
                self.sent_version = version

    def _send(self, version: int) -> bool:
        """One update; False if an engine lost the weights again meanwhile, and no copy was kept (sync.keep_last_update)."""
        self.sends += 1
        verify = self.config.sync.verify == "always" or self.config.sync.verify == "first" and self.verified < VERIFIED_AT_FIRST
        checksums: dict[str, list[int]] = {name: [] for name in self.groups}

        def start(source: str, bucket: WeightBucket) -> dist.Work:
            payload = bucket.payload.cpu()
            if verify:
                checksums[source].append(checksum(payload))
            return self.groups[source].start_broadcast(payload, 0)

        with self.timed("sync"):
            if self.sleeps:
                self.trainer.make_room()
            if self.direct is not None:
                self._link(self.direct)
            self.channel.post("update", version=version, verify=verify, number=self.sends)
            if self.mapped is not None:
                self.mapped.send(self.sends, version, self.stream, start if verify else None)
            elif self.direct is not None:
                self.direct.send(version, self.stream, start if verify else None)
            else:
                self.stream.send(version, start)
            for source in self.groups if verify else ():
                publish_checksums(self.store, self.sends, source, checksums[source])
            said = [a for a, _ in self.channel.collect()]
        self.asleep = False
        lost = any(a.get("weights_lost") for a in said)
        self.verified += verify and not lost
        for part, seconds in self.stream.seconds.items():
            self._spent(f"sync_{part}", seconds)
        for part in said[0].get("seconds", ()):
            self._spent(f"sync_{part}", max(a["seconds"][part] for a in said if "seconds" in a))
        return not lost

    def _link(self, direct: DirectSender) -> None:
        """Have all engines in the sources' groups; where one is missing (the start, a restart), all make new ones."""
        number = direct.generation.number
        while not all(a["linked"] for a, _ in self.channel.call("linked", generation=number)):
            number += 1
            self.channel.post("link", generation=number)
            direct.link(number)
            self.channel.collect()

    def sleep(self) -> None:
        """Before the trainer works: the engines give their memory back, and with it the weights that they were sent."""
        if self.sleeps and not self.asleep:
            with self.timed("sleep"):
                self.channel.call("sleep")
            self.asleep, self.sent_version = True, None

    def _ask(self, kind: str, abandon: Callable[[], str] = lambda: "", **arguments: Any) -> list[tuple[dict, torch.Tensor]]:
        """A command that needs the engines' weights; where an engine lost them they are sent again, then the command."""
        if self.asleep:
            self.sync()
        while True:
            self.channel.post(kind, **arguments)
            answers = self.channel.collect(abandon)
            if not any(a.get("weights_lost") for a, _ in answers):
                return answers
            self.sent_version = None
            self.sync()

    def _spent(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def save(self) -> None:
        """Begin a checkpoint of the present state; a full disk is reported, and the run goes on with the older one."""
        tag, self.saves = f"save/{self.saves}", self.saves + 1
        with self.timed("checkpoint"):
            self.settle()
            begun = time.monotonic()
            if self.first:
                try:
                    self.store.set(tag, str(self.run_dir.begin_checkpoint(self.state)))
                except OSError as error:
                    log.error("checkpoint %s cannot be begun: %s", self.state.name, error)
                    self.store.set(tag, "")
            self.store.wait([tag])
            folder = self.store.get(tag).decode()
            if folder:
                snapshot = self.trainer.snapshot(folder, copy=self.config.checkpoint.asynchronous)
                self.saver.start(self.state, Path(folder), snapshot, begun)
                if not self.config.checkpoint.asynchronous:
                    self.settle()
        self.saved = True

    def settle(self, wait: bool = True) -> None:
        """Take note of a save that has ended; wait: for the one under way."""
        saved = self.saver.take(wait)
        if saved is None:
            return
        self.write_s = saved.seconds
        if saved.error:
            log.error("checkpoint %s was not written, the one before is kept: %s", saved.state.name, saved.error)
            return
        self.on_disk = saved.state
        if self.first:
            self.pace = replace(self.pace, save_s=saved.seconds)
            try:
                self.pace.write(self.run_dir)
            except OSError as error:
                log.error("%s", error)

    def _packing(self) -> dict[str, int]:
        return {
            "data_parallel_size": self.trainer.data_parallel_size,
            "tokens_per_micro_batch": self.config.train.tokens_per_micro_batch,
            "pad_multiple": self.trainer.pad_multiple,
        }

    def _begin(self) -> float:
        # The save after a step is counted with the step after it, whose record is still open.
        self.seconds = {k: v for k, v in self.seconds.items() if k == "checkpoint"} if self.saved else {}
        self.saved = False
        return time.perf_counter()

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Counts what happens inside to `phase`, but for phases within it: a rollout that has to send the weights first."""
        start, outside, self.within_s = time.perf_counter(), self.within_s, 0.0
        yield
        whole = time.perf_counter() - start
        self._spent(phase, whole - self.within_s)
        self.within_s = outside + whole
        self.beat()

    def _record(self, record: dict[str, float], started: float) -> None:
        times = {f"time/{k}": v for k, v in self.seconds.items()}
        if self.write_s is not None:
            times["time/checkpoint_write"], self.write_s = self.write_s, None
        whole = time.perf_counter() - started
        line = {"phase": self.state.phase, "step": self.state.step, **record, **self.trainer.memory, **times, "time/step": whole}
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
            self.settle()
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
