"""On-policy distillation: an engine that serves the teacher scores what the student sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fp8slurm.config import RunConfig
from fp8slurm.core.types import SampleGroup
from fp8slurm.engine.pool import EnginePool, Member
from fp8slurm.engine.server import Engine
from fp8slurm.rollout.engines import settings_of_engines

AT_ONCE = 256
"""Sequences in one request."""


class Teacher(EnginePool[Member]):
    """The node's engine with teacher.checkpoint, whose weights never change. start, wait_ready, score, stop; on GPUs it
    shares those of the node's first engine, which has to start after it. EngineError: it cannot be kept alive."""

    def __init__(self, config: RunConfig, attempt_dir: Path, node: int, gpus: Sequence[tuple[int, ...]]) -> None:
        """gpus: as for EngineSet."""
        assert config.teacher.checkpoint is not None
        first = settings_of_engines(config, gpus)[0]
        section = first.section.model_copy(update={"mem_fraction": config.teacher.mem_fraction, "kv_cache": "auto"})
        settings = replace(first, section=section, share=(0, 1), exact=False, return_routing=False, sleeps=False)
        engine = Engine(config.teacher.checkpoint, attempt_dir / "logs", settings, f"teacher_{node}")
        super().__init__([Member(engine, f"teacher {node}")], config.engine)

    def fill_in(self, groups: list[SampleGroup]) -> None:
        """`teacher_logprobs` of every sample."""
        pairs = [(list(s.prompt_of(g.prompt)), s) for g in groups for s in g.samples if s.response_ids]
        for start in range(0, len(pairs), AT_ONCE):
            part = pairs[start : start + AT_ONCE]
            scores = self.score([prompt + list(s.response_ids) for prompt, s in part])
            for (prompt, sample), values in zip(part, scores, strict=True):
                sample.teacher_logprobs = values[len(prompt) - 1 :]
