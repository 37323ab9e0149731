"""Template matching on images of synthetic shapes, which reads objects and checks sentences.

Every cell of the image is compared with templates: each shape in each size, at many offsets and
several blurs.  A least-squares fit gives the colours of the object and the background.  The
template that explains the largest fraction of the cell's variance wins, and the fractions of the
other templates give the confidence.  The fit is one matrix product, which averages out noise, blur
and stray pixels of generated images.

Shapes: C cells, P pixels per cell, H hypotheses (pairs of shape and size), T pairs of hypothesis
and offset, B blurs.  The three channels are brightness and two channels of hue.
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

# Pixels per side of a cell, after the image is resized for reading.
_CELL = 16
# Offsets of the templates from the centre of a cell, in cells.
_OFFSETS = np.linspace(-0.18, 0.18, 9)
# Standard deviations of the blurs, in cells. Hue and brightness have separate blurs, because JPEG
# and VQ codes blur hue more. Brightness uses only the first two: with a wide blur any stain would
# match an object.
_BLURS = (0.05, 0.1, 0.18)
_NUM_BRIGHTNESS_BLURS = 2
# Maps RGB to brightness and two colour differences, which have less weight in the choice of the
# shape.
_OPPONENT = np.array([[0.299, 0.587, 0.114], [-0.18, -0.35, 0.53], [0.42, -0.35, -0.07]]) / 255
_HUE_WEIGHT = 0.2
# Effective number of independent pixels in the likelihood; errors of neighbours correlate.
_INDEPENDENT_PIXELS = 24
_COLOUR_SPREAD = 0.07
# Likeness above which a cell counts as occupied; 1 is an object in full colour without noise.
_LEAST_PRESENCE, _PRESENCE_SPREAD = 0.45, 0.05
_FAINTEST_CONTENT = 1e-3


@dataclass(frozen=True)
class ReadObject:
    """An object found in an image.

    ``confidence`` in [0, 1] is the probability that all its attributes are correct.
    """

    shape: str
    colour: str
    size: str
    row: int
    column: int
    confidence: float


@dataclass(frozen=True)
class Reading:
    """All objects found in an image, in reading order, with a confidence in [0, 1].

    ``confidence`` is the probability that the whole reading, with its empty cells, is correct.
    """

    objects: tuple[ReadObject, ...]
    confidence: float


@dataclass(frozen=True)
class SceneVerdict:
    """The result of checking an image against a sentence.

    ``is_correct`` is true if the image shows exactly what the sentence states.
    ``object_accuracy`` is the number of correct objects divided by the number of stated objects
    or, if larger, by the number of read objects.
    """

    is_correct: bool
    object_accuracy: float


# --- reading -------------------------------------------------------------------------------------


def read_scene(image: Image.Image | NDArray[np.uint8], *, grid: int) -> Reading:
    """Return the objects in a square image.

    Args:
        image: A PIL image, or RGB bytes ``(side, side, 3)``.
        grid: Cells per side.

    Raises:
        ValueError: If the image is not square or has less than 24 pixels per side.
    """
    explained, contrast = _explain(_cells(image, grid))
    hypothesis = _softmax(-_INDEPENDENT_PIXELS / 2 * np.log(1.002 - explained))  # (C, H)
    palette = (np.array([PALETTE[colour] for colour in _COLOURS]) - BACKGROUND) @ _OPPONENT.T
    distances = ((contrast[:, None] - palette) ** 2).sum(axis=2)
    colour = _softmax(-distances / (2 * _COLOUR_SPREAD**2))  # (C, colours)
    nearest = palette[distances.argmin(axis=1)]
    strength = (contrast * nearest).sum(axis=1) / (nearest**2).sum(axis=1)
    likeness = np.clip(strength, 0, 1) * np.sqrt(explained.max(axis=1))
    presence = 1 / (1 + np.exp((_LEAST_PRESENCE - likeness) / _PRESENCE_SPREAD))  # (C,)

    occupied = presence >= 0.5
    confidence = np.where(
        occupied, presence * hypothesis.max(axis=1) * colour.max(axis=1), 1 - presence
    )
    objects = []
    for cell in np.flatnonzero(occupied):
        shape, size = _HYPOTHESES[hypothesis[cell].argmax()]
        row, column = divmod(int(cell), grid)
        name = _COLOURS[colour[cell].argmax()]
        objects.append(ReadObject(shape, name, size, row, column, float(confidence[cell])))
    return Reading(tuple(objects), float(confidence.prod()))


def _cells(image: Image.Image | NDArray[np.uint8], grid: int) -> FloatArray:
    """Return the cells in reading order, ``(C, P, 3)``, in opponent colours."""
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
    """Return templates ``(T * B, P)`` of mean 0 and norm 1, and norms ``(T, B, 1, 1)``.

    The norms are those that the centred templates had before normalisation.
    """
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
    """Fit the templates to every cell.

    Args:
        cells: Pixels of the cells, ``(C, P, 3)``.

    Returns:
        The fraction ``(C, H)`` of each cell's variance that each hypothesis explains, and the
        difference ``(C, 3)`` between object and background for the best template.
    """
    templates, lengths = _templates()
    cell_indices = np.arange(len(cells))
    centred = cells - cells.mean(axis=1, keepdims=True)
    by_pixel = centred.swapaxes(0, 1).reshape(_CELL**2, -1)  # (P, C * 3)
    projected = (templates @ by_pixel).reshape(-1, len(_BLURS), len(cells), 3)  # (T, B, C, 3)
    brightness = projected[:, :_NUM_BRIGHTNESS_BLURS, :, 0] ** 2
    hue = _HUE_WEIGHT * (projected[..., 1:] ** 2).sum(axis=3)
    explained = brightness.max(axis=1) + hue.max(axis=1)  # (T, C)
    content = (centred**2).sum(axis=1) @ np.array([1, _HUE_WEIGHT, _HUE_WEIGHT])
    fractions = explained / np.maximum(content, _FAINTEST_CONTENT)

    best_template = fractions.argmax(axis=0)
    brightness_blur = brightness[best_template, :, cell_indices].argmax(axis=1)
    hue_blur = hue[best_template, :, cell_indices].argmax(axis=1)
    contrasts = projected / lengths
    contrast = contrasts[best_template, hue_blur, cell_indices]
    contrast[:, 0] = contrasts[best_template, brightness_blur, cell_indices, 0]
    return fractions.reshape(len(_HYPOTHESES), -1, len(cells)).max(axis=1).T, contrast


def _softmax(logits: FloatArray) -> FloatArray:
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities: FloatArray = exponentials / exponentials.sum(axis=1, keepdims=True)
    return probabilities


# --- checking ------------------------------------------------------------------------------------


def check_scene(scene: Scene, reading: Reading) -> SceneVerdict:
    """Check a reading of an image against the sentence of ``scene``."""
    num_correct, sentence_holds = SCENE_CHECKS[scene.family](scene, reading.objects)
    num_objects = max(len(scene.objects), len(reading.objects))
    return SceneVerdict(
        is_correct=sentence_holds and num_correct == num_objects,
        object_accuracy=num_correct / num_objects,
    )


def check_positions(scene: Scene, objects: tuple[ReadObject, ...]) -> tuple[int, bool]:
    """Count the objects that have the right shape, colour and size in the right cell."""
    by_cell = {(read_object.row, read_object.column): read_object for read_object in objects}
    matches = [
        (stated.row, stated.column) in by_cell
        and _alike(stated, by_cell[stated.row, stated.column])
        for stated in scene.objects
    ]
    return sum(matches), True


def check_relation(scene: Scene, objects: tuple[ReadObject, ...]) -> tuple[int, bool]:
    """Count the correct objects of a relation, and check its direction.

    The first object must have the stated size, while the second may have any size.
    """
    assert scene.relation is not None
    first, second = scene.objects
    best = (0, False)
    for one, other in permutations([*objects, None], 2):
        num_correct = _alike(first, one) + _alike(second, other, any_size=True)
        best = max(best, (num_correct, _direction(one, other) == DIRECTIONS[scene.relation]))
    return best


def check_count(scene: Scene, objects: tuple[ReadObject, ...]) -> tuple[int, bool]:
    """Count the objects of the stated shape and colour, of any size and in any cell.

    The count is at most the stated number.
    """
    model = scene.objects[0]
    num_alike = sum(_alike(model, read_object, any_size=True) for read_object in objects)
    return min(num_alike, len(scene.objects)), True


def _alike(stated: SceneObject, read_object: ReadObject | None, *, any_size: bool = False) -> bool:
    return read_object is not None and (
        (stated.shape, stated.colour) == (read_object.shape, read_object.colour)
        and (any_size or stated.size == read_object.size)
    )


def _direction(one: ReadObject | None, other: ReadObject | None) -> tuple[int, int] | None:
    if one is None or other is None:
        return None
    return int(np.sign(one.row - other.row)), int(np.sign(one.column - other.column))


# Each returns the number of correct objects, and whether the rest of the sentence holds.
SCENE_CHECKS: dict[str, Callable[[Scene, tuple[ReadObject, ...]], tuple[int, bool]]] = {
    "one": check_positions,
    "two": check_positions,
    "relation": check_relation,
    "count": check_count,
}
