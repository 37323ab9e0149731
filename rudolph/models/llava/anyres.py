"""Anyres of LLaVA-NeXT: an image as a small whole view and as tiles of a larger canvas.

A *canvas* is one of a few sizes that are whole numbers of tiles.  The image is resized into one
with its aspect kept, centred on black, and cut into tiles; each tile is encoded like an image.
The tiles' tokens form one map, from which the rows or columns of the black border are cut, and a
learnt newline vector ends each row::

    whole view        tiles of a wide image on a canvas of 2 x 2, cut

    o o o             . . . . . .
    o o o             a a a b b b n
    o o o             a a a b b b n
                      c c c d d d n
                      c c c d d d n
                      . . . . . .

    tokens = 3 * 3 + rows * columns + rows

All sizes are (height, width).

Source: LLaVA, ``llava/mm_utils.py`` and ``llava_arch.py``; transformers,
``models/llava_next/modeling_llava_next.py``.

Shapes: D channels; h and w the grid of one tile.
"""

import math

import torch
from torch import Tensor

Size = tuple[int, int]

# In the order that decides between equally good canvases: LLaVA takes the tall one first.
# Hugging Face reads LLaVA's list of (width, height) as (height, width), and takes the wide one.
LLAVA_CANVASES: tuple[Size, ...] = ((672, 336), (336, 672), (672, 672), (336, 1008), (1008, 336))
HUGGING_FACE_CANVASES: tuple[Size, ...] = (
    (336, 672),
    (672, 336),
    (672, 672),
    (1008, 336),
    (336, 1008),
)


def select_canvas(size: Size, canvases: tuple[Size, ...]) -> Size:
    """Return the canvas that keeps most pixels of an image, then the one that wastes least.

    An image smaller than a canvas counts its own pixels; the first of equals wins.

    >>> select_canvas((480, 640), LLAVA_CANVASES)
    (672, 672)
    >>> select_canvas((336, 336), LLAVA_CANVASES)
    (672, 336)
    >>> select_canvas((336, 336), HUGGING_FACE_CANVASES)
    (336, 672)
    """
    height, width = size

    def merit(canvas: Size) -> tuple[int, int]:
        scale = min(canvas[0] / height, canvas[1] / width)
        fitted = int(height * scale) * int(width * scale)
        kept = min(fitted, height * width)
        return kept, kept - canvas[0] * canvas[1]

    return max(canvases, key=merit)


def tile_rows_and_columns(size: Size, canvases: tuple[Size, ...], tile: int) -> tuple[int, int]:
    """Return how many tiles, of ``tile`` pixels a side, the canvas of an image has."""
    height, width = select_canvas(size, canvases)
    return height // tile, width // tile


def unpadded(size: Size, rows: int, columns: int) -> tuple[slice, slice]:
    """Return the rows and columns of a map that show the image, not the border of its canvas.

    An odd remainder leaves one more row or column.  The rounding to 7 digits is Hugging Face's.

    Args:
        size: of the image, in pixels.
        rows: of the whole map.
        columns: of the whole map.

    Raises:
        ValueError: when the image is so long that it has no row or no column.
    """
    height, width = size
    top = left = 0
    if width / height > columns / rows:
        top = (rows - int(round(height * (columns / width), 7))) // 2
    else:
        left = (columns - int(round(width * (rows / height), 7))) // 2
    if 2 * top >= rows or 2 * left >= columns:
        raise ValueError(
            f"image: expected one that fills a row of its {rows}x{columns} tokens, "
            f"got {height}x{width} pixels, which is too long"
        )
    return slice(top, rows - top), slice(left, columns - left)


def num_anyres_tokens(size: Size, canvases: tuple[Size, ...], *, tile: int, grid: Size) -> int:
    """Return how many vectors an image becomes: whole view, tiles and newlines.

    >>> num_anyres_tokens((480, 640), LLAVA_CANVASES, tile=336, grid=(24, 24))
    2340

    Raises:
        ValueError: for an image that no canvas holds.
    """
    tile_rows, tile_columns = tile_rows_and_columns(size, canvases, tile)
    kept = unpadded(size, tile_rows * grid[0], tile_columns * grid[1])
    rows, columns = (part.stop - part.start for part in kept)
    return grid[0] * grid[1] + rows * columns + rows


def pack_tiles(
    crops: Tensor, size: Size, tiles: tuple[int, int], *, grid: Size, newline: Tensor
) -> Tensor:
    """Return the vectors ``(M, D)`` of an image: its whole view, then its tiles row by row.

    Args:
        crops: ``(1 + tile rows * tile columns, h * w, D)``, the whole view first.
        size: of the image, in pixels.
        tiles: rows and columns of tiles.
        grid: h and w.
        newline: ``(D,)``, put after each row.
    """
    (tile_rows, tile_columns), (height, width) = tiles, grid
    whole, cut = crops[0], crops[1:]
    cut = cut.view(tile_rows, tile_columns, height, width, -1).transpose(1, 2)
    whole_map = cut.reshape(tile_rows * height, tile_columns * width, -1)
    rows, columns = unpadded(size, *whole_map.shape[:2])
    kept = whole_map[rows, columns]
    ends = newline.expand(len(kept), 1, -1)
    return torch.cat([whole, torch.cat([kept, ends], dim=1).flatten(0, 1)])


def fitted_size(size: Size, canvas: Size) -> Size:
    """Return the size of an image that is resized into a canvas with its aspect kept.

    >>> fitted_size((480, 640), (672, 672))
    (504, 672)
    >>> fitted_size((19, 38), (336, 672))
    (336, 672)
    """
    (height, width), (most_rows, most_columns) = size, canvas
    if most_columns / width < most_rows / height:
        return math.ceil(height * (most_columns / width)), most_columns
    # Equal aspects may round to a column too many.
    return most_rows, min(math.ceil(width * (most_rows / height)), most_columns)
