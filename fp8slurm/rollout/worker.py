"""The rollout worker of a node: owns its engines (engines.py), runs its share of rollouts, holds the weights.

It answers rank 0's commands one after the other (channel.py). Where weights come through the host (gloo) it holds the
last whole update, so that an engine that died is back with the current weights without any rank taking notice; from
GPU to GPU they do not pass through it, and an engine that died waits for the next update, or the ranks send again.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
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
from fp8slurm.rollout.flow import Flow, Positions, Scorer, Slot, ask_again, mask_older
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
        self.flow: Flow | None = None
        """Of the last rollout that was not in rounds; it goes on where weights were lost."""
        self.queue: Flow | None = None
        """Of the steps ahead, where those are several (rollout.max_staleness above 1)."""
        self.taken: tuple[int, dict, list[SampleGroup]] = (-1, {}, [])
        """The last step's that was taken out of it."""
        self.left: list[Slot] = []
        """What a step began and did not take: its tokens are kept (rollout.oversample)."""
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
        self.scorer = Scorer(self.rewarder, lambda: self.channel.progress())

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
            "rollout": self.do_rollout, "ask": self.do_ask, "take": self.do_take,
            "deal": self.do_deal, "keep": self.do_keep, "restore": self.do_restore,
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
        answer = {"seconds": self.engines.update_seconds, **self.engines.update_counts}
        return {**answer, "figures": self.receiver.figures}, None

    def do_rollout(
        self,
        step: int,
        cursor: int,
        prompts: int,
        keep_all: bool = False,
        open: Sequence[int] = (),
        trainer_version: int = -1,
    ) -> tuple[dict, torch.Tensor]:
        """Generate and score this node's share of `prompts` groups from the data at the positions `open`, then from
        `cursor` on. trainer_version: of the weights that train on them.

        Groups without signal are replaced from the prompts that follow, rollout.max_replacements times at most.
        """
        begun = time.monotonic()
        self._begin("rollout", step, cursor, prompts, keep_all, tuple(open))
        if self.config.run.deterministic or self.config.rollout.generate is not None:
            answer, kept = self._in_rounds(cursor, prompts, keep_all, open)
        else:
            answer, kept = self._once(
                "answer", lambda: self._as_they_end(cursor, prompts, keep_all, open, trainer_version)
            )
        return self._finish(step, answer, kept, begun, keep_all)

    def do_ask(self, cursor: int, open: Sequence[int], prompts: int, steps: int) -> tuple[dict, None]:
        """Begin this node's share of `prompts` groups for each of so many further steps, behind those that are under
        way; it does not wait for any. cursor, open: as do_rollout, where nothing is under way yet."""
        if self.queue is None:
            self.queue = self._new_flow(cursor, open)
        self.engines.completions.start(self.queue.extend(self._share(prompts) * steps)).result()
        return _where(self.queue), None

    def do_take(self, step: int, prompts: int) -> tuple[dict, torch.Tensor]:
        """This node's share of a step's groups that `do_ask` began: the first ones, in the order of asking. The others
        go on, over updates too."""
        begun, completions, flow = time.monotonic(), self.engines.completions, self.queue
        assert flow is not None
        if self.taken[0] != step:  # given again where another node lost its weights
            own = self._share(prompts)
            completions.wait(completions.start(flow.first(own)))
            self.taken = step, *self._harvest(flow, flow.slots[:own])
        return self._finish(step, *self.taken[1:], begun)

    def _finish(
        self, step: int, answer: dict, kept: list[SampleGroup], begun: float, keep_all: bool = False
    ) -> tuple[dict, torch.Tensor]:
        """What is done with every step's groups; the answer. begun: of time.monotonic()."""
        if self.teacher is not None and not keep_all:
            with self.channel.at_work():
                self.teacher.fill_in(kept)
        if is_saved(step, self.config.rollout.save_every):
            self._save(step, kept)
        answer |= {"reward_failures": self.rewarder.failures, "seconds": time.monotonic() - begun}
        return answer, self.holder.hold(answer, kept)

    def _in_rounds(
        self, cursor: int, prompts: int, keep_all: bool, open: Sequence[int]
    ) -> tuple[dict, list[SampleGroup]]:
        """All of a round's samples as fixed batches, scored together; what replaces groups is a round of its own."""
        assert self.order is not None
        r = self.config.rollout
        kept: list[SampleGroup] = []
        dropped, tally = 0, Tally()
        missing, rounds = prompts, r.max_replacements + 1
        for round_ in range(rounds):
            again, open = open[:missing], open[missing:]
            fresh = missing - len(again)
            indices = [i for p in again for i in self.order.take(p, 1)[0]] + self.order.take(cursor, fresh)[0]
            positions, cursor = [*again, *range(cursor, cursor + fresh)], cursor + fresh
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
        answer = {"cursor": cursor, "open": list(open), "dropped": dropped}
        return answer | {"figures": tally.sums, "lengths": tally.lengths}, kept

    def _as_they_end(
        self, cursor: int, prompts: int, keep_all: bool, open: Sequence[int], version: int
    ) -> tuple[dict, list[SampleGroup]]:
        """Each sample by itself, scored when it ends (flow.py). With rollout.oversample more groups are begun than a
        step takes; what is not ready when enough are is stopped, and goes on in the next step."""
        r, completions = self.config.rollout, self.engines.completions
        own = self._share(prompts)
        partial = r.oversample > 1 and not keep_all
        again, begin, enough = self._once(
            "flow", lambda: self._begin_flow(cursor, own, keep_all, open, version if partial else None)
        )
        flow = self.flow
        assert flow is not None
        completions.wait(begin)
        completions.wait(enough)
        if partial:
            completions.stop(completions.start(flow.rest()))
        taken = [slot for slot in flow.slots if slot.group is not None][:own]  # in the order of asking
        over = [slot for slot in flow.slots if slot in taken or slot.over and slot.group is None]
        answer, kept = self._harvest(flow, over)
        if partial:
            self.left = list(flow.slots)
            answer |= {"asked_again": again[0], "forgotten": again[1]}
            answer["in_flight"] = sum(part is not None for s in flow.slots for part in s.parts)
            if r.partial == "mask":
                mask_older(kept, version)
        return answer, kept

    def _harvest(self, flow: Flow, over: list[Slot]) -> tuple[dict, list[SampleGroup]]:
        """Take these out of it: what is answered of them, and their groups."""
        tally = Tally()
        for slot in over:
            tally.add(slot.lost + slot.figures)
        flow.remove(over)
        kept, r = [s.group for s in over if s.group is not None], self.config.rollout
        if r.overlong_buffer is not None:
            tally.add(penalize_overlong(kept, r.max_tokens, r.overlong_buffer))
        answer = _where(flow) | {"dropped": sum(s.dropped for s in over)}
        answer |= {"figures": tally.sums, "lengths": tally.lengths}
        answer["idle"] = self.engines.completions.idle_share()
        if flow is self.queue or r.oversample > 1:
            answer["queued"] = sum(s.group is not None for s in flow.slots)
            answer["in_flight"] = sum(sample is None for s in flow.slots for sample in s.samples)
        return answer, kept

    def _share(self, prompts: int) -> int:
        """This node's of so many groups."""
        return prompts // self.workers + (self.number < prompts % self.workers)

    def _new_flow(self, cursor: int, open: Sequence[int], keep_all: bool = False) -> Flow:
        assert self.order is not None
        positions = Positions(self.order, cursor, open, self.number, self.workers)
        r = self.config.rollout
        return Flow(r, self.sampler, self.engines, self.scorer, self.train_prompts, positions, keep_all)

    def _begin_flow(
        self, cursor: int, own: int, keep_all: bool, open: Sequence[int], version: int | None
    ) -> tuple[tuple[int, int], Future[None], Future[None]]:
        """Begin the slots of a step. version: with rollout.oversample, of the weights that train on them."""
        r, completions = self.config.rollout, self.engines.completions
        if self.flow is not None:  # given up: a command for other weights has come
            completions.run(self.flow.cancel())
        flow = self.flow = self._new_flow(cursor, open, keep_all)
        positions = flow.positions
        slots: list[Slot] = []
        again = (0, 0)
        if version is not None:
            left = {slot.position: slot for slot in self.left}
            slots = [left[p] for p in positions.open if p in left]
            positions.open = [p for p in positions.open if p not in left]
            again = ask_again(slots, version - r.max_staleness)
        count = own if version is None else math.ceil(own * r.oversample)
        slots += (flow.new_slot() for _ in range(count - len(slots)))
        completions.idle_share()
        begin = completions.start(flow.begin(sorted(slots, key=lambda s: s.position)))
        return again, begin, completions.start(flow.enough(own if version is not None else len(slots)))

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


def _where(flow: Flow) -> dict[str, Any]:
    """Where a rollout worker is in the data (groups.positions_after)."""
    return {
        "cursor": flow.positions.cursor, "open": sorted([*(s.position for s in flow.slots), *flow.positions.open]),
    }  # fmt: skip


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
