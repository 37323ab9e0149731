"""Metrics of answers and rankings, and the protocol that makes two values comparable.

A function of one example returns a number whose mean over examples is the metric, so that
``statistics.mean_interval`` applies.  A metric that is not such a mean takes all examples at once
and uses ``statistics.bootstrap_interval``.

Source: Rajpurkar 2016 (token F1, exact match); Antol 2015 (VQA accuracy); Guo 2017 (calibration).

Shapes: B batch, N and M items, C options, H and W pixels.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from rudolph.evaluation.metrics.texts import ANSWER, VISUAL_ANSWER, Normalization, normalize_text
from rudolph.evaluation.statistics import Estimate, proportion_interval

# An answer may name an option by its letter, Latin or Cyrillic.
LATIN_LETTERS = "abcdefghij"
CYRILLIC_OPTION_LETTERS = "абвгдежзик"
# The number of annotators who must give an answer for full accuracy.
AGREEING_ANNOTATORS = 3


@dataclass(frozen=True)
class MetricProtocol:
    """A metric and how it was measured; None marks a part that does not apply.

    Values are comparable if their protocols are equal.  ``str`` gives one line without commas and
    quotes, for a column of a CSV file.  ``MetricProtocol.parse`` reads it back.

    Attributes:
        metric: full name of the metric: ``meteor-nltk``, not ``meteor``.
        features: network and layer that provide the features.
        sample_size: number of examples, if the value depends on it.
        tokenization: how a text is split into words.
        normalization: ``str`` of a ``Normalization``.
        settings: everything else.

    >>> str(MetricProtocol("fid", features="inception-v3:pool3", sample_size=5000))
    'fid features=inception-v3:pool3 sample_size=5000'
    """

    metric: str
    features: str | None = None
    sample_size: int | None = None
    tokenization: str | None = None
    normalization: str | None = None
    settings: str | None = None

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for a part that ``parse`` could not read back."""
        for name, part in self._parts():
            if not re.fullmatch(r"[\w.:+/@-]+", str(part)):
                raise ValueError(f"{name} must be letters, digits and . : + / @ -, got {part!r}")
        if self.sample_size is not None and self.sample_size < 1:
            raise ValueError(f"sample_size must be at least 1 or null, got {self.sample_size}")

    def __str__(self) -> str:
        """Return the protocol on one line."""
        _, *parts = self._parts()
        return " ".join([self.metric, *(f"{name}={part}" for name, part in parts)])

    @classmethod
    def parse(cls, line: str) -> Self:
        """Return the protocol whose ``str`` is ``line``.

        Raises:
            ValueError: if a part is unknown or malformed.
        """
        metric, *rest = line.split(" ")
        parts: dict[str, Any] = dict(part.partition("=")[::2] for part in rest)
        known = [field.name for field in fields(cls)][1:]
        for name in parts:
            if name not in known:
                raise ValueError(
                    f"a metric protocol: expected fields of {', '.join(known)}, got {name!r}"
                )
        if "sample_size" in parts:
            if not parts["sample_size"].isdecimal():
                raise ValueError(f"sample_size must be a number, got {parts['sample_size']!r}")
            parts["sample_size"] = int(parts["sample_size"])
        return cls(metric, **parts)

    def _parts(self) -> list[tuple[str, Any]]:
        named = [(field.name, getattr(self, field.name)) for field in fields(self)]
        return [(name, part) for name, part in named if part is not None]


def require_comparable(first: MetricProtocol, second: MetricProtocol) -> None:
    """Check that two protocols are equal.

    Raises:
        ValueError: if they differ; the message names the differing parts.
    """
    pairs = [
        (field.name, getattr(first, field.name), getattr(second, field.name))
        for field in fields(MetricProtocol)
    ]
    differing = [f"{name} {one} and {other}" for name, one, other in pairs if one != other]
    if differing:
        raise ValueError(f"values are not comparable: {', '.join(differing)}")


def token_f1(prediction: str, truth: str, normalization: Normalization = ANSWER) -> float:
    """Return the F1 of the words of two texts, counted with multiplicity; 1 for two empty texts.

    By default texts are lower-cased, stripped of punctuation and split at spaces.  This is the
    SQuAD v1.1 evaluation without removal of articles, which Russian does not have.
    """
    predicted, expected = (
        Counter(normalize_text(text, normalization).split() or [""])
        for text in (prediction, truth)
    )
    shared = (predicted & expected).total()
    return 2 * shared / (predicted.total() + expected.total())


def exact_match(prediction: str, truth: str, normalization: Normalization = ANSWER) -> float:
    """Return 1 if two texts are equal after normalisation, else 0."""
    return float(normalize_text(prediction, normalization) == normalize_text(truth, normalization))


def max_over_references(
    score: Callable[[str, str], float], prediction: str, truths: Sequence[str]
) -> float:
    """Return the largest ``score(prediction, truth)`` over all accepted truths.

    Raises:
        ValueError: if there is no truth.
    """
    if not truths:
        raise ValueError("an answer needs at least one truth")
    return max(score(prediction, truth) for truth in truths)


