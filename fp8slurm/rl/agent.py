"""The agent of a node: owns its engines, runs its share of the rollouts and rewards, keeps the newest weights.

It answers rank 0's commands one after the other (rl/channel.py). It holds the last whole update in host memory, so that
an engine that died is back with the current weights without any rank taking notice.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Iterable

import torch
import torch.distributed as dist

from fp8slurm.checkpoint.run import RunDirectory, write_atomic
from fp8slurm.config import RunConfig
from fp8slurm.engine.client import EngineClient, GenerateRequest, Generation
from fp8slurm.engine.server import Engine, EngineError
from fp8slurm.eval.in_training import TrainingEval
from fp8slurm.rl.advantages import has_signal, settle_truncated
from fp8slurm.rl.channel import AgentChannel
from fp8slurm.rl.data import PromptOrder
from fp8slurm.rl.precision import engine_in_fp8
from fp8slurm.rl.rewards import RewardPool
from fp8slurm.rl.rollout import Sampler
from fp8slurm.rl.saved import is_saved, rollout_file, trainer_file, write_rollout
from fp8slurm.rl.types import SampleGroup
from fp8slurm.rl.wire import encode_groups
from fp8slurm.sync.bucket import WeightBucket
from fp8slurm.sync.check import check_engine_checkpoint
from fp8slurm.sync.groups import Group
from fp8slurm.sync.receiver import Receiver
from fp8slurm.sync.stream import parse_description

log = logging.getLogger(__name__)


class Agent:
    """One node's agent."""

    def __init__(self, config: RunConfig, run: RunDirectory, number: int, agents: int, monitor: Any) -> None:
        self.config, self.run, self.number, self.agents, self.monitor = config, run, number, agents, monitor
        self.model_dir: Path | None = None
        self.engine: Engine | None = None
        self.version = -1
        self.restarts = 0
        monitor.on_exit = self.stop

    # -- life ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the engine (without waiting for it) and read the data."""
        c = self.config
        self.model_dir = engine_checkpoint(c, self.run, self.number)
        self.engine = Engine(self.model_dir, self.run.attempt_dir / "logs", engine_settings(c), f"engine_{self.number}")
        self.engine.start()
        self.sampler = Sampler.load(c)
        self.train_prompts = self.sampler.prompts(c.data.train) if c.run.steps and c.data.train else []
        self.evaluation = TrainingEval(c, self.run, self.sampler, self.number, self.agents)
        self.order = PromptOrder(len(self.train_prompts), c.run.seed, c.data.shuffle) if self.train_prompts else None
        self.rewarder = RewardPool(c.reward)

    def stop(self) -> None:
        """End the engine and everything that it started."""
        if self.engine is not None:
            self.engine.stop()
        if hasattr(self, "rewarder"):
            self.rewarder.close()
        if hasattr(self, "evaluation"):
            self.evaluation.close()

    def serve(self, channel: AgentChannel, store: dist.Store, address: str) -> None:
        """Answer commands until "stop"."""
        assert self.engine is not None
        self.store, self.channel = store, channel
        names = store.get("sync/sources").decode().split()
        plans = {name: parse_description(store.get(f"sync/plan/{name}").decode()) for name in names}
        assert self.model_dir is not None
        check_engine_checkpoint(self.model_dir, [s for plan in plans.values() for specs in plan for s in specs])
        groups = {n: Group(store, f"sync/{n}", 1 + self.number, 1 + self.agents, address) for n in names}
        self.receiver = Receiver(store, [(n, groups[n], plans[n]) for n in names], self.config.sync.keep_last_update)
        self.engine.wait_ready()
        self._connect()
        while True:
            command = channel.next()
            kind = command.pop("kind")
            log.debug("command %s %s", kind, command)
            try:
                values, payload = getattr(self, f"do_{kind}")(**command)
            except WeightsLost:
                values, payload = {"weights_lost": True}, None
            channel.answer(values, payload)
            self.monitor.beat()
            if kind == "stop":
                return

    def _connect(self) -> None:
        from fp8slurm.sync.engine_link import EngineLink

        assert self.engine is not None
        self.client = EngineClient(self.engine.url, self.engine.api_key, self.config.engine.request_timeout_s)
        e, mode = self.config.engine, self.config.sync.pause_mode
        self.link = EngineLink(
            self.client, e.tensor_parallel_size, pause_mode=mode, expert_parallel_size=e.expert_parallel_size
        )
        self.link.open()

    def _with_engine(self, work: Callable[[], Any]) -> Any:
        """Run `work`; where the engine fails under it, bring it back with the current weights and run it again.

        After engine.max_restarts failures in a row the last one is raised. Raises WeightsLost, the engine restarted, where
        its weights are not kept here (sync.keep_last_update): the trainer sends them again, then the command.
        """
        failed = False
        while True:
            try:
                if failed:
                    self._bring_back()
                result = work()
                self.restarts = 0
                return result
            except EngineError as error:
                failed = True
                self.restarts += 1
                if self.restarts > self.config.engine.max_restarts:
                    raise
                log.warning("engine %d failed (%s); restart %d", self.number, error, self.restarts)

    def _bring_back(self) -> None:
        """Restart the engine with the weights that it should have; where sync.verify is on, compared byte by byte."""
        assert self.engine is not None
        self.link.close()
        with self.channel.at_work():  # ranks and the other agents wait meanwhile
            self.engine.restart()
        self._connect()
        if self.receiver.held:
            self._load(self.receiver.held, self.config.sync.verify != "off")
        elif self.version >= 0:
            raise WeightsLost

    def _load(self, buckets: Iterable[WeightBucket], verify: bool) -> None:
        digests = self.link.update(self.version, buckets, verify=verify)
        if digests is not None:
            text = json.dumps({"version": self.version, "digests": digests}, indent=1)
            write_atomic(self.run.attempt_dir / f"digests_{self.number}.json", text)

    # -- commands ------------------------------------------------------------------------------------------------

    def do_stop(self) -> tuple[dict, None]:
        return {}, None

    def do_update(self, version: int, verify: bool, number: int) -> tuple[dict, None]:
        """Take update `number` from every source and hand it on bucket by bucket; answers the seconds by part."""
        incoming = self.receiver.receive(version, number, verify)
        self.version = version
        try:
            self._load(incoming, verify)
        except EngineError as error:
            log.warning("engine %d failed during the update to version %d: %s", self.number, version, error)
            for _ in incoming:  # the trainer sends to all agents: take the rest all the same
                pass
            self._with_engine(_raise_once(error))
        return {"seconds": self.link.seconds, **self.link.counts}, None

    def do_rollout(self, step: int, cursor: int, prompts: int, keep_all: bool = False) -> tuple[dict, torch.Tensor]:
        """Generate and score this node's share of `prompts` groups from the data at `cursor`.

        Groups without signal are replaced from the prompts that follow, rollout.max_replacements times at most.
        """
        assert self.order is not None
        r = self.config.rollout
        kept: list[SampleGroup] = []
        dropped = generated = 0
        missing, rounds = prompts, r.max_replacements + 1
        rewards: list[float] = []
        for round_ in range(rounds):
            positions = range(cursor, cursor + missing)
            indices, cursor = self.order.take(cursor, missing)
            share = [(p, self.train_prompts[i]) for p, i in list(zip(positions, indices))[self.number :: self.agents]]
            try:
                groups = self.sampler.sample(
                    self._generate, share, r.n_samples, r.max_tokens, r.temperature, routing=r.routing_replay
                )
            except WeightsLost:
                for left in range(round_, rounds):  # the other agents wait for these
                    self.store.set(f"kept/{self.channel.count}/{left}/{self.number}", "0")
                raise
            self.rewarder.score(groups)
            generated += sum(len(s.response_ids) for g in groups for s in g.samples)
            rewards += [s.reward for g in groups for s in g.samples]
            settle_truncated(groups, r.truncated)
            good = groups if keep_all or not r.drop_no_signal else [g for g in groups if has_signal(g)]
            dropped += len(groups) - len(good)
            kept += good
            self.store.set(f"kept/{self.channel.count}/{round_}/{self.number}", str(len(good)))
            missing -= sum(self.channel.get(f"kept/{self.channel.count}/{round_}/{a}") for a in range(self.agents))
            if missing <= 0:
                break
        if is_saved(step, r.save_every):
            self._save(step, kept)
        answer = {
            "cursor": cursor, "dropped": dropped, "generated": generated,
            "rewards": [float(sum(rewards)), len(rewards)], "reward_failures": self.rewarder.failures,
        }  # fmt: skip
        return answer, encode_groups(kept)

    def do_evaluate(self, checkpoint: str | None = None) -> tuple[dict, None]:
        """This node's share of the held-out prompts and, with the weights' name, of eval.tasks (eval/in_training.py)."""
        return self.evaluation.evaluate(self._generate, checkpoint), None

    # -- parts ---------------------------------------------------------------------------------------------------

    def _generate(self, requests: list[GenerateRequest]) -> list[Generation]:
        return self._with_engine(lambda: self.client.generate(requests, one_batch=self.config.run.deterministic))

    def _save(self, step: int, groups: list[SampleGroup]) -> None:
        trainer_file(self.run.path, step).unlink(missing_ok=True)  # an earlier attempt's belongs to other samples
        prompts = [self.sampler.tokenizer.decode(list(g.prompt.token_ids)) for g in groups]
        write_rollout(rollout_file(self.run.path, step, self.number, self.agents), groups, prompts)


