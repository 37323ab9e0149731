"""Rendering of synthetic shapes: their geometry, colours and sizes.

To add a shape or a colour, add it to ``SIGNED_DISTANCES`` or ``PALETTE``, and its word to
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
# The colours are as distinct as possible, and each is clearly darker than white because JPEG and
# small VQ-GANs preserve brightness better than hue. Orange would be too close to red and yellow.
PALETTE = {
    "red": (215, 30, 35),
    "green": (20, 165, 50),
    "blue": (0, 60, 205),
    "yellow": (242, 202, 0),
    "violet": (190, 40, 190),
    "black": (20, 20, 20),
    "cyan": (70, 190, 232),
}
# Half widths of objects, in cells.
SIZES = {"small": 0.29, "large": 0.44}


@dataclass(frozen=True)
class SceneObject:
    """An object in a grid cell.

    ``shift`` (down, right) is its offset from the centre of the cell, in cells.
    """

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
    # By symmetry, all ten edges reduce to one, from a tip at (1, 0) to a notch at 36 degrees.
    tip, notch, sector = 1.0, 0.55, np.pi / 5
    angle = np.abs((np.arctan2(x, -y) + sector) % (2 * sector) - sector)
    edge = np.array([notch * np.cos(sector) - tip, notch * np.sin(sector)])
    along, across = np.hypot(x, y) * np.cos(angle) - tip, np.hypot(x, y) * np.sin(angle)
    distance: CoverageArray = (along * edge[1] - across * edge[0]) / np.hypot(*edge)
    return distance


# Distance of a point (x right, y down, in half widths) from a shape; negative inside.
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
    """Return the opacity of a shape at the origin, at each of the given points, in [0, 1].

    All lengths have the same unit, and ``x`` and ``y`` broadcast.

    Args:
        shape: A key of ``SIGNED_DISTANCES``.
        x: Coordinates to the right.
        y: Coordinates downwards.
        radius: Half the width of the shape.
        softness: Width of the edge: one pixel for an anti-aliased image, more for a blurred one.
    """
    distance = SIGNED_DISTANCES[shape](x / radius, y / radius) * (radius / softness)
    opacity: CoverageArray = np.clip(0.5 - distance, 0.0, 1.0)
    return opacity


def cell_pixels(row: int, column: int, *, grid: int, image_size: int) -> tuple[slice, slice]:
    """Return the slices of pixel rows and columns that an object in a cell can cover."""
    # Objects lie within their cell; only the soft edge can extend one pixel further.
    pixel = grid / image_size
    rows, columns = (
        slice(max(0, int(cell / pixel) - 1), int((cell + 1) / pixel) + 2) for cell in (row, column)
    )
    return rows, columns


def paint(objects: Sequence[SceneObject], *, grid: int, image_size: int) -> CoverageArray:
    """Return anti-aliased objects on white, ``(image_size, image_size, 3)`` float in [0, 255]."""
    pixel = grid / image_size
    points = (np.arange(image_size) + 0.5) * pixel
    image = np.full((image_size, image_size, 3), BACKGROUND, dtype=np.float64)
    for scene_object in objects:
        rows, columns = cell_pixels(
            scene_object.row, scene_object.column, grid=grid, image_size=image_size
        )
        opacity = coverage(
            scene_object.shape,
            points[None, columns] - (scene_object.column + 0.5 + scene_object.shift[1]),
            points[rows, None] - (scene_object.row + 0.5 + scene_object.shift[0]),
            radius=SIZES[scene_object.size],
            softness=pixel,
        )[..., None]  # (rows, columns, 1)
        image[rows, columns] += opacity * (
            np.array(PALETTE[scene_object.colour]) - image[rows, columns]
        )
    return image


def render(objects: Sequence[SceneObject], *, grid: int, image_size: int) -> Image.Image:
    """Return the RGB image of some objects, ``image_size`` pixels per side."""
    return as_image(paint(objects, grid=grid, image_size=image_size))


def as_image(image: CoverageArray) -> Image.Image:
    """Convert values in [0, 255], ``(H, W, 3)``, to an RGB image."""
    return Image.fromarray(np.rint(image).astype(np.uint8))


def require_readable_size(image_size: int, *, minimum: int = SMALLEST_IMAGE) -> None:
    """Raise ``ValueError`` if an image is too small for small objects to be recognised."""
    if image_size < minimum:
        raise ValueError(f"image_size must be at least {minimum}, got {image_size}")
