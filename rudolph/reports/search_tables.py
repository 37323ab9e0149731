"""What a search found: regions of settings, from ``runs.csv`` alone.

``regions.csv`` has one row a domain and setting; page and figure are made from it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from rudolph.evaluation.regions import (
    Axis,
    Region,
    as_rows,
    find_region,
    smoothed_scores,
    unit_coordinates,
)
from rudolph.evaluation.statistics import NORMAL_QUANTILE, mean_over_seeds
from rudolph.files.atomic import write_text
from rudolph.reports.markdown import table_row

REGIONS = "regions.csv"
# The variant of a search's own runs, and of those that test the region of a domain.
TRIAL, REGION = "trial", "region_"


@dataclass(frozen=True)
class Search:
    """Settings that are searched for, domain by domain, and the regions that are then tested.

    ``domains`` name a metric each, without its split.  The runs of ``trials`` have ``settings``
    over the file's: half of them fill ``space`` evenly, the others are proposed for one domain
    after the other.  A region is what is within ``tolerance`` of the best of its domain; each seed
    tests one point of it with the settings of the file.
    """

    space: dict[str, Axis]
    domains: dict[str, str]
    trials: int = 64
    tolerance: float = 0.05
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.space or not self.domains:
            raise ValueError("space and domains must each name at least one")
        if self.trials < 8:
            raise ValueError(f"trials must be at least 8, got {self.trials}")
        if not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance must be in (0, 1), got {self.tolerance}")

    def score(self, domain: str, runs: pd.DataFrame) -> str:
        """The column of a domain's score, on whatever split the runs were asked.

        Raises:
            ValueError: when there is none, or more than one.
        """
        start = f"{self.domains[domain]}/"
        ends = ("_low", "_high", "_chance", "_target")
        known = list(map(str, runs.dropna(axis=1, how="all").columns))
        found = [name for name in known if name.startswith(start) and not name.endswith(ends)]
        if len(found) != 1:
            names = ", ".join(found) or "none"
            raise ValueError(f"search.domains.{domain}: one split is asked for, got {names}")
        return found[0]


def find_domain_region(search: Search, domain: str, trials: pd.DataFrame) -> Region:
    """The region of a domain, from the rows of the trials in ``runs.csv``."""
    score = search.score(domain, trials)
    known = trials.dropna(subset=[score])
    points = known[list(search.space)].to_numpy(dtype=np.float64)
    places = unit_coordinates(
        search.space, [dict(zip(search.space, row, strict=True)) for row in points]
    )
    widths = (known[f"{score}_high"] - known[f"{score}_low"]).to_numpy()
    errors = widths / (2 * NORMAL_QUANTILE)
    smoothed = smoothed_scores(places, known[score].to_numpy(), errors)
    return find_region(smoothed, len(search.space), tolerance=search.tolerance)


def is_trial(runs: pd.DataFrame) -> "pd.Series[bool]":
    """Which rows of ``runs.csv`` are a search's own; runs without a variant have none there."""
    return runs["variant"].fillna("").eq(TRIAL).astype(bool)


def write_regions(folder: Path, search: Search, runs: pd.DataFrame) -> None:
    """``regions.csv`` from the trials among the runs."""
    trials = runs[is_trial(runs)]
    rows: list[dict[str, Any]] = []
    for domain in search.domains:
        found = as_rows(search.space, find_domain_region(search, domain, trials))
        rows += [{"domain": domain} | row for row in found]
    write_text(folder / REGIONS, pd.DataFrame(rows).to_csv(index=False, lineterminator="\n"))


def read_regions(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / REGIONS)


def search_lines(
    folder: Path, search: Search, runs: pd.DataFrame, *, same_pairs: Sequence[str] | None
) -> list[str]:
    """Markdown: the region of each domain, and what each group of tests reached in each.

    Args:
        same_pairs: groups of tests that may share pairs with the trials; None is not known.
    """
    regions = read_regions(folder)
    settings = list(search.space)
    head = ["region of", *(f"`{name}`" for name in settings)]
    head += ["best", "share of the space that is as good", "the box takes"]
    lines = [table_row(head), table_row(["---"] * len(head))]
    if set(regions["domain"]) != set(search.domains):
        known = ", ".join(sorted(set(regions["domain"])))
        raise ValueError(f"{REGIONS}: must have {', '.join(search.domains)}, got {known}")
    for domain in search.domains:
        own = regions[regions["domain"] == domain].set_index("setting")
        ranges = [f"{own['low'][name]:g} to {own['high'][name]:g}" for name in settings]
        first = own.iloc[0]
        shares = [f"{first[name]:.1%}" for name in ("share", "volume")]
        lines.append(table_row([domain, *ranges, f"{first['best']:.3g}", *shares]))
    said = f"As good: within {search.tolerance:g} of the best; so are nearly all of a box."
    return [*lines, "", said, "", *_tests_table(search, runs, same_pairs)]


def _tests_table(
    search: Search, runs: pd.DataFrame, same_pairs: Sequence[str] | None
) -> list[str]:
    """Markdown: a row a group of tests, a column a domain, mean over seeds and 95 % interval."""
    tests = runs[~is_trial(runs)]
    are_others = same_pairs is not None and not same_pairs
    head = ["tested on pairs that no trial had" if are_others else "tested", *search.domains]
    lines = [table_row(head), table_row(["---"] * len(head))]
    for name, group in tests.groupby("variant", sort=True):
        cells = [str(name)]
        for domain in search.domains:
            values = group[search.score(domain, tests)].dropna().to_numpy(dtype=np.float64)
            value, low, high = mean_over_seeds(values)
            cells.append(f"{value:.3g} [{low:.3g}, {high:.3g}]")
        lines.append(table_row(cells))
    biased = sorted(set(same_pairs or ()) & set(tests["variant"].dropna()))
    if biased:
        named = ", ".join(f"`{name}`" for name in biased)
        lines += ["", f"Trials had the same pairs as {named}, so this is no independent test."]
    return lines
