"""Questions about images of synthetic shapes, with exact answers.

A scene has one to five objects in different cells.  A *family* is a type of question:

==========  =============================================  ====================================
family      example question                               answers
==========  =============================================  ====================================
colour      какого цвета круг? ... фигура слева сверху?    синий: agrees with "цвет"
shape       какая фигура красная? ... слева сверху?        круг
size        какого размера красный круг?                   большой: agrees with "размер"
count       сколько красных кругов? сколько всего фигур?   ноль to пять, in the noun's gender
position    где синий круг?                                слева сверху
comparison  чего больше: кругов или крестов?               кругов, крестов or поровну
            каких фигур больше: красных или синих?         красных, синих or поровну
            больше ли кругов, чем звёзд?                   да or нет
            что больше: красный круг или синий крест?      красный круг: one of them is large
existence   есть ли зелёный крест?                         да or нет
==========  =============================================  ====================================

An object identified by a description occurs exactly once.  An object identified by its cell is
unambiguous: "слева" is the middle cell of the left side, so no other object is on that side.

Answers are sampled before the scene.  Therefore "да" is as frequent as "нет".  The numbers that
answer a count are equally frequent, and so are the two sides of a comparison.

``shapes_question_families`` samples the questions and explains how to add a family.
"""

from dataclasses import asdict, dataclass
from itertools import product
from typing import Literal

from rudolph.data.datasets.shapes_question_families import (
    QUESTION_FAMILIES,
    ObjectAttributes,
    Question,
    QuestionSampler,
)
from rudolph.data.datasets.shapes_rendering import (
    PALETTE,
    SIGNED_DISTANCES,
    SIZES,
    render,
    require_readable_size,
)
from rudolph.data.datasets.shapes_scenes import LARGEST_JITTER, held_out_combinations, objects_text
from rudolph.data.datasets.synthetic import (
    choose,
    example_rng,
    json_digest,
    num_examples,
    require_choices,
    require_within,
    sample_until,
    split_by_hash,
)
from rudolph.data.pairs import Pair, require_split
from rudolph.files.constraints import Count, check

# Part of every digest; increment it when the same configuration gives other pairs.
QUESTIONS_VERSION = 1


@dataclass(frozen=True)
class ShapesQuestionsConfig:
    """Configuration of the scenes and questions, and the size of each split.

    Attributes:
        grid: Cells per side, 2 or 3.
        families: Keys of ``QUESTION_FAMILIES``.
        shapes: Keys of ``SIGNED_DISTANCES``, at least two.
        colours: Keys of ``PALETTE``, at least two.
        max_objects: Largest number of objects of a scene, 3 to 5 (4 if ``grid`` is 2).
        jitter: Largest offset of an object from the centre of its cell per axis, in cells.
        num_train: Number of pairs in the training split.
        num_validation: Number of pairs in the validation split.
        num_test: Number of pairs in the test split and in the compositional split.
        seed: Seed of the pairs; it does not change the split of a pair.
    """

    grid: Literal[2, 3] = 3
    families: tuple[str, ...] = (
        "colour",
        "shape",
        "size",
        "count",
        "position",
        "comparison",
        "existence",
    )
    shapes: tuple[str, ...] = ("circle", "square", "triangle", "cross", "star")
    colours: tuple[str, ...] = tuple(PALETTE)
    max_objects: int = 5
    jitter: float = 0.04
    num_train: Count = 20_000
    num_validation: Count = 500
    num_test: Count = 500
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for an invalid field."""
        check(self)
        require_choices("families", self.families, legal=QUESTION_FAMILIES, at_least=1)
        require_choices("shapes", self.shapes, legal=SIGNED_DISTANCES, at_least=2)
        require_choices("colours", self.colours, legal=PALETTE, at_least=2)
        require_within("max_objects", self.max_objects, 3, 4 if self.grid == 2 else 5)
        require_within("jitter", self.jitter, 0, LARGEST_JITTER)

    @property
    def held_out(self) -> frozenset[ObjectAttributes]:
        """Return the (colour, shape) combinations that only the compositional split has."""
        return held_out_combinations(self.colours, self.shapes)


class ShapesQuestions:
    """One split of the questions; see ``PairDataset``.

    The ``attributes`` of a pair are ``family`` and ``objects``, e.g. "small red circle 0 2; ...",
    with row and column, in reading order.

    A pair of the compositional split asks about a combination in
    ``ShapesQuestionsConfig.held_out``.  No other split shows such an object or asks about one.
    The hash of the question and the objects decides the split of any other pair.
    """

    def __init__(self, config: ShapesQuestionsConfig, *, split: str, image_size: int) -> None:
        require_split(split)
        require_readable_size(image_size)
        self.config = config
        self.split = split
        self.image_size = image_size
        content = [PALETTE, SIZES, asdict(config), split, image_size]
        self.digest = json_digest("shapes_questions", QUESTIONS_VERSION, *content)

    def __len__(self) -> int:
        """Return the number of pairs."""
        return num_examples(self.config, self.split)

    def __getitem__(self, index: int) -> Pair:
        """Return the pair at ``index``."""
        question = self.question(index)
        return Pair(
            key=f"shapes_questions/{self.split}/{index:06d}",
            caption=question.answer,
            image=render(question.objects, grid=self.config.grid, image_size=self.image_size),
            attributes={"family": question.family, "objects": objects_text(question.objects)},
            question=question.text,
        )

    def question(self, index: int) -> Question:
        """Return the question of the pair at ``index``, with its answer and objects."""
        config = self.config
        rng = example_rng(index, seed=config.seed, split=self.split, length=len(self))
        # Choose the family before rejection sampling.  Otherwise a family would be rarer if its
        # samples are often rejected.
        family = choose(rng, config.families)
        combinations = tuple(product(config.colours, config.shapes))
        others = tuple(
            combination for combination in combinations if combination not in config.held_out
        )
        is_compositional = self.split == "compositional"
        sampler = QuestionSampler(
            rng,
            grid=config.grid,
            max_objects=config.max_objects,
            jitter=config.jitter,
            combinations=combinations if is_compositional else others,
            targets=sorted(config.held_out) if is_compositional else others,
        )
        return sample_until(
            lambda: QUESTION_FAMILIES[family](sampler),
            lambda question: split_of_question(question, config) == self.split,
            error_message=f"shapes and colours: no question of the family {family} falls into "
            f"{self.split}. Allow more of them",
        )


def split_of_question(question: Question, config: ShapesQuestionsConfig) -> str | None:
    """Return the only split to which a question can belong.

    Return ``None`` if the scene shows a held-out combination that the question is not about.
    """
    if question.targets & config.held_out:
        return "compositional"
    if any(
        (scene_object.colour, scene_object.shape) in config.held_out
        for scene_object in question.objects
    ):
        return None
    return split_by_hash(f"{question.text} {objects_text(question.objects)}")
