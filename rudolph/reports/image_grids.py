"""Images made from arrays: attention masks, sample grids, reconstructions, codebook usage.

Equal arrays give files that are equal in every byte.

Shapes: T is the length of the sequence, H and W are the sides of an image.
"""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import seaborn
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from rudolph.reports.sample_sheets import GAP, LINE_HEIGHT
from rudolph.reports.style import panels_of, protected_drawing, save, styled
from rudolph.sequence.texts import clean_text, shorten

ImageArray = NDArray[np.uint8]

MIN_CELL_PIXELS = 128  # pixels
MAX_CAPTION_CHARACTERS = 400  # characters


@styled
def draw_masks_image(
    masks: Mapping[str, NDArray[np.bool_]], path: Path, *, segments: tuple[int, int, int]
) -> None:
    """Draw attention masks side by side, with borders between left text, image and right text.

    Args:
        masks: masks ``(T, T)``, keyed by name, true where the query (row) attends to the key
            (column).
        path: the file to write.
        segments: lengths of left text, image and right text, which add up to T.

    Raises:
        ValueError: if a mask has another size.
        DrawingError: if the figure cannot be drawn or written.
    """
    num_rows = -(-len(masks) // 4)
    num_columns = -(-len(masks) // num_rows)
    # At least as wide as the legend.
    size = max(2.6 * num_columns, 3.9), 2.75 * num_rows + 0.5
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    for axes in panels[len(masks) :]:
        axes.set_axis_off()
    for axes, (name, mask) in zip(panels, masks.items(), strict=False):
        if mask.shape != (sum(segments), sum(segments)):
            raise ValueError(
                f"mask {name}: expected a square of the sum of segments {segments}, got "
                f"{mask.shape}"
            )
        _mask(axes, mask, segments)
        axes.set_title(f"{name}: {mask.mean():.1%} of pairs")
    figure.supxlabel("key", fontsize=9)
    figure.supylabel("query", fontsize=9)
    patches = [Patch(facecolor=colour, edgecolor="0.4") for colour in MASK_COLOURS.values()]
    names = list(MASK_COLOURS)
    figure.legend(patches, names, loc="outside upper center", ncols=3, frameon=False)
    save(figure, path)


def sample_grid(
    images: Sequence[ImageArray], captions: Sequence[str], path: Path, *, columns: int
) -> None:
    """Write images in rows with captions below, enlarged by a whole factor to keep pixels sharp.

    Args:
        images: ``(H, W, 3)`` uint8, all of one size.
        captions: one per image; they are cleaned, wrapped, and cut if they are very long.
        path: the PNG file to write.
        columns: number of images per row.

    Raises:
        ValueError: if images and captions do not match, or images differ in size.
        DrawingError: if the grid cannot be drawn or written.
    """
    if not images or len(captions) != len(images) or len({image.shape for image in images}) > 1:
        raise ValueError(
            f"sample_grid: expected images of one shape, each with its caption, got "
            f"{len(images)} images of shapes {sorted({image.shape for image in images})} "
            f"and {len(captions)} captions"
        )
    with protected_drawing(path) as new:
        _sheet(images, captions, columns=columns).save(new, "PNG")


def _sheet(images: Sequence[ImageArray], captions: Sequence[str], *, columns: int) -> Image.Image:
    scale = -(-MIN_CELL_PIXELS // min(images[0].shape[:2]))
    height, width = (side * scale for side in images[0].shape[:2])
    font = _font(12)
    lines = {caption: _wrap(caption, font, width) for caption in dict.fromkeys(captions)}
    wrapped = [lines[caption] for caption in captions]
    text_height = LINE_HEIGHT * max(len(text) for text in wrapped)
    columns = min(columns, len(images))
    num_rows = -(-len(images) // columns)
    cell_height = height + text_height + 2 * GAP
    sheet = Image.new(
        "RGB", (columns * (width + GAP) + GAP, num_rows * cell_height + GAP), "white"
    )
    drawing = ImageDraw.Draw(sheet)
    for index, (image, text) in enumerate(zip(images, wrapped, strict=True)):
        row, column = divmod(index, columns)
        left, top = GAP + column * (width + GAP), GAP + row * cell_height
        sheet.paste(
            Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST), (left, top)
        )
        for line, words in enumerate(text):
            drawing.text((left, top + height + 3 + line * LINE_HEIGHT), words, "black", font)
    return sheet


def draw_reconstructions(
    originals: Sequence[ImageArray], decoded: Sequence[ImageArray], path: Path
) -> None:
    """Write three rows: originals, reconstructions, and 4 times their difference (white for none).

    Args:
        originals: ``(H, W, 3)`` uint8.
        decoded: the reconstruction of each original, of the same size.
        path: the PNG file to write.
    """
    pairs = list(zip(originals, decoded, strict=True))
    errors = [np.abs(a.astype(np.int16) - b.astype(np.int16)) for a, b in pairs]
    differences = [255 - np.minimum(4 * error, 255).astype(np.uint8) for error in errors]
    captions = ["original"] * len(pairs) + ["decoded"] * len(pairs)
    captions += [f"4 x difference ({error.mean():.1f} of 255)" for error in errors]
    images = [*originals, *decoded, *differences]
    sample_grid(images, captions, path, columns=len(pairs))


@styled
def draw_codebook_usage(counts: NDArray[np.int64], path: Path) -> None:
    """Draw how often each code is used, most used first, next to uniform usage.

    The title reports the number of used codes and the perplexity.

    Args:
        counts: number of uses of each of the K codes, ``(K,)``.
        path: the file to write.

    Raises:
        ValueError: if no code was used.
    """
    total = counts.sum()
    if total == 0:
        raise ValueError("codebook_usage: expected at least one used code, got none")
    fractions = np.sort(counts)[::-1] / total
    used = fractions[fractions > 0]
    perplexity = float(np.exp(-(used * np.log(used)).sum()))
    colour = seaborn.color_palette("colorblind")[0]
    figure, (axes,) = panels_of(1)
    axes.fill_between(np.arange(len(used)) + 1, used, color=colour, alpha=0.35, step="mid")
    axes.step(np.arange(len(used)) + 1, used, color=colour, where="mid", label="usage")
    axes.axhline(1 / len(counts), color="0.3", linestyle=":", label="uniform")
    axes.set(xlabel="code, most used first", ylabel="fraction of all tokens", yscale="log")
    axes.set_xlim(0.5, len(counts) + 0.5)
    used_fraction = len(used) / len(counts)
    axes.set_title(
        f"{len(used)} of {len(counts)} codes used ({used_fraction:.0%}), perplexity "
        f"{perplexity:.1f}"
    )
    axes.legend(frameon=False)
    save(figure, path)


MASK_COLOURS = {"attended": "#1f3b6f", "masked": "#f3e3b3", "later": "#ffffff"}


def _mask(axes: Axes, mask: NDArray[np.bool_], segments: tuple[int, int, int]) -> None:
    is_later = np.triu(np.ones_like(mask), k=1)
    codes = np.where(mask, 0, np.where(is_later, 2, 1))
    axes.imshow(codes, cmap=ListedColormap(list(MASK_COLOURS.values())), vmin=0, vmax=2)
    borders = np.cumsum([0, *segments]) - 0.5
    for border in borders[1:-1]:
        axes.axhline(border, color="#c1272d", linewidth=0.9)
        axes.axvline(border, color="#c1272d", linewidth=0.9)
    present_segments = [segment for segment in range(3) if segments[segment] > 0]
    centres = [(borders[segment] + borders[segment + 1]) / 2 for segment in present_segments]
    names = [("left", "image", "right")[segment] for segment in present_segments]
    axes.set_xticks(centres, names)
    axes.set_yticks(centres, names, rotation=90, va="center")
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(True)


def _font(size: int) -> ImageFont.FreeTypeFont:
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(folder / "DejaVuSans.ttf", size)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Return lines no wider than ``width`` pixels; a word that is too long is broken."""
    text = shorten(clean_text(text), MAX_CAPTION_CHARACTERS)
    narrowest = min(
        (font.getlength(character) for character in set(text) - set("\t\n\r")), default=0
    )
    # No line that fits is longer, so wrapping at more characters gives the same lines.
    width_limit = min(len(text), int(width / narrowest) + 2) if narrowest else len(text)
    while True:
        lines = textwrap.wrap(text, max(1, width_limit)) or [""]
        if width_limit <= 1 or max(font.getlength(line) for line in lines) <= width:
            return lines
        width_limit -= 1
