"""What an engine in block FP8 has to compute: transformers with dequantized weights and quantized activations."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fp8slurm.fp8.block import BlockFP8
from fp8slurm.fp8.reference import dequantize_reference


def quantized_values(x: torch.Tensor) -> torch.Tensor:
    """SGLang's dynamic activation quantization, written down once more."""
    groups = x.float().view(*x.shape[:-1], -1, 128)
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448
    return ((groups / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale).view(x.shape)


def reference(folder: Path, tensors: dict[str, torch.Tensor], activations: bool = True) -> torch.nn.Module:
    """transformers' model with the dequantized weights, in FP32.

    folder: for its config.json. tensors: by Hugging Face name, X.weight_scale_inv beside the X.weight in FP8.
    activations: whether the inputs of quantized layers are quantized and dequantized too.
    """
    config = AutoConfig.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config).eval()
    values = {}
    for name, tensor in tensors.items():
        if f"{name}_scale_inv" in tensors:
            values[name] = dequantize_reference(BlockFP8(tensor, tensors[f"{name}_scale_inv"]))
        elif not name.endswith("_scale_inv"):
            values[name] = tensor.float()
    seen = quantized_values if activations else lambda x: x
    if config.model_type == "qwen3_moe":
        for i, layer in enumerate(model.model.layers):
            layer.mlp.forward = lambda x, i=i: _experts(x, values, f"model.layers.{i}.mlp.", config, seen)
        for name, tensor in values.items():
            if ".mlp." not in name:
                model.get_parameter(name).data.copy_(tensor)
    else:
        model.load_state_dict(values, strict=False)
    for name, module in model.named_modules():
        if f"{name}.weight_scale_inv" in tensors:
            module.register_forward_pre_hook(lambda _, args: (seen(args[0]),))
    return model


def _experts(x: torch.Tensor, values: dict[str, torch.Tensor], prefix: str, config, seen) -> torch.Tensor:
    tokens = x.reshape(-1, x.shape[-1])
    router = torch.softmax(tokens @ values[f"{prefix}gate.weight"].T, -1)
    weights, chosen = router.topk(config.num_experts_per_tok)
    weights = weights / weights.sum(-1, keepdim=True)
    out = torch.zeros_like(tokens)
    for t in range(tokens.shape[0]):
        for weight, expert in zip(weights[t], chosen[t].tolist()):
            gate, up, down = (values[f"{prefix}experts.{expert}.{part}_proj.weight"] for part in ("gate", "up", "down"))
            row = seen(tokens[t : t + 1])
            hidden = torch.nn.functional.silu(row @ gate.T) * (row @ up.T)
            out[t] += weight * (seen(hidden) @ down.T)[0]
    return out.view(x.shape)
