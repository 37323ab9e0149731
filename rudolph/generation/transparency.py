"""The ground of an emoji made transparent, from the image alone.

A drawing with an antialiased edge on a plain ground is a mixture: ``p = alpha f + (1 - alpha) g``
in each pixel, of the colours of its foreground f and its ground g.  *Contrast* is g - p.  The
inverse takes three steps:

1. the *ground* is what is reached from the frame, by steps to four neighbours, over pixels of
   about the ground's colour, and faint flecks in it; a hole inside the drawing is not reached
   and stays opaque;
2. the *edge* is what a few more steps reach that never lead to less contrast; to it the colour of
   the *solid* pixels is carried from inside: of those deeper than the edge is wide, and of the
   most contrasting ones of thin strokes;
3. in the edge, alpha is how far the pixel lies on the way from g to that colour, and its own
   colour is then unmixed from g, so that over g the result gives the image back.

The image alone cannot tell white from white: a white part that is open to the ground goes with
it, and a soft shadow wider than the edge stays as it is, opaque.

Source: rudalle, ``pipelines.py``, ``convert_emoji_to_rgba``: a U-Net and, where it is unsure,
contours of what is darker than 240, which OpenCV fills and draws.  Ours is another method: it
needs neither, and its edge is soft.

Shapes: H and W pixels.  Colours are 0 to 255.
"""

import numpy as np
from PIL import Image

PixelArray = np.ndarray

# What of the frame may be ground, in its darkest channel.
MIN_GROUND = 216
# A fleck is noise while it stays within so many tolerances.
FLECK = 3


def to_rgba(image: Image.Image | PixelArray, *, tolerance: int = 8, edge: int = 2) -> Image.Image:
    """The image, RGB or uint8 ``(H, W, 3)``, with its near-white ground transparent: RGBA.

    Over its own ground the result is the image again, to rounding, but for noise: from the open
    ground, ``edge`` pixels away from the drawing, what is within the tolerance is lost, and so are
    flecks within three times the tolerance; edges lose what is lighter than the ground by it.  A
    image without near-white on its frame comes back opaque.

    Args:
        tolerance: how far, in the channel where it is farthest, a pixel of the ground may lie
            from the ground's colour.  8 suits decoded images; 2 drawn ones, whose white parts
            are then kept where they have a faint outline.
        edge: how many pixels wide the antialiased edge is: 2 where nothing was enlarged.

    Raises:
        ValueError: when the image is not RGB, or tolerance or edge is out of bounds.
    """
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise ValueError(f"image must be RGB uint8 (H, W, 3), got {pixels.dtype} {pixels.shape}")
    if not 0 <= tolerance <= 255:
        raise ValueError(f"tolerance must be in 0 to 255, got {tolerance}")
    if edge < 1:
        raise ValueError(f"edge must be at least 1, got {edge}")
    ground = ground_colour(pixels)
    if ground is None:
        return Image.fromarray(pixels).convert("RGBA")
    contrast = ground - pixels  # (H, W, 3), above 0 where darker than the ground
    distance = np.abs(contrast).max(-1)
    is_ground = flood_fill(distance <= tolerance, frame_mask(distance))
    # What is nowhere clearly of another colour is noise of the ground, not drawing.
    is_ground = ~flood_fill(~is_ground, distance > FLECK * tolerance)
    foreground = extend_outward(contrast, is_ground, edge)
    alpha = unmixed_alpha(contrast, foreground, is_ground, ground=ground, tolerance=tolerance)
    is_edge = grow_along_edges(distance, is_ground, edge) & dilate(~is_ground, edge)
    alpha = np.where(is_edge, alpha, ~is_ground)
    # Upward: a lower alpha could ask for a colour below black.
    alpha = np.ceil(np.round(alpha * 255, 6))
    colour = ground - contrast * 255 / np.maximum(alpha, 1)[..., None]
    # What is seen through alone still has a colour, which naive resizing mixes in.
    colour = np.where(alpha[..., None] > 0, colour, ground - foreground)
    rgba = np.concatenate([colour, alpha[..., None]], -1)
    return Image.fromarray(np.clip(np.round(rgba), 0, 255).astype(np.uint8))


def ground_colour(pixels: PixelArray) -> PixelArray | None:
    """The median colour (3,) of what is near-white on the frame, ``None`` when nothing is."""
    frame = pixels[frame_mask(pixels[..., 0])]
    candidates = frame[frame.min(-1) >= MIN_GROUND]
    return np.median(candidates, axis=0) if len(candidates) else None


