"""Images enlarged tile by tile, so that memory depends on the tile and not on the image.

The network sees one *tile* at a time and a part of what it gives is *kept*.  Each pixel is kept
of the tile in which it lies deepest; between it and an inner side of that tile lie at least
``overlap`` pixels of the image::

    image   |.........................|
    tile 1    [kkkkkkkk-----]                 k: kept, -: computed and thrown away
    tile 2          [---kkkkk-----]           a side at the image's border throws nothing away
    tile 3                [---kkkkkkkkk]

A tile at the image's border ends there and is zero-padded there by the convolutions, just as
the whole image would be.  So tiling is exact, borders included, where ``overlap`` reaches
``receptive_radius``; the result then differs from the untiled one by rounding alone.

For Real-ESRGAN's 23 blocks that radius is 349 pixels (698 at scale 2), more than tiles that save
memory can have.  Far pixels weigh little, so the default overlap of 24 leaves a difference along
the seams that is small and not zero: with random weights, less than rounding.  Comparing two
overlaps measures it on others.

Source: rudalle, ``realesrgan/utils.py`` and ``model.py``: patches of 192 with 24 pixels around.
Ours differs: there the image is first reflected by 15 pixels and extended to a multiple of 192
by its edge pixels, so the network never meets the image's border; ours adds nothing (but one
row or column where scale 2 needs an even size), and its tiles are of equal size, as small as
their number allows, the last one shifted inward.

Shapes: B images, H and W pixels.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rudolph.models.upscaler import NUM_DENSE, Upscaler, UpscalerConfig

DENSE_BLOCKS = 3


class TileSpan(NamedTuple):
    """One tile along one axis, in pixels: it sees ``start:end``; ``first:last`` is kept."""

    start: int
    end: int
    first: int
    last: int


def fold_of(config: UpscalerConfig) -> int:
    """Pixels of the image, along one axis, to one position of the features."""
    return 2 if config.scale == 2 else 1


def receptive_radius(config: UpscalerConfig) -> int:
    """How many pixels around its own an output pixel depends on: the overlap that is exact.

    At scale 2 it is counted from the pair of pixels that the network folds into one position.

    >>> receptive_radius(UpscalerConfig(scale=4)), receptive_radius(UpscalerConfig(scale=2))
    (349, 698)
    """
    # conv_hr and conv_last; then, from the result back, each enlargement's convolution.
    radius = 2
    for _ in range(round(math.log2(config.scale * fold_of(config)))):
        radius = math.ceil((radius + 1) / 2)
    # conv_first, the body and conv_body.
    radius += 1 + config.num_blocks * DENSE_BLOCKS * NUM_DENSE + 1
    return radius * fold_of(config)


def tile_spans(length: int, *, tile: int, overlap: int, multiple: int = 1) -> list[TileSpan]:
    """Tiles of one size, at most ``tile``, whose kept parts make up ``length`` pixels.

    Starts and sizes are multiples of ``multiple`` if ``length`` and ``tile`` are.

    >>> for span in spans(20, tile=10, overlap=2):
    ...     print(span)
    Span(start=0, end=10, first=0, last=8)
    Span(start=6, end=16, first=8, last=13)
    Span(start=10, end=20, first=13, last=20)
    """
    margins = 2 * overlap
    num_tiles = max(1, math.ceil((length - margins) / (tile - margins)))
    stride = math.ceil((length - margins) / (num_tiles * multiple)) * multiple
    size = stride + margins
    starts = [min(index * stride, length - size) for index in range(num_tiles)]
    # In the middle of what two tiles share: as deep as can be in both.
    cuts = [(before + size + after) // 2 for before, after in pairwise(starts)]
    ends = pairwise([0, *cuts, length])
    return [TileSpan(start, start + size, *kept) for start, kept in zip(starts, ends, strict=True)]


@torch.inference_mode()
def upscale_tiled(
    upscaler: Upscaler,
    images: Tensor,
    *,
    tile: int = 192,
    overlap: int = 24,
    batch_size: int = 4,
    on_tile: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Images ``(B, 3, H, W)`` in [0, 1] to ``(B, 3, H * scale, W * scale)`` in [0, 1].

    The result has the device and dtype of ``images``; tiles are computed in the upscaler's.
    An image of at most ``tile`` pixels a side is one tile, that is ``upscaler(images)`` clamped.
    At scale 2 an odd side is made even by repeating its last row or column, and the result is cut.

    Args:
        tile: the longest side that the network sees, in pixels of ``images``.
        overlap: pixels of ``images`` between what is kept of a tile and the tile's inner sides;
            from ``receptive_radius`` on the seams are exact.
        batch_size: tiles at once.
        on_tile: called after each batch with the numbers of tiles done and of all.

    Raises:
        ValueError: when ``images`` are not ``(B, 3, H, W)``, the overlap is negative, the tile is
            not longer than two overlaps or odd at scale 2, or the batch is empty.
    """
    scale, multiple = upscaler.config.scale, fold_of(upscaler.config)
    require_tiling(images, tile=tile, overlap=overlap, batch_size=batch_size, multiple=multiple)
    height, width = images.shape[2:]
    even = F.pad(images, (0, -width % multiple, 0, -height % multiple), mode="replicate")
    rows, columns = (
        tile_spans(length, tile=tile, overlap=overlap, multiple=multiple)
        for length in even.shape[2:]
    )
    tiles = [(index, y, x) for index in range(len(even)) for y in rows for x in columns]
    larger = even.new_empty(len(even), 3, even.shape[2] * scale, even.shape[3] * scale)
    for done in range(0, len(tiles), batch_size):
        batch = tiles[done : done + batch_size]
        seen = [even[index, :, y.start : y.end, x.start : x.end] for index, y, x in batch]
        outputs = upscaler(torch.stack(seen).to(upscaler.conv_first.weight)).clamp(0, 1)
        for (index, y, x), output in zip(batch, outputs.to(larger), strict=True):
            larger[index, :, kept_slice(y, scale), kept_slice(x, scale)] = output[
                :, kept_slice(y, scale, y.start), kept_slice(x, scale, x.start)
            ]
        if on_tile is not None:
            on_tile(done + len(batch), len(tiles))
    return larger[:, :, : height * scale, : width * scale]


def kept_slice(span: TileSpan, scale: int, origin: int = 0) -> slice:
    """The kept part in enlarged pixels, counted from the pixel ``origin`` of the image."""
    return slice((span.first - origin) * scale, (span.last - origin) * scale)


def require_tiling(
    images: Tensor, *, tile: int, overlap: int, batch_size: int, multiple: int
) -> None:
    """Raise ``ValueError`` for what ``upscale_tiled`` cannot tile."""
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
        raise ValueError(f"images must be (B, 3, H, W), got {tuple(images.shape)}")
    if overlap < 0:
        raise ValueError(f"overlap must be at least 0, got {overlap}")
    if tile <= 2 * overlap:
        raise ValueError(f"tile must be above twice the overlap of {overlap}, got {tile}")
    if tile % multiple:
        raise ValueError(f"tile must be a multiple of {multiple} at this scale, got {tile}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
