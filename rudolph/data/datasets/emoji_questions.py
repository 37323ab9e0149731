"""Questions about emoji images with short Russian answers, for the images of ``Emoji``.

A *family* is a type of question:

=========  ==========================================  ==========================================
family     example question                            answer
=========  ==========================================  ==========================================
name       что на картинке?, чей это флаг?             the name of the base, or of the country
keyword    подходит ли слово «рога»?                   да for a keyword of CLDR, нет for a word
                                                       that no emoji of the subgroup has
group      к какой группе относится?                   one of the Unicode groups
skin_tone  какой тон кожи?                             one of five, if the emoji has exactly one
gender     кто это: мужчина, женщина или человек?      one of three, if code points and name
                                                       agree
=========  ==========================================  ==========================================

An image has a question only if all emoji that share it have the same answer.

To add a family, write a function and add it to ``EMOJI_QUESTION_FAMILIES``.  The function gets the
emoji of a split and those of the whole set, and returns the questions.
"""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rudolph.data.datasets.emoji import (
    FLAG_QUESTION,
    NAME_QUESTION,
    SHIPPED_EMOJI,
    SKIN_TONE_QUESTION,
    EmojiRecord,
    assign_splits,
    emoji_image,
    folder_digest,
    group_name,
    group_names,
    pair_attributes,
    read_records,
    require_image_size,
)
from rudolph.data.pairs import Pair, hash_fraction, require_split

GROUP_QUESTION = "к какой группе относится?"
GENDER_QUESTION = "кто это: мужчина, женщина или человек?"
YES, NO = "да", "нет"
GENDERS = ("мужчина", "женщина", "человек")
# From CLDR 41, annotationsDerived/ru.xml; the keys are the values of emoji.SKIN_TONES.
SKIN_TONE_NAMES = {
    "light": "очень светлый тон кожи",
    "medium-light": "светлый тон кожи",
    "medium": "средний тон кожи",
    "medium-dark": "темный тон кожи",
    "dark": "очень темный тон кожи",
}

# Code points in a key: man, woman, adult, and the male and female sign after a joiner.
GENDER_OF_POINT = {
    "1f468": "мужчина",
    "1f469": "женщина",
    "1f9d1": "человек",
    "2642": "мужчина",
    "2640": "женщина",
}
GENDER_OF_WORD = {
    "мужчина": "мужчина",
    "мужчине": "мужчина",
    "женщина": "женщина",
    "женщине": "женщина",
    "человек": "человек",
    "человеку": "человек",
}
SEVERAL_PEOPLE = {"люди", "мужчины", "женщины"}


@dataclass(frozen=True)
class EmojiQuestionsConfig:
    """Configuration of the question families, and the folder of the set.

    Attributes:
        families: Keys of ``EMOJI_QUESTION_FAMILIES``.
        folder: Output folder of ``rudolph data emoji``; ``None`` is the set in the package.
    """

    families: tuple[str, ...] = ("name", "keyword", "group", "skin_tone", "gender")
    folder: str | None = None

    def __post_init__(self) -> None:
        """Raise ``ValueError`` if a family is unknown or repeated, or there is none."""
        names = self.families
        if (
            not names
            or len(set(names)) < len(names)
            or not set(names) <= set(EMOJI_QUESTION_FAMILIES)
        ):
            raise ValueError(
                f"families must be at least one of {', '.join(EMOJI_QUESTION_FAMILIES)}, "
                f"each once, got {names}"
            )


