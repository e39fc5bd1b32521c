"""An advantage of your own: the reward against the median of its group, which one lucky sample does not move.

make train-tiny-fp8 ARGS="--algorithm.advantage examples.advantage:against_median"
"""

from statistics import median

from fp8slurm.core.types import SampleGroup


def against_median(groups: list[SampleGroup]) -> list[list[float]]:
    """Groups of a step, of all nodes -> one number for every sample, those that are not trained on included."""
    result = []
    for group in groups:
        baseline = median([s.reward for s in group.samples if s.train] or [0.0])
        result.append([s.reward - baseline for s in group.samples])
    return result
