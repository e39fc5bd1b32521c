"""An engine with an FP8 KV cache: its scales are part of every update, and what it computes follows them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from patch_list import check_replaced, rows
from safetensors.torch import save_file

from fp8slurm.config.schema import EngineSection
from fp8slurm.engine.child import PATCHED
from fp8slurm.engine.client import EngineClient
from fp8slurm.engine.server import Engine, EngineError, EngineSettings
from fp8slurm.sync.bucket import WeightBucket, layout, payload_bytes
from fp8slurm.sync.engine_link import EngineLink

pytestmark = pytest.mark.slow

SECTION = EngineSection(max_total_tokens=4096, context_length=512, ready_timeout_s=120, kv_cache="fp8")
TEXT = [[(7 * i + j * j) % 300 for j in range(40)] for i in range(4)]


def buckets(tensors: dict[str, torch.Tensor], version: int, k_scale: float, v_scale: float) -> list[WeightBucket]:
    """An update as the trainer's stream would send it: scales in FP32, beside the weights."""
    layers = {name.split(".")[2] for name in tensors if name.startswith("model.layers.")}
    scales = {
        f"model.layers.{n}.self_attn.{x}_scale": torch.tensor([s])
        for n in sorted(layers)
        for x, s in (("k", k_scale), ("v", v_scale))
    }
    made = []
    for specs in layout([[(n, t.dtype, tuple(t.shape))] for n, t in (tensors | scales).items()], 400_000):
        made.append(WeightBucket(version, specs, torch.empty(payload_bytes(specs), dtype=torch.uint8)))
        for name, view in made[-1].views():
            view.copy_((tensors | scales)[name])
    return made


@pytest.mark.parametrize("family", ["qwen3", "qwen2"])
def test_an_update_brings_scales_and_outputs_follow_them(tmp_path: Path, write_fp8_model, family: str) -> None:
    """Qwen3's attention has no scales in SGLang, Qwen2's has."""
    tensors = write_fp8_model(tmp_path / "model", 1, family=family)
    in_folder = {f"model.layers.{n}.self_attn.{x}_scale": torch.tensor([0.01]) for n in range(2) for x in "kv"}
    save_file(tensors | in_folder, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    engine = Engine(tmp_path / "model", tmp_path, EngineSettings(SECTION, cpu=True, cpu_threads=1))
    engine.start()
    try:
        engine.wait_ready()
        line = next(line for line in engine.log_path.read_text().splitlines() if line.startswith(PATCHED))
        replaced = line.removeprefix(PATCHED).split()
        check_replaced("SGLang's processes", replaced, "CPU")
        mine = {n for names, where in rows("SGLang's processes") for n in names if "fp8" in where and "CPU" in where}
        assert len(mine) == 3 and mine <= set(replaced)
        client = EngineClient(engine.url, engine.api_key, timeout_s=60)
        loaded = client.score(TEXT)
        link = EngineLink(client, 1)
        link.open()

        def after(version: int, k_scale: float, v_scale: float) -> list[list[float]]:
            link.update(version, buckets(tensors, version, k_scale, v_scale), verify=True)
            return client.score(TEXT)

        unit = after(1, 1.0, 1.0)
        assert client.score(TEXT) == unit
        assert after(2, 2.0**-6, 2.0**-6) != unit  # the smallest are no longer subnormal
        assert client.score(TEXT) == loaded, "0.01 of the folder, rounded up"
        coarse = after(3, 2.0**14, 1.0)  # keys are all cut to 0: attention is a mean
        assert coarse != unit and coarse != after(4, 1.0, 2.0**14)
        assert after(5, 1.0, 1.0) == unit
        assert client.recorded() == [[4] * len(buckets(tensors, 5, 1.0, 1.0))], "scales are copied with the rest"
        digests = client.digest()[0]
        assert digests["model.layers.0.self_attn.attn.k_scale"] == digests["model.layers.1.self_attn.attn.v_scale"]
        with pytest.raises(EngineError, match=r"attn\.k_scale on the engine's rank 0 differs"):
            link.verify(buckets(tensors, 5, 2.0, 1.0))
    finally:
        engine.stop()
