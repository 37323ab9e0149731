"""Scenes of synthetic shapes: sampling of their objects, and their sentences.

``shapes`` describes the families.  To add one, write a function that samples its scenes and add it
to ``SCENE_FAMILIES``.  Write its sentence function and add it to ``SENTENCES``.  Add its check to
``shapes_checker.SCENE_CHECKS`` and its sentences to ``shapes.is_sentence``.  Add further changes
of its scenes to ``shapes_hard_negatives``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Literal

from rudolph.data.datasets.shapes_rendering import PALETTE, SIGNED_DISTANCES, SIZES, SceneObject
from rudolph.data.datasets.shapes_russian import (
    NUMERALS,
    counted_phrase,
    noun_phrase,
    position_phrase,
    relation_phrase,
)
from rudolph.data.datasets.synthetic import (
    choose,
    choose_distinct,
    choose_number,
    require_choices,
    require_within,
    split_by_hash,
)
from rudolph.files.constraints import Count, check

# Direction (down, right) from the second object of a relation to the first.
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "above": (-1, 0), "below": (1, 0)}

LARGEST_JITTER = 0.05

Cell = tuple[int, int]


@dataclass(frozen=True)
class ShapesConfig:
    """Configuration of the scenes, and the size of each split.

    Attributes:
        grid: Cells per side, 2 or 3.
        families: Keys of ``SCENE_FAMILIES``.
        shapes: Keys of ``SIGNED_DISTANCES``, at least two.
        colours: Keys of ``PALETTE``, at least two.
        max_count: Largest number of objects in a ``count`` sentence.
        jitter: Largest offset of an object from the centre of its cell per axis, in cells.
        num_train: Number of scenes in the training split.
        num_validation: Number of scenes in the validation split.
        num_test: Number of scenes in the test split and in the compositional split.
        seed: Seed of the scenes; it does not change the split of a sentence.
    """

    grid: Literal[2, 3] = 3
    families: tuple[str, ...] = ("one", "two", "relation", "count")
    shapes: tuple[str, ...] = ("circle", "square", "triangle", "cross", "star")
    colours: tuple[str, ...] = tuple(PALETTE)
    max_count: int = 5
    jitter: float = 0.04
    num_train: Count = 20_000
    num_validation: Count = 500
    num_test: Count = 500
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for an invalid field."""
        check(self)
        require_choices("families", self.families, legal=SCENE_FAMILIES, at_least=1)
        require_choices("shapes", self.shapes, legal=SIGNED_DISTANCES, at_least=2)
        require_choices("colours", self.colours, legal=PALETTE, at_least=2)
        max_objects = min(len(NUMERALS["masculine"]), self.grid**2)
        if not 1 <= self.max_count <= max_objects:
            raise ValueError(
                f"max_count must be 1 to {max_objects} when grid is {self.grid}, got "
                f"{self.max_count}"
            )
        require_within("jitter", self.jitter, 0, LARGEST_JITTER)

    @property
    def held_out(self) -> frozenset[tuple[str, str]]:
        """Return the (colour, shape) combinations that only the compositional split has."""
        return held_out_combinations(self.colours, self.shapes)


def held_out_combinations(
    colours: Sequence[str], shapes: Sequence[str]
) -> frozenset[tuple[str, str]]:
    """Return (colour, shape) combinations in which no colour and no shape occurs twice.

    Training therefore still shows every colour and every shape.
    """
    first = 2 % len(shapes)
    return frozenset(zip(colours, [*shapes[first:], *shapes[:first]], strict=False))


@dataclass(frozen=True)
class Scene:
    """A scene: objects in sentence order, the sentence, and the relation if it states one."""

    family: str
    objects: tuple[SceneObject, ...]
    sentence: str
    relation: str | None = None


def describe_scene(
    family: str, objects: Sequence[SceneObject], config: ShapesConfig, *, relation: str = ""
) -> Scene:
    """Return the scene of these objects, with the sentence of its family."""
    sentence = SENTENCES[family](objects, config.grid, relation)
    return Scene(family, tuple(objects), sentence, relation or None)


def objects_text(objects: Sequence[SceneObject]) -> str:
    """Return all objects with row and column, e.g. "small red circle 0 2; large blue star 1 1"."""
    return "; ".join(
        f"{scene_object.size} {scene_object.colour} {scene_object.shape} {scene_object.row} "
        f"{scene_object.column}"
        for scene_object in objects
    )


def split_of_scene(scene: Scene, config: ShapesConfig) -> str:
    """Return the only split to which a scene and its sentence can belong."""
    if any(
        (scene_object.colour, scene_object.shape) in config.held_out
        for scene_object in scene.objects
    ):
        return "compositional"
    return split_by_hash(scene.sentence)


