"""The plan of a run: parameters, memory and traffic of every rank, from the configuration alone."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from fp8slurm.config import RunConfig
from fp8slurm.config.derived import engines_sleep, transport_of
from fp8slurm.fp8 import BLOCK
from fp8slurm.fp8.policy import decide
from fp8slurm.models.known import find_spec
from fp8slurm.models.layout import check_layout
from fp8slurm.models.names import NameTable
from fp8slurm.models.precision import engine_quantization
from fp8slurm.models.spec import ModelSpec, QuantizationSpec
from fp8slurm.plan import memory, saving
from fp8slurm.plan.engine import EngineMemory, engine_memory, quantized
from fp8slurm.plan.memory import Item, RankMemory, checkpoint_bytes, rank_memory
from fp8slurm.plan.parameters import Layout, StageParameters, stages
from fp8slurm.sync.traffic import Traffic, traffic

GPU_MEMORY = {"H100": 80_000_000_000, "H200": 141_000_000_000}
"""Bytes counted on: the names' gigabytes, 5 to 6% less than the cards have, which is left to what is not counted."""
LENGTH_SHARES = (1.0, 0.25)
"""Mean response lengths, as shares of rollout.max_tokens, for which micro-batches are counted."""
TENSOR_SIZES = (1, 2, 4, 8, 16)
"""Tensor-parallel sizes for which the cuts are compared with the blocks."""


@dataclass(frozen=True)
class Stage:
    """One pipeline stage."""

    stage: int
    layers: int
    dense_parameters: int
    expert_parameters: int
    memory: RankMemory

    @property
    def parameters(self) -> int:
        return self.dense_parameters + self.expert_parameters


@dataclass(frozen=True)
class Alignment:
    """A kind of matrix and the tensor-parallel sizes whose cuts fall on block boundaries."""

    matrix: str
    along: str
    """Which of its sides is cut."""
    size: int
    matrices: int
    cut_by: int
    """The size that cuts it in this layout: tensor or expert-tensor parallelism."""
    aligned: tuple[int, ...]
    not_aligned: tuple[int, ...]
    impossible: tuple[int, ...]
    """Sizes by which the side (or the number of heads) cannot be divided."""


@dataclass(frozen=True)
class Pipeline:
    """Micro-batches of an update, for a mean response length."""

    response_tokens: int
    micro_batches: int
    bubble: float
    """Share of the time in which a stage waits: (p - 1) / (m + p - 1) (Narayanan et al. 2021, section 2.2)."""


@dataclass(frozen=True)
class Phase:
    """What an accelerator holds in a phase of a step, in the fullest stage."""

    name: str
    bytes: int
    parts: dict[str, int]


@dataclass(frozen=True)
class Fit:
    """The phases on one kind of accelerator."""

    gpu: str
    gpu_bytes: int
    engine: EngineMemory
    phases: tuple[Phase, ...]
    teacher: EngineMemory | None = None
    """teacher.checkpoint's engine, on the GPUs of a node's first engine, of which `engine` is one then."""

    @property
    def fits(self) -> bool:
        served = all(e is None or e.kv_tokens > 0 for e in (self.engine, self.teacher))
        return served and all(p.bytes <= self.gpu_bytes for p in self.phases)


@dataclass(frozen=True)
class Plan:
    """Everything that `fp8slurm plan` prints."""

    name: str
    model_source: str
    spec: ModelSpec
    parameters: int
    placement: str
    layout: Layout
    quantization: QuantizationSpec | None
    stages: tuple[Stage, ...]
    pipeline: tuple[Pipeline, ...]
    fits: tuple[Fit, ...]
    host: tuple[Item, ...]
    """Host memory of a node."""
    traffic: Traffic
    """One weight update."""
    matrices: int
    """Quantized matrices."""
    alignment: tuple[Alignment, ...]
    longest_sequence: int
    checkpoint_bytes: int
    """On disk: weights, FP32 masters and both moments."""
    gpus_per_node: int
    """0: the run asks for no GPU; the figures are what it would take on one."""
    samples_per_engine: int
    """Samples of a step for each engine."""
    context_traffic: int = 0
    """Bytes that context parallelism moves to a rank in a micro-batch."""
    tensor_traffic: int = 0
    """The same of tensor parallelism; 0 for mixtures, where it is not counted."""
    context_instead: int = 0
    """context_traffic where context parallelism took the place of tensor parallelism too."""

    def to_json(self) -> dict[str, Any]:
        """The plan as plain values; bytes are integers."""
        values = asdict(self)
        values["layout"] |= {"data": self.layout.data, "expert_data": self.layout.expert_data}
        for values_of_stage, stage in zip(values["stages"], self.stages):
            values_of_stage["parameters"] = stage.parameters
        for values_of_fit, fit in zip(values["fits"], self.fits):
            values_of_fit["fits"] = fit.fits
        return values


