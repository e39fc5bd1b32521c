"""What the engine's own processes get on top of SGLang, on GPUs and CPUs alike."""

from __future__ import annotations

import tempfile
from typing import Any

from fp8slurm.engine.digest import DIGEST_ACTION, overall, raw_digest


def apply() -> None:
    """Patch SGLang in this process. Idempotent."""
    from sglang.srt.managers import load_snapshot

    # answers the load statistics' file in /dev/shm, which stays there when a server is killed: the engine's temporary
    # folder goes with it
    load_snapshot.shm_path_for = lambda ipc_name: f"{tempfile.gettempdir()}/loads"
    _add_raw_digest()


def _add_raw_digest() -> None:
    """Teach /weights_checker the action "raw_digest": sha256 of the bytes of every parameter, on every rank.

    SGLang's own checksums are of weights dequantized to BF16, which hides a scale that is off by one ulp.
    """
    from sglang.srt.utils.weight_checker import WeightChecker

    original = WeightChecker.handle
    if getattr(original, "knows_raw_digest", False):
        return

    def handle(self: Any, action: str, *args: Any, role: str, **kwargs: Any) -> Any:
        if action != DIGEST_ACTION:
            return original(self, action, *args, role=role, **kwargs)
        checksums = {name: raw_digest(parameter) for name, parameter in self._get_model().named_parameters()}
        return {
            "checksums": checksums,
            "per_gpu_checksum": overall(checksums),
            "parallelism_info": self._parallelism_info(role=role).model_dump(),
        }

    handle.knows_raw_digest = True
    WeightChecker.handle = handle
