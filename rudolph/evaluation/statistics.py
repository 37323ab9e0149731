"""Numbers with intervals.

Source: Efron and Tibshirani 1993, chapter 13 (percentile bootstrap); Wilson 1927; Abramowitz and
Stegun 1964, 26.7.3 and 26.7.4 (Student's t).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95
NORMAL_QUANTILE = 1.959963984540054  # of (1 + LEVEL) / 2


class Estimate(NamedTuple):
    """A mean and the bounds of its 95 % interval."""

    value: float
    low: float
    high: float


def mean_interval(values: Sequence[float] | np.ndarray[Any, Any], *, seed: int) -> Estimate:
    """The mean and its percentile bootstrap interval; shares of 0 and 1 take Wilson's.

    Raises:
        ValueError: when there is no value, or one that is not finite.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.size == 0:
        raise ValueError("an interval needs at least one value")
    if not np.isfinite(sample).all():
        raise ValueError("an interval needs finite values")
    if np.isin(sample, (0.0, 1.0)).all():
        return share_interval(int(sample.sum()), sample.size)
    rng = np.random.default_rng(seed)
    drawn = rng.integers(sample.size, size=(RESAMPLES, sample.size))
    means = sample[drawn].mean(1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(sample.mean()), float(low), float(high))


def share_interval(successes: int, total: int) -> Estimate:
    """A share and Wilson's interval, which holds at 0 and at 1 too."""
    share, square = successes / total, NORMAL_QUANTILE**2
    middle = (share + square / (2 * total)) / (1 + square / total)
    spread = share * (1 - share) / total + square / (4 * total**2)
    half = NORMAL_QUANTILE * spread**0.5 / (1 + square / total)
    # Wilson's bound is 0 for no success, which rounding misses by an ulp.
    low = middle - half if successes else 0.0
    high = middle + half if successes < total else 1.0
    return Estimate(share, low, high)


def repeated_interval(values: Sequence[float] | np.ndarray[Any, Any]) -> Estimate:
    """The geometric mean of a few repetitions of one measurement and Student's interval.

    On logarithms, since times and rates are above 0 and a rate is one over a time.  One value has
    no spread: its bounds are itself.

    Raises:
        ValueError: when there is no value, or one that is not above 0 and finite.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.size == 0 or not (np.isfinite(sample) & (sample > 0)).all():
        raise ValueError(f"an interval needs finite values above 0, got {sample.tolist()}")
    logs = np.log(sample)
    mean, half = float(logs.mean()), 0.0
    if sample.size > 1:
        error = float(logs.std(ddof=1)) / math.sqrt(sample.size)
        half = student_quantile(sample.size - 1) * error
    return Estimate(math.exp(mean), math.exp(mean - half), math.exp(mean + half))


def ratio_interval(
    numerators: Sequence[float] | np.ndarray[Any, Any],
    denominators: Sequence[float] | np.ndarray[Any, Any],
) -> Estimate:
    """``repeated_interval`` of the ratios of pairs.

    Repetition k of one is paired with repetition k of the other, so what slows both is no spread.

    Raises:
        ValueError: when a value is not above 0 or they are not equally many.
    """
    above, below = (np.asarray(v, dtype=np.float64) for v in (numerators, denominators))
    if above.shape != below.shape or not (below > 0).all():
        raise ValueError("ratios need pairs of values above 0")
    return repeated_interval(above / below)


def student_quantile(freedom: int) -> float:
    """Student's t below which (1 + LEVEL) / 2 of the distribution lie."""
    low, high = 0.0, 1000.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_share(middle, freedom) < LEVEL else (low, middle)
    return high


def _student_share(t: float, freedom: int) -> float:
    """The share of Student's distribution between -t and t."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    is_odd = freedom % 2
    term = cosine if is_odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(2 + is_odd, freedom - 1, 2):
        term *= (k - 1) / k * cosine**2
        total += term
    return (angle + sine * total) * 2 / math.pi if is_odd else sine * total


def resampled_interval(
    statistic: Callable[[np.ndarray[Any, Any]], float],
    number: int,
    *,
    seed: int,
    resamples: int = RESAMPLES,
) -> Estimate:
    """A statistic of all examples and its percentile bootstrap interval.

    For what is no mean of examples, such as an error rate of a corpus or BLEU: each resample
    draws ``number`` examples with repetition and computes the statistic anew.  The bounds need
    not hold the value where the statistic is biased for small samples, as FID is.

    Args:
        statistic: takes the places of the examples drawn, ``(number,)``.
        number: how many examples there are.
        resamples: fewer than the default where a statistic takes seconds, as FID does.

    Raises:
        ValueError: when there is no example or resample, or a statistic that is not finite.
    """
    if number < 1 or resamples < 1:
        raise ValueError("an interval needs at least one example and one resample")
    rng = np.random.default_rng(seed)
    value = float(statistic(np.arange(number)))
    # One resample at a time: all places at once are gigabytes for a large corpus.
    values = [float(statistic(rng.integers(number, size=number))) for _ in range(resamples)]
    if not np.isfinite([value, *values]).all():
        raise ValueError("an interval needs finite values")
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(low), float(high))


def jackknife_interval(
    statistic: Callable[[np.ndarray[Any, Any]], float], number: int, *, groups: int = 20
) -> Estimate:
    """A statistic of all examples and the interval of its grouped jackknife.

    For what is biased where examples repeat or are few, as FID is: each value leaves one group
    out, so all have the same bias, and their spread (Efron and Tibshirani 1993, chapter 11) times
    Student's t gives the bounds.  Examples are grouped in turn.

    Args:
        statistic: takes the places of examples, at most ``number``.

    Raises:
        ValueError: when there are fewer examples than two, or a statistic that is not finite.
    """
    groups = min(groups, number)
    if groups < 2:
        raise ValueError(f"a jackknife needs at least two examples, got {number}")
    places = np.arange(number)
    left_out = np.array([statistic(places[places % groups != each]) for each in range(groups)])
    value = float(statistic(places))
    if not np.isfinite([value, *left_out]).all():
        raise ValueError("an interval needs finite values")
    variance = (groups - 1) / groups * float(((left_out - left_out.mean()) ** 2).sum())
    half = student_quantile(groups - 1) * math.sqrt(variance)
    return Estimate(value, value - half, value + half)
