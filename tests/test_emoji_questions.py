"""Questions about emoji, whose answers are derived here independently."""

import csv
import re
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_emoji import write_set

from rudolph.data.datasets.emoji import (
    EMOJI_COLUMNS,
    GROUPS,
    SHIPPED_EMOJI,
    assign_splits,
    emoji_image,
    read_records,
)
from rudolph.data.datasets.emoji_questions import (
    EMOJI_QUESTION_FAMILIES,
    EmojiQuestion,
    EmojiQuestions,
    EmojiQuestionsConfig,
    emoji_questions,
    permute_words,
)
from rudolph.data.pairs import SPLITS

RECORDS = read_records(SHIPPED_EMOJI)
RECORD_OF = {record.key: record for record in RECORDS}
PLACE = {record.key: place for place, record in enumerate(RECORDS)}
with (SHIPPED_EMOJI / "emoji.csv").open(encoding="utf-8", newline="") as file:
    ROWS = {row["key"]: row for row in csv.DictReader(file)}
QUESTIONS = {
    split: emoji_questions(RECORDS, split, families=tuple(EMOJI_QUESTION_FAMILIES))
    for split in SPLITS
}
TONE = re.compile(r"(?:очень )?(?:светлый|средний|темный) тон кожи")
TONE_OF_MODIFIER = {
    "\U0001f3fb": "очень светлый",
    "\U0001f3fc": "светлый",
    "\U0001f3fd": "средний",
    "\U0001f3fe": "темный",
    "\U0001f3ff": "очень темный",
}


def of_family(family: str, *splits: str) -> list[EmojiQuestion]:
    return [
        question
        for split in splits or SPLITS
        for question in QUESTIONS[split]
        if question.family == family
    ]


def test_questions_follow_the_splits_of_the_emoji_and_no_image_crosses() -> None:
    split_of = assign_splits(RECORDS)
    tiles = {}
    for split, questions in QUESTIONS.items():
        assert {split_of[question.record.key] for question in questions} == {split}
        tiles[split] = {question.record.tile for question in questions}
    assert sum(map(len, tiles.values())) == len(set.union(*tiles.values()))
    keys = [question.key for questions in QUESTIONS.values() for question in questions]
    assert len(keys) == len(set(keys))


def test_every_family_is_asked_in_every_split_and_answers_are_among_the_choices() -> None:
    for questions in QUESTIONS.values():
        assert {question.family for question in questions} == set(EMOJI_QUESTION_FAMILIES)
        for question in questions:
            assert not question.choices or question.answer in question.choices
            assert len(set(question.choices)) == len(question.choices)
            assert bool(question.choices) == (question.family != "name")


def test_equal_questions_about_equal_images_have_equal_answers() -> None:
    answers = defaultdict(set)
    for questions in QUESTIONS.values():
        for question in questions:
            answers[question.record.tile, question.text].add(question.answer)
    assert {len(found) for found in answers.values()} == {1}


def test_names_are_those_of_the_emoji_without_its_tones() -> None:
    questions = of_family("name")
    for question in questions:
        name = " ".join(TONE.sub("", ROWS[question.record.key]["name"]).split())
        # The name of an untoned couple of adults is their activity alone.
        plain = name.removesuffix(":").removesuffix(": взрослый взрослый")
        if plain.startswith("флаг: "):
            assert (question.text, question.answer) == ("чей это флаг?", plain[len("флаг: ") :])
        else:
            assert (question.text, question.answer) == ("что на картинке?", plain)
    # All emoji but those that share an image with an emoji of another name.
    named = {question.record.key for question in questions}
    assert len(RECORDS) - len(named) < 22
    shared = Counter(record.tile for record in RECORDS)
    assert all(shared[record.tile] > 1 for record in RECORDS if record.key not in named)


def test_groups_are_those_of_the_table() -> None:
    questions = of_family("group")
    assert {question.record.key for question in questions} == set(ROWS)
    for question in questions:
        assert question.answer == GROUPS[ROWS[question.record.key]["group"]]
        assert question.choices == tuple(GROUPS.values())


