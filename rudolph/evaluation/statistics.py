"""Confidence intervals and paired comparisons.

Examples that share an image form one cluster.  They are resampled together, because they are not
independent.

Source: Efron and Tibshirani 1993, chapter 13 (percentile bootstrap); Wilson 1927; Field and Welsh
2007, Journal of the Royal Statistical Society B 69(3) (cluster bootstrap); Korn and Graubard 1998,
Survey Methodology 24(2) (effective size of clustered proportions).
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

RESAMPLES = 2000
CONFIDENCE_LEVEL = 0.95
POWER = 0.8
NORMAL_QUANTILE = 1.959963984540054  # at probability (1 + CONFIDENCE_LEVEL) / 2


class Estimate(NamedTuple):
    """A value and the bounds of its 95 % confidence interval."""

    value: float
    low: float
    high: float


def mean_interval(
    values: Sequence[float] | np.ndarray[Any, Any],
    *,
    seed: int,
    clusters: np.ndarray[Any, Any] | None = None,
) -> Estimate:
    """Return the mean with its interval: Wilson's if all values are 0 or 1, else the bootstrap's.

    Bootstrap intervals are percentile intervals.  Wilson's interval for clustered examples uses
    their effective sample size.

    Args:
        values: one value per example, ``(N,)``.
        seed: seed of the bootstrap.
        clusters: ``(N,)``, equal for examples that belong together; None if all are independent.

    Raises:
        ValueError: if there is no value, or a value is not finite.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.size == 0:
        raise ValueError("an interval needs at least one value")
    if not np.isfinite(sample).all():
        raise ValueError("an interval needs finite values")
    members = cluster_members(clusters, sample.size)
    is_proportion = bool(np.isin(sample, (0.0, 1.0)).all())
    if is_proportion and members is None:
        return proportion_interval(int(sample.sum()), sample.size)
    if is_proportion:
        assert members is not None
        proportion, size = float(sample.mean()), effective_size(sample, members)
        return proportion_interval(proportion * size, size)._replace(value=proportion)
    rng = np.random.default_rng(seed)
    if members is None:
        means = sample[rng.integers(sample.size, size=(RESAMPLES, sample.size))].mean(1)
    else:
        sums = np.array([sample[positions].sum() for positions in members])
        counts = np.array([len(positions) for positions in members])
        sampled_clusters = rng.integers(len(members), size=(RESAMPLES, len(members)))
        means = sums[sampled_clusters].sum(1) / counts[sampled_clusters].sum(1)
    low, high = np.quantile(means, [(1 - CONFIDENCE_LEVEL) / 2, (1 + CONFIDENCE_LEVEL) / 2])
    return Estimate(float(sample.mean()), float(low), float(high))


def cluster_members(
    clusters: np.ndarray[Any, Any] | None, number: int
) -> list[np.ndarray[Any, Any]] | None:
    """Return the positions of each cluster's examples; clusters are in order of first appearance.

    Return None if every example is a cluster of its own, for which the plain formulas hold.

    >>> [places.tolist() for places in cluster_members(np.array([7, 3, 7]), 3)]
    [[0, 2], [1]]

    Raises:
        ValueError: if ``clusters`` does not have ``number`` entries.
    """
    if clusters is None:
        return None
    if len(clusters) != number:
        raise ValueError(f"clusters: expected one per example ({number}), got {len(clusters)}")
    positions: dict[Any, list[int]] = {}
    for position, cluster in enumerate(clusters.tolist()):
        positions.setdefault(cluster, []).append(position)
    if len(positions) == number:
        return None
    return [np.array(cluster_positions) for cluster_positions in positions.values()]


def effective_size(sample: np.ndarray[Any, Any], members: list[np.ndarray[Any, Any]]) -> float:
    """Return the effective sample size of a proportion over clustered examples.

    This is the sample size divided by the design effect, and at most the sample size.  It is the
    number of clusters if all values are equal, because the spread within clusters is then unknown.

    Args:
        sample: values 0 or 1, ``(N,)``.
        members: positions of each cluster's examples, see ``cluster_members``.
    """
    number, proportion = sample.size, float(sample.mean())
    if proportion in (0.0, 1.0) or len(members) == 1:
        return float(len(members))
    sums = np.array([(sample[positions] - proportion).sum() for positions in members])
    clustered = len(members) / (len(members) - 1) * float((sums**2).sum()) / number**2
    independent = proportion * (1 - proportion) / number
    return float(number * min(1.0, independent / clustered)) if clustered > 0 else float(number)


