"""rollout.max_staleness = 1: engines generate the next step while the trainer works, and a resumed run is the same run."""

import os
import signal

import pytest
from tiny_runs import task_pids, weights

from fp8slurm.observe.metrics import read_metrics, without_times
from fp8slurm.rollout.dealing import KEPT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tiny_runs):
    return tiny_runs(
        32, run__steps=7, sft__batch_size=64, rollout__prompts_per_step=4, rollout__n_samples=8,
        rollout__max_staleness=1, checkpoint__every=3, eval__every=2, sft__max_steps=10,
    )  # fmt: skip


def test_every_sample_is_one_step_old_and_a_resumed_run_is_the_same_run(runs, tmp_path):
    whole = runs.run("whole")
    records = [r for r in read_metrics(whole) if r["phase"] == "rl"]
    trained = [r for r in records if "loss" in r]
    assert trained[0]["step"] == 1 and "lag/versions" not in trained[0], "the first step has nothing to be behind"
    later = [r for r in trained if r["step"] > 1]
    assert later and all(r["lag/versions"] == 1 for r in later)
    # What engines score under the trainer's weights is as near as in any run; what the policy moved by is not in it.
    own, moved = [r["gap/mean_abs"] for r in later], [r["lag/mean_abs"] for r in later]
    assert max(own) < 0.02 and max(moved) > 2 * max(own), (own, moved)
    assert not (whole / "checkpoints" / "step_000007" / f"{KEPT}.safetensors").exists(), (
        "nothing comes behind the last step"
    )

    process = runs.start("broken")
    run = runs.path("broken")
    runs.wait_for_step(process, "broken", 5)
    assert (run / "checkpoints" / "step_000003" / f"{KEPT}.safetensors").stat().st_size > 0
    os.kill(task_pids(run, 0)[0], signal.SIGKILL)
    runs.finish(process, status=1)
    runs.run("broken")
    assert [without_times(r) for r in read_metrics(run)] == [without_times(r) for r in read_metrics(whole)]
    want, got = weights(whole, tmp_path / "want"), weights(run, tmp_path / "got")
    assert want.keys() == got.keys() and all(want[k].equal(got[k]) for k in want)
