"""A made world with exact truth: coloured shapes on a grid and the Russian sentences about them.

A *scene* is a few objects, each with a shape, a colour, a size and a cell of the grid. A *family*
is a kind of sentence, and the sentence states all that is asked of a picture of it:

========  =========================================  ===========================================
family    a sentence                                 what it states
========  =========================================  ===========================================
one       большой синий круг в центре                one object, everything of it
two       ... круг слева сверху, ... крест справа    two objects, everything of them
relation  маленький чёрный крест под синим кругом    two objects of one row or column and their
                                                     order; the second may have any size
count     пять жёлтых квадратов                      how many, in any cells, of any one size
========  =========================================  ===========================================

Scene ``index`` of a split depends on the configuration, the split and the index alone, so there
are as many scenes as wanted and none needs an earlier one. ``shapes_checker`` reads pictures back.

To add a family, write a function ``(ShapesConfig, Random) -> Scene``, name it in ``FAMILIES`` and
say in ``shapes_checker.JUDGES`` what its sentence asks of a reading. To add a shape or a colour,
add its row to ``SIGNED_DISTANCES`` or ``PALETTE``, and its word to ``shapes_russian``.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from random import Random
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rudolph.data.pairs import Pair, hash_fraction, require_split
from rudolph.data.shapes_russian import (
    NUMERALS,
    counted_phrase,
    noun_phrase,
    position_phrase,
    relation_phrase,
)

Array = NDArray[np.floating[Any]]
Option = TypeVar("Option")

# Counted up whenever the same configuration would give other pictures or sentences than before.
WORLD_VERSION = 1
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
# The way (down, right) from the second object of a relation to the first.
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "above": (-1, 0), "below": (1, 0)}

_LARGEST_JITTER = 0.05
# A sentence is of the first split whose bound is above its hash_fraction.
_SPLIT_BOUNDS = {"train": 0.8, "validation": 0.9, "test": 1.0}
_MAX_DRAWS = 10_000


# --- how shapes look -----------------------------------------------------------------------------


def _circle(x: Array, y: Array) -> Array:
    return np.hypot(x, y) - 1


def _square(x: Array, y: Array) -> Array:
    distance: Array = np.maximum(np.abs(x), np.abs(y)) - 0.9
    return distance


def _triangle(x: Array, y: Array) -> Array:
    distance: Array = np.maximum(y - 0.8, (1.8 * np.abs(x) - y - 1) / np.hypot(1.8, 1))
    return distance


def _cross(x: Array, y: Array) -> Array:
    long, wide = np.maximum(np.abs(x), np.abs(y)), np.minimum(np.abs(x), np.abs(y))
    distance: Array = np.maximum(long - 1, wide - 0.34)
    return distance


def _star(x: Array, y: Array) -> Array:
    # All ten edges are mirror images of one, from a tip at (1, 0) to a notch at 36 degrees.
    tip, notch, sector = 1.0, 0.55, np.pi / 5
    angle = np.abs((np.arctan2(x, -y) + sector) % (2 * sector) - sector)
    edge = np.array([notch * np.cos(sector) - tip, notch * np.sin(sector)])
    along, across = np.hypot(x, y) * np.cos(angle) - tip, np.hypot(x, y) * np.sin(angle)
    distance: Array = (along * edge[1] - across * edge[0]) / np.hypot(*edge)
    return distance


# How far a point (x right, y down, in half widths) is outside of a shape; negative inside.
SIGNED_DISTANCES: dict[str, Callable[[Array, Array], Array]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
    "star": _star,
}


def coverage(shape: str, x: Array, y: Array, *, radius: float, softness: float) -> Array:
    """How much of each point a shape at the origin covers, in [0, 1].

    ``x``, ``y``, ``radius`` (half the width) and ``softness`` (how wide the edge is: one pixel for
    an anti-aliased picture, more for a blurred one) are in one unit; ``x`` and ``y`` broadcast.
    """
    distance = SIGNED_DISTANCES[shape](x / radius, y / radius) * (radius / softness)
    opacity: Array = np.clip(0.5 - distance, 0.0, 1.0)
    return opacity


# --- what there is to see ------------------------------------------------------------------------


@dataclass(frozen=True)
class ShapesConfig:
    """Which scenes there are, and how many of each split.

    Args:
        grid: cells a side, 2 or 3.
        max_count: the most objects of a ``count`` sentence.
        jitter: how far an object may stand off the middle of its cell, in cells.
        num_test: scenes of the test split, and as many of the compositional one.
        seed: another seed draws other scenes, and leaves every sentence in its split.
    """

    grid: int = 3
    families: tuple[str, ...] = ("one", "two", "relation", "count")
    shapes: tuple[str, ...] = ("circle", "square", "triangle", "cross", "star")
    colours: tuple[str, ...] = tuple(PALETTE)
    max_count: int = 5
    jitter: float = 0.04
    num_train: int = 20_000
    num_validation: int = 500
    num_test: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        if self.grid not in (2, 3):
            raise ValueError(f"grid must be 2 or 3, got {self.grid}")
        _require_some("families", self.families, legal=FAMILIES, at_least=1)
        _require_some("shapes", self.shapes, legal=SIGNED_DISTANCES, at_least=2)
        _require_some("colours", self.colours, legal=PALETTE, at_least=2)
        most = min(len(NUMERALS["masculine"]), self.grid**2)
        if not 1 <= self.max_count <= most:
            raise ValueError(
                f"max_count must be 1 to {most} when grid is {self.grid}, got {self.max_count}"
            )
        if not 0 <= self.jitter <= _LARGEST_JITTER:
            raise ValueError(f"jitter must be 0 to {_LARGEST_JITTER}, got {self.jitter}")
        for name in ("num_train", "num_validation", "num_test"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def held_out(self) -> frozenset[tuple[str, str]]:
        """The (colour, shape) that only scenes of the compositional split have.

        One a shape, of another colour each, so that training shows every colour and every shape.
        """
        first = 2 % len(self.shapes)
        shapes = self.shapes[first:] + self.shapes[:first]
        return frozenset(zip(self.colours, shapes, strict=False))


@dataclass(frozen=True)
class SceneObject:
    """One object; ``shift`` (down, right) is how far off its cell's middle it is, in cells."""

    shape: str
    colour: str
    size: str
    row: int
    column: int
    shift: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Scene:
    """The truth: the objects in the order of the sentence, and the relation if it states one."""

    family: str
    objects: tuple[SceneObject, ...]
    sentence: str
    relation: str | None = None