def proportion_interval(successes: float, total: float) -> Estimate:
    """Return a proportion with Wilson's interval, which is valid at 0 and 1 too.

    Args:
        successes: number of successes; fractional for an effective size.
        total: number of examples; fractional for an effective size.
    """
    proportion, square = successes / total, NORMAL_QUANTILE**2
    centre = (proportion + square / (2 * total)) / (1 + square / total)
    spread = proportion * (1 - proportion) / total + square / (4 * total**2)
    half_width = NORMAL_QUANTILE * spread**0.5 / (1 + square / total)
    # Without a success Wilson's lower bound is exactly 0, which rounding misses by an ulp.
    low = centre - half_width if successes else 0.0
    high = centre + half_width if successes < total else 1.0
    return Estimate(proportion, low, high)


def mean_over_seeds(values: Sequence[float] | np.ndarray[Any, Any]) -> Estimate:
    """Return the mean of a few values, such as one per seed, with Student's t interval.

    For a single value both bounds equal the value.

    Raises:
        ValueError: if there is no value.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.size == 0:
        raise ValueError("a mean needs at least one value")
    mean, half_width = float(sample.mean()), 0.0
    if sample.size > 1:
        error = float(sample.std(ddof=1)) / math.sqrt(sample.size)
        half_width = student_quantile(sample.size - 1) * error
    return Estimate(mean, mean - half_width, mean + half_width)


def geometric_mean_interval(values: Sequence[float] | np.ndarray[Any, Any]) -> Estimate:
    """Return the geometric mean of repeated measurements with Student's t interval.

    The interval is computed on logarithms, because times and rates are positive and a rate is the
    inverse of a time.  For a single value both bounds equal the value.

    Raises:
        ValueError: if there is no value, or a value is not positive and finite.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.size == 0 or not (np.isfinite(sample) & (sample > 0)).all():
        raise ValueError(f"an interval needs finite values above 0, got {sample.tolist()}")
    return Estimate(*map(math.exp, mean_over_seeds(np.log(sample))))


def ratio_interval(
    numerators: Sequence[float] | np.ndarray[Any, Any],
    denominators: Sequence[float] | np.ndarray[Any, Any],
) -> Estimate:
    """Return ``geometric_mean_interval`` of the ratios of paired repetitions.

    Repetition k of the numerator is paired with repetition k of the denominator, so a slowdown of
    both cancels.

    Raises:
        ValueError: if a value is not positive, or the numbers of repetitions differ.
    """
    numerator, denominator = (np.asarray(v, dtype=np.float64) for v in (numerators, denominators))
    if numerator.shape != denominator.shape or not (denominator > 0).all():
        raise ValueError("ratios need pairs of values above 0")
    return geometric_mean_interval(numerator / denominator)


@cache
def student_quantile(degrees_of_freedom: int) -> float:
    """Return the t that bounds the central ``CONFIDENCE_LEVEL`` of Student's distribution.

    Args:
        degrees_of_freedom: degrees of freedom.
    """
    try:
        from scipy.stats import t
    except ModuleNotFoundError:
        return student_quantile_by_bisection(degrees_of_freedom)
    return float(t.ppf((1 + CONFIDENCE_LEVEL) / 2, degrees_of_freedom))


