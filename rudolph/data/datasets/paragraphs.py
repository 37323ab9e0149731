"""Short texts about people and the shapes they have, and questions about them, without images.

"у ани большой синий круг. три красные звезды у пети." is an example.  A text has two to four
sentences.  Each is about a different person, who has one object of a stated size, or two to five
objects.  A *family* is a type of question:

==========  ========================================  =========================================
family      example question                          answers
==========  ========================================  =========================================
thing       что у пети?                               три красные звезды
colour      какого цвета круг у ани?                  синий: agrees with "цвет"
size        какого размера круг у ани?                большой: agrees with "размер"
count       сколько звёзд у пети?                     три
owner       у кого звёзды? у кого красные звёзды?     у пети: nobody else has such objects
existence   есть ли у ани звёзды?                     да or нет; for нет, another person has them
comparison  у кого больше фигур, у ани или у пети?    у пети
==========  ========================================  =========================================

The text precedes the question.  Together they have at most ``MAX_WORDS`` words, so that they fit
into the left text of a small decoder.

To add a family, write a function and add it to ``TEXT_FAMILIES``.  The function gets a
random number generator, the possessions in a text, and the possession that the question is about.
It returns a ``QuestionAnswer``, or ``None`` if the text does not allow the question.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from random import Random
from typing import Annotated, NamedTuple

from rudolph.data.datasets.shapes_russian import (
    ADJECTIVES,
    NOUNS,
    NUMERALS,
    counted_phrase,
    noun_phrase,
    numeral,
    plural_phrase,
    quality,
)
from rudolph.data.datasets.shapes_scenes import held_out_combinations
from rudolph.data.datasets.synthetic import (
    choose,
    choose_distinct,
    choose_number,
    example_rng,
    json_digest,
    num_examples,
    require_choices,
    require_within,
    sample_until,
    split_by_hash,
)
from rudolph.data.pairs import Pair, require_split
from rudolph.files.constraints import Bounds, Count, check

# Part of every digest; increment it when the same configuration gives other pairs.
PARAGRAPHS_VERSION = 1

MAX_WORDS = 29

# Names in the nominative, and in the genitive that follows "у".
NAMES = {
    "аня": "ани",
    "ваня": "вани",
    "дима": "димы",
    "егор": "егора",
    "женя": "жени",
    "игорь": "игоря",
    "катя": "кати",
    "коля": "коли",
    "лена": "лены",
    "маша": "маши",
    "миша": "миши",
    "никита": "никиты",
    "нина": "нины",
    "оля": "оли",
    "петя": "пети",
    "роман": "романа",
    "саша": "саши",
    "юра": "юры",
}
_SHAPES = tuple(noun for noun in NOUNS if noun != "figure")
_SIZES = ("small", "large")
_COLOURS = tuple(word for word in ADJECTIVES if word not in _SIZES)


@dataclass(frozen=True)
class ParagraphsConfig:
    """Configuration of the texts and questions, and the size of each split.

    Attributes:
        families: Keys of ``TEXT_FAMILIES``.
        shapes: Shapes that people can have, at least two.
        colours: Colours of the shapes, at least two.
        max_sentences: Largest number of sentences of a text, 2 to 4.
        max_count: Largest number of objects of a person, 2 to 5.
        num_train: Number of pairs in the training split.
        num_validation: Number of pairs in the validation split.
        num_test: Number of pairs in the test split and in the compositional split.
        seed: Seed of the pairs; it does not change the split of a text.
    """

    families: tuple[str, ...] = (
        "thing",
        "colour",
        "size",
        "count",
        "owner",
        "existence",
        "comparison",
    )
    shapes: tuple[str, ...] = _SHAPES
    colours: tuple[str, ...] = _COLOURS
    max_sentences: Annotated[int, Bounds(ge=2, le=4)] = 4
    max_count: int = 5
    num_train: Count = 20_000
    num_validation: Count = 500
    num_test: Count = 500
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for an invalid field."""
        check(self)
        require_choices("families", self.families, legal=TEXT_FAMILIES, at_least=1)
        require_choices("shapes", self.shapes, legal=_SHAPES, at_least=2)
        require_choices("colours", self.colours, legal=_COLOURS, at_least=2)
        require_within("max_count", self.max_count, 2, len(NUMERALS["masculine"]))

    @property
    def held_out(self) -> frozenset[tuple[str, str]]:
        """Return the (colour, shape) combinations that only the compositional split has."""
        return held_out_combinations(self.colours, self.shapes)


