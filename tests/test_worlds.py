"""Properties of every generated dataset; words in images, paragraphs and arithmetic."""

import re
from collections import Counter
from itertools import combinations
from random import Random
from typing import Any

import numpy as np
import pytest
from small_worlds import (
    COLOUR_STEMS,
    COUNTED,
    MAN,
    ONE,
    PLURALS,
    SEVERAL,
    SIZED,
    WORLDS,
    colour_word,
    masculine,
    meaning,
    numeral,
    pairs,
    world,
)

from rudolph.data.datasets.arithmetic import sample_options
from rudolph.data.datasets.paragraphs import MAX_WORDS, NAMES, ParagraphsConfig
from rudolph.data.datasets.shapes_rendering import PALETTE, cell_pixels
from rudolph.data.datasets.synthetic import split_by_hash
from rudolph.data.datasets.words import FONTS, Inscription, WordsConfig, known_words, text_opacity
from rudolph.data.pairs import SPLITS, Pair


@pytest.mark.parametrize("name", WORLDS)
def test_a_pair_depends_on_its_split_and_index_alone(name: str) -> None:
    def known(dataset: Any, indices: Any) -> list[tuple[Any, ...]]:
        return [
            (each.key, each.caption, each.question, each.choices, dict(each.attributes))
            + ((each.image.tobytes(),) if each.image else ())
            for each in (dataset[index] for index in indices)
        ]

    first = known(world(name, "test"), range(12))
    assert known(world(name, "test", num_test=10**6), range(11, -1, -1))[::-1] == first
    for other in (world(name, "validation"), world(name, "test", seed=1)):
        assert [each[1:] for each in known(other, range(12))] != [each[1:] for each in first]
    keys = {pair.key for split in SPLITS for pair in pairs(name, split, 12)}
    assert len(keys) == 48 and all(key.startswith(f"{name}/") for key in keys)
    with pytest.raises(IndexError, match=r"^test has 2000 (pairs|scenes), got index 2000$"):
        world(name, "test")[2_000]


@pytest.mark.parametrize("name", WORLDS)
def test_a_digest_changes_with_whatever_decides_the_pairs(name: str) -> None:
    digests = [world(name, split).digest for split in SPLITS]
    digests += [world(name, **change).digest for change in ({"seed": 1}, {"num_train": 9})]
    assert len(set(digests)) == 6
    assert world(name).digest == digests[0]
    has_image = world(name)[0].image is not None
    assert (world(name, image_size=96).digest != digests[0]) == has_image


@pytest.mark.parametrize(
    ("name", "wrong", "says"),
    [
        ("shapes_questions", {"grid": 4}, "grid must be one of 2, 3, got 4"),
        ("shapes_questions", {"grid": 2}, "max_objects must be 3 to 4, got 5"),
        ("shapes_questions", {"families": ("why",)}, "families must be at least 1 of colour, sh"),
        ("shapes_questions", {"jitter": 1.0}, "jitter must be 0 to 0.05, got 1.0"),
        ("words", {"fonts": ("sans",)}, "fonts must be at least 2 of sans, sans bold"),
        ("words", {"colours": ("red", "yellow")}, "colours must be at least 2 of red, green"),
        ("words", {"rotation": 90.0}, "rotation must be in [0, 15], got 90.0"),
        ("words", {"max_letters": 6}, "image_size must be at least 54, got 48"),
        ("paragraphs", {"max_sentences": 1}, "max_sentences must be in [2, 4], got 1"),
        ("paragraphs", {"num_test": 0}, "num_test must be at least 1, got 0"),
        ("arithmetic", {"operations": ("/",)}, "operations must be at least 1 of +, -, ×"),
        ("arithmetic", {"num_choices": 6}, "num_choices must be 2 to 5, got 6"),
    ],
)
def test_a_wrong_field_is_named_with_what_is_legal(
    name: str, wrong: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(says)}"):
        world(name, **wrong)


# --- words ---------------------------------------------------------------------------------------


