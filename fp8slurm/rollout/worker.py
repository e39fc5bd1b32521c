"""The rollout worker of a node: owns its engines (engines.py), runs its share of rollouts, holds the weights.

It answers rank 0's commands one after the other (channel.py). Where weights come through the host (gloo) it holds the
last whole update, so that an engine that died is back with the current weights without any rank taking notice; from
GPU to GPU they do not pass through it, and an engine that died waits for the next update, or the ranks send again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fp8slurm.config import RunConfig
from fp8slurm.config.derived import engines_start_after_trainer, reward_workers
from fp8slurm.core.types import Prompt, Sample, SampleGroup
from fp8slurm.data.endless import Joined
from fp8slurm.data.sources import order_of, training_sources
from fp8slurm.engine.pool import WeightsLost
from fp8slurm.models.precision import engine_in_fp8
from fp8slurm.models.spec import ModelSpec
from fp8slurm.rewards.graders import label_error
from fp8slurm.rewards.pools import RewardPools
from fp8slurm.rollout.channel import Part, WorkerChannel
from fp8slurm.rollout.dealing import Holder
from fp8slurm.rollout.engines import EngineSet
from fp8slurm.rollout.evaluation import TrainingEval
from fp8slurm.rollout.files import is_saved, rollout_file, trainer_file, write_rollout
from fp8slurm.rollout.groups import apply_truncation_policy, has_signal, penalize_overlong
from fp8slurm.rollout.sampler import Sampler, model_of
from fp8slurm.rollout.tally import Figure, Tally, figures_of
from fp8slurm.rollout.teacher import Teacher
from fp8slurm.run.directory import RunDirectory
from fp8slurm.run.phases import CHECKPOINT, READY, STARTING, enter_phase
from fp8slurm.sessions.runner import Asked, SessionRunner, through
from fp8slurm.sync import paths
from fp8slurm.sync.check import check_engine_checkpoint
from fp8slurm.sync.groups import Group
from fp8slurm.sync.signed_store import SignedStore
from fp8slurm.sync.stream import parse_description

log = logging.getLogger(__name__)


class RolloutWorker:
    """One node's rollout worker."""

    def __init__(
        self, config: RunConfig, run: RunDirectory, number: int, workers: int, monitor: Any,
        gpus: Sequence[tuple[int, ...]] = ((),),
    ) -> None:  # fmt: skip
        """gpus: of each of the node's engines, as indices into the node's GPUs; empty on the CPU."""
        self.config, self.run, self.number, self.workers, self.monitor = config, run, number, workers, monitor
        self.gpus = gpus
        self.holder = Holder(number, workers)
        self.teacher: Teacher | None = None
        self.command: tuple[Any, ...] = ()
        self.computed: dict[Hashable, Any] = {}
        """Parts of the answer to the last command. Where a node lost its weights they are sent again and the command is
        given again, to all nodes: the others have done their part."""
        self._started: list[Callable[[], None]] = []
        """What ends everything that `start` started."""
        monitor.on_exit = self.stop

    # -- life ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the engines, where they need not come after the trainer, without waiting for them; read the data."""
        c, folder = self.config, self.run.attempt_dir
        self.model_dir = engine_checkpoint(c, self.run, self.number)
        calls = (lambda: self.channel.at_work(), lambda: self.channel.progress())  # there is no channel yet
        self.engines = EngineSet(c, self.model_dir, folder, self.number, self.gpus, *calls)
        self._started.append(self.engines.stop)
        if c.teacher.checkpoint is not None and c.run.steps:
            self.teacher = Teacher(c, folder, self.number, self.gpus)
            self._started.append(self.teacher.stop)
            self.teacher.start()
            if any(self.gpus):  # the engines count what memory it leaves
                self.teacher.wait_ready()
        if not engines_start_after_trainer(c):
            enter_phase(STARTING)
            self.engines.start()
        self.sampler = Sampler.load(c)
        sources = training_sources(c.data, c.reward.kind) if c.run.steps else []
        loaded = [source.load(self.sampler.tokenizer, label_error) for source in sources]
        self.train_prompts = Joined(loaded)
        if c.rollout.generate is not None:
            model = model_of(c, self.sampler.tokenizer, self.sampler.stop_ids)
            self.sessions = SessionRunner(c.rollout, model, lambda: self.channel.progress())
            self._started.append(self.sessions.close)
            self.sampler.converse = self._converse
        self.evaluation = TrainingEval(c, self.run, self.sampler, self.number, self.workers)
        self._started.append(self.evaluation.close)
        self.order = order_of(loaded, sources, c.run.seed, c.data.shuffle) if sources else None
        self.rewarder = RewardPools(c.reward, {s.name: s.reward for s in sources}, reward_workers(c))
        self._started.append(self.rewarder.close)

    def stop(self) -> None:
        """End the engines and everything that was started."""
        for end in self._started:
            end()

    def serve(self, channel: WorkerChannel, store: SignedStore, address: str) -> None:
        """Answer commands until "stop"."""
        self.store, self.channel = store, channel
        channel.engines_busy = lambda: [member.take_spans() for member in self.engines.members]
        names = store.get("sync/sources").decode().split()
        plans = {name: parse_description(store.get(f"sync/plan/{name}").decode()) for name in names}
        check_engine_checkpoint(self.model_dir, [s for plan in plans.values() for specs in plan for s in specs])
        groups = {n: Group(store, f"sync/{n}", 1 + self.number, 1 + self.workers, address) for n in names}
        sources = [(name, groups[name], plans[name]) for name in names]
        self.receiver = paths.receiver(self.config, self.number, store, sources)
        self._bring_up()
        commands: dict[str, Callable[..., tuple]] = {
            "rollout": self.do_rollout, "deal": self.do_deal, "keep": self.do_keep, "restore": self.do_restore,
            "score": self.do_score, "evaluate": self.do_evaluate, "update": self.do_update,
            "prepare": self.do_prepare, "sleep": self.do_sleep, "stop": lambda: ({}, None),
        }  # fmt: skip
        while True:
            command = channel.next()
            kind = command.pop("kind")
            log.debug("command %s %s", kind, command)
            try:
                answer = commands[kind](**command)
            except WeightsLost:
                answer = {"weights_lost": True}, None
            channel.answer(*answer)
            self.monitor.heartbeat()
            if kind == "stop":
                return

    def _bring_up(self) -> None:
        """Have all engines answer, those that come after the trainer's ranks of this node too."""
        with self.channel.at_work():  # the engines have a deadline of their own
            if engines_start_after_trainer(self.config):
                for rank in self._ranks():
                    self.channel.get(f"resident/{rank}")
                enter_phase(STARTING)
                self.engines.start()
            self.engines.connect(lambda: self.receiver.held)
            if self.teacher is not None and not any(self.gpus):
                self.teacher.wait_ready()
        enter_phase(READY)

    def _ranks(self) -> range:
        """The training ranks of this node."""
        per_node = self.config.slurm.ranks_per_node
        return range(self.number * per_node, (self.number + 1) * per_node)

    # -- commands ------------------------------------------------------------------------------------------------

    def do_sleep(self) -> tuple[dict, None]:
        """The engines give their GPU memory back, until the next update."""
        self.engines.sleep()
        return {}, None

    def do_prepare(self, **asked: Any) -> tuple[dict, None]:
        """Answer what the weights' path asks before an update (sync/paths.py)."""
        with self.channel.at_work():  # engines that join something or restart have a deadline of their own
            return self.receiver.prepare(self.engines, asked), None

    def do_update(self, version: int, verify: bool, number: int) -> tuple[dict, None]:
        """Take update `number` from every source, for all engines of the node; answers the seconds by part."""
        self.engines.wake()
        self.engines.update(version, self.receiver.receive(version, number, verify), verify)
        return {"seconds": self.engines.update_seconds, **self.engines.update_counts}, None

    def do_rollout(self, step: int, cursor: int, prompts: int, keep_all: bool = False) -> tuple[dict, torch.Tensor]:
        """Generate and score this node's share of `prompts` groups from the data at `cursor`.

        Groups without signal are replaced from the prompts that follow, rollout.max_replacements times at most.
        """
        assert self.order is not None
        r, begun = self.config.rollout, time.monotonic()
        self._begin("rollout", step, cursor, prompts, keep_all)
        kept: list[SampleGroup] = []
        dropped, tally = 0, Tally()
        missing, rounds = prompts, r.max_replacements + 1
        for round_ in range(rounds):
            positions = range(cursor, cursor + missing)
            indices, cursor = self.order.take(cursor, missing)
            share = [(p, self.train_prompts[i]) for p, i in list(zip(positions, indices))[self.number :: self.workers]]
            try:
                groups, figures = self._once(tuple(p for p, _ in share), lambda: self._sample_and_score(share))
            except WeightsLost:
                for left in range(round_, rounds):  # the other rollout workers wait for these
                    self.channel.tell(f"kept/{self.channel.count}/{left}/{self.number}", "0")
                raise
            tally.add(figures)
            apply_truncation_policy(groups, r.truncated)
            good = groups if keep_all or not r.drop_no_signal else [g for g in groups if has_signal(g)]
            if r.overlong_buffer is not None:
                tally.add(penalize_overlong(good, r.max_tokens, r.overlong_buffer))
            dropped += len(groups) - len(good)
            kept += good
            self.channel.tell(f"kept/{self.channel.count}/{round_}/{self.number}", str(len(good)))
            missing -= sum(self.channel.get(f"kept/{self.channel.count}/{round_}/{w}") for w in range(self.workers))
            if missing <= 0:
                break
        if self.teacher is not None and not keep_all:
            with self.channel.at_work():
                self.teacher.fill_in(kept)
        if is_saved(step, r.save_every):
            self._save(step, kept)
        answer = {
            "cursor": cursor,
            "dropped": dropped,
            "figures": tally.sums,
            "lengths": tally.lengths,
            "reward_failures": self.rewarder.failures,
        }
        answer["seconds"] = time.monotonic() - begun
        return answer, self.holder.hold(answer, kept)

    def do_deal(
        self, wanted: list[list[int]], first: list[int], to: list[list[int]], texts: bool
    ) -> tuple[dict, None, list[Part]]:
        """Send samples of the last rollout to the ranks that train on them (dealing.py)."""
        with self.channel.at_work():
            return {}, None, self.holder.parts(wanted, first[self.number], to, texts)

    def do_keep(self, folder: str, version: int) -> tuple[dict, None]:
        """Write the last rollout, of weights `version`, into a checkpoint; a full disk is answered as "error"."""
        with self.channel.at_work():
            try:
                self.holder.write(Path(folder), version)
            except OSError as error:
                return {"error": str(error)}, None
        return {}, None

    def do_restore(self, folder: str) -> tuple[dict, torch.Tensor | None]:
        """Hold what a checkpoint has, and answer it as it was answered: with "version", where it has something."""
        with self.channel.at_work():
            payload = self.holder.read(Path(folder))
        return ({} if payload is None else self.holder.answer), payload

    def do_score(self, sequences: list[list[list[int]]]) -> tuple[dict, torch.Tensor]:
        """This node's share of the log-probabilities of responses under the present weights, at temperature 1.

        sequences: [prompt, response] token ids. Answers them as float32 [tokens of all its responses], seen as bytes.
        """
        share = sequences[self.number :: self.workers]
        with self.channel.at_work():
            scores = self.engines.score([prompt + response for prompt, response in share])
        parts = [scores[i][len(prompt) - 1 :] for i, (prompt, _) in enumerate(share)]
        return {}, torch.tensor([x for part in parts for x in part], dtype=torch.float32).view(torch.uint8)

    def do_evaluate(self, checkpoint: str | None = None) -> tuple[dict, None]:
        """This node's share of the held-out prompts and, with the weights' name, of eval.tasks (evaluation.py)."""
        self._begin("evaluate", checkpoint)
        generate = self.engines.generate_batches
        return self._once("answer", lambda: self.evaluation.evaluate(generate, checkpoint, self.channel.progress)), None

    # -- parts ---------------------------------------------------------------------------------------------------

    def _begin(self, *command: Any) -> None:
        """Forget what was computed, unless the same command is given again for the same weights."""
        command = (*command, self.engines.version)
        if command != self.command:
            self.command, self.computed = command, {}

    def _once(self, part: Hashable, compute: Callable[[], Any]) -> Any:
        """What `compute` returns, or has returned for this part of the command's answer."""
        if part not in self.computed:
            self.computed[part] = compute()
        return self.computed[part]

    def _sample_and_score(self, share: list[tuple[int, Prompt]]) -> tuple[list[SampleGroup], list[Figure]]:
        """The groups of (position, prompt), and the figures of all their samples as they were scored."""
        r = self.config.rollout
        groups = self.sampler.sample(
            self.engines.generate, share, r.n_samples, r.max_tokens, r.temperature, routing=r.routing_replay
        )
        self.rewarder.score(groups, self.channel.progress)
        return groups, figures_of(groups)

    def _converse(self, asked: list[Asked]) -> list[list[Sample]]:
        """The conversations of rollout.generate, with this node's engines."""
        if self.config.run.deterministic:
            return self.sessions.converse(asked, batch=self.engines.generate)
        completions = self.engines.completions
        return self.sessions.converse(asked, through(completions), check=completions.check)

    def _save(self, step: int, groups: list[SampleGroup]) -> None:
        trainer_file(self.run.path, step).unlink(missing_ok=True)  # an earlier attempt's belongs to other samples
        prompts = [self.sampler.tokenizer.decode(list(g.prompt.token_ids)) for g in groups]
        write_rollout(rollout_file(self.run.path, step, self.number, self.workers), groups, prompts)


