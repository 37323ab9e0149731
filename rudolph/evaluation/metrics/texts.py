"""How texts are made comparable, and how many edits lie between them.

A ``Normalization`` says by name what is done to both texts before they are compared; its ``str``
is the part of a ``metrics.Measure`` that tells so.

Source: Levenshtein 1966; pymorphy3 (lemmas); Fusion Brain Challenge 2 (number words).

Shapes: N examples.
"""

import string
import unicodedata
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np

# What each setting of ``Normalization.punctuation`` removes.
PUNCTUATION = {
    "kept": "",
    "ascii": string.punctuation,
    "ascii_but_hyphen": string.punctuation.replace("-", ""),
    "russian": string.punctuation + "«»—–…",
}
# From zero to ten, as lemmas.
NUMBER_WORDS = {
    "ноль": "0",
    "нисколько": "0",
    "никакой": "0",
    "один": "1",
    "два": "2",
    "три": "3",
    "четыре": "4",
    "пять": "5",
    "шесть": "6",
    "семь": "7",
    "восемь": "8",
    "девять": "9",
    "десять": "10",
}
_REMOVED = {name: str.maketrans("", "", removed) for name, removed in PUNCTUATION.items()}


@dataclass(frozen=True)
class Normalization:
    """What is done to a text before it is compared, in the order of the fields.

    Args:
        nfc: Unicode's composed form, so that an accent typed apart is the same letter.
        lower: lower case.
        punctuation: a key of ``PUNCTUATION``, whose characters go without leaving a space.
        lemmas: each word becomes its dictionary form, the likeliest one of pymorphy3.
        digits: a word of ``NUMBER_WORDS`` becomes its digits.
        fold_yo: ё becomes е.
        squeeze: words are parted by one space, none at the ends; ``lemmas`` and ``digits`` do it
            too.
    """

    nfc: bool = False
    lower: bool = False
    punctuation: str = "kept"
    lemmas: bool = False
    digits: bool = False
    fold_yo: bool = False
    squeeze: bool = False

    def __post_init__(self) -> None:
        if self.punctuation not in PUNCTUATION:
            known = ", ".join(PUNCTUATION)
            raise ValueError(f"punctuation must be of {known}, got {self.punctuation!r}")

    def __str__(self) -> str:
        """The names of what is done, in one word.

        >>> str(Normalization(lower=True, punctuation="ascii", squeeze=True))
        'lower+punctuation:ascii+squeeze'
        """
        done = []
        for field in fields(self):
            setting = getattr(self, field.name)
            if setting is True:
                done.append(field.name)
            elif setting not in (False, "kept"):
                done.append(f"{field.name}:{setting}")
        return "+".join(done) or "raw"


# SQuAD v1.1 evaluation without articles, which Russian does not have.
ANSWER = Normalization(lower=True, punctuation="russian", squeeze=True)
# The official processing of VQA v2 is English; of it lower case and punctuation are kept.
VISUAL_ANSWER = Normalization(
    nfc=True, lower=True, punctuation="russian", fold_yo=True, squeeze=True
)
# Recognition is asked for case, punctuation and ё as they are written.
TRANSCRIPT = Normalization(nfc=True, squeeze=True)


@cache
def _analyzer() -> Any:
    # The dictionaries take a second and 15 MB, which only lemmas are worth.
    import pymorphy3

    return pymorphy3.MorphAnalyzer()


@lru_cache(maxsize=2**16)
def lemma(word: str) -> str:
    """The dictionary form of a word, the likeliest one; no part of speech is asked for."""
    return str(_analyzer().parse(word)[0].normal_form) if word else ""


def normalize_text(text: str, normalization: Normalization) -> str:
    """The text as it is compared.

    >>> normalize("Зелёный  «Олень»!", VISUAL_ANSWER)
    'зеленый олень'
    """
    if normalization.nfc:
        text = unicodedata.normalize("NFC", text)
    if normalization.lower:
        text = text.lower()
    text = text.translate(_REMOVED[normalization.punctuation])
    words = text.split()
    if normalization.lemmas:
        words = [lemma(word) for word in words]
    if normalization.digits:
        words = [NUMBER_WORDS.get(word, word) for word in words]
    if normalization.lemmas or normalization.digits or normalization.squeeze:
        text = " ".join(words)
    if normalization.fold_yo:
        text = text.replace("ё", "е").replace("Ё", "Е")
    return text


class EditCounts(NamedTuple):
    """The edits of each prediction and the length of each truth, both ``(N,)``.

    ``bootstrap_interval(counts.rate, len(counts.edits), seed=...)`` is the rate's interval.
    """

    edits: np.ndarray[Any, Any]
    lengths: np.ndarray[Any, Any]

    def rate(self, chosen: np.ndarray[Any, Any] | slice = slice(None)) -> float:
        """The edits of all chosen examples over their length: may exceed 1.

        Not the mean of the rates of examples, in which a short text would weigh as much as a
        long one.

        Raises:
            ValueError: when the truths chosen have no length.
        """
        length = int(self.lengths[chosen].sum())
        if length == 0:
            raise ValueError("an error rate needs truths that are not empty")
        return int(self.edits[chosen].sum()) / length


def character_edits(
    predictions: Sequence[str],
    truths: Sequence[str],
    normalization: Normalization = TRANSCRIPT,
) -> EditCounts:
    """Substitutions, deletions and insertions of characters; their ``rate`` is the CER.

    Raises:
        ValueError: when there are not as many predictions as truths.
    """
    return _edit_counts(predictions, truths, lambda text: normalize_text(text, normalization))


def word_edits(
    predictions: Sequence[str],
    truths: Sequence[str],
    normalization: Normalization = TRANSCRIPT,
) -> EditCounts:
    """Substitutions, deletions and insertions of words; their ``rate`` is the WER.

    Words are what spaces part.

    Raises:
        ValueError: when there are not as many predictions as truths.
    """
    return _edit_counts(
        predictions, truths, lambda text: normalize_text(text, normalization).split()
    )


def _edit_counts(
    predictions: Sequence[str],
    truths: Sequence[str],
    symbols: Callable[[str], Sequence[Hashable]],
) -> EditCounts:
    from rapidfuzz.distance import Levenshtein

    if len(predictions) != len(truths):
        raise ValueError(f"got {len(predictions)} predictions for {len(truths)} truths")
    pairs = [(symbols(a), symbols(b)) for a, b in zip(predictions, truths, strict=True)]
    edits = [Levenshtein.distance(predicted, truth) for predicted, truth in pairs]
    lengths = [len(truth) for _, truth in pairs]
    return EditCounts(np.array(edits, dtype=np.int64), np.array(lengths, dtype=np.int64))


def edit_similarity(
    prediction: str, truth: str, normalization: Normalization = TRANSCRIPT
) -> float:
    """1-NED: one less the edits of characters over the longer length; two empty texts agree.

    Not 1 - CER, whose denominator is the length of the truth.
    """
    from rapidfuzz.distance import Levenshtein

    predicted, expected = (normalize_text(text, normalization) for text in (prediction, truth))
    return Levenshtein.normalized_similarity(predicted, expected)
