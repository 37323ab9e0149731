"""Contents of a report and the names that runs and results share, without pandas.

An experiment file is read with this module, so it imports no library that takes long.
"""

import json
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rudolph.evaluation.regions import Axis
from rudolph.files.atomic import DamagedFileError, read_mapping

if TYPE_CHECKING:
    import pandas as pd

# The seconds that a run spent outside its stages: tracking, images and records.
OVERHEAD = "overhead"
# The variant of a search's trials, and the start of the variants that test its regions.
TRIAL, REGION_PREFIX = "trial", "region_"
CARD = "report_card.csv"
CARD_COLUMNS = ("score", "split", "value", "low", "high", "chance", "count", "protocol")
SPEED_FOLDER, TIMINGS_FILE = "speed", "repetitions.csv"
# Fields of a report that JSON has as lists.
TUPLES = ("rows", "columns", "effects", "missing")


@dataclass(frozen=True)
class Claim:
    """The claim that ``better`` beats ``than`` in ``metric`` by at least ``at_least``.

    ``better`` and ``than`` are variants or, in a grid, run names without the seed.  Lower is
    better for losses, errors and costs, higher for all other metrics.  A negative ``at_least``
    claims that ``better`` is worse by no more than that.

    Attributes:
        metric: column of ``runs.csv``.
        better: the group that is claimed to be better.
        than: the group that it is compared with.
        at_least: claimed difference, in the unit of the metric.
    """

    metric: str
    better: str
    than: str
    at_least: float = 0.0

    def __post_init__(self) -> None:
        """Raise ``ValueError`` if a group is compared with itself."""
        if self.better == self.than:
            raise ValueError(f"better and than must differ, got {self.than!r} twice")