def inscription(text: str, font: str = "sans", **changes: Any) -> Inscription:
    how: dict[str, Any] = {"angle": 0.0, "size": 1.0, "position": (0.5, 0.5), "is_at_top": True}
    return Inscription("word", text, font, "black", **{**how, **changes})


def test_a_text_is_of_its_kind_and_in_the_split_of_its_hash() -> None:
    patterns = {"word": "[а-яё]{2,5}", "number": "0|[1-9][0-9]{0,3}", "syllables": "[а-яё]{3,5}"}
    for split in SPLITS:
        own = "train" if split == "compositional" else split
        for pair in pairs("words", split, 150):
            kind = pair.attributes["kind"]
            assert re.fullmatch(patterns[kind], pair.caption)
            assert (kind == "word") <= (pair.caption in known_words(5))
            assert split_by_hash(pair.caption) == own
    kinds = Counter(pair.attributes["kind"] for pair in pairs("words", "train", 150))
    assert set(kinds) == set(patterns) and min(kinds.values()) > 30
    assert "кот" in known_words(3) and len(known_words(5)) > 200


def test_fonts_and_colours_that_are_held_out_meet_in_the_compositional_split_alone() -> None:
    met = {
        split: {(p.attributes["font"], p.attributes["colour"]) for p in pairs("words", split, 150)}
        for split in SPLITS
    }
    assert met.pop("compositional") == WordsConfig().held_out
    assert not any(looks & WordsConfig().held_out for looks in met.values())
    assert {font for font, _ in met["train"]} == set(FONTS)


@pytest.mark.parametrize("image_size", [48, 64])
def test_a_text_is_inside_the_image_and_nothing_covers_it(image_size: int) -> None:
    dataset = world("words", rotation=15.0, noise=0.0, image_size=image_size)
    for index in range(60):
        pair, written = dataset[index], dataset.inscription(index)
        opacity = text_opacity(written, image_size)
        edge = np.concatenate([opacity[[0, -1]], opacity[:, [0, -1]].T])
        assert opacity.max() > 0.6 and not edge.any()
        for each in pair.attributes["objects"].split("; "):
            row, column = map(int, each.split()[3:])
            assert not opacity[cell_pixels(row, column, grid=3, image_size=image_size)].any()
        pixels = np.asarray(pair.image, dtype=float)[opacity > 0.98]
        assert (np.abs(pixels - PALETTE[written.colour]) <= 6).all()


def test_a_image_changes_with_its_text_its_font_and_its_angle() -> None:
    plain = text_opacity(inscription("кошка"), 48)
    others = [
        inscription("кожка"),
        inscription("кошка", angle=8.0),
        inscription("кошка", is_at_top=False),
        *(inscription("кошка", font) for font in FONTS if font != "sans"),
    ]
    images = [plain, *(text_opacity(other, 48) for other in others)]
    for one, other in combinations(images, 2):
        assert np.abs(one - other).sum() > 8
    assert all(20 < image.sum() < 400 for image in images)


def test_each_letter_of_every_font_has_its_own_image() -> None:
    letters = "абвгдежзийклмнопрстуфхцчшщъыьэюяё0123456789"
    for font in FONTS:
        images = [text_opacity(inscription(letter, font), 48) for letter in letters]
        for one, other in combinations(images, 2):
            assert np.abs(one - other).sum() > 1.5, font


def test_noise_stays_in_its_bounds() -> None:
    quiet, noisy = (world("words", noise=noise)[5].image for noise in (0.0, 30.0))
    difference = np.asarray(quiet, dtype=int) - np.asarray(noisy, dtype=int)
    assert 25 < np.abs(difference).max() <= 31
    # On white, only darker noise remains.
    assert 5 < np.abs(difference).mean() < 16


# --- paragraphs ----------------------------------------------------------------------------------


def owners(context: str) -> dict[str, str]:
    """Return what each person has, keyed by the person as written after the preposition."""
    found = {}
    for sentence in context.rstrip(".").split(". "):
        match = re.fullmatch(r"у (\S+) (.+)|(.+) у (\S+)", sentence)
        assert match is not None
        found[match[1] or match[4]] = match[2] or match[3]
    return found


