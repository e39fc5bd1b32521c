"""The supervised phase: updates on given responses, before RL."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fp8slurm.config import RunConfig
from fp8slurm.data.prompts import PromptOrder, load_sft, load_tokenizer
from fp8slurm.rl.loss import sft_loss
from fp8slurm.rl.packing import pack_sft, packing_of
from fp8slurm.rl.schedule import learning_rate
from fp8slurm.run.directory import RunState


class SupervisedPhase:
    """sft.max_steps updates on sft.data, or fewer: until the held-out accuracy reaches sft.stop_accuracy."""

    def __init__(self, config: RunConfig, trainer: Any) -> None:
        """Errors as for load_sft."""
        self.settings, self.trainer, self._packing = config.sft, trainer, packing_of(config, trainer)
        assert config.model.hf_checkpoint is not None
        self.examples = load_sft(config.data, config.sft, load_tokenizer(config.model.hf_checkpoint))
        self.order = PromptOrder(len(self.examples), config.run.seed, config.data.shuffle)

    def step(self, state: RunState) -> tuple[RunState, dict[str, float]]:
        """One update; the state after it, and its metrics."""
        s = self.settings
        indices, cursor = self.order.take(state.sft_cursor, s.batch_size)
        batches = pack_sft([self.examples[i] for i in indices], **self._packing)[self.trainer.data_parallel_rank]
        lr = learning_rate(state.step, s.max_steps, s.lr, warmup_steps=s.warmup_steps)
        result = self.trainer.train_step(batches, sft_loss, lr)
        bad_steps = 0 if result.ok else state.bad_steps + 1
        record = {"skipped": float(not result.ok), "lr": lr, "loss": result.loss, "grad_norm": result.grad_norm}
        return replace(state, step=state.step + 1, sft_cursor=cursor, bad_steps=bad_steps), record | result.metrics

    def is_evaluated(self, step: int) -> bool:
        """Whether the held-out prompts are asked after this step."""
        s = self.settings
        return bool(s.eval_every) and (step == s.max_steps or (step >= s.eval_from and step % s.eval_every == 0))

    def is_over(self, step: int, record: dict[str, float]) -> bool:
        """Whether this step, of which `record` tells, is the last."""
        accurate = self.is_evaluated(step) and record["eval/accuracy"] >= self.settings.stop_accuracy
        return step >= self.settings.max_steps or accurate
