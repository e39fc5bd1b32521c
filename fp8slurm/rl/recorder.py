"""One record a step: to metrics.jsonl, and to TensorBoard and Weights & Biases where they are asked for."""

from __future__ import annotations

import logging
import time
from typing import Any

from fp8slurm.config import RunConfig
from fp8slurm.core.files import patiently
from fp8slurm.observe.metrics import MetricsWriter
from fp8slurm.rl.stopwatch import Stopwatch
from fp8slurm.run import timeline
from fp8slurm.run.directory import RunDirectory, RunState
from fp8slurm.run.timeline import Answered

log = logging.getLogger(__name__)


class Recorder:
    """A training rank's. All ranks call `begin` and `write`; only one of them has files to write to."""

    def __init__(
        self, config: RunConfig, run_dir: RunDirectory, watch: Stopwatch, writes: bool, resumed: RunState | None,
        answered: list[Answered] | None = None,
    ) -> None:  # fmt: skip
        """resumed: state of the checkpoint that the run goes on from; records behind it are removed. None: all are.

        No step is missing then, and none is there twice. answered: of the channel to the rollout workers, emptied here.
        """
        self.answered = [] if answered is None else answered
        self.run_dir, self.watch, self.writes = run_dir, watch, writes
        self.sinks: list[Any] = []
        self._started = 0.0
        if not writes:
            return
        at = None if resumed is None else (resumed.phase, resumed.step)
        if resumed is not None and at == ("rl", 0):  # of the checkpoint between the phases: step 0 is recorded after it
            at = ("sft", resumed.sft_steps)
        self.sinks.append(patiently(lambda: MetricsWriter(run_dir.own_copy("metrics.jsonl"), at)))
        patiently(lambda: run_dir.publish("metrics.jsonl"))
        if config.observe.tensorboard:
            from fp8slurm.observe.tensorboard import TensorBoard

            self.sinks.append(TensorBoard(run_dir.path / "tb", at))
        if config.observe.wandb:
            from fp8slurm.observe.weights_and_biases import WeightsAndBiases

            settings = config.model_dump(mode="json")
            self.sinks.append(WeightsAndBiases(run_dir.path, config.run.name, config.observe.wandb_project, settings))

    def begin(self) -> None:
        """A step begins. The save after the step before is counted with this one: that one's record is closed."""
        self.watch.clear(keep=("checkpoint",))
        self._started = time.perf_counter()

    def write(self, state: RunState, figures: dict[str, float]) -> None:
        """The record of the step that led to `state`, with its times. FencedError: the attempt has been replaced."""
        seconds = time.perf_counter() - self._started
        times = {f"time/{phase}": s for phase, s in self.watch.seconds.items()}
        if self.writes:
            times |= self._timeline(state, seconds)
        record = {"phase": state.phase, "step": state.step, **figures, **times, "time/step": seconds}
        if "tokens" in figures:
            record["throughput/tokens_per_s"] = figures["tokens"] / seconds
        self.watch.clear()
        if self.writes:
            patiently(lambda: self.run_dir.publish("metrics.jsonl"))
        for sink in self.sinks:
            sink.write(record)

    def _timeline(self, state: RunState, seconds: float) -> dict[str, float]:
        """Write who did what when; how long trainer and engines waited. A disk that is full ends no run for it."""
        spans, answered, end = self.watch.take_spans(), list(self.answered), time.time()
        self.answered.clear()
        entry = timeline.line(state.phase, state.step, end - seconds, end, spans, answered)
        try:
            timeline.append(self.run_dir.attempt_dir, entry)
        except OSError as error:
            log.warning("no timeline of this step: %s", error)
        waits = sum(s for phase, s in self.watch.seconds.items() if phase in timeline.WAITING)
        idle = timeline.engines_idle(answered, seconds)
        return {"time/trainer_waits": waits} | ({} if idle is None else {"time/engines_idle": idle})

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()