def number_of(phrase: str) -> int:
    starts = ("больш|маленьк", "дв", "три", "четыре", "пять")
    return 1 + next(n for n, start in enumerate(starts) if re.match(start, phrase))


def answer_from(context: str, question: str) -> str:
    """Answer a question about a text from their words alone."""
    has = {name: re.sub(r"^\S+ ", "", phrase) for name, phrase in owners(context).items()}
    number = {name: number_of(phrase) for name, phrase in owners(context).items()}
    if match := re.fullmatch(r"у кого больше фигур, у (\S+) или у (\S+)\?", question):
        assert number[match[1]] != number[match[2]]
        return f"у {max(match.groups(), key=number.__getitem__)}"
    if match := re.fullmatch(r"у кого (.+)\?", question):
        (name,) = [name for name, phrase in has.items() if meaning(match[1]) <= meaning(phrase)]
        return f"у {name}"
    if match := re.fullmatch(r"есть ли у (\S+) (.+)\?", question):
        return "да" if meaning(match[2]) <= meaning(has[match[1]]) else "нет"
    match = re.fullmatch(
        r"(что|сколько|какого цвета|какого размера) (?:(\S+) )?у (\S+)\?", question
    )
    assert match is not None, question
    what, shape, name = match.groups()
    if what == "что":
        return owners(context)[name]
    assert meaning(shape) <= meaning(has[name])
    if what == "сколько":
        return numeral(number[name], shape)
    if what == "какого размера":
        return "большой" if owners(context)[name].startswith("больш") else "маленький"
    return colour_word(*(meaning(has[name]) & set(COLOUR_STEMS.values())))


@pytest.mark.parametrize("split", SPLITS)
def test_an_answer_about_a_text_follows_from_the_text(split: str) -> None:
    for pair in pairs("paragraphs", split):
        context, question = pair.attributes["context"], pair.attributes["question"]
        assert pair.question == f"{context} {question}" and pair.image is None
        assert answer_from(context, question) == pair.caption, pair
        assert 2 <= len(owners(context)) <= 4 and set(owners(context)) <= set(NAMES.values())
        assert len(pair.question.split()) <= MAX_WORDS


def test_a_text_is_russian() -> None:
    shape = rf"(?:{masculine('')}|звезда|{PLURALS})"
    either = rf"(?:{shape}|{ONE}|{SEVERAL})"
    patterns = {
        rf"что у \S+\? (?:{SIZED}|{COUNTED})",
        rf"какого цвета {shape} у \S+\? {MAN}",
        rf"какого размера {shape} у \S+\? (?:большой|маленький)",
        rf"сколько (?:{masculine('ов')}|звёзд) у \S+\? (?:один|одна|два|две|три|четыре|пять)",
        rf"у кого {either}\? у \S+",
        rf"есть ли у \S+ {shape}\? (?:да|нет)",
        r"у кого больше фигур, (у \S+) или (у \S+)\? (?:\1|\2)",
    }
    met = Counter[str]()
    for pair in pairs("paragraphs"):
        asked = f"{pair.attributes['question']} {pair.caption}"
        met.update(pattern for pattern in patterns if re.fullmatch(pattern, asked))
        for phrase in owners(pair.attributes["context"]).values():
            assert re.fullmatch(f"{SIZED}|{COUNTED}", phrase), phrase
    assert met.total() == len(pairs("paragraphs")) and set(met) == patterns


def test_a_noun_is_plural_where_a_person_has_more_than_one() -> None:
    numbers = Counter[bool]()
    for pair in pairs("paragraphs"):
        question = pair.attributes["question"]
        if match := re.fullmatch(r"какого цвета (\S+) у (\S+)\?", question):
            is_plural = number_of(owners(pair.attributes["context"])[match[2]]) > 1
            numbers[is_plural] += 1
            assert (re.fullmatch(PLURALS, match[1]) is not None) == is_plural
    assert min(numbers.values()) > 10


