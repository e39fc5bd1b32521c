"""Prompts in, sample groups out: what the rollout worker and the evaluation share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fp8slurm.config import RunConfig
from fp8slurm.core.types import Prompt, Sample, SampleGroup
from fp8slurm.data.prompts import end_token_ids, load_tokenizer, sample_seed
from fp8slurm.engine.client import GenerateRequest, Generation
from fp8slurm.models.spec import ModelSpec
from fp8slurm.sessions.runner import Asked
from fp8slurm.sessions.session import Model, routing_of

Generate = Callable[[list[GenerateRequest]], list[Generation]]


@dataclass
class Sampler:
    """Turns prompts into requests and answers into samples."""

    config: RunConfig
    tokenizer: Any
    stop_ids: list[int]
    converse: Callable[[list[Asked]], list[list[Sample]]] | None = None
    """With rollout.generate: conversations, in place of single responses."""

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
        if self.converse is not None:
            asked = [Asked(prompts[i // n][1], i % n, request) for i, request in enumerate(requests)]
            held = self.converse(asked)
            of_prompts = [held[i * n : (i + 1) * n] for i in range(len(prompts))]
            return [SampleGroup(p, [s for one in own for s in one]) for (_, p), own in zip(prompts, of_prompts)]
        done = generate(requests)
        samples = self._samples(requests, done)
        return [SampleGroup(prompt, samples[i * n : (i + 1) * n]) for i, (_, prompt) in enumerate(prompts)]

    def request(self, position: int, prompt: Prompt, k: int) -> GenerateRequest:
        """What is asked for sample k of the prompt at this position, by the settings of [rollout]."""
        r = self.config.rollout
        return GenerateRequest(
            list(prompt.token_ids), r.max_tokens, r.temperature, r.top_p, r.top_k, self.stop_ids,
            seed=sample_seed(self.config.run.seed, position, k), routing=r.routing_replay,
        )  # fmt: skip

    def sample_of(self, request: GenerateRequest, done: Generation) -> Sample:
        """The sample that an answer to `request` is. RuntimeError: as `sample`."""
        (sample,) = self._samples([request], [done])
        return sample

    def _samples(self, requests: list[GenerateRequest], done: list[Generation]) -> list[Sample]:
        texts = self.tokenizer.batch_decode([self._without_end(g.token_ids) for g in done])
        samples = [
            Sample(g.token_ids, g.logprobs, g.weight_versions, g.finish_reason, text)
            for g, text in zip(done, texts, strict=True)
        ]
        if any(request.routing for request in requests):
            for sample, request, g in zip(samples, requests, done, strict=True):
                sample.routing = routing_of(g, len(request.token_ids), self.spec)
        return samples

    @cached_property
    def spec(self) -> ModelSpec:
        """The model's sizes."""
        assert self.config.model.hf_checkpoint is not None
        return ModelSpec.from_hf_dir(self.config.model.hf_checkpoint)

    def _without_end(self, ids: list[int]) -> list[int]:
        return ids[:-1] if ids and ids[-1] in self.stop_ids else ids


def model_of(config: RunConfig, tokenizer: Any, stop_ids: Sequence[int]) -> Model:
    """What conversations have to know of a run's model. Their context is the engine's, or all of its KV cache."""
    assert config.model.hf_checkpoint is not None
    spec, e = ModelSpec.from_hf_dir(config.model.hf_checkpoint), config.engine
    context = min(e.context_length or spec.max_position_embeddings, e.max_total_tokens or spec.max_position_embeddings)
    return Model(tokenizer, stop_ids, spec, context, config.data.chat_template_kwargs)
