"""Upscale images tile by tile, so that memory depends on the tile and not on the image.

The network computes one *tile* at a time, and only a part of its output is *kept*.  Each pixel is
kept from the tile in which it lies deepest.  At least ``overlap`` pixels of the image lie between
a kept pixel and an inner side of its tile::

    image   |.........................|
    tile 1    [kkkkkkkk-----]                 k: kept, -: computed and discarded
    tile 2          [---kkkkk-----]           a side at the image's border discards nothing
    tile 3                [---kkkkkkkkk]

A tile at the image's border ends there, and the convolutions zero-pad it exactly as they would pad
the whole image.  Tiling is therefore exact, borders included, if ``overlap`` is at least
``receptive_radius``.  The result then differs from the untiled one by rounding alone.

For Real-ESRGAN's 23 blocks this radius is 349 pixels (698 at scale 2), too much for tiles that
save memory.  Distant pixels have little weight, so the default overlap of 24 leaves a small,
non-zero difference along the seams.  With random weights this difference is below rounding; for
other weights, compare two overlaps to measure it.

Source: rudalle, ``realesrgan/utils.py`` and ``model.py``, with patches of 192 pixels and a margin
of 24.  The reference first pads the image by reflecting 15 pixels, then repeats its edge pixels up
to a multiple of 192.  Its network therefore never reaches the image's border.  This module pads
nothing, except one row or column where scale 2 needs an even size.  All of its tiles have the same
size, as small as the number of tiles allows, and the last tile is shifted inward.

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
    """One tile along one axis, in pixels: input ``start:end``, of which ``first:last`` is kept."""

    start: int
    end: int
    first: int
    last: int


def fold_factor(config: UpscalerConfig) -> int:
    """Return how many pixels of the image, per axis, the network folds into one position."""
    return 2 if config.scale == 2 else 1


def receptive_radius(config: UpscalerConfig) -> int:
    """Compute the receptive field's radius in pixels, the overlap from which tiling is exact.

    At scale 2 the radius is counted from the pair of pixels that the network folds into one
    position.

    >>> receptive_radius(UpscalerConfig(scale=4)), receptive_radius(UpscalerConfig(scale=2))
    (349, 698)
    """
    # Count conv_hr and conv_last, then the convolution of each upsampling, from the output back.
    radius = 2
    for _ in range(round(math.log2(config.scale * fold_factor(config)))):
        radius = math.ceil((radius + 1) / 2)
    # Add conv_first, the residual blocks and conv_body.
    radius += 1 + config.num_blocks * DENSE_BLOCKS * NUM_DENSE + 1
    return radius * fold_factor(config)


def tile_spans(length: int, *, tile: int, overlap: int, multiple: int = 1) -> list[TileSpan]:
    """Return tiles of one size, at most ``tile``, whose kept parts cover ``length`` pixels.

    Starts and sizes are multiples of ``multiple`` if ``length`` and ``tile`` are.

    >>> for span in tile_spans(20, tile=10, overlap=2):
    ...     print(span)
    TileSpan(start=0, end=10, first=0, last=8)
    TileSpan(start=6, end=16, first=8, last=13)
    TileSpan(start=10, end=20, first=13, last=20)
    """
    margins = 2 * overlap
    num_tiles = max(1, math.ceil((length - margins) / (tile - margins)))
    stride = math.ceil((length - margins) / (num_tiles * multiple)) * multiple
    size = stride + margins
    starts = [min(index * stride, length - size) for index in range(num_tiles)]
    # Cut in the middle of the shared part, as far as possible from the sides of both tiles.
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
    """Upscale images ``(B, 3, H, W)`` in [0, 1] to ``(B, 3, H * scale, W * scale)`` in [0, 1].

    The result has the device and dtype of ``images``; the upscaler computes tiles in its own.
    An image of at most ``tile`` pixels per side is a single tile, so the result is
    ``upscaler(images)`` clamped.  At scale 2 an odd side is made even by repeating its last row or
    column, and the result is cropped.

    Args:
        upscaler: the network.
        images: ``(B, 3, H, W)`` in [0, 1].
        tile: the longest side of a tile, in pixels of ``images``.
        overlap: pixels of ``images`` between the kept part of a tile and its inner sides.  Seams
            are exact from ``receptive_radius`` on.
        batch_size: tiles per call of the network.
        on_tile: called after each batch with the number of tiles done and the total.

    Raises:
        ValueError: if ``images`` are not ``(B, 3, H, W)``, the overlap is negative, the tile is
            not longer than two overlaps or is odd at scale 2, or the batch size is below 1.
    """
    scale, multiple = upscaler.config.scale, fold_factor(upscaler.config)
    require_tiling(images, tile=tile, overlap=overlap, batch_size=batch_size, multiple=multiple)
    height, width = images.shape[2:]
    padded = F.pad(images, (0, -width % multiple, 0, -height % multiple), mode="replicate")
    rows, columns = (
        tile_spans(length, tile=tile, overlap=overlap, multiple=multiple)
        for length in padded.shape[2:]
    )
    tiles = [(index, y, x) for index in range(len(padded)) for y in rows for x in columns]
    upscaled = padded.new_empty(len(padded), 3, padded.shape[2] * scale, padded.shape[3] * scale)
    for done in range(0, len(tiles), batch_size):
        batch = tiles[done : done + batch_size]
        inputs = [padded[index, :, y.start : y.end, x.start : x.end] for index, y, x in batch]
        outputs = upscaler(torch.stack(inputs).to(upscaler.conv_first.weight)).clamp(0, 1)
        for (index, y, x), output in zip(batch, outputs.to(upscaled), strict=True):
            upscaled[index, :, kept_slice(y, scale), kept_slice(x, scale)] = output[
                :, kept_slice(y, scale, y.start), kept_slice(x, scale, x.start)
            ]
        if on_tile is not None:
            on_tile(done + len(batch), len(tiles))
    return upscaled[:, :, : height * scale, : width * scale]


def kept_slice(span: TileSpan, scale: int, origin: int = 0) -> slice:
    """Return the kept part in upscaled pixels, relative to pixel ``origin`` of the image."""
    return slice((span.first - origin) * scale, (span.last - origin) * scale)


def require_tiling(
    images: Tensor, *, tile: int, overlap: int, batch_size: int, multiple: int
) -> None:
    """Raise ``ValueError`` for arguments that ``upscale_tiled`` cannot tile."""
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