@dataclass(frozen=True)
class EmojiQuestion:
    """A question about an emoji; ``choices`` is empty if the question is open."""

    record: EmojiRecord
    family: str
    text: str
    answer: str
    choices: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Return the key of the emoji with the family and, for yes-no questions, the answer."""
        answer = ("/yes" if self.answer == YES else "/no") if self.choices == (YES, NO) else ""
        return f"{self.record.key}/{self.family}{answer}"


Records = Sequence[EmojiRecord]


class EmojiQuestions:
    """The questions about the emoji of one split; the splits are those of ``Emoji``.

    Questions are ordered by emoji, independently of the order of the families in the config.

    Args:
        config: Families and folder of the set.
        split: Name of the split.
        image_size: Side of the images, in pixels.

    Raises:
        ValueError: If the split, the size or the files are invalid, or the split has no question.
    """

    def __init__(self, config: EmojiQuestionsConfig, *, split: str, image_size: int) -> None:
        require_split(split)
        require_image_size(image_size)
        self.config = config
        self.image_size = image_size
        self.folder = SHIPPED_EMOJI if config.folder is None else Path(config.folder)
        self.questions = emoji_questions(
            read_records(self.folder), split, families=config.families
        )
        if not self.questions:
            raise ValueError(
                f"families {', '.join(config.families)}: no question in the split {split!r} of "
                f"{self.folder}"
            )
        rows = [
            (question.key, question.text, question.answer, question.choices)
            for question in self.questions
        ]
        content = ["emoji questions", image_size, folder_digest(self.folder), rows]
        self.digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def __len__(self) -> int:
        """Return the number of questions."""
        return len(self.questions)

    def __getitem__(self, index: int) -> Pair:
        """Return the pair at ``index``."""
        question = self.questions[index]
        return Pair(
            key=question.key,
            caption=question.answer,
            image=emoji_image(self.folder, question.record.tile, self.image_size),
            attributes={"family": question.family, **pair_attributes(question.record)},
            question=question.text,
            choices=question.choices,
        )


def emoji_questions(
    records: Records, split: str, *, families: Sequence[str]
) -> list[EmojiQuestion]:
    """Return the questions about one split, ordered by emoji; ``records`` is the whole set."""
    splits = assign_splits(records)
    split_records = [record for record in records if splits[record.key] == split]
    position_of_key = {record.key: position for position, record in enumerate(split_records)}
    questions = [
        question
        for family, family_questions in EMOJI_QUESTION_FAMILIES.items()
        if family in families
        for question in family_questions(split_records, records)
    ]
    return sorted(questions, key=lambda question: position_of_key[question.record.key])


# --- families ------------------------------------------------------------------------------------


def name_questions(records: Records, all_records: Records) -> list[EmojiQuestion]:
    """Return questions about the name of the base emoji or, for a flag, about its country."""
    names = {record.base: record.name for record in all_records if record.key == record.base}

    def question_and_answer(record: EmojiRecord) -> tuple[str, str]:
        name = names.get(record.base, record.name)
        subject, _, owner = name.partition(": ")
        return (FLAG_QUESTION, owner) if subject == "флаг" and owner else (NAME_QUESTION, name)

    return _unambiguous_questions("name", records, question_and_answer)


def keyword_questions(records: Records, all_records: Records) -> list[EmojiQuestion]:
    """Return two questions per emoji: about a keyword that fits and about a word that does not.

    The words that do not fit are a permutation of those that fit.  Each word therefore occurs as
    often with either answer, and reveals nothing without the image.  An emoji has no questions if
    no legal word is found for it.
    """
    known_words: dict[str | int, set[str]] = defaultdict(set)
    for record in all_records:
        words = {_alike(word) for word in _words(f"{record.name} {record.keywords}")}
        known_words[record.subgroup] |= words
        known_words[record.tile] |= words
    ordered = sorted(records, key=lambda record: hash_fraction(record.key))
    matches = [(record, word) for record in ordered if (word := _fitting_word(record))]

    def is_unrelated(index: int, word: str) -> bool:
        record, _ = matches[index]
        folded = _alike(word)
        return (
            folded not in known_words[record.subgroup] and folded not in known_words[record.tile]
        )

    other_words = permute_words([word for _, word in matches], is_unrelated)
    return [
        EmojiQuestion(record, "keyword", f"подходит ли слово «{word}»?", answer, (YES, NO))
        for (record, matching), other in zip(matches, other_words, strict=True)
        if other is not None
        for word, answer in ((matching, YES), (other, NO))
    ]


def group_questions(records: Records, all_records: Records) -> list[EmojiQuestion]:
    """Return questions about the Unicode group; the choices are all groups of the set."""
    return _unambiguous_questions(
        "group",
        records,
        lambda record: (GROUP_QUESTION, group_name(record)),
        choices=group_names(all_records),
    )


def skin_tone_questions(records: Records, all_records: Records) -> list[EmojiQuestion]:
    """Return questions about the skin tone of emoji with exactly one."""

    def question_and_answer(record: EmojiRecord) -> tuple[str, str] | None:
        name = SKIN_TONE_NAMES.get(record.skin_tone)
        return None if name is None else (SKIN_TONE_QUESTION, name)

    return _unambiguous_questions(
        "skin_tone", records, question_and_answer, choices=tuple(SKIN_TONE_NAMES.values())
    )


def gender_questions(records: Records, all_records: Records) -> list[EmojiQuestion]:
    """Return questions about the gender: man, woman, or person of unspecified gender."""

    def question_and_answer(record: EmojiRecord) -> tuple[str, str] | None:
        answer = gender(record)
        return None if answer is None else (GENDER_QUESTION, answer)

    return _unambiguous_questions("gender", records, question_and_answer, choices=GENDERS)


def gender(record: EmojiRecord) -> str | None:
    """Return one of ``GENDERS`` for a single person, or None if it is unclear.

    Code points and name must not disagree.  Names of professions do not count, because they are
    masculine in Russian for any gender.
    """
    words = set(_words(record.name.lower()))
    if not record.subgroup.startswith("person") or words & SEVERAL_PEOPLE:
        return None
    points = record.base.split("-")
    genders = {GENDER_OF_POINT[point] for point in points if point in GENDER_OF_POINT}
    genders |= {GENDER_OF_WORD[word] for word in words if word in GENDER_OF_WORD}
    if len(genders) != 1:
        return None
    (answer,) = genders
    # A man or woman may have the keyword "человек", but a person with the keyword "мужчина" or
    # "женщина" is ambiguous.
    if answer == "человек" and {"мужчина", "женщина"} & set(record.keywords.split("|")):
        return None
    return answer


def permute_words(words: Sequence[str], is_legal: Callable[[int, str], bool]) -> list[str | None]:
    """Return the words in another order, each at a position where it is legal.

    A position is None if no exchange of two words gives it a legal word.

    >>> words = ["кот", "дом", "лев", "сад"]
    >>> permute_words(words, lambda at, word: (at < 2) == (word in ("дом", "сад")))
    ['дом', 'сад', 'кот', 'лев']
    """
    half = len(words) // 2
    permuted = [*words[half:], *words[:half]]
    positions = range(len(permuted))
    for index in positions:
        if is_legal(index, permuted[index]):
            continue
        for other_index in positions:
            if is_legal(index, permuted[other_index]) and is_legal(other_index, permuted[index]):
                permuted[index], permuted[other_index] = permuted[other_index], permuted[index]
                break
    return [word if is_legal(index, word) else None for index, word in enumerate(permuted)]


def _unambiguous_questions(
    family: str,
    records: Records,
    question_and_answer: Callable[[EmojiRecord], tuple[str, str] | None],
    *,
    choices: tuple[str, ...] = (),
) -> list[EmojiQuestion]:
    """Return the questions of every emoji that agrees with all other emoji of the same image.

    Emoji agree if they have the same question and answer.
    """
    questions = {record.key: question_and_answer(record) for record in records}
    questions_of_tile: dict[int, set[tuple[str, str] | None]] = defaultdict(set)
    for record in records:
        questions_of_tile[record.tile].add(questions[record.key])
    return [
        EmojiQuestion(record, family, *question, choices)
        for record in records
        if (question := questions[record.key]) is not None
        and len(questions_of_tile[record.tile]) == 1
    ]


def _fitting_word(record: EmojiRecord) -> str:
    """Return a keyword that is a single word, chosen by hash, or "" if none is."""
    words = [word for word in record.keywords.split("|") if _words(word) == [word]]
    return words[int(hash_fraction(f"{record.key} keyword") * len(words))] if words else ""


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def _alike(word: str) -> str:
    """Return a form that is equal for different spellings of a word."""
    return word.lower().replace("ё", "е")


EMOJI_QUESTION_FAMILIES: dict[str, Callable[[Records, Records], list[EmojiQuestion]]] = {
    "name": name_questions,
    "keyword": keyword_questions,
    "group": group_questions,
    "skin_tone": skin_tone_questions,
    "gender": gender_questions,
}
