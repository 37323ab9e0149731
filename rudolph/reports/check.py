"""Check of handwritten numbers against the CSV files of the experiments that a page names.

A number with an interval, ``0.059 [0.047, 0.070]``, must be an estimate of an experiment.  That is
a score of a run, the mean of a group of runs, or the difference of two groups over pairs of seeds.
A number without an interval must also be a mean or a difference, or appear in another source.
Other sources are the tables of the page, curves, profiles and settings.  Numbers are compared to
as many digits as are written.

The experiments are the page's own and those that it links to or names in ``code``.  A number that
comes from no file is marked as such: ``(not recomputed: 21 % at an earlier commit)``.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from rudolph.evaluation.statistics import geometric_mean_interval, student_quantile
from rudolph.reports.report import (
    generated_part,
    read_curves,
    read_runs,
    without_generated,
)
from rudolph.reports.report_cards import read_card
from rudolph.reports.run_configs import BASE_CONFIG, CONFIG_LINES
from rudolph.reports.schema import CARD, TIMINGS_FILE, experiment_folders, group_of
from rudolph.reports.timings import PROFILES

RUNS, README = "runs.csv", "README.md"

# Text that is not checked: code, images, link targets, comments, sizes (6 x 6), marked numbers.
UNCHECKED = re.compile(
    r"`[^`]*`|!\[[^]]*\]\([^)]*\)|\]\([^)]*\)|<!--.*?-->|https?://\S+|\b\d+ x \d+\b"
    r"|\(not recomputed: [^)]*\)",
    re.S,
)
NAMED = re.compile(r"`([\w./-]+)`|\]\(([^)#]+)")
NUMBER_PATTERN = re.compile(
    r"(?<![\w.:/-])-?\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?(?![\w:]|\.\d|,\d|-\w|/\d)"
)
INTERVAL = re.compile(rf"\[({NUMBER_PATTERN.pattern}), ({NUMBER_PATTERN.pattern})\]")
# A value and its interval may be separated by a unit and a few words, but by no other number.
BETWEEN = re.compile(r"[^\d\[\].;]{0,40}")
# Possible factors from the unit of the files to the unit written in a text.
UNIT_FACTORS: dict[str, tuple[float, ...]] = {
    "%": (100.0, 1.0),
    "point": (100.0,),
    "ms": (1e3, 1.0),
    "minute": (1 / 60, 1.0),
    "hour": (1 / 3600,),
    "MiB": (2.0**-20,),
    "GiB": (2.0**-30,),
    "MB": (1e-6,),
    "GB": (1e-9,),
}
# The unit of a number may follow a later number: "76 to 78 %".
UNIT = re.compile(
    rf"(?:(?:,| to| and| or| against| instead of) [\d.,]+){{0,2}}[ -]?({'|'.join(UNIT_FACTORS)})"
)


class WrittenNumber(NamedTuple):
    """A number in a text.

    Attributes:
        text: the number as written.
        value: its value.
        step: the unit of its last digit.
        scales: possible factors from the unit of a file to the unit of the text.
    """

    text: str
    value: float
    step: float
    scales: tuple[float, ...]

    def is_one_of(self, known: NDArray[Any]) -> NDArray[np.bool_]:
        """Return which of the known numbers ``(N,)`` this number matches, ignoring the sign.

        The sign is ignored because 0.06 fewer and -0.06 more are the same.
        """
        is_close = np.zeros(len(known), dtype=bool)
        for scale in self.scales:
            is_close |= np.abs(np.abs(known) * scale - abs(self.value)) <= 0.5001 * self.step
        return is_close


class KnownNumbers(NamedTuple):
    """The numbers that the files of an experiment contain.

    Attributes:
        estimates: values with lower and upper bounds, ``(N, 3)``.
        values: values without bounds, ``(M,)``.
    """

    estimates: NDArray[Any]
    values: NDArray[Any]

    @classmethod
    def none(cls) -> "KnownNumbers":
        """Return an empty set of numbers."""
        return cls(np.empty((0, 3)), np.empty(0))

    def joined(self, other: "KnownNumbers") -> "KnownNumbers":
        """Return these numbers and those of another experiment."""
        return KnownNumbers(*(np.concatenate(pair) for pair in zip(self, other, strict=True)))


def unverified_on_page(
    readme: Path, results_folder: Path, known_of_folder: Callable[[Path], KnownNumbers]
) -> Iterator[str]:
    """Yield the numbers of a page, outside its generated part, that no file contains.

    On a page without an experiment of its own, such as the project's README, only numbers with an
    interval are checked, against all experiments.

    Args:
        readme: the page.
        results_folder: folder of all exported experiments.
        known_of_folder: returns the known numbers of an experiment's folder.
    """
    text = readme.read_text("utf-8")
    written = without_generated(text)
    is_experiment = (readme.parent / RUNS).is_file()
    folders = set(map(Path.resolve, experiment_folders(results_folder)))
    if is_experiment:
        folders = _named_folders(readme, written, results_folder)
    known = KnownNumbers.none()
    for folder in sorted(folders):
        known = known.joined(known_of_folder(folder))
    yield from unverified_numbers(written, known, has_single=is_experiment)


def _named_folders(readme: Path, text: str, results_folder: Path) -> set[Path]:
    """Return the folders of the experiments that a page belongs to or names."""
    folders = {readme.parent}
    for name, target in NAMED.findall(text):
        path = results_folder / name if name else readme.parent / target
        folders |= {path, path.parent}
    return {
        folder.resolve()
        for folder in folders
        if any((folder / file_name).is_file() for file_name in (RUNS, CARD))
    }


def unverified_numbers(
    text: str, known: KnownNumbers, *, has_single: bool = True
) -> Iterator[str]:
    """Yield the numbers of a text that match no known number, as they are written.

    Args:
        text: the text to check.
        known: the numbers of the experiments that the text names.
        has_single: whether numbers without an interval are checked too.
    """
    text = UNCHECKED.sub(lambda match: "]" if match[0].startswith("](") else " _ ", text)
    checked_starts: set[int] = set()
    for match in INTERVAL.finditer(text):
        previous = list(NUMBER_PATTERN.finditer(text, 0, match.start()))[-1:]
        bounds = [_parse_number(text, *match.span(part)) for part in (1, 2)]
        checked_starts |= {match.start(1), match.start(2)}
        value = None
        if previous and BETWEEN.fullmatch(text[previous[0].end() : match.start()]):
            value = _parse_number(text, *previous[0].span())
            checked_starts.add(previous[0].start())
        if not _is_estimate(value, bounds, known.estimates):
            yield f"{value.text if value else ''} {match[0]}".strip()
    single = [
        candidate
        for candidate in NUMBER_PATTERN.finditer(text)
        if candidate.start() not in checked_starts
    ]
    for match in single if has_single else []:
        number = _parse_number(text, *match.span())
        if not number.is_one_of(known.values).any():
            yield number.text


def _parse_number(text: str, start: int, end: int) -> WrittenNumber:
    digits = text[start:end].replace(",", "")
    mantissa, _, power = digits.partition("e")
    step = 10.0 ** (int(power or 0) - len(mantissa.partition(".")[2]))
    unit = UNIT.match(text, end)
    return WrittenNumber(
        text[start:end], float(digits), step, UNIT_FACTORS[unit[1]] if unit else (1.0,)
    )


def _is_estimate(
    value: WrittenNumber | None, bounds: list[WrittenNumber], estimates: NDArray[Any]
) -> bool:
    """Return whether value and bounds match one estimate, or its negative, in one unit."""
    scales = (1.0, 100.0) if value is None or value.scales == (1.0,) else value.scales
    for scale in scales:
        low, high = (bound._replace(scales=(scale,)) for bound in bounds)
        for ends in ((1, 2), (2, 1)):
            is_match = low.is_one_of(estimates[:, ends[0]]) & high.is_one_of(estimates[:, ends[1]])
            if value is not None:
                is_match &= value._replace(scales=(scale,)).is_one_of(estimates[:, 0])
            if is_match.any():
                return True
    return False


def known_numbers(folder: Path) -> KnownNumbers:
    """Return all numbers of a folder's CSV files, of its page's tables and of its settings."""
    estimates: list[list[float]] = []
    values: list[float] = []
    if (folder / CARD).is_file():
        card = read_card(folder / CARD)
        estimates += card[["value", "low", "high"]].to_numpy(float).tolist()
        values += card["count"].unique().tolist()
    if (folder / RUNS).is_file():
        runs = read_runs(folder)
        groups, single = list(_group_estimates(runs)), list(_run_estimates(runs))
        # With several seeds, the score of one seed must be written with its interval.
        has_seeds = runs["seed"].nunique() > 1
        estimates = [*groups, *single, *estimates]
        validated = list(_validation_estimates(folder, runs))
        values += [row[0] for row in (groups if has_seeds else estimates) + validated]
        values += [*_reference_levels(runs)]
        estimates += validated
        values += _numbers_in_texts(folder)
        estimates += _estimates_on_page(folder)
    for path in sorted((folder / PROFILES).glob("*.csv")):
        values += pd.read_csv(path)[["milliseconds", "share"]].to_numpy(float).ravel().tolist()
    if (folder / TIMINGS_FILE).is_file():
        values += _timing_means(folder)
    estimate_table = np.array(estimates, dtype=float).reshape(-1, 3)
    return KnownNumbers(estimate_table[np.isfinite(estimate_table).all(1)], _finite(values))


def _numbers_in_texts(folder: Path) -> Iterator[float]:
    """Yield the numbers of the page's generated part, the question and the runs' settings."""
    texts = [generated_part(folder / README), (folder / "report.json").read_text("utf-8")]
    texts += [(folder / name).read_text("utf-8") for name in (BASE_CONFIG, CONFIG_LINES)]
    for text in texts:
        for match in NUMBER_PATTERN.finditer(text):
            yield _parse_number(text, *match.span()).value


def _estimates_on_page(folder: Path) -> Iterator[list[float]]:
    """Yield the values with intervals in the page's generated part."""
    page = generated_part(folder / README)
    for match in re.finditer(rf"({NUMBER_PATTERN.pattern}) {INTERVAL.pattern}", page):
        yield [_parse_number(page, *match.span(part)).value for part in (1, 2, 3)]


