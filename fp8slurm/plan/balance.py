"""Which placement balances engines and trainer: seconds a step of each way to use a recipe's GPUs, by measured rates.

    shared        generate + train + update               engines and trainer take turns on all GPUs
    split         generate + train + update               on GPUs of their own, one after the other
    one ahead     max(generate, train) + update           split, with rollout.max_staleness = 1

generate = generated tokens / (rate of a GPU x engine GPUs), but not less than the longest sample takes; train
(log-probabilities too) alike. Both scale with GPUs and nothing else: other batches of engines, other cuts of the model,
and networks are not in it. Without a longest sample no GPU ever waits in "shared", so it wins by construction; long
samples, which leave most GPUs waiting there, are what "one ahead" is for.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from fp8slurm.config import RunConfig
from fp8slurm.core.errors import InputError
from fp8slurm.run.reader import Run, read_run

WAYS = {"shared": "shared", "split": "split", "one ahead": "split"}
"""Name of a way -> engine.placement."""


@dataclass(frozen=True)
class Rates:
    """What was measured."""

    generate: float
    """Tokens a second that a GPU of an engine generates."""
    train: float
    """Tokens a second, prompts' too, that a GPU of the trainer takes: log-probabilities and updates together."""
    generated: float
    """Tokens that a step generates, those of dropped groups too."""
    trained: float
    """Tokens of the sequences that a step trains on."""
    update_s: float = 0.0
    """Seconds of a step that are the same everywhere: weights, engines' sleep, what is left."""
    longest_s: float = 0.0
    """Seconds that the longest sample takes, however many GPUs serve."""


@dataclass(frozen=True)
class Layout:
    """One way to use the GPUs, and what a step takes then."""

    way: str
    training_gpus: int
    engine_gpus: int
    generate_s: float
    train_s: float
    step_s: float

    @property
    def trainer_waits(self) -> float:
        """Share of a step in which the trainer has nothing to do."""
        return 1 - self.train_s / self.step_s

    @property
    def engines_idle(self) -> float:
        """Share of a step in which engines generate nothing."""
        return 1 - self.generate_s / self.step_s


def predict(rates: Rates, way: str, training_gpus: int, engine_gpus: int) -> Layout:
    """Seconds of a step of one layout; with way "shared" both numbers are that of all GPUs."""
    generate = max(rates.longest_s, rates.generated / (rates.generate * engine_gpus))
    train = rates.trained / (rates.train * training_gpus)
    busy = max(generate, train) if way == "one ahead" else generate + train
    return Layout(way, training_gpus, engine_gpus, generate, train, busy + rates.update_s)


def layouts(config: RunConfig, rates: Rates) -> list[Layout]:
    """All that the recipe's nodes and cuts allow, the fastest first. InputError: it has no GPUs, or none fits."""
    s, p = config.slurm, config.parallel
    if not s.gpus_per_node:
        raise InputError("--slurm.gpus-per-node 0: there are no GPUs to place; allowed: those of a node, such as 8")
    cut = p.tensor_parallel_size * p.pipeline_parallel_size * p.context_parallel_size
    engine = config.engine.tensor_parallel_size
    every = s.nodes * s.gpus_per_node
    found = [predict(rates, "shared", every, every)] if not every % cut and not s.gpus_per_node % engine else []
    for serving in range(engine, s.gpus_per_node, engine):
        training = s.nodes * (s.gpus_per_node - serving)
        if training % cut == 0:
            found += [predict(rates, way, training, s.nodes * serving) for way in ("split", "one ahead")]
    if not found:
        raise InputError(
            f"no placement fits {s.nodes} x {s.gpus_per_node} GPUs: the trainer's must be a multiple of {cut} "
            f"(--parallel.*), an engine's {engine} (--engine.tensor-parallel-size)"
        )
    return sorted(found, key=lambda layout: layout.step_s)


def rates_of(path: Path) -> Rates:
    """From a run's metrics: medians of its RL steps that trained. InputError: it has none, or no GPUs."""
    run = read_run(path)
    gpus = _gpus(run)
    steps = [r for r in run.records if r["phase"] == "rl" and r.get("time/train") and r.get("time/generate")]
    if not steps or not gpus:
        lacks = "has no RL step that trained" if gpus else "does not say on how many GPUs it ran (config.json)"
        raise InputError(f"--from-run {path}: it {lacks}; allowed: a run with GPUs and RL steps, or --rates")
    training, serving = gpus

    def median(values: list[float]) -> float:
        return statistics.median(values)

    generate = [r["rollout/tokens"] / r["time/generate"] for r in steps]
    train = [r["tokens"] / (r["time/train"] + r.get("time/logprobs", 0.0)) for r in steps]
    update = [sum(r.get(f"time/{part}", 0.0) for part in ("sync", "sleep", "deal", "score")) for r in steps]
    return Rates(
        median(generate) / serving, median(train) / training,
        median([r["rollout/tokens"] for r in steps]), median([r["tokens"] for r in steps]), median(update),
    )  # fmt: skip


def _gpus(run: Run) -> tuple[int, int] | None:
    """(GPUs that train, GPUs that serve) of a run; None where it has none."""
    nodes, each = run.setting("slurm.nodes") or 1, run.setting("slurm.gpus_per_node") or 0
    ranks = run.setting("slurm.ranks_per_node") or 1
    engines = (run.setting("engine.per_node") or 1) * (run.setting("engine.tensor_parallel_size") or 1)
    return (nodes * ranks, nodes * engines) if each else None


def flags(layout: Layout, config: RunConfig) -> str:
    """What a command is given for it."""
    nodes, engine = config.slurm.nodes, config.engine.tensor_parallel_size
    serving, training = layout.engine_gpus // nodes, layout.training_gpus // nodes
    out = (
        f"--engine.placement {WAYS[layout.way]} --slurm.ranks-per-node {training} --engine.per-node {serving // engine}"
    )
    if layout.way != "shared":
        out += f" --engine.gpus {serving} --rollout.max-staleness {int(layout.way == 'one ahead')}"
    return out


def to_json(found: list[Layout], rates: Rates, config: RunConfig) -> dict[str, Any]:
    """For scripts."""
    rows = [{**asdict(x), "trainer_waits": x.trainer_waits, "engines_idle": x.engines_idle, "flags": flags(x, config)}
            for x in found]  # fmt: skip
    return {"rates": asdict(rates), "layouts": rows}


def table(found: list[Layout]) -> Table:
    """For people."""
    out = Table(
        title="seconds a step, by placement", title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0)
    )
    for head in (
        "placement",
        "train on",
        "serve on",
        "generate s",
        "train s",
        "step s",
        "trainer waits",
        "engines idle",
    ):
        out.add_column(head, justify="left" if head == "placement" else "right")
    for x in found:
        gpus = ("all", "all") if x.way == "shared" else (str(x.training_gpus), str(x.engine_gpus))
        seconds = (f"{value:.1f}" for value in (x.generate_s, x.train_s, x.step_s))
        out.add_row(x.way, *gpus, *seconds, f"{x.trainer_waits:.0%}", f"{x.engines_idle:.0%}")
    return out
