"""Regions of good settings: axes and their inverse, a known box, and the contents of a box."""

import numpy as np
import pytest

from rudolph.evaluation.regions import (
    GRID,
    PURITY,
    Axis,
    as_rows,
    find_region,
    low_discrepancy_points,
    points_within,
    settings_at,
    smoothed_scores,
    unit_coordinates,
)

SPACE = {
    "temperature": Axis(0.1, 2.0, log=True),
    "top_k": Axis(1, 256, log=True),
    "top_p": Axis(0.1, 1.0),
}


def test_settings_and_places_are_there_and_back_again() -> None:
    places = low_discrepancy_points(50, 3, seed=3)
    settings = [settings_at(SPACE, place) for place in places.tolist()]
    assert all(isinstance(each["top_k"], int) and 1 <= each["top_k"] <= 256 for each in settings)
    back = unit_coordinates(SPACE, settings)
    np.testing.assert_allclose(back[:, [0, 2]], places[:, [0, 2]], atol=0.01)
    # Small integers are far apart on a logarithmic axis and are recovered exactly.
    again = [settings_at(SPACE, place) for place in back.tolist()]
    assert again == settings
    assert settings_at(SPACE, [0, 0, 0]) == {"temperature": 0.1, "top_k": 1, "top_p": 0.1}
    assert settings_at(SPACE, [1, 1, 1]) == {"temperature": 2.0, "top_k": 256, "top_p": 1.0}


def test_points_of_fewer_are_the_first_of_more_and_fill_the_cube() -> None:
    few, many = low_discrepancy_points(10, 3, seed=5), low_discrepancy_points(64, 3, seed=5)
    np.testing.assert_array_equal(few, many[:10])
    counts = np.histogramdd(many, bins=[2, 2, 2], range=[(0, 1)] * 3)[0]
    assert counts.min() >= 6  # 8 of 64 in each octant


def test_the_box_of_a_known_function_is_found_exactly_enough() -> None:
    low, high = np.array([0.2, 0.0, 0.45]), np.array([0.6, 1.0, 0.95])

    def plateau(at: np.ndarray) -> np.ndarray:
        outside = np.maximum(low - at, 0) + np.maximum(at - high, 0)
        return 0.9 - outside.sum(1)

    region = find_region(plateau, 3, tolerance=0.02)
    # On each side, a hundredth of the slope is within the tolerance.
    np.testing.assert_allclose(region.low, low, atol=0.05)
    np.testing.assert_allclose(region.high, high, atol=0.05)
    grid = low_discrepancy_points(GRID, 3, seed=0)
    is_good = plateau(grid) >= region.best - 0.02
    inside = ((grid >= region.low) & (grid <= region.high)).all(1)
    assert (
        region.good_fraction == is_good.mean()
        and region.purity == is_good[inside].mean() >= PURITY
    )
    assert abs(region.volume - inside.mean()) < 0.02


def test_noisy_scores_are_smoothed_towards_the_truth() -> None:
    rng = np.random.default_rng(0)

    def truth(at: np.ndarray) -> np.ndarray:
        return 0.8 * np.exp(-((at[:, 0] - 0.4) ** 2) / 0.08) * (1 - 0.5 * at[:, 2])

    places = low_discrepancy_points(64, 3, seed=1)
    errors = np.full(64, 0.07)
    scores = truth(places) + rng.normal(0, 0.07, 64)
    smoothed = smoothed_scores(places, scores, errors)
    others = low_discrepancy_points(400, 3, seed=2)
    mistake = np.abs(smoothed(others) - truth(others)).mean()
    assert mistake < 0.05 < np.abs(scores - truth(places)).mean() + 0.01
    region = find_region(smoothed, 3, tolerance=0.1)
    assert region.low[0] < 0.4 < region.high[0] and region.high[2] < 0.6
    assert truth(points_within(region, 20)).min() > 0.8 * 0.95 - 0.3


def test_a_region_is_told_in_settings() -> None:
    region = find_region(lambda at: -np.abs(at[:, 0] - 0.5), 3, tolerance=0.1)
    rows = as_rows(SPACE, region)
    assert [row["setting"] for row in rows] == list(SPACE)
    assert rows[1]["low"] == 1 and rows[1]["high"] == 256 and rows[1]["log"]
    assert 0.3 < rows[0]["low"] < 0.45 < rows[0]["high"] < 0.65
    inside = points_within(region, 5)
    assert (inside >= region.low).all() and (inside <= region.high).all()


@pytest.mark.parametrize(
    ("low", "high", "log", "words"),
    [(2, 2, False, "high must be above low"), (0.0, 1.0, True, "low must be above 0")],
)
def test_a_wrong_axis_is_told(low: float, high: float, log: bool, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Axis(low, high, log=log)
