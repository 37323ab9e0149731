"""Families of questions about synthetic shapes; ``shapes_questions`` describes them.

To add a family, write a function ``(QuestionSampler) -> Question | None`` and add it to
``QUESTION_FAMILIES``.  The function returns ``None`` for a failed attempt.
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
# A description names the shape, the colour and the shape, or the colour of a "figure".
_DESCRIPTIONS: tuple[Callable[[ObjectAttributes], tuple[str, ...]], ...] = (
    lambda combination: (combination[1],),
    lambda combination: combination,
    lambda combination: (combination[0], "figure"),
)


@dataclass(frozen=True)
class Question:
    """A question about objects, with its answer.

    ``targets`` holds the (colour, shape) combinations that the question is about.
    """

    family: str
    text: str
    answer: str
    objects: tuple[SceneObject, ...]
    targets: frozenset[ObjectAttributes]


@dataclass(frozen=True)
class QuestionSampler:
    """A sampler of the objects and words of a question.

    Attributes:
        rng: Random number generator of the example.
        grid: Cells per side.
        max_objects: Largest number of objects of a scene.
        jitter: Largest offset of an object from the centre of its cell per axis, in cells.
        combinations: (colour, shape) combinations that any object can have.
        targets: (colour, shape) combinations that a question can be about.
    """

    rng: Random
    grid: int
    max_objects: int
    jitter: float
    combinations: Sequence[ObjectAttributes]
    targets: Sequence[ObjectAttributes]

    def choose(self, options: Sequence[Option]) -> Option:
        """Sample one of the options uniformly."""
        return choose(self.rng, options)

    def description(self) -> tuple[ObjectAttributes, tuple[str, ...]]:
        """Sample a target and a description of it: adjectives and a noun."""
        combination = self.choose(self.targets)
        return combination, self.choose(_DESCRIPTIONS)(combination)

    def fitting(self, number: int, *words: str) -> list[ObjectAttributes]:
        """Sample ``number`` (colour, shape) combinations that fit a description."""
        combinations = [
            combination for combination in self.combinations if fits(combination, words)
        ]
        return [self.choose(combinations) for _ in range(number)]

    def others(
        self,
        max_number: int,
        *descriptions: Iterable[str],
        min_number: int = 0,
        similar_to: ObjectAttributes | None = None,
    ) -> list[ObjectAttributes]:
        """Sample (colour, shape) combinations that fit none of the descriptions.

        Each one shares the colour or the shape of ``similar_to`` with probability at least 0.5, if
        there are such combinations.  Answering therefore requires attending to both attributes.

        Args:
            max_number: Largest number of combinations.
            *descriptions: Words of the descriptions that must not fit.
            min_number: Smallest number of combinations, unless none is left to choose from.
            similar_to: Combination of the target, if there is one.
        """
        candidates = [
            combination
            for combination in self.combinations
            if not any(fits(combination, words) for words in descriptions)
        ]
        similar = [
            combination
            for combination in candidates
            if similar_to is not None and set(similar_to) & set(combination)
        ]
        number = choose_number(self.rng, min_number, max_number) if candidates else 0
        return [
            self.choose(similar if similar and self.rng.random() < 0.5 else candidates)
            for _ in range(number)
        ]

    def place(
        self, combinations: Sequence[ObjectAttributes], sizes: Sequence[str] = ()
    ) -> list[SceneObject]:
        """Place objects of these combinations in distinct random cells.

        Args:
            combinations: (colour, shape) combination of each object.
            sizes: Sizes of the first objects; the others have random sizes.
        """
        positions = choose_distinct(self.rng, cells(self.grid), number=len(combinations))
        objects = []
        for number, ((colour, shape), cell) in enumerate(
            zip(combinations, positions, strict=True)
        ):
            size = sizes[number] if number < len(sizes) else self.choose(tuple(SIZES))
            shift = sample_shift(self.jitter, self.rng)
            objects.append(SceneObject(shape, colour, size, *cell, shift=shift))
        return objects

    def place_one(
        self, target: ObjectAttributes, *descriptions: Iterable[str]
    ) -> list[SceneObject]:
        """Place the target, returned first, and objects that fit none of the descriptions."""
        others = self.others(self.max_objects - 1, *descriptions, similar_to=target)
        return self.place([target, *others])


def fits(combination: ObjectAttributes, words: Iterable[str]) -> bool:
    """Return whether a description is true of a combination; everything is a "figure"."""
    return set(words) <= {*combination, "figure"}


def is_unambiguous(target: SceneObject, objects: Iterable[SceneObject], *, grid: int) -> bool:
    """Return whether the name of the target's cell can only refer to the target.

    "слева сверху" and "в центре" name one cell, but "слева" can also mean the whole left side.
    """
    if grid == 2 or (target.row == 1) == (target.column == 1):
        return True
    others = [scene_object for scene_object in objects if scene_object != target]
    if target.row == 1:
        return all(scene_object.column != target.column for scene_object in others)
    return all(scene_object.row != target.row for scene_object in others)


def _question(
    family: str,
    text: str,
    answer: str,
    objects: Iterable[SceneObject],
    targets: Iterable[ObjectAttributes],
) -> Question:
    in_reading_order = sorted(
        objects, key=lambda scene_object: (scene_object.row, scene_object.column)
    )
    return Question(family, text, answer, tuple(in_reading_order), frozenset(targets))


# --- families ------------------------------------------------------------------------------------


def shapes_colour_question(sampler: QuestionSampler) -> Question | None:
    """Return a question about the colour of an object identified by its shape or its cell.

    Return ``None`` if the name of the cell is ambiguous.
    """
    target, grid = sampler.choose(sampler.targets), sampler.grid
    if sampler.rng.random() < 0.5:
        shape = target[1]
        first, *others = sampler.place_one(target, (shape,))
        text = f"какого цвета {noun_phrase(shape)}?"
    else:
        first, *others = sampler.place_one(target)
        if not is_unambiguous(first, others, grid=grid):
            return None
        text = f"какого цвета фигура {position_phrase(first.row, first.column, grid=grid)}?"
    return _question("colour", text, quality(target[0]), [first, *others], [target])


def shapes_shape_question(sampler: QuestionSampler) -> Question | None:
    """Return a question about the shape of an object identified by its colour or its cell.

    Return ``None`` if the name of the cell is ambiguous.
    """
    target, grid = sampler.choose(sampler.targets), sampler.grid
    if sampler.rng.random() < 0.5:
        colour = target[0]
        first, *others = sampler.place_one(target, (colour,))
        text = f"какая фигура {quality(colour, 'figure')}?"
    else:
        first, *others = sampler.place_one(target)
        if not is_unambiguous(first, others, grid=grid):
            return None
        text = f"какая фигура {position_phrase(first.row, first.column, grid=grid)}?"
    return _question("shape", text, noun_phrase(target[1]), [first, *others], [target])


def shapes_size_question(sampler: QuestionSampler) -> Question:
    """Return a question about the size of the only object that fits a description."""
    target, words = sampler.description()
    first, *others = sampler.place_one(target, words)
    text = f"какого размера {noun_phrase(*words)}?"
    return _question("size", text, quality(first.size), [first, *others], [target])


def shapes_position_question(sampler: QuestionSampler) -> Question:
    """Return a question about the cell of the only object that fits a description."""
    target, words = sampler.description()
    first, *others = sampler.place_one(target, words)
    answer = position_phrase(first.row, first.column, grid=sampler.grid)
    return _question("position", f"где {noun_phrase(*words)}?", answer, [first, *others], [target])


def shapes_count_question(sampler: QuestionSampler) -> Question:
    """Return a question about the number of objects that fit a description.

    A quarter of the questions count all objects.
    """
    target, words = sampler.description()
    max_objects = sampler.max_objects
    if sampler.rng.random() < 0.25:
        combinations = sampler.fitting(choose_number(sampler.rng, 1, max_objects), "figure")
        answer = numeral(len(combinations), "figure")
        return _question(
            "count", "сколько всего фигур?", answer, sampler.place(combinations), combinations
        )
    num_counted = choose_number(sampler.rng, 0, max_objects)
    counted_objects = sampler.fitting(num_counted, *words)
    # At least one object, because an empty image would reveal the answer.
    others = sampler.others(
        max_objects - num_counted, words, min_number=int(num_counted == 0), similar_to=target
    )
    text = f"сколько {plural_phrase(*words, case='genitive')}?"
    targets = [*counted_objects, target] if words == target else counted_objects
    answer = numeral(num_counted, words[-1])
    return _question("count", text, answer, sampler.place([*counted_objects, *others]), targets)


def shapes_existence_question(sampler: QuestionSampler) -> Question:
    """Return a yes-no question about whether an object of a colour and a shape exists."""
    target = sampler.choose(sampler.targets)
    exists = sampler.rng.random() < 0.5
    present = sampler.fitting(int(exists), *target)
    max_others = sampler.max_objects - len(present)
    others = sampler.others(max_others, target, min_number=1 - len(present), similar_to=target)
    text = f"есть ли {noun_phrase(*target)}?"
    objects = sampler.place([*present, *others])
    return _question("existence", text, "да" if exists else "нет", objects, [target])


def shapes_comparison_question(sampler: QuestionSampler) -> Question:
    """Return a question that compares two numbers of objects or the sizes of two objects."""
    form = sampler.choose(("which", "whether", "larger"))
    return _compare_sizes(sampler) if form == "larger" else _compare_counts(sampler, form)


def _compare_counts(sampler: QuestionSampler, form: str) -> Question:
    is_of_colours = sampler.rng.random() < 0.5
    attributes = tuple(
        dict.fromkeys(
            combination[0 if is_of_colours else 1] for combination in sampler.combinations
        )
    )
    first, second = choose_distinct(sampler.rng, attributes, number=2)
    phrase = qualities if is_of_colours else _genitive_plural
    max_objects = sampler.max_objects
    # Sign of the difference of the numbers.  "whether" repeats 1, so that "да" is as frequent as
    # "нет".
    sign = sampler.choose((1, -1, 0) if form == "which" else (1, 1, -1, 0))
    numbers = sampler.choose(
        [
            (one, other)
            for one, other in product(range(1, max_objects), repeat=2)
            if one + other <= max_objects and (one > other) - (one < other) == sign
        ]
    )
    counted = [*sampler.fitting(numbers[0], first), *sampler.fitting(numbers[1], second)]
    objects = sampler.place(
        [*counted, *sampler.others(max_objects - sum(numbers), (first,), (second,))]
    )
    if form == "whether":
        subject = f"{phrase(first)} фигур" if is_of_colours else phrase(first)
        text = f"больше ли {subject}, чем {phrase(second)}?"
        answer = "да" if sign > 0 else "нет"
    else:
        interrogative = "каких фигур" if is_of_colours else "чего"
        text = f"{interrogative} больше: {phrase(first)} или {phrase(second)}?"
        answer = {1: phrase(first), -1: phrase(second), 0: "поровну"}[sign]
    return _question("comparison", text, answer, objects, counted)


def _compare_sizes(sampler: QuestionSampler) -> Question:
    target = sampler.choose(sampler.targets)
    pair = [
        target,
        sampler.choose(
            [combination for combination in sampler.combinations if combination != target]
        ),
    ]
    first, second = choose_distinct(sampler.rng, pair, number=2)
    sizes = choose_distinct(sampler.rng, tuple(SIZES), number=2)
    others = sampler.others(sampler.max_objects - 2, first, second)
    objects = sampler.place([first, second, *others], sizes)
    text = f"что больше: {noun_phrase(*first)} или {noun_phrase(*second)}?"
    answer = noun_phrase(*(first if sizes[0] == "large" else second))
    return _question("comparison", text, answer, objects, pair)


def _genitive_plural(shape: str) -> str:
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
