"""A made world with exact truth: coloured shapes on a grid and the Russian sentences about them.

A *scene* is a few objects, each with a shape, a colour, a size and a cell of the grid. A *family*
is a kind of sentence, and the sentence states all that is asked of an image of it:

========  =========================================  ===========================================
family    a sentence                                 what it states
========  =========================================  ===========================================
one       большой синий круг в центре                one object, everything of it
two       ... круг слева сверху, ... крест справа    two objects, everything of them
relation  маленький чёрный крест под синим кругом    two objects of one row or column and their
                                                     order; the second may have any size
count     пять жёлтых квадратов                      how many, in any cells, of any one size
========  =========================================  ===========================================

Scene ``index`` of a split depends on the configuration, the split and the index alone.
``shapes_scenes`` draws scenes, ``shapes_images`` paints them, ``shapes_russian`` has the words,
``shapes_hard_negatives`` changes one thing of a scene, and ``shapes_checker`` reads images back.
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
    FAMILIES,
    Cell,
    Scene,
    ShapesConfig,
    cells,
    describe_scene,
    objects_text,
    placed_phrase,
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

# Counted up whenever the same configuration would give other images or sentences than before.
WORLD_VERSION = 1


class Shapes:
    """One split of the world; see ``PairDataset``, ``Ranked`` and ``Classified``.

    ``attributes`` of a pair are ``family`` and ``objects``: "small red circle 0 2; ...", with row
    and column. A scene of the compositional split has an object of ``ShapesConfig.held_out``, no
    other scene has one; the hash of its sentence says where any other scene belongs. The classes
    are a colour and a shape, of the scenes with exactly one object.
    """

    def __init__(self, config: ShapesConfig, *, split: str, image_size: int) -> None:
        require_split(split)
        require_readable_size(image_size)
        self.config = config
        self.split = split
        self.image_size = image_size
        self.digest = json_digest(WORLD_VERSION, PALETTE, SIZES, asdict(config), split, image_size)
        self._looks = tuple(product(config.colours, config.shapes))

    def __len__(self) -> int:
        return num_examples(self.config, self.split)

    def __getitem__(self, index: int) -> Pair:
        return self._pair(f"shapes/{self.split}/{index:06d}", self.scene(index))

    def scene(self, index: int) -> Scene:
        """The truth about the pair at ``index``."""
        config = self.config
        rng = example_rng(
            index, seed=config.seed, split=self.split, length=len(self), unit="scenes"
        )
        return sample_until(
            lambda: FAMILIES[choose(rng, config.families)](config, rng),
            lambda scene: split_of_scene(scene, config) == self.split,
            otherwise=f"families, shapes and colours leave no sentence for {self.split}: "
            "allow more of them",
        )

    def sentences(self, index: int) -> list[str]:
        """Every sentence that is true of the image at ``index``, its caption among them."""
        return true_sentences(self.scene(index).objects, self.config)

    def hard_negatives(self, index: int, number: int) -> list[Pair]:
        """Pairs that differ from the one at ``index`` in one thing; fewer if there are no more.

        Their attribute ``changed`` says in which: a key of ``shapes_hard_negatives.CHANGES``. The
        first of many are those of few.
        """
        rng = Random(f"{self.config.seed}/{self.split}/{index}/rivals")
        found = hard_negatives_of(self.scene(index), self.config, rng)
        return [
            self._pair(
                f"shapes/{self.split}/{index:06d}/rival{place}", each.scene, changed=each.changed
            )
            for place, each in enumerate(found[:number])
        ]

    @property
    def classes(self) -> tuple[str, ...]:
        """Every colour with every shape: "один красный круг" and so on."""
        return tuple(counted_phrase(1, colour, shape) for colour, shape in self._looks)

    def class_index(self, index: int) -> int | None:
        """The class of a scene with one object, and of no other."""
        objects = self.scene(index).objects
        if len(objects) > 1:
            return None
        return self._looks.index((objects[0].colour, objects[0].shape))

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

    def _pair(self, key: str, scene: Scene, **more: str) -> Pair:
        return Pair(
            key=key,
            caption=scene.sentence,
            image=render(scene.objects, grid=self.config.grid, image_size=self.image_size),
            attributes={
                "family": scene.family,
                "objects": objects_text(scene.objects),
                **more,
            },
        )


def is_sentence(text: str, config: ShapesConfig) -> bool:
    """Whether the world can say this, letter for letter, in any split.

    >>> config = ShapesConfig()
    >>> is_sentence("пять жёлтых квадратов", config), is_sentence("пять жёлтых кругом", config)
    (True, False)
    """
    placed = _placed_phrases(config)
    first, comma, second = text.partition(", ")
    if comma:
        is_known = "two" in config.families and first in placed and second in placed
        # In reading order, and never two objects in one cell.
        return is_known and placed[first] < placed[second]
    return text in _short_sentences(config)


def true_sentences(objects: Sequence[SceneObject], config: ShapesConfig) -> list[str]:
    """Every sentence of the world that is true of just these objects, in the order of families.

    One image can have several: of two objects in a row each is beside the other, and both have
    a place.  Which of them a pair has for its caption cannot be seen in the image.

    >>> true_sentences([SceneObject("circle", "red", "small", 0, 1)], ShapesConfig())
    ['маленький красный круг сверху', 'один красный круг']
    """
    ordered = sorted(objects, key=lambda each: (each.row, each.column))
    told = []
    if len(ordered) in (1, 2):
        told.append(describe_scene("one" if len(ordered) == 1 else "two", ordered, config))
    if len(ordered) == 2:
        for pair in (ordered, ordered[::-1]):
            relation = _relation(*pair)
            if relation is not None:
                told.append(describe_scene("relation", pair, config, relation=relation))
    looks = {(each.shape, each.colour) for each in ordered}
    if len(looks) == 1 and len(ordered) <= config.max_count:
        told.append(describe_scene("count", ordered, config))
    return [scene.sentence for scene in told if scene.family in config.families]


def _relation(first: SceneObject, second: SceneObject) -> str | None:
    """Where the first is, seen from the second; None for equal looks or no line through both."""
    if (first.shape, first.colour) == (second.shape, second.colour):
        return None
    down, right = first.row - second.row, first.column - second.column
    way = ((down > 0) - (down < 0), (right > 0) - (right < 0))
    return {step: relation for relation, step in DIRECTIONS.items()}.get(way)


@lru_cache(maxsize=4)
def _placed_phrases(config: ShapesConfig) -> dict[str, Cell]:
    """All that can be said of one object in a named place, and the cell it stands in."""
    return {
        placed_phrase(SceneObject(shape, colour, size, *cell), config.grid): cell
        for shape, colour, size in product(config.shapes, config.colours, SIZES)
        for cell in cells(config.grid)
    }


@lru_cache(maxsize=4)
def _short_sentences(config: ShapesConfig) -> frozenset[str]:
    """All sentences without a comma."""
    looks = tuple(product(config.colours, config.shapes))
    families: dict[str, Iterable[str]] = {
        "one": _placed_phrases(config),
        "relation": (
            relation_phrase(noun_phrase(size, *first), relation, *second)
            for size, first, relation, second in product(SIZES, looks, DIRECTIONS, looks)
            if first != second
        ),
        "count": (
            counted_phrase(number, *look)
            for number, look in product(range(1, config.max_count + 1), looks)
        ),
    }
    return frozenset(
        sentence for family in config.families for sentence in families.get(family, ())
    )
