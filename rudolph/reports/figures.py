"""Figures of a report, drawn from CSV files alone, with the same bytes every time.

``FIGURES`` lists the kinds.  Each takes ``(frame, path, *, y, x, by)``: a table, the file to
write, the metrics, the column along the axis, and the column of the variants.

To add a kind, write it with these arguments, decorate it with ``report_figure`` and add it to
``FIGURES``.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import seaborn
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from rudolph.evaluation.statistics import mean_over_seeds
from rudolph.reports.claims import LESS_IS_BETTER, SURE, natural_order
from rudolph.reports.style import (
    INTERVAL_STYLE,
    LEVEL_STYLES,
    MARKERS,
    drawable_text,
    finish,
    interval,
    line,
    panels_of,
    save,
    styled,
)

# The axis of a numeric column is logarithmic if its maximum is this many times its minimum.
SPREAD = 20

Draw = Callable[..., None]


def report_figure(draw: Draw) -> Draw:
    """Decorate a figure to use the common style and to draw names literally."""

    @styled
    @wraps(draw)
    def drawn(frame: pd.DataFrame, path: Path, *, y: Sequence[str], x: str, by: str) -> None:
        metrics = [drawable_text(metric) for metric in y]
        draw(_with_drawn_texts(frame), path, y=metrics, x=drawable_text(x), by=drawable_text(by))

    return drawn


def _with_drawn_texts(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a table whose texts and column names are escaped for drawing."""
    frame = frame.rename(columns=drawable_text)
    for name in frame.select_dtypes(include=["object", "string"]).columns:
        texts = frame[name].map(
            lambda cell: drawable_text(cell) if isinstance(cell, str) else cell
        )
        # An unchanged column keeps its dtype.
        if not texts.equals(frame[name]):
            frame = frame.assign(**{name: texts})
    return frame


@report_figure
def curves(frame: pd.DataFrame, path: Path, *, y: Sequence[str], x: str, by: str) -> None:
    """Draw metrics along training: the mean over a variant's runs, and the range from min to max.

    ``frame`` has one row per point, with the columns ``run, metric, step, value`` and ``by``;
    ``x`` is ``step``.  Runs are averaged over the steps that all of them cover, with linear
    interpolation.
    """
    _require(frame, [x, by, "run", "metric", "value"])
    figure, panels = panels_of(len(y))
    for axes, metric in zip(panels, y, strict=True):
        points = frame[frame["metric"] == metric]
        if points.empty:
            raise ValueError(
                f"figure: no curve of {metric!r}; there are {_names(frame['metric'])}"
            )
        for number, (name, group) in enumerate(_groups(points, by)):
            runs = [run.sort_values(x) for _, run in group.groupby("run", sort=True)]
            first, last = max(r[x].iloc[0] for r in runs), min(r[x].iloc[-1] for r in runs)
            steps = np.unique(np.concatenate([r[x].to_numpy() for r in runs]))
            steps = steps[(steps >= first) & (steps <= last)]
            values = np.stack([np.interp(steps, r[x], r["value"]) for r in runs])
            line(axes, steps, values, name=str(name), number=number)
        axes.set(xlabel=x, ylabel=metric)
    finish(figure, panels, path, title=by)


@report_figure
def lines(frame: pd.DataFrame, path: Path, *, y: Sequence[str], x: str, by: str) -> None:
    """Draw metrics of finished runs against a numeric column; the band is the range over seeds.

    ``frame`` has one row per run; ``x`` is the numeric column, such as ``sampling.top_k``.
    """
    _require(frame, [x, by, *y])
    figure, panels = panels_of(len(y))
    for axes, metric in zip(panels, y, strict=True):
        for number, (name, group) in enumerate(_groups(frame, by)):
            places = [place[metric].dropna() for _, place in group.groupby(x, sort=True)]
            # Values of x may have different numbers of runs; NaN counts in neither mean nor range.
            values = np.full((max(map(len, places)), len(places)), np.nan)
            for column, place in enumerate(places):
                values[: len(place), column] = place
            line(axes, np.sort(group[x].unique()), values, name=str(name), number=number)
        if frame[x].min() > 0 and frame[x].max() >= SPREAD * frame[x].min():
            places = sorted(frame[x].unique())
            axes.set_xscale("log")
            axes.set_xticks(places, [f"{place:g}" for place in places])
            axes.minorticks_off()
        axes.set(xlabel=x, ylabel=metric)
    finish(figure, panels, path, title=by)


