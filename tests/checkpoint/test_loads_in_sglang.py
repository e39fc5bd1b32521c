"""Folders that hf_to_fp8 made, in a real SGLang server: it serves what quantizing the BF16 weights has to give."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_folders
import torch
from safetensors.torch import load_file
from w8a8_reference import reference

from fp8slurm.config.schema import EngineSection
from fp8slurm.engine.client import EngineClient
from fp8slurm.engine.server import Engine, EngineSettings
from fp8slurm.fp8.policy import decide
from fp8slurm.fp8.reference import quantize_reference

pytestmark = pytest.mark.slow
SETTINGS = EngineSettings(
    EngineSection(
        max_running_requests=16, max_total_tokens=2048, context_length=64, dtype="float32", ready_timeout_s=120
    ),
    cpu=True,
    cpu_threads=1,
)


def quantized(bf16: Path) -> dict[str, torch.Tensor]:
    """A BF16 folder's tensors, quantized here by the plain reference."""
    tensors = load_file(bf16 / "model.safetensors")
    for name, w in list(tensors.items()):
        if decide(name, w.shape).quantize:
            q = quantize_reference(w)
            tensors[name], tensors[f"{name}_scale_inv"] = q.data, q.scale_inv
    return tensors


def logprobs(model: torch.nn.Module, sequences: list[list[int]]) -> torch.Tensor:
    """Log-probability of every token after the first, all sequences one after another."""
    values = []
    for ids in map(torch.tensor, sequences):
        with torch.no_grad():
            logits = model(ids[None]).logits[0].float()
        values.append(torch.log_softmax(logits[:-1], -1).gather(1, ids[1:, None])[:, 0])
    return torch.cat(values)


KINDS = {
    "dense, tied": {},
    # SGLang does not tie the embeddings of a Qwen3-MoE
    "experts, untied": {"moe": True, "tie": False},
    "qwen2": {"tie": False} | tiny_folders.QWEN2,
    "llama": tiny_folders.LLAMA,
}


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_dequantized_weights(tmp_path: Path, kind: str) -> None:
    bf16, fp8 = tiny_folders.make_fp8(tmp_path, seed=3, **KINDS[kind])
    g = torch.Generator().manual_seed(5)
    vocabulary = tiny_folders.CONFIG["vocab_size"]
    sequences = [torch.randint(vocabulary, (8 + 3 * i,), generator=g).tolist() for i in range(12)]
    engine = Engine(fp8, tmp_path / "log", SETTINGS)
    try:
        engine.start()
        engine.wait_ready()
        client = EngineClient(engine.url, engine.api_key, timeout_s=60)
        scores = torch.tensor([value for score in client.score(sequences) for value in score])
    finally:
        engine.stop()

    tensors = quantized(bf16)
    emulated, weights_only = ((scores - logprobs(reference(fp8, tensors, on), sequences)).abs() for on in (True, False))
    # as in tests/engine/test_generation.py: few tokens meet a code that flips at a rounding boundary
    assert emulated.median() < 2e-5, emulated
    assert weights_only.median() > 20 * emulated.median()
    assert weights_only.mean() > 5 * emulated.mean()
