"""Questions about images of the world of shapes, with exact answers.

A scene has one to five objects in different cells. A *family* is a kind of question:

==========  =============================================  ====================================
family      a question                                     answers
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

What is asked for by a description is there exactly once, and what is asked for by a place cannot
be meant by another: "слева" is the cell in the middle of the left side, so no other object is on
that side. Answers are drawn first, and a scene around them: "да" is as frequent as "нет", and so
are the numbers of a count and the sides of a comparison.

``shapes_question_families`` draws the questions, and says how to add a family.
"""

from dataclasses import asdict, dataclass
from itertools import product

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
    require_sizes,
    require_within,
    sample_until,
    split_by_hash,
)
from rudolph.data.pairs import Pair, require_split

# Counted up whenever the same configuration would give other images or texts than before.
QUESTIONS_VERSION = 1


@dataclass(frozen=True)
class ShapesQuestionsConfig:
    """Which scenes and questions there are, and how many of each split.

    Args:
        grid: cells a side, 2 or 3.
        max_objects: the most objects of a scene, 3 to 5 (4 when ``grid`` is 2).
        jitter: how far an object may stand off the middle of its cell, in cells.
        num_test: pairs of the test split, and as many of the compositional one.
        seed: another seed draws other pairs, and leaves every pair in its split.
    """

    grid: int = 3
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
    num_train: int = 20_000
    num_validation: int = 500
    num_test: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        if self.grid not in (2, 3):
            raise ValueError(f"grid must be 2 or 3, got {self.grid}")
        require_choices("families", self.families, legal=QUESTION_FAMILIES, at_least=1)
        require_choices("shapes", self.shapes, legal=SIGNED_DISTANCES, at_least=2)
        require_choices("colours", self.colours, legal=PALETTE, at_least=2)
        require_within("max_objects", self.max_objects, 3, 4 if self.grid == 2 else 5)
        require_within("jitter", self.jitter, 0, LARGEST_JITTER)
        require_sizes(self)

    @property
    def held_out(self) -> frozenset[ObjectAttributes]:
        """The (colour, shape) that only pairs of the compositional split have."""
        return held_out_combinations(self.colours, self.shapes)


class ShapesQuestions:
    """One split of the questions; see ``PairDataset``.

    ``attributes`` of a pair are ``family`` and ``objects``: "small red circle 0 2; ...", with row
    and column, in reading order. A pair of the compositional split asks about something that has a
    look of ``ShapesQuestionsConfig.held_out``; in no other split is such a thing shown or asked
    for. The hash of the question and the objects says where any other pair belongs.
    """

    def __init__(self, config: ShapesQuestionsConfig, *, split: str, image_size: int) -> None:
        require_split(split)
        require_readable_size(image_size)
        self.config = config
        self.split = split
        self.image_size = image_size
        world = [PALETTE, SIZES, asdict(config), split, image_size]
        self.digest = json_digest("shapes_questions", QUESTIONS_VERSION, *world)

    def __len__(self) -> int:
        return num_examples(self.config, self.split)

    def __getitem__(self, index: int) -> Pair:
        question = self.question(index)
        return Pair(
            key=f"shapes_questions/{self.split}/{index:06d}",
            caption=question.answer,
            image=render(question.objects, grid=self.config.grid, image_size=self.image_size),
            attributes={"family": question.family, "objects": objects_text(question.objects)},
            question=question.text,
        )

    def question(self, index: int) -> Question:
        """The truth about the pair at ``index``."""
        config = self.config
        rng = example_rng(index, seed=config.seed, split=self.split, length=len(self))
        # Before the search for a pair of this split: no family is rarer for being harder to draw.
        family = choose(rng, config.families)
        every = tuple(product(config.colours, config.shapes))
        others = tuple(look for look in every if look not in config.held_out)
        is_compositional = self.split == "compositional"
        draw = QuestionSampler(
            rng,
            grid=config.grid,
            max_objects=config.max_objects,
            jitter=config.jitter,
            looks=every if is_compositional else others,
            targets=sorted(config.held_out) if is_compositional else others,
        )
        return sample_until(
            lambda: QUESTION_FAMILIES[family](draw),
            lambda question: split_of_question(question, config) == self.split,
            otherwise=f"shapes and colours leave no question of the family {family} for "
            f"{self.split}: allow more of them",
        )


def split_of_question(question: Question, config: ShapesQuestionsConfig) -> str | None:
    """The one split that a question can be of; ``None`` when it would spoil the compositional."""
    if question.asked & config.held_out:
        return "compositional"
    if any((each.colour, each.shape) in config.held_out for each in question.objects):
        return None
    return split_by_hash(f"{question.text} {objects_text(question.objects)}")
