"""Averages over questions, with bootstrap intervals, and unbiased pass@k."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

DRAWS = 10_000
CONFIDENCE = 0.95
_CELLS = 1 << 21
"""Resampled values that are held at once."""


@dataclass(frozen=True)
class Estimate:
    """A mean over questions and its interval."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        return asdict(self)


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Probability that at least one of k samples drawn without replacement from n, `correct` of them right, is right.

    1 - C(n - c, k) / C(n, k), as a product (Chen et al. 2021, "Evaluating Large Language Models Trained on Code",
    equation 1). ValueError: not 1 <= k <= n, or not 0 <= correct <= n.
    """
    if not 1 <= k <= n or not 0 <= correct <= n:
        raise ValueError(f"pass@{k} of {n} samples, {correct} of them right; allowed: 1 <= k <= n, 0 <= right <= n")
    if n - correct < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(n - correct + 1, n + 1)))


def ks(n: int) -> list[int]:
    """The k that are reported for n samples: powers of two, and n itself."""
    return sorted({2**i for i in range(n.bit_length()) if 2**i <= n} | {n})


def bootstrap(values: Sequence[float], draws: int = DRAWS, seed: int = 0) -> Estimate:
    """Mean of `values` (one a question) and its percentile bootstrap interval; the draws are seeded on their own.

    Equal values give an interval without width. ValueError: no values.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.size == 0:
        raise ValueError("no questions to average over")
    rng = np.random.Generator(np.random.PCG64(seed))
    means = np.empty(draws)
    step = max(1, _CELLS // data.size)
    for start in range(0, draws, step):
        part = means[start : start + step]
        part[:] = data[rng.integers(0, data.size, (part.size, data.size))].mean(axis=1)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(float(data.mean()), float(low), float(high))


def paired_difference(a: Sequence[float], b: Sequence[float], draws: int = DRAWS, seed: int = 0) -> Estimate:
    """Mean of a - b over the same questions in the same order; the interval resamples questions, so that what both
    sides find hard cancels."""
    return bootstrap(np.subtract(a, b).tolist(), draws, seed)