@dataclass(frozen=True)
class Possession:
    """The objects of one person; the text states their size only if there is one object."""

    person: str
    number: int
    size: str
    colour: str
    shape: str

    @property
    def owner(self) -> str:
        """Return the person with the preposition, e.g. "у ани"."""
        return f"у {NAMES[self.person]}"

    @property
    def phrase(self) -> str:
        """Return the phrase in the text, e.g. "большой синий круг" or "три красные звезды"."""
        if self.number == 1:
            return noun_phrase(self.size, self.colour, self.shape)
        return counted_phrase(self.number, self.colour, self.shape)

    def named(self, *words: str) -> str:
        """Return adjectives and noun, in the singular for one object and else in the plural."""
        return noun_phrase(*words) if self.number == 1 else plural_phrase(*words)


class QuestionAnswer(NamedTuple):
    """A question and its answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class Paragraph:
    """A text with the possessions that it states, and a question with its answer."""

    family: str
    context: str
    possessions: tuple[Possession, ...]
    question: str
    answer: str


class Paragraphs:
    """One split of the texts with questions; see ``PairDataset``.

    There are no images, so ``image_size`` has no effect.  The ``question`` of a pair is the text
    followed by the question, and the caption is the answer.  ``attributes`` are ``family``,
    ``context`` and ``question``.

    A pair of the compositional split asks about objects with a combination in
    ``ParagraphsConfig.held_out``, which no other split has.  The hash of the text decides the
    split of any other pair.
    """

    def __init__(self, config: ParagraphsConfig, *, split: str, image_size: int) -> None:
        require_split(split)
        self.config = config
        self.split = split
        self.digest = json_digest("paragraphs", PARAGRAPHS_VERSION, NAMES, asdict(config), split)

    def __len__(self) -> int:
        """Return the number of pairs."""
        return num_examples(self.config, self.split)

    def __getitem__(self, index: int) -> Pair:
        """Return the pair at ``index``."""
        paragraph = self.paragraph(index)
        return Pair(
            key=f"paragraphs/{self.split}/{index:06d}",
            caption=paragraph.answer,
            image=None,
            attributes={
                "family": paragraph.family,
                "context": paragraph.context,
                "question": paragraph.question,
            },
            question=f"{paragraph.context} {paragraph.question}",
        )

    def paragraph(self, index: int) -> Paragraph:
        """Return the text, question and answer of the pair at ``index``."""
        config = self.config
        rng = example_rng(index, seed=config.seed, split=self.split, length=len(self))
        # Choose the family before rejection sampling.  Otherwise a family would be rarer if its
        # samples are often rejected.
        family = choose(rng, config.families)
        is_compositional = self.split == "compositional"
        return sample_until(
            lambda: sample_paragraph(family, config, rng, is_compositional=is_compositional),
            lambda candidate: is_compositional or split_by_hash(candidate.context) == self.split,
            error_message=(
                f"shapes and colours: no {family} falls into {self.split}. Allow more of them"
            ),
        )


def sample_paragraph(
    family: str, config: ParagraphsConfig, rng: Random, *, is_compositional: bool
) -> Paragraph | None:
    """Sample a text and a question of a family.

    Return ``None`` if the text does not allow the question.
    """
    held_out = sorted(config.held_out)
    allowed_combinations = [
        combination
        for combination in product(config.colours, config.shapes)
        if combination not in config.held_out
    ]
    people = choose_distinct(rng, tuple(NAMES), number=choose_number(rng, 2, config.max_sentences))
    target_index = choose_number(rng, 0, len(people) - 1)
    possessions = []
    for index, person in enumerate(people):
        is_target = index == target_index
        colour, shape = choose(
            rng, held_out if is_target and is_compositional else allowed_combinations
        )
        # A text states a size only if a person has a single object.
        max_number = 1 if is_target and family == "size" else config.max_count
        number, size = choose_number(rng, 1, max_number), choose(rng, _SIZES)
        possessions.append(Possession(person, number, size, colour, shape))
    question_answer = TEXT_FAMILIES[family](rng, possessions, possessions[target_index])
    if question_answer is None:
        return None
    context = " ".join(_sentence(possession, rng) for possession in possessions)
    return Paragraph(family, context, tuple(possessions), *question_answer)


def _sentence(possession: Possession, rng: Random) -> str:
    if rng.random() < 0.25:
        return f"{possession.phrase} {possession.owner}."
    return f"{possession.owner} {possession.phrase}."


# --- families ------------------------------------------------------------------------------------


def thing_question(rng: Random, _: Sequence[Possession], target: Possession) -> QuestionAnswer:
    """Return a question about all that a person has."""
    return QuestionAnswer(f"что {target.owner}?", target.phrase)


def colour_question(rng: Random, _: Sequence[Possession], target: Possession) -> QuestionAnswer:
    """Return a question about the colour of a person's objects."""
    question = f"какого цвета {target.named(target.shape)} {target.owner}?"
    return QuestionAnswer(question, quality(target.colour))


