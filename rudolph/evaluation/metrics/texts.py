"""Text normalisation before a comparison, and edit distances.

A ``Normalization`` lists the steps applied to both texts before they are compared.  Its ``str`` is
part of a ``MetricProtocol``.

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

# The characters that each value of ``Normalization.punctuation`` removes.
PUNCTUATION = {
    "kept": "",
    "ascii": string.punctuation,
    "ascii_but_hyphen": string.punctuation.replace("-", ""),
    "russian": string.punctuation + "«»—–…",
}
# Number words from zero to ten, as lemmas.
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
    """Normalisation steps, applied to a text in the order of the fields.

    Attributes:
        nfc: convert to Unicode's composed form, where a letter and its accent are one character.
        lower: convert to lower case.
        punctuation: a key of ``PUNCTUATION``; its characters are removed without leaving a space.
        lemmas: replace each word by its most likely dictionary form according to pymorphy3.
        digits: replace each word of ``NUMBER_WORDS`` by its digits.
        fold_yo: replace ё by е.
        squeeze: put one space between words and none at the ends; ``lemmas`` and ``digits`` do so
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
        """Raise ``ValueError`` for an unknown ``punctuation``."""
        if self.punctuation not in PUNCTUATION:
            known = ", ".join(PUNCTUATION)
            raise ValueError(f"punctuation must be of {known}, got {self.punctuation!r}")

    def __str__(self) -> str:
        """Return the names of the active steps, joined by ``+``.

        >>> str(Normalization(lower=True, punctuation="ascii", squeeze=True))
        'lower+punctuation:ascii+squeeze'
        """
        steps = []
        for field in fields(self):
            setting = getattr(self, field.name)
            if setting is True:
                steps.append(field.name)
            elif setting not in (False, "kept"):
                steps.append(f"{field.name}:{setting}")
        return "+".join(steps) or "raw"


# SQuAD v1.1 evaluation without removal of articles, which Russian does not have.
ANSWER = Normalization(lower=True, punctuation="russian", squeeze=True)
# The official VQA v2 processing is English; only its lower case and punctuation steps apply.
VISUAL_ANSWER = Normalization(
    nfc=True, lower=True, punctuation="russian", fold_yo=True, squeeze=True
)
# Text recognition must reproduce case, punctuation and ё as they are written.
TRANSCRIPT = Normalization(nfc=True, squeeze=True)


@cache
def _analyzer() -> Any:
    # Imported here: the dictionaries take a second and 15 MB, which only lemmas need.
    import pymorphy3

    return pymorphy3.MorphAnalyzer()


@lru_cache(maxsize=2**16)
def lemma(word: str) -> str:
    """Return the most likely dictionary form of a word, of any part of speech."""
    return str(_analyzer().parse(word)[0].normal_form) if word else ""


def normalize_text(text: str, normalization: Normalization) -> str:
    """Return the text after normalisation.

    >>> normalize_text("Зелёный  «Олень»!", VISUAL_ANSWER)
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
    """The number of edits of each prediction and the length of each truth, both ``(N,)``.

    ``bootstrap_interval(counts.rate, len(counts.edits), seed=...)`` gives the interval of the
    rate.
    """

    edits: np.ndarray[Any, Any]
    lengths: np.ndarray[Any, Any]

    def rate(self, selected: np.ndarray[Any, Any] | slice = slice(None)) -> float:
        """Return the edits of the chosen examples over the length of their truths; may exceed 1.

        This is not the mean rate over examples, in which a short text would count as much as a
        long one.

        Raises:
            ValueError: if the chosen truths are all empty.
        """
        length = int(self.lengths[selected].sum())
        if length == 0:
            raise ValueError(
                "an error rate: expected truths that are not empty, got only empty ones"
            )
        return int(self.edits[selected].sum()) / length


def character_edits(
    predictions: Sequence[str],
    truths: Sequence[str],
    normalization: Normalization = TRANSCRIPT,
) -> EditCounts:
    """Count substitutions, deletions and insertions of characters; ``rate`` gives the CER.

    Raises:
        ValueError: if the numbers of predictions and truths differ.
    """
    return _edit_counts(predictions, truths, lambda text: normalize_text(text, normalization))


def word_edits(
    predictions: Sequence[str],
    truths: Sequence[str],
    normalization: Normalization = TRANSCRIPT,
) -> EditCounts:
    """Count substitutions, deletions and insertions of words; ``rate`` gives the WER.

    Words are separated by whitespace.

    Raises:
        ValueError: if the numbers of predictions and truths differ.
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
    """Return 1-NED: 1 minus character edits divided by the longer length; 1 for two empty texts.

    This is not 1 - CER, which divides by the length of the truth.
    """
    from rapidfuzz.distance import Levenshtein

    predicted, expected = (normalize_text(text, normalization) for text in (prediction, truth))
    return Levenshtein.normalized_similarity(predicted, expected)
