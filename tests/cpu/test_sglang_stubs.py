"""The stand-ins that SGLang's import needs without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fp8slurm.cpu import sglang_plugin, sglang_stubs

IMPORTS = """
from fp8slurm.cpu import sglang_stubs
sglang_stubs.install(); sglang_stubs.install()
import triton, triton.language as tl, torchvision
from triton.runtime.autotuner import OutOfResources

@triton.autotune(configs=[triton.Config({"BLOCK": 1}, num_warps=4)], key=["n"])
@triton.jit
def kernel(n: tl.constexpr): ...

assert triton.cdiv(5, 2) == 3 and triton.next_power_of_2(9) == 16 and issubclass(OutOfResources, Exception)
import sgl_kernel
try:
    import sgl_kernel.scalar_type
except ImportError:
    pass
else:
    raise AssertionError("a submodule of sgl_kernel was found")
try:
    sgl_kernel.rmsnorm(1)
except NotImplementedError as error:
    assert "sgl_kernel.rmsnorm" in str(error)
from torchvision.transforms import InterpolationMode
from transformers.utils import is_torchvision_available
assert InterpolationMode.BICUBIC.name == "BICUBIC" and is_torchvision_available()
print("imported")
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-ins are for machines without a GPU")
def test_imports_beside_a_real_triton_and_a_torchvision_for_cuda(tmp_path: Path) -> None:
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton/__init__.py").write_text("raise ImportError('the real triton wants a driver')")
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision/__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    env = {**os.environ, "SGLANG_USE_CPU_ENGINE": "1", "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}"}
    run = subprocess.run([sys.executable, "-c", IMPORTS], env=env, capture_output=True, text=True)
    assert run.stdout == "imported\n", run.stderr


def test_refused_where_they_do_not_belong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)
    with pytest.raises(RuntimeError, match="SGLANG_USE_CPU_ENGINE"):
        sglang_stubs.install()
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for install in (sglang_stubs.install, sglang_plugin.apply):
        with pytest.raises(RuntimeError, match="without a GPU"):
            install()
    assert "triton" not in {type(finder).__name__ for finder in sys.meta_path}
    assert not any(isinstance(finder, sglang_stubs._StubFinder) for finder in sys.meta_path)
