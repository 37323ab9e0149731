"""Regions of settings that score as well as the best one, found from a few noisy scores.

A point is one combination of settings.  A Gaussian process smooths the scores of the points.  A
point is good if its smoothed score is within a tolerance of the best one.  The region is a box
with one range per setting.  Nearly all points inside it are good.

Source: Rasmussen and Williams 2006, chapter 2 (Gaussian process); Friedman and Fisher 1999 (PRIM:
peel a box, then paste back what was peeled too far).

Shapes: N points, A axes (one per setting).
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]
# The least fraction of good points in a box.
PURITY = 0.95
# The fraction of the points in a box that one cut peels off.
PEEL_FRACTION = 0.05
GRID = 4096
# Peeling stops at this many grid points: fewer say too little about a box.
MIN_POINTS = 40


@dataclass(frozen=True)
class Axis:
    """One setting of the search space, on a linear or logarithmic scale.

    Values are whole numbers if both bounds are integers.

    Attributes:
        low: smallest value.
        high: largest value.
        log: whether the scale is logarithmic.
    """

    low: float | int
    high: float | int
    log: bool = False

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for bounds that are out of range."""
        if not self.low < self.high:
            raise ValueError(f"high must be above low ({self.low}), got {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"low must be above 0 where log is true, got {self.low}")

    @property
    def is_whole(self) -> bool:
        """True if both bounds are integers."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def value(self, unit: float) -> float | int:
        """Return the value at position ``unit`` in [0, 1], as an integer or with three digits."""
        if self.log:
            value = float(self.low * (self.high / self.low) ** unit)
        else:
            value = float(self.low + (self.high - self.low) * unit)
        return round(value) if self.is_whole else float(f"{value:.3g}")

    def unit(self, value: float) -> float:
        """Return the position in [0, 1] of a value."""
        if self.log:
            return float(np.log(value / self.low) / np.log(self.high / self.low))
        return (value - self.low) / (self.high - self.low)


Space = Mapping[str, Axis]


def settings_at(space: Space, coordinates: Sequence[float]) -> dict[str, float | int]:
    """Return the settings at a point of the unit cube, keyed by name."""
    return {
        name: axis.value(coordinate)
        for (name, axis), coordinate in zip(space.items(), coordinates, strict=True)
    }


def unit_coordinates(space: Space, settings: Sequence[Mapping[str, float]]) -> Points:
    """Return the points ``(N, A)`` of the unit cube at which the given settings lie."""
    rows = [[axis.unit(row[name]) for name, axis in space.items()] for row in settings]
    return np.array(rows, dtype=np.float64).reshape(len(settings), len(space))


def low_discrepancy_points(number: int, axes: int, seed: int) -> Points:
    """Return Sobol points ``(number, axes)`` that fill the unit cube evenly.

    With the same seed, a smaller ``number`` gives the first of these points.
    """
    from scipy.stats import qmc

    with warnings.catch_warnings():
        # SciPy warns that points are slightly less even if their number is not a power of two.
        warnings.simplefilter("ignore")
        points: Points = qmc.Sobol(axes, rng=np.random.default_rng(seed)).random(number)
    return points


def smoothed_scores(
    points: Points, scores: NDArray[np.float64], errors: NDArray[np.float64]
) -> Callable[[Points], Points]:
    """Fit a Gaussian process to noisy scores and return its mean as a function of points.

    Args:
        points: points in the unit cube, ``(N, A)``.
        scores: score of each point, ``(N,)``.
        errors: standard error of each score, ``(N,)``.

    Returns:
        A function from points ``(M, A)`` in the unit cube to smoothed scores ``(M,)``.
    """
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

    mean, scale = scores.mean(), max(float(scores.std()), 1e-3)
    kernel = ConstantKernel(1.0, (0.05, 20.0)) * RBF(
        np.full(points.shape[1], 0.5), (0.1, 10.0)
    ) + WhiteKernel(0.05, (1e-3, 1.0))
    process = GaussianProcessRegressor(kernel, alpha=(errors / scale) ** 2, random_state=0)
    with warnings.catch_warnings():
        # A length scale at its bound only means that the setting does not matter.
        warnings.simplefilter("ignore")
        process.fit(points, (scores - mean) / scale)

    def smoothed(query: Points) -> Points:
        return np.asarray(process.predict(query) * scale + mean)

    return smoothed


class Region(NamedTuple):
    """A box in the unit cube, and how good the points inside it are.

    Attributes:
        low: lower bound on each axis, ``(A,)``.
        high: upper bound on each axis, ``(A,)``.
        best: best smoothed score in the cube.
        good_fraction: fraction of the cube within the tolerance of ``best``.
        volume: fraction of the cube that the box covers.
        purity: fraction of the box within the tolerance of ``best``.
    """

    low: Points
    high: Points
    best: float
    good_fraction: float
    volume: float
    purity: float


def find_region(smoothed: Callable[[Points], Points], axes: int, *, tolerance: float) -> Region:
    """Find the box of points whose smoothed score is within ``tolerance`` of the best.

    Args:
        smoothed: function from points ``(M, A)`` to scores ``(M,)``, see ``smoothed_scores``.
        axes: number of axes A.
        tolerance: how far a good point may score below the best point, in units of the score.
    """
    grid = low_discrepancy_points(GRID, axes, seed=0)
    values = smoothed(grid)
    best = float(values.max())
    is_good = values >= best - tolerance
    low, high = _peel(grid, values, is_good)
    low, high = _paste(grid, is_good, low, high)
    is_inside = _inside(grid, low, high)
    return Region(
        low,
        high,
        best,
        float(is_good.mean()),
        float(np.prod(high - low)),
        float(is_good[is_inside].mean()),
    )


def _inside(grid: Points, low: Points, high: Points) -> NDArray[np.bool_]:
    return np.asarray(((grid >= low) & (grid <= high)).all(1))


def _peel(grid: Points, values: Points, is_good: NDArray[np.bool_]) -> tuple[Points, Points]:
    """Peel the unit cube step by step; each step makes the cut that leaves the best mean score."""
    axes = grid.shape[1]
    low, high = np.zeros(axes), np.ones(axes)
    is_inside = np.ones(len(grid), dtype=bool)
    while is_good[is_inside].mean() < PURITY and is_inside.sum() > MIN_POINTS:
        candidates = []
        for axis in range(axes):
            coordinates = grid[is_inside, axis]
            for is_low in (True, False):
                cut = float(
                    np.quantile(coordinates, PEEL_FRACTION if is_low else 1 - PEEL_FRACTION)
                )
                is_kept = is_inside & (grid[:, axis] >= cut if is_low else grid[:, axis] <= cut)
                candidates.append((float(values[is_kept].mean()), axis, is_low, cut, is_kept))
        _, axis, is_low, cut, is_inside = max(candidates, key=lambda candidate: candidate[0])
        (low if is_low else high)[axis] = cut
    return low, high


def _paste(
    grid: Points, is_good: NDArray[np.bool_], low: Points, high: Points
) -> tuple[Points, Points]:
    """Grow the box in steps of 0.01 while the fraction of good points is at least ``PURITY``."""
    faces = [(side, axis) for axis in range(grid.shape[1]) for side in (0, 1)]
    is_growing = True
    while is_growing:
        is_growing = False
        for side, axis in faces:
            bounds = low.copy(), high.copy()
            bounds[side][axis] = np.clip(bounds[side][axis] + (0.01 if side else -0.01), 0, 1)
            is_larger = bounds[side][axis] != (low, high)[side][axis]
            if is_larger and is_good[_inside(grid, *bounds)].mean() >= PURITY:
                low, high, is_growing = *bounds, True
    return low, high


def points_within(region: Region, number: int) -> Points:
    """Return points ``(number, A)`` of the unit cube, spread evenly over a region."""
    offsets = low_discrepancy_points(number, len(region.low), seed=1)
    return np.asarray(region.low + offsets * (region.high - region.low))


def as_rows(space: Space, region: Region) -> list[dict[str, Any]]:
    """Return one row per setting: its range in the region, its axis and the region's scores."""
    return [
        {
            "setting": name,
            "low": axis.value(float(region.low[index])),
            "high": axis.value(float(region.high[index])),
            "least": axis.low,
            "greatest": axis.high,
            "log": axis.log,
            "best": round(region.best, 4),
            "share": round(region.good_fraction, 4),
            "volume": round(region.volume, 4),
            "purity": round(region.purity, 4),
        }
        for index, (name, axis) in enumerate(space.items())
    ]
