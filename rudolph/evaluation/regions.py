"""Regions of settings that are as good as the best: from a few noisy scores to a box.

Scores of settings are smoothed by a Gaussian process; a setting is *good* where that is within a
tolerance of its best.  Of the good settings the box is what a user can be told: a range for each
setting, inside of which nearly all are good.

Source: Rasmussen and Williams 2006, chapter 2 (Gaussian process); Friedman and Fisher 1999 (PRIM:
peeling a box, and pasting what was peeled too much).

Shapes: N settings, A axes.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]
# Of the settings in a box so many are good.
PURITY = 0.95
PEELED = 0.05
GRID = 4096
# A box of fewer points of the grid is no region.
FEWEST = 40


@dataclass(frozen=True)
class Axis:
    """One setting of a space: from ``low`` to ``high``, evenly or by its logarithm (``log``).

    It is a whole number where both ends are.
    """

    low: float | int
    high: float | int
    log: bool = False

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"high must be above low ({self.low}), got {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"low must be above 0 where log is true, got {self.low}")

    @property
    def is_whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    def value(self, unit: float) -> float | int:
        """The setting at a place of [0, 1], of three digits at most."""
        if self.log:
            value = float(self.low * (self.high / self.low) ** unit)
        else:
            value = float(self.low + (self.high - self.low) * unit)
        return round(value) if self.is_whole else float(f"{value:.3g}")

    def unit(self, value: float) -> float:
        """The place of a setting in [0, 1]."""
        if self.log:
            return float(np.log(value / self.low) / np.log(self.high / self.low))
        return (value - self.low) / (self.high - self.low)


Space = Mapping[str, Axis]


def settings_at(space: Space, places: Sequence[float]) -> dict[str, float | int]:
    """The settings at a place of the unit cube."""
    return {name: axis.value(at) for (name, axis), at in zip(space.items(), places, strict=True)}


def unit_coordinates(space: Space, settings: Sequence[Mapping[str, float]]) -> Points:
    """Where settings lie in the unit cube, ``(N, A)``."""
    rows = [[axis.unit(each[name]) for name, axis in space.items()] for each in settings]
    return np.array(rows, dtype=np.float64).reshape(len(settings), len(space))


def low_discrepancy_points(number: int, axes: int, seed: int) -> Points:
    """Points that fill the unit cube evenly, ``(number, axes)``; the first of more are these."""
    from scipy.stats import qmc

    with warnings.catch_warnings():
        # It warns that numbers which are no powers of two are a little less even.
        warnings.simplefilter("ignore")
        found: Points = qmc.Sobol(axes, rng=np.random.default_rng(seed)).random(number)
    return found


def smoothed_scores(
    places: Points, scores: NDArray[np.float64], errors: NDArray[np.float64]
) -> Callable[[Points], Points]:
    """The smoothed score of any place, from noisy scores at some.

    Args:
        places: ``(N, A)`` in the unit cube.
        scores: ``(N,)``, with their standard errors, ``(N,)``.
    """
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

    middle, spread = scores.mean(), max(float(scores.std()), 1e-3)
    kernel = ConstantKernel(1.0, (0.05, 20.0)) * RBF(
        np.full(places.shape[1], 0.5), (0.1, 10.0)
    ) + WhiteKernel(0.05, (1e-3, 1.0))
    process = GaussianProcessRegressor(kernel, alpha=(errors / spread) ** 2, random_state=0)
    with warnings.catch_warnings():
        # A length at its bound means that this setting does not matter.
        warnings.simplefilter("ignore")
        process.fit(places, (scores - middle) / spread)

    def smoothed(at: Points) -> Points:
        return np.asarray(process.predict(at) * spread + middle)

    return smoothed


class Region(NamedTuple):
    """A box in the unit cube, ``low`` and ``high`` (A,).

    ``best`` is the best smoothed score, ``share`` the part of the cube that is within the
    tolerance of it, ``volume`` the part that the box takes, and ``purity`` that of the box which
    is within the tolerance.
    """

    low: Points
    high: Points
    best: float
    share: float
    volume: float
    purity: float


def find_region(smoothed: Callable[[Points], Points], axes: int, *, tolerance: float) -> Region:
    """The box of settings that are within ``tolerance`` of the best."""
    grid = low_discrepancy_points(GRID, axes, seed=0)
    values = smoothed(grid)
    best = float(values.max())
    is_good = values >= best - tolerance
    low, high = _peeled(grid, values, is_good)
    low, high = _pasted(grid, is_good, low, high)
    inside = _inside(grid, low, high)
    return Region(
        low,
        high,
        best,
        float(is_good.mean()),
        float(np.prod(high - low)),
        float(is_good[inside].mean()),
    )


def _inside(grid: Points, low: Points, high: Points) -> NDArray[np.bool_]:
    return np.asarray(((grid >= low) & (grid <= high)).all(1))


def _peeled(grid: Points, values: Points, is_good: NDArray[np.bool_]) -> tuple[Points, Points]:
    """From the whole cube, face by face, whatever peel leaves the best mean."""
    axes = grid.shape[1]
    low, high = np.zeros(axes), np.ones(axes)
    inside = np.ones(len(grid), dtype=bool)
    while is_good[inside].mean() < PURITY and inside.sum() > FEWEST:
        found = []
        for axis in range(axes):
            own = grid[inside, axis]
            for is_low in (True, False):
                cut = float(np.quantile(own, PEELED if is_low else 1 - PEELED))
                kept = inside & (grid[:, axis] >= cut if is_low else grid[:, axis] <= cut)
                found.append((float(values[kept].mean()), axis, is_low, cut, kept))
        _, axis, is_low, cut, inside = max(found, key=lambda each: each[0])
        (low if is_low else high)[axis] = cut
    return low, high


def _pasted(
    grid: Points, is_good: NDArray[np.bool_], low: Points, high: Points
) -> tuple[Points, Points]:
    """Grown again in steps of a hundredth, as long as what it holds is as pure."""
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
    """Points spread over a region, ``(number, A)``."""
    spread = low_discrepancy_points(number, len(region.low), seed=1)
    return np.asarray(region.low + spread * (region.high - region.low))


def as_rows(space: Space, region: Region) -> list[dict[str, Any]]:
    """A row for each setting: its range, the axis it is of, and what is known of the region."""
    return [
        {
            "setting": name,
            "low": axis.value(float(region.low[at])),
            "high": axis.value(float(region.high[at])),
            "least": axis.low,
            "greatest": axis.high,
            "log": axis.log,
            "best": round(region.best, 4),
            "share": round(region.share, 4),
            "volume": round(region.volume, 4),
            "purity": round(region.purity, 4),
        }
        for at, (name, axis) in enumerate(space.items())
    ]
