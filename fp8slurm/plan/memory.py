"""Bytes that a training rank holds, by kind. What is counted is exact; what is estimated or assumed says so.

Activations follow Korthikanti et al. 2022 (Reducing Activation Recomputation in Large Transformer Models, section 4),
term by term, adapted: no dropout, grouped-query attention that stores no scores (FlashAttention: one log-sum-exp a head
and token), q and k norms, SwiGLU, packed sequences (tokens of the budget in place of sequence times batch), and inputs
of FP8 linears kept in FP8, as TransformerEngine does. tests/plan compares weights, gradients and optimizer with a built
trainer and the output layer's factors with the code; the activations of a layer are not compared with a GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from fp8slurm.config import RunConfig
from fp8slurm.models.names import NameTable
from fp8slurm.models.spec import ModelSpec
from fp8slurm.plan.parameters import Layout, StageParameters
from fp8slurm.trainer.logprobs import CHUNK_LOGITS
from fp8slurm.trainer.primary_fp8 import PIECE, SLOTS

Basis = Literal["exact", "estimate", "assumed"]

OUTPUT_LAYER = 4
"""Bytes a logit of trainer/logprobs.py in BF16, in its backward pass: the logits and their gradient."""
OUTPUT_LAYER_CHUNK = 12
"""Bytes a logit besides for those of one chunk (logprobs.CHUNK_LOGITS): fp32 tensors, with the entropy's gradient."""
TRAINER_ALONE = 2_600_000_000
"""CUDA context, kernels, cuBLAS and cuDNN workspaces of a Megatron rank: measured on an H100 (docs/perf.md)."""
TRAINER_RESIDENT = 5_000_000_000
"""The same of one among several ranks: 4 to 5 GB on two and four H100s, of which NCCL takes 0.5 a communicator."""
ENGINE_ALONE = 2_000_000_000
"""The same of an engine on one GPU, with its CUDA graphs; they stay when it sleeps: 1.1 to 1.7 GB."""
ENGINE_RESIDENT = 3_000_000_000
"""Assumed: the same of an engine's rank among several."""
RESERVE = {(False, False): 0.02, (False, True): 0.10, (True, False): 0.15, (True, True): 0.25}
"""What torch's allocator has in reserve, as a share of what a step takes and gives back. (FP8, tensor parallelism) ->
measured on H100s with expandable segments and full recomputation (docs/perf.md)."""
PASSING = ("gradients", "FP8 copies")
"""State that a trainer's rank gives back while engines work on its GPU (Trainer.make_room)."""
GATHERED_COPIES = 4
"""Of a layer's gathered keys and values while its backward pass runs: as the ranks have them and in the order of the
sequences, and gradients of both (read in TransformerEngine 2.18's AttnFuncWithCPAndKVAllGather, not measured)."""
HOST_PROCESS = 4_000_000_000
"""Assumed: host memory of a rank's, a rollout worker's or an engine's process apart from what is counted here."""
EXPERT_IMBALANCE = 1.5
"""Assumed: the fullest expert-parallel rank gets this many times the mean number of tokens."""


@dataclass(frozen=True)
class Item:
    """One kind of memory."""

    name: str
    bytes: int
    basis: Basis
    note: str = ""


@dataclass(frozen=True)
class RankMemory:
    """What one rank of a pipeline stage holds."""

    stage: int
    state: tuple[Item, ...]
    """Kept between steps on the GPU."""
    working: tuple[Item, ...]
    """Only while the trainer works."""
    host: tuple[Item, ...] = field(default=())
    """In host memory all the time (the offloaded optimizer)."""

    @property
    def state_bytes(self) -> int:
        return sum(i.bytes for i in self.state)

    @property
    def working_bytes(self) -> int:
        return sum(i.bytes for i in self.working)


def weight_bytes(config: RunConfig) -> int:
    """Bytes of a parameter."""
    return 2 if config.model.dtype == "bfloat16" else 4


def rank_memory(config: RunConfig, spec: ModelSpec, p: StageParameters, micro_batches: int) -> RankMemory:
    """Memory of a rank of stage `p.stage`, with `micro_batches` in an update."""
    state, host = _state(config, p)
    working = _working(config, spec, p, micro_batches)
    share = RESERVE[config.fp8.backend != "off", p.layout.tensor > 1]
    passing = sum(i.bytes for i in working) + sum(i.bytes for i in state if i.name in PASSING)
    note = f"{share:.0%} of what a step takes and gives back: torch's allocator"
    working.append(Item("in reserve", int(share * passing), "estimate", note))
    return RankMemory(p.stage, tuple(state), tuple(working), tuple(host))


def trainer_resident(ranks: int) -> int:
    """What a rank's libraries take of its GPU, with `ranks` in the run."""
    return TRAINER_RESIDENT if ranks > 1 else TRAINER_ALONE