def test_skin_tones_are_those_of_the_modifiers() -> None:
    asked = {question.record.key: question.answer for question in of_family("skin_tone")}
    tiles = Counter(record.tile for record in RECORDS)
    for key, row in ROWS.items():
        tones = {TONE_OF_MODIFIER[c] for c in row["characters"] if c in TONE_OF_MODIFIER}
        if len(tones) == 1 and tiles[RECORD_OF[key].tile] == 1:
            answer = f"{tones.pop()} тон кожи"
            assert asked.pop(key) == answer
            assert answer in row["keywords"].split("|")
            assert set(TONE.findall(row["name"])) == {answer}
    assert asked == {}


def test_genders_are_those_of_the_names_of_the_code_points() -> None:
    answer_of = {
        "MAN": "мужчина",
        "MALE SIGN": "мужчина",
        "WOMAN": "женщина",
        "FEMALE SIGN": "женщина",
        "ADULT": "человек",
    }
    asked = {question.record.key: question.answer for question in of_family("gender")}
    for key, row in ROWS.items():
        points = [unicodedata.name(character, "") for character in row["characters"]]
        told = {answer_of[name] for name in points if name in answer_of}
        if key in asked and told:
            assert told == {asked[key]}
        if told and key not in asked:
            several = row["subgroup"] == "family" or "1f46f" in key or "1f93c" in key
            assert several or not row["subgroup"].startswith("person")
        if key in asked and not told:
            (word,) = re.findall(r"\b(мужчин|женщин|человек)", row["name"])
            assert asked[key].startswith(word)
    assert Counter(asked.values()).keys() == {"мужчина", "женщина", "человек"}


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("женщина-космонавт", "женщина"),
        ("врач", "мужчина"),
        ("повар", "человек"),
        ("повариха", "женщина"),
        ("человеку массируют лицо", "человек"),
        ("женщина в платке", "женщина"),
        ("бородатый человек", None),
        ("полицейский", None),
        ("мужчины-борцы", None),
        ("мужчина и женщина", None),
        ("семья: мужчина мальчик", None),
        ("мужской символ", None),
        ("невеста", None),
    ],
)
def test_a_gender_is_asked_only_where_it_is_certain(name: str, answer: str | None) -> None:
    found = [question for question in of_family("gender") if question.record.name == name]
    assert [question.answer for question in found] == ([] if answer is None else [answer])


def test_a_word_fits_when_it_is_a_keyword_and_else_no_emoji_of_its_subgroup_has_it() -> None:
    words = defaultdict(set)
    for row in ROWS.values():
        words[row["subgroup"]] |= set(row["keywords"].split("|"))
    for question in of_family("keyword"):
        row = ROWS[question.record.key]
        (word,) = re.findall(r"\Aподходит ли слово «(\w+)»\?\Z", question.text)
        assert (word in row["keywords"].split("|")) == (question.answer == "да")
        if question.answer == "нет":
            assert word not in words[row["subgroup"]]


def test_a_word_that_does_not_fit_is_new_to_the_image_and_the_subgroup_in_any_spelling(
    tmp_path: Path,
) -> None:
    random = Random(0)
    words = ["полёт", "Полет", "полет", "Ёж", "ёж", "еж", *"абвгдежзиклмнопрст"]
    rows = [
        {
            "name": f"{at}",
            "keywords": "|".join(random.sample(words, 2)),
            "subgroup": f"{random.randrange(40)}",
            "tile": random.randrange(60),
        }
        for at in range(200)
    ]
    records = read_records(Path(write_set(tmp_path / "set", rows)))
    asked = [q for split in SPLITS for q in emoji_questions(records, split, families=("keyword",))]
    assert Counter(question.answer for question in asked)["нет"] > 20
    for question in asked:
        if question.answer == "нет":
            own, word = question.record, question.text.lower().replace("ё", "е")
            for other in records:
                if other.tile == own.tile or other.subgroup == own.subgroup:
                    known = other.keywords.lower().replace("ё", "е").split("|")
                    assert not any(f"«{each}»" in word for each in known)


@pytest.mark.parametrize("split", SPLITS)
def test_a_word_tells_nothing_without_the_image(split: str) -> None:
    words: dict[str, Counter[str]] = {"да": Counter(), "нет": Counter()}
    keys: dict[str, set[str]] = {"да": set(), "нет": set()}
    for question in of_family("keyword", split):
        words[question.answer][question.text] += 1
        keys[question.answer].add(question.record.key)
    assert words["да"] == words["нет"]
    assert keys["да"] == keys["нет"]
    assert len(keys["да"]) > 0.9 * sum(s == split for s in assign_splits(RECORDS).values())


