"""How figures look, and what all of them draw: lines with bands, intervals, legends.

Series differ in colour, line and marker, so that they are told apart in grey too.
"""

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
import seaborn
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from rudolph.sequence.texts import clean_text, shorten

# Longer names are cut: a figure grows with its names, and no renderer takes any size.
LONGEST_NAME = 200

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


class DrawingError(ValueError):
    """A figure that matplotlib or Pillow could not draw or write; one line with its path."""


@contextmanager
def protected_drawing(path: Path) -> Iterator[Path]:
    """Yield where to write a figure; it takes its place at ``path`` when it is whole.

    Raises:
        DrawingError: for what matplotlib, Pillow and the file system raise inside.
    """
    new = path.with_name(f".{path.stem[:100]}.{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield new
        os.replace(new, path)
    except (ValueError, RuntimeError, OverflowError, MemoryError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        reason = shorten(" ".join(reason.split()) or type(error).__name__, LONGEST_NAME)
        raise DrawingError(f"{path}: cannot be drawn ({reason})") from error
    finally:
        if new.is_file():
            new.unlink()


class DrawingWarning(UserWarning):
    """A figure is missing from what a command leaves; all else is there."""


@contextmanager
def warned_drawing() -> Iterator[None]:
    """Turn a ``DrawingError`` into a warning: no run fails for a figure of it."""
    try:
        yield
    except DrawingError as error:
        warnings.warn(str(error), DrawingWarning, stacklevel=3)


def drawable_text(text: str) -> str:
    r"""Return a text that matplotlib draws as it stands: cleaned, not too long, "$" no formula.

    >>> print(drawable_text("top_k $5$"))
    top_k \$5\$
    """
    return shorten(clean_text(text), LONGEST_NAME).replace("$", r"\$")


def panels_of(number: int, height: float = 3.2) -> tuple[Figure, list[Axes]]:
    """A figure with so many panels side by side, ``height`` inches high."""
    width = 5.6 if number == 1 else 3.8 * number + 0.8
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, number, squeeze=False).ravel())


def line(axes: Axes, x: Any, values: NDArray[Any], *, name: str, number: int) -> None:
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


def interval(
    axes: Axes, record: Mapping[Any, Any], metric: str, *, row: int, height: float
) -> None:
    for kind, style in LEVEL_STYLES.items():
        level = record.get(f"{metric}_{kind}", np.nan)
        axes.plot([level, level], [row - 0.42, row + 0.42], **style)
    value = record[metric]
    low, high = record.get(f"{metric}_low", value), record.get(f"{metric}_high", value)
    axes.plot([low, value, high], [height] * 3, markevery=[1], **INTERVAL_STYLE)


def finish(figure: Figure, panels: list[Axes], path: Path, *, title: str) -> None:
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, title=title)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write ``.svg`` or ``.png`` without date, so that a second drawing is equal in every byte.

    Raises:
        DrawingError: for what cannot be drawn or written.
    """
    metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    with protected_drawing(path) as new, warnings.catch_warnings():
        # Of letters that the font lacks, and of names that leave no room for the axes.
        warnings.filterwarnings("ignore", message="Glyph |constrained_layout not applied")
        figure.savefig(new, dpi=120, metadata=metadata)
