"""Questions about shapes: one correct answer, recomputed from the question and the objects."""

import re
from collections import Counter
from dataclasses import replace
from itertools import combinations

import pytest
from small_worlds import (
    MAN,
    MANY,
    OF_THOSE,
    ONE,
    PLACES,
    WOMAN,
    Thing,
    colour_word,
    masculine,
    meaning,
    meant,
    numeral,
    pairs,
    things,
    world,
)

from rudolph.data.datasets.shapes_checker import read_scene
from rudolph.data.datasets.shapes_question_families import is_unambiguous
from rudolph.data.datasets.shapes_questions import ShapesQuestionsConfig, split_of_question
from rudolph.data.datasets.shapes_russian import numeral as own_numeral
from rudolph.data.datasets.shapes_russian import plural_phrase, qualities, quality
from rudolph.data.datasets.shapes_scenes import SceneObject
from rudolph.data.datasets.synthetic import split_by_hash
from rudolph.data.pairs import SPLITS

SHAPE_WORDS = {
    "circle": "круг",
    "square": "квадрат",
    "triangle": "треугольник",
    "cross": "крест",
    "star": "звезда",
}
SIZE_WORDS = {"small": "маленький", "large": "большой"}


def the_only(objects: list[Thing]) -> Thing:
    assert len(objects) == 1
    return objects[0]


def in_place(phrase: str, objects: list[Thing]) -> list[Thing]:
    """Return the objects in a corner, in the centre, or anywhere on a side."""
    row = "0" if "сверху" in phrase else "2" if "снизу" in phrase else None
    column = "0" if "слева" in phrase else "2" if "справа" in phrase else None
    if phrase == "в центре":
        row = column = "1"
    return [each for each in objects if row in (None, each[3]) and column in (None, each[4])]


def answer_anew(question: str, objects: list[Thing]) -> str:
    """Answer a question about objects from its words alone."""
    if match := re.fullmatch(rf"(какого цвета|какая) фигура ({'|'.join(PLACES)})\?", question):
        _, colour, shape, *_ = the_only(in_place(match[2], objects))
        return colour_word(colour) if "цвета" in match[1] else SHAPE_WORDS[shape]
    if match := re.fullmatch(r"(какого цвета|какая|какого размера|где) (.+)\?", question):
        size, colour, shape, row, column = the_only(meant(match[2], objects))
        return {
            "какого цвета": colour_word(colour),
            "какая": SHAPE_WORDS[shape],
            "какого размера": SIZE_WORDS[size],
            "где": PLACES[3 * int(row) + int(column)],
        }[match[1]]
    if match := re.fullmatch(r"сколько (?:всего )?(.+)\?", question):
        return numeral(len(meant(match[1], objects)), match[1])
    if match := re.fullmatch(r"(?:чего|каких фигур) больше: (.+) или (.+)\?", question):
        first, second = (len(meant(kind, objects)) for kind in match.groups())
        return "поровну" if first == second else match[1 if first > second else 2]
    if match := re.fullmatch(r"больше ли (.+), чем (.+)\?", question):
        first, second = (len(meant(kind, objects)) for kind in match.groups())
        return "да" if first > second else "нет"
    if match := re.fullmatch(r"что больше: (.+) или (.+)\?", question):
        sizes = [the_only(meant(kind, objects))[0] for kind in match.groups()]
        assert sorted(sizes) == ["large", "small"]
        return match[1 + sizes.index("large")]
    match = re.fullmatch(r"есть ли (.+)\?", question)
    assert match is not None, question
    return "да" if meant(match[1], objects) else "нет"


@pytest.mark.parametrize(
    ("phrase", "expected"),
    [
        (plural_phrase("blue", "star"), "синие звёзды"),
        (plural_phrase("cyan", "cross", case="genitive"), "голубых крестов"),
        (plural_phrase("red", "figure", case="genitive"), "красных фигур"),
        (" ".join(own_numeral(number, "star") for number in (0, 1, 2, 5)), "ноль одна две пять"),
        (" ".join(own_numeral(number, "cross") for number in (1, 2, 5)), "один два пять"),
        (quality("blue"), "синий"),
        (quality("large", "figure"), "большая"),
        (quality("large", "circle"), "большой"),
        (qualities("violet"), "фиолетовых"),
    ],
)
def test_a_word_of_a_question_is_the_russian_worked_out_by_hand(
    phrase: str, expected: str
) -> None:
    assert phrase == expected


@pytest.mark.parametrize("split", SPLITS)
def test_an_answer_is_the_only_right_one_for_the_objects(split: str) -> None:
    for pair in pairs("shapes_questions", split):
        assert answer_anew(pair.question, things(pair)) == pair.caption, pair
        assert len({each[3:] for each in things(pair)}) == len(things(pair))