def student_quantile_by_bisection(degrees_of_freedom: int) -> float:
    """Compute ``student_quantile`` without SciPy, for machines that lack it.

    Source: Abramowitz and Stegun, 26.7.3 and 26.7.4, solved for the angle by bisection.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        is_below = _student_inside(angle, degrees_of_freedom) < CONFIDENCE_LEVEL
        low, high = (angle, high) if is_below else (low, angle)
    return math.sqrt(degrees_of_freedom) * math.tan(low)


def _student_inside(angle: float, degrees_of_freedom: int) -> float:
    """Return the probability that abs(t) is below ``sqrt(freedom) * tan(angle)``."""
    sine, cosine = math.sin(angle), math.cos(angle)
    is_odd = degrees_of_freedom % 2
    term = cosine if is_odd else 1.0
    total = term if degrees_of_freedom > 1 else 0.0
    for power in range(2 + is_odd, degrees_of_freedom - 1, 2):
        term *= cosine**2 * (power - 1) / power
        total += term
    return 2 / math.pi * (angle + sine * total) if is_odd else sine * total


def bootstrap_interval(
    statistic: Callable[[np.ndarray[Any, Any]], float],
    number: int,
    *,
    seed: int,
    resamples: int = RESAMPLES,
    clusters: np.ndarray[Any, Any] | None = None,
) -> Estimate:
    """Return a statistic of all examples with its percentile bootstrap interval.

    Use it for a statistic that is not a mean over examples, such as a corpus error rate or BLEU.
    Each resample takes examples with replacement and recomputes the statistic.  The interval may
    miss the value if the statistic is biased for small samples, as FID is.

    Args:
        statistic: function of the positions ``(number,)`` of the resampled examples.  If clusters
            differ in size, the number of positions varies.
        number: number of examples.
        seed: seed of the bootstrap.
        resamples: number of resamples; lower it if the statistic takes seconds, as FID does.
        clusters: ``(number,)``, equal for examples that are resampled together.

    Raises:
        ValueError: if there is no example or resample, or the statistic is not finite.
    """
    if number < 1 or resamples < 1:
        raise ValueError("an interval needs at least one example and one resample")
    rng = np.random.default_rng(seed)
    value = float(statistic(np.arange(number)))
    members = cluster_members(clusters, number)

    def resample() -> np.ndarray[Any, Any]:
        if members is None:
            return rng.integers(number, size=number)
        return np.concatenate(
            [members[cluster] for cluster in rng.integers(len(members), size=len(members))]
        )

    # One resample at a time: all positions at once take gigabytes for a large corpus.
    values = [float(statistic(resample())) for _ in range(resamples)]
    if not np.isfinite([value, *values]).all():
        raise ValueError("an interval needs finite values")
    low, high = np.quantile(values, [(1 - CONFIDENCE_LEVEL) / 2, (1 + CONFIDENCE_LEVEL) / 2])
    return Estimate(value, float(low), float(high))


def jackknife_interval(
    statistic: Callable[[np.ndarray[Any, Any]], float],
    number: int,
    *,
    groups: int = 20,
    limits: tuple[float, float] = (-math.inf, math.inf),
    clusters: np.ndarray[Any, Any] | None = None,
) -> Estimate:
    """Return a statistic of all examples with its grouped jackknife interval.

    Use it for a statistic that is biased on repeated or few examples, as FID is.  Each value
    leaves one group out, so all values have the same bias.  Their spread times Student's t gives
    the bounds (Efron and Tibshirani 1993, chapter 11).  Examples are assigned to groups in turn,
    and a cluster stays in one group.

    Args:
        statistic: function of the positions of at most ``number`` examples.
        number: number of examples.
        groups: number of groups, reduced to the number of clusters if that is lower.
        limits: range of the statistic, to which the interval is clipped: (0, 1) for a fraction.
        clusters: ``(number,)``, equal for examples that belong together.

    Raises:
        ValueError: if there are fewer than two clusters, or the statistic is not finite.
    """
    members = cluster_members(clusters, number)
    group_of_example = np.arange(number)
    for cluster, cluster_positions in enumerate(members or ()):
        group_of_example[cluster_positions] = cluster
    num_clusters = number if members is None else len(members)
    groups = min(groups, num_clusters)
    if groups < 2:
        raise ValueError(f"a jackknife needs at least two examples, got {num_clusters}")
    examples = np.arange(number)
    leave_out_values = np.array(
        [statistic(examples[group_of_example % groups != group]) for group in range(groups)]
    )
    value = float(statistic(examples))
    if not np.isfinite([value, *leave_out_values]).all():
        raise ValueError("an interval needs finite values")
    variance = (
        (groups - 1) / groups * float(((leave_out_values - leave_out_values.mean()) ** 2).sum())
    )
    half_width = student_quantile(groups - 1) * math.sqrt(variance)
    lower_limit, upper_limit = limits
    return Estimate(
        value, max(value - half_width, lower_limit), min(value + half_width, upper_limit)
    )


class PairedDifference(NamedTuple):
    """A mean paired difference, its 95 % interval, and the p-value against no difference."""

    value: float
    low: float
    high: float
    p_value: float


def paired_t(differences: Sequence[float] | np.ndarray[Any, Any]) -> PairedDifference:
    """Test the mean of paired differences with Student's t, for a few seeds.

    If all differences are equal, both bounds equal the value, and p is 0, or 1 if the value is 0.

    Raises:
        ValueError: if there are fewer than two differences, or a difference is not finite.
    """
    from scipy.stats import t

    sample = _differences(differences)
    mean, error = mean_over_seeds(sample), float(sample.std(ddof=1)) / math.sqrt(sample.size)
    p_value = float(mean.value == 0)
    if error > 0:
        p_value = 2 * float(t.sf(abs(mean.value) / error, sample.size - 1))
    return PairedDifference(*mean, p_value)


def exact_paired(differences: Sequence[float] | np.ndarray[Any, Any]) -> PairedDifference:
    """Compare paired outcomes of 0 or 1 exactly, for runs that succeed or fail as a whole.

    The p-value is that of McNemar's exact test: a binomial test of the pairs that differ.  The
    interval is the difference of two Clopper-Pearson intervals at 97.5 %: one for the fraction of
    pairs with difference 1, one for the fraction with -1.  By Bonferroni it covers at least 95 %,
    and it stays within [-1, 1].

    Args:
        differences: the difference of each pair: -1, 0 or 1.

    Raises:
        ValueError: if there are fewer than two pairs, or a difference has another value.
    """
    from scipy.stats import binomtest

    sample = _differences(differences)
    if not np.isin(sample, (-1, 0, 1)).all():
        raise ValueError(f"differences must be -1, 0 or 1, got {sample.tolist()}")
    gains, losses = int((sample > 0).sum()), int((sample < 0).sum())
    p_value = float(binomtest(gains, gains + losses).pvalue) if gains + losses else 1.0
    level = 1 - (1 - CONFIDENCE_LEVEL) / 2
    gain_interval, loss_interval = (
        binomtest(count, sample.size).proportion_ci(level, method="exact")
        for count in (gains, losses)
    )
    low, high = (
        float(gain_interval.low - loss_interval.high),
        float(gain_interval.high - loss_interval.low),
    )
    return PairedDifference(float(sample.mean()), low, high, p_value)


def paired_bootstrap(
    differences: Sequence[float] | np.ndarray[Any, Any], *, seed: int
) -> PairedDifference:
    """Test the mean of paired differences by percentile bootstrap, for tens of examples.

    With few pairs the interval is too narrow: the bootstrap variance of five pairs is four fifths
    of the unbiased one.

    Raises:
        ValueError: if there are fewer than two differences, or a difference is not finite.
    """
    sample = _differences(differences)
    rng = np.random.default_rng(seed)
    means = sample[rng.integers(sample.size, size=(RESAMPLES, sample.size))].mean(1)
    low, high = np.quantile(means, [(1 - CONFIDENCE_LEVEL) / 2, (1 + CONFIDENCE_LEVEL) / 2])
    # The observed sample counts as one resample, so that p is never 0.
    tails = [(float((means <= 0).sum()) + 1), (float((means >= 0).sum()) + 1)]
    p_value = min(1.0, 2 * min(tails) / (RESAMPLES + 1))
    return PairedDifference(float(sample.mean()), float(low), float(high), p_value)


def _differences(values: Sequence[float] | np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    sample = np.asarray(values, dtype=np.float64)
    if sample.size < 2 or not np.isfinite(sample).all():
        raise ValueError(f"a comparison needs at least two finite pairs, got {sample.tolist()}")
    return sample


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the Holm-adjusted p-values of all comparisons of an experiment, at most 1.

    Rejecting at an adjusted p of at most 0.05 keeps the family-wise error rate at 5 %.

    Source: Holm 1979, Scandinavian Journal of Statistics 6(2).

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = np.argsort(p_values, kind="stable")
    adjusted, running_max = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        running_max = max(running_max, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running_max
    return adjusted


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Spearman's rank correlation, or NaN if either sequence is constant."""
    from scipy.stats import rankdata

    ranks = [rankdata(column) for column in (first, second)]
    if any(np.ptp(column_ranks) == 0 for column_ranks in ranks):
        return math.nan
    return float(np.corrcoef(*ranks)[0, 1])


