"""What every engine needs to know of a run."""

from __future__ import annotations

import os
from dataclasses import replace

from fp8slurm.config import RunConfig
from fp8slurm.config.derived import engines_sleep, transport_of
from fp8slurm.engine.server import EngineSettings


def engine_settings(config: RunConfig) -> EngineSettings:
    """What every engine needs to know of a run."""
    return replace(
        EngineSettings(config.engine),
        deterministic=config.run.deterministic,
        seed=config.run.seed,
        cpu_threads=config.slurm.engine_threads,
        exact=config.model.exact,
        return_routing=config.rollout.routing_replay,
        sleeps=engines_sleep(config),
        gloo_interface=os.environ.get("GLOO_SOCKET_IFNAME", "lo") if transport_of(config) == "gloo-direct" else "lo",
    )
