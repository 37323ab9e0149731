"""Numbers with intervals.

Examples that share an image are one cluster: they are resampled together, since they are no
independent evidence.

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
LEVEL = 0.95
POWER = 0.8
NORMAL_QUANTILE = 1.959963984540054  # of (1 + LEVEL) / 2


class Estimate(NamedTuple):
    """A mean and the bounds of its 95 % interval."""

    value: float
    low: float
    high: float


def mean_interval(
    values: Sequence[float] | np.ndarray[Any, Any],
    *,
    seed: int,
    clusters: np.ndarray[Any, Any] | None = None,
) -> Estimate:
    """The mean and its percentile bootstrap interval; shares of 0 and 1 take Wilson's.

    Args:
        clusters: ``(N,)``, equal where values belong together; None where each is its own.

    Raises:
        ValueError: when there is no value, or one that is not finite.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.size == 0:
        raise ValueError("an interval needs at least one value")
    if not np.isfinite(sample).all():
        raise ValueError("an interval needs finite values")
    members = cluster_members(clusters, sample.size)
    is_share = bool(np.isin(sample, (0.0, 1.0)).all())
    if is_share and members is None:
        return proportion_interval(int(sample.sum()), sample.size)
    if is_share:
        assert members is not None
        share, size = float(sample.mean()), effective_size(sample, members)
        return proportion_interval(share * size, size)._replace(value=share)
    rng = np.random.default_rng(seed)
    if members is None:
        means = sample[rng.integers(sample.size, size=(RESAMPLES, sample.size))].mean(1)
    else:
        sums = np.array([sample[each].sum() for each in members])
        counts = np.array([len(each) for each in members])
        drawn = rng.integers(len(members), size=(RESAMPLES, len(members)))
        means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(sample.mean()), float(low), float(high))


def cluster_members(
    clusters: np.ndarray[Any, Any] | None, number: int
) -> list[np.ndarray[Any, Any]] | None:
    """Return the places of each cluster's examples, in the order of their first ones.

    None where every example is a cluster of its own, for which the plain formulas hold.

    >>> [places.tolist() for places in cluster_members(np.array([7, 3, 7]), 3)]
    [[0, 2], [1]]

    Raises:
        ValueError: when clusters are not those of ``number`` examples.
    """
    if clusters is None:
        return None
    if len(clusters) != number:
        raise ValueError(f"clusters must be those of {number} examples, got {len(clusters)}")
    places: dict[Any, list[int]] = {}
    for place, cluster in enumerate(clusters.tolist()):
        places.setdefault(cluster, []).append(place)
    if len(places) == number:
        return None
    return [np.array(each) for each in places.values()]


def effective_size(sample: np.ndarray[Any, Any], members: list[np.ndarray[Any, Any]]) -> float:
    """Return how many independent examples a share of clustered ones is as certain as.

    It is the size over the design effect, at most the size.  Where all are 0 or all are 1, the
    clusters count: nothing is known of the spread within them.
    """
    number, share = sample.size, float(sample.mean())
    if share in (0.0, 1.0) or len(members) == 1:
        return float(len(members))
    sums = np.array([(sample[each] - share).sum() for each in members])
    clustered = len(members) / (len(members) - 1) * float((sums**2).sum()) / number**2
    independent = share * (1 - share) / number
    return float(number * min(1.0, independent / clustered)) if clustered > 0 else float(number)


def proportion_interval(successes: float, total: float) -> Estimate:
    """A share and Wilson's interval, which holds at 0 and at 1 too.

    Args:
        total: how many examples there are; a fraction where that is an effective size.
    """
    share, square = successes / total, NORMAL_QUANTILE**2
    middle = (share + square / (2 * total)) / (1 + square / total)
    spread = share * (1 - share) / total + square / (4 * total**2)
    half = NORMAL_QUANTILE * spread**0.5 / (1 + square / total)
    # Wilson's bound is 0 for no success, which rounding misses by an ulp.
    low = middle - half if successes else 0.0
    high = middle + half if successes < total else 1.0
    return Estimate(share, low, high)