def engine_checkpoint(config: RunConfig, run: RunDirectory, number: int) -> Path:
    """The folder that the engine loads: given, hf_checkpoint as it is, or made of it in FP8 (on node 0)."""
    if config.model.rollout_checkpoint is not None:
        return config.model.rollout_checkpoint
    assert config.model.hf_checkpoint is not None
    if not engine_in_fp8(config):
        return config.model.hf_checkpoint
    from fp8slurm.checkpoint import hf_to_fp8

    source, target = config.model.hf_checkpoint, run.path / "engine_model"
    if not same_model(source, target):
        enter_phase(CHECKPOINT)
    if number == 0 and not same_model(source, target):
        hf_to_fp8(source, target, overwrite=True)  # of a start with another model, before the first checkpoint
    while not same_model(source, target):
        time.sleep(0.2)
    return target


def same_model(source: Path, target: Path) -> bool:
    """Whether `target` has the settings of `source`, in any precision. Weights come with updates."""

    def settings(folder: Path) -> tuple[ModelSpec, bytes]:
        generation = folder / "generation_config.json"
        spec = replace(ModelSpec.from_hf_dir(folder), quantization=None)
        return spec, generation.read_bytes() if generation.is_file() else b""

    ours = settings(source)
    try:
        return settings(target) == ours
    except (OSError, ValueError):  # not there, or being replaced
        return False