class WeightsLost(Exception):
    """The engine runs, but with the weights of its checkpoint folder."""


def _raise_once(error: Exception) -> Callable[[], None]:
    """Work that fails the first time: makes _with_engine bring the engine back before anything else is asked of it."""
    todo = [error]

    def work() -> None:
        if todo:
            raise todo.pop()

    return work


def engine_settings(config: RunConfig) -> Any:
    """What the engine needs to know of a run."""
    from fp8slurm.engine.server import EngineSettings

    settings = EngineSettings.from_config(config.engine)
    return replace(
        settings, deterministic=config.run.deterministic, seed=config.run.seed, cpu_threads=config.slurm.engine_threads,
        return_routing=config.rollout.routing_replay,
    )  # fmt: skip


def engine_checkpoint(config: RunConfig, run: RunDirectory, number: int) -> Path:
    """The folder that the engine loads: given, or made from hf_checkpoint (in FP8 or as it is) by the node's agent."""
    if config.model.rollout_checkpoint is not None:
        return config.model.rollout_checkpoint
    assert config.model.hf_checkpoint is not None
    if not engine_in_fp8(config):
        return config.model.hf_checkpoint
    from fp8slurm.checkpoint import hf_to_fp8

    target = run.path / "engine_model"
    if number == 0:
        if not target.exists():
            hf_to_fp8(config.model.hf_checkpoint, target)
    while not target.exists():
        time.sleep(0.2)
    return target