def mean_over_seeds(values: Sequence[float] | np.ndarray[Any, Any]) -> Estimate:
    """The mean of a few values, as of seeds, and Student's interval; of one value no interval.

    Raises:
        ValueError: when there is no value.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.size == 0:
        raise ValueError("a mean needs at least one value")
    mean, half = float(sample.mean()), 0.0
    if sample.size > 1:
        error = float(sample.std(ddof=1)) / math.sqrt(sample.size)
        half = student_quantile(sample.size - 1) * error
    return Estimate(mean, mean - half, mean + half)


def geometric_mean_interval(values: Sequence[float] | np.ndarray[Any, Any]) -> Estimate:
    """The geometric mean of a few repetitions of one measurement and Student's interval.

    On logarithms, since times and rates are above 0 and a rate is one over a time.  One value has
    no spread: its bounds are itself.

    Raises:
        ValueError: when there is no value, or one that is not above 0 and finite.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.size == 0 or not (np.isfinite(sample) & (sample > 0)).all():
        raise ValueError(f"an interval needs finite values above 0, got {sample.tolist()}")
    return Estimate(*map(math.exp, mean_over_seeds(np.log(sample))))


def ratio_interval(
    numerators: Sequence[float] | np.ndarray[Any, Any],
    denominators: Sequence[float] | np.ndarray[Any, Any],
) -> Estimate:
    """``geometric_mean_interval`` of the ratios of pairs.

    Repetition k of one is paired with repetition k of the other, so what slows both is no spread.

    Raises:
        ValueError: when a value is not above 0 or they are not equally many.
    """
    above, below = (np.asarray(v, dtype=np.float64) for v in (numerators, denominators))
    if above.shape != below.shape or not (below > 0).all():
        raise ValueError("ratios need pairs of values above 0")
    return geometric_mean_interval(above / below)


@cache
def student_quantile(freedom: int) -> float:
    """Return the t between whose negative and itself ``LEVEL`` of Student's distribution lies."""
    try:
        from scipy.stats import t
    except ModuleNotFoundError:
        return student_quantile_by_bisection(freedom)
    return float(t.ppf((1 + LEVEL) / 2, freedom))


def student_quantile_by_bisection(freedom: int) -> float:
    """Return ``student_quantile`` where scipy is not installed, as on a machine lent for minutes.

    Source: Abramowitz and Stegun, 26.7.3 and 26.7.4, solved for the angle by bisection.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        is_below = _student_inside(angle, freedom) < LEVEL
        low, high = (angle, high) if is_below else (low, angle)
    return math.sqrt(freedom) * math.tan(low)


def _student_inside(angle: float, freedom: int) -> float:
    """Return the probability of a t nearer to 0 than ``sqrt(freedom) * tan(angle)``."""
    sine, cosine = math.sin(angle), math.cos(angle)
    is_odd = freedom % 2
    term = cosine if is_odd else 1.0
    total = term if freedom > 1 else 0.0
    for power in range(2 + is_odd, freedom - 1, 2):
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
    """A statistic of all examples and its percentile bootstrap interval.

    For what is no mean of examples, such as an error rate of a corpus or BLEU: each resample
    draws ``number`` examples with repetition and computes the statistic anew.  The bounds need
    not hold the value where the statistic is biased for small samples, as FID is.

    Args:
        statistic: takes the places of the examples drawn, ``(number,)``.
        number: how many examples there are.
        resamples: fewer than the default where a statistic takes seconds, as FID does.
        clusters: ``(number,)``, equal where examples belong together: they are drawn together.

    Raises:
        ValueError: when there is no example or resample, or a statistic that is not finite.
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
            [members[at] for at in rng.integers(len(members), size=len(members))]
        )

    # One resample at a time: all places at once are gigabytes for a large corpus.
    values = [float(statistic(resample())) for _ in range(resamples)]
    if not np.isfinite([value, *values]).all():
        raise ValueError("an interval needs finite values")
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(low), float(high))