def draw_one(config: ShapesConfig, rng: Random) -> Scene:
    """One object in a named place."""
    cell = _choose(rng, _cells(config))
    scene_object = _draw_object(config, rng, cell)
    return Scene("one", (scene_object,), _placed(scene_object, config))


def draw_two(config: ShapesConfig, rng: Random) -> Scene:
    """Two objects in named places, in reading order: one picture has one sentence."""
    cells = sorted(_choose_distinct(rng, _cells(config), number=2))
    first, second = (_draw_object(config, rng, cell) for cell in cells)
    sentence = f"{_placed(first, config)}, {_placed(second, config)}"
    return Scene("two", (first, second), sentence)


def draw_relation(config: ShapesConfig, rng: Random) -> Scene:
    """Two objects, different in shape or colour, in one row or one column."""
    relation = _choose(rng, tuple(DIRECTIONS))
    line = int(rng.random() * config.grid)
    near, far = sorted(_choose_distinct(rng, range(config.grid), number=2))
    down, right = DIRECTIONS[relation]
    first_place, second_place = (near, far) if down + right < 0 else (far, near)
    cells = [(place, line) if down else (line, place) for place in (first_place, second_place)]
    first = second = _draw_object(config, rng, cells[0])
    while (first.shape, first.colour) == (second.shape, second.colour):
        second = _draw_object(config, rng, cells[1])
    sentence = relation_phrase(
        noun_phrase(first.size, first.colour, first.shape), relation, second.colour, second.shape
    )
    return Scene("relation", (first, second), sentence, relation)


def draw_count(config: ShapesConfig, rng: Random) -> Scene:
    """Some objects alike in shape, colour and size."""
    number = 1 + int(rng.random() * config.max_count)
    model = _draw_object(config, rng, (0, 0))
    objects = tuple(
        replace(model, row=row, column=column, shift=_draw_shift(config, rng))
        for row, column in sorted(_choose_distinct(rng, _cells(config), number=number))
    )
    return Scene("count", objects, counted_phrase(number, model.colour, model.shape))


def render(scene: Scene, *, grid: int, image_size: int) -> Image.Image:
    """The RGB picture of a scene, ``image_size`` pixels a side: anti-aliased shapes on white."""
    pixel = grid / image_size
    points = (np.arange(image_size) + 0.5) * pixel
    picture = np.full((image_size, image_size, 3), BACKGROUND, dtype=np.float64)
    for each in scene.objects:
        # An object lies in its cell; only the soft edge can reach a pixel further.
        rows, columns = (
            slice(max(0, int(place / pixel) - 1), int((place + 1) / pixel) + 2)
            for place in (each.row, each.column)
        )
        opacity = coverage(
            each.shape,
            points[None, columns] - (each.column + 0.5 + each.shift[1]),
            points[rows, None] - (each.row + 0.5 + each.shift[0]),
            radius=SIZES[each.size],
            softness=pixel,
        )[..., None]  # (rows, columns, 1)
        picture[rows, columns] += opacity * (
            np.array(PALETTE[each.colour]) - picture[rows, columns]
        )
    return Image.fromarray(np.rint(picture).astype(np.uint8))


