"""Recomputation of the numbers on result pages: true ones are found, altered ones reported."""

import random
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from rudolph.reports.check import (
    INTERVAL,
    UNCHECKED,
    KnownNumbers,
    known_numbers,
    unverified_numbers,
)
from rudolph.reports.report import without_generated
from rudolph.reports.schema import experiment_folders

RESULTS = Path(__file__).parent.parent / "results"
FACTS = KnownNumbers(
    np.array([[0.0586, 0.0469, 0.0703], [-0.228, -0.259, -0.196]]), np.array([0.7714])
)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("0.059 nats fewer [0.047, 0.070]", []),
        ("5.9 points [4.7, 7.0], and 22.8 points fewer [19.6, 25.9]", []),
        ("0.059 [0.047, 0.071]", ["0.059 [0.047, 0.071]"]),
        ("0.058 [0.047, 0.070]", ["0.058 [0.047, 0.070]"]),
        # The bounds of one estimate with the value of another.
        ("0.228 [0.047, 0.070]", ["0.228 [0.047, 0.070]"]),
        ("77.1 % of `512` in 6 x 6 tokens, F1 and [12 of 13](page-14.md)", ["12", "13"]),
        ("76 to 77 %, or 0.77; 77 alone", ["76", "77"]),
        ("a fifth (not recomputed: 21 % [16, 27] at `abc`)", []),
    ],
)
def test_a_number_counts_at_the_digits_that_are_written(text: str, named: list[str]) -> None:
    assert list(unverified_numbers(text, FACTS)) == named


def test_means_and_differences_are_those_of_scipy(tmp_path: Path) -> None:
    """Groups have different seeds, and one value is missing."""
    rng = np.random.default_rng(0)
    rows = [
        {"run": f"{group}-seed{seed}", "seed": seed, "seconds": 1.0, "score": rng.normal()}
        for group in ("a", "b", "c")
        for seed in range(5 - (group == "c"))
    ]
    runs = pd.DataFrame(rows)
    runs.loc[1, "score"] = np.nan
    runs.to_csv(tmp_path / "runs.csv", index=False)
    (tmp_path / "curves.csv").write_text("run,metric,step,value\n")
    (tmp_path / "report.json").write_text("{}")
    for name in ("README.md", "config.yaml", "configs.jsonl"):
        (tmp_path / name).write_text("")
    table = {name: runs[runs["run"].str.startswith(name)].set_index("seed") for name in "abc"}
    found = known_numbers(tmp_path).estimates
    for one, other in ("ab", "ac", "bc"):
        pairs = (table[one]["score"] - table[other]["score"]).dropna()
        low, high = stats.t.interval(0.95, len(pairs) - 1, pairs.mean(), stats.sem(pairs))
        expected = [pairs.mean(), low, high]
        assert np.isclose(found, expected).all(1).any()
    assert len(found) == 6 + len(runs) - 1


def test_an_altered_bound_of_an_interval_is_named() -> None:
    """One bound of each interval on the pages is changed by 5 to 30 %."""
    rng = random.Random(0)
    named = []
    for folder in experiment_folders(RESULTS):
        facts = known_numbers(folder.resolve())
        text = without_generated((folder / "README.md").read_text("utf-8"))
        for interval in INTERVAL.finditer(UNCHECKED.sub("", text)):
            bounds = [interval[1], interval[2]]
            if list(unverified_numbers(interval[0], facts)):
                continue  # from another experiment
            at, change = rng.randrange(2), rng.choice([-1, 1]) * rng.uniform(0.05, 0.3)
            digits = len(bounds[at].partition(".")[2])
            bounds[at] = f"{float(bounds[at]) * (1 + change):.{digits}f}"
            if bounds != [interval[1], interval[2]]:
                named.append(bool(list(unverified_numbers(f"[{bounds[0]}, {bounds[1]}]", facts))))
    assert len(named) > 50
    assert np.mean(named) > 0.8
