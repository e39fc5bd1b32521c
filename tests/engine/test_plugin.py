"""What SGLang's own classes are given on top (engine/inside/plugin.py), where a GPU is needed to see it at work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from patch_list import check_replaced, rows

from fp8slurm.config.schema import EngineSection
from fp8slurm.engine.child import PATCHED
from fp8slurm.engine.server import Engine, EngineSettings

SCRIPT = """
import json, torch
from types import SimpleNamespace
if not torch.cuda.is_available():
    from fp8slurm.cpu import sglang_stubs
    sglang_stubs.install()
from fp8slurm.engine.inside import plugin
from sglang.srt.managers.scheduler_components.weight_updater import SchedulerWeightUpdaterManager as Manager
from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater
from sglang.srt.utils import torch_memory_saver_adapter as adapter
from sglang.srt.utils.weight_checker import WeightChecker

calls = []
torch.cuda.is_available = lambda: True
torch.cuda.synchronize = lambda: calls.append("GPU is done")
adapter._memory_saver = SimpleNamespace(pause=lambda tag: calls.append(tag))
from_broadcast = "load_weights_from_distributed"  # of the installed version: none is made up here
if not hasattr(WeightUpdater, from_broadcast):
    from_broadcast = "update_weights_from_distributed"
for name, what in (("update_weights_from_tensor", "tensor"), (from_broadcast, "distributed")):
    assert hasattr(WeightUpdater, name)
    setattr(WeightUpdater, name, lambda self, what=what: calls.append(what) or (True, what))
Manager.resume_memory_occupation = lambda self, recv_req: "said"
plugin.apply()
plugin.apply()  # a second time changes nothing

def said():
    done, calls[:] = list(calls), []
    return done

real = adapter._TorchMemorySaverAdapterReal()
for tag in ("kv_cache", "weights"):
    real.pause(tag)
found = {"pauses": said()}

class Updater(WeightUpdater):
    def __init__(self):  # SGLang's wants a model runner
        pass

updater = Updater()
assert updater.update_weights_from_tensor() == (True, "tensor")
assert getattr(updater, from_broadcast)() == (True, "distributed")
found["loads"] = said()

class Checker:
    def _get_model(self):
        calls.append("model")
        return torch.nn.Linear(1, 1)

    def _parallelism_info(self):
        return SimpleNamespace(model_dump=lambda: {})

digest = plugin.raw_digests
plugin.raw_digests = lambda makes: calls.append("digests") or digest(makes)
WeightChecker.handle(Checker(), "raw_digest")
found["digests"] = said()

for enabled, tags in ((True, None), (True, ["kv_cache"]), (True, ["weights"]), (False, None)):
    table = torch.ones(2, 3, dtype=torch.int32)
    scheduler = SimpleNamespace(req_to_token_pool=SimpleNamespace(req_to_token=table))
    manager = SimpleNamespace(scheduler=scheduler, memory_saver_adapter=SimpleNamespace(enabled=enabled))
    assert Manager.resume_memory_occupation(manager, SimpleNamespace(tags=tags)) == "said"
    calls.append(int(table.sum()))
found["wakes"] = said()
print(json.dumps(found))
"""
WAIT = "GPU is done"


@pytest.fixture(scope="module")
def found() -> dict[str, list[object]]:
    """What was called, in a process that has SGLang's classes, patched, but needs no GPU."""
    environment = os.environ | {"SGLANG_USE_CPU_ENGINE": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_memory_is_unmapped_when_the_gpu_is_done_with_it(found) -> None:
    """Each pause waits: SGLang itself queues copies between them."""
    assert found["pauses"] == [WAIT, "kv_cache", WAIT, "weights"]


def test_a_load_is_answered_when_the_gpu_has_made_it(found) -> None:
    """From mapped memory and from a broadcast."""
    assert found["loads"] == [WAIT, "tensor", WAIT, WAIT, "distributed", WAIT]


def test_digests_are_of_what_has_been_loaded(found) -> None:
    """Their threads do not wait for the scheduler's stream."""
    assert found["digests"].index(WAIT) < found["digests"].index("digests")


def test_the_padding_row_is_zero_again_after_waking(found) -> None:
    """Where the memory had been given back: with all of it, or with the cache's."""
    assert found["wakes"] == [0, 0, 6, 6]


PRIVATE = """
import json, sys
if not __import__("torch").cuda.is_available():
    from fp8slurm.cpu import sglang_stubs
    sglang_stubs.install()
from patch_list import missing
print(json.dumps(missing(sys.argv[1:])))
"""


def test_private_names_of_sglang_are_there() -> None:
    """And those that exact runs, and runs with an FP8 KV cache, replace on GPUs only."""
    listed = [n for names, _ in rows("Private names that are used, not replaced") for n in names]
    only = ("GPU, where `model.exact`", "GPU, where `engine.kv_cache`")
    listed += [n for names, where in rows("SGLang's processes") if any(w in where for w in only) for n in names]
    names = [name for name in listed if name.startswith("sglang.")]
    assert "sglang.srt.layers.sampler.Sampler.__init__" in names
    environment = os.environ | {"SGLANG_USE_CPU_ENGINE": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", PRIVATE, *names], env=environment, capture_output=True, text=True, timeout=300
    )
    assert names and done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []


@pytest.mark.slow
@pytest.mark.parametrize("exact", [False, True])
def test_a_scheduler_replaces_what_the_page_lists(tmp_path: Path, write_fp8_model, exact: bool) -> None:
    """And says so in its log."""
    write_fp8_model(tmp_path / "model", seed=1)
    section = EngineSection(max_total_tokens=8192, context_length=128, dtype="float32", ready_timeout_s=120)
    engine = Engine(tmp_path / "model", tmp_path, EngineSettings(section, cpu_threads=1, exact=exact))
    engine.start()
    try:
        engine.wait_ready()
        lines = [line for line in engine.log_path.read_text().splitlines() if line.startswith(PATCHED)]
    finally:
        engine.stop()
    assert len(lines) == 1
    replaced = lines[0].removeprefix(PATCHED).split()
    check_replaced("SGLang's processes", replaced, "CPU" if engine.cpu else "GPU")
    if engine.cpu:
        names = {n for names, where in rows("SGLang's processes") for n in names if "`model.exact` is on" in where}
        assert names and (names <= set(replaced) if exact else not names & set(replaced))
