"""Figures of a report: numbers in, one file out, the same bytes every time.

The figures of a report are drawn from CSV files alone; ``FIGURES`` names them.  Each takes
``(frame, path, *, y, x, by)``: the metrics, the column along the axis, the column that tells the
variants apart.  To add one, write it with these arguments and name it in ``FIGURES``.
Series differ in colour, line and marker, so that they are told apart in grey too.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
import pandas as pd
import seaborn
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from rudolph.results.claims import SURE

STYLE = {
    "svg.hashsalt": "rudolph",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9,
    "legend.fontsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.9",
    "axes.axisbelow": True,
}
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
INTERVAL_STYLE: dict[str, Any] = {
    "color": seaborn.color_palette("colorblind")[0],
    "marker": "o",
    "markersize": 4.5,
    "linewidth": 1.6,
}
LEVEL_STYLES: dict[str, dict[str, Any]] = {
    "chance": {"color": "0.3", "linestyle": ":", "linewidth": 1.4},
    "target": {"color": "0.3", "linestyle": "-", "linewidth": 1.4},
}
# A context manager of this kind is also a decorator, entered anew at each call; "default" because
# a figure must not depend on what a notebook has set.
styled = matplotlib.style.context(["default", STYLE])


@styled
def curves(frame: pd.DataFrame, path: Path, *, y: Sequence[str], x: str, by: str) -> None:
    """Metrics along training: the mean of a variant's runs, and from the least to the greatest.

    Args:
        frame: one row a point: ``run, metric, step, value`` and the column ``by``.
        x: ``step``.

    Seeds are compared where all of them have points, between which they are straight.
    """
    _require(frame, [x, by, "run", "metric", "value"])
    figure, panels = panels_of(len(y))
    for axes, metric in zip(panels, y, strict=True):
        points = frame[frame["metric"] == metric]
        if points.empty:
            raise ValueError(
                f"figure: no curve of {metric!r}; there are {_names(frame['metric'])}"
            )
        for number, (name, group) in enumerate(points.groupby(by, sort=True)):
            runs = [run.sort_values(x) for _, run in group.groupby("run", sort=True)]
            first, last = max(r[x].iloc[0] for r in runs), min(r[x].iloc[-1] for r in runs)
            steps = np.unique(np.concatenate([r[x].to_numpy() for r in runs]))
            steps = steps[(steps >= first) & (steps <= last)]
            values = np.stack([np.interp(steps, r[x], r["value"]) for r in runs])
            _line(axes, steps, values, name=str(name), number=number)
        axes.set(xlabel=x, ylabel=metric)
    _finish(figure, panels, path, title=by)


@styled
def lines(frame: pd.DataFrame, path: Path, *, y: Sequence[str], x: str, by: str) -> None:
    """Metrics of finished runs against a number of the grid; the spread is over the seeds.

    Args:
        frame: one row a run.
        x: a numeric column, such as ``sampling.top_k``.
    """
    _require(frame, [x, by, *y])
    figure, panels = panels_of(len(y))
    for axes, metric in zip(panels, y, strict=True):
        for number, (name, group) in enumerate(frame.groupby(by, sort=True)):
            places = [place[metric].dropna() for _, place in group.groupby(x, sort=True)]
            # Places may have different numbers of runs; NaN counts in neither mean nor ends.
            values = np.full((max(map(len, places)), len(places)), np.nan)
            for column, place in enumerate(places):
                values[: len(place), column] = place
            _line(axes, np.sort(group[x].unique()), values, name=str(name), number=number)
        axes.set(xlabel=x, ylabel=metric)
    _finish(figure, panels, path, title=by)


@styled
def intervals(frame: pd.DataFrame, path: Path, *, y: Sequence[str], x: str, by: str) -> None:
    """A forest plot: each run's value with its interval, variants in rows, chance level dotted.

    Args:
        frame: one row a run; the interval of ``m`` is in ``m_low`` and ``m_high``, its chance
            level in ``m_chance`` and a value to reach in ``m_target``, where there are such.
        x: the column whose values stand side by side in a row, such as ``seed``.
    """
    _require(frame, [x, by, *y])
    rows, beside = sorted(frame[by].unique()), sorted(frame[x].unique())
    figure, panels = panels_of(len(y), height=0.9 + len(rows) * (0.32 + 0.1 * len(beside)))
    for axes, metric in zip(panels, y, strict=True):
        for record in frame.sort_values([by, x]).to_dict("records"):
            row, number = rows.index(record[by]), beside.index(record[x])
            offset = (number - (len(beside) - 1) / 2) * 0.7 / len(beside)
            _interval(axes, record, metric, row=row, height=row + offset)
        axes.set(xlabel=metric, ylim=(len(rows) - 0.4, -0.6))
        names = [str(row) if axes is panels[0] else "" for row in rows]
        axes.set_yticks(range(len(rows)), names)
        axes.grid(axis="y", visible=False)
    order = f", down: {x} {', '.join(map(str, beside))}" if len(beside) > 1 else ""
    marks = {f"value and interval{order}": Line2D([], [], **INTERVAL_STYLE)}
    for kind, style in LEVEL_STYLES.items():
        if any(f"{metric}_{kind}" in frame for metric in y):
            marks[kind] = Line2D([], [], **style)
    figure.legend(
        list(marks.values()), list(marks), loc="outside lower center", ncols=3, frameon=False
    )
    save(figure, path)


@styled
def forest(frame: pd.DataFrame, path: Path, *, y: Sequence[str], x: str, by: str) -> None:
    """How much better groups of runs are than another, with intervals; right of 0 is better.

    A filled marker is a difference after Holm's correction; a claim's least is a full line.

    Args:
        frame: one row a comparison, see ``claims.Effect``; ``x`` is ``metric``, ``by`` ``group``.
    """
    _require(frame, [x, by, "than", "value", "low", "high", "p_value", "at_least"])
    rows = max(int((frame[x] == metric).sum()) for metric in y)
    figure, panels = panels_of(len(y), height=1.1 + 0.3 * rows)
    for axes, metric in zip(panels, y, strict=True):
        records = frame[frame[x] == metric].sort_values([by, "than"]).to_dict("records")
        for row, record in enumerate(records):
            ends = [record["low"], record["value"], record["high"]]
            style = INTERVAL_STYLE | {"fillstyle": "full" if record["p_value"] <= SURE else "none"}
            axes.plot(ends, [row] * 3, markevery=[1], **style)
            if record["at_least"]:
                axes.plot(
                    [record["at_least"]] * 2, [row - 0.4, row + 0.4], **LEVEL_STYLES["target"]
                )
        axes.axvline(0, **LEVEL_STYLES["chance"])
        axes.set(xlabel=f"better in {metric} by, 95 % interval", ylim=(rows - 0.4, -0.6))
        names = [f"{each[by]}, than {each['than']}" for each in records]
        axes.set_yticks(range(len(records)), names)
        axes.grid(axis="y", visible=False)
    save(figure, path)


@styled
def ratios(frame: pd.DataFrame, path: Path, *, y: Sequence[str], x: str, by: str) -> None:
    """Intervals of metrics of one unit on one axis, a row for each variant and metric.

    The axis is called what the metrics have in common after their last ``/``; of ratios to the
    reference 1 is dotted.
    """
    _require(frame, [x, by, *y])
    records = frame.sort_values([by, x]).to_dict("records")
    rows = [(each, metric) for each in records for metric in y if each[metric] == each[metric]]
    figure = Figure(figsize=(7.2, 0.9 + 0.26 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for row, (record, metric) in enumerate(rows):
        _interval(axes, record, metric, row=row, height=row)
    units = {metric.rpartition("/")[2] for metric in y}
    if units == {"times_reference"}:
        axes.axvline(1, **LEVEL_STYLES["chance"])
    axes.set(xlabel=", ".join(sorted(units)), ylim=(len(rows) - 0.4, -0.6))
    axes.set_xlim(left=0)
    beside = f", {x} {{}}" if frame[x].nunique() > 1 else ""
    names = [f"{each[by]}: {metric}{beside.format(each[x])}" for each, metric in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.grid(axis="y", visible=False)
    save(figure, path)


@styled
def card(frame: pd.DataFrame, path: Path, *, y: Sequence[str], x: str, by: str) -> None:
    """A report card: a row for each score that was asked for, on an axis from 0 to 1.

    Args:
        frame: one row a score of a run: its name in the column ``x``, and ``value``, ``low``,
            ``high`` and, where there is one, ``chance``.
        y: names of the scores, from the top down; ``by`` tells runs apart.
    """
    _require(frame, [x, by, "value", "low", "high", "chance"])
    chosen = frame[frame[x].isin(y)].assign(rank=lambda rows: rows[x].map(list(y).index))
    records = chosen.sort_values(["rank", by]).to_dict("records")
    figure = Figure(figsize=(7.2, 0.9 + 0.26 * len(records)), layout="constrained")
    axes = figure.subplots()
    has_one = frame[by].nunique() == 1
    for row, record in enumerate(records):
        bounds = {f"value_{bound}": record[bound] for bound in ("low", "high", "chance")}
        _interval(axes, record | bounds, "value", row=row, height=row)
    axes.set(xlabel="score, 95 % interval; dotted: chance", ylim=(len(records) - 0.4, -0.6))
    axes.set_xlim(-0.02, 1.02)
    names = [each[x] if has_one else f"{each[x]}: {each[by]}" for each in records]
    axes.set_yticks(range(len(records)), names)
    axes.grid(axis="y", visible=False)
    save(figure, path)


@styled
def best_of(frame: pd.DataFrame, path: Path, *, y: Sequence[str], x: str, by: str) -> None:
    """Best of N: a curve with its interval for each ranking, of the scores ``y/best_of_N/split``.

    Args:
        frame: a report card of one split, see ``card``.
        y: names of the rankings; ``by`` tells runs apart.
    """
    _require(frame, [x, by, "value", "low", "high"])
    figure, [axes] = panels_of(1)
    palette, has_one = seaborn.color_palette("colorblind"), frame[by].nunique() == 1
    drawn: set[int] = set()
    for ranking in y:
        numbers = frame[x].str.extract(rf"^{re.escape(ranking)}/best_of_(\d+)/", expand=False)
        points = frame.assign(N=numbers)[numbers.notna()].astype({"N": int})
        if points.empty:
            raise ValueError(f"figure: no score {ranking}/best_of_N; there are {_names(frame[x])}")
        for run, own in points.sort_values("N").groupby(by, sort=True):
            place, name = len(axes.lines), ranking if has_one else f"{ranking}: {run}"
            axes.fill_between(
                own["N"], own["low"], own["high"], color=palette[place % len(palette)], alpha=0.13
            )
            _line(axes, own["N"].to_numpy(), own[["value"]].to_numpy().T, name=name, number=place)
            drawn |= set(own["N"])
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(drawn), [str(number) for number in sorted(drawn)])
    axes.set(xlabel="pictures to choose from", ylabel="right, 95 % interval")
    _finish(figure, [axes], path, title="ranked by")


@styled
def heatmap(frame: pd.DataFrame, path: Path, *, y: Sequence[str], x: str, by: str) -> None:
    """Metrics over two columns of the grid: the mean over the other ones, written in the cell."""
    _require(frame, [x, by, *y])
    figure, panels = panels_of(len(y))
    for axes, metric in zip(panels, y, strict=True):
        table = frame.pivot_table(index=by, columns=x, values=metric, aggfunc="mean")
        seaborn.heatmap(
            table, ax=axes, cmap="cividis", annot=True, fmt=".3g", cbar=False, linewidths=0.5
        )
        axes.set(title=metric, xlabel=x, ylabel=by)
        axes.tick_params(length=0, rotation=0)
    save(figure, path)


def panels_of(number: int, height: float = 3.2) -> tuple[Figure, list[Axes]]:
    """A figure with so many panels side by side, ``height`` inches high."""
    width = 5.6 if number == 1 else 3.8 * number + 0.8
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, number, squeeze=False).ravel())


def _line(axes: Axes, x: Any, values: NDArray[Any], *, name: str, number: int) -> None:
    palette = seaborn.color_palette("colorblind")
    colour, marker = palette[number % len(palette)], MARKERS[number % len(MARKERS)]
    mean, num_runs = np.nanmean(values, axis=0), len(values)
    # Markers of different series start at different points, else they hide each other.
    every = max(1, len(x) // 8)
    axes.plot(
        x,
        mean,
        color=colour,
        linestyle=LINES[number % len(LINES)],
        marker=marker,
        markersize=4,
        markevery=(number * every // 3 % every, every),
        linewidth=1.5,
        label=name if num_runs == 1 else f"{name} ({num_runs} runs)",
    )
    if num_runs > 1:
        least, greatest = np.nanmin(values, axis=0), np.nanmax(values, axis=0)
        axes.fill_between(x, least, greatest, color=colour, alpha=0.18, linewidth=0)


def _interval(
    axes: Axes, record: Mapping[Any, Any], metric: str, *, row: int, height: float
) -> None:
    for kind, style in LEVEL_STYLES.items():
        level = record.get(f"{metric}_{kind}", np.nan)
        axes.plot([level, level], [row - 0.42, row + 0.42], **style)
    value = record[metric]
    low, high = record.get(f"{metric}_low", value), record.get(f"{metric}_high", value)
    axes.plot([low, value, high], [height] * 3, markevery=[1], **INTERVAL_STYLE)


def _finish(figure: Figure, panels: list[Axes], path: Path, *, title: str) -> None:
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, title=title)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write ``.svg`` or ``.png`` without date, so that a second drawing is equal in every byte."""
    metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata=metadata)


def _require(frame: pd.DataFrame, columns: Sequence[str]) -> None:
    missing = [column for column in columns if column not in frame]
    if missing:
        raise ValueError(f"figure: no column {missing[0]!r}; there are {', '.join(frame.columns)}")


def _names(values: "pd.Series[Any]") -> str:
    return ", ".join(sorted(str(value) for value in values.unique()))


FIGURES = {
    "curves": curves,
    "lines": lines,
    "intervals": intervals,
    "forest": forest,
    "ratios": ratios,
    "heatmap": heatmap,
    "card": card,
    "best_of": best_of,
}