def test_an_answer_is_right_for_what_a_reader_finds_in_the_image() -> None:
    dataset = world("shapes_questions", "test", image_size=32)
    for index in range(120):
        pair = dataset[index]
        read = [
            (o.size, o.colour, o.shape, str(o.row), str(o.column))
            for o in read_scene(pair.image, grid=3).objects
        ]
        assert read == things(pair)
        assert answer_anew(pair.question, read) == pair.caption


def test_a_world_of_two_shapes_and_two_colours_has_every_question_but_few() -> None:
    dataset = world(
        "shapes_questions",
        grid=2,
        max_objects=3,
        shapes=("circle", "star"),
        colours=("red", "blue"),
    )
    for index in range(200):
        pair = dataset[index]
        if " фигура с" not in pair.question and not pair.question.startswith("где"):
            assert answer_anew(pair.question, things(pair)) == pair.caption, pair


def test_every_family_is_asked_and_no_answer_of_it_is_frequent() -> None:
    dataset = world("shapes_questions")
    asked = [dataset.question(index) for index in range(2_000)]
    families = Counter(question.family for question in asked)
    assert set(families) == set(dataset.config.families) and min(families.values()) > 240
    assert max(Counter(question.answer for question in asked).values()) < 0.12 * len(asked)
    # With two answers, each is chosen half of the time.
    most = {"size": 0.57, "existence": 0.57}
    for family, number in families.items():
        answers = Counter(question.answer for question in asked if question.family == family)
        assert max(answers.values()) < most.get(family, 0.26) * number, (family, answers)
    assert {len(question.objects) for question in asked} == {1, 2, 3, 4, 5}


def test_questions_and_answers_are_russian() -> None:
    dataset, place = world("shapes_questions"), f"(?:{'|'.join(PLACES)})"
    shape, shapes = rf"(?:{masculine('')}|звезда)", rf"(?:{masculine('ов')}|звёзд)"
    one, many = rf"(?:{shape}|{ONE})", rf"(?:{shapes}|{MANY})"
    patterns = {
        rf"какого цвета (?:{shape}|фигура {place})\? {MAN}",
        rf"какая фигура (?:{WOMAN}|{place})\? {shape}",
        rf"какого размера {one}\? (?:большой|маленький)",
        rf"сколько (?:всего фигур|{many})\? (?:ноль|один|одна|два|две|три|четыре|пять)",
        rf"где {one}\? {place}",
        rf"чего больше: ({shapes}) или ({shapes})\? (?:\1|\2|поровну)",
        rf"каких фигур больше: ({OF_THOSE}) или ({OF_THOSE})\? (?:\1|\2|поровну)",
        rf"больше ли (?:{shapes}, чем {shapes}|{OF_THOSE} фигур, чем {OF_THOSE})\? (?:да|нет)",
        rf"что больше: ({ONE}) или ({ONE})\? (?:\1|\2)",
        rf"есть ли {ONE}\? (?:да|нет)",
    }
    said = {f"{each.text} {each.answer}" for each in map(dataset.question, range(2_000))}
    met = Counter(pattern for text in said for pattern in patterns if re.fullmatch(pattern, text))
    assert met.total() == len(said) and set(met) == patterns


def test_no_question_about_the_same_objects_is_in_two_splits() -> None:
    known = {
        split: {
            (pair.question, pair.attributes["objects"])
            for pair in pairs("shapes_questions", split)
        }
        for split in SPLITS
    }
    assert not any(known[one] & known[other] for one, other in combinations(SPLITS, 2))
    assert all(split_by_hash(" ".join(each)) == "test" for each in known["test"])


def test_only_compositional_questions_show_or_name_a_held_out_colour_and_shape() -> None:
    held_out = ShapesQuestionsConfig().held_out
    for split in SPLITS:
        for pair in pairs("shapes_questions", split):
            met = {frozenset(each[1:3]) for each in things(pair)}
            if found := re.fullmatch(r"(?:есть ли|сколько) ((?!всего)\S+ \S+)\?", pair.question):
                met.add(frozenset(meaning(found[1])))
            is_new = any(frozenset(look) in met for look in held_out)
            assert is_new == (split == "compositional"), pair


def test_a_scene_with_what_is_held_out_is_of_no_split_when_something_else_is_asked() -> None:
    config = ShapesQuestionsConfig()
    question = world("shapes_questions", "compositional", families=("colour",)).question(0)
    assert split_of_question(question, config) == "compositional"
    assert split_of_question(replace(question, targets=frozenset()), config) is None
    bare = replace(question, targets=frozenset(), objects=())
    assert split_of_question(bare, config) == split_by_hash(f"{question.text} ")


def test_a_side_is_no_clear_place_when_another_object_is_on_it() -> None:
    left, corner, far = (
        SceneObject("circle", "red", "small", *cell) for cell in [(1, 0), (0, 0), (2, 2)]
    )
    assert is_unambiguous(left, [far], grid=3) and not is_unambiguous(left, [corner], grid=3)
    assert is_unambiguous(corner, [left], grid=3) and is_unambiguous(corner, [left], grid=2)
