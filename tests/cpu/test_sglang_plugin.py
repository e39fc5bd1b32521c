"""The engine's emulation formulas, without a server (with one: tests/engine/test_generation.py)."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fp8slurm.cpu.sglang_plugin import fake_quantize_activations, multinomial_with_seed


def test_activation_formula() -> None:
    x = torch.zeros(2, 256)
    x[0, :4] = torch.tensor([448.0, 1.0, 1.0625, -300.0])  # scale 1: 1.0625 is half-way and rounds to even
    x[0, 128] = 1e-12  # below the floor: amax counts as 1e-10
    x[1, 0] = 7.0
    y = fake_quantize_activations(x.to(torch.bfloat16))
    assert y.dtype == torch.float32
    assert y[0, :4].tolist() == [448.0, 1.0, 1.0, -288.0]
    scale = torch.tensor(1e-10) / 448
    floored = (x[0, 128].to(torch.bfloat16).float() / scale).to(torch.float8_e4m3fn).float() * scale
    assert y[0, 128] == floored != 1e-12
    assert y[1, 0] == 448 * (torch.tensor(7.0) / 448) and y[1, 1:].abs().sum() == 0
    whole = torch.randn(3, 5, 384)
    assert torch.equal(fake_quantize_activations(whole)[1, 2], fake_quantize_activations(whole[1, 2]))


def draw(logprobs: torch.Tensor, seeds: torch.Tensor, position: int = 0) -> torch.Tensor:
    return multinomial_with_seed(logprobs, seeds, torch.full((len(seeds),), position))[:, 0]


def test_draws_follow_the_distribution() -> None:
    p = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625, 0.0])
    n = 40_000
    for tokens in (
        draw(p.log().expand(n, 6), torch.arange(n)),
        multinomial_with_seed(p.log().expand(n, 6), torch.full((n,), 2**31 - 1), torch.arange(n))[:, 0],
        draw(p.log().expand(n, 6), torch.arange(n) * 2**40 - 2**62),
    ):
        counts = torch.bincount(tokens, minlength=6).double()
        assert counts[5] == 0
        chi2 = ((counts - p * n)[:5] ** 2 / (p * n)[:5]).sum()
        assert chi2 < 25  # 4 degrees of freedom: one in 20,000


def test_draws_depend_on_seed_and_position_only() -> None:
    logprobs = torch.full((64, 300), -5.7)
    seeds = torch.arange(64)
    tokens = draw(logprobs, seeds)
    assert torch.equal(draw(logprobs[:7], seeds[:7]), tokens[:7])
    assert torch.equal(draw(logprobs.flip(0), seeds.flip(0)).flip(0), tokens)
    assert (draw(logprobs, seeds, 1) == tokens).sum() < 6 and (draw(logprobs, seeds + 64) == tokens).sum() < 6
    # fixed for good: a resumed run has to draw what the first attempt would have drawn
    pinned = [421, 851, 150, 947]
    assert draw(torch.zeros(4, 1000), torch.tensor([0, 1, -1, 2**62]), 5).tolist() == pinned


LATE = """
from types import SimpleNamespace
import torch
from fp8slurm.cpu import sglang_stubs
sglang_stubs.install()
from fp8slurm.cpu import sglang_plugin
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.managers.scheduler import Scheduler

seen = []
Scheduler.get_next_batch_to_run = lambda self, running_batch, last_batch: seen.append((len(running_batch.reqs), running_batch.batch_is_full))
sglang_plugin.apply()
for done in ([True, True], [True, False], []):
    batch = ScheduleBatch(reqs=[SimpleNamespace(finished=lambda d=d: d) for d in done], batch_is_full=True)
    Scheduler.get_next_batch_to_run(None, running_batch=batch, last_batch=None)
print(seen)
"""


@pytest.mark.slow
def test_a_finished_batch_hands_nothing_on_to_the_next() -> None:
    """Merged with one that has finished, a rollout behind an evaluation drew other tokens: on a busy machine, once in many runs."""
    environment = os.environ | {"SGLANG_USE_CPU_ENGINE": "1"}
    done = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "[(0, False), (2, True), (0, True)]"
