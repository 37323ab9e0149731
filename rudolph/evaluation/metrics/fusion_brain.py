"""The six open scores of Fusion Brain Challenge 2 and their integral score.

Answers and truths are mappings keyed by question id.  An answer is one text.  A truth is a list of
variants, of which the best match counts.  ``first_texts`` and ``variants`` build these mappings
from the records of ``data.datasets.fusion_brain_files``.  The scores of a task are an array with
one number per question; the challenge publishes their mean.

The challenge's programs deviate from the plain rules in the ways that ``Quirks`` lists.  With all
quirks on, the scores equal the challenge's.  RuWordNet is not included; a caller may pass
``synonyms`` instead.  The challenge's tagger is not included either, so only tokens in digits
count as numbers.  Three other parts are missing.  Captions have neither the tokenizer razdel
nor a sentence splitter, and answers have no English number words.

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

# The least score per task that won a prize: 75 % of the score of the challenge's own model.
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
    """Deviations of the challenge's programs from the plain rules; False applies the plain rule.

    Attributes:
        letter_fallback: an answer that scores 0.5 or less gets the score of its first letter from
            a to e, even if that score is lower.  The plain rule has no fallback.
        lemmatised_as_one_word: an answer about an image is lemmatised as if it were one word; the
            plain rule lemmatises word by word.
        english_stems: answers about an image are stemmed with Porter's stemmer, which leaves
            Russian unchanged; the plain rule uses Snowball's for Russian.
        missing_not_penalised: image questions without an answer and missing captions are left out
            of the mean; by the plain rule they score 0.
        captions_penalised_for_order: METEOR of captions loses up to half for word order; the
            challenge's description has no such term.
        empty_never_agrees: in text recognition two empty texts score 0; by the plain rule they
            score 1.
    """

    letter_fallback: bool = True
    lemmatised_as_one_word: bool = True
    english_stems: bool = True
    missing_not_penalised: bool = True
    captions_penalised_for_order: bool = True
    empty_never_agrees: bool = True

    def __str__(self) -> str:
        """Return the names of the active quirks, joined by ``+``, for a ``MetricProtocol``."""
        on = [field.name for field in fields(self) if getattr(self, field.name)]
        return "+".join(on) or "none"


CHALLENGE_QUIRKS = Quirks()
NO_QUIRKS = Quirks(**{field.name: False for field in fields(Quirks)})


def first_texts(records: Iterable[TaskRecord]) -> dict[str, str]:
    """Return the first text of each answer, or ``""`` if it has none, keyed by question id.

    >>> first_texts([TaskRecord("7", answer_texts=("кот", "кошка")), TaskRecord("8")])
    {'7': 'кот', '8': ''}
    """
    return {record.id: (record.answer_texts or ("",))[0] for record in records}


def variants(records: Iterable[TaskRecord]) -> dict[str, list[str]]:
    """Return the variants of each truth, keyed by question id."""
    return {record.id: list(record.answer_texts) for record in records}


def text_qa_scores(
    answers: Answers, truths: Variants, quirks: Quirks = CHALLENGE_QUIRKS
) -> np.ndarray[Any, Any]:
    """Return the F1 of lemmas for each text question, or 0 if it has no answer.

    Raises:
        ValueError: if there is no truth, or none for an answer; the same holds for all tasks.
    """

    def score(answer: str, truth: str) -> float:
        return token_f1(answer, truth, TEXT_ANSWER)

    return _scores(answers, truths, truths, lambda a, t: _with_fallback(score, a, t, quirks))


def math_qa_scores(
    answers: Answers, truths: Variants, quirks: Quirks = CHALLENGE_QUIRKS
) -> np.ndarray[Any, Any]:
    """Return the exact match of lemmas for each math question, or 0 if it has no answer.

    Hyphens, and thus minus signs, are kept.
    """

    def score(answer: str, truth: str) -> float:
        return exact_match(answer, truth, MATH_ANSWER)

    return _scores(answers, truths, truths, lambda a, t: _with_fallback(score, a, t, quirks))


def _with_fallback(
    score: Callable[[str, str], float], answer: str, truths: Sequence[str], quirks: Quirks
) -> float:
    best = max_over_references(score, answer, truths)
    letter = re.search("[abcde]", answer)
    if quirks.letter_fallback and best <= 0.5 and letter:
        return max_over_references(score, letter[0], truths)
    return best


def visual_qa_scores(
    answers: Answers,
    truths: Variants,
    quirks: Quirks = CHALLENGE_QUIRKS,
    *,
    synonyms: Synonyms | None = None,
) -> np.ndarray[Any, Any]:
    """Score image questions by METEOR without word order, or by a ratio if the truth is a number.

    The ratio divides the smaller number by the larger one.  There is one score per answer, or one
    per truth without ``quirks.missing_not_penalised``.  ``synonyms`` returns the synonyms of a
    word.
    """

    def score(answer: str, truth: str) -> float:
        predicted, expected = (_visual_answer(text, quirks) for text in (answer, truth))
        tokens = _tokens(expected)
        if len(tokens) == 1 and tokens[0].isdecimal():
            return _number_ratio(_tokens(predicted), float(tokens[0]))
        stemmer = _english_stemmer() if quirks.english_stems else None
        return meteor(
            predicted, [expected], tokenize=_tokens, stemmer=stemmer, synonyms=synonyms, gamma=0.0
        )

    scored_ids = answers if quirks.missing_not_penalised else truths
    return _scores(answers, truths, scored_ids, lambda a, t: max_over_references(score, a, t))


@cache
def _english_stemmer() -> Stemmer:
    from nltk.stem.porter import PorterStemmer

    stemmer: Stemmer = PorterStemmer()
    return stemmer


def _visual_answer(text: str, quirks: Quirks) -> str:
    if not quirks.lemmatised_as_one_word:
        return normalize_text(text, TEXT_ANSWER)
    lemmatised = lemma(normalize_text(text, BARE))
    return NUMBER_WORDS.get(lemmatised, lemmatised)


def _number_ratio(tokens: Sequence[str], expected: float) -> float:
    """Return the ratio of ``expected`` and the first number of ``tokens``, at most 1."""
    number = next((float(token) for token in tokens if token.isdecimal()), None)
    if number is None:
        return 0.0
    low, high = sorted((number, expected))
    return low / high if high else 1.0


def captioning_scores(
    captions: Answers,
    truths: Variants,
    cosines: Mapping[str, float],
    quirks: Quirks = CHALLENGE_QUIRKS,
    *,
    synonyms: Synonyms | None = None,
) -> np.ndarray[Any, Any]:
    """Score each caption by the mean of METEOR and the cosine between caption and image.

    There is one score per caption, or one per truth without ``quirks.missing_not_penalised``.

    Args:
        captions: captions, keyed by image id.
        truths: reference captions, keyed by image id.
        cosines: cosines, keyed by image id, 0 if missing; the challenge computes them with
            ruclip-vit-large-patch14-336.
        quirks: deviations from the plain rules.
        synonyms: function that returns the synonyms of a word.
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

    scored_ids = captions if quirks.missing_not_penalised else truths
    words = _scores(captions, truths, scored_ids, lambda a, t: max_over_references(score, a, t))
    return (words + np.array([cosines.get(key, 0.0) for key in scored_ids])) / 2


