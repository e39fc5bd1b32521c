"""What makes an engine on a GPU say the trainer's bits, for runs with model.exact (docs/exact.md).

Three things of SGLang's give other bits when it decodes than when it prefills, or than the trainer: FlashAttention 3
cuts long sequences into splits when it decodes, the activation quantizer divides approximately, and log-probabilities
are the logarithm of a softmax. All else is the trainer's already, or the trainer calls it (trainer/exact_cuda.py)."""

from __future__ import annotations

from typing import Any

import torch

from fp8slurm.core.patches import patch, wrap
from fp8slurm.fp8 import BLOCK


def apply() -> None:
    """Patch SGLang in a scheduler's process on a GPU."""
    _one_split()
    _quantize_as_the_trainer()
    _log_softmax()


def _one_split() -> None:
    """A row's sum over the keys in one order: with splits it depends on the batch and on its neighbours' lengths."""
    from sglang.srt.layers.attention.flashattention_backend import FlashAttentionBackend

    @wrap(FlashAttentionBackend, "__init__")
    def init(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        assert self.fa_impl_ver == 3, f"FlashAttention {self.fa_impl_ver}; allowed with model.exact: 3"
        self.num_splits = self.decode_num_splits = 1


def _quantize_as_the_trainer() -> None:
    """Before every product: two divisions rounded to nearest, TransformerEngine's codes and scales."""
    from sglang.srt.layers.quantization import fp8_utils
    from sglang.srt.utils.custom_op import register_custom_op

    from fp8slurm.fp8.triton_activations import empty_outputs, quantize_into

    @register_custom_op(op_name="fp8slurm_quantize_rows", mutates_args=["codes", "scale_inv"])
    def quantize_rows(x: torch.Tensor, codes: torch.Tensor, scale_inv: torch.Tensor) -> None:
        quantize_into(x, codes, scale_inv)

    def quantize(
        x: torch.Tensor, group_size: int, eps: float = 1e-10, column_major_scales: bool = False,
        scale_tma_aligned: bool = False, scale_ue8m0: bool = False, **others: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        assert group_size == BLOCK and column_major_scales and scale_tma_aligned and not scale_ue8m0 and not others
        codes, scale_inv = empty_outputs(x)
        quantize_rows(x, codes, scale_inv)
        return codes, scale_inv

    patch(fp8_utils, "sglang_per_token_group_quant_fp8", quantize)


def _log_softmax() -> None:
    """The branch that SGLang's sampler has for deterministic inference, the rest of which changes norms and is not
    wanted: log_softmax(logits / temperature) instead of the logarithm of a softmax."""
    from sglang.srt.layers.sampler import Sampler

    @wrap(Sampler, "__init__")
    def init(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.enable_deterministic = True
