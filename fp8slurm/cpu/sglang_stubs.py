"""What SGLang's import asks of a GPU machine: stand-ins for its kernels, for triton and for torchvision.

All of it lives in this process: no installed file is changed. `install` runs before sglang is imported, in every
process of the server.
"""

from __future__ import annotations

import enum
import importlib.abc
import importlib.machinery
import os
import sys
import types
from typing import Any

import torch

from fp8slurm.core.patches import note


def install() -> None:
    """Make `import sglang` work without a GPU.

    Raises RuntimeError where a GPU is in use or SGLang's CPU mode (SGLANG_USE_CPU_ENGINE=1) is not on: on such a
    machine the real modules have to be loaded.
    """
    if torch.cuda.is_available() or os.environ.get("SGLANG_USE_CPU_ENGINE") != "1":
        raise RuntimeError(
            "the CPU stand-ins for SGLang are for its CPU mode (SGLANG_USE_CPU_ENGINE=1) on a machine without a GPU"
        )
    if any(isinstance(finder, _StubFinder) for finder in sys.meta_path):
        return
    # answers `import sgl_kernel` (its wheel is for CUDA) and `import triton`: SGLang decorates its GPU kernels with it
    # at import time. A real triton is shadowed as well: without a driver it runs none of them, and is slow to import.
    # torchvision is imported for pictures, which no model here has. The CPU set leaves it out: a wheel built for CUDA
    # does not load beside a CPU build of torch, and transformers then imports no model.
    sys.meta_path.insert(0, _StubFinder())
    for name in ("sgl_kernel", *_PACKAGES):
        note(name)


class _StubClass:
    """Base of every class a stub hands out: can be built, called as a decorator argument, and subclassed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.__dict__.update(kwargs)


class _StubModule(types.ModuleType):
    """A package any attribute of which exists: classes for capitalized names, submodules for the others.

    Called, it is a decorator that changes nothing (`@triton.jit`, `@triton.autotune(...)`): no kernel is ever run.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name[0].isupper():
            base = Exception if name.endswith("Error") or name == "OutOfResources" else _StubClass
            value: Any = type(name, (base,), {"__module__": self.__name__})
        else:
            value = importlib.import_module(f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and callable(args[0]) and not kwargs:
            return args[0]
        return lambda decorated: decorated


_PACKAGES = ("triton", "torchvision")
"""Packages any part of which can be imported."""
_NAMES: dict[str, dict[str, object]] = {
    "triton": {
        "__version__": "3.0.0+stub",
        "cdiv": lambda a, b: -(-a // b),
        "next_power_of_2": lambda n: 1 << max(n - 1, 0).bit_length(),
    },
    "triton.language": {
        "constexpr": type("constexpr", (), {"__init__": lambda self, value=None: setattr(self, "value", value)})
    },
    "triton.compiler.compiler": {"triton_key": lambda: "stub"},
    "triton.runtime.cache": {"triton_key": lambda: "stub"},
    "torchvision": {"__version__": "0.28.0+stub"},
    "torchvision.transforms": {
        "InterpolationMode": enum.Enum(
            "InterpolationMode", "NEAREST NEAREST_EXACT BOX BILINEAR HAMMING BICUBIC LANCZOS"
        )
    },
}
"""By module, the few names that are used, not only decorated with, while SGLang and what it needs are imported."""


class _Kernels(types.ModuleType):
    """sgl_kernel without its CPU and GPU libraries: imports succeed, a kernel that is called after all says its name.

    Not a package, so that SGLang's own fallbacks for submodules (`sgl_kernel.scalar_type`) take effect.
    """

    __version__ = "0.0.0+stub"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError(f"{self.__name__}.{name} needs a GPU")

        return missing


class _StubFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Serves the stubs ahead of anything installed under the same names."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname == "sgl_kernel":
            return importlib.machinery.ModuleSpec(fullname, self)
        if fullname.partition(".")[0] in _PACKAGES:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Kernels(spec.name) if spec.name == "sgl_kernel" else _StubModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        vars(module).update(_NAMES.get(module.__name__, {}))
