"""What SGLang's own classes are given on top (engine/plugin.py), where a GPU is needed to see it at work."""

from __future__ import annotations

import os
import subprocess
import sys

SCRIPT = """
import torch
if not torch.cuda.is_available():
    from fp8slurm.cpu import sglang_stubs
    sglang_stubs.install()
from fp8slurm.engine import plugin
from sglang.srt.utils import torch_memory_saver_adapter as adapter

calls = []

class Saver:
    def pause(self, tag):
        calls.append(tag)

adapter._memory_saver = Saver()
torch.cuda.synchronize = lambda: calls.append("GPU is done")
plugin._finish_before_release()
plugin._finish_before_release()  # a second time changes nothing
real = adapter._TorchMemorySaverAdapterReal()
for tag in ("kv_cache", "weights"):
    real.pause(tag)
print(calls)
"""


def test_memory_is_unmapped_when_the_gpu_is_done_with_it() -> None:
    """Each pause waits: SGLang itself queues copies between them."""
    environment = os.environ | {"SGLANG_USE_CPU_ENGINE": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "['GPU is done', 'kv_cache', 'GPU is done', 'weights']"
