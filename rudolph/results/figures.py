"""Figures and pictures: numbers in, one file out, the same bytes every time.

The figures of a report are drawn from CSV files alone; ``FIGURES`` names them.  Each takes
``(frame, path, *, y, x, by)``: the metrics, the column along the axis, the column that tells the
variants apart.  To add one, write it with these arguments and name it in ``FIGURES``.
Series differ in colour, line and marker, so that they are told apart in grey too.

Shapes: T is the length of the sequence, H and W are the sides of a picture.
"""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.style
import numpy as np
import pandas as pd
import seaborn
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Picture = NDArray[np.uint8]

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
_styled = matplotlib.style.context(["default", STYLE])
SMALLEST_CELL = 128  # pixels


@_styled
def curves(frame: pd.DataFrame, path: Path, *, y: Sequence[str], x: str, by: str) -> None:
    """Metrics along training: the mean of a variant's runs, and from the least to the greatest.

    Args:
        frame: one row a point: ``run, metric, step, value`` and the column ``by``.
        x: ``step``.

    Seeds are compared where all of them have points, between which they are straight.
    """
    _require(frame, [x, by, "run", "metric", "value"])
    figure, panels = _panels(len(y))
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


@_styled
def lines(frame: pd.DataFrame, path: Path, *, y: Sequence[str], x: str, by: str) -> None:
    """Metrics of finished runs against a number of the grid; the spread is over the seeds.

    Args:
        frame: one row a run.
        x: a numeric column, such as ``sampling.top_k``.
    """
    _require(frame, [x, by, *y])
    figure, panels = _panels(len(y))
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


@_styled
def intervals(frame: pd.DataFrame, path: Path, *, y: Sequence[str], x: str, by: str) -> None:
    """A forest plot: each run's value with its interval, variants in rows, chance level dotted.

    Args:
        frame: one row a run; the interval of ``m`` is in ``m_low`` and ``m_high``, its chance
            level in ``m_chance`` and a value to reach in ``m_target``, where there are such.
        x: the column whose values stand side by side in a row, such as ``seed``.
    """
    _require(frame, [x, by, *y])
    rows, beside = sorted(frame[by].unique()), sorted(frame[x].unique())
    figure, panels = _panels(len(y), height=0.9 + len(rows) * (0.32 + 0.1 * len(beside)))
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
    _save(figure, path)