def minimum_detectable_effect(spread: float, pairs: int) -> float:
    """Return the difference that a paired t-test detects at 80 % power.

    Args:
        spread: standard deviation of the paired differences.
        pairs: number of pairs.

    Raises:
        ValueError: if there are fewer than two pairs.
    """
    if pairs < 2:
        raise ValueError(f"a comparison needs at least two pairs, got {pairs}")
    return _detectable_shift(pairs) * spread / math.sqrt(pairs)


@cache
def _detectable_shift(pairs: int) -> float:
    """Return the shift of Student's t that a two-sided test detects at 80 % power."""
    from scipy.optimize import brentq
    from scipy.stats import nct

    quantile = student_quantile(pairs - 1)

    def missing_power(shift: float) -> float:
        return POWER - float(nct.sf(quantile, pairs - 1, shift))

    # The bracket holds the root: power is 2.5 % at shift 0 and nearly 1 at the upper end.
    return float(brentq(missing_power, 0.0, 2 * quantile + 10))


def pairs_needed(spread: float, effect: float) -> int:
    """Return how many pairs (at least 2) a paired t-test needs to detect ``effect`` at 80 % power.

    Args:
        spread: standard deviation of the paired differences.
        effect: the difference to detect.

    Raises:
        ValueError: if ``effect`` is not positive.
    """
    if effect <= 0:
        raise ValueError(f"an effect must be above 0, got {effect}")
    low, high = 1, 2
    while minimum_detectable_effect(spread, high) > effect:
        low, high = high, 2 * high
    # Bisection invariant: ``low`` pairs are too few and ``high`` pairs are enough.
    while high - low > 1:
        middle = (low + high) // 2
        is_enough = minimum_detectable_effect(spread, middle) <= effect
        low, high = (low, middle) if is_enough else (middle, high)
    return high
