"""SGLang's block FP8 on the CPU: W8A8 emulated in SGLang's own formulas, and sampling from a seed.

Every patch answers one call of SGLang that has no CPU implementation (docs/patches.md); no other model code is
replaced."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from fp8slurm.core.errors import InputError
from fp8slurm.core.patches import note, patch, wrap
from fp8slurm.cpu import exact_engine
from fp8slurm.cpu.exact import Blocks, linear_fp8, weight_blocks
from fp8slurm.fp8 import BLOCK
from fp8slurm.fp8.block import E4M3, E4M3_MAX, BlockFP8
from fp8slurm.fp8.kv_cache import through_cache
from fp8slurm.fp8.reference import dequantize_reference


@functools.cache
def apply(exact: bool = False, fp8_cache: bool = False) -> None:
    """Patch SGLang in this process, once. RuntimeError where a GPU is in use: there the real kernels have to run.

    exact: with the trainer's bits (model.exact); fp8_cache: attention sees what an FP8 KV cache would give it."""
    if torch.cuda.is_available():
        raise RuntimeError("the FP8 emulation is for machines without a GPU")
    _allow_float32()
    _patch_linear(exact)
    if exact:
        exact_engine.apply()
    _patch_experts(exact)
    _patch_updates()
    _patch_routing()
    _patch_sampling()
    _part_batches()
    if fp8_cache:
        _quantize_cache()
    _map_files()


def fake_quantize_activations(x: torch.Tensor) -> torch.Tensor:
    """[.., K] -> fp32 [.., K]: the values that SGLang's dynamic activation quantization leaves, K a multiple of 128.

    Groups of 128 along K, scale = max(amax, 1e-10) / 448, code = e4m3(clamp(x / scale)), value = code * scale.
    Source: per_token_group_quant_fp8 in sglang/kernels/ops/quantization/fp8_kernel.py.
    """
    groups = x.to(torch.float32).unflatten(-1, (-1, BLOCK))
    scale = groups.abs().amax(-1, keepdim=True).clamp_(min=1e-10).div_(E4M3_MAX)
    codes = groups.div(scale).clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3)
    return codes.to(torch.float32).mul_(scale).flatten(-2)


def _kept(layer: torch.nn.Module, weight: str, make: Callable[[torch.Tensor, torch.Tensor], Any]) -> Any:
    """make(codes, scales) of a block-FP8 parameter, kept on the layer until its weights change.

    SGLang's loaders write through `.data`, which tensor versions do not see, so a load ends in `_loaded`, which raises
    `fp8_loads`; the versions cover writes to the parameter itself.
    """
    codes, scales = getattr(layer, weight), getattr(layer, f"{weight}_scale_inv")
    key = (layer.__dict__.get("fp8_loads", 0), codes._version, scales._version)
    cache = layer.__dict__.setdefault("fp8_values", {})
    if cache.get(weight, (None, None))[0] != key:
        cache[weight] = (key, make(codes.data, scales.data))
    return cache[weight][1]