def _bare_caption(text: str) -> str:
    return text.translate(CAPTION_PUNCTUATION).strip().lower()


def _tokens(text: str) -> list[str]:
    from nltk import word_tokenize

    # No sentence splitting: it needs downloaded data, and the full stops are already removed.
    return list(word_tokenize(text, preserve_line=True))


def generation_score(cosines: Sequence[float], fid: float) -> float:
    """Return the image generation score: the mean of the mean cosine and the FID score.

    The FID score falls linearly from 1 at FID 0 to 0 at FID 200, and stays 0 above.

    Args:
        cosines: cosine of image and text, one per text; 0 if no image was generated.
        fid: FID; the challenge computes it from Inception's 2048 pooled features.
    """
    return float(np.mean(cosines) + (WORST_FID - min(WORST_FID, fid)) / WORST_FID) / 2


def recognition_scores(
    answers: Answers, truths: Variants, quirks: Quirks = CHALLENGE_QUIRKS
) -> np.ndarray[Any, Any]:
    """Return 1-NED of the raw texts for each truth, or 0 if it has no answer."""

    def score(answer: str, truth: str) -> float:
        if quirks.empty_never_agrees and not (answer and truth):
            return 0.0
        return edit_similarity(answer, truth, UNTOUCHED)

    return _scores(answers, truths, truths, lambda a, t: max_over_references(score, a, t))


# Tasks that are scored from texts alone.
TEXT_SCORES: dict[str, Callable[[Answers, Variants, Quirks], np.ndarray[Any, Any]]] = {
    "text_qa": text_qa_scores,
    "math_qa": math_qa_scores,
    "visual_qa": visual_qa_scores,
    "text_recognition": recognition_scores,
}


def integral_score(open_scores: Mapping[str, float], hidden_scores: Sequence[float] = ()) -> float:
    """Return 1/15 of each open task's score plus 1/10 of each hidden task's score; at most 1.

    Args:
        open_scores: score of each of the six ``CHALLENGE_TASKS``.
        hidden_scores: scores of up to six tasks that are unknown outside the challenge.

    Raises:
        ValueError: if an open score is missing or unknown, or there are too many hidden scores.
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
    scored_ids: Collection[str],
    score: Callable[[str, Sequence[str]], float],
) -> np.ndarray[Any, Any]:
    """Return one score per question in ``scored_ids``, or 0 if it has no answer."""
    unknown = sorted(answers.keys() - truths.keys())
    if unknown or not scored_ids:
        raise ValueError(
            f"answers: expected a truth for each, got none for {', '.join(unknown) or 'any'}"
        )
    return np.array(
        [score(answers[key], truths[key]) if key in answers else 0.0 for key in scored_ids]
    )
