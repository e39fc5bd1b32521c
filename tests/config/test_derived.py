"""Settings that follow from others."""

import pytest

from fp8slurm.config import RunConfig, derived


@pytest.mark.parametrize(
    "cores, sections, workers",
    [
        (128, {"slurm": {"ranks_per_node": 8}, "engine": {"per_node": 8}}, 32),
        (24, {"slurm": {"ranks_per_node": 8}, "engine": {"per_node": 4}}, 12),
        (2, {}, 2),
        (12, {"slurm": {"executor": "slurm", "cpus_per_task": 12, "ranks_per_node": 8}}, 11),
        (12, {"slurm": {"executor": "slurm", "ranks_per_node": 8}}, 3),
        (128, {"reward": {"workers": 5}}, 5),
    ],
)
def test_rewards_get_the_cores_that_the_nodes_tasks_leave(monkeypatch, cores, sections, workers):
    """A task that Slurm gives cores of its own does not count those of the ranks."""
    monkeypatch.setattr(derived.os, "sched_getaffinity", lambda pid: set(range(cores)))
    assert derived.reward_workers(RunConfig.model_validate(sections)) == workers
