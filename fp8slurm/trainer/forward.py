"""Micro-batches through Megatron's pipeline schedule, with log-probabilities in place of logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from typing import Any, TypeVar

import torch

from fp8slurm.core.types import PackedBatch
from fp8slurm.trainer.context_parallel import ModelInput, whole
from fp8slurm.trainer.experts import RoutingReplay
from fp8slurm.trainer.logprobs import vocab_parallel_logprobs

D = TypeVar("D", PackedBatch, ModelInput)
Outputs = tuple[torch.Tensor, "torch.Tensor | None"]
"""(logprobs fp32 [T], entropy fp32 [T] or None) of a micro-batch, on the last pipeline stage."""


def run_schedule(
    model: Any, micro_batches: list[PackedBatch], loss: Callable[[Outputs, PackedBatch], tuple[torch.Tensor, Any]], *,
    with_entropy: bool, forward_only: bool, replay: RoutingReplay | None = None, exact: bool = False,
    multiple: int = 1,
) -> list[Any]:  # fmt: skip
    """Forward, and backward of the sum of all losses, over the micro-batches.

    `loss` gives (scalar, anything to keep). Returns what was kept of every micro-batch on the last pipeline stage,
    and nothing on the others. `replay`: of this model's routers; `exact`: with the engine's bits (model.exact);
    `multiple`: what a context-parallel rank's number of tokens has to be a multiple of.
    """
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    group, context = parallel_state.get_tensor_model_parallel_group(), parallel_state.get_context_parallel_group()

    def loss_of(outputs: Outputs, batch: PackedBatch, given: ModelInput) -> tuple[torch.Tensor, torch.Tensor, Any]:
        logprobs, entropy = outputs
        outputs = whole(logprobs, given, context), None if entropy is None else whole(entropy, given, context)
        value, kept = loss(outputs, batch)
        # Megatron takes three values for a loss that it is to leave as it is; the middle one counts tokens.
        return value, torch.tensor(1, dtype=torch.int), kept

    def forward_step(batches: Iterator[PackedBatch], model: Any) -> tuple[Any, Callable[..., Any]]:
        batch = next(batches)
        given, batch = _on_device(ModelInput.of(batch, context, multiple)), _on_device(batch)
        if replay is not None:
            replay.set(given)
        needed = given.labels, batch.temperature, group, with_entropy, exact
        instead_of_logits = {"output_processor": _logprobs_of, "output_processor_context": needed}
        tokens, positions = given.tokens[None], given.position_ids[None]
        outputs = model(tokens, positions, None, packed_seq_params=_packed(given), **instead_of_logits)
        return outputs, partial(loss_of, batch=batch, given=given)

    kept = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(micro_batches),
        model=[model],
        num_microbatches=len(micro_batches),
        seq_length=max(len(b.tokens) for b in micro_batches),
        micro_batch_size=1,
        forward_only=forward_only,
    )
    if replay is not None:
        replay.finish(context)
    return kept


def _logprobs_of(
    *, hidden_states: torch.Tensor, output_layer: Any, output_weight: torch.Tensor | None, context: Any, **_: Any
) -> Outputs:
    """GPTModel's last step, in place of its logits: the log-probabilities of the labels in `context`."""
    labels, temperature, group, with_entropy, exact = context
    if exact and not torch.cuda.is_available():
        from fp8slurm.cpu import exact_layers

        weight = output_layer.weight if output_weight is None else output_weight
        return exact_layers.logprobs(
            lambda: output_layer(hidden_states, weight=output_weight)[0].squeeze(1),
            lambda logits: vocab_parallel_logprobs(logits, labels, group, with_entropy, temperature),
            hidden_states.squeeze(1), weight, labels, temperature, group,
        )  # fmt: skip
    logits, _bias = output_layer(hidden_states, weight=output_weight)
    logits = logits.squeeze(1)
    return vocab_parallel_logprobs(logits, labels, group, with_entropy, temperature, exact)


def _packed(given: ModelInput) -> Any:
    from megatron.core.packed_seq_params import PackedSeqParams

    ends, longest = given.cu_seqlens, given.longest
    sizes: dict[str, Any] = {
        "cu_seqlens_q": ends, "cu_seqlens_kv": ends, "max_seqlen_q": longest, "max_seqlen_kv": longest,
    }  # fmt: skip
    if given.gathered is not None:  # TransformerEngine asks for both; what pads a sequence is a part of it here
        sizes |= {"cu_seqlens_q_padded": ends, "cu_seqlens_kv_padded": ends, "pad_between_seqs": False}
    return PackedSeqParams(qkv_format="thd", **sizes)


def _on_device(batch: D) -> D:
    device = torch.cuda.current_device()
    values: dict[str, Any] = {f.name: getattr(batch, f.name) for f in fields(batch)}
    values |= {k: v.to(device) for k, v in values.items() if isinstance(v, torch.Tensor)}
    return type(batch)(**values)
