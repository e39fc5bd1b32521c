"""Prompts in, sample groups out: what the agent and the evaluation share."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

from fp8slurm.config import RunConfig
from fp8slurm.engine.client import GenerateRequest, Generation
from fp8slurm.rl.data import end_token_ids, load_prompts, load_tokenizer
from fp8slurm.rl.rewards import RewardPool, exact
from fp8slurm.rl.types import Prompt, Sample, SampleGroup

Generate = Callable[[list[GenerateRequest]], list[Generation]]


def sample_seed(seed: int, position: int, sample: int) -> int:
    """Seed of one sample, in [0, 2^31): the same for a prompt position and sample number in every attempt of a run."""
    digest = hashlib.blake2b(f"{seed}/{position}/{sample}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") & 0x7FFFFFFF


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
        return cls(config, load_tokenizer(folder), sorted({*end_token_ids(folder), *config.rollout.stop_token_ids}))

    def prompts(self, path: Path) -> list[Prompt]:
        return load_prompts(self.config.data, self.tokenizer, path)

    def sample(
        self, generate: Generate, prompts: list[tuple[int, Prompt]], n: int, max_tokens: int, temperature: float
    ) -> list[SampleGroup]:
        """n samples for every (position, prompt); the position, unique in a run, makes the seed."""
        r = self.config.rollout
        requests = [
            GenerateRequest(
                list(prompt.token_ids), max_tokens, temperature, r.top_p, r.top_k, self.stop_ids,
                seed=sample_seed(self.config.run.seed, position, k),
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
        return [SampleGroup(prompt, samples[i * n : (i + 1) * n]) for i, (_, prompt) in enumerate(prompts)]

    def greedy(self, generate: Generate, share: list[tuple[int, Prompt]]) -> list[SampleGroup]:
        """One sample a prompt by the settings of [eval] (greedy unless eval.temperature says otherwise)."""
        return self.sample(
            generate,
            share,
            1,
            self.config.eval.max_tokens or self.config.rollout.max_tokens,
            self.config.eval.temperature,
        )

    def _without_end(self, ids: list[int]) -> list[int]:
        return ids[:-1] if ids and ids[-1] in self.stop_ids else ids


def correct(groups: list[SampleGroup], rewards: RewardPool) -> list[bool]:
    """Which groups' first samples are right: the reward is 1 or, for rewards with partial credit, the match exact."""
    if rewards.reward.kind in ("exact", "digits"):
        return [exact(g.samples[0].text, g.prompt.label) == 1.0 for g in groups]
    rewards.score(groups)
    return [g.samples[0].reward >= 1.0 for g in groups]
