"""Figures of a report, drawn from CSV files alone, with the same bytes every time.

``FIGURES`` lists the kinds.  Each takes ``(frame, path, *, y, x, group_column)``: a table, the
file to write, the metrics, the column along the axis, and the column of the variants.

To add a kind, write it with these arguments, decorate it with ``report_figure`` and add it to
``FIGURES``.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import seaborn
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from rudolph.evaluation.statistics import mean_over_seeds
from rudolph.reports.claims import LESS_IS_BETTER, SIGNIFICANCE_LEVEL, natural_order
from rudolph.reports.style import (
    INTERVAL_STYLE,
    LEVEL_STYLES,
    MARKERS,
    draw_interval,
    draw_line,
    drawable_text,
    panels_of,
    save,
    save_with_legend,
    styled,
)

# The axis of a numeric column is logarithmic if its maximum is this many times its minimum.
LOG_AXIS_RATIO = 20
# Characters of a metric's name that fit, with its direction, along the axis of one panel.
MAX_LABEL_LENGTH = 40

Draw = Callable[..., None]


def report_figure(draw: Draw) -> Draw:
    """Decorate a function that draws a figure: use the common style and escape names."""

    @styled
    @wraps(draw)
    def wrapper(
        frame: pd.DataFrame, path: Path, *, y: Sequence[str], x: str, group_column: str
    ) -> None:
        metrics = [drawable_text(metric) for metric in y]
        draw(
            _with_drawn_texts(frame),
            path,
            y=metrics,
            x=drawable_text(x),
            group_column=drawable_text(group_column),
        )

    return wrapper


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
def curves(
    frame: pd.DataFrame, path: Path, *, y: Sequence[str], x: str, group_column: str
) -> None:
    """Draw metrics along training: the mean over a variant's runs, and the range from min to max.

    ``frame`` has one row per point, with the columns ``run, metric, step, value`` and
    ``group_column``; ``x`` is ``step``.  Runs are averaged over the steps that all of them cover,
    with linear interpolation.
    """
    _require(frame, [x, group_column, "run", "metric", "value"])
    figure, panels = panels_of(len(y))
    for axes, metric in zip(panels, y, strict=True):
        points = frame[frame["metric"] == metric]
        if points.empty:
            raise ValueError(
                f"figure: expected a curve of {_names(frame['metric'])}, got {metric!r}"
            )
        for index, (name, group) in enumerate(_groups(points, group_column)):
            runs = [run.sort_values(x) for _, run in group.groupby("run", sort=True)]
            first, last = max(r[x].iloc[0] for r in runs), min(r[x].iloc[-1] for r in runs)
            steps = np.unique(np.concatenate([r[x].to_numpy() for r in runs]))
            steps = steps[(steps >= first) & (steps <= last)]
            values = np.stack([np.interp(steps, r[x], r["value"]) for r in runs])
            draw_line(axes, steps, values, name=str(name), number=index)
        axes.set(xlabel=x, ylabel=metric)
    save_with_legend(figure, panels, path, title=group_column)


@report_figure
def lines(frame: pd.DataFrame, path: Path, *, y: Sequence[str], x: str, group_column: str) -> None:
    """Draw metrics of finished runs against a numeric column; the band is the range over seeds.

    ``frame`` has one row per run; ``x`` is the numeric column, such as ``sampling.top_k``.
    """
    _require(frame, [x, group_column, *y])
    figure, panels = panels_of(len(y))
    for axes, metric in zip(panels, y, strict=True):
        for index, (name, group) in enumerate(_groups(frame, group_column)):
            values_by_x = [runs[metric].dropna() for _, runs in group.groupby(x, sort=True)]
            # Values of x may have different numbers of runs; NaN counts in neither mean nor range.
            values = np.full((max(map(len, values_by_x)), len(values_by_x)), np.nan)
            for column, runs in enumerate(values_by_x):
                values[: len(runs), column] = runs
            draw_line(axes, np.sort(group[x].unique()), values, name=str(name), number=index)
        if frame[x].min() > 0 and frame[x].max() >= LOG_AXIS_RATIO * frame[x].min():
            ticks = sorted(frame[x].unique())
            axes.set_xscale("log")
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.minorticks_off()
        axes.set(xlabel=x, ylabel=metric)
    save_with_legend(figure, panels, path, title=group_column)


@report_figure
def intervals(
    frame: pd.DataFrame, path: Path, *, y: Sequence[str], x: str, group_column: str
) -> None:
    """Draw a forest plot: each run's value with its interval, one row per variant.

    ``frame`` has one row per run.  The interval of metric ``m`` is in ``m_low`` and ``m_high``,
    its chance level in ``m_chance`` and its target in ``m_target``, where they exist.  Chance
    levels are dotted.  ``x`` is the column whose values stand side by side in a row, such as
    ``seed``.
    """
    _require(frame, [x, group_column, *y])
    rows, x_values = sorted(frame[group_column].unique()), sorted(frame[x].unique())
    figure, panels = panels_of(len(y), height=0.9 + len(rows) * (0.32 + 0.1 * len(x_values)))
    for axes, metric in zip(panels, y, strict=True):
        for record in frame.sort_values([group_column, x]).to_dict("records"):
            row, number = rows.index(record[group_column]), x_values.index(record[x])
            offset = (number - (len(x_values) - 1) / 2) * 0.7 / len(x_values)
            draw_interval(axes, record, metric, row=row, height=row + offset)
        axes.set(xlabel=metric, ylim=(len(rows) - 0.4, -0.6))
        axes.locator_params(axis="x", nbins=5)
        tick_labels = [str(row) if axes is panels[0] else "" for row in rows]
        axes.set_yticks(range(len(rows)), tick_labels)
        axes.grid(axis="y", visible=False)
    order = f", down: {x} {', '.join(map(str, x_values))}" if len(x_values) > 1 else ""
    legend_entries = {f"value and interval{order}": Line2D([], [], **INTERVAL_STYLE)}
    for level, style in LEVEL_STYLES.items():
        if any(f"{metric}_{level}" in frame for metric in y):
            legend_entries[level] = Line2D([], [], **style)
    figure.legend(
        list(legend_entries.values()),
        list(legend_entries),
        loc="outside lower center",
        ncols=3,
        frameon=False,
    )
    save(figure, path)


@report_figure
def forest(
    frame: pd.DataFrame, path: Path, *, y: Sequence[str], x: str, group_column: str
) -> None:
    """Draw differences between groups of runs with intervals; right of 0 is better.

    A filled marker is a significant difference after Holm's correction.  A solid line is the
    least difference that a claim states.  ``frame`` has one row per comparison, see
    ``claims.Effect``; ``x`` is ``metric`` and ``group_column`` is ``group``.
    """
    _require(frame, [x, group_column, "than", "value", "low", "high", "p_value", "at_least"])
    rows = max(int((frame[x] == metric).sum()) for metric in y)
    # A common baseline is named below the axis, different baselines in a second line of each row.
    has_one_baseline = frame["than"].nunique() == 1
    lines_per_row = 1 if has_one_baseline else 2
    figure, panels = panels_of(len(y), height=1.25 + (0.15 + 0.15 * lines_per_row) * rows)
    longest = max(map(len, frame[group_column])) + 5 * (not has_one_baseline)
    figure.set_figwidth(figure.get_figwidth() + 0.08 * len(y) * max(0, longest - 16))
    for axes, metric in zip(panels, y, strict=True):
        rows_of_metric = frame[frame[x] == metric]
        rows_of_metric = rows_of_metric.sort_values(
            [group_column, "than"], key=lambda names: names.map(natural_order)
        )
        records = rows_of_metric.to_dict("records")
        for row, record in enumerate(records):
            ends = [record["low"], record["value"], record["high"]]
            style = INTERVAL_STYLE | {
                "fillstyle": "full" if record["p_value"] <= SIGNIFICANCE_LEVEL else "none"
            }
            axes.plot(ends, [row] * 3, markevery=[1], **style)
            if record["at_least"]:
                axes.plot(
                    [record["at_least"]] * 2, [row - 0.4, row + 0.4], **LEVEL_STYLES["target"]
                )
        axes.axvline(0, **LEVEL_STYLES["chance"])
        baseline = f" to {frame['than'].iloc[0]}" if has_one_baseline else ""
        difference = f"difference{baseline} (95 % CI)"
        axes.set(xlabel=f"{metric}\n{difference}\nright is better", ylim=(rows - 0.4, -0.6))
        axes.locator_params(axis="x", nbins=5)
        tick_labels = [
            item[group_column] if has_one_baseline else f"{item[group_column]}\nvs. {item['than']}"
            for item in records
        ]
        axes.set_yticks(range(len(records)), tick_labels)
        axes.grid(axis="y", visible=False)
    save(figure, path)


@report_figure
def ratios(
    frame: pd.DataFrame, path: Path, *, y: Sequence[str], x: str, group_column: str
) -> None:
    """Draw intervals of metrics with the same unit on one axis, one row per variant and metric.

    The label of the axis is the end of the metric names, from the last ``/`` on.  For speedups, a
    dotted line marks 1, the reference.
    """
    _require(frame, [x, group_column, *y])
    records = frame.sort_values([group_column, x]).to_dict("records")
    rows = [(item, metric) for item in records for metric in y if item[metric] == item[metric]]
    figure = Figure(figsize=(7.2, 0.9 + 0.26 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for row, (record, metric) in enumerate(rows):
        draw_interval(axes, record, metric, row=row, height=row)
    units = {metric.rpartition("/")[2] for metric in y}
    if units == {"speedup"}:
        axes.axvline(1, **LEVEL_STYLES["chance"])
    axes.set(xlabel=", ".join(sorted(units)), ylim=(len(rows) - 0.4, -0.6))
    axes.set_xlim(left=0)
    x_label = f", {x} {{}}" if frame[x].nunique() > 1 else ""
    tick_labels = [
        f"{item[group_column]}: {metric}{x_label.format(item[x])}" for item, metric in rows
    ]
    axes.set_yticks(range(len(rows)), tick_labels)
    axes.grid(axis="y", visible=False)
    save(figure, path)


@report_figure
def card(frame: pd.DataFrame, path: Path, *, y: Sequence[str], x: str, group_column: str) -> None:
    """Draw a report card: one row per requested score, on an axis from 0 to 1.

    ``frame`` has one row per score of a run: its name in column ``x``, and ``value``, ``low``,
    ``high`` and ``chance``, which may be missing.  ``y`` names the scores from the top down;
    ``group_column`` distinguishes runs.
    """
    _require(frame, [x, group_column, "value", "low", "high", "chance"])
    selected = frame[frame[x].isin(y)].assign(rank=lambda rows: rows[x].map(list(y).index))
    records = selected.sort_values(["rank", group_column]).to_dict("records")
    figure = Figure(figsize=(7.2, 0.9 + 0.26 * len(records)), layout="constrained")
    axes = figure.subplots()
    has_one_run = frame[group_column].nunique() == 1
    for row, record in enumerate(records):
        bounds = {f"value_{bound}": record[bound] for bound in ("low", "high", "chance")}
        draw_interval(axes, record | bounds, "value", row=row, height=row)
    axes.set(xlabel="score, 95 % interval; dotted: chance", ylim=(len(records) - 0.4, -0.6))
    axes.set_xlim(-0.02, 1.02)
    tick_labels = [
        item[x] if has_one_run else f"{item[x]}: {item[group_column]}" for item in records
    ]
    axes.set_yticks(range(len(records)), tick_labels)
    axes.grid(axis="y", visible=False)
    save(figure, path)


@report_figure
def best_of_n(
    frame: pd.DataFrame, path: Path, *, y: Sequence[str], x: str, group_column: str
) -> None:
    """Draw best of N: per ranking, a curve of scores ``y/best_of_N/split`` with their intervals.

    ``frame`` is a report card of one split, see ``card``.  ``y`` names the rankings;
    ``group_column`` distinguishes runs.
    """
    patterns = {ranking: rf"^{re.escape(ranking)}/best_of_(\d+)/" for ranking in y}
    scale = {"value": "log", "base": 2}
    figure, axes = _number_curves(frame, patterns, x=x, group_column=group_column, scale=scale)
    axes.set_xlabel("candidate images")
    save_with_legend(figure, [axes], path, title="ranked by")


@report_figure
def shots(frame: pd.DataFrame, path: Path, *, y: Sequence[str], x: str, group_column: str) -> None:
    """Draw few-shot accuracy over shots as a curve with its interval, and the chance level.

    ``frame`` is a report card, see ``card``.  ``y`` names scores with ``*`` for the number of
    shots; ``group_column`` distinguishes runs.
    """
    patterns = {name: f"^{re.escape(name)}$".replace(re.escape("*"), r"(\d+)") for name in y}
    # Linear up to 1, so that 0 shots have a place.
    scale = {"value": "symlog", "base": 2, "linthresh": 1}
    figure, axes = _number_curves(frame, patterns, x=x, group_column=group_column, scale=scale)
    numbered = frame.assign(N=frame[x].str.extract("|".join(patterns.values())).bfill(axis=1)[0])
    numbered = numbered.dropna(subset=["N", "chance"]).astype({"N": int})
    chances = numbered.groupby("N")["chance"]
    for level in (chances.min(), chances.max()):
        axes.plot(level.index, level, color="grey", linestyle=":", linewidth=1)
    axes.set(xlabel="shots", ylim=(0, 1.02))
    save_with_legend(figure, [axes], path, title="dotted: chance")


def _number_curves(
    frame: pd.DataFrame,
    patterns: Mapping[str, str],
    *,
    x: str,
    group_column: str,
    scale: Mapping[str, Any],
) -> tuple[Figure, Axes]:
    """Draw scores over the number in their names; return the figure and its axes.

    ``patterns`` has one regular expression per curve; its group matches the number.  ``scale`` has
    the arguments of ``set_xscale``.
    """
    _require(frame, [x, group_column, "value", "low", "high"])
    figure, [axes] = panels_of(1)
    palette, has_one_run = seaborn.color_palette("colorblind"), frame[group_column].nunique() == 1
    numbers: set[int] = set()
    for label, pattern in patterns.items():
        matched = frame[x].str.extract(pattern, expand=False)
        points = frame.assign(N=matched)[matched.notna()].astype({"N": int})
        if points.empty:
            raise ValueError(
                f"figure: expected scores of {label} by number, got only {_names(frame[x])}"
            )
        for run, run_points in points.sort_values("N").groupby(group_column, sort=True):
            label_of_run = str(run) if len(patterns) == 1 else f"{label}: {run}"
            index, name = len(axes.lines), label if has_one_run else label_of_run
            axes.fill_between(
                run_points["N"],
                run_points["low"],
                run_points["high"],
                color=palette[index % len(palette)],
                alpha=0.13,
            )
            draw_line(
                axes,
                run_points["N"].to_numpy(),
                run_points[["value"]].to_numpy().T,
                name=name,
                number=index,
            )
            numbers |= set(run_points["N"])
    # A scale sets ticks of its own, so it comes first.
    axes.set_xscale(**scale)
    axes.set_xticks(sorted(numbers), [str(number) for number in sorted(numbers)])
    axes.set_ylabel("score, 95 % interval")
    if len(patterns) == 1:
        axes.set_title(next(iter(patterns)))
    return figure, axes


@report_figure
def heatmap(
    frame: pd.DataFrame, path: Path, *, y: Sequence[str], x: str, group_column: str
) -> None:
    """Draw metrics over two columns of the grid; a cell is the mean over all other columns.

    Cells with several runs also show the half width of the 95 % interval.
    """
    _require(frame, [x, group_column, *y])
    rows = frame[group_column].nunique()
    figure, panels = panels_of(len(y), height=1.0 + 0.45 * rows)
    for axes, metric in zip(panels, y, strict=True):
        table = frame.pivot_table(index=group_column, columns=x, values=metric, aggfunc="mean")
        annotations = frame.pivot_table(
            index=group_column, columns=x, values=metric, aggfunc=_cell_text
        )
        seaborn.heatmap(
            table, ax=axes, cmap="cividis", annot=annotations, fmt="", cbar=False, linewidths=0.5
        )
        axes.set(title=metric, xlabel=x, ylabel=group_column)
        axes.tick_params(length=0, rotation=0)
    save(figure, path)


def _cell_text(values: "pd.Series[float]") -> str:
    """Format a cell as ``0.72``; for several runs, add ``± 0.03`` below."""
    mean = f"{values.mean():.3g}"
    if len(values) < 2:
        return mean
    interval = mean_over_seeds(values.to_numpy())
    return f"{mean}\n± {(interval.high - interval.low) / 2:.1g}"


@report_figure
def pareto(
    frame: pd.DataFrame, path: Path, *, y: Sequence[str], x: str, group_column: str
) -> None:
    """Draw two metrics against each other: the mean of each group of runs with 95 % intervals.

    A line joins the groups on the Pareto front.  ``frame`` has one row per run; ``group_column``
    distinguishes groups, whose runs differ in ``x``.  ``y`` is the horizontal metric, then the
    vertical one.
    """
    _require(frame, [x, group_column, *y])
    if len(y) != 2:
        raise ValueError(f"figure: expected two metrics for pareto, got {len(y)}")
    figure, [axes] = panels_of(1, height=4.2)
    palette, means = seaborn.color_palette("colorblind"), []
    for number, (name, group) in enumerate(_groups(frame, group_column)):
        estimates = [mean_over_seeds(group[metric].dropna().to_numpy()) for metric in y]
        error_bars = [
            [[estimate.value - estimate.low], [estimate.high - estimate.value]]
            for estimate in estimates
        ]
        axes.errorbar(
            estimates[0].value,
            estimates[1].value,
            xerr=error_bars[0],
            yerr=error_bars[1],
            marker=MARKERS[number % len(MARKERS)],
            markersize=6,
            linestyle="none",
            linewidth=1.2,
            color=palette[number % len(palette)],
            label=str(name),
        )
        means.append([estimate.value for estimate in estimates])
    front = pareto_front(np.array(means), [bool(LESS_IS_BETTER.search(metric)) for metric in y])
    axes.plot(*front.T, color="0.5", linewidth=1, linestyle=":", zorder=0)
    better_directions = ["left" if LESS_IS_BETTER.search(y[0]) else "right"]
    better_directions.append("down" if LESS_IS_BETTER.search(y[1]) else "up")
    separator = "\n" if len(y[1]) > MAX_LABEL_LENGTH else " "
    axes.set(
        xlabel=f"{y[0]} (better: {better_directions[0]})",
        ylabel=f"{y[1]}{separator}(better: {better_directions[1]})",
    )
    save_with_legend(figure, [axes], path, title=group_column)


@report_figure
def regions(
    frame: pd.DataFrame, path: Path, *, y: Sequence[str], x: str, group_column: str
) -> None:
    """Draw the range that a search found for each setting and domain, on the setting's axis.

    ``frame`` is ``regions.csv``, whose column ``x`` names settings and whose column
    ``group_column`` names domains.  ``y`` lists the settings, one panel each.
    """
    _require(frame, [x, group_column, "low", "high", "least", "greatest", "log"])
    domains = list(dict.fromkeys(frame[group_column].sort_values()))
    figure, panels = panels_of(len(y), height=1.1 + 0.32 * len(domains))
    palette = seaborn.color_palette("colorblind")
    for axes, setting in zip(panels, y, strict=True):
        rows_of_setting = frame[frame[x] == setting].set_index(group_column)
        for row, domain in enumerate(domains):
            bounds = [rows_of_setting["low"][domain], rows_of_setting["high"][domain]]
            colour = palette[row % len(palette)]
            axes.plot(bounds, [row] * 2, color=colour, linewidth=6, solid_capstyle="butt")
            axes.plot(bounds, [row] * 2, linestyle="none", marker="|", markersize=12, color="0.2")
        minimum, maximum = rows_of_setting["least"].iloc[0], rows_of_setting["greatest"].iloc[0]
        ticks = np.linspace(minimum, maximum, 4)
        if rows_of_setting["log"].iloc[0]:
            axes.set_xscale("log")
            ticks = np.geomspace(minimum, maximum, 4)
        axes.set_xlim(minimum, maximum)
        axes.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
        axes.minorticks_off()
        axes.set(xlabel=setting, ylim=(len(domains) - 0.5, -0.5))
        tick_labels = domains if axes is panels[0] else [""] * len(domains)
        axes.set_yticks(range(len(domains)), tick_labels)
        axes.grid(axis="y", visible=False)
    save(figure, path)


def pareto_front(points: NDArray[Any], is_less_better: Sequence[bool]) -> NDArray[Any]:
    """Return the points out of ``(N, 2)`` that no other point dominates, from left to right."""
    signed = np.where(is_less_better, points, -points)
    is_on_front = [
        not ((signed <= point).all(1) & (signed < point).any(1)).any() for point in signed
    ]
    front = points[is_on_front]
    return front[np.argsort(front[:, 0])]


def _require(frame: pd.DataFrame, columns: Sequence[str]) -> None:
    missing = [column for column in columns if column not in frame]
    if missing:
        raise ValueError(
            f"figure: expected a column of {', '.join(frame.columns)}, got {missing[0]!r}"
        )


def _groups(frame: pd.DataFrame, group_column: str) -> Iterator[tuple[Any, pd.DataFrame]]:
    """Yield each group with its name; runs without a group form the group ``all``."""
    if frame[group_column].hasnans:
        frame = frame.astype({group_column: object}).fillna({group_column: "all"})
    yield from frame.groupby(group_column, sort=True)


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
    "shots": shots,
}