@dataclass(frozen=True)
class Search:
    """A search for the best settings of each domain, and the regions that are then tested.

    A domain has a name and one metric to maximise.  Half of the trials fill ``space`` evenly; the
    others are proposed for each domain in turn.  A region holds settings that score within
    ``tolerance`` of the best of its domain.  Each seed tests one point of each region, with the
    settings of the experiment file.

    Attributes:
        space: axis of each setting that is searched.
        domains: metric of each domain, without its split.
        trials: number of trial runs.
        tolerance: how far a good setting may score below the best, in units of the metric.
        settings: settings of the trials, which override those of the experiment file.
    """

    space: dict[str, Axis]
    domains: dict[str, str]
    trials: int = 64
    tolerance: float = 0.05
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for a setting that is out of range."""
        if not self.space or not self.domains:
            raise ValueError("space and domains must each name at least one")
        if self.trials < 8:
            raise ValueError(f"trials must be at least 8, got {self.trials}")
        if not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance must be in (0, 1), got {self.tolerance}")

    def score(self, domain: str, runs: "pd.DataFrame") -> str:
        """Return the column of a domain's score, whatever split the runs were evaluated on.

        Raises:
            ValueError: if there is no such column, or more than one.
        """
        start = f"{self.domains[domain]}/"
        ends = ("_low", "_high", "_chance", "_target")
        columns = list(map(str, runs.dropna(axis=1, how="all").columns))
        scores = [name for name in columns if name.startswith(start) and not name.endswith(ends)]
        if len(scores) != 1:
            names = ", ".join(scores) or "none"
            raise ValueError(
                f"search.domains.{domain}: expected the scores of one split, got {names}"
            )
        return scores[0]


@dataclass(frozen=True)
class Figure:
    """One figure of a report; ``figures.FIGURES`` lists the kinds.

    Attributes:
        kind: a key of ``figures.FIGURES``.
        y: the metrics, one panel each.
        x: the column along the axis.
        by: the column that distinguishes variants.
    """

    kind: str
    y: tuple[str, ...]
    x: str = "step"
    by: str = "variant"

    @property
    def file(self) -> str:
        """The file name from kind, metrics and axis: ``curves-val-loss-image-and-2-more.svg``."""
        axis = [] if self.x == "step" else [self.x]
        others = [f"and-{len(self.y) - 1}-more"] if len(self.y) > 1 else []
        return re.sub(r"[^\w.]+", "-", "-".join([self.kind, self.y[0], *others, *axis])) + ".svg"


@dataclass(frozen=True)
class Report:
    """The content of an experiment's README.

    Attributes:
        experiment: name of the experiment.
        title: title of the page.
        question: the question that the experiment answers.
        source: the experiment file, relative to the checkout.
        rows: columns of ``runs.csv`` whose values make the rows of the table.
        columns: the metrics in the table; empty means all metrics.
        claim: what the experiment claims, if anything.
        effects: metrics in which all other groups of runs are compared with ``against``.
        search: what was searched for, if anything.
        missing: the runs that have not finished.
        scale: parameters, steps, tokens and seeds of the runs, in one line.
        same_pairs: groups of test runs that may share evaluation pairs with a search's trials;
            None if unknown.
    """

    experiment: str
    title: str
    question: str
    source: str
    rows: tuple[str, ...] = ("variant",)
    columns: tuple[str, ...] = ()
    figures: tuple[Figure, ...] = ()
    claim: Claim | None = None
    effects: tuple[str, ...] = ()
    against: str | None = None
    search: Search | None = None
    missing: tuple[str, ...] = ()
    scale: str = ""
    same_pairs: tuple[str, ...] | None = None


def read_report(folder: Path) -> Report:
    """Return the report that an experiment's folder was exported with.

    Raises:
        DamagedFileError: if ``report.json`` is not a valid report.
    """
    path = folder / "report.json"
    fields = read_mapping(path, figures=list)
    try:
        return _report_of(fields)
    except (TypeError, KeyError, AttributeError) as error:
        raise DamagedFileError(path, f"no report: {error}") from error


def _report_of(fields: dict[str, Any]) -> Report:
    figures = [
        Figure(figure["kind"], tuple(figure["y"]), figure["x"], figure["by"])
        for figure in fields.pop("figures")
    ]
    fields |= {name: tuple(fields.get(name, ())) for name in TUPLES}
    if fields.get("same_pairs") is not None:
        fields["same_pairs"] = tuple(fields["same_pairs"])
    claim, search = fields.pop("claim", None), fields.pop("search", None)
    if search is not None:
        space = {name: Axis(**axis) for name, axis in search.pop("space").items()}
        search = Search(space, **search)
    return Report(**fields, figures=tuple(figures), claim=claim and Claim(**claim), search=search)


@dataclass(frozen=True)
class Timing:
    """One repetition, in which ``units`` of ``unit`` were processed in ``seconds``.

    Attributes:
        implementation: name of the implementation.
        part: timed part of the implementation; empty for the whole.
        unit: what is counted, such as ``token``.
        repetition: number of the repetition, from 0.
        seconds: duration of the repetition.
        units: number of units processed.
        peak_bytes: peak memory of the implementation's process during the repetition.
    """

    implementation: str
    part: str
    unit: str
    repetition: int
    seconds: float
    units: int
    peak_bytes: int

    @property
    def label(self) -> str:
        """The name of the implementation and its part in metric names."""
        return implementation_name(self.implementation, self.part)


REPETITION_COLUMNS = tuple(field.name for field in fields(Timing))


def implementation_name(implementation: str, part: str) -> str:
    """Return ``implementation/part``, or ``implementation`` if the part is empty."""
    return f"{implementation}/{part}" if part else implementation


def experiment_folders(results_folder: Path) -> list[Path]:
    """Return the folders of the exported experiments, sorted by name."""
    return sorted(path.parent for path in results_folder.rglob("report.json"))


def without_number(name: str) -> str:
    """Return the name of a score with ``*`` for a number at the end of its metric.

    >>> without_number("few_shot/accuracy_16/test")
    'few_shot/accuracy_*/test'
    """
    return re.sub(r"_\d+(?=/[^/]*$)", "_*", name)


def group_of(run: str, seed: int) -> str:
    """Return the name of a run's group: the run's name without its seed, equal for all seeds.

    >>> group_of("causal-top_k=8-seed3", 3), group_of("seed3", 3)
    ('causal-top_k=8', '')
    """
    return run.removesuffix(f"seed{seed}").rstrip("-")


def format_cell_value(value: object) -> str:
    """Format a value for CSV files and tables: floats with six digits, None as empty."""
    if value is None:
        return ""
    if isinstance(value, bool | np.bool_):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}"
    return (
        str(value)
        if isinstance(value, str | int | np.integer)
        else json.dumps(value, ensure_ascii=False)
    )
