"""What model.exact supports: the layouts in which trainer and engine can say the same bits (docs/exact.md).

No torch: a command asks before anything is started."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fp8slurm.core.errors import InputError
from fp8slurm.fp8.policy import LINEAR, excluded_by
from fp8slurm.models.precision import engine_in_fp8, engine_quantization
from fp8slurm.models.spec import ModelSpec

if TYPE_CHECKING:
    from fp8slurm.config import RunConfig

BUILT = frozenset({"cpu", "cuda"})
"""The devices on which both sides can compute exactly."""
ARCHITECTURES = ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM")
ATTENTION = {"cpu": "torch_native", "cuda": "fa3"}
"""The one attention backend of the engine, by device."""
CHANGES_BITS = ("--kv-cache-dtype", "--quantization", "--speculative-", "--fp8-gemm", "--prefill-attention-backend",
                "--decode-attention-backend", "--torchao", "--lora", "--moe-")  # fmt: skip
"""Arguments of SGLang's server with which it computes something else than the trainer; the beginnings of names."""


def check_exact(config: RunConfig, spec: ModelSpec) -> None:
    """Refuse model.exact where trainer and engine cannot compute the same bits; does nothing without it.

    InputError names the setting, the reason and what is allowed.
    """
    if not config.model.exact:
        return
    for flag, reason in _obstacles(config, spec):
        raise InputError(f"--model.exact with {flag}: {reason}; or --model.no-exact (docs/exact.md)")


def _obstacles(config: RunConfig, spec: ModelSpec) -> Iterator[tuple[str, str]]:
    """(setting and value, why it cannot be exact and what is allowed)."""
    c, device = config, "cuda" if config.slurm.gpus_per_node else "cpu"
    if device not in BUILT:
        where, allowed = "GPUs" if device == "cuda" else "CPUs", ", ".join(BUILT) or "nothing"
        yield f"--slurm.gpus-per-node {c.slurm.gpus_per_node}", f"it is not there yet on {where}; allowed: {allowed}"
    if spec.architecture not in ARCHITECTURES:
        yield spec.architecture, f"the exact layers are another family's; allowed: {', '.join(ARCHITECTURES)}"
    if spec.is_moe:
        yield from _mixture(c, spec, device)
    if spec.yarn is not None:
        yield "YaRN in config.json", "the exact layers have plain rotary embeddings; allowed: without rope_scaling"
    if c.fp8.backend == "off":
        yield "--fp8.backend off", "both sides multiply in FP8; allowed: transformer_engine (GPU), emulated (CPU)"
    if not engine_in_fp8(c):
        yield "an engine in BF16", "the trainer multiplies in FP8; allowed: --fp8.engine fp8 or auto"
    if c.model.dtype != c.engine.dtype:
        yield (
            f"--model.dtype {c.model.dtype} and --engine.dtype {c.engine.dtype}",
            "one side would round where the other does not; allowed: the same on both",
        )
    if c.engine.kv_cache == "fp8":
        yield (
            "--engine.kv-cache fp8",
            "the engine's attention rounds probabilities to FP8 too, the trainer's does not; allowed: auto",
        )
    yield from _tensor_parallel(c, device)
    if device == "cuda" and c.parallel.context_parallel_size > 1:
        yield (
            f"--parallel.context-parallel-size {c.parallel.context_parallel_size}",
            "it is not there yet on GPUs, whose exact attention has no keys of other ranks; allowed: 1",
        )
    if c.rollout.max_staleness:
        yield (
            f"--rollout.max-staleness {c.rollout.max_staleness}",
            "samples come from older weights than the trainer has; allowed: 0",
        )
    if device == "cuda" and c.run.deterministic:
        yield "--run.deterministic", "on GPUs it gives SGLang other norms; allowed: --run.no-deterministic"
    if c.fp8.param_gather:
        yield "--fp8.param-gather", "exact layers quantize BF16 weights themselves; allowed: --fp8.no-param-gather"
    if (quantization := engine_quantization(c)) is not None:
        for module in _linears(spec):
            if (entry := excluded_by(module, quantization.modules_to_not_convert)) is not None:
                yield (
                    f"--model.rollout-checkpoint {c.model.rollout_checkpoint}",
                    f"it keeps {module} out of FP8 (modules_to_not_convert: {entry}) and the trainer does not; "
                    f"allowed: a checkpoint with all Linears of its layers in FP8",
                )
    yield from _engine_arguments(c, ATTENTION[device])


def _mixture(config: RunConfig, spec: ModelSpec, device: str) -> Iterator[tuple[str, str]]:
    """Expert parallelism of the trainer is exact: a token's own rank sums what its experts gave out."""
    if device == "cuda":
        yield (
            spec.architecture,
            "on GPUs SGLang's routers round their logits to BF16 and its experts' outputs are weighted and summed in "
            "another order than the trainer's, and no exact form of them has run; allowed there: dense models",
        )
    p, e = config.parallel, config.engine
    for flag, size in (
        ("--parallel.tensor-parallel-size", p.tensor_parallel_size),
        ("--parallel.expert-tensor-parallel-size", p.expert_tensor_parallel_size),
        ("--engine.tensor-parallel-size", e.tensor_parallel_size),
        ("--engine.expert-parallel-size", e.expert_parallel_size),
    ):
        if size > 1:
            yield f"{flag} {size}", "a mixture's sum over experts would be of ranks' rounded parts; allowed: 1"


def _tensor_parallel(config: RunConfig, device: str) -> Iterator[tuple[str, str]]:
    """Each rank's part of a sum is rounded before it is added. The sum of two parts has no order, that of more has."""
    trainer, engine = config.parallel.tensor_parallel_size, config.engine.tensor_parallel_size
    most = {"cpu": 2, "cuda": 1}[device]
    allowed = " or ".join("12"[:most])
    if trainer != engine or trainer > most:
        yield (
            f"--parallel.tensor-parallel-size {trainer} and --engine.tensor-parallel-size {engine}",
            f"sums over ranks are rounded before they are added; allowed here: {allowed} on both sides",
        )


def _engine_arguments(config: RunConfig, attention: str) -> Iterator[tuple[str, str]]:
    words = [part for text in config.engine.extra_args for part in text.split("=", 1)]
    for name, value in zip(words, [*words[1:], ""]):
        if name == "--attention-backend" and value != attention:
            yield f"--engine.extra-args {name} {value}", f"its decode is not its prefill; allowed here: {attention}"
        if name.startswith(CHANGES_BITS):
            yield f"--engine.extra-args {name}", "the trainer computes otherwise; allowed: leave it out"


def _linears(spec: ModelSpec) -> list[str]:
    """The Linear modules of all layers but routers, in Hugging Face's names."""
    mlps = [f"mlp.experts.{expert}" for expert in range(spec.num_experts)] if spec.is_moe else ["mlp"]
    parts = [f"self_attn.{p}_proj" for p in "qkvo"]
    parts += [f"{mlp}.{p}_proj" for mlp in mlps for p in ("gate", "up", "down")]
    names = [f"model.layers.{layer}.{part}" for layer in range(spec.num_layers) for part in parts]
    assert all(LINEAR.fullmatch(f"{name}.weight") for name in names)
    return names
