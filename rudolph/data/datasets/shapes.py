"""A synthetic dataset with exact ground truth: coloured shapes on a grid, with Russian captions.

A *scene* has a few objects, each with a shape, a colour, a size and a grid cell.  A *family* is a
type of sentence.  The sentence states everything that an image of it must show:

========  =========================================  ===========================================
family    example sentence                           statement
========  =========================================  ===========================================
one       большой синий круг в центре                one object with all its attributes
two       ... круг слева сверху, ... крест справа    two objects with all their attributes
relation  маленький чёрный крест под синим кругом    two objects in one row or column and their
                                                     order; the second may have any size
count     пять жёлтых квадратов                      the number; cells and common size are free
========  =========================================  ===========================================

Scene ``index`` depends only on the configuration, the split and the index.  ``shapes_scenes``
samples scenes and ``shapes_rendering`` renders them.  ``shapes_russian`` has the words,
``shapes_hard_negatives`` changes one thing in a scene, and ``shapes_checker`` reads images.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import lru_cache
from itertools import product
from random import Random

from rudolph.data.datasets.shapes_hard_negatives import hard_negatives_of
from rudolph.data.datasets.shapes_rendering import (
    PALETTE,
    SIZES,
    SceneObject,
    render,
    require_readable_size,
)
from rudolph.data.datasets.shapes_russian import counted_phrase, noun_phrase, relation_phrase
from rudolph.data.datasets.shapes_scenes import (
    DIRECTIONS,
    SCENE_FAMILIES,
    Cell,
    Scene,
    ShapesConfig,
    cells,
    describe_scene,
    object_phrase,
    objects_text,
    split_of_scene,
)
from rudolph.data.datasets.synthetic import (
    choose,
    example_rng,
    json_digest,
    num_examples,
    sample_until,
)
from rudolph.data.pairs import Pair, require_split

__all__ = ["Shapes", "ShapesConfig", "is_sentence", "true_sentences"]

# Part of every digest; increment it when the same configuration gives other pairs.
WORLD_VERSION = 1


class Shapes:
    """One split of the scenes; see ``PairDataset``, ``HasHardNegatives`` and ``HasClasses``.

    The ``attributes`` of a pair are ``family`` and ``objects``, e.g. "small red circle 0 2; ...",
    with row and column.  The classes are the (colour, shape) combinations of scenes with exactly
    one object.

    Every scene of the compositional split has an object with a combination in
    ``ShapesConfig.held_out``; no scene of another split has one.  The hash of the sentence decides
    the split of all other scenes.
    """

    def __init__(self, config: ShapesConfig, *, split: str, image_size: int) -> None:
        require_split(split)
        require_readable_size(image_size)
        self.config = config
        self.split = split
        self.image_size = image_size
        self.digest = json_digest(WORLD_VERSION, PALETTE, SIZES, asdict(config), split, image_size)
        self._combinations = tuple(product(config.colours, config.shapes))

    def __len__(self) -> int:
        """Return the number of pairs."""
        return num_examples(self.config, self.split)

    def __getitem__(self, index: int) -> Pair:
        """Return the pair at ``index``."""
        return self._pair(f"shapes/{self.split}/{index:06d}", self.scene(index))

    def scene(self, index: int) -> Scene:
        """Return the scene of the pair at ``index``."""
        config = self.config
        rng = example_rng(
            index, seed=config.seed, split=self.split, length=len(self), unit="scenes"
        )
        return sample_until(
            lambda: SCENE_FAMILIES[choose(rng, config.families)](config, rng),
            lambda scene: split_of_scene(scene, config) == self.split,
            error_message=f"families, shapes and colours: no sentence falls into {self.split}. "
            "Allow more of them",
        )

    def sentences(self, index: int) -> list[str]:
        """Return every sentence that is true of the image at ``index``, including its caption."""
        return true_sentences(self.scene(index).objects, self.config)

    def hard_negatives(self, index: int, number: int) -> list[Pair]:
        """Return up to ``number`` pairs that differ from the pair at ``index`` in one thing.

        Their attribute ``changed`` is the kind of change, a key of
        ``shapes_hard_negatives.CHANGES``.  The pairs for a smaller ``number`` are a prefix of
        those for a larger one.
        """
        rng = Random(f"{self.config.seed}/{self.split}/{index}/rivals")
        negatives = hard_negatives_of(self.scene(index), self.config, rng)
        return [
            self._pair(
                f"shapes/{self.split}/{index:06d}/rival{rank}",
                negative.scene,
                changed=negative.changed,
            )
            for rank, negative in enumerate(negatives[:number])
        ]

    @property
    def classes(self) -> tuple[str, ...]:
        """Return a caption per combination of colour and shape, e.g. "один красный круг"."""
        return tuple(counted_phrase(1, colour, shape) for colour, shape in self._combinations)

    def class_index(self, index: int) -> int | None:
        """Return the class of the pair at ``index``, or None if its scene has several objects."""
        objects = self.scene(index).objects
        if len(objects) > 1:
            return None
        return self._combinations.index((objects[0].colour, objects[0].shape))

    def distinct(self, number: int) -> list[int]:
        """Return the first ``number`` indices with distinct sentences.

        Raises:
            ValueError: If the split has fewer distinct sentences.
        """
        first_indices: dict[str, int] = {}
        for index in range(len(self)):
            if len(first_indices) == number:
                break
            first_indices.setdefault(self.scene(index).sentence, index)
        if len(first_indices) < number:
            raise ValueError(
                f"{self.split} has {len(first_indices)} different sentences in {len(self)} "
                "scenes, "
                f"expected at least {number}"
            )
        return list(first_indices.values())

    def _pair(self, key: str, scene: Scene, **attributes: str) -> Pair:
        return Pair(
            key=key,
            caption=scene.sentence,
            image=render(scene.objects, grid=self.config.grid, image_size=self.image_size),
            attributes={
                "family": scene.family,
                "objects": objects_text(scene.objects),
                **attributes,
            },
        )


def is_sentence(text: str, config: ShapesConfig) -> bool:
    """Return whether the dataset can generate exactly this sentence, in any split.

    >>> config = ShapesConfig()
    >>> is_sentence("пять жёлтых квадратов", config), is_sentence("пять жёлтых кругом", config)
    (True, False)
    """
    cell_of_phrase = _object_phrases(config)
    first, comma, second = text.partition(", ")
    if comma:
        is_known = (
            "two" in config.families and first in cell_of_phrase and second in cell_of_phrase
        )
        # Objects are in reading order, and never two in one cell.
        return is_known and cell_of_phrase[first] < cell_of_phrase[second]
    return text in _short_sentences(config)


def true_sentences(objects: Sequence[SceneObject], config: ShapesConfig) -> list[str]:
    """Return every sentence that is true of exactly these objects, in the order of families.

    One image can have several sentences: two objects in a row or column have a relation in each
    direction, and both have named cells.  The image does not determine which sentence is the
    caption.

    >>> true_sentences([SceneObject("circle", "red", "small", 0, 1)], ShapesConfig())
    ['маленький красный круг сверху', 'один красный круг']
    """
    ordered = sorted(objects, key=lambda scene_object: (scene_object.row, scene_object.column))
    scenes = []
    if len(ordered) in (1, 2):
        scenes.append(describe_scene("one" if len(ordered) == 1 else "two", ordered, config))
    if len(ordered) == 2:
        for pair in (ordered, ordered[::-1]):
            relation = _relation(*pair)
            if relation is not None:
                scenes.append(describe_scene("relation", pair, config, relation=relation))
    shapes_and_colours = {(scene_object.shape, scene_object.colour) for scene_object in ordered}
    if len(shapes_and_colours) == 1 and len(ordered) <= config.max_count:
        scenes.append(describe_scene("count", ordered, config))
    return [scene.sentence for scene in scenes if scene.family in config.families]


def _relation(first: SceneObject, second: SceneObject) -> str | None:
    """Return the relation of the first object to the second.

    Return None if they are equal in shape and colour, or share neither a row nor a column.
    """
    if (first.shape, first.colour) == (second.shape, second.colour):
        return None
    down, right = first.row - second.row, first.column - second.column
    direction = ((down > 0) - (down < 0), (right > 0) - (right < 0))
    return {offset: relation for relation, offset in DIRECTIONS.items()}.get(direction)


@lru_cache(maxsize=4)
def _object_phrases(config: ShapesConfig) -> dict[str, Cell]:
    """Return a mapping from the phrase of every object in every cell to that cell."""
    return {
        object_phrase(SceneObject(shape, colour, size, *cell), config.grid): cell
        for shape, colour, size in product(config.shapes, config.colours, SIZES)
        for cell in cells(config.grid)
    }


@lru_cache(maxsize=4)
def _short_sentences(config: ShapesConfig) -> frozenset[str]:
    """Return all sentences without a comma."""
    combinations = tuple(product(config.colours, config.shapes))
    families: dict[str, Iterable[str]] = {
        "one": _object_phrases(config),
        "relation": (
            relation_phrase(noun_phrase(size, *first), relation, *second)
            for size, first, relation, second in product(
                SIZES, combinations, DIRECTIONS, combinations
            )
            if first != second
        ),
        "count": (
            counted_phrase(number, *combination)
            for number, combination in product(range(1, config.max_count + 1), combinations)
        ),
    }
    return frozenset(
        sentence for family in config.families for sentence in families.get(family, ())
    )
