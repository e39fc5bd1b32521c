"""Megatron's grouped experts with the forward and backward passes of trainer/grouped.py (fp8.grouped = "deep_gemm").

The parameters, and with them checkpoints and weight updates, are those of TransformerEngine's grouped linears, which
are built and never called.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.transformer.moe.experts import TEGroupedMLP

from fp8slurm.trainer.grouped import Experts, Groups, Kernels, QuantizedWeights, stacked

Tensor = torch.Tensor


class GroupedMLP(TEGroupedMLP):
    """The experts of a rank. Quantized weights are made once and used for every micro-batch until `weights_changed`."""

    def __init__(self, *args: Any, kernels: Kernels, **named: Any) -> None:
        super().__init__(*args, **named)
        c = self.config
        assert c.gated_linear_unit and c.activation_func is torch.nn.functional.silu and not c.add_bias_linear
        self.kernels = kernels
        self._quantized: tuple[QuantizedWeights, QuantizedWeights] | None = None
        self._gradients: tuple[Tensor, Tensor, Tensor] | None = None
        """The gradient of the first matrix, by which another buffer is recognized, and the views into the buffer."""
        self._last_first = False

    def weights_changed(self) -> None:
        """Forget the quantized weights; to be called after every change of a parameter."""
        self._quantized = None

    def _weights(self) -> tuple[list[Any], list[Any]]:
        names = [f"weight{i}" for i in range(self.num_local_experts)]
        return [getattr(self.linear_fc1, n) for n in names], [getattr(self.linear_fc2, n) for n in names]

    def quantized(self) -> tuple[QuantizedWeights, QuantizedWeights]:
        """Layer.quantized."""
        if self._quantized is None:
            fc1, fc2 = ([w.detach() for w in weights] for weights in self._weights())
            self._quantized = self.kernels.quantize_weights(fc1), self.kernels.quantize_weights(fc2)
        return self._quantized

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Layer.gradients: views into Megatron's buffer, which has to be there."""
        first: Tensor = self.linear_fc1.weight0.main_grad
        if self._gradients is None or self._gradients[0] is not first:
            fc1, fc2 = (stacked([w.main_grad for w in weights]) for weights in self._weights())
            if fc1[1] != fc2[1]:
                raise RuntimeError("the gradients of gate and up lie in another order than those of down")
            self._gradients, self._last_first = (first, fc1[0], fc2[0]), fc1[1]
        return self._gradients[1:]

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor, **buffers: Any
    ) -> tuple[Tensor, None]:
        """x [rows, H], one expert's rows after another's, tokens_per_expert [experts] in host memory (the dispatcher
        has waited for it), probs [rows] -> y [rows, H], each row times its probability."""
        assert not any(b is not None for b in buffers.values()), buffers
        with_backward = torch.is_grad_enabled()
        if with_backward:
            self.gradients()  # for their order
        x = permuted_local_hidden_states
        groups = Groups.of(tokens_per_expert.tolist(), self._last_first, x.device)
        return Experts.apply(x.contiguous(), permuted_probs.float().contiguous(), groups, self, with_backward), None


def replace_experts(layer_spec: Any, kernels: Kernels) -> None:
    """Have a layer of Megatron's TransformerEngine specification build its experts as GroupedMLP."""
    experts = layer_spec.submodules.mlp.keywords["submodules"]
    assert experts.experts.func is TEGroupedMLP, experts.experts
    experts.experts = partial(GroupedMLP, kernels=kernels, **experts.experts.keywords)
