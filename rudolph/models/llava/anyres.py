"""Anyres of LLaVA-NeXT: an image as a small whole view and as tiles of a larger canvas.

A *canvas* has one of a few sizes, each a whole number of tiles per side.  The image is resized to
fit a canvas without changing its aspect ratio, and centred on black.  The canvas is then cut into
tiles, and each tile is encoded like an image.  The tokens of all tiles form one map.  Its rows or
columns of black border are removed, and a learnt newline vector ends each row::

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

# The first of equally good canvases wins; LLaVA lists the tall one first.  Hugging Face reads
# LLaVA's (width, height) as (height, width) and so prefers the wide one.
LLAVA_CANVASES: tuple[Size, ...] = ((672, 336), (336, 672), (672, 672), (336, 1008), (1008, 336))
HUGGING_FACE_CANVASES: tuple[Size, ...] = (
    (336, 672),
    (672, 336),
    (672, 672),
    (1008, 336),
    (336, 1008),
)


def select_canvas(size: Size, canvases: tuple[Size, ...]) -> Size:
    """Return the canvas that keeps most pixels of an image and, among equals, wastes fewest.

    Enlarging does not count as keeping more pixels.  The first of equally good canvases wins.

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
    """Return the numbers of tile rows and columns of an image's canvas.

    Tiles have ``tile`` pixels per side.
    """
    height, width = select_canvas(size, canvases)
    return height // tile, width // tile


def unpadded(size: Size, rows: int, columns: int) -> tuple[slice, slice]:
    """Return the rows and columns of a map without the border of the canvas.

    If the border has an odd number of rows or columns, one of them stays.  The rounding to 7
    digits is Hugging Face's.

    Args:
        size: Size of the image in pixels.
        rows: Rows of the whole map.
        columns: Columns of the whole map.

    Raises:
        ValueError: If the image is so long that no row or no column is left.
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
    """Return the number of vectors of an image: whole view, tiles and newlines.

    >>> num_anyres_tokens((480, 640), LLAVA_CANVASES, tile=336, grid=(24, 24))
    2340

    Raises:
        ValueError: If the image is too long for its canvas.
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
        size: Size of the image in pixels.
        tiles: Rows and columns of tiles.
        grid: Rows and columns of one tile's tokens, h and w.
        newline: Vector ``(D,)`` inserted after each row.
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
    """Return the size of an image resized to fit a canvas without changing its aspect ratio.

    >>> fitted_size((480, 640), (672, 672))
    (504, 672)
    >>> fitted_size((19, 38), (336, 672))
    (336, 672)
    """
    (height, width), (most_rows, most_columns) = size, canvas
    if most_columns / width < most_rows / height:
        return math.ceil(height * (most_columns / width)), most_columns
    # With equal aspect ratios, rounding up may exceed the canvas by a column.
    return most_rows, min(math.ceil(width * (most_rows / height)), most_columns)
