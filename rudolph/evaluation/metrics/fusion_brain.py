"""The six open scores of Fusion Brain Challenge 2 and their integral.

Answers and truths go by the question's id; an answer is one text, a truth a list of variants of
which the best counts; ``first_texts`` and ``variants`` take them from what
``data.datasets.fusion_brain_files`` reads.  A score of a task is an array with one number a
question, whose mean the challenge publishes.

The challenge's programs differ from the rule that one would write in the ways that ``Quirks``
names; with all of them on, scores are the challenge's.  Not carried over: RuWordNet, in whose
place a caller may pass ``synonyms``; the tagger that looks for numbers, here all that is in
digits; the tokenizer razdel and the sentence splitter in captions; English number words in
answers.

Source: github.com/ai-forever/fbc2_aij2022 at a08bb14, ``evaluation/`` and ``Metrics_en.md``.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import numpy as np

from rudolph.data.datasets.fusion_brain_files import TaskRecord
from rudolph.evaluation.metrics.answers import exact_match, max_over_references, token_f1
from rudolph.evaluation.metrics.captions import Stemmer, meteor
from rudolph.evaluation.metrics.texts import (
    NUMBER_WORDS,
    Normalization,
    edit_similarity,
    lemma,
    normalize_text,
)

Answers = Mapping[str, str]
Variants = Mapping[str, Sequence[str]]
Synonyms = Callable[[str], Iterable[str]]

# Each task's score from which a prize was given: 75 % of the score of the challenge's own model.
THRESHOLDS = {
    "text_qa": 0.20,
    "math_qa": 0.25,
    "image_generation": 0.21,
    "image_captioning": 0.15,
    "visual_qa": 0.24,
    "text_recognition": 0.13,
}
CHALLENGE_TASKS = tuple(THRESHOLDS)
OPEN_WEIGHT, HIDDEN_WEIGHT = 1 / 15, 1 / 10
NUM_HIDDEN_TASKS = 6
WORST_FID = 200.0
TEXT_ANSWER = Normalization(lower=True, punctuation="ascii", lemmas=True, digits=True)
MATH_ANSWER = Normalization(lower=True, punctuation="ascii_but_hyphen", lemmas=True, digits=True)
UNTOUCHED = Normalization()
BARE = Normalization(lower=True, punctuation="ascii")
CAPTION_PUNCTUATION = str.maketrans("", "", ",.!?:;%)]}([")


@dataclass(frozen=True)
class Quirks:
    """Where the challenge's programs depart from the plain rule; false takes the rule.

    Args:
        letter_fallback: an answer in words whose score is 0.5 or less gets that of its first
            letter of a, b, c, d and e instead, even if it is lower; the rule has no second try.
        lemmatised_as_one_word: an answer about an image is lemmatised as if it was one word; by
            the rule word by word.
        english_stems: stems of answers about an image are Porter's, which leave Russian as it
            is; by the rule Snowball's for Russian.
        missing_not_penalised: questions about images that have no answer, and captions that
            are missing, are left out of the mean; by the rule they are 0.
        captions_penalised_for_order: METEOR of captions loses up to a half by the order of
            words; the challenge's text has no such term.
        empty_never_agrees: in recognition two empty texts are 0; by the rule 1.
    """

    letter_fallback: bool = True
    lemmatised_as_one_word: bool = True
    english_stems: bool = True
    missing_not_penalised: bool = True
    captions_penalised_for_order: bool = True
    empty_never_agrees: bool = True

    def __str__(self) -> str:
        """The names of those that are on, in one word, as a part of a ``Measure``."""
        on = [field.name for field in fields(self) if getattr(self, field.name)]
        return "+".join(on) or "none"


CHALLENGE = Quirks()
PLAIN_RULES = Quirks(**{field.name: False for field in fields(Quirks)})


def first_texts(records: Iterable[TaskRecord]) -> dict[str, str]:
    """The text of each answer that was read, ``""`` where there is none.

    >>> first_texts([TaskRecord("7", answer_texts=("кот", "кошка")), TaskRecord("8")])
    {'7': 'кот', '8': ''}
    """
    return {record.id: (record.answer_texts or ("",))[0] for record in records}


def variants(records: Iterable[TaskRecord]) -> dict[str, list[str]]:
    """The variants of each truth that was read."""
    return {record.id: list(record.answer_texts) for record in records}


def text_qa_scores(
    answers: Answers, truths: Variants, quirks: Quirks = CHALLENGE
) -> np.ndarray[Any, Any]:
    """F1 of lemmas, for every truth; 0 where there is no answer.

    Raises:
        ValueError: when there is no truth, or none for an answer; so in all tasks.
    """

    def score(answer: str, truth: str) -> float:
        return token_f1(answer, truth, TEXT_ANSWER)

    return _scores(answers, truths, truths, lambda a, t: _with_fallback(score, a, t, quirks))


def math_qa_scores(
    answers: Answers, truths: Variants, quirks: Quirks = CHALLENGE
) -> np.ndarray[Any, Any]:
    """Exact match of lemmas, a minus kept, for every truth; 0 where there is no answer."""

    def score(answer: str, truth: str) -> float:
        return exact_match(answer, truth, MATH_ANSWER)

    return _scores(answers, truths, truths, lambda a, t: _with_fallback(score, a, t, quirks))


def _with_fallback(
    score: Callable[[str, str], float], answer: str, truths: Sequence[str], quirks: Quirks
) -> float:
    found = max_over_references(score, answer, truths)
    letter = re.search("[abcde]", answer)
    if quirks.letter_fallback and found <= 0.5 and letter:
        return max_over_references(score, letter[0], truths)
    return found


def visual_qa_scores(
    answers: Answers,
    truths: Variants,
    quirks: Quirks = CHALLENGE,
    *,
    synonyms: Synonyms | None = None,
) -> np.ndarray[Any, Any]:
    """METEOR without regard to order; to a number, the ratio of the smaller and the larger.

    For every answer, or under the plain rule for every truth.
    """

    def score(answer: str, truth: str) -> float:
        said, expected = (_visual_answer(text, quirks) for text in (answer, truth))
        tokens = _tokens(expected)
        if len(tokens) == 1 and tokens[0].isdecimal():
            return _number_ratio(_tokens(said), float(tokens[0]))
        stemmer = _english_stemmer() if quirks.english_stems else None
        return meteor(
            said, [expected], tokenize=_tokens, stemmer=stemmer, synonyms=synonyms, gamma=0.0
        )

    asked = answers if quirks.missing_not_penalised else truths
    return _scores(answers, truths, asked, lambda a, t: max_over_references(score, a, t))


@cache
def _english_stemmer() -> Stemmer:
    from nltk.stem.porter import PorterStemmer

    stemmer: Stemmer = PorterStemmer()
    return stemmer


def _visual_answer(text: str, quirks: Quirks) -> str:
    if not quirks.lemmatised_as_one_word:
        return normalize_text(text, TEXT_ANSWER)
    whole = lemma(normalize_text(text, BARE))
    return NUMBER_WORDS.get(whole, whole)


def _number_ratio(tokens: Sequence[str], expected: float) -> float:
    """The first number over the expected one or the reverse, whichever is at most 1."""
    number = next((float(token) for token in tokens if token.isdecimal()), None)
    if number is None:
        return 0.0
    low, high = sorted((number, expected))
    return low / high if high else 1.0


def captioning_scores(
    captions: Answers,
    truths: Variants,
    cosines: Mapping[str, float],
    quirks: Quirks = CHALLENGE,
    *,
    synonyms: Synonyms | None = None,
) -> np.ndarray[Any, Any]:
    """Half METEOR, half the cosine of caption and image.

    For every caption, or under the plain rule for every truth.

    Args:
        cosines: by id, of ruclip-vit-large-patch14-336 in the challenge; 0 where there is none.
    """
    gamma = 0.5 if quirks.captions_penalised_for_order else 0.0

    def score(caption: str, truth: str) -> float:
        return meteor(
            _bare_caption(caption),
            [_bare_caption(truth)],
            tokenize=_tokens,
            synonyms=synonyms,
            gamma=gamma,
        )

    asked = captions if quirks.missing_not_penalised else truths
    words = _scores(captions, truths, asked, lambda a, t: max_over_references(score, a, t))
    return (words + np.array([cosines.get(key, 0.0) for key in asked])) / 2


def _bare_caption(text: str) -> str:
    return text.translate(CAPTION_PUNCTUATION).strip().lower()


def _tokens(text: str) -> list[str]:
    from nltk import word_tokenize

    # Sentences are not parted: that takes data, and the full stops are gone by now.
    return list(word_tokenize(text, preserve_line=True))


def generation_score(cosines: Sequence[float], fid: float) -> float:
    """Half the mean cosine of image and text, half the FID: 1 at 0, 0 from 200 on.

    Args:
        cosines: one a text, 0 where no image was made.
        fid: of Inception's 2048 pooled features in the challenge.
    """
    return float(np.mean(cosines) + (WORST_FID - min(WORST_FID, fid)) / WORST_FID) / 2


def recognition_scores(
    answers: Answers, truths: Variants, quirks: Quirks = CHALLENGE
) -> np.ndarray[Any, Any]:
    """1-NED of the texts as they are, for every truth; 0 where there is no answer."""

    def score(answer: str, truth: str) -> float:
        if quirks.empty_never_agrees and not (answer and truth):
            return 0.0
        return edit_similarity(answer, truth, UNTOUCHED)

    return _scores(answers, truths, truths, lambda a, t: max_over_references(score, a, t))


# The tasks whose score takes texts alone.
TEXT_SCORES: dict[str, Callable[[Answers, Variants, Quirks], np.ndarray[Any, Any]]] = {
    "text_qa": text_qa_scores,
    "math_qa": math_qa_scores,
    "visual_qa": visual_qa_scores,
    "text_recognition": recognition_scores,
}


def integral_score(open_scores: Mapping[str, float], hidden_scores: Sequence[float] = ()) -> float:
    """A fifteenth of each open task's score and a tenth of each hidden one's; at most 1.

    Args:
        open_scores: by ``CHALLENGE_TASKS``, all six.
        hidden_scores: of up to six tasks, which nobody outside the challenge knows.

    Raises:
        ValueError: when an open score is missing or unknown, or hidden ones are too many.
    """
    if set(open_scores) != set(CHALLENGE_TASKS):
        raise ValueError(
            f"open_scores must be {', '.join(CHALLENGE_TASKS)}, got {', '.join(open_scores)}"
        )
    if len(hidden_scores) > NUM_HIDDEN_TASKS:
        raise ValueError(f"hidden_scores must be at most {NUM_HIDDEN_TASKS}")
    return OPEN_WEIGHT * sum(open_scores.values()) + HIDDEN_WEIGHT * sum(hidden_scores)


def _scores(
    answers: Answers,
    truths: Variants,
    asked: Collection[str],
    score: Callable[[str, Sequence[str]], float],
) -> np.ndarray[Any, Any]:
    """One score for each question asked; 0 where there is no answer."""
    unknown = sorted(answers.keys() - truths.keys())
    if unknown or not asked:
        raise ValueError(f"answers need truths, got none for {', '.join(unknown) or 'any'}")
    return np.array([score(answers[key], truths[key]) if key in answers else 0.0 for key in asked])
