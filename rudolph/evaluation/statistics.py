"""Numbers with intervals.

Source: Efron and Tibshirani 1993, chapter 13 (percentile bootstrap); Wilson 1927.
"""

from collections.abc import Sequence
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
