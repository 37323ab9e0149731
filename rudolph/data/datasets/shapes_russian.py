"""Russian phrases for synthetic shapes: declension, agreement, numerals and positions.

Words are identified by their English names in ``shapes_rendering`` and ``shapes_scenes``.  To add
a shape or a colour, add it to ``NOUNS`` or ``ADJECTIVES``.
"""

_CASES = ("nominative", "genitive", "instrumental")
_NOMINATIVE_PLURAL, _GENITIVE_PLURAL = 6, 7

# Masculine and feminine singular in the order of _CASES, then nominative and genitive plural.
_ENDINGS = {
    "hard": "ый ого ым ая ой ой ые ых",
    "stressed": "ой ого ым ая ой ой ые ых",
    "soft": "ий его им яя ей ей ие их",
    "velar": "ий ого им ая ой ой ие их",
    "stressed velar": "ой ого им ая ой ой ие их",
}
ADJECTIVES = {
    "red": ("красн", "hard"),
    "green": ("зелён", "hard"),
    "blue": ("син", "soft"),
    "yellow": ("жёлт", "hard"),
    "violet": ("фиолетов", "hard"),
    "black": ("чёрн", "hard"),
    "cyan": ("голуб", "stressed"),
    "small": ("маленьк", "velar"),
    "large": ("больш", "stressed velar"),
}
# Gender, singular in the order of _CASES, genitive plural and nominative plural.
NOUNS = {
    "circle": ("masculine", "круг круга кругом кругов круги"),
    "square": ("masculine", "квадрат квадрата квадратом квадратов квадраты"),
    "triangle": (
        "masculine",
        "треугольник треугольника треугольником треугольников треугольники",
    ),
    "cross": ("masculine", "крест креста крестом крестов кресты"),
    "star": ("feminine", "звезда звезды звездой звёзд звёзды"),
    # The general term for every shape.
    "figure": ("feminine", "фигура фигуры фигурой фигур фигуры"),
}
_PLURALS = {"genitive": (3, _GENITIVE_PLURAL), "nominative": (4, _NOMINATIVE_PLURAL)}
NUMERALS = {
    "masculine": ("один", "два", "три", "четыре", "пять"),
    "feminine": ("одна", "две", "три", "четыре", "пять"),
}
# The phrase between two objects, and the case of the second.
RELATIONS = {
    "left": ("слева от", "genitive"),
    "right": ("справа от", "genitive"),
    "above": ("над", "instrumental"),
    "below": ("под", "instrumental"),
}
_POSITIONS = (
    ("слева сверху", "сверху", "справа сверху"),
    ("слева", "в центре", "справа"),
    ("слева снизу", "снизу", "справа снизу"),
)


def noun_phrase(*words: str, case: str = "nominative") -> str:
    """Return adjectives followed by a noun, in the singular.

    >>> noun_phrase("large", "blue", "star", case="instrumental")
    'большой синей звездой'
    """
    *adjectives, noun = words
    gender, forms = NOUNS[noun]
    number = _CASES.index(case)
    ending = number if gender == "masculine" else number + len(_CASES)
    return " ".join([*(_adjective(word, ending) for word in adjectives), forms.split()[number]])


def plural_phrase(*words: str, case: str = "nominative") -> str:
    """Return adjectives followed by a noun, in the nominative or genitive plural.

    >>> plural_phrase("blue", "star"), plural_phrase("blue", "star", case="genitive")
    ('синие звёзды', 'синих звёзд')
    """
    *adjectives, noun = words
    form, ending = _PLURALS[case]
    plural = NOUNS[noun][1].split()[form]
    return " ".join([*(_adjective(word, ending) for word in adjectives), plural])


def counted_phrase(number: int, colour: str, shape: str) -> str:
    """Return the phrase for one to five objects of a colour and a shape.

    After 2, 3 and 4 the noun is in the genitive singular and its adjective in the plural.

    >>> counted_phrase(3, "red", "circle"), counted_phrase(3, "red", "star")
    ('три красных круга', 'три красные звезды')
    """
    gender, forms = NOUNS[shape]
    counted = numeral(number, shape)
    if number == 1:
        return f"{counted} {noun_phrase(colour, shape)}"
    if number >= 5:
        return f"{counted} {plural_phrase(colour, shape, case='genitive')}"
    ending = _GENITIVE_PLURAL if gender == "masculine" else _NOMINATIVE_PLURAL
    return f"{counted} {_adjective(colour, ending)} {forms.split()[1]}"


def numeral(number: int, noun: str) -> str:
    """Return the numeral for 0 to 5 in the gender of a noun.

    >>> numeral(2, "circle"), numeral(2, "star"), numeral(0, "star")
    ('два', 'две', 'ноль')
    """
    gender, _ = NOUNS[noun]
    return NUMERALS[gender][number - 1] if number else "ноль"


def quality(word: str, noun: str | None = None) -> str:
    """Return an adjective alone, in the singular and the gender of a noun.

    Without a noun it answers "какого цвета?" or "какого размера?".  It then agrees with "цвет" or
    "размер" rather than with the object.

    >>> quality("blue"), quality("blue", "star")
    ('синий', 'синяя')
    """
    feminine = noun is not None and NOUNS[noun][0] == "feminine"
    return _adjective(word, len(_CASES) if feminine else 0)


def qualities(word: str) -> str:
    """Return an adjective alone, in the genitive plural.

    >>> qualities("blue")
    'синих'
    """
    return _adjective(word, _GENITIVE_PLURAL)


def relation_phrase(first: str, relation: str, *second: str) -> str:
    """Return a noun phrase, a relation and the declined second noun phrase.

    >>> relation_phrase("круг", "above", "green", "square")
    'круг над зелёным квадратом'
    """
    phrase, case = RELATIONS[relation]
    return f"{first} {phrase} {noun_phrase(*second, case=case)}"


def position_phrase(row: int, column: int, *, grid: int) -> str:
    """Return the name of a cell: one of nine positions, or of four corners if ``grid`` is 2."""
    step = 2 if grid == 2 else 1
    return _POSITIONS[row * step][column * step]


def _adjective(word: str, ending: int) -> str:
    stem, paradigm = ADJECTIVES[word]
    return stem + _ENDINGS[paradigm].split()[ending]