# --- sampling ------------------------------------------------------------------------------------


def sample_one(config: ShapesConfig, rng: Random) -> Scene:
    """Sample one object in a named cell."""
    cell = choose(rng, cells(config.grid))
    return describe_scene("one", [sample_object(config, rng, cell)], config)


def sample_two(config: ShapesConfig, rng: Random) -> Scene:
    """Sample two objects in named cells.

    They are in reading order, so that an image has only one such sentence.
    """
    positions = sorted(choose_distinct(rng, cells(config.grid), number=2))
    return describe_scene("two", [sample_object(config, rng, cell) for cell in positions], config)


def sample_relation(config: ShapesConfig, rng: Random) -> Scene:
    """Sample two objects that differ in shape or colour, in one row or one column."""
    relation = choose(rng, tuple(DIRECTIONS))
    line = choose_number(rng, 0, config.grid - 1)
    positions = choose_distinct(rng, range(config.grid), number=2)
    first_cell, second_cell = related_cells(relation, line, positions)
    first = second = sample_object(config, rng, first_cell)
    while (first.shape, first.colour) == (second.shape, second.colour):
        second = sample_object(config, rng, second_cell)
    return describe_scene("relation", [first, second], config, relation=relation)


def sample_count(config: ShapesConfig, rng: Random) -> Scene:
    """Sample some objects of the same shape, colour and size."""
    number = choose_number(rng, 1, config.max_count)
    prototype = sample_object(config, rng, (0, 0))
    objects = [
        replace(prototype, row=row, column=column, shift=sample_shift(config.jitter, rng))
        for row, column in sorted(choose_distinct(rng, cells(config.grid), number=number))
    ]
    return describe_scene("count", objects, config)


def cells(grid: int) -> list[Cell]:
    """Return all (row, column) cells in reading order."""
    return [(row, column) for row in range(grid) for column in range(grid)]


def related_cells(relation: str, line: int, positions: Sequence[int]) -> tuple[Cell, Cell]:
    """Return the cells of the first and the second object of a relation.

    Args:
        relation: A key of ``DIRECTIONS``.
        line: Index of the common row or column.
        positions: Two distinct positions in that row or column.
    """
    down, right = DIRECTIONS[relation]
    near, far = sorted(positions)
    first, second = (near, far) if down + right < 0 else (far, near)
    return ((first, line), (second, line)) if down else ((line, first), (line, second))


def sample_object(config: ShapesConfig, rng: Random, cell: Cell) -> SceneObject:
    """Sample an object of any shape, colour and size for a cell."""
    shape, colour = choose(rng, config.shapes), choose(rng, config.colours)
    size = choose(rng, tuple(SIZES))
    return SceneObject(shape, colour, size, *cell, shift=sample_shift(config.jitter, rng))


def sample_shift(jitter: float, rng: Random) -> tuple[float, float]:
    """Sample the offset (down, right) of an object from the centre of its cell, in cells."""
    down, right = (jitter * (2 * rng.random() - 1) for _ in range(2))
    return down, right


SCENE_FAMILIES: dict[str, Callable[[ShapesConfig, Random], Scene]] = {
    "one": sample_one,
    "two": sample_two,
    "relation": sample_relation,
    "count": sample_count,
}


# --- sentences -----------------------------------------------------------------------------------


def object_phrase(scene_object: SceneObject, grid: int) -> str:
    """Return the phrase of an object in its cell, e.g. "большой синий круг в центре"."""
    phrase = noun_phrase(scene_object.size, scene_object.colour, scene_object.shape)
    return f"{phrase} {position_phrase(scene_object.row, scene_object.column, grid=grid)}"


def _describe_positions(objects: Sequence[SceneObject], grid: int, _: str) -> str:
    return ", ".join(object_phrase(scene_object, grid) for scene_object in objects)


def _describe_relation(objects: Sequence[SceneObject], _: int, relation: str) -> str:
    first, second = objects
    phrase = noun_phrase(first.size, first.colour, first.shape)
    return relation_phrase(phrase, relation, second.colour, second.shape)


def _describe_count(objects: Sequence[SceneObject], _: int, __: str) -> str:
    return counted_phrase(len(objects), objects[0].colour, objects[0].shape)


# Sentence functions of (objects, grid, relation).
SENTENCES: dict[str, Callable[[Sequence[SceneObject], int, str], str]] = {
    "one": _describe_positions,
    "two": _describe_positions,
    "relation": _describe_relation,
    "count": _describe_count,
}