@given(
    st.lists(st.sampled_from("абвгдежз"), max_size=12),
    st.lists(st.sets(st.sampled_from("абвгдежз"), max_size=4), min_size=12, max_size=12),
)
def test_words_are_dealt_out_once_each_and_only_where_they_are_legal(
    words: list[str], forbidden: list[set[str]]
) -> None:
    dealt = permute_words(words, lambda at, word: word not in forbidden[at])
    assert len(dealt) == len(words)
    assert Counter(filter(None, dealt)) <= Counter(words)
    assert all(word not in forbidden[at] for at, word in enumerate(dealt))
    if None not in dealt:
        assert Counter(dealt) == Counter(words)


@pytest.mark.parametrize("split", ["validation", "compositional"])
def test_a_pair_shows_the_emoji_that_is_asked_about(split: str) -> None:
    dataset = EmojiQuestions(EmojiQuestionsConfig(), split=split, image_size=8)
    assert len(dataset) == len(QUESTIONS[split])
    for index in range(0, len(dataset), 11):
        question, pair = QUESTIONS[split][index], dataset[index]
        assert (pair.key, pair.question, pair.caption, pair.choices) == (
            question.key,
            question.text,
            question.answer,
            question.choices,
        )
        shown = emoji_image(SHIPPED_EMOJI, question.record.tile, 8)
        assert pair.image is not None and pair.image.tobytes() == shown.tobytes()
        assert pair.attributes["family"] == question.family
        assert pair.attributes["characters"] == ROWS[question.record.key]["characters"]


def test_fewer_families_are_the_same_questions_in_the_same_order() -> None:
    for split in SPLITS:
        some = emoji_questions(RECORDS, split, families=("gender", "name"))
        every = [q for q in QUESTIONS[split] if q.family in ("name", "gender")]
        assert some == every
        places = [PLACE[question.record.key] for question in some[::50]]
        assert places == sorted(places)


def test_the_digest_tells_every_set_of_questions_apart() -> None:
    def digest(split: str = "test", size: int = 8, **options: Any) -> str:
        config = EmojiQuestionsConfig(**options)
        return EmojiQuestions(config, split=split, image_size=size).digest

    digests = {digest(), digest("validation"), digest(size=9), digest(families=("name", "group"))}
    assert len(digests) == 4
    assert digest(families=("group", "name")) in digests
    assert digest(folder=str(SHIPPED_EMOJI)) in digests


def test_the_digest_changes_with_a_word_of_the_table_or_a_pixel(tmp_path: Path) -> None:
    rows = [{"name": f"{at}", "keywords": f"слово{at}", "tile": at} for at in range(40)]
    config = EmojiQuestionsConfig(folder=write_set(tmp_path / "first", rows))
    digests = {EmojiQuestions(config, split="train", image_size=2).digest}
    rows[3]["keywords"] = "другое"
    changed = EmojiQuestionsConfig(folder=write_set(tmp_path / "second", rows))
    digests.add(EmojiQuestions(changed, split="train", image_size=2).digest)
    rows[3]["keywords"] = "слово3"
    repainted = EmojiQuestionsConfig(folder=write_set(tmp_path / "third", rows))
    Image.new("RGB", (2 * EMOJI_COLUMNS, 2), "red").save(tmp_path / "third" / "emoji.png")
    digests.add(EmojiQuestions(repainted, split="train", image_size=2).digest)
    assert len(digests) == 3


def test_a_wrong_setting_is_answered_in_one_line(tmp_path: Path) -> None:
    one_of_a_kind = write_set(tmp_path / "set", [{"name": "а", "tile": 0}])
    empty = EmojiQuestionsConfig(families=("gender",), folder=one_of_a_kind)
    for wrong, words in (
        (lambda: EmojiQuestionsConfig(families=()), "at least one of name, keyword, group"),
        (lambda: EmojiQuestionsConfig(families=("name", "name")), "each once"),
        (lambda: EmojiQuestionsConfig(families=("title",)), "title"),
        (lambda: EmojiQuestions(empty, split="train", image_size=8), "no question in the split"),
        (lambda: EmojiQuestions(empty, split="dev", image_size=8), "split must be one of"),
        (lambda: EmojiQuestions(empty, split="train", image_size=0), "got 0"),
    ):
        with pytest.raises(ValueError, match=rf"\A[^\n]*{words}[^\n]*\Z"):
            wrong()
