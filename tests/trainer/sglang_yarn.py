"""SGLang's table of a Qwen3's rotary embedding, fp32 (cos, sin) [positions, d]: sglang_yarn.py FOLDER OUT.safetensors."""

import os
import sys

os.environ["SGLANG_USE_CPU_ENGINE"] = "1"

from fp8slurm.cpu import sglang_stubs

sglang_stubs.install()

import torch
from safetensors.torch import save_file
from sglang.srt.layers.rotary_embedding import get_rope
from transformers import AutoConfig

folder, out = sys.argv[1:]
config = AutoConfig.from_pretrained(folder)
rope = get_rope(  # as its models/qwen3.py calls it
    config.head_dim,
    rotary_dim=config.head_dim,
    max_position=config.max_position_embeddings,
    base=config.rope_parameters["rope_theta"],
    rope_scaling=config.rope_parameters,
    dtype=torch.float32,
)
save_file({"table": rope.cos_sin_cache.float().contiguous()}, out)
