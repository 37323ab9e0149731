"""Paired comparisons: checked against scipy, simulation and numbers computed by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from rudolph.evaluation.statistics import (
    POWER,
    exact_paired,
    holm,
    minimum_detectable_effect,
    paired_bootstrap,
    paired_t,
    pairs_needed,
    rank_correlation,
    student_quantile,
    student_quantile_by_bisection,
)
from rudolph.reports.report import read_runs

RESULTS = Path(__file__).parent.parent / "results"
VALUES = st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=9)


@given(values=VALUES)
def test_paired_t_is_that_of_scipy(values: list[float]) -> None:
    sample = np.array(values)
    if sample.std() < 1e-3:
        return
    found, expected = paired_t(values), stats.ttest_1samp(sample, 0.0)
    bounds = expected.confidence_interval(0.95)
    assert found.p_value == pytest.approx(expected.pvalue, abs=1e-9)
    assert found[:3] == pytest.approx((sample.mean(), bounds.low, bounds.high), abs=1e-6)


def test_differences_without_spread_are_sure() -> None:
    assert paired_t([2.0, 2.0, 2.0]) == (2.0, 2.0, 2.0, 0.0)
    assert paired_t([0.0, 0.0]) == (0.0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize("values", [[], [1.0], [1.0, float("nan")], [1.0, float("inf")]])
def test_one_pair_or_broken_ones_cannot_be_compared(values: list[float]) -> None:
    for compare in (paired_t, lambda sample: paired_bootstrap(sample, seed=0)):
        with pytest.raises(ValueError, match="at least two finite pairs"):
            compare(values)


@pytest.mark.parametrize(("pairs", "kind"), [(3, "t"), (5, "t"), (60, "bootstrap")])
def test_where_nothing_differs_at_most_one_in_twenty_is_called_so(pairs: int, kind: str) -> None:
    rng = np.random.default_rng(pairs)
    compare: Any = paired_t if kind == "t" else lambda sample: paired_bootstrap(sample, seed=0)
    found = [compare(rng.normal(size=pairs)) for _ in range(400)]
    # 20 of 400 null comparisons are expected below 0.05; 33 occur once in a thousand times.
    assert sum(each.p_value < 0.05 for each in found) <= 33
    assert sum(not each.low <= 0 <= each.high for each in found) <= 33


@pytest.mark.parametrize(
    "metric", ["text_to_image/nats/test", "text_to_image/object_accuracy/test"]
)
def test_trained_runs_that_differ_in_nothing_but_their_seed_are_rarely_called_so(
    metric: str,
) -> None:
    """Real runs: five seeds against five other seeds, sampled 200 times."""
    values = read_runs(RESULTS / "numerics" / "no_difference")[metric].to_numpy()
    rng = np.random.default_rng(0)
    p_values = []
    for _ in range(200):
        one, other = values[rng.permutation(len(values))[:10]].reshape(2, 5)
        p_values.append(paired_t(one - other).p_value)
    # 10 of 200 null comparisons are expected; 20 occur once in four hundred times.
    assert sum(p < 0.05 for p in p_values) <= 20


def test_bounds_and_p_of_a_comparison_say_the_same() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        found = paired_t(rng.normal(0.8, size=4))
        assert (found.p_value < 0.05) == (not found.low <= 0 <= found.high)


@given(p_values=st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_refuses_what_its_steps_refuse(p_values: list[float]) -> None:
    """The rule as published: start at the smallest p, and stop at the first that is too large."""
    order, refused = sorted(range(len(p_values)), key=lambda at: p_values[at]), set()
    for rank, at in enumerate(order):
        if p_values[at] * (len(p_values) - rank) > 0.05:
            break
        refused.add(at)
    assert {at for at, p in enumerate(holm(p_values)) if p <= 0.05} == refused


@pytest.mark.parametrize(("pairs", "spread"), [(2, 3.0), (3, 1.0), (5, 0.02), (20, 7.0)])
def test_the_detectable_effect_is_detected_in_four_of_five_tries(
    pairs: int, spread: float
) -> None:
    rng, effect = np.random.default_rng(pairs), minimum_detectable_effect(spread, pairs)
    found = [paired_t(rng.normal(effect, spread, size=pairs)) for _ in range(2000)]
    # Three standard errors of a fraction of 80 %.
    assert sum(each.low > 0 for each in found) / 2000 == pytest.approx(POWER, abs=0.027)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=9))
def test_rank_correlation_is_that_of_scipy(pairs: list[tuple[int, int]]) -> None:
    first, second = zip(*pairs, strict=True)
    if len(set(first)) == 1 or len(set(second)) == 1:
        assert np.isnan(rank_correlation(first, second))
    else:
        expected = stats.spearmanr(first, second).statistic
        assert rank_correlation(first, second) == pytest.approx(expected)


@pytest.mark.parametrize("effect", [0.1, 0.5, 1.0, 9.0])
def test_the_pairs_needed_are_the_fewest(effect: float) -> None:
    pairs = pairs_needed(1.0, effect)
    assert minimum_detectable_effect(1.0, pairs) <= effect
    assert pairs == 2 or minimum_detectable_effect(1.0, pairs - 1) > effect


def test_students_quantile_is_that_of_scipy() -> None:
    for freedom in (*range(1, 60), 199, 200, 999):
        expected = stats.t.ppf(0.975, freedom)
        assert student_quantile(freedom) == expected
        assert student_quantile_by_bisection(freedom) == pytest.approx(expected, rel=1e-12)


def test_outcomes_of_zero_and_one_are_compared_exactly() -> None:
    """p is McNemar's by counting; the interval stays in [-1, 1] and covers at least 95 %."""
    found = exact_paired([1, 1, 1, -1, 0])
    # If 4 pairs differ, outcomes of 1 and 3 in favour are equally extreme; only 2 is less so.
    assert found.value == pytest.approx(0.4) and found.p_value == pytest.approx(10 / 16)
    assert exact_paired([0, 0, 0]).p_value == 1
    for differences in ([1, 1, 1], [0, 1, 0, 0, 0], [-1] * 8):
        each = exact_paired(differences)
        assert -1 <= each.low <= each.value <= each.high <= 1
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(300):
        both = rng.random((6, 2)) < (0.9, 0.6)
        each = exact_paired(both[:, 0].astype(float) - both[:, 1])
        covered.append(each.low <= 0.3 <= each.high)
    assert np.mean(covered) >= 0.95
    with pytest.raises(ValueError, match="must be -1, 0 or 1"):
        exact_paired([0.5, 1.0])