def test_texts_and_their_splits_are_even() -> None:
    asked = pairs("paragraphs")
    families = Counter(pair.attributes["family"] for pair in asked)
    assert set(families) == set(ParagraphsConfig().families) and min(families.values()) > 70
    answers = Counter(pair.caption for pair in asked)
    assert max(answers.values()) < 0.13 * len(asked)
    is_there = Counter(p.caption for p in asked if p.attributes["family"] == "existence")
    assert abs(is_there["да"] - is_there["нет"]) < 0.25 * families["existence"]
    contexts = [{p.attributes["context"] for p in pairs("paragraphs", split)} for split in SPLITS]
    assert not any(one & other for one, other in combinations(contexts, 2))
    for split, texts in zip(SPLITS[:3], contexts, strict=False):
        assert all(split_by_hash(text) == split for text in texts)
    held_out = [set(look) for look in ParagraphsConfig().held_out]
    for split in SPLITS:
        for pair in pairs("paragraphs", split):
            phrases = owners(pair.attributes["context"]).values()
            met = [meaning(re.sub(r"^\S+ ", "", phrase)) for phrase in phrases]
            assert any(look in held_out for look in met) == (split == "compositional")


# --- arithmetic ----------------------------------------------------------------------------------


def value_of(expression: str) -> int:
    first, operation, second = expression.split(" ")
    a, b = int(first), int(second)
    return {"+": a + b, "-": a - b, "×": a * b}[operation]


@pytest.mark.parametrize("split", SPLITS)
def test_an_answer_is_the_value_or_its_letter(split: str) -> None:
    for pair in pairs("arithmetic", split):
        match = re.fullmatch(
            r"сколько будет ([^?]+)\?(?: а\) (\d+) б\) (\d+) в\) (\d+))?", pair.question
        )
        assert match is not None and pair.image is None
        value, options = str(value_of(match[1])), match.groups()[1:]
        assert int(value) >= 0 and match[1] == pair.attributes["expression"]
        if pair.attributes["form"] == "open":
            assert (pair.caption, pair.choices, options) == (value, (), (None,) * 3)
        else:
            assert len(set(options)) == 3 and pair.choices == ("а", "б", "в")
            assert options[pair.choices.index(pair.caption)] == value


def test_every_operation_and_letter_is_as_frequent_as_the_others() -> None:
    asked = pairs("arithmetic")
    families = Counter(pair.attributes["family"] for pair in asked)
    letters = Counter(pair.caption for pair in asked if pair.choices)
    assert set(families) == {"+", "-", "×"} and min(families.values()) > 0.27 * len(asked)
    assert set(letters) == {"а", "б", "в"} and min(letters.values()) > 0.27 * letters.total()
    ranks, rng = Counter[int](), Random(0)
    for _ in range(900):
        options = sample_options(20, 3, rng)
        ranks[sorted(options).index(20)] += 1
        assert len(set(options)) == 3
    assert max(ranks.values()) < 360
    assert all(
        min(sample_options(value, 5, rng)) >= 0 for value in (0, 1, 2, 3) for _ in range(50)
    )


def test_an_expression_is_in_one_split_in_either_form_and_order() -> None:
    def canonical(pair: Pair) -> tuple[str, ...]:
        first, operation, second = pair.attributes["expression"].split(" ")
        return (operation, *((first, second) if operation == "-" else sorted((first, second))))

    known = {split: set(map(canonical, pairs("arithmetic", split))) for split in SPLITS}
    assert not any(known[one] & known[other] for one, other in combinations(SPLITS, 2))
    assert known["train"] & {("+", *sorted(("7", "5"))), ("-", "9", "3"), ("×", "2", "4")}
    held_out = world("arithmetic").config.held_out
    assert held_out == {"+": 8, "-": 7, "×": 6}
    for split, expressions in known.items():
        for operation, *numbers in expressions:
            assert (str(held_out[operation]) in numbers) == (split == "compositional")
    with pytest.raises(ValueError, match="operations: expected at least 2 for the compositional"):
        world("arithmetic", "compositional", operations=("+",))