@_styled
def ratios(frame: pd.DataFrame, path: Path, *, y: Sequence[str], x: str, by: str) -> None:
    """Intervals of metrics of one unit on one axis, a row for each variant and metric; 1 dotted.

    The axis is called what the metrics have in common after their last ``/``.
    """
    _require(frame, [x, by, *y])
    records = frame.sort_values([by, x]).to_dict("records")
    rows = [(each, metric) for each in records for metric in y if each[metric] == each[metric]]
    figure = Figure(figsize=(7.2, 0.9 + 0.26 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for row, (record, metric) in enumerate(rows):
        _interval(axes, record, metric, row=row, height=row)
    axes.axvline(1, **LEVEL_STYLES["chance"])
    units = {metric.rpartition("/")[2] for metric in y}
    axes.set(xlabel=", ".join(sorted(units)), ylim=(len(rows) - 0.4, -0.6))
    axes.set_xlim(left=0)
    beside = f", {x} {{}}" if frame[x].nunique() > 1 else ""
    names = [f"{each[by]}: {metric}{beside.format(each[x])}" for each, metric in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.grid(axis="y", visible=False)
    _save(figure, path)


@_styled
def heatmap(frame: pd.DataFrame, path: Path, *, y: Sequence[str], x: str, by: str) -> None:
    """Metrics over two columns of the grid: the mean over the other ones, written in the cell."""
    _require(frame, [x, by, *y])
    figure, panels = _panels(len(y))
    for axes, metric in zip(panels, y, strict=True):
        table = frame.pivot_table(index=by, columns=x, values=metric, aggfunc="mean")
        seaborn.heatmap(
            table, ax=axes, cmap="cividis", annot=True, fmt=".3g", cbar=False, linewidths=0.5
        )
        axes.set(title=metric, xlabel=x, ylabel=by)
        axes.tick_params(length=0, rotation=0)
    _save(figure, path)


@_styled
def mask_picture(
    masks: Mapping[str, NDArray[np.bool_]], path: Path, *, segments: tuple[int, int, int]
) -> None:
    """Attention masks side by side, with the borders between left text, image and right text.

    Args:
        masks: name -> ``(T, T)``, true where the query (row) sees the key (column).
        segments: lengths of left text, image and right text; they add up to T.
    """
    num_rows = -(-len(masks) // 4)
    num_columns = -(-len(masks) // num_rows)
    # No narrower than the legend.
    size = max(2.6 * num_columns, 3.9), 2.75 * num_rows + 0.5
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    for axes in panels[len(masks) :]:
        axes.set_axis_off()
    for axes, (name, mask) in zip(panels, masks.items(), strict=False):
        if mask.shape != (sum(segments), sum(segments)):
            raise ValueError(f"mask {name}: {mask.shape} is not what segments {segments} need")
        _mask(axes, mask, segments)
        axes.set_title(f"{name}: {mask.mean():.1%} of pairs")
    figure.supxlabel("key (seen)", fontsize=9)
    figure.supylabel("query (sees)", fontsize=9)
    patches = [Patch(facecolor=c, edgecolor="0.4") for c in MASK_COLOURS.values()]
    names = list(MASK_COLOURS)
    figure.legend(patches, names, loc="outside upper center", ncols=3, frameon=False)
    _save(figure, path)


def sample_grid(
    images: Sequence[Picture], captions: Sequence[str], path: Path, *, columns: int
) -> None:
    """Pictures in rows with their captions below, enlarged by a whole number to keep pixels.

    Args:
        images: ``(H, W, 3)`` uint8, all of one size; captions: one a picture, wrapped.
    """
    if not images or len(captions) != len(images) or len({image.shape for image in images}) > 1:
        raise ValueError(
            f"sample_grid: {len(images)} pictures of shapes "
            f"{sorted({image.shape for image in images})} and {len(captions)} captions; "
            "pictures must be of one shape, each with its caption"
        )
    scale = -(-SMALLEST_CELL // min(images[0].shape[:2]))
    height, width = (side * scale for side in images[0].shape[:2])
    font = _font(12)
    wrapped = [_wrap(caption, font, width) for caption in captions]
    line_height, gap = 16, 8
    text_height = line_height * max(len(text) for text in wrapped)
    columns = min(columns, len(images))
    num_rows = -(-len(images) // columns)
    cell_height = height + text_height + 2 * gap
    sheet = Image.new(
        "RGB", (columns * (width + gap) + gap, num_rows * cell_height + gap), "white"
    )
    pen = ImageDraw.Draw(sheet)
    for number, (image, text) in enumerate(zip(images, wrapped, strict=True)):
        row, column = divmod(number, columns)
        left, top = gap + column * (width + gap), gap + row * cell_height
        sheet.paste(
            Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST), (left, top)
        )
        for line, words in enumerate(text):
            pen.text((left, top + height + 3 + line * line_height), words, "black", font)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, "PNG")


def reconstructions(originals: Sequence[Picture], decoded: Sequence[Picture], path: Path) -> None:
    """Three rows: originals, what the tokenizer made of them, and the difference, white for none.

    Args:
        originals, decoded: ``(H, W, 3)`` uint8, equally many and of one size.
    """
    pairs = list(zip(originals, decoded, strict=True))
    errors = [np.abs(a.astype(np.int16) - b.astype(np.int16)) for a, b in pairs]
    differences = [255 - np.minimum(4 * error, 255).astype(np.uint8) for error in errors]
    captions = ["original"] * len(pairs) + ["decoded"] * len(pairs)
    captions += [f"4 x difference ({error.mean():.1f} of 255)" for error in errors]
    images = [*originals, *decoded, *differences]
    sample_grid(images, captions, path, columns=len(pairs))


@_styled
def codebook_usage(counts: NDArray[np.int64], path: Path) -> None:
    """How often each code was used, most used first, beside an even use.

    Args:
        counts: ``(K,)`` uses of each of the K codes; the title gives used codes and perplexity.
    """
    total = counts.sum()
    if total == 0:
        raise ValueError("codebook_usage: no code was used")
    shares = np.sort(counts)[::-1] / total
    used = shares[shares > 0]
    perplexity = float(np.exp(-(used * np.log(used)).sum()))
    colour = seaborn.color_palette("colorblind")[0]
    figure, (axes,) = _panels(1)
    axes.fill_between(np.arange(len(used)) + 1, used, color=colour, alpha=0.35, step="mid")
    axes.step(np.arange(len(used)) + 1, used, color=colour, where="mid", label="use")
    axes.axhline(1 / len(counts), color="0.3", linestyle=":", label="all codes alike")
    axes.set(xlabel="code, most used first", ylabel="share of all tokens", yscale="log")
    axes.set_xlim(0.5, len(counts) + 0.5)
    share = len(used) / len(counts)
    axes.set_title(
        f"{len(used)} of {len(counts)} codes used ({share:.0%}), perplexity {perplexity:.1f}"
    )
    axes.legend(frameon=False)
    _save(figure, path)


MASK_COLOURS = {"seen": "#1f3b6f", "hidden, though earlier": "#f3e3b3", "later": "#ffffff"}


def _mask(axes: Axes, mask: NDArray[np.bool_], segments: tuple[int, int, int]) -> None:
    later = np.triu(np.ones_like(mask), k=1)
    codes = np.where(mask, 0, np.where(later, 2, 1))
    axes.imshow(codes, cmap=ListedColormap(list(MASK_COLOURS.values())), vmin=0, vmax=2)
    borders = np.cumsum([0, *segments]) - 0.5
    for border in borders[1:-1]:
        axes.axhline(border, color="#c1272d", linewidth=0.9)
        axes.axvline(border, color="#c1272d", linewidth=0.9)
    present = [number for number in range(3) if segments[number] > 0]
    middles = [(borders[number] + borders[number + 1]) / 2 for number in present]
    names = [("left", "image", "right")[number] for number in present]
    axes.set_xticks(middles, names)
    axes.set_yticks(middles, names, rotation=90, va="center")
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(True)


def _panels(number: int, height: float = 3.2) -> tuple[Figure, list[Axes]]:
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
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
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


def _font(size: int) -> ImageFont.FreeTypeFont:
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(folder / "DejaVuSans.ttf", size)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines no wider than ``width`` pixels; a word that is too long is broken."""
    most = len(text)
    while True:
        found = textwrap.wrap(text, max(1, most)) or [""]
        if most <= 1 or max(font.getlength(line) for line in found) <= width:
            return found
        most -= 1


FIGURES = {
    "curves": curves,
    "lines": lines,
    "intervals": intervals,
    "ratios": ratios,
    "heatmap": heatmap,
}
