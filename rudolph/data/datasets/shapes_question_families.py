"""Families of questions about synthetic shapes; ``shapes_questions`` describes them.

To add a family, write a function ``(QuestionSampler) -> Question | None`` and add it to
``QUESTION_FAMILIES``; it returns ``None`` for a failed attempt.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from random import Random

from rudolph.data.datasets.shapes_rendering import SIZES, SceneObject
from rudolph.data.datasets.shapes_russian import (
    noun_phrase,
    numeral,
    plural_phrase,
    position_phrase,
    qualities,
    quality,
)
from rudolph.data.datasets.shapes_scenes import cells, sample_shift
from rudolph.data.datasets.synthetic import Option, choose, choose_distinct, choose_number

# (colour, shape).
ObjectAttributes = tuple[str, str]
# Descriptions name the shape, both, or the colour of a "figure".
_DESCRIPTIONS: tuple[Callable[[ObjectAttributes], tuple[str, ...]], ...] = (
    lambda look: (look[1],),
    lambda look: look,
    lambda look: (look[0], "figure"),
)


@dataclass(frozen=True)
class Question:
    """A question about objects, with its answer.

    ``asked`` holds the (colour, shape) combinations that the question is about.
    """

    family: str
    text: str
    answer: str
    objects: tuple[SceneObject, ...]
    asked: frozenset[ObjectAttributes]


@dataclass(frozen=True)
class QuestionSampler:
    """A sampler of the objects and words of a question.

    Attributes:
        rng: Random number generator of the example.
        grid: Cells per side.
        max_objects: Largest number of objects of a scene.
        jitter: Largest offset of an object from the centre of its cell per axis, in cells.
        looks: (colour, shape) combinations of any object.
        targets: (colour, shape) combinations that a question can be about.
    """

    rng: Random
    grid: int
    max_objects: int
    jitter: float
    looks: Sequence[ObjectAttributes]
    targets: Sequence[ObjectAttributes]

    def choose(self, options: Sequence[Option]) -> Option:
        """Sample one of the options uniformly."""
        return choose(self.rng, options)

    def description(self) -> tuple[ObjectAttributes, tuple[str, ...]]:
        """Sample a target and a description of it: adjectives and a noun."""
        look = self.choose(self.targets)
        return look, self.choose(_DESCRIPTIONS)(look)

    def fitting(self, number: int, *words: str) -> list[ObjectAttributes]:
        """Sample ``number`` (colour, shape) combinations that fit a description."""
        looks = [look for look in self.looks if fits(look, words)]
        return [self.choose(looks) for _ in range(number)]

    def others(
        self,
        most: int,
        *descriptions: Iterable[str],
        least: int = 0,
        near: ObjectAttributes | None = None,
    ) -> list[ObjectAttributes]:
        """Sample (colour, shape) combinations that fit none of the descriptions.

        Each one shares the colour or the shape of ``near`` with probability at least 0.5, if there
        are such combinations.  Answering therefore requires attending to both.

        Args:
            most: Largest number of combinations.
            *descriptions: Words of the descriptions that must not fit.
            least: Smallest number of combinations, unless none is left to choose from.
            near: Combination of the target, if there is one.
        """
        looks = [
            look for look in self.looks if not any(fits(look, words) for words in descriptions)
        ]
        similar = [look for look in looks if near is not None and set(near) & set(look)]
        number = choose_number(self.rng, least, most) if looks else 0
        return [
            self.choose(similar if similar and self.rng.random() < 0.5 else looks)
            for _ in range(number)
        ]

    def place(
        self, looks: Sequence[ObjectAttributes], sizes: Sequence[str] = ()
    ) -> list[SceneObject]:
        """Place objects of these combinations in distinct random cells.

        Args:
            looks: (colour, shape) combination of each object.
            sizes: Sizes of the first objects; the others have random sizes.
        """
        places = choose_distinct(self.rng, cells(self.grid), number=len(looks))
        objects = []
        for number, ((colour, shape), cell) in enumerate(zip(looks, places, strict=True)):
            size = sizes[number] if number < len(sizes) else self.choose(tuple(SIZES))
            shift = sample_shift(self.jitter, self.rng)
            objects.append(SceneObject(shape, colour, size, *cell, shift=shift))
        return objects

    def place_one(
        self, target: ObjectAttributes, *descriptions: Iterable[str]
    ) -> list[SceneObject]:
        """Place the target, returned first, and objects that fit none of the descriptions."""
        others = self.others(self.max_objects - 1, *descriptions, near=target)
        return self.place([target, *others])


def fits(look: ObjectAttributes, words: Iterable[str]) -> bool:
    """Return whether a description is true of a combination; everything is a "figure"."""
    return set(words) <= {*look, "figure"}


def is_clear(target: SceneObject, objects: Iterable[SceneObject], *, grid: int) -> bool:
    """Return whether the name of the target's cell cannot refer to another object.

    "слева сверху" and "в центре" name one cell, but "слева" can also mean the whole left side.
    """
    if grid == 2 or (target.row == 1) == (target.column == 1):
        return True
    others = [each for each in objects if each != target]
    if target.row == 1:
        return all(each.column != target.column for each in others)
    return all(each.row != target.row for each in others)


def _question(
    family: str,
    text: str,
    answer: str,
    objects: Iterable[SceneObject],
    asked: Iterable[ObjectAttributes],
) -> Question:
    in_reading_order = sorted(objects, key=lambda each: (each.row, each.column))
    return Question(family, text, answer, tuple(in_reading_order), frozenset(asked))


# --- families ------------------------------------------------------------------------------------


def shapes_colour_question(draw: QuestionSampler) -> Question | None:
    """Return a question about the colour of an object identified by its shape or its cell.

    Return ``None`` if the name of the cell is ambiguous.
    """
    target, grid = draw.choose(draw.targets), draw.grid
    if draw.rng.random() < 0.5:
        shape = target[1]
        first, *others = draw.place_one(target, (shape,))
        text = f"какого цвета {noun_phrase(shape)}?"
    else:
        first, *others = draw.place_one(target)
        if not is_clear(first, others, grid=grid):
            return None
        text = f"какого цвета фигура {position_phrase(first.row, first.column, grid=grid)}?"
    return _question("colour", text, quality(target[0]), [first, *others], [target])


def shapes_shape_question(draw: QuestionSampler) -> Question | None:
    """Return a question about the shape of an object identified by its colour or its cell.

    Return ``None`` if the name of the cell is ambiguous.
    """
    target, grid = draw.choose(draw.targets), draw.grid
    if draw.rng.random() < 0.5:
        colour = target[0]
        first, *others = draw.place_one(target, (colour,))
        text = f"какая фигура {quality(colour, 'figure')}?"
    else:
        first, *others = draw.place_one(target)
        if not is_clear(first, others, grid=grid):
            return None
        text = f"какая фигура {position_phrase(first.row, first.column, grid=grid)}?"
    return _question("shape", text, noun_phrase(target[1]), [first, *others], [target])


def shapes_size_question(draw: QuestionSampler) -> Question:
    """Return a question about the size of the only object that fits a description."""
    target, words = draw.description()
    first, *others = draw.place_one(target, words)
    text = f"какого размера {noun_phrase(*words)}?"
    return _question("size", text, quality(first.size), [first, *others], [target])


def shapes_position_question(draw: QuestionSampler) -> Question:
    """Return a question about the cell of the only object that fits a description."""
    target, words = draw.description()
    first, *others = draw.place_one(target, words)
    answer = position_phrase(first.row, first.column, grid=draw.grid)
    return _question("position", f"где {noun_phrase(*words)}?", answer, [first, *others], [target])


def shapes_count_question(draw: QuestionSampler) -> Question:
    """Return a question about the number of objects that fit a description.

    A quarter of the questions count all objects.
    """
    target, words = draw.description()
    most = draw.max_objects
    if draw.rng.random() < 0.25:
        looks = draw.fitting(choose_number(draw.rng, 1, most), "figure")
        answer = numeral(len(looks), "figure")
        return _question("count", "сколько всего фигур?", answer, draw.place(looks), looks)
    number = choose_number(draw.rng, 0, most)
    counted = draw.fitting(number, *words)
    # At least one object, because an empty image would reveal the answer.
    others = draw.others(most - number, words, least=int(number == 0), near=target)
    text = f"сколько {plural_phrase(*words, case='genitive')}?"
    asked = [*counted, target] if words == target else counted
    answer = numeral(number, words[-1])
    return _question("count", text, answer, draw.place([*counted, *others]), asked)


def shapes_existence_question(draw: QuestionSampler) -> Question:
    """Return a yes-no question about whether an object of a colour and a shape exists."""
    target = draw.choose(draw.targets)
    is_there = draw.rng.random() < 0.5
    found = draw.fitting(int(is_there), *target)
    most = draw.max_objects - len(found)
    others = draw.others(most, target, least=1 - len(found), near=target)
    text = f"есть ли {noun_phrase(*target)}?"
    objects = draw.place([*found, *others])
    return _question("existence", text, "да" if is_there else "нет", objects, [target])


def shapes_comparison_question(draw: QuestionSampler) -> Question:
    """Return a question that compares two numbers of objects or the sizes of two objects."""
    form = draw.choose(("which", "whether", "larger"))
    return _ask_larger(draw) if form == "larger" else _ask_more(draw, form)


def _ask_more(draw: QuestionSampler, form: str) -> Question:
    is_of_colours = draw.rng.random() < 0.5
    kinds = tuple(dict.fromkeys(look[0 if is_of_colours else 1] for look in draw.looks))
    first, second = choose_distinct(draw.rng, kinds, number=2)
    name = qualities if is_of_colours else _many
    most = draw.max_objects
    # Sign of the difference of the numbers; "whether" repeats 1, so that "да" is as frequent.
    side = draw.choose((1, -1, 0) if form == "which" else (1, 1, -1, 0))
    numbers = draw.choose(
        [
            (one, other)
            for one, other in product(range(1, most), repeat=2)
            if one + other <= most and (one > other) - (one < other) == side
        ]
    )
    counted = [*draw.fitting(numbers[0], first), *draw.fitting(numbers[1], second)]
    objects = draw.place([*counted, *draw.others(most - sum(numbers), (first,), (second,))])
    if form == "whether":
        subject = f"{name(first)} фигур" if is_of_colours else name(first)
        text = f"больше ли {subject}, чем {name(second)}?"
        answer = "да" if side > 0 else "нет"
    else:
        what = "каких фигур" if is_of_colours else "чего"
        text = f"{what} больше: {name(first)} или {name(second)}?"
        answer = {1: name(first), -1: name(second), 0: "поровну"}[side]
    return _question("comparison", text, answer, objects, counted)


def _ask_larger(draw: QuestionSampler) -> Question:
    target = draw.choose(draw.targets)
    pair = [target, draw.choose([look for look in draw.looks if look != target])]
    first, second = choose_distinct(draw.rng, pair, number=2)
    sizes = choose_distinct(draw.rng, tuple(SIZES), number=2)
    others = draw.others(draw.max_objects - 2, first, second)
    objects = draw.place([first, second, *others], sizes)
    text = f"что больше: {noun_phrase(*first)} или {noun_phrase(*second)}?"
    answer = noun_phrase(*(first if sizes[0] == "large" else second))
    return _question("comparison", text, answer, objects, pair)


def _many(shape: str) -> str:
    return plural_phrase(shape, case="genitive")


QUESTION_FAMILIES: dict[str, Callable[[QuestionSampler], Question | None]] = {
    "colour": shapes_colour_question,
    "shape": shapes_shape_question,
    "size": shapes_size_question,
    "count": shapes_count_question,
    "position": shapes_position_question,
    "comparison": shapes_comparison_question,
    "existence": shapes_existence_question,
}
