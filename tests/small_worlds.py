"""Small generated datasets, and an independent description of their Russian grammar."""

from collections.abc import Iterable
from functools import cache
from typing import Any

from rudolph.data.datasets.arithmetic import Arithmetic, ArithmeticConfig
from rudolph.data.datasets.paragraphs import Paragraphs, ParagraphsConfig
from rudolph.data.datasets.shapes import Shapes, ShapesConfig
from rudolph.data.datasets.shapes_questions import ShapesQuestions, ShapesQuestionsConfig
from rudolph.data.datasets.words import Words, WordsConfig
from rudolph.data.pairs import Pair

SMALL: dict[str, Any] = {"num_train": 2_000, "num_validation": 2_000, "num_test": 2_000}
WORLDS: dict[str, tuple[Any, Any]] = {
    "shapes": (Shapes, ShapesConfig),
    "shapes_questions": (ShapesQuestions, ShapesQuestionsConfig),
    "words": (Words, WordsConfig),
    "paragraphs": (Paragraphs, ParagraphsConfig),
    "arithmetic": (Arithmetic, ArithmeticConfig),
}

# Independent of the package's tables, so that an error there does not repeat here.
COLOUR_STEMS = {
    "красн": "red",
    "зелён": "green",
    "син": "blue",
    "жёлт": "yellow",
    "фиолетов": "violet",
    "чёрн": "black",
    "голуб": "cyan",
}
SHAPE_STEMS = {
    "круг": "circle",
    "квадрат": "square",
    "треугольник": "triangle",
    "крест": "cross",
    "зв": "star",
}
PLACES = (
    *("слева сверху", "сверху", "справа сверху"),
    *("слева", "в центре", "справа"),
    *("слева снизу", "снизу", "справа снизу"),
)
NUMERALS = (
    ("ноль", "один", "два", "три", "четыре", "пять"),
    ("ноль", "одна", "две", "три", "четыре", "пять"),
)


def coloured(hard: str, soft: str, stressed: str = "") -> str:
    """Return a regular expression of all colours with an ending."""
    stems = ("красн", "зелён", "жёлт", "фиолетов", "чёрн")
    endings = [*(stem + hard for stem in stems), "син" + soft, "голуб" + (stressed or hard)]
    return f"(?:{'|'.join(endings)})"


def masculine(ending: str) -> str:
    """Return a regular expression of all masculine nouns with an ending."""
    return f"(?:круг|квадрат|треугольник|крест){ending}"


# Regular expressions of phrases such as "синяя звезда", "большая синяя звезда", "синие звёзды",
# "синих звёзд", "две синие звезды".
MAN, WOMAN = coloured("ый", "ий", "ой"), coloured("ая", "яя")
THOSE, OF_THOSE = coloured("ые", "ие"), coloured("ых", "их")
ONE = f"(?:{MAN} {masculine('')}|{WOMAN} (?:звезда|фигура))"
SIZED = f"(?:(?:маленький|большой) {MAN} {masculine('')}|(?:маленькая|большая) {WOMAN} звезда)"
PLURALS = "(?:круги|квадраты|треугольники|кресты|звёзды)"
SEVERAL = f"{THOSE} {PLURALS}"
MANY = f"{OF_THOSE} (?:{masculine('ов')}|звёзд|фигур)"
COUNTED = (
    f"(?:один {MAN} {masculine('')}|одна {WOMAN} звезда|"
    f"(?:два|три|четыре) {OF_THOSE} {masculine('а')}|(?:две|три|четыре) {THOSE} звезды|"
    f"пять {OF_THOSE} (?:{masculine('ов')}|звёзд))"
)

# size, colour, shape, row, column
Thing = tuple[str, ...]


def world(name: str, split: str = "train", *, image_size: int = 48, **changes: Any) -> Any:
    dataset, config = WORLDS[name]
    return dataset(config(**{**SMALL, **changes}), split=split, image_size=image_size)


@cache
def pairs(name: str, split: str = "train", number: int = 700) -> list[Pair]:
    # Rendering dominates the time, so images are as small as their dataset allows.
    dataset = world(name, split, image_size=48 if name == "words" else 24)
    return [dataset[index] for index in range(number)]


def things(pair: Pair) -> list[Thing]:
    return [tuple(each.split()) for each in pair.attributes["objects"].split("; ")]


def meaning(phrase: str) -> set[str]:
    """Return the colours and shapes that a phrase names, in any case and number."""
    known = {**COLOUR_STEMS, **SHAPE_STEMS}
    words = [word for word in phrase.split() if not word.startswith("фигур")]
    return {next(known[stem] for stem in known if word.startswith(stem)) for word in words}


def meant(phrase: str, objects: Iterable[Thing]) -> list[Thing]:
    """Return the objects that a phrase describes."""
    return [each for each in objects if meaning(phrase) <= set(each)]


def colour_word(colour: str) -> str:
    stem = next(stem for stem, name in COLOUR_STEMS.items() if name == colour)
    return stem + {"blue": "ий", "cyan": "ой"}.get(colour, "ый")


def numeral(number: int, phrase: str) -> str:
    is_feminine = "звёзд" in phrase or "фигур" in phrase
    return NUMERALS[is_feminine][number]