def make_plan(config: RunConfig, gpu_memory: dict[str, int] | None = None) -> Plan:
    """The plan of a configuration. `gpu_memory`: bytes by name; left out: H100 and H200.

    Raises:
        InputError: the layout does not fit the model, or the model's shape is not known (as in preflight).
    """
    from fp8slurm.config.placement import place
    from fp8slurm.models.engine_layout import check_engine_layout

    spec, source = find_spec(config.model.hf_checkpoint)
    placement = place(config)
    check_layout(spec, config.parallel, config.fp8.backend != "off", placement.world_size)
    check_engine_layout(config, spec)
    quantization = engine_quantization(config)
    layout = Layout.of(config.parallel, placement.world_size)
    table = NameTable(spec)
    parts = stages(table, layout)
    pipeline = tuple(_pipeline(config, layout, share) for share in LENGTH_SHARES)
    held = tuple(_stage(config, spec, p, pipeline[0].micro_batches) for p in parts)
    moved = traffic(
        table, quantization, config.sync.bucket_bytes,
        tensor_parallel_size=layout.tensor, pipeline_parallel_size=layout.pipeline,
        expert_parallel_size=layout.expert, expert_tensor_parallel_size=layout.expert_tensor,
        dtype=getattr(torch, config.engine.dtype), trainer_dtype=getattr(torch, config.model.dtype),
    )  # fmt: skip
    buffers = _update_buffers(config, spec, layout, moved.largest_bucket)
    matrices = [t for t in table.hf_tensors().values() if quantized(t.name, t.shape, quantization)]
    parameters = sum(math.prod(t.shape) for t in table.hf_tensors().values())
    return Plan(
        name=config.run.name,
        model_source=source,
        spec=spec,
        parameters=parameters,
        placement=config.engine.placement,
        layout=layout,
        quantization=quantization,
        stages=held,
        pipeline=pipeline,
        fits=tuple(
            _fit(config, table, quantization, held, buffers, sent_last(config, moved), placement.world_size, n, b)
            for n, b in (gpu_memory or GPU_MEMORY).items()
        ),
        host=_host(config, parts, held, moved.payload),
        traffic=moved,
        matrices=len(matrices),
        alignment=tuple(_alignment(table, layout)),
        longest_sequence=longest_sequence(config),
        checkpoint_bytes=checkpoint_bytes(config, table),
        gpus_per_node=config.slurm.gpus_per_node,
        samples_per_engine=-(-config.rollout.prompts_per_step * config.rollout.n_samples // len(placement.engines)),
        context_traffic=memory.context_traffic(config, spec, layout),
        tensor_traffic=memory.tensor_traffic(config, spec, layout),
        context_instead=memory.context_traffic(
            config, spec, replace(layout, tensor=1, context=layout.context * layout.tensor)
        ),
    )


def longest_sequence(config: RunConfig) -> int:
    """Tokens of the longest prompt with the longest response."""
    return config.data.max_prompt_tokens + config.rollout.max_tokens


def _stage(config: RunConfig, spec: ModelSpec, p: StageParameters, micro_batches: int) -> Stage:
    return Stage(p.stage, p.layers, p.dense, p.experts, rank_memory(config, spec, p, micro_batches))


def _pipeline(config: RunConfig, layout: Layout, share: float) -> Pipeline:
    """Micro-batches of the update with the most samples, if every response has `share` of the longest length."""
    r, t = config.rollout, config.train
    response = max(1, int(r.max_tokens * share))
    samples = -(-r.prompts_per_step // t.updates_per_step) * r.n_samples
    per_batch = max(1, t.tokens_per_micro_batch // (response + int(config.data.max_prompt_tokens * share)))
    m = max(1, -(-samples // (per_batch * layout.data)))
    return Pipeline(response, m, (layout.pipeline - 1) / (m + layout.pipeline - 1))


def _fit(
    config: RunConfig, table: NameTable, quantization: QuantizationSpec | None, held: tuple[Stage, ...],
    update_buffers: int, kept: int, ranks: int, name: str, size: int,
) -> Fit:  # fmt: skip
    """The phases on a GPU of `size` bytes."""
    shared = config.engine.placement == "shared"
    fullest = max((s.memory for s in held), key=lambda m: m.state_bytes + m.working_bytes)
    largest = max((s.memory for s in held), key=lambda m: m.state_bytes)
    trainer = {"trainer resident": memory.trainer_resident(ranks)} | ({"sent last": kept} if kept else {})
    serving = {"engine resident": memory.engine_resident(config.engine.tensor_parallel_size)}
    there = sum(serving.values())
    sleeps = engines_sleep(config)
    if shared:  # the engine starts when the trainer's state is there
        there += sum(trainer.values()) + sum(_while_engines_work(config, largest).values())
    teacher = _teacher(config, size, there)
    if teacher is not None:  # it is there before the engine
        serving["teacher"] = there + teacher.weights + teacher.kv_bytes
        there = sum(serving.values())
    engine = engine_memory(config, table, quantization, size, there)
    buckets = {"update buffers": update_buffers}
    weights, cache = {"engine weights": engine.weights}, {"KV cache": engine.kv_bytes}

    def state(m: RankMemory, working: bool) -> dict[str, int]:
        return {i.name: i.bytes for i in (*m.state, *(m.working if working else ()))}

    if shared:
        phases = {
            "train": trainer | serving | buckets | state(fullest, True) | ({} if sleeps else weights | cache),
            "sync and rollout": trainer | serving | buckets | _while_engines_work(config, largest) | weights | cache,
        }
    else:
        phases = {
            "train (trainer's GPU)": trainer | buckets | state(fullest, True),
            "sync (trainer's GPU)": trainer | buckets | state(largest, False),
            "sync and rollout (engine's GPU)": serving | buckets | weights | cache,
        }
    return Fit(name, size, engine, tuple(Phase(n, sum(p.values()), p) for n, p in phases.items()), teacher)


def _teacher(config: RunConfig, gpu_bytes: int, resident: int) -> EngineMemory | None:
    """The teacher's engine (rollout/teacher.py): the settings of the others with a share of memory of its own."""
    if config.teacher.checkpoint is None:
        return None
    spec, _ = find_spec(config.teacher.checkpoint, "--teacher.checkpoint")
    section = config.engine.model_copy(update={"mem_fraction": config.teacher.mem_fraction, "kv_cache": "auto"})
    own = config.model_copy(update={"engine": section})
    return engine_memory(own, NameTable(spec), spec.quantization, gpu_bytes, resident)


def sent_last(config: RunConfig, moved: Traffic) -> int:
    """Bytes that a rank keeps of what it sent last, the fullest: with sync.delta every bucket that it sends."""
    return max(rank.broadcast for rank in moved.ranks) if config.sync.delta else 0


def _update_buffers(config: RunConfig, spec: ModelSpec, layout: Layout, largest: int) -> int:
    """For every list of buckets that a rank sends, its stage's and its experts', two buckets, and together a third for
    slices of the other ranks that the matrices are cut over; where engines map the memory of their GPU's rank, two more
    for what other ranks send (sync/mapped.py). All as large as the largest: an upper bound."""
    lists = [layout.tensor] + ([layout.expert_tensor] if spec.is_moe else [])
    sources = layout.pipeline * (1 + (layout.expert if spec.is_moe else 0))
    others = 2 if sources > 1 and transport_of(config) == "cuda-ipc" else 0
    return largest * (sum(2 + (cut > 1) for cut in lists) + others)


def _while_engines_work(config: RunConfig, m: RankMemory) -> dict[str, int]:
    """What a trainer's rank keeps on a GPU that it shares (Trainer.make_room), all of it where engines do not sleep."""
    gone = {*(memory.PASSING if engines_sleep(config) else ()), *(["optimizer"] if config.optim.sleep else [])}
    return {i.name: i.bytes for i in m.state if i.name not in gone}


def _host(config: RunConfig, parts: list[StageParameters], held: tuple[Stage, ...], payload: int) -> tuple[Item, ...]:
    """Host memory of the fullest node."""
    ranks = config.slurm.ranks_per_node
    out = []
    if transport_of(config) == "gloo" and config.sync.keep_last_update is not False:
        out.append(
            Item(
                "last update",
                payload,
                "exact",
                "held by the rollout worker: an engine that restarts is served from here",
            )
        )
    offloaded = max(sum(i.bytes for i in s.memory.host) for s in held)
    if offloaded:
        out.append(Item("offloaded optimizer", offloaded * ranks, "estimate", f"{ranks} ranks"))
    if config.optim.sleep:
        asleep = max(i.bytes for s in held for i in s.memory.state if i.name == "optimizer")
        out.append(Item("sleeping optimizer", asleep * ranks, "exact", f"pinned, {ranks} ranks (optim.sleep)"))
    note = "copies of weights and optimizer state, until it is on the disk"
    out.append(Item("checkpoint being written", saving.node_bytes(config, parts), "exact", note))
    processes = ranks + 1 + config.engine.per_node * config.engine.tensor_parallel_size
    out.append(Item("processes", processes * memory.HOST_PROCESS, "assumed", f"{processes} processes"))
    return tuple(out)


def _alignment(table: NameTable, layout: Layout) -> list[Alignment]:
    """Every kind of quantized matrix: which side tensor parallelism cuts, and where that hits block boundaries."""
    kinds: dict[tuple[str, int, int, bool], int] = {}
    for entry in table:
        for t in entry.tensors:
            if entry.tp_dim is not None and decide(t.name, t.shape).quantize:
                name = t.name.split(".")[-2] + (" (experts)" if entry.expert is not None else "")
                key = (name, entry.tp_dim, t.shape[entry.tp_dim], entry.expert is not None)
                kinds[key] = kinds.get(key, 0) + 1
    out = []
    for (name, dim, size, expert), count in kinds.items():
        heads = table.spec.num_kv_heads if name in ("q_proj", "k_proj", "v_proj") else size
        possible = [n for n in TENSOR_SIZES if heads % n == 0 and size % n == 0]
        aligned = tuple(n for n in possible if n == 1 or size // n % BLOCK == 0)
        out.append(
            Alignment(
                name,
                "rows" if dim == 0 else "columns",
                size,
                count,
                layout.expert_tensor if expert else layout.tensor,
                aligned,
                tuple(n for n in possible if n not in aligned),
                tuple(n for n in TENSOR_SIZES if n not in possible),
            )
        )
    return out