def size_question(rng: Random, _: Sequence[Possession], target: Possession) -> QuestionAnswer:
    """Return a question about the size of a person's only object."""
    question = f"какого размера {target.named(target.shape)} {target.owner}?"
    return QuestionAnswer(question, quality(target.size))


def count_question(rng: Random, _: Sequence[Possession], target: Possession) -> QuestionAnswer:
    """Return a question about the number of a person's objects."""
    question = f"сколько {plural_phrase(target.shape, case='genitive')} {target.owner}?"
    return QuestionAnswer(question, numeral(target.number, target.shape))


def owner_question(
    rng: Random, possessions: Sequence[Possession], target: Possession
) -> QuestionAnswer | None:
    """Return a question about who has objects of a shape, or of a colour and a shape.

    Return ``None`` if several people have them.
    """
    words = (target.shape,) if rng.random() < 0.5 else (target.colour, target.shape)
    owners = [
        possession
        for possession in possessions
        if set(words) <= {possession.colour, possession.shape}
    ]
    if len(owners) > 1:
        return None
    return QuestionAnswer(f"у кого {target.named(*words)}?", target.owner)


def existence_question(
    rng: Random, possessions: Sequence[Possession], target: Possession
) -> QuestionAnswer | None:
    """Return a yes-no question about whether a person has objects of a shape.

    Return ``None`` if everybody has objects of the same shape.
    """
    has_it = rng.random() < 0.5
    others = [possession for possession in possessions if possession.shape != target.shape]
    if not others:
        # Return None for "да" too; otherwise equal shapes would make that answer more likely.
        return None
    owner = target.owner if has_it else choose(rng, others).owner
    return QuestionAnswer(
        f"есть ли {owner} {target.named(target.shape)}?", "да" if has_it else "нет"
    )


def comparison_question(
    rng: Random, possessions: Sequence[Possession], target: Possession
) -> QuestionAnswer | None:
    """Return a question about which of two people has more objects.

    Return ``None`` if everybody has the same number of objects.
    """
    others = [possession for possession in possessions if possession.number != target.number]
    if not others:
        return None
    first, second = choose_distinct(rng, [target, choose(rng, others)], number=2)
    question = f"у кого больше фигур, {first.owner} или {second.owner}?"
    return QuestionAnswer(
        question, max(first, second, key=lambda possession: possession.number).owner
    )


TEXT_FAMILIES: dict[
    str, Callable[[Random, Sequence[Possession], Possession], QuestionAnswer | None]
] = {
    "thing": thing_question,
    "colour": colour_question,
    "size": size_question,
    "count": count_question,
    "owner": owner_question,
    "existence": existence_question,
    "comparison": comparison_question,
}