def jackknife_interval(
    statistic: Callable[[np.ndarray[Any, Any]], float],
    number: int,
    *,
    groups: int = 20,
    limits: tuple[float, float] = (-math.inf, math.inf),
    clusters: np.ndarray[Any, Any] | None = None,
) -> Estimate:
    """A statistic of all examples and the interval of its grouped jackknife.

    For what is biased where examples repeat or are few, as FID is: each value leaves one group
    out, so all have the same bias, and their spread (Efron and Tibshirani 1993, chapter 11) times
    Student's t gives the bounds.  Examples are grouped in turn, those of a cluster together.

    Args:
        statistic: takes the places of examples, at most ``number``.
        limits: what the statistic cannot leave, nor its interval: a share has 0 and 1.
        clusters: ``(number,)``, equal where examples belong together.

    Raises:
        ValueError: when there are fewer examples than two, or a statistic that is not finite.
    """
    members = cluster_members(clusters, number)
    turns = np.arange(number)
    for turn, each in enumerate(members or ()):
        turns[each] = turn
    num_clusters = number if members is None else len(members)
    groups = min(groups, num_clusters)
    if groups < 2:
        raise ValueError(f"a jackknife needs at least two examples, got {num_clusters}")
    places = np.arange(number)
    left_out = np.array([statistic(places[turns % groups != each]) for each in range(groups)])
    value = float(statistic(places))
    if not np.isfinite([value, *left_out]).all():
        raise ValueError("an interval needs finite values")
    variance = (groups - 1) / groups * float(((left_out - left_out.mean()) ** 2).sum())
    half = student_quantile(groups - 1) * math.sqrt(variance)
    least, most = limits
    return Estimate(value, max(value - half, least), min(value + half, most))


class PairedDifference(NamedTuple):
    """A mean difference of pairs, the bounds of its 95 % interval, and p of no difference."""

    value: float
    low: float
    high: float
    p_value: float


def paired_t(differences: Sequence[float] | np.ndarray[Any, Any]) -> PairedDifference:
    """The mean of paired differences by Student's t: for a few seeds, whose spread is unknown.

    Differences that are all equal have no spread: their bounds are the value and p is 0, or 1
    where it is 0.

    Raises:
        ValueError: when there are fewer than two, or one that is not finite.
    """
    from scipy.stats import t

    sample = _differences(differences)
    found, error = mean_over_seeds(sample), float(sample.std(ddof=1)) / math.sqrt(sample.size)
    p_value = float(found.value == 0)
    if error > 0:
        p_value = 2 * float(t.sf(abs(found.value) / error, sample.size - 1))
    return PairedDifference(*found, p_value)


def exact_paired(differences: Sequence[float] | np.ndarray[Any, Any]) -> PairedDifference:
    """Compare paired outcomes of 0 or 1 exactly, for runs that succeed or fail as a whole.

    p is that of McNemar's exact test: a binomial test of the pairs that differ.  The interval of
    the difference of both proportions joins Clopper-Pearson intervals of the proportions of pairs
    that differ in either direction, at 97.5 % each (Bonferroni), so it covers at least 95 % and
    stays within [-1, 1].

    Args:
        differences: of each pair, -1, 0 or 1.

    Raises:
        ValueError: when there are fewer than two pairs, or another value.
    """
    from scipy.stats import binomtest

    sample = _differences(differences)
    if not np.isin(sample, (-1, 0, 1)).all():
        raise ValueError(f"differences must be -1, 0 or 1, got {sample.tolist()}")
    gains, losses = int((sample > 0).sum()), int((sample < 0).sum())
    p_value = float(binomtest(gains, gains + losses).pvalue) if gains + losses else 1.0
    level = 1 - (1 - LEVEL) / 2
    gained, lost = (
        binomtest(count, sample.size).proportion_ci(level, method="exact")
        for count in (gains, losses)
    )
    low, high = float(gained.low - lost.high), float(gained.high - lost.low)
    return PairedDifference(float(sample.mean()), low, high, p_value)