def engine_resident(tensor_parallel_size: int) -> int:
    """The same of an engine's rank."""
    return ENGINE_RESIDENT if tensor_parallel_size > 1 else ENGINE_ALONE


def _state(config: RunConfig, p: StageParameters) -> tuple[list[Item], list[Item]]:
    o, size = config.optim, weight_bytes(config)
    elements = sum(b.padded if o.distributed else b.elements for b in p.buffers)
    dtype = "BF16" if size == 2 else "FP32"
    primary = p.quantized if config.fp8.param_gather else 0  # kept as codes alone
    note = f"{dtype}; the Linear weights as FP8 codes" if primary else dtype
    state = [
        Item("weights", elements * size - primary, "estimate" if primary else "exact", note),
        Item("gradients", elements * 4, "exact", "FP32, DDP's buffer (grad_reduce_in_fp32)"),
    ]
    sharded = sum(b.padded // b.data if o.distributed else b.elements for b in p.buffers)
    where = "over " + " and ".join(str(b.data) for b in p.buffers) + " ranks" if o.distributed else "on every rank"
    host = []
    if o.cpu_offload and primary:
        staged = SLOTS * min(sharded, max(PIECE, p.largest_quantized))
        state.append(Item("optimizer's staging", staged * 2, "estimate", "BF16 values on their way to be quantized"))
        note = f"FP32 master, two moments; {where}; and gradients and values of {SLOTS} rounds, pinned"
        host.append(Item("offloaded optimizer", sharded * 12 + staged * 6, "estimate", note))
    elif o.cpu_offload:
        # HybridDeviceOptimizer (megatron-core 0.19.2): FP32 masters, two moments and a pinned copy of the gradients
        host.append(
            Item("offloaded optimizer", sharded * 16, "estimate", f"FP32 master, two moments, gradients; {where}")
        )
    else:
        state.append(_optimizer(config, sharded, where))
    if config.fp8.backend == "transformer_engine":
        # codes and scales, row-wise and column-wise: FP8 GEMMs on Hopper take one orientation each
        scales = p.quantized // 16384 * 8
        if primary:
            state.append(Item("FP8 copies", primary + scales, "estimate", "column-wise codes, and the scales of both"))
        else:
            note = "codes and scales in both orientations, kept by TransformerEngine between micro-batches"
            state.append(Item("FP8 copies", p.quantized * 2 + scales, "estimate", note))
    elif config.fp8.backend == "emulated":
        copies = p.quantized * 4 + primary * 5  # of FP8 weights in both orientations, and their column-wise codes
        state.append(Item("quantized copies", copies, "exact", "FP32, of the emulation"))
    if config.algorithm.kl_coef:
        state.append(Item("reference model", p.total * size, "exact", dtype))
    return state, host


def _optimizer(config: RunConfig, elements: int, where: str) -> Item:
    if config.optim.moments == "bfloat16":
        # TransformerEngine's FusedAdam keeps of an FP32 master only the 16 bits that the BF16 weight lacks
        # (megatron-core 0.19.2, OptimizerConfig.store_param_remainders)
        return Item("optimizer", elements * 6, "estimate", f"remainder of the FP32 master, two BF16 moments, {where}")
    if weight_bytes(config) == 2:
        return Item("optimizer", elements * 12, "exact", f"FP32 master and two moments, {where}")
    return Item("optimizer", elements * 8, "exact", f"two FP32 moments (the weights are their own masters), {where}")


@dataclass(frozen=True)
class LayerActivations:
    """Bytes a token of one layer on one rank."""

    kept: float
    """Kept for the backward pass without recomputation."""
    checkpoint: float
    """The layer's input: all that is kept with full recomputation."""
    passing: float
    """Alive besides while the layer's backward pass runs: gradients of the widest tensors and their FP8 copies."""


def layer_activations(
    config: RunConfig, spec: ModelSpec, tensor: int, expert_tensor: int, sequence: bool
) -> LayerActivations:
    """A transformer layer's activations, for a token of the micro-batch (see the module's docstring)."""
    b = weight_bytes(config)
    te = config.fp8.backend == "transformer_engine"
    h, d = spec.hidden_size, spec.head_dim
    q, kv = spec.num_heads * d / tensor, spec.num_kv_heads * d / tensor
    s = 1 / tensor if sequence else 1.0  # share of the tokens where tensor parallelism does not cut the width
    saved = 1 + 4 / 128 if te else b  # a linear's input: one orientation of codes, a scale for every 128
    attention = b * h * s + saved * h * s  # the norm's input and the qkv projection's
    attention += b * (q + 2 * kv) + b * (q + kv)  # q, k, v; q and k again behind norm and rotary embedding
    attention += b * q + 4 * spec.num_heads / tensor  # attention's output and log-sum-exps
    attention += saved * q if te else 0  # the output projection's input; the same tensor without FP8
    mlp = b * h * s
    if not spec.is_moe:
        f = spec.ffn_hidden_size / tensor
        mlp += saved * h * s + b * 2 * f + saved * f
        passing = 2 * b * h + 2 * (b * 2 * f)
    else:
        f = spec.moe_ffn_hidden_size / expert_tensor
        rows = spec.experts_per_token * s * expert_tensor * EXPERT_IMBALANCE
        mlp += (
            b * h * s + 3 * 4 * spec.num_experts * s
        )  # the norm's output; the router's logits, scores and map in fp32
        mlp += rows * (saved * h + b * 2 * f + saved * f + 4)
        passing = rows * (3 * b * h + 2 * (b * 2 * f))  # tokens before and after the exchange, and their gradient
    return LayerActivations(attention + mlp, b * h * s, passing)


def _working(config: RunConfig, spec: ModelSpec, p: StageParameters, micro_batches: int) -> list[Item]:
    layout = p.layout
    tokens = -(-config.train.tokens_per_micro_batch // layout.context)
    a = layer_activations(config, spec, layout.tensor, layout.expert_tensor, layout.sequence_parallel)
    flying = min(
        micro_batches, layout.pipeline - p.stage
    )  # 1F1B: a stage runs ahead of its backward by those behind it
    flight = f"{p.layers} layers x {flying} micro-batch(es) in flight x {tokens} tokens"
    if config.train.recompute == "full":
        items = [
            Item(
                "layer inputs",
                int(a.checkpoint * p.layers * flying * tokens),
                "estimate",
                f"{a.checkpoint:.0f} B a token; {flight}",
            )
        ]
        one = a.kept + a.passing
    else:
        items = [
            Item(
                "activations", int(a.kept * p.layers * flying * tokens), "estimate", f"{a.kept:.0f} B a token; {flight}"
            )
        ]
        one = a.passing
    gathered = GATHERED_COPIES * gathered_bytes(config, spec, layout)
    note = f"{one:.0f} B a token" + (f", and {gathered / 1e9:.2f} GB of gathered keys and values" if gathered else "")
    layer = Item("one layer's backward", int(one * tokens) + gathered, "estimate", note)
    if p.stage < layout.pipeline - 1:
        return [*items, layer]
    logits = tokens * spec.vocab_size // layout.tensor
    chunk = min(logits, CHUNK_LOGITS)
    head = Item(
        "output layer",
        logits * OUTPUT_LAYER + chunk * OUTPUT_LAYER_CHUNK,
        "estimate",
        f"{tokens} tokens x {spec.vocab_size // layout.tensor} logits x {OUTPUT_LAYER} B, "
        f"and {chunk} x {OUTPUT_LAYER_CHUNK} B",
    )
    # The output layer's backward is over before the layers' begins: only the larger of the two counts.
    return [*items, max(head, layer, key=lambda i: i.bytes)]


def gathered_bytes(config: RunConfig, spec: ModelSpec, layout: Layout) -> int:
    """Keys and values of one layer and a whole micro-batch, which context-parallel ranks gather; 0 without them."""
    if layout.context == 1:
        return 0
    width = 2 * spec.num_kv_heads * spec.head_dim // layout.tensor
    return config.train.tokens_per_micro_batch * width * weight_bytes(config)


def context_traffic(config: RunConfig, spec: ModelSpec, layout: Layout) -> int:
    """Bytes that a rank takes in for context parallelism in a micro-batch's forward and backward pass: keys and values
    are gathered for each, and once more where layers are recomputed, and their gradients are summed to the ranks that
    own them."""
    times = 4 if config.train.recompute == "full" else 3
    each = gathered_bytes(config, spec, layout) * (layout.context - 1) // layout.context
    return times * each * spec.num_layers // layout.pipeline


def tensor_traffic(config: RunConfig, spec: ModelSpec, layout: Layout) -> int:
    """Bytes that a rank takes in for tensor parallelism in a micro-batch's forward and backward pass through dense
    layers: with sequence parallelism 4 collectives of the hidden state forward (gathered before, scattered behind
    attention and FFN) and 6 backward (two inputs are gathered again); without it 2 and 2 all-reduces, which count
    twice. Recomputed layers are gone through forward once more. 0 for mixtures: how tokens go to experts is not
    counted."""
    if layout.tensor == 1 or spec.is_moe:
        return 0
    times = 10 if layout.sequence_parallel else 8
    times += 4 if config.train.recompute == "full" else 0
    state = config.train.tokens_per_micro_batch // layout.context * spec.hidden_size * weight_bytes(config)
    return times * (state * (layout.tensor - 1) // layout.tensor) * spec.num_layers // layout.pipeline


def checkpoint_bytes(config: RunConfig, table: NameTable) -> int:
    """Bytes of one checkpoint of a run: the weights, and FP32 masters and two moments."""
    return sum(math.prod(t.shape) for t in table.hf_tensors().values()) * (weight_bytes(config) + 12)
