"""Runs over several GPUs: weights by NCCL into engines on GPUs of their own, experts over two GPUs, and a hang in NCCL."""

from __future__ import annotations

import json
import pickle
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from fp8slurm.observe.metrics import read_metrics
from fp8slurm.run.directory import RunDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools" / "gpu"))
from recipes import write_recipe  # noqa: E402

GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.skipif(GPUS < 2, reason="needs two NVIDIA GPUs")]
SHORT: dict[str, dict[str, Any]] = {
    "run": {"steps": 3, "log_level": "debug"},
    "sft": {"max_steps": 6, "batch_size": 64, "eval_every": 1, "eval_from": 1, "stop_accuracy": 1.0},
    "rollout": {"prompts_per_step": 6, "n_samples": 4, "drop_no_signal": False, "max_replacements": 0},
    "checkpoint": {"every": 10},
    "observe": {"plot": False, "tensorboard": False},
    "sync": {"verify": "always", "bucket_bytes": 65536},
    "engine": {"max_total_tokens": 8192, "mem_fraction": 0.5},
}


@pytest.fixture
def start(tiny_runs: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """start(base, **sections): (runs, recipe of a short run with these settings)."""

    def make(base: str = "tiny-fp8", **sections: dict[str, Any]) -> Any:
        merged = {key: SHORT.get(key, {}) | sections.get(key, {}) for key in (*SHORT, *sections)}
        recipe = write_recipe(tmp_path / "recipe.toml", base, [], **merged)
        return tiny_runs(16, moe="moe" in base, recipe=str(recipe), sft__eval_every=1)  # tiny_runs switches it off

    return make


def split() -> dict[str, dict[str, Any]]:
    """Half of the GPUs train, as pipeline stages, so that there are several sources; the others serve."""
    n = 2 if GPUS >= 4 else 1
    return {
        "slurm": {"gpus_per_node": 2 * n, "ranks_per_node": n},
        "parallel": {"pipeline_parallel_size": n},
        "engine": {"placement": "split", "gpus": n, "per_node": n},
    }


def log(run: Path) -> str:
    return "".join(p.read_text() for p in (run / "attempts" / "0" / "logs").glob("*_log.err"))


def check_end(run: Path) -> None:
    assert RunDirectory(run).newest_checkpoint() == "step_000003"
    assert [r["step"] for r in read_metrics(run / "metrics.jsonl") if r["phase"] == "rl"] == [0, 1, 2, 3]


def test_weights_by_nccl_from_several_ranks_into_several_engines(start: Callable[..., Any]) -> None:
    """Every update is compared in the engines, byte by byte (sync.verify)."""
    runs = start(**split())
    run = runs.run("nccl")
    check_end(run)
    assert log(run).count("'join': True}") == 1
    assert len(list((run / "attempts" / "0").glob("digests_*.json"))) == split()["engine"]["per_node"]


@pytest.mark.parametrize(("when", "restarted"), [("command evaluate", 1), ("command update", None)])
def test_an_engine_that_dies_takes_the_nccl_groups_with_it(
    start: Callable[..., Any], when: str, restarted: int | None
) -> None:
    """Killed between two updates, or in one, while a broadcast waits for it."""
    runs = start(**split())
    process, run = runs.start("killed"), runs.path("killed")
    try:
        while log(run).count(when) < 3:
            assert process.poll() is None, runs.said(process)
            time.sleep(0.002)
        runs.engines(process)[-1].send_signal(signal.SIGKILL)
        runs.finish(process)
    finally:
        runs.stop(process)
    check_end(run)
    assert log(run).count("'join': True}") == 2
    wanted = split()["engine"]["per_node"] if restarted is None else restarted
    assert len(re.findall(r"engine 0(?:\.[01])? failed .*; restart 1", log(run))) == wanted


def test_experts_over_two_gpus_with_routing_replayed(start: Callable[..., Any]) -> None:
    runs = start("tiny-moe-fp8", slurm={"gpus_per_node": 2, "ranks_per_node": 2}, sync={"bucket_bytes": 2**20})
    run = runs.run("experts")
    check_end(run)
    first = read_metrics(run / "metrics.jsonl")
    assert any(r.get("gap_no_replay/mean_abs", 0) > 0 for r in first)


def test_a_rank_that_stops_inside_nccl_ends_the_run_with_stacks_and_flight_records(start: Callable[..., Any]) -> None:
    runs = start(
        run={"steps": 400},
        slurm={"gpus_per_node": 2, "ranks_per_node": 2},
        sync={"bucket_bytes": 2**20, "verify": "first"},
        # an FP8 engine compiles kernels for longer than this when it is first asked
        fp8={"backend": "off", "engine": "bf16"},
        watchdog={"timeout_s": 60.0},
    )
    process, run = runs.start("hang"), runs.path("hang")
    try:
        runs.wait_for_step(process, "hang", 2)
        tasks = run / "attempts" / "0" / "tasks"
        stopped = psutil.Process(json.loads((tasks / "1.json").read_text())["pid"])
        stopped.suspend()
        said = runs.finish(process, 1)
    finally:
        runs.stop(process)
    assert "no progress for watchdog.timeout_s" in said or "no progress" in log(run)
    stacks = run / "attempts" / "0" / "stacks"
    assert "Thread" in (stacks / "task_0.txt").read_text()
    record = pickle.loads((stacks / "nccl_rank_0").read_bytes())
    assert any("nccl" in entry["profiling_name"] for entry in record["entries"])
    assert not stopped.is_running() or stopped.status() == psutil.STATUS_ZOMBIE