class Shapes:
    """One split of the world; see ``PairDataset``.

    ``attributes`` of a pair are ``family`` and ``objects``: "small red circle 0 2; ...", with row
    and column. A scene of the compositional split has an object of ``ShapesConfig.held_out``, no
    other scene has one; the hash of its sentence says where any other scene belongs.
    """

    def __init__(self, config: ShapesConfig, *, split: str, image_size: int) -> None:
        require_split(split)
        if image_size < SMALLEST_IMAGE:
            raise ValueError(f"image_size must be at least {SMALLEST_IMAGE}, got {image_size}")
        self.config = config
        self.split = split
        self.image_size = image_size
        world = [WORLD_VERSION, PALETTE, SIZES, asdict(config), split, image_size]
        self.digest = hashlib.sha256(json.dumps(world, sort_keys=True).encode()).hexdigest()

    def __len__(self) -> int:
        size = "test" if self.split == "compositional" else self.split
        length: int = getattr(self.config, f"num_{size}")
        return length

    def __getitem__(self, index: int) -> Pair:
        scene = self.scene(index)
        objects = "; ".join(
            f"{each.size} {each.colour} {each.shape} {each.row} {each.column}"
            for each in scene.objects
        )
        return Pair(
            key=f"shapes/{self.split}/{index:06d}",
            caption=scene.sentence,
            image=render(scene, grid=self.config.grid, image_size=self.image_size),
            attributes={"family": scene.family, "objects": objects},
        )

    def scene(self, index: int) -> Scene:
        """The truth about the pair at ``index``."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.split} has {len(self)} scenes, got index {index}")
        rng = Random(f"{self.config.seed}/{self.split}/{index}")
        for _ in range(_MAX_DRAWS):
            scene = FAMILIES[_choose(rng, self.config.families)](self.config, rng)
            if split_of(scene, self.config) == self.split:
                return scene
        raise ValueError(
            f"families, shapes and colours leave no sentence for {self.split}: allow more of them"
        )

    def distinct(self, number: int) -> list[int]:
        """The first ``number`` indices whose sentences have not come before.

        Raises:
            ValueError: the split has fewer different sentences.
        """
        first: dict[str, int] = {}
        for index in range(len(self)):
            if len(first) == number:
                break
            first.setdefault(self.scene(index).sentence, index)
        if len(first) < number:
            raise ValueError(
                f"{self.split} has {len(first)} different sentences in {len(self)} scenes, "
                f"asked for {number}"
            )
        return list(first.values())


def split_of(scene: Scene, config: ShapesConfig) -> str:
    """The one split that a scene, and its sentence, can be of."""
    if any((each.colour, each.shape) in config.held_out for each in scene.objects):
        return "compositional"
    fraction = hash_fraction(scene.sentence)
    return next(split for split, bound in _SPLIT_BOUNDS.items() if fraction < bound)


def _require_some(
    field: str, names: tuple[str, ...], *, legal: Collection[str], at_least: int
) -> None:
    if len(names) < at_least or len(set(names)) < len(names) or not set(names) <= set(legal):
        raise ValueError(
            f"{field} must be at least {at_least} of {', '.join(legal)}, each once, got {names}"
        )


def _choose(rng: Random, options: Sequence[Option]) -> Option:
    # Of all methods, only random() is promised to give the same in every version of Python.
    return options[int(rng.random() * len(options))]


def _choose_distinct(rng: Random, options: Sequence[Option], *, number: int) -> list[Option]:
    remaining = list(options)
    return [remaining.pop(int(rng.random() * len(remaining))) for _ in range(number)]


def _cells(config: ShapesConfig) -> list[tuple[int, int]]:
    return [(row, column) for row in range(config.grid) for column in range(config.grid)]


def _draw_shift(config: ShapesConfig, rng: Random) -> tuple[float, float]:
    down, right = (config.jitter * (2 * rng.random() - 1) for _ in range(2))
    return down, right


def _draw_object(config: ShapesConfig, rng: Random, cell: tuple[int, int]) -> SceneObject:
    shape, colour = _choose(rng, config.shapes), _choose(rng, config.colours)
    size = _choose(rng, tuple(SIZES))
    return SceneObject(shape, colour, size, *cell, shift=_draw_shift(config, rng))


def _placed(each: SceneObject, config: ShapesConfig) -> str:
    phrase = noun_phrase(each.size, each.colour, each.shape)
    return f"{phrase} {position_phrase(each.row, each.column, grid=config.grid)}"


FAMILIES: dict[str, Callable[[ShapesConfig, Random], Scene]] = {
    "one": draw_one,
    "two": draw_two,
    "relation": draw_relation,
    "count": draw_count,
}
