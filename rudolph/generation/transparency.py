"""Make the background of an emoji transparent, from the image alone.

A drawing with an antialiased edge on a plain background is a mixture.  Each pixel is
``p = alpha f + (1 - alpha) g``, with the foreground colour f and the background colour g.  The
*contrast* is g - p.  The inverse takes three steps:

1.  Find the background: pixels near the background colour that are connected to the frame through
   four neighbours, and faint flecks among them.  A hole inside the drawing is not connected to the
   frame and stays opaque.
2.  Find the edge: pixels that the background reaches in a few more steps that never decrease the
   contrast.  Carry the colour of *solid* pixels outward into the edge.  Solid pixels lie deeper
   than the edge is wide, or have the highest contrast in a thin stroke.
3.  Compute alpha in the edge: how far the pixel lies on the way from g to the carried colour.
   Unmix the pixel's colour from g, so that compositing over g restores the image.

The image alone cannot separate a white part from a white background.  A white part that is open to
the background becomes transparent.  A soft shadow wider than the edge stays opaque.

Source: rudalle, ``pipelines.py``, ``convert_emoji_to_rgba``.  The reference uses a U-Net and,
where the U-Net is unsure, contours darker than 240 that OpenCV fills and draws.  This module uses
a different method, which needs neither and gives a soft edge.

Shapes: H and W pixels.  Colours are 0 to 255.
"""

import numpy as np
from PIL import Image

PixelArray = np.ndarray

# A frame pixel may be background if its darkest channel has at least this value.
MIN_BACKGROUND = 216
# A fleck counts as noise up to this multiple of the tolerance.
FLECK_FACTOR = 3


def to_rgba(image: Image.Image | PixelArray, *, tolerance: int = 8, edge: int = 2) -> Image.Image:
    """Make the near-white background of an image transparent; return an RGBA image.

    Composited over its own background, the result equals the image up to rounding and noise.
    Background at least ``edge`` pixels from the drawing loses deviations of up to ``tolerance``,
    and flecks of up to three times that.  Edges lose deviations that are lighter than the
    background by at most ``tolerance``.  An image without near-white pixels on its frame is
    returned opaque.

    Use a tolerance of 8 for decoded images.  Use 2 for digital drawings: it keeps their white
    parts if these have a faint outline.

    Args:
        image: RGB, or uint8 ``(H, W, 3)``.
        tolerance: the largest difference between a background pixel and the background colour, in
            the channel with the largest difference.
        edge: the width of the antialiased edge in pixels; 2 for images that were not upscaled.

    Raises:
        ValueError: if the image is not RGB, or if ``tolerance`` or ``edge`` is out of range.
    """
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise ValueError(f"image must be RGB uint8 (H, W, 3), got {pixels.dtype} {pixels.shape}")
    if not 0 <= tolerance <= 255:
        raise ValueError(f"tolerance must be in 0 to 255, got {tolerance}")
    if edge < 1:
        raise ValueError(f"edge must be at least 1, got {edge}")
    background = background_colour(pixels)
    if background is None:
        return Image.fromarray(pixels).convert("RGBA")
    contrast = background - pixels  # (H, W, 3), above 0 where darker than the background
    distance = np.abs(contrast).max(-1)
    is_background = flood_fill(distance <= tolerance, frame_mask(distance))
    # A region without a clearly different colour is noise in the background, not drawing.
    is_background = ~flood_fill(~is_background, distance > FLECK_FACTOR * tolerance)
    foreground = extend_outward(contrast, is_background, edge)
    alpha = unmixed_alpha(
        contrast, foreground, is_background, background=background, tolerance=tolerance
    )
    is_edge = grow_along_edges(distance, is_background, edge) & dilate(~is_background, edge)
    alpha = np.where(is_edge, alpha, ~is_background)
    # Round up, because a lower alpha could need a colour below black.
    alpha = np.ceil(np.round(alpha * 255, 6))
    colour = background - contrast * 255 / np.maximum(alpha, 1)[..., None]
    # Fully transparent pixels still need a colour, because naive resizing mixes it in.
    colour = np.where(alpha[..., None] > 0, colour, background - foreground)
    rgba = np.concatenate([colour, alpha[..., None]], -1)
    return Image.fromarray(np.clip(np.round(rgba), 0, 255).astype(np.uint8))


def background_colour(pixels: PixelArray) -> PixelArray | None:
    """Return the median colour ``(3,)`` of near-white frame pixels, or None if there are none."""
    frame_pixels = pixels[frame_mask(pixels[..., 0])]
    candidates = frame_pixels[frame_pixels.min(-1) >= MIN_BACKGROUND]
    return np.median(candidates, axis=0) if len(candidates) else None


