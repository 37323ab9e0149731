"""The regions of settings that a search found, computed from ``runs.csv`` alone.

``regions.csv`` has one row per domain and setting; the page and the figure are made from this
file.  ``schema.Search`` explains domains.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from rudolph.evaluation.regions import (
    Region,
    as_rows,
    find_region,
    smoothed_scores,
    unit_coordinates,
)
from rudolph.evaluation.statistics import NORMAL_QUANTILE, mean_over_seeds
from rudolph.files.atomic import write_text
from rudolph.reports.markdown import table_row
from rudolph.reports.schema import TRIAL, Search

REGIONS = "regions.csv"


def find_domain_region(search: Search, domain: str, trials: pd.DataFrame) -> Region:
    """Return the region of a domain, from the trials of ``runs.csv``."""
    score = search.score(domain, trials)
    scored = trials.dropna(subset=[score])
    points = scored[list(search.space)].to_numpy(dtype=np.float64)
    coordinates = unit_coordinates(
        search.space, [dict(zip(search.space, row, strict=True)) for row in points]
    )
    widths = (scored[f"{score}_high"] - scored[f"{score}_low"]).to_numpy()
    errors = widths / (2 * NORMAL_QUANTILE)
    smoothed = smoothed_scores(coordinates, scored[score].to_numpy(), errors)
    return find_region(smoothed, len(search.space), tolerance=search.tolerance)


def is_trial(runs: pd.DataFrame) -> "pd.Series[bool]":
    """Return which rows of ``runs.csv`` are trials of a search, by their variant."""
    return runs["variant"].fillna("").eq(TRIAL).astype(bool)


def write_regions(folder: Path, search: Search, runs: pd.DataFrame) -> None:
    """Write ``regions.csv`` from the trials among the runs."""
    trials = runs[is_trial(runs)]
    rows: list[dict[str, Any]] = []
    for domain in search.domains:
        region_rows = as_rows(search.space, find_domain_region(search, domain, trials))
        rows += [{"domain": domain} | row for row in region_rows]
    write_text(folder / REGIONS, pd.DataFrame(rows).to_csv(index=False, lineterminator="\n"))


def read_regions(folder: Path) -> pd.DataFrame:
    """Read the ``regions.csv`` of an experiment."""
    return pd.read_csv(folder / REGIONS)


def search_lines(
    folder: Path, search: Search, runs: pd.DataFrame, *, same_pairs: Sequence[str] | None
) -> list[str]:
    """Return the Markdown of each domain's region and of the scores of each group of tests.

    Args:
        folder: exported folder of the experiment.
        search: the search.
        runs: the table ``runs.csv``.
        same_pairs: groups of tests that may share pairs with the trials; None if unknown.
    """
    regions = read_regions(folder)
    settings = list(search.space)
    head = ["region", *(f"`{name}`" for name in settings)]
    head += ["best", "fraction of the space within tolerance", "volume of the box"]
    lines = [table_row(head), table_row(["---"] * len(head))]
    if set(regions["domain"]) != set(search.domains):
        found_domains = ", ".join(sorted(set(regions["domain"])))
        raise ValueError(f"{REGIONS}: must have {', '.join(search.domains)}, got {found_domains}")
    for domain in search.domains:
        rows = regions[regions["domain"] == domain].set_index("setting")
        ranges = [f"{rows['low'][name]:g} to {rows['high'][name]:g}" for name in settings]
        first = rows.iloc[0]
        fractions = [f"{first[name]:.1%}" for name in ("share", "volume")]
        lines.append(table_row([domain, *ranges, f"{first['best']:.3g}", *fractions]))
    note = (
        "A region is a box: one range per setting. Nearly all of its points score at most "
        f"{search.tolerance:g} (the tolerance) below the best."
    )
    return [*lines, "", note, "", *_tests_table(search, runs, same_pairs)]


def _tests_table(
    search: Search, runs: pd.DataFrame, same_pairs: Sequence[str] | None
) -> list[str]:
    """Return a Markdown table with one row per group of tests and one column per domain.

    Each cell is a mean over seeds with its 95 % interval.
    """
    tests = runs[~is_trial(runs)]
    has_unseen_pairs = same_pairs is not None and not same_pairs
    head = ["tested on unseen pairs" if has_unseen_pairs else "tested", *search.domains]
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
        lines += ["", f"Trials used the same pairs as {named}, so the test is not independent."]
    return lines