def _values(layer: torch.nn.Module, weight: str, block: list[int]) -> torch.Tensor:
    """fp32 values of a block-FP8 parameter, [N, K] or [E, N, K]."""

    def decoded(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        pairs = [(codes, scales)] if codes.dim() == 2 else list(zip(codes, scales))
        values = [dequantize_reference(BlockFP8(c, s, (block[0], block[1]))) for c, s in pairs]
        return values[0] if codes.dim() == 2 else torch.stack(values)

    return _kept(layer, weight, decoded)


def _blocks_of_experts(codes: torch.Tensor, scales: torch.Tensor) -> list[Blocks]:
    """Of a mixture's parameter, [E, N, K] and [E, N / 128, K / 128]: one for each expert."""
    return [weight_blocks(c, s) for c, s in zip(codes, scales, strict=True)]


def _loaded(layer: torch.nn.Module) -> None:
    """Forget the values of a layer whose weights were loaded."""
    layer.__dict__["fp8_loads"] = layer.__dict__.get("fp8_loads", 0) + 1


def _block_size(method: Any) -> list[int]:
    if not method.block_quant or method.use_mxfp8 or method.weight_block_size[1] != BLOCK:
        raise InputError(
            f"on the CPU the engine emulates FP8 in blocks of [N, {BLOCK}] with fp32 scales; this checkpoint's "
            f"quantization_config has weight_block_size {method.weight_block_size}"
        )
    return method.weight_block_size


def _allow_float32() -> None:
    from sglang.srt.layers.quantization.fp8 import Fp8Config

    # answers the loader's check: its kernels take 16-bit activations, the emulation takes fp32 as well
    dtypes = [torch.bfloat16, torch.float16, torch.float32]
    patch(Fp8Config, "get_supported_act_dtypes", classmethod(lambda cls: dtypes))


def _patch_linear(exact: bool) -> None:
    from sglang.srt.layers.quantization.fp8 import Fp8LinearMethod

    def forward(self: Any, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        # answers torch.ops.sgl_kernel.fp8_scaled_mm_cpu (AMX only, and weights only): products summed in fp32
        block = _block_size(self)
        if exact:
            assert bias is None and block == [BLOCK, BLOCK]
            return linear_fp8(x, _kept(layer, "weight", weight_blocks))
        output = F.linear(fake_quantize_activations(x), _values(layer, "weight", block)).to(x.dtype)
        return output if bias is None else output + bias  # rounded before, as by SGLang's block products

    def process(self: Any, layer: torch.nn.Module) -> None:
        # answers the AMX repacking: codes and scales stay as loaded, so that they can be loaded again
        _block_size(self)
        _loaded(layer)

    patch(Fp8LinearMethod, "apply", forward)
    patch(Fp8LinearMethod, "process_weights_after_loading", process)


def _patch_experts(exact: bool) -> None:
    from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput
    from sglang.srt.layers.quantization.fp8 import Fp8MoEMethod

    def forward(self: Any, layer: torch.nn.Module, dispatch_output: Any) -> Any:
        # answers torch.ops.sgl_kernel.fused_experts_cpu (AMX only); rounds where SGLang's fused Triton kernel rounds
        config = self.moe_runner_config
        if config.activation != "silu" or config.apply_router_weight_on_input:
            raise NotImplementedError("on the CPU FP8 experts are SwiGLU with the router's weights on the output")
        x = dispatch_output.hidden_states
        if exact:
            assert _block_size(self) == [BLOCK, BLOCK]
            weights, chosen, _ = dispatch_output.topk_output
            blocks = (_kept(layer, name, _blocks_of_experts) for name in ("w13_weight", "w2_weight"))
            return StandardCombineInput(hidden_states=exact_engine.experts(x, chosen, weights, *blocks))
        gate_up, down = (_values(layer, name, _block_size(self)) for name in ("w13_weight", "w2_weight"))
        router_weights, expert_ids, _ = dispatch_output.topk_output
        inputs, output = fake_quantize_activations(x), torch.zeros(x.shape, dtype=torch.float32)
        for expert in expert_ids.unique().tolist():
            if expert < 0:  # not on this rank
                continue
            token, choice = (expert_ids == expert).nonzero(as_tuple=True)
            gate, up = F.linear(inputs[token], gate_up[expert]).to(x.dtype).float().chunk(2, dim=-1)
            hidden = fake_quantize_activations((F.silu(gate) * up).to(x.dtype))
            routed = F.linear(hidden, down[expert]) * router_weights[token, choice].float().unsqueeze(-1)
            output.index_add_(0, token, routed.to(x.dtype).float())
        return StandardCombineInput(hidden_states=output.to(x.dtype))

    def process(self: Any, layer: torch.nn.Module) -> None:
        # answers the AMX repacking of the experts
        _block_size(self)
        _loaded(layer)

    patch(Fp8MoEMethod, "apply", forward)
    patch(Fp8MoEMethod, "process_weights_after_loading", process)


def _patch_updates() -> None:
    """Values kept of the old weights go with every bucket: servers without update sessions post-process nothing."""
    from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater

    def update(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        for layer in self.get_model().modules():
            if "fp8_values" in layer.__dict__:
                _loaded(layer)
        return result

    for name in ("load_weights_from_distributed", "update_weights_from_distributed", "update_weights_from_tensor"):
        if hasattr(WeightUpdater, name):
            wrap(WeightUpdater, name)(update)


def _patch_routing() -> None:
    """SGLang keeps the experts of every token in host memory that it registers with CUDA: here it is only allocated."""
    try:
        from sglang.srt.mem_cache.pool_host.common import ALLOC_MEMORY_FUNCS
    except ModuleNotFoundError:  # a server without them refuses --enable-return-routed-experts by itself
        return

    def allocate(dims: tuple[int, ...], dtype: torch.dtype, device: str, allocator: Any, **_: Any) -> torch.Tensor:
        return allocator.allocate(dims, dtype=dtype, device=device)

    ALLOC_MEMORY_FUNCS["cpu"] = allocate
    note("sglang.srt.mem_cache.pool_host.common.ALLOC_MEMORY_FUNCS")


def _patch_sampling() -> None:
    """Requests with a sampling_seed draw the same tokens in every run.

    SGLang honours the seed only under --enable-deterministic-inference, which refuses the CPU's attention backend,
    and draws by a hash kernel that its CPU build lacks, inside torch.compile.
    """
    from sglang.srt.layers import sampler
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

    original = SamplingBatchInfo.from_schedule_batch

    def from_schedule_batch(batch: Any, vocab_size: int) -> Any:
        info = original(batch, vocab_size)
        # every row needs a seed once one has: batches are merged row by row
        for request in batch.reqs:
            if request.sampling_params.sampling_seed is None:
                request.sampling_params.sampling_seed = int(torch.randint(2**62, ()))
        info.sampling_seed = torch.tensor([r.sampling_params.sampling_seed for r in batch.reqs], dtype=torch.int64)
        return info

    patch(SamplingBatchInfo, "from_schedule_batch", staticmethod(from_schedule_batch))
    # answers multinomial_with_seed, called by name by all samplers of that module
    patch(sampler, "multinomial_with_seed", multinomial_with_seed)


def _part_batches() -> None:
    """Requests that have finished leave before others join them.

    SGLang drops them at the next decode. Where new requests come before that the batches are merged first, and the
    finished ones hand on how they were sampled: behind greedy ones (evaluation) all others go through top-k sampling,
    which draws other tokens from the same seeds. Whether that happens depends on microseconds."""
    from sglang.srt.managers.scheduler import Scheduler

    @wrap(Scheduler, "get_next_batch_to_run")
    def get_next_batch_to_run(original: Any, self: Any, running_batch: Any, last_batch: Any) -> Any:
        if running_batch.reqs and all(request.finished() for request in running_batch.reqs):
            running_batch.filter_batch()
            running_batch.batch_is_full = False
        return original(self, running_batch, last_batch)


def _quantize_cache() -> None:
    """Queries, keys and values as FlashAttention 3 has them with an FP8 cache, in a cache of the engine's dtype: powers
    of two as scales make that the same values. What is not emulated: FlashAttention rounds probabilities to e4m3 too.
    """
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    one = torch.tensor(1.0)

    def forward(original: Any, self: Any, q: Any, k: Any, v: Any, layer: Any, *args: Any, **kwargs: Any) -> Any:
        scales = (one, layer.k_scale, layer.v_scale)
        q, k, v = (through_cache(x, scale) for x, scale in zip((q, k, v), scales))
        return original(self, q, k, v, layer, *args, **kwargs)

    for name in ("forward_extend", "forward_decode"):
        wrap(TorchNativeAttnBackend, name)(forward)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finalizer on int64 (Steele et al. 2014), with logical shifts."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & (2**37 - 1))) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & (2**33 - 1))


def multinomial_with_seed(logprobs: torch.Tensor, seed: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Draw one column for every row by the Gumbel trick; the noise is a hash of (seed, position, column).

    logprobs [B, V] (any float, -inf allowed), seed int64 [B], positions int [B] -> int64 [B, 1].
    """
    columns = torch.arange(logprobs.shape[1], dtype=torch.int64)
    row = _mix(_mix(seed.to(torch.int64)) + positions.to(torch.int64))
    noise = _mix(row.unsqueeze(1) + columns * -0x61C8864680B583EB)
    uniform = (((noise >> 11) & (2**53 - 1)).to(torch.float64) + 0.5) * 2.0**-53
    return (logprobs.to(torch.float64) - uniform.log_().neg_().log_()).argmax(dim=1, keepdim=True)


def _map_files() -> None:
    """Weights in a file that a training rank shares (sync/mapped.py), where a GPU would have a handle of its memory."""
    from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater

    @wrap(WeightUpdater, "_update_weights_from_flattened_bucket")
    def update(original: Any, self: Any, flattened_tensor_bucket_dict: dict[str, Any]) -> Any:
        where, specs = flattened_tensor_bucket_dict["flattened_tensor"], flattened_tensor_bucket_dict["metadata"]
        if isinstance(where, str):
            size = max(s.end_idx for s in specs)
            mapped = torch.from_file(where, shared=True, size=size, dtype=torch.uint8)
            flattened_tensor_bucket_dict = {"flattened_tensor": mapped, "metadata": specs}
        return original(self, flattened_tensor_bucket_dict)
