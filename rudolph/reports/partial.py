"""Reports of experiments in which some runs have not finished."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pandas as pd

from rudolph.reports.report import read_curves, read_runs
from rudolph.reports.report_cards import read_card
from rudolph.reports.schema import CARD, Figure, Report, group_of, without_number
from rudolph.reports.search_tables import is_trial


def available_report(report: Report, folder: Path) -> Report:
    """Return a report without the metrics, comparisons and regions that only missing runs have.

    A report without missing runs is returned unchanged, so a metric that no run has stays an
    error.

    Args:
        report: the report of the whole experiment.
        folder: folder of the exported tables.
    """
    if not report.missing:
        return report
    runs = read_runs(folder)
    groups = set(map(group_of, runs["run"], runs["seed"]))
    claim = report.claim
    if claim is not None and not (claim.metric in runs and {claim.better, claim.than} <= groups):
        claim = None
    has_others = report.against in groups and len(groups) > 1
    effects = tuple(_known(report.effects, runs.columns)) if has_others else ()
    search = report.search if is_trial(runs).any() else None
    reduced = replace(
        report,
        claim=claim,
        effects=effects,
        against=report.against if effects else None,
        search=search,
        columns=tuple(_known(report.columns, runs.columns)),
    )
    figures = (_available_figure(figure, reduced, folder, runs) for figure in report.figures)
    return replace(reduced, figures=tuple(figure for figure in figures if figure is not None))


def _available_figure(
    figure: Figure, report: Report, folder: Path, runs: pd.DataFrame
) -> Figure | None:
    """Return a figure restricted to the metrics that exist; None if there are none."""
    known: Iterable[str] = runs.columns
    if figure.kind == "regions":
        return None if report.search is None else figure
    if figure.kind == "forest":
        known = {*report.effects, *(() if report.claim is None else (report.claim.metric,))}
    elif figure.kind == "curves":
        known = set(read_curves(folder)["metric"])
    elif figure.kind in ("card", "best_of", "shots"):
        scores = set(read_card(folder / CARD)["score"]) if (folder / CARD).is_file() else set()
        known = scores | {score.partition("/best_of_")[0] for score in scores}
        known |= {without_number(score) for score in scores}
    elif any(name not in runs for name in (figure.x, figure.by)):
        return None
    kept = tuple(_known(figure.y, known))
    is_complete = kept == figure.y or figure.kind != "pareto"
    return replace(figure, y=kept) if kept and is_complete else None


def _known(names: Iterable[str], known: Iterable[str]) -> list[str]:
    available = set(known)
    return [name for name in names if name in available]
