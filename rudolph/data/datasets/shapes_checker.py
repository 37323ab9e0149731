"""Reads an image of the world of shapes back, and says whether it shows what a sentence states.

The reader tries to draw every cell of the image itself: it lays each shape in each size, in many
places and more or less blurred, over the cell as a template, fits the colours of the object and of
what is behind it by least squares, and keeps the template that explains most of the cell. What the
other templates leave unexplained says how sure the reading is. All of this is one matrix product,
which averages the noise, the blur and the stray pixels of a generated image away.

Shapes: H hypotheses (a shape and a size), T of them in a place, B blurs, P pixels of a cell,
C cells; the three channels are brightness and two of hue.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations, product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rudolph.data.datasets.shapes_rendering import (
    BACKGROUND,
    PALETTE,
    SIGNED_DISTANCES,
    SIZES,
    SMALLEST_IMAGE,
    SceneObject,
    coverage,
)
from rudolph.data.datasets.shapes_scenes import DIRECTIONS, Scene

FloatArray = NDArray[np.floating[Any]]

_COLOURS = tuple(PALETTE)
_HYPOTHESES = tuple(product(SIGNED_DISTANCES, SIZES))

# Pixels a side of a cell, once the image has been brought to the size that the reader works in.
_CELL = 16
# How far off the middle of its cell an object is looked for, in cells.
_OFFSETS = np.linspace(-0.18, 0.18, 9)
# Standard deviations of the blurs, in cells. JPEG and VQ codes blur hue more than brightness, so
# each has its own blur, and brightness only one of the first two: a wide blur of brightness would
# explain any stain as an object.
_BLURS = (0.05, 0.1, 0.18)
_NUM_BRIGHTNESS_BLURS = 2
# From RGB to brightness and two differences from it, which count for less when shapes are told
# apart.
_OPPONENT = np.array([[0.299, 0.587, 0.114], [-0.18, -0.35, 0.53], [0.42, -0.35, -0.07]]) / 255
_HUE_WEIGHT = 0.2
# Errors of neighbouring pixels go together: as many independent ones say how sure a fit is.
_INDEPENDENT_PIXELS = 24
_COLOUR_SPREAD = 0.07
# A cell holds an object when it is this like one, where 1 is its full colour without any noise.
_LEAST_PRESENCE, _PRESENCE_SPREAD = 0.45, 0.05
_FAINTEST_CONTENT = 1e-3


@dataclass(frozen=True)
class ReadObject:
    """An object found in an image; ``confidence`` in [0, 1] that all of it is read right."""

    shape: str
    colour: str
    size: str
    row: int
    column: int
    confidence: float


@dataclass(frozen=True)
class Reading:
    """All objects found, in reading order; ``confidence`` in [0, 1] that all is read right."""

    objects: tuple[ReadObject, ...]
    confidence: float


@dataclass(frozen=True)
class SceneVerdict:
    """Whether an image shows what a sentence states, and nothing else.

    ``object_accuracy`` is the share of right objects among those stated or read, whichever are
    more.
    """

    right: bool
    object_accuracy: float


# --- reading -------------------------------------------------------------------------------------


def read_scene(image: Image.Image | NDArray[np.uint8], *, grid: int) -> Reading:
    """The objects in a square image, a PIL image or ``(side, side, 3)`` RGB bytes.

    Raises:
        ValueError: the image is not square, or has less than 24 pixels a side.
    """
    share, contrast = _explain(_cells(image, grid))
    hypothesis = _softmax(-_INDEPENDENT_PIXELS / 2 * np.log(1.002 - share))  # (C, H)
    palette = (np.array([PALETTE[colour] for colour in _COLOURS]) - BACKGROUND) @ _OPPONENT.T
    distances = ((contrast[:, None] - palette) ** 2).sum(axis=2)
    colour = _softmax(-distances / (2 * _COLOUR_SPREAD**2))  # (C, colours)
    nearest = palette[distances.argmin(axis=1)]
    strength = (contrast * nearest).sum(axis=1) / (nearest**2).sum(axis=1)
    likeness = np.clip(strength, 0, 1) * np.sqrt(share.max(axis=1))
    presence = 1 / (1 + np.exp((_LEAST_PRESENCE - likeness) / _PRESENCE_SPREAD))  # (C,)

    occupied = presence >= 0.5
    sure = np.where(occupied, presence * hypothesis.max(axis=1) * colour.max(axis=1), 1 - presence)
    objects = []
    for cell in np.flatnonzero(occupied):
        shape, size = _HYPOTHESES[hypothesis[cell].argmax()]
        row, column = divmod(int(cell), grid)
        name = _COLOURS[colour[cell].argmax()]
        objects.append(ReadObject(shape, name, size, row, column, float(sure[cell])))
    return Reading(tuple(objects), float(sure.prod()))


def _cells(image: Image.Image | NDArray[np.uint8], grid: int) -> FloatArray:
    """The cells in reading order, ``(C, P, 3)``, in opponent colours."""
    rgb = image if isinstance(image, Image.Image) else Image.fromarray(image)
    width, height = rgb.size
    if width != height or width < SMALLEST_IMAGE:
        raise ValueError(
            f"image must be square, {SMALLEST_IMAGE} pixels a side or more, got {width} x {height}"
        )
    side = grid * _CELL
    rgb = rgb.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    pixels = np.asarray(rgb, dtype=np.float32) @ _OPPONENT.T.astype(np.float32)
    return pixels.reshape(grid, _CELL, grid, _CELL, 3).swapaxes(1, 2).reshape(-1, _CELL**2, 3)


@lru_cache(maxsize=1)
def _templates() -> tuple[FloatArray, FloatArray]:
    """Templates ``(T * B, P)`` of mean 0 and length 1; lengths before that ``(T, B, 1, 1)``."""
    points = (np.arange(_CELL) + 0.5) / _CELL - 0.5
    squares = (points[:, None] - points) ** 2
    kernels = [
        np.exp(-squares / (2 * blur**2)) / (np.sqrt(2 * np.pi) * blur * _CELL) for blur in _BLURS
    ]
    covers: list[FloatArray] = []
    for (shape, size), down, right in product(_HYPOTHESES, _OFFSETS, _OFFSETS):
        x, y = points[None, :] - right, points[:, None] - down
        sharp = coverage(shape, x, y, radius=SIZES[size], softness=1 / _CELL)
        covers.extend((kernel @ sharp @ kernel.T).ravel() for kernel in kernels)
    templates = np.array(covers, dtype=np.float32)
    templates -= templates.mean(axis=1, keepdims=True)
    lengths = np.linalg.norm(templates, axis=1, keepdims=True)
    return templates / lengths, lengths.reshape(-1, len(_BLURS), 1, 1)


def _explain(cells: FloatArray) -> tuple[FloatArray, FloatArray]:
    """The best templates of every cell.

    Args:
        cells: ``(C, P, 3)``.

    Returns:
        The share of a cell's variance that each hypothesis explains, ``(C, H)``, and how the
        object of the best one differs from what is behind it, ``(C, 3)``.
    """
    templates, lengths = _templates()
    every = np.arange(len(cells))
    centred = cells - cells.mean(axis=1, keepdims=True)
    by_pixel = centred.swapaxes(0, 1).reshape(_CELL**2, -1)  # (P, C * 3)
    projected = (templates @ by_pixel).reshape(-1, len(_BLURS), len(cells), 3)  # (T, B, C, 3)
    brightness = projected[:, :_NUM_BRIGHTNESS_BLURS, :, 0] ** 2
    hue = _HUE_WEIGHT * (projected[..., 1:] ** 2).sum(axis=3)
    explained = brightness.max(axis=1) + hue.max(axis=1)  # (T, C)
    content = (centred**2).sum(axis=1) @ np.array([1, _HUE_WEIGHT, _HUE_WEIGHT])
    share = explained / np.maximum(content, _FAINTEST_CONTENT)

    best = share.argmax(axis=0)
    brightness_blur = brightness[best, :, every].argmax(axis=1)
    hue_blur = hue[best, :, every].argmax(axis=1)
    fitted = projected / lengths
    contrast = fitted[best, hue_blur, every]
    contrast[:, 0] = fitted[best, brightness_blur, every, 0]
    return share.reshape(len(_HYPOTHESES), -1, len(cells)).max(axis=1).T, contrast


def _softmax(logits: FloatArray) -> FloatArray:
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities: FloatArray = exponentials / exponentials.sum(axis=1, keepdims=True)
    return probabilities


# --- judging -------------------------------------------------------------------------------------


def check_scene(scene: Scene, reading: Reading) -> SceneVerdict:
    """Whether an image that was read so shows what the sentence of ``scene`` states."""
    num_right, sentence_holds = JUDGES[scene.family](scene, reading.objects)
    most = max(len(scene.objects), len(reading.objects))
    return SceneVerdict(
        right=sentence_holds and num_right == most, object_accuracy=num_right / most
    )


def check_positions(scene: Scene, found: tuple[ReadObject, ...]) -> tuple[int, bool]:
    """Each object with its size, in its cell."""
    read = {(each.row, each.column): each for each in found}
    right = [
        (each.row, each.column) in read and _alike(each, read[each.row, each.column])
        for each in scene.objects
    ]
    return sum(right), True


def check_relation(scene: Scene, found: tuple[ReadObject, ...]) -> tuple[int, bool]:
    """The first object with its size, the second of any size, straight in the stated direction."""
    assert scene.relation is not None
    first, second = scene.objects
    best = (0, False)
    for one, other in permutations([*found, None], 2):
        num_right = _alike(first, one) + _alike(second, other, any_size=True)
        best = max(best, (num_right, _direction(one, other) == DIRECTIONS[scene.relation]))
    return best


def check_count(scene: Scene, found: tuple[ReadObject, ...]) -> tuple[int, bool]:
    """As many objects of the shape and the colour, of any size, in any cells."""
    model = scene.objects[0]
    num_alike = sum(_alike(model, each, any_size=True) for each in found)
    return min(num_alike, len(scene.objects)), True


def _alike(truth: SceneObject, read: ReadObject | None, *, any_size: bool = False) -> bool:
    return read is not None and (
        (truth.shape, truth.colour) == (read.shape, read.colour)
        and (any_size or truth.size == read.size)
    )


def _direction(one: ReadObject | None, other: ReadObject | None) -> tuple[int, int] | None:
    if one is None or other is None:
        return None
    return int(np.sign(one.row - other.row)), int(np.sign(one.column - other.column))


# How many objects are as a sentence states, and whether all else that it states holds.
JUDGES: dict[str, Callable[[Scene, tuple[ReadObject, ...]], tuple[int, bool]]] = {
    "one": check_positions,
    "two": check_positions,
    "relation": check_relation,
    "count": check_count,
}
