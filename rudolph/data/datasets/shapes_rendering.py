"""How the world of shapes looks: its shapes, colours and sizes, and the images of its objects.

To add a shape or a colour, add its row to ``SIGNED_DISTANCES`` or ``PALETTE``, and its word to
``shapes_russian``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

CoverageArray = NDArray[np.floating[Any]]

SMALLEST_IMAGE = 24

BACKGROUND = (255, 255, 255)
# As far apart as colours on white can be, and each clearly darker than white: a JPEG file and a
# small VQ-GAN keep brightness better than hue. Orange is missing: too near to red and yellow.
PALETTE = {
    "red": (215, 30, 35),
    "green": (20, 165, 50),
    "blue": (0, 60, 205),
    "yellow": (242, 202, 0),
    "violet": (190, 40, 190),
    "black": (20, 20, 20),
    "cyan": (70, 190, 232),
}
# Half the width of an object, in cells.
SIZES = {"small": 0.29, "large": 0.44}


@dataclass(frozen=True)
class SceneObject:
    """One object; ``shift`` (down, right) is how far off its cell's middle it is, in cells."""

    shape: str
    colour: str
    size: str
    row: int
    column: int
    shift: tuple[float, float] = (0.0, 0.0)


def _circle(x: CoverageArray, y: CoverageArray) -> CoverageArray:
    return np.hypot(x, y) - 1


def _square(x: CoverageArray, y: CoverageArray) -> CoverageArray:
    distance: CoverageArray = np.maximum(np.abs(x), np.abs(y)) - 0.9
    return distance


def _triangle(x: CoverageArray, y: CoverageArray) -> CoverageArray:
    distance: CoverageArray = np.maximum(y - 0.8, (1.8 * np.abs(x) - y - 1) / np.hypot(1.8, 1))
    return distance


def _cross(x: CoverageArray, y: CoverageArray) -> CoverageArray:
    long, wide = np.maximum(np.abs(x), np.abs(y)), np.minimum(np.abs(x), np.abs(y))
    distance: CoverageArray = np.maximum(long - 1, wide - 0.34)
    return distance


def _star(x: CoverageArray, y: CoverageArray) -> CoverageArray:
    # All ten edges are mirror images of one, from a tip at (1, 0) to a notch at 36 degrees.
    tip, notch, sector = 1.0, 0.55, np.pi / 5
    angle = np.abs((np.arctan2(x, -y) + sector) % (2 * sector) - sector)
    edge = np.array([notch * np.cos(sector) - tip, notch * np.sin(sector)])
    along, across = np.hypot(x, y) * np.cos(angle) - tip, np.hypot(x, y) * np.sin(angle)
    distance: CoverageArray = (along * edge[1] - across * edge[0]) / np.hypot(*edge)
    return distance


# How far a point (x right, y down, in half widths) is outside of a shape; negative inside.
SIGNED_DISTANCES: dict[str, Callable[[CoverageArray, CoverageArray], CoverageArray]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
    "star": _star,
}


def coverage(
    shape: str, x: CoverageArray, y: CoverageArray, *, radius: float, softness: float
) -> CoverageArray:
    """How much of each point a shape at the origin covers, in [0, 1].

    ``x``, ``y``, ``radius`` (half the width) and ``softness`` (how wide the edge is: one pixel for
    an anti-aliased image, more for a blurred one) are in one unit; ``x`` and ``y`` broadcast.
    """
    distance = SIGNED_DISTANCES[shape](x / radius, y / radius) * (radius / softness)
    opacity: CoverageArray = np.clip(0.5 - distance, 0.0, 1.0)
    return opacity


def cell_pixels(row: int, column: int, *, grid: int, image_size: int) -> tuple[slice, slice]:
    """The rows and the columns of pixels that an object in a cell can reach."""
    # An object lies in its cell; only the soft edge can reach a pixel further.
    pixel = grid / image_size
    rows, columns = (
        slice(max(0, int(place / pixel) - 1), int((place + 1) / pixel) + 2)
        for place in (row, column)
    )
    return rows, columns


def paint(objects: Sequence[SceneObject], *, grid: int, image_size: int) -> CoverageArray:
    """Anti-aliased objects on white: ``(image_size, image_size, 3)`` in [0, 255]."""
    pixel = grid / image_size
    points = (np.arange(image_size) + 0.5) * pixel
    image = np.full((image_size, image_size, 3), BACKGROUND, dtype=np.float64)
    for each in objects:
        rows, columns = cell_pixels(each.row, each.column, grid=grid, image_size=image_size)
        opacity = coverage(
            each.shape,
            points[None, columns] - (each.column + 0.5 + each.shift[1]),
            points[rows, None] - (each.row + 0.5 + each.shift[0]),
            radius=SIZES[each.size],
            softness=pixel,
        )[..., None]  # (rows, columns, 1)
        image[rows, columns] += opacity * (np.array(PALETTE[each.colour]) - image[rows, columns])
    return image


def render(objects: Sequence[SceneObject], *, grid: int, image_size: int) -> Image.Image:
    """The RGB image of some objects, ``image_size`` pixels a side."""
    return as_image(paint(objects, grid=grid, image_size=image_size))


def as_image(image: CoverageArray) -> Image.Image:
    """An RGB image of values in [0, 255]."""
    return Image.fromarray(np.rint(image).astype(np.uint8))


def require_readable_size(image_size: int, *, least: int = SMALLEST_IMAGE) -> None:
    """Raise ``ValueError`` for an image in which a small object cannot be told."""
    if image_size < least:
        raise ValueError(f"image_size must be at least {least}, got {image_size}")
