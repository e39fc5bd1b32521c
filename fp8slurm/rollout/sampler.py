"""Prompts in, sample groups out: what the rollout worker and the evaluation share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fp8slurm.config import RunConfig
from fp8slurm.core.types import Prompt, Sample, SampleGroup
from fp8slurm.data.prompts import end_token_ids, load_tokenizer, sample_seed
from fp8slurm.engine.client import GenerateRequest, Generation
from fp8slurm.models.spec import ModelSpec

Generate = Callable[[list[GenerateRequest]], list[Generation]]


@dataclass
class Sampler:
    """Turns prompts into requests and answers into samples."""

    config: RunConfig
    tokenizer: Any
    stop_ids: list[int]

    @classmethod
    def load(cls, config: RunConfig) -> Sampler:
        """Tokenizer and end tokens of model.hf_checkpoint. All of its end tokens stop a sample."""
        assert config.model.hf_checkpoint is not None
        folder = Path(config.model.hf_checkpoint)
        tokenizer = load_tokenizer(folder)
        return cls(config, tokenizer, sorted({*end_token_ids(folder, tokenizer), *config.rollout.stop_token_ids}))

    def sample(
        self, generate: Generate, prompts: list[tuple[int, Prompt]], n: int, max_tokens: int, temperature: float,
        routing: bool = False,
    ) -> list[SampleGroup]:  # fmt: skip
        """n samples for every (position, prompt); the position, unique in a run, makes the seed.

        `routing`: with the experts of every token. RuntimeError where the engine does not return them.
        """
        r = self.config.rollout
        requests = [
            GenerateRequest(
                list(prompt.token_ids), max_tokens, temperature, r.top_p, r.top_k, self.stop_ids,
                seed=sample_seed(self.config.run.seed, position, k), routing=routing,
            )
            for position, prompt in prompts
            for k in range(n)
        ]  # fmt: skip
        if not requests:
            return []
        done = generate(requests)
        texts = self.tokenizer.batch_decode([self._without_end(g.token_ids) for g in done])
        samples = [
            Sample(g.token_ids, g.logprobs, g.weight_versions, g.finish_reason, text)
            for g, text in zip(done, texts, strict=True)
        ]
        if routing:
            assert self.config.model.hf_checkpoint is not None
            spec = ModelSpec.from_hf_dir(self.config.model.hf_checkpoint)
            for sample, request, g in zip(samples, requests, done, strict=True):
                sample.routing = routing_of(g, len(request.token_ids), spec)
        return [SampleGroup(prompt, samples[i * n : (i + 1) * n]) for i, (_, prompt) in enumerate(prompts)]

    def _without_end(self, ids: list[int]) -> list[int]:
        return ids[:-1] if ids and ids[-1] in self.stop_ids else ids


def routing_of(generation: Generation, prompt_tokens: int, spec: ModelSpec) -> torch.Tensor:
    """The experts of every token but the last: uint8 (int16 above 256 experts) [tokens - 1, layers, k].

    RuntimeError where the engine returned none, or those of another number of tokens.
    """
    tokens = prompt_tokens + len(generation.token_ids) - 1
    shape = (tokens, spec.num_layers, spec.experts_per_token)
    if generation.routing is None:
        raise RuntimeError("rollout.routing_replay: the engine returned no experts with a sample")
    if generation.routing.size != math.prod(shape):
        raise RuntimeError(
            f"rollout.routing_replay: the engine returned {generation.routing.size} experts for {tokens} tokens of "
            f"{spec.num_layers} layers with {spec.experts_per_token} experts each; {math.prod(shape)} were expected"
        )
    small = np.uint8 if spec.num_experts <= 256 else np.int16
    return torch.from_numpy(generation.routing.reshape(shape).astype(small))
