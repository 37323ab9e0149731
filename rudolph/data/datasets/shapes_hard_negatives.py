"""Hard negatives of scenes: scenes that differ from a given one in exactly one thing.

A change alters the colour, shape, size or cell of one object, the number of objects, or the
relation between them.  A change that the sentence does not express gives no negative, because the
sentence would be true of both images.

To add a change, write a function ``(Scene, ShapesConfig, Random) -> Iterator[Scene]`` and add it
to ``CHANGES``.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import zip_longest
from random import Random
from typing import Any, NamedTuple

from rudolph.data.datasets.shapes_rendering import SIZES, SceneObject
from rudolph.data.datasets.shapes_scenes import (
    DIRECTIONS,
    Scene,
    ShapesConfig,
    cells,
    describe_scene,
    related_cells,
    sample_shift,
)
from rudolph.data.datasets.synthetic import choose_distinct


class HardNegative(NamedTuple):
    """A scene, and the kind of change by which it differs, a key of ``CHANGES``."""

    changed: str
    scene: Scene


def hard_negatives_of(scene: Scene, config: ShapesConfig, rng: Random) -> list[HardNegative]:
    """Return all hard negatives of a scene, taking the kinds of change in turn.

    The order within each kind is random.  All sentences differ from one another and from the
    sentence of the scene.
    """
    groups = []
    for changed, change in CHANGES.items():
        negatives = [HardNegative(changed, other) for other in change(scene, config, rng)]
        groups.append(choose_distinct(rng, negatives, number=len(negatives)))
    interleaved = [
        negative
        for round_of_negatives in zip_longest(*groups)
        for negative in round_of_negatives
        if negative is not None
    ]
    first_of_sentence: dict[str, HardNegative] = {}
    for negative in interleaved:
        if negative.scene.sentence != scene.sentence:
            first_of_sentence.setdefault(negative.scene.sentence, negative)
    return list(first_of_sentence.values())


def other_colours(scene: Scene, config: ShapesConfig, _: Random) -> Iterator[Scene]:
    """Yield scenes with another colour of one object or, in a count, of all objects."""
    return _repainted(scene, config, "colour", config.colours)


def other_shapes(scene: Scene, config: ShapesConfig, _: Random) -> Iterator[Scene]:
    """Yield scenes with another shape of one object or, in a count, of all objects."""
    return _repainted(scene, config, "shape", config.shapes)


def other_sizes(scene: Scene, config: ShapesConfig, _: Random) -> Iterator[Scene]:
    """Yield scenes with the other size of one object."""
    return _repainted(scene, config, "size", tuple(SIZES))


def other_positions(scene: Scene, config: ShapesConfig, _: Random) -> Iterator[Scene]:
    """Yield scenes with one object moved to a free cell, if their sentences name cells."""
    if scene.family not in ("one", "two"):
        return
    occupied = {(scene_object.row, scene_object.column) for scene_object in scene.objects}
    for index, scene_object in enumerate(scene.objects):
        for row, column in cells(config.grid):
            if (row, column) not in occupied:
                moved = replace(scene_object, row=row, column=column)
                objects = [*scene.objects[:index], moved, *scene.objects[index + 1 :]]
                yield describe_scene(scene.family, _in_reading_order(objects), config)


def other_numbers(scene: Scene, config: ShapesConfig, rng: Random) -> Iterator[Scene]:
    """Yield variants of a counted scene, with objects removed or added."""
    if scene.family != "count":
        return
    occupied = {(scene_object.row, scene_object.column) for scene_object in scene.objects}
    free = [cell for cell in cells(config.grid) if cell not in occupied]
    for number in range(1, config.max_count + 1):
        kept = choose_distinct(rng, scene.objects, number=min(number, len(scene.objects)))
        added = [
            replace(kept[0], row=row, column=column, shift=sample_shift(config.jitter, rng))
            for row, column in choose_distinct(rng, free, number=number - len(kept))
        ]
        yield describe_scene("count", _in_reading_order([*kept, *added]), config)


def other_relations(scene: Scene, config: ShapesConfig, _: Random) -> Iterator[Scene]:
    """Yield scenes with the same two objects in every relation.

    Both objects keep their positions along the row or column, and its index stays the same.
    """
    if scene.relation is None:
        return
    first, second = scene.objects
    line, *positions = (
        (first.row, first.column, second.column)
        if first.row == second.row
        else (first.column, first.row, second.row)
    )
    for relation in DIRECTIONS:
        objects = [
            replace(scene_object, row=row, column=column)
            for scene_object, (row, column) in zip(
                scene.objects, related_cells(relation, line, positions), strict=True
            )
        ]
        yield describe_scene("relation", objects, config, relation=relation)


def _repainted(
    scene: Scene, config: ShapesConfig, field: str, options: Sequence[str]
) -> Iterator[Scene]:
    indices = range(len(scene.objects))
    for group in [indices] if scene.family == "count" else [[index] for index in indices]:
        for option in options:
            change: dict[str, Any] = {field: option}
            objects = [
                replace(scene_object, **change) if index in group else scene_object
                for index, scene_object in enumerate(scene.objects)
            ]
            if scene.relation is None or not _look_alike(*objects):
                yield describe_scene(scene.family, objects, config, relation=scene.relation or "")


def _look_alike(first: SceneObject, second: SceneObject) -> bool:
    return (first.shape, first.colour) == (second.shape, second.colour)


def _in_reading_order(objects: Sequence[SceneObject]) -> list[SceneObject]:
    return sorted(objects, key=lambda scene_object: (scene_object.row, scene_object.column))


CHANGES: dict[str, Callable[[Scene, ShapesConfig, Random], Iterator[Scene]]] = {
    "colour": other_colours,
    "shape": other_shapes,
    "size": other_sizes,
    "place": other_positions,
    "number": other_numbers,
    "relation": other_relations,
}
