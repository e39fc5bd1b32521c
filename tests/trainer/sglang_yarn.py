"""SGLang's tables of models' rotary embeddings, fp32 (cos, sin) [positions, d], by the folders' names:
sglang_yarn.py OUT.safetensors FOLDER ..."""

import os
import sys
from pathlib import Path

os.environ["SGLANG_USE_CPU_ENGINE"] = "1"

from fp8slurm.cpu import sglang_stubs

sglang_stubs.install()

import torch
from safetensors.torch import save_file
from sglang.srt.layers.rotary_embedding import get_rope
from transformers import AutoConfig

tables = {}
for folder in sys.argv[2:]:
    config = AutoConfig.from_pretrained(folder)
    rope = get_rope(  # as its models/qwen3.py and models/qwen2.py call it
        config.head_dim,
        rotary_dim=config.head_dim,
        max_position=config.max_position_embeddings,
        base=config.rope_parameters["rope_theta"],
        rope_scaling=config.rope_parameters,
        dtype=torch.float32,
    )
    tables[Path(folder).name] = rope.cos_sin_cache.float().clone()  # SGLang keeps one for equal arguments
save_file(tables, sys.argv[1])