def _finite(values: list[float]) -> NDArray[Any]:
    unique_values = np.unique(np.array(values, dtype=float))
    return unique_values[np.isfinite(unique_values)]


def _metrics(runs: pd.DataFrame) -> list[str]:
    """Return the metric columns of ``runs.csv``: those after ``seconds``, without bounds."""
    names = list(runs.columns)
    later = names[names.index("seconds") + 1 :]
    return [name for name in later if not name.endswith(("_low", "_high", "_chance", "_target"))]


def _run_estimates(runs: pd.DataFrame) -> Iterator[list[float]]:
    """Yield each score of a run with its bounds; without bounds, the score serves as both."""
    for metric in _metrics(runs):
        bounds = [runs.get(f"{metric}_{end}", runs[metric]) for end in ("low", "high")]
        for row in zip(runs[metric], *bounds, strict=True):
            yield list(map(float, row))


def _reference_levels(runs: pd.DataFrame) -> Iterator[float]:
    """Yield chance levels and targets, of single runs and as means."""
    for name in runs:
        if str(name).endswith(("_chance", "_target")):
            yield from (runs[name].mean(), *runs[name].dropna().unique())


def _group_estimates(runs: pd.DataFrame) -> Iterator[list[float]]:
    """Yield the mean scores of groups of runs and the differences between groups."""
    groups = pd.Series(list(map(group_of, runs["run"], runs["seed"])), index=runs.index, dtype=str)
    for metric in _metrics(runs):
        yield from _seed_estimates(runs["seed"], groups, runs[metric])