@report_figure
def intervals(frame: pd.DataFrame, path: Path, *, y: Sequence[str], x: str, by: str) -> None:
    """Draw a forest plot: each run's value with its interval, one row per variant.

    ``frame`` has one row per run.  The interval of metric ``m`` is in ``m_low`` and ``m_high``,
    its chance level in ``m_chance`` and its target in ``m_target``, where they exist.  Chance
    levels are dotted.  ``x`` is the column whose values stand side by side in a row, such as
    ``seed``.
    """
    _require(frame, [x, by, *y])
    rows, beside = sorted(frame[by].unique()), sorted(frame[x].unique())
    figure, panels = panels_of(len(y), height=0.9 + len(rows) * (0.32 + 0.1 * len(beside)))
    for axes, metric in zip(panels, y, strict=True):
        for record in frame.sort_values([by, x]).to_dict("records"):
            row, number = rows.index(record[by]), beside.index(record[x])
            offset = (number - (len(beside) - 1) / 2) * 0.7 / len(beside)
            interval(axes, record, metric, row=row, height=row + offset)
        axes.set(xlabel=metric, ylim=(len(rows) - 0.4, -0.6))
        axes.locator_params(axis="x", nbins=5)
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


@report_figure
def forest(frame: pd.DataFrame, path: Path, *, y: Sequence[str], x: str, by: str) -> None:
    """Draw how much better groups of runs are than another, with intervals; right of 0 is better.

    A filled marker is a significant difference after Holm's correction.  A full line is the least
    difference that a claim states.  ``frame`` has one row per comparison, see ``claims.Effect``;
    ``x`` is ``metric`` and ``by`` is ``group``.
    """
    _require(frame, [x, by, "than", "value", "low", "high", "p_value", "at_least"])
    rows = max(int((frame[x] == metric).sum()) for metric in y)
    # A common reference is named below the axis, different ones in a second line of each row.
    has_one = frame["than"].nunique() == 1
    lines_of_one = 1 if has_one else 2
    figure, panels = panels_of(len(y), height=1.1 + (0.15 + 0.15 * lines_of_one) * rows)
    longest = max(map(len, frame[by])) + 5 * (not has_one)
    figure.set_figwidth(figure.get_figwidth() + 0.08 * len(y) * max(0, longest - 16))
    for axes, metric in zip(panels, y, strict=True):
        own = frame[frame[x] == metric]
        own = own.sort_values([by, "than"], key=lambda names: names.map(natural_order))
        records = own.to_dict("records")
        for row, record in enumerate(records):
            ends = [record["low"], record["value"], record["high"]]
            style = INTERVAL_STYLE | {"fillstyle": "full" if record["p_value"] <= SURE else "none"}
            axes.plot(ends, [row] * 3, markevery=[1], **style)
            if record["at_least"]:
                axes.plot(
                    [record["at_least"]] * 2, [row - 0.4, row + 0.4], **LEVEL_STYLES["target"]
                )
        axes.axvline(0, **LEVEL_STYLES["chance"])
        than = f" than {frame['than'].iloc[0]}" if has_one else ""
        axes.set(xlabel=f"{metric}\nbetter{than} by, 95 % interval", ylim=(rows - 0.4, -0.6))
        axes.locator_params(axis="x", nbins=5)
        names = [each[by] if has_one else f"{each[by]}\nthan {each['than']}" for each in records]
        axes.set_yticks(range(len(records)), names)
        axes.grid(axis="y", visible=False)
    save(figure, path)