def paired_bootstrap(
    differences: Sequence[float] | np.ndarray[Any, Any], *, seed: int
) -> PairedDifference:
    """The mean of paired differences by percentile bootstrap over pairs: for tens of examples.

    With fewer its interval is too narrow: five resampled pairs have four fifths of the spread.

    Raises:
        ValueError: when there are fewer than two, or one that is not finite.
    """
    sample = _differences(differences)
    rng = np.random.default_rng(seed)
    means = sample[rng.integers(sample.size, size=(RESAMPLES, sample.size))].mean(1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    # The resample that was seen counts as one, so that p is never 0.
    tails = [(float((means <= 0).sum()) + 1), (float((means >= 0).sum()) + 1)]
    p_value = min(1.0, 2 * min(tails) / (RESAMPLES + 1))
    return PairedDifference(float(sample.mean()), float(low), float(high), p_value)


def _differences(values: Sequence[float] | np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    sample = np.asarray(values, dtype=np.float64)
    if sample.size < 2 or not np.isfinite(sample).all():
        raise ValueError(f"a comparison needs at least two finite pairs, got {sample.tolist()}")
    return sample


def holm(p_values: Sequence[float]) -> list[float]:
    """Each p as it counts among all comparisons of an experiment; at most 1.

    Where those at most 0.05 are called differences, one or more is called so wrongly in at most
    5 % of experiments.  Source: Holm 1979, Scandinavian Journal of Statistics 6(2).

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = np.argsort(p_values, kind="stable")
    adjusted, greatest = [0.0] * len(p_values), 0.0
    for rank, at in enumerate(order):
        greatest = max(greatest, min(1.0, (len(p_values) - rank) * p_values[at]))
        adjusted[at] = greatest
    return adjusted


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's: the correlation of the ranks of two columns, NaN where one is constant."""
    from scipy.stats import rankdata

    ranks = [rankdata(column) for column in (first, second)]
    if any(np.ptp(own) == 0 for own in ranks):
        return math.nan
    return float(np.corrcoef(*ranks)[0, 1])


def minimum_detectable_effect(spread: float, pairs: int) -> float:
    """The difference that so many pairs show with a power of 80 %, by Student's t.

    Args:
        spread: standard deviation of the differences of pairs.

    Raises:
        ValueError: when there are fewer pairs than two.
    """
    from scipy.optimize import brentq
    from scipy.stats import nct

    if pairs < 2:
        raise ValueError(f"a comparison needs at least two pairs, got {pairs}")
    quantile = student_quantile(pairs - 1)

    def missing_power(shift: float) -> float:
        return POWER - float(nct.sf(quantile, pairs - 1, shift))

    # No shift has a power of 2.5 %, and one of twice the quantile and 10 has all of it.
    shift = float(brentq(missing_power, 0.0, 2 * quantile + 10))
    return shift * spread / math.sqrt(pairs)


def pairs_needed(spread: float, effect: float) -> int:
    """The fewest pairs, at least 2, that show a difference of this size with a power of 80 %."""
    if effect <= 0:
        raise ValueError(f"an effect must be above 0, got {effect}")
    low, high = 1, 2
    while minimum_detectable_effect(spread, high) > effect:
        low, high = high, 2 * high
    # Between what is too few and what is enough.
    while high - low > 1:
        middle = (low + high) // 2
        is_enough = minimum_detectable_effect(spread, middle) <= effect
        low, high = (low, middle) if is_enough else (middle, high)
    return high
