"""The style of figures, and the elements that several of them draw: lines, intervals, legends.

Series differ in colour, line style and marker, so that they stay distinct in greyscale.
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
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from numpy.typing import NDArray

from rudolph.sequence.texts import clean_text, shorten

# Longer names are cut: a figure grows with its names, and renderers limit its size.
MAX_NAME_CHARACTERS = 200

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
# As a decorator, this context manager is entered at each call.  "default" makes figures
# independent of what a notebook has set.
styled = matplotlib.style.context(["default", STYLE])


class DrawingError(ValueError):
    """Failure to draw or write a figure; the message is one line with its path."""


@contextmanager
def protected_drawing(path: Path) -> Iterator[Path]:
    """Yield a temporary path for a figure, which is moved to ``path`` once the figure is complete.

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
        reason = shorten(" ".join(reason.split()) or type(error).__name__, MAX_NAME_CHARACTERS)
        raise DrawingError(f"{path}: cannot be drawn ({reason})") from error
    finally:
        if new.is_file():
            new.unlink()


class DrawingWarning(UserWarning):
    """Warning that a command's output lacks a figure but is otherwise complete."""


@contextmanager
def warned_drawing() -> Iterator[None]:
    """Turn a ``DrawingError`` into a warning, so that no run fails because of a figure."""
    try:
        yield
    except DrawingError as error:
        warnings.warn(str(error), DrawingWarning, stacklevel=3)


def drawable_text(text: str) -> str:
    r"""Return a text that matplotlib draws literally: cleaned, shortened, with "$" escaped.

    >>> print(drawable_text("top_k $5$"))
    top_k \$5\$
    """
    return shorten(clean_text(text), MAX_NAME_CHARACTERS).replace("$", r"\$")


def panels_of(number: int, height: float = 3.2) -> tuple[Figure, list[Axes]]:
    """Return a figure ``height`` inches high with ``number`` panels side by side."""
    width = 5.6 if number == 1 else 3.8 * number + 0.8
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, number, squeeze=False).ravel())


def draw_line(axes: Axes, x: Any, values: NDArray[Any], *, name: str, number: int) -> None:
    """Draw the mean of ``values`` (runs, points) over ``x``, with a band from min to max."""
    palette = seaborn.color_palette("colorblind")
    colour, marker = palette[number % len(palette)], MARKERS[number % len(MARKERS)]
    mean, num_runs = np.nanmean(values, axis=0), len(values)
    # Markers of different series start at different points, so that none hides another.
    marker_step = max(1, len(x) // 8)
    axes.plot(
        x,
        mean,
        color=colour,
        linestyle=LINES[number % len(LINES)],
        marker=marker,
        markersize=4,
        markevery=(number * marker_step // 3 % marker_step, marker_step),
        linewidth=1.5,
        label=name if num_runs == 1 else f"{name} ({num_runs} runs)",
    )
    if num_runs > 1:
        minimum, maximum = np.nanmin(values, axis=0), np.nanmax(values, axis=0)
        axes.fill_between(x, minimum, maximum, color=colour, alpha=0.18, linewidth=0)


def draw_interval(
    axes: Axes, record: Mapping[Any, Any], metric: str, *, row: int, height: float
) -> None:
    """Draw a value and its interval at ``height``, and its chance level and target at ``row``."""
    for kind, style in LEVEL_STYLES.items():
        level = record.get(f"{metric}_{kind}", np.nan)
        axes.plot([level, level], [row - 0.42, row + 0.42], **style)
    value = record[metric]
    low, high = record.get(f"{metric}_low", value), record.get(f"{metric}_high", value)
    axes.plot([low, value, high], [height] * 3, markevery=[1], **INTERVAL_STYLE)


def save_with_legend(figure: Figure, panels: list[Axes], path: Path, *, title: str) -> None:
    """Add a legend below the panels and save the figure."""
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, title=title)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write an ``.svg`` or ``.png`` without its date, so that drawing again gives the same bytes.

    Raises:
        DrawingError: if the figure cannot be drawn or written.
    """
    with protected_drawing(path) as new, warnings.catch_warnings():
        # Ignore warnings about letters missing in the font and names that leave no room for axes.
        warnings.filterwarnings("ignore", message="Glyph |constrained_layout not applied")
        figure.set_dpi(120)
        # ``savefig`` would draw the figure a first time for its layout; one drawing includes it.
        if path.suffix == ".svg":
            FigureCanvasSVG(figure).print_svg(  # type: ignore[no-untyped-call]
                new, metadata={"Date": None}
            )
        else:
            FigureCanvasAgg(figure).print_png(  # type: ignore[no-untyped-call]
                new, metadata={"Software": None}
            )