def frame_mask(plane: PixelArray) -> PixelArray:
    """Return a mask ``(H, W)`` like ``plane`` that is true on the outermost pixels."""
    is_frame = np.ones(plane.shape, dtype=bool)
    is_frame[1:-1, 1:-1] = False
    return is_frame


def flood_fill(is_open: PixelArray, seeds: PixelArray) -> PixelArray:
    """Return the part of ``is_open`` connected to ``seeds`` through four neighbours; all (H, W).

    >>> is_open = np.array([list(row) for row in (".#...", ".###.", ".#.#.", ".###.")]) == "."
    >>> for row in np.where(flood_fill(is_open, frame_mask(is_open)), "o", "#"):
    ...     print("".join(row))
    o#ooo
    o###o
    o###o
    o###o
    """
    rows, columns = label_runs(is_open), label_runs(is_open.T).T
    reached = is_open & seeds
    while True:
        num_reached = reached.sum()
        # Filling whole runs along alternating axes needs few rounds even for long paths.
        for runs in (rows, columns):
            is_hit = np.zeros(runs.max() + 1, dtype=bool)
            is_hit[runs[reached]] = True
            reached = is_open & is_hit[runs]
        if reached.sum() == num_reached:
            return reached


def label_runs(is_open: PixelArray) -> PixelArray:
    """Assign a number to each horizontal run of open pixels; closed pixels' numbers are unused."""
    before = np.pad(is_open, ((0, 0), (1, 0)))[:, :-1]
    return (is_open & ~before).ravel().cumsum().reshape(is_open.shape)


def reduce_neighborhood(plane: PixelArray, radius: int, combine: np.ufunc) -> PixelArray:
    """Combine each pixel ``(H, W, ...)`` with the square around it, zero outside the image."""
    # The reduction runs down the columns; the axes swap, so the second pass reduces the rows.
    for _ in range(2):
        padded = np.pad(plane, ((radius, radius), *((0, 0),) * (plane.ndim - 1)))
        shifted = [padded[shift : shift + len(plane)] for shift in range(2 * radius + 1)]
        plane = combine.reduce(shifted).swapaxes(0, 1)
    return plane


def dilate(is_set: PixelArray, radius: int) -> PixelArray:
    """Return a mask that is true within ``radius`` pixels, diagonals included, of a set pixel."""
    return reduce_neighborhood(is_set, radius, np.logical_or)


def grow_along_edges(distance: PixelArray, is_background: PixelArray, edge: int) -> PixelArray:
    """Grow the background by ``edge`` steps to eight neighbours, never to a lower contrast.

    The white behind a thin outline is therefore excluded, although it is as near to the background
    as the outer side of the outline.
    """
    reached, headroom = is_background, 256 - distance
    for _ in range(edge):
        reached = reached | (reduce_neighborhood(reached * headroom, 1, np.maximum) >= headroom)
    return reached


def extend_outward(contrast: PixelArray, is_background: PixelArray, edge: int) -> PixelArray:
    """Carry the contrast of the nearest solid pixels outward, ``(H, W, 3)``; 0 if none is near."""
    distance = np.abs(contrast).max(-1)
    is_strongest = distance >= reduce_neighborhood(distance, edge, np.maximum)
    is_known = ~is_background & (~dilate(is_background, edge) | is_strongest)
    extended = contrast * is_known[..., None]
    for _ in range(2 * edge):
        # Weight by contrast, or the white inside of an outline would count as much as the outline.
        weight = is_known * (1 + np.abs(extended).max(-1))
        total = reduce_neighborhood(weight, 1, np.add)
        mean = reduce_neighborhood(extended * weight[..., None], 1, np.add)
        mean /= np.maximum(total, 1)[..., None]
        is_solid = ~is_background & (total > 0) & (distance > np.abs(mean).max(-1))
        nearest = np.where(is_solid[..., None], contrast, mean)
        extended = np.where(is_known[..., None], extended, nearest)
        is_known = total > 0
    return extended


def unmixed_alpha(
    contrast: PixelArray,
    foreground: PixelArray,
    is_background: PixelArray,
    *,
    background: PixelArray,
    tolerance: int,
) -> PixelArray:
    """Return the alpha of each pixel, ``(H, W)``: 0 for the background, 1 for the foreground.

    Alpha is never so low that the unmixed colour would leave the range 0 to 255.  The exception is
    noise: pixels lighter than the background by at most ``tolerance``.
    """
    square = (foreground**2).sum(-1)
    alpha = (contrast * foreground).sum(-1) / np.maximum(square, 1)
    # Without a solid pixel nearby, drawing stays opaque and background becomes transparent.
    alpha = np.where(square > 0, alpha, ~is_background)
    darker = (contrast / background).max(-1)
    lighter = ((-contrast - tolerance) / np.maximum(255 - background, 1)).max(-1)
    return np.clip(np.maximum.reduce([alpha, darker, lighter]), 0, 1)