def vqa_accuracy(
    prediction: str, answers: Sequence[str], normalization: Normalization = VISUAL_ANSWER
) -> float:
    """Return VQA accuracy: mean of min(1, agreeing / 3) over sets that leave one annotator out.

    With ten answers, of which n agree, the accuracy is 0, 0.3, 0.6 and 0.9 for n = 0 to 3.  From
    n = 4 on it is 1.  Unlike the official evaluation, answers are normalised even if all
    annotators give the same one.

    Raises:
        ValueError: if there are fewer than two answers; use ``exact_match`` for a single one.
    """
    total = len(answers)
    if total < 2:
        raise ValueError(f"answers must be at least 2, got {total}")
    normalized = normalize_text(prediction, normalization)
    agreeing = sum(normalize_text(answer, normalization) == normalized for answer in answers)
    if_agreeing_left_out = agreeing * min(1.0, (agreeing - 1) / AGREEING_ANNOTATORS)
    if_other_left_out = (total - agreeing) * min(1.0, agreeing / AGREEING_ANNOTATORS)
    return (if_agreeing_left_out + if_other_left_out) / total


def chosen_option(
    prediction: str, options: Sequence[str], normalization: Normalization = ANSWER
) -> int | None:
    """Return the index of the option that a text names, by its words or else by a leading letter.

    Return None if it names no option or more than one.  Letters are a, b, c ... and а, б, в ...
    A letter must stand before a bracket, full stop or colon, or at the end of the text, because
    "в" and "и" are words too.

    >>> chosen_option("б) олень", ["лиса", "олень", "волк"])
    1
    """
    normalized = normalize_text(prediction, normalization)
    matches = [
        index
        for index, option in enumerate(options)
        if normalize_text(option, normalization) == normalized
    ]
    if matches:
        return matches[0] if len(matches) == 1 else None
    letter = re.match(r"\W*(\w)\s*(?:[).:]|$)", prediction.lower())
    for letters in (LATIN_LETTERS, CYRILLIC_OPTION_LETTERS):
        if letter and letter[1] in letters[: len(options)]:
            return letters.index(letter[1])
    return None


def choice_hits(
    scores: np.ndarray[Any, Any], correct: np.ndarray[Any, Any]
) -> np.ndarray[Any, Any]:
    """Return ``(N,)``: 1 where the correct option scores highest, else 0; a tie of k gives 1 / k.

    Without this tie rule, a model that scores all options alike would be rewarded for their order.

    Args:
        scores: ``(N, C)``, such as log-likelihoods; -inf where a question has fewer options.
        correct: index of the correct option, ``(N,)``.
    """
    is_best = scores == scores.max(1, keepdims=True)  # (N, C)
    is_correct_best = is_best[np.arange(len(scores)), correct]
    return is_correct_best / is_best.sum(1)


def accuracy(predictions: Sequence[object], truths: Sequence[object]) -> Estimate:
    """Return the fraction of predictions that equal their truths, with Wilson's interval.

    Raises:
        ValueError: if there is no truth, or the numbers of predictions and truths differ.
    """
    if not truths or len(predictions) != len(truths):
        raise ValueError(f"got {len(predictions)} predictions for {len(truths)} truths")
    hits = sum(one == other for one, other in zip(predictions, truths, strict=True))
    return proportion_interval(hits, len(truths))


def calibration_error(
    confidences: np.ndarray[Any, Any], hits: np.ndarray[Any, Any], *, num_bins: int = 15
) -> float:
    """Return the expected calibration error: mean gap between confidence and accuracy, in [0, 1].

    Bins have equal width and include their right edge; the first one includes 0 too.  A bin is
    weighted by its number of examples.

    Args:
        confidences: ``(N,)`` in [0, 1].
        hits: ``(N,)``, 1 where the answer was right, else 0.
        num_bins: number of bins.

    Raises:
        ValueError: if there is no confidence, a confidence is outside [0, 1], or shapes differ.
    """
    if confidences.size == 0 or confidences.shape != hits.shape:
        raise ValueError(f"got {confidences.size} confidences for {hits.size} hits")
    if not ((confidences >= 0) & (confidences <= 1)).all():
        raise ValueError("confidences must be between 0 and 1")
    bins = np.clip(np.ceil(confidences * num_bins).astype(np.int64) - 1, 0, None)
    gaps = np.bincount(bins, weights=hits.astype(np.float64) - confidences, minlength=num_bins)
    return float(np.abs(gaps).sum() / confidences.size)


def nearest_ranks(images: Tensor, gallery: Tensor, own_indices: Tensor) -> Tensor:
    """Return the rank ``(B,)`` of each image's own gallery image by pixel distance; 1 is nearest.

    Args:
        images: ``(B, 3, H, W)``, in the value range of the gallery.
        gallery: ``(N, 3, H, W)``.
        own_indices: index of each image's own gallery image, ``(B,)``.
    """
    distances = torch.cdist(
        images.flatten(1).double(),
        gallery.flatten(1).double(),
        compute_mode="donot_use_mm_for_euclid_dist",
    )
    own_distances = distances.gather(1, own_indices[:, None])
    return (distances < own_distances).sum(1) + 1