def frame_mask(plane: PixelArray) -> PixelArray:
    """True on the outermost pixels: ``(H, W)`` as ``plane``."""
    is_frame = np.ones(plane.shape, dtype=bool)
    is_frame[1:-1, 1:-1] = False
    return is_frame


def flood_fill(is_open: PixelArray, seeds: PixelArray) -> PixelArray:
    """What of ``is_open`` is reached from ``seeds`` by steps to four neighbours; all (H, W).

    >>> is_open = np.array([list(row) for row in (".#...", ".###.", ".#.#.", ".###.")]) == "."
    >>> for row in np.where(flood(is_open, frame_mask(is_open)), "o", "#"):
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
        # By whole runs, along one axis and then the other: few rounds, however long the way.
        for runs in (rows, columns):
            is_hit = np.zeros(runs.max() + 1, dtype=bool)
            is_hit[runs[reached]] = True
            reached = is_open & is_hit[runs]
        if reached.sum() == num_reached:
            return reached


def label_runs(is_open: PixelArray) -> PixelArray:
    """A number for each horizontal run of open pixels; on the others it means nothing."""
    before = np.pad(is_open, ((0, 0), (1, 0)))[:, :-1]
    return (is_open & ~before).ravel().cumsum().reshape(is_open.shape)


def reduce_neighborhood(plane: PixelArray, radius: int, combine: np.ufunc) -> PixelArray:
    """Each pixel (H, W, ...) combined with the square around it; outside the image is zero."""
    # Down the columns, twice: the second time they are the rows.
    for _ in range(2):
        padded = np.pad(plane, ((radius, radius), *((0, 0),) * (plane.ndim - 1)))
        shifted = [padded[shift : shift + len(plane)] for shift in range(2 * radius + 1)]
        plane = combine.reduce(shifted).swapaxes(0, 1)
    return plane


def dilate(is_set: PixelArray, radius: int) -> PixelArray:
    """True within ``radius`` pixels, diagonals too, of what is set."""
    return reduce_neighborhood(is_set, radius, np.logical_or)


def grow_along_edges(distance: PixelArray, is_ground: PixelArray, edge: int) -> PixelArray:
    """The ground and what ``edge`` steps from it reach, to eight neighbours and never down.

    So not the white behind a thin outline, which is as near to the ground as its other side.
    """
    reached, headroom = is_ground, 256 - distance
    for _ in range(edge):
        reached = reached | (reduce_neighborhood(reached * headroom, 1, np.maximum) >= headroom)
    return reached


def extend_outward(contrast: PixelArray, is_ground: PixelArray, edge: int) -> PixelArray:
    """The contrast of the nearest solid pixels, ``(H, W, 3)``; 0 where none is near."""
    distance = np.abs(contrast).max(-1)
    is_strongest = distance >= reduce_neighborhood(distance, edge, np.maximum)
    is_known = ~is_ground & (~dilate(is_ground, edge) | is_strongest)
    carried = contrast * is_known[..., None]
    for _ in range(2 * edge):
        # By contrast, lest the white inside of an outline count as much as the outline.
        weight = is_known * (1 + np.abs(carried).max(-1))
        total = reduce_neighborhood(weight, 1, np.add)
        mean = reduce_neighborhood(carried * weight[..., None], 1, np.add)
        mean /= np.maximum(total, 1)[..., None]
        is_solid = ~is_ground & (total > 0) & (distance > np.abs(mean).max(-1))
        nearest = np.where(is_solid[..., None], contrast, mean)
        carried = np.where(is_known[..., None], carried, nearest)
        is_known = total > 0
    return carried


def unmixed_alpha(
    contrast: PixelArray,
    foreground: PixelArray,
    is_ground: PixelArray,
    *,
    ground: PixelArray,
    tolerance: int,
) -> PixelArray:
    """How far the pixel lies from the ground to the foreground, ``(H, W)`` in 0 to 1.

    Never so low that the unmixed colour would leave 0 to 255; lighter than the ground by up to
    the tolerance is noise, which may.
    """
    square = (foreground**2).sum(-1)
    share = (contrast * foreground).sum(-1) / np.maximum(square, 1)
    # No solid pixel near: the drawing's pixels are themselves, the ground's are seen through.
    share = np.where(square > 0, share, ~is_ground)
    darker = (contrast / ground).max(-1)
    lighter = ((-contrast - tolerance) / np.maximum(255 - ground, 1)).max(-1)
    return np.clip(np.maximum.reduce([share, darker, lighter]), 0, 1)
