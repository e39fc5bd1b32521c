"""CUDA IPC, and NCCL between two processes on one GPU, into a real engine: the bytes arrive."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("way", ["cuda-ipc", "nccl"])
def test_an_update_reaches_an_engine_on_the_same_gpu(tmp_path: Path, way: str) -> None:
    out = tmp_path / "probe.json"
    command = [sys.executable, str(ROOT / "tools/gpu/sync_probe.py"), "--bucket-mib", "0.5", "--ways", way]
    done = subprocess.run([*command, "--folder", str(tmp_path), "--json", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = json.loads(out.read_text())["ways"]
    assert result["digest"] == "equal" and result["median"]["load"] > 0