def _timing_means(folder: Path) -> Iterator[float]:
    """Yield peak memory, and mean seconds of each implementation, in total and per unit."""
    table = pd.read_csv(folder / TIMINGS_FILE, keep_default_na=False)
    yield from table["peak_bytes"]
    for _, group in table.groupby(["run", "implementation", "part"]):
        yield geometric_mean_interval(group["seconds"].to_numpy()).value
        yield geometric_mean_interval((group["seconds"] / group["units"]).to_numpy()).value


def _validation_estimates(folder: Path, runs: pd.DataFrame) -> Iterator[list[float]]:
    """Yield group means and differences at each validation step.

    For a single run, yield all points of its curves instead.
    """
    curves = read_curves(folder)
    if len(runs) == 1:
        yield from ([value] * 3 for value in curves["value"])
        return
    curves = curves[curves["metric"].str.contains("/val/")]
    for _, group in curves.groupby(["metric", "step"]):
        groups = pd.Series(list(map(group_of, group["run"], group["seed"])), index=group.index)
        yield from _seed_estimates(group["seed"], groups.astype(str), group["value"])


def _seed_estimates(
    seeds: "pd.Series[Any]", groups: "pd.Series[str]", values: "pd.Series[float]"
) -> Iterator[list[float]]:
    """Yield each group's mean over seeds and the difference between every two groups.

    Intervals are Student's t.
    """
    is_known = values.notna().to_numpy()
    rows, row_names = pd.factorize(seeds[is_known])
    columns, column_names = pd.factorize(groups[is_known], sort=True)
    table = np.full((len(row_names), len(column_names)), np.nan)  # (seeds, groups)
    table[rows, columns] = values[is_known]
    first, second = np.triu_indices(table.shape[1], 1)
    samples = np.concatenate([table, table[:, first] - table[:, second]], axis=1)  # (seeds, N)
    num_seeds = np.isfinite(samples).sum(0)
    samples, num_seeds = samples[:, num_seeds > 0], num_seeds[num_seeds > 0]
    means = np.nanmean(samples, 0)
    squares = np.nansum((samples - means) ** 2, 0)
    quantiles = np.array([0.0, 0.0, *map(student_quantile, range(1, len(table)))])
    half_widths = quantiles[num_seeds] * np.sqrt(
        squares / np.maximum(num_seeds - 1, 1) / num_seeds
    )
    yield from np.stack([means, means - half_widths, means + half_widths], 1).tolist()
