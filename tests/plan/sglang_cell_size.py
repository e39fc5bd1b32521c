"""SGLang's own bytes of a token in the KV cache, printed as {folder: {tp: {engine.kv_cache: bytes}}}: sglang_cell_size.py FOLDER ..."""

import json
import os
import sys
from types import SimpleNamespace

os.environ["SGLANG_USE_CPU_ENGINE"] = "1"

from fp8slurm.cpu import sglang_stubs

sglang_stubs.install()

import torch
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.model_executor import pool_configurator

POOL = pool_configurator.DefaultPoolConfigurator


CACHES = {"auto": ("bfloat16", torch.bfloat16), "fp8": ("fp8_e4m3", torch.float8_e4m3fn)}


def cell_size(model: ModelConfig, tensor_parallel_size: int, name: str, dtype: torch.dtype) -> int:
    pool_configurator.get_parallel = lambda: SimpleNamespace(attn_tp_size=tensor_parallel_size, attn_dcp_size=1)
    pool = SimpleNamespace(kv_cache_dtype_str=name, _compute_qsa_cell_size=POOL._compute_qsa_cell_size)
    cache = SimpleNamespace(
        model_config=model,
        kv_cache_dtype=dtype,
        use_mla_backend=False,
        server_args=SimpleNamespace(enable_hisparse=True),
    )
    return int(POOL._compute_cell_size(pool, cache, model.num_hidden_layers))


if __name__ == "__main__":
    models = {folder: ModelConfig(model_path=folder) for folder in sys.argv[1:]}
    found = {
        f: {tp: {kind: cell_size(m, tp, *cache) for kind, cache in CACHES.items()} for tp in (1, 2, 4, 8)}
        for f, m in models.items()
    }
    print(json.dumps(found))
