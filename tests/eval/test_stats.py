import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp8slurm.eval.stats import bootstrap, ks, paired_difference, pass_at_k


def test_pass_at_k_is_what_counting_every_subset_gives():
    for n in range(1, 9):
        for c in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
                share = sum(any(s) for s in subsets) / len(subsets)
                assert pass_at_k(n, c, k) == pytest.approx(share, abs=1e-12), (n, c, k)


@given(st.integers(1, 400), st.data())
def test_pass_at_k_is_the_closed_form(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
    assert pass_at_k(n, c, k) == pytest.approx(float(exact), abs=1e-9)


PUBLISHED = {
    (1, 0, 1): 0.0,
    (1, 1, 1): 1.0,
    (2, 1, 1): 0.5,
    (2, 1, 2): 1.0,
    (4, 1, 2): 0.5,
    (4, 3, 2): 1.0,
    (8, 3, 4): 0.9285714285714286,
    (10, 1, 5): 0.5,
    (10, 9, 1): 0.9,
    (16, 2, 8): 0.7666666666666666,
    (16, 15, 1): 0.9375,
    (20, 5, 10): 0.9837461300309598,
    (64, 7, 32): 0.9945818282856349,
    (100, 1, 10): 0.09999999999999998,
    (100, 37, 10): 0.992616797214249,
    (200, 0, 100): 0.0,
    (200, 1, 1): 0.0050000000000000044,
    (200, 1, 100): 0.5,
    (200, 3, 10): 0.1433074463225218,
    (200, 10, 1): 0.04999999999999982,
    (200, 10, 10): 0.40854786608141724,
    (200, 10, 100): 0.9992289739372822,
    (200, 60, 5): 0.8355587240264433,
    (200, 100, 100): 1.0,
    (200, 101, 100): 1.0,
    (200, 199, 1): 0.995,
    (256, 12, 128): 0.9998136349390482,
    (1000, 13, 100): 0.7480262507962616,
    (1000, 500, 3): 0.8753753753753754,
    (5000, 2, 1000): 0.3600320064012802,
}
"""(n, c, k) -> what estimate_pass_at_k of openai/human-eval returns, the implementation published with Chen et al. 2021
(human_eval/evaluation.py, commit 9d3aa8bd1f0f972422d6fea2782eeaf3e3094048), run with numpy 2.4.6 on 2026-11-24."""
PUBLISHED_MEAN = 0.5695802080203465
"""What its evaluate_functional_correctness averages, estimate_pass_at_k([5, 10, 20, 200], [1, 3, 0, 17], 5).mean()."""


def test_pass_at_k_is_what_the_published_implementation_gives():
    assert {key: pass_at_k(*key) for key in PUBLISHED} == pytest.approx(PUBLISHED, abs=1e-12, rel=0)
    questions = [(5, 1), (10, 3), (20, 0), (200, 17)]
    mean = bootstrap([pass_at_k(n, c, 5) for n, c in questions], draws=10).value
    assert mean == pytest.approx(PUBLISHED_MEAN, abs=1e-12, rel=0)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_pass_at_k_refuses_what_makes_no_sense(n, c, k):
    with pytest.raises(ValueError, match="allowed"):
        pass_at_k(n, c, k)


def test_ks():
    assert [ks(n) for n in (1, 2, 3, 8, 12)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 8], [1, 2, 4, 8, 12]]


def binomial_quantile(n, p, level):
    total = 0.0
    for k in range(n + 1):
        total += math.comb(n, k) * p**k * (1 - p) ** (n - k)
        if total >= level:
            return k / n
    return 1.0


@pytest.mark.parametrize(("n", "right"), [(30, 12), (200, 150), (500, 425)])
def test_the_bootstrap_of_right_and_wrong_is_binomial(n, right):
    """Resampling n answers, `right` of them 1, draws from Binomial(n, right / n): its quantiles are the interval."""
    estimate = bootstrap([1.0] * right + [0.0] * (n - right))
    assert estimate.value == pytest.approx(right / n)
    assert estimate.low == pytest.approx(binomial_quantile(n, right / n, 0.025), abs=1.01 / n)
    assert estimate.high == pytest.approx(binomial_quantile(n, right / n, 0.975), abs=1.01 / n)


def test_about_95_of_100_intervals_hold_the_truth():
    rng = np.random.default_rng(5)
    inside = 0
    for i in range(400):
        estimate = bootstrap((rng.random(150) < 0.7).astype(float).tolist(), draws=1000, seed=i)
        inside += estimate.low <= 0.7 <= estimate.high
    assert 0.91 <= inside / 400 <= 0.98


def test_pairing_takes_out_what_both_sides_find_hard():
    rng = np.random.default_rng(3)
    hard = rng.random(400)
    base = (rng.random(400) < hard).astype(float)
    ours = base.copy()
    ours[:8] = 1 - ours[:8]  # eight questions flip
    paired = paired_difference(ours.tolist(), base.tolist())
    alone = bootstrap(ours.tolist())
    assert paired.value == pytest.approx(ours.mean() - base.mean())
    assert paired.high - paired.low < 0.5 * (alone.high - alone.low)
    assert paired_difference([1.0, 1.0], [0.0, 0.0]).value == 1, "a minus b"
    same = paired_difference(base.tolist(), base.tolist())
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_the_interval_is_a_function_of_the_values_alone():
    values = [0.0, 0.25, 1.0, 0.5] * 20
    state = np.random.get_state()[1].copy()
    assert bootstrap(values) == bootstrap(values)
    assert (np.random.get_state()[1] == state).all(), "the global random state was moved"
    with pytest.raises(ValueError, match="no questions"):
        bootstrap([])