@report_figure
def ratios(frame: pd.DataFrame, path: Path, *, y: Sequence[str], x: str, by: str) -> None:
    """Draw intervals of metrics of one unit on one axis, one row per variant and metric.

    The axis is named after the part of the metrics behind their last ``/``.  For speedups a dotted
    line marks 1, the reference.
    """
    _require(frame, [x, by, *y])
    records = frame.sort_values([by, x]).to_dict("records")
    rows = [(each, metric) for each in records for metric in y if each[metric] == each[metric]]
    figure = Figure(figsize=(7.2, 0.9 + 0.26 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for row, (record, metric) in enumerate(rows):
        interval(axes, record, metric, row=row, height=row)
    units = {metric.rpartition("/")[2] for metric in y}
    if units == {"speedup"}:
        axes.axvline(1, **LEVEL_STYLES["chance"])
    axes.set(xlabel=", ".join(sorted(units)), ylim=(len(rows) - 0.4, -0.6))
    axes.set_xlim(left=0)
    beside = f", {x} {{}}" if frame[x].nunique() > 1 else ""
    names = [f"{each[by]}: {metric}{beside.format(each[x])}" for each, metric in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.grid(axis="y", visible=False)
    save(figure, path)


@report_figure
def card(frame: pd.DataFrame, path: Path, *, y: Sequence[str], x: str, by: str) -> None:
    """Draw a report card: one row per requested score, on an axis from 0 to 1.

    ``frame`` has one row per score of a run: its name in column ``x``, and ``value``, ``low``,
    ``high`` and ``chance``, which may be missing.  ``y`` names the scores from the top down;
    ``by`` distinguishes runs.
    """
    _require(frame, [x, by, "value", "low", "high", "chance"])
    chosen = frame[frame[x].isin(y)].assign(rank=lambda rows: rows[x].map(list(y).index))
    records = chosen.sort_values(["rank", by]).to_dict("records")
    figure = Figure(figsize=(7.2, 0.9 + 0.26 * len(records)), layout="constrained")
    axes = figure.subplots()
    has_one = frame[by].nunique() == 1
    for row, record in enumerate(records):
        bounds = {f"value_{bound}": record[bound] for bound in ("low", "high", "chance")}
        interval(axes, record | bounds, "value", row=row, height=row)
    axes.set(xlabel="score, 95 % interval; dotted: chance", ylim=(len(records) - 0.4, -0.6))
    axes.set_xlim(-0.02, 1.02)
    names = [each[x] if has_one else f"{each[x]}: {each[by]}" for each in records]
    axes.set_yticks(range(len(records)), names)
    axes.grid(axis="y", visible=False)
    save(figure, path)


@report_figure
def best_of_n(frame: pd.DataFrame, path: Path, *, y: Sequence[str], x: str, by: str) -> None:
    """Draw best of N: a curve with its interval per ranking, of the scores ``y/best_of_N/split``.

    ``frame`` is a report card of one split, see ``card``.  ``y`` names the rankings; ``by``
    distinguishes runs.
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
            line(axes, own["N"].to_numpy(), own[["value"]].to_numpy().T, name=name, number=place)
            drawn |= set(own["N"])
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(drawn), [str(number) for number in sorted(drawn)])
    axes.set(xlabel="images to choose from", ylabel="right, 95 % interval")
    finish(figure, [axes], path, title="ranked by")


@report_figure
def heatmap(frame: pd.DataFrame, path: Path, *, y: Sequence[str], x: str, by: str) -> None:
    """Draw metrics over two columns of the grid; a cell is the mean over all other columns.

    Cells with several runs also show the half width of the 95 % interval.
    """
    _require(frame, [x, by, *y])
    rows = frame[by].nunique()
    figure, panels = panels_of(len(y), height=1.0 + 0.45 * rows)
    for axes, metric in zip(panels, y, strict=True):
        table = frame.pivot_table(index=by, columns=x, values=metric, aggfunc="mean")
        told = frame.pivot_table(index=by, columns=x, values=metric, aggfunc=_cell_text)
        seaborn.heatmap(
            table, ax=axes, cmap="cividis", annot=told, fmt="", cbar=False, linewidths=0.5
        )
        axes.set(title=metric, xlabel=x, ylabel=by)
        axes.tick_params(length=0, rotation=0)
    save(figure, path)


def _cell_text(values: "pd.Series[float]") -> str:
    """Format a cell as ``0.72``, for several runs with ``± 0.03`` below."""
    mean = f"{values.mean():.3g}"
    if len(values) < 2:
        return mean
    found = mean_over_seeds(values.to_numpy())
    return f"{mean}\n± {(found.high - found.low) / 2:.1g}"


@report_figure
def pareto(frame: pd.DataFrame, path: Path, *, y: Sequence[str], x: str, by: str) -> None:
    """Draw two metrics against each other: the mean of each group of runs with 95 % intervals.

    A line joins the groups on the Pareto front.  ``frame`` has one row per run; ``by``
    distinguishes groups, whose runs differ in ``x``.  ``y`` is the horizontal metric, then the
    vertical one.
    """
    _require(frame, [x, by, *y])
    if len(y) != 2:
        raise ValueError(f"figure: pareto takes two metrics, got {len(y)}")
    figure, [axes] = panels_of(1, height=4.2)
    palette, places = seaborn.color_palette("colorblind"), []
    for number, (name, group) in enumerate(_groups(frame, by)):
        found = [mean_over_seeds(group[metric].dropna().to_numpy()) for metric in y]
        widths = [[[each.value - each.low], [each.high - each.value]] for each in found]
        axes.errorbar(
            found[0].value,
            found[1].value,
            xerr=widths[0],
            yerr=widths[1],
            marker=MARKERS[number % len(MARKERS)],
            markersize=6,
            linestyle="none",
            linewidth=1.2,
            color=palette[number % len(palette)],
            label=str(name),
        )
        places.append([each.value for each in found])
    front = pareto_front(np.array(places), [bool(LESS_IS_BETTER.search(metric)) for metric in y])
    axes.plot(*front.T, color="0.5", linewidth=1, linestyle=":", zorder=0)
    better = ["left" if LESS_IS_BETTER.search(y[0]) else "right"]
    better.append("down" if LESS_IS_BETTER.search(y[1]) else "up")
    axes.set(xlabel=f"{y[0]} (better: {better[0]})", ylabel=f"{y[1]} (better: {better[1]})")
    finish(figure, [axes], path, title=by)


@report_figure
def regions(frame: pd.DataFrame, path: Path, *, y: Sequence[str], x: str, by: str) -> None:
    """Draw the range of each setting that a search found, per domain, on the setting's axis.

    ``frame`` is ``regions.csv``, whose column ``x`` names settings and whose column ``by`` names
    domains.  ``y`` lists the settings, one panel each.
    """
    _require(frame, [x, by, "low", "high", "least", "greatest", "log"])
    domains = list(dict.fromkeys(frame[by].sort_values()))
    figure, panels = panels_of(len(y), height=1.1 + 0.32 * len(domains))
    palette = seaborn.color_palette("colorblind")
    for axes, setting in zip(panels, y, strict=True):
        own = frame[frame[x] == setting].set_index(by)
        for row, domain in enumerate(domains):
            ends = [own["low"][domain], own["high"][domain]]
            colour = palette[row % len(palette)]
            axes.plot(ends, [row] * 2, color=colour, linewidth=6, solid_capstyle="butt")
            axes.plot(ends, [row] * 2, linestyle="none", marker="|", markersize=12, color="0.2")
        least, greatest = own["least"].iloc[0], own["greatest"].iloc[0]
        ticks = np.linspace(least, greatest, 4)
        if own["log"].iloc[0]:
            axes.set_xscale("log")
            ticks = np.geomspace(least, greatest, 4)
        axes.set_xlim(least, greatest)
        axes.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
        axes.minorticks_off()
        axes.set(xlabel=setting, ylim=(len(domains) - 0.5, -0.5))
        names = domains if axes is panels[0] else [""] * len(domains)
        axes.set_yticks(range(len(domains)), names)
        axes.grid(axis="y", visible=False)
    save(figure, path)


def pareto_front(places: NDArray[Any], is_less_better: Sequence[bool]) -> NDArray[Any]:
    """Return those of the points ``(N, 2)`` that no other dominates, from left to right."""
    signed = np.where(is_less_better, places, -places)
    kept = [not ((signed <= point).all(1) & (signed < point).any(1)).any() for point in signed]
    front = places[kept]
    return front[np.argsort(front[:, 0])]


def _require(frame: pd.DataFrame, columns: Sequence[str]) -> None:
    missing = [column for column in columns if column not in frame]
    if missing:
        raise ValueError(f"figure: no column {missing[0]!r}; there are {', '.join(frame.columns)}")


def _groups(frame: pd.DataFrame, by: str) -> Iterator[tuple[Any, pd.DataFrame]]:
    """Yield each group with its name; runs without a value of ``by`` form the group ``all``."""
    if frame[by].hasnans:
        frame = frame.astype({by: object}).fillna({by: "all"})
    yield from frame.groupby(by, sort=True)


def _names(values: "pd.Series[Any]") -> str:
    return ", ".join(sorted(str(value) for value in values.unique()))


FIGURES = {
    "curves": curves,
    "lines": lines,
    "intervals": intervals,
    "forest": forest,
    "ratios": ratios,
    "heatmap": heatmap,
    "pareto": pareto,
    "regions": regions,
    "card": card,
    "best_of": best_of_n,
}
