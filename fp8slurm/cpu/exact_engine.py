"""SGLang's modules where model.exact is on: the values of cpu/exact.py, as the trainer has them (cpu/exact_layers.py).

On top of cpu/sglang_plugin.py, whose FP8 products take the exact form there."""

from __future__ import annotations

from typing import Any

import torch

from fp8slurm.core.patches import patch, wrap
from fp8slurm.cpu import exact


def apply() -> None:
    """Patch SGLang in this process."""
    _norms()
    _activation()
    _router()
    _rotary()
    _attention()
    _head()
    _logprobs()


def _norms() -> None:
    from sglang.srt.layers.layernorm import RMSNorm

    def forward(
        self: Any, x: torch.Tensor, residual: torch.Tensor | None = None, post_residual_addition: Any = None, **_: Any
    ) -> Any:
        # the trainer rounds the sum before it normalizes it
        assert post_residual_addition is None and self.variance_size_override is None
        if residual is None:
            return exact.rms_norm(x, self.weight, self.variance_epsilon)
        total = x + residual
        return exact.rms_norm(total, self.weight, self.variance_epsilon), total

    patch(RMSNorm, "forward", forward)


def _activation() -> None:
    from sglang.srt.layers.activation import SiluAndMul

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return exact.silu(gate) * up

    patch(SiluAndMul, "forward", forward)


def _router() -> None:
    from sglang.srt.layers.moe import topk
    from sglang.srt.models.qwen3_moe import Qwen3MoeSparseMoeBlock

    def forward(self: Any, hidden_states: torch.Tensor, *_: Any) -> torch.Tensor:
        # SGLang rounds the logits to BF16
        logits = exact.linear(hidden_states.float(), self.gate.weight)
        return self.experts(hidden_states, self.topk(hidden_states, logits))

    def choose(
        hidden_states: torch.Tensor, gating_output: torch.Tensor, topk: int, renormalize: bool,
        correction_bias: Any = None, scoring_func: str = "softmax",
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        assert correction_bias is None and scoring_func == "softmax"
        experts = exact.top_experts(gating_output, topk)
        return exact.expert_weights(gating_output, experts, renormalize), experts.int()

    patch(Qwen3MoeSparseMoeBlock, "forward_normal", forward)
    patch(topk, "fused_topk_native", choose)


def experts(
    x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, gate_up: list[exact.Blocks], down: list[exact.Blocks]
) -> torch.Tensor:
    """A mixture's experts, all of them here: x [T, H], chosen int [T, k] ascending, weights fp32 [T, k] -> [T, H]."""
    outputs = x.new_empty(*chosen.shape, x.shape[-1])
    for expert in chosen.unique().tolist():
        token, slot = (chosen == expert).nonzero(as_tuple=True)
        gate, up = exact.linear_fp8(x[token], gate_up[expert]).chunk(2, dim=-1)
        outputs[token, slot] = exact.linear_fp8(exact.silu(gate) * up, down[expert])
    return exact.combine(outputs, weights)


def _rotary() -> None:
    from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding

    def forward(
        self: Any, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.is_neox_style and self.rotary_dim == self.head_size
        table = exact.rotation(self.base, self.head_size, int(positions.max()) + 1)[positions]
        q, k = (exact.rotate(x.view(len(positions), -1, self.head_size), table).view(x.shape) for x in (query, key))
        return q, k

    patch(RotaryEmbedding, "forward", forward)


def _attention() -> None:
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    def extend(
        self: Any, query: torch.Tensor, output: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
        req_to_token: torch.Tensor, req_pool_indices: torch.Tensor, seq_lens: torch.Tensor,
        extend_prefix_lens: torch.Tensor, extend_seq_lens: torch.Tensor, *_: Any, **__: Any,
    ) -> torch.Tensor:  # fmt: skip
        longest = int(extend_seq_lens.max())
        column = torch.arange(longest)
        there = column[None] < extend_seq_lens[:, None]  # tokens stand sequence by sequence
        queries = query.new_zeros((len(seq_lens), longest, *query.shape[1:]))
        queries[there] = query
        positions = extend_prefix_lens[:, None] + column
        output[:] = attend(queries, positions, k_cache, v_cache, req_to_token[req_pool_indices], seq_lens)[there]
        return output

    def decode(
        self: Any, query: torch.Tensor, output: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
        req_to_token: torch.Tensor, req_pool_indices: torch.Tensor, seq_lens: torch.Tensor, *_: Any, **__: Any,
    ) -> torch.Tensor:  # fmt: skip
        positions = (seq_lens - 1)[:, None]
        slots = req_to_token[req_pool_indices]
        output[:] = attend(query[:, None], positions, k_cache, v_cache, slots, seq_lens)[:, 0]
        return output

    def attend(
        queries: torch.Tensor, positions: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
        slots: torch.Tensor, seq_lens: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        length = int(seq_lens.max())
        slots = slots[:, :length].long()
        behind = torch.arange(length)[None] >= seq_lens[:, None]  # slots of other requests, or of none
        k, v = (cache[slots].masked_fill_(behind[:, :, None, None], 0.0) for cache in (k_cache, v_cache))
        return exact.attention(queries, k, v, positions.long())

    # answer torch's scaled_dot_product_attention, one sequence after the other: its bits follow the length
    patch(TorchNativeAttnBackend, "_run_sdpa_forward_extend", extend)
    patch(TorchNativeAttnBackend, "_run_sdpa_forward_decode", decode)


def _head() -> None:
    from sglang.srt.layers.logits_processor import LogitsProcessor

    def head(self: Any, hidden_states: torch.Tensor, lm_head: Any, embedding_bias: Any = None) -> torch.Tensor:
        assert embedding_bias is None
        return exact.linear(hidden_states, lm_head.weight)

    patch(LogitsProcessor, "_compute_lm_head", head)


def _logprobs() -> None:
    from sglang.srt.layers.sampler import Sampler

    @wrap(Sampler, "forward")
    def forward(original: Any, self: Any, output: Any, info: Any, return_logprob: bool, *args: Any, **kw: Any) -> Any:
        """SGLang's sampling as it is; the reported log-probability is of logits / temperature, whatever it is."""
        logits = output.next_token_logits.clone() if return_logprob else None  # SGLang works in place
        chosen = original(self, output, info, return_logprob, *args, **kw)
        if logits is not None:
            output.next_token_logprobs = exact.logprobs(logits, chosen.long(), info.temperatures.flatten())
        return chosen
