"""Caption metrics: similarity to reference captions, and to the image by CLIP.

The references of a caption are the captions of its image by other people.  A ``tokenize`` function
splits texts into words.  It is part of the protocol: numbers from different tokenizers are not
comparable.

Source: Papineni 2002 (BLEU), Lin 2004 (ROUGE-L), Vedantam 2015 (CIDEr-D), all as
github.com/tylin/coco-caption computes them; Lavie and Agarwal 2007 (METEOR) as NLTK does; Hessel
2021 (CLIPScore).

Shapes: N captions, R references of one caption, D features.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, Protocol

import numpy as np

from rudolph.sequence.texts import clean_text

Tokenize = Callable[[str], list[str]]
Ngram = tuple[str, ...]

MAX_NGRAM = 4
ROUGE_BETA = 1.2
CIDER_SIGMA = 6.0
CLIP_SCALE = 2.5


class Stemmer(Protocol):
    """A word stemmer as METEOR needs it."""

    def stem(self, token: str) -> str:
        """Return the stem of a word."""
        ...


def caption_words(text: str) -> list[str]:
    """Split a text into lower-case words without punctuation; a hyphen within a word stays.

    This function replaces coco-caption's Penn Treebank tokenizer, whose rules are English.

    >>> caption_words("Тёмно-красный олень, 2 лисы!")
    ['тёмно-красный', 'олень', '2', 'лисы']
    """
    return re.findall(r"\w+(?:-\w+)*", clean_text(text).lower())


def rouge_l(
    caption: str, references: Sequence[str], *, tokenize: Tokenize = caption_words
) -> float:
    """Return ROUGE-L: the F-score of the longest common subsequence of words, with beta 1.2.

    The best precision and the best recall are taken separately, each over all references.

    Raises:
        ValueError: if there is no reference.
    """
    from rapidfuzz.distance import LCSseq

    _require_references([references])
    caption_tokens = tokenize(caption)
    reference_tokens = [tokenize(reference) for reference in references]
    lcs_lengths = [LCSseq.similarity(caption_tokens, tokens) for tokens in reference_tokens]
    if not any(lcs_lengths):
        return 0.0
    precision = max(lcs_lengths) / len(caption_tokens)
    recall = max(
        lcs_length / len(tokens)
        for lcs_length, tokens in zip(lcs_lengths, reference_tokens, strict=True)
        if tokens
    )
    weight = ROUGE_BETA**2
    return (1 + weight) * precision * recall / (recall + weight * precision)


@dataclass(frozen=True)
class _Synset:
    """A set of synonyms with the methods that NLTK expects of WordNet."""

    names: Iterable[str]

    def lemmas(self) -> "list[_Lemma]":
        return [_Lemma(name) for name in self.names]


class _Lemma(NamedTuple):
    text: str

    def name(self) -> str:
        return self.text


@dataclass(frozen=True)
class _Wordnet:
    """A stand-in for WordNet: one function gives the synonyms; None gives no synonyms."""

    synonyms: Callable[[str], Iterable[str]] | None

    def synsets(self, word: str) -> list[_Synset]:
        return [_Synset(self.synonyms(word))] if self.synonyms else []


@cache
def _russian_stemmer() -> Stemmer:
    # Imported here: NLTK loads scikit-learn and SciPy, which takes seconds that only METEOR needs.
    from nltk.stem.snowball import SnowballStemmer

    stemmer: Stemmer = SnowballStemmer("russian")
    return stemmer


def meteor(
    caption: str,
    references: Sequence[str],
    *,
    tokenize: Tokenize = caption_words,
    stemmer: Stemmer | None = None,
    synonyms: Callable[[str], Iterable[str]] | None = None,
    gamma: float = 0.5,
) -> float:
    """Return METEOR as NLTK computes it, for the best reference; not coco-caption's METEOR 1.5.

    Equal words are matched first, then equal stems, then synonyms.  The F-score weights recall
    nine times as much as precision.  The score is the F-score times
    ``1 - gamma * (chunks / matches) ** 3``.

    Args:
        caption: the caption to score.
        references: the reference captions.
        tokenize: splits a text into words.
        stemmer: the stemmer; None uses Snowball's for Russian.
        synonyms: returns the synonyms of an unmatched word; NLTK passes the stem of the word and
            compares the results with stems.
        gamma: weight of the penalty for word order; 0 ignores the order.

    Raises:
        ValueError: if there is no reference.
    """
    from nltk.translate.meteor_score import meteor_score

    _require_references([references])
    return float(
        meteor_score(
            [tokenize(reference) for reference in references],
            tokenize(caption),
            stemmer=stemmer or _russian_stemmer(),
            wordnet=_Wordnet(synonyms),
            gamma=gamma,
        )
    )


class BleuCounts(NamedTuple):
    """Counts of n-grams of 1 to 4 words per caption, from which BLEU is computed.

    ``bootstrap_interval(lambda chosen: counts.bleu(chosen)[3], N, seed=...)`` gives the interval
    of BLEU-4.

    Attributes:
        matches: ``(N, 4)``, number of the caption's n-grams found in a reference; each counts at
            most as often as it occurs in one reference.
        totals: ``(N, 4)``, number of n-grams in the caption.
        lengths: ``(N,)``, number of words in the caption.
        closest: ``(N,)``, number of words in the reference closest in length; on a tie, in the
            shorter reference.
    """

    matches: np.ndarray[Any, Any]
    totals: np.ndarray[Any, Any]
    lengths: np.ndarray[Any, Any]
    closest: np.ndarray[Any, Any]

    def bleu(self, selected: np.ndarray[Any, Any] | slice = slice(None)) -> np.ndarray[Any, Any]:
        """Return BLEU-1 to BLEU-4, ``(4,)``, of the chosen captions as one corpus.

        There is no smoothing: BLEU-n is 0 if no n-gram matches, where coco-caption gives 1e-4 or
        less.
        """
        matches, totals = self.matches[selected].sum(0), self.totals[selected].sum(0)
        length, closest = int(self.lengths[selected].sum()), int(self.closest[selected].sum())
        scores = np.zeros(MAX_NGRAM)
        if length == 0:
            return scores
        brevity = min(1.0, math.exp(1 - closest / length))
        for n in range(1, MAX_NGRAM + 1):
            if matches[:n].all():
                scores[n - 1] = brevity * np.exp(np.log(matches[:n] / totals[:n]).mean())
        return scores


def bleu_counts(
    captions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    tokenize: Tokenize = caption_words,
) -> BleuCounts:
    """Count the n-grams of a corpus; ``bleu()`` of the result is its BLEU.

    This does not use NLTK's ``corpus_bleu``, which counts one n-gram for a caption that is too
    short to have any.

    Raises:
        ValueError: if a caption has no reference, or the numbers of lists and captions differ.
    """
    _require_references(references, captions)
    rows = [
        _bleu_row(tokenize(caption), [tokenize(other) for other in others])
        for caption, others in zip(captions, references, strict=True)
    ]
    matches, totals, lengths, closest = zip(*rows, strict=True)
    return BleuCounts(np.array(matches), np.array(totals), np.array(lengths), np.array(closest))


def _bleu_row(
    caption: list[str], references: list[list[str]]
) -> tuple[list[int], list[int], int, int]:
    caption_ngrams, max_counts = _ngrams(caption), Counter[Ngram]()
    for reference in references:
        max_counts |= _ngrams(reference)
    matches, totals = [0] * MAX_NGRAM, [0] * MAX_NGRAM
    for ngram, count in caption_ngrams.items():
        matches[len(ngram) - 1] += min(count, max_counts[ngram])
        totals[len(ngram) - 1] += count
    closest = min(
        (abs(len(reference) - len(caption)), len(reference)) for reference in references
    )[1]
    return matches, totals, len(caption), closest


def cider_d(
    captions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    tokenize: Tokenize = caption_words,
) -> np.ndarray[Any, Any]:
    """Return the CIDEr-D of each caption, ``(N,)``, from 0 to 10; the corpus score is the mean.

    An n-gram has a higher weight if fewer images have it in their references.  The value therefore
    depends on the corpus, and a single image scores 0.  The interval of the mean treats the
    weights as fixed.

    Raises:
        ValueError: if a caption has no reference, or the numbers of lists and captions differ.
    """
    _require_references(references, captions)
    counts = [
        [_ngrams(tokenize(reference_ngrams)) for reference_ngrams in counts_of_references]
        for counts_of_references in references
    ]
    document_frequency = Counter(
        ngram
        for counts_of_references in counts
        for ngram in {
            document_ngram
            for reference_ngrams in counts_of_references
            for document_ngram in reference_ngrams
        }
    )

    def weighted(ngrams: Counter[Ngram]) -> "_WeightedNgrams":
        return _WeightedNgrams.of(ngrams, document_frequency, len(captions))

    scores = []
    for caption, counts_of_references in zip(captions, counts, strict=True):
        caption_ngrams = weighted(_ngrams(tokenize(caption)))
        scores.append(
            10
            * np.mean(
                [
                    caption_ngrams.similarity(weighted(reference_ngrams))
                    for reference_ngrams in counts_of_references
                ]
            )
        )
    return np.array(scores)


@dataclass(frozen=True)
class _WeightedNgrams:
    """The tf-idf weight of each n-gram, the norm for each n, and the number of bigrams."""

    weights: dict[Ngram, float]
    norms: list[float]
    num_bigrams: int

    @classmethod
    def of(
        cls, ngrams: Counter[Ngram], document_frequency: Counter[Ngram], num_images: int
    ) -> "_WeightedNgrams":
        weights = {
            ngram: count * math.log(num_images / max(1, document_frequency[ngram]))
            for ngram, count in ngrams.items()
        }
        squares = [0.0] * MAX_NGRAM
        for ngram, weight in weights.items():
            squares[len(ngram) - 1] += weight**2
        num_bigrams = sum(count for ngram, count in ngrams.items() if len(ngram) == 2)
        return cls(weights, [math.sqrt(square) for square in squares], num_bigrams)

    def similarity(self, reference: "_WeightedNgrams") -> float:
        """Return the mean clipped cosine over n, times a Gaussian of the length difference."""
        products = [0.0] * MAX_NGRAM
        for ngram, weight in self.weights.items():
            reference_weight = reference.weights.get(ngram, 0.0)
            products[len(ngram) - 1] += min(weight, reference_weight) * reference_weight
        cosines = [
            product / (norm * reference_norm) if norm and reference_norm else 0.0
            for product, norm, reference_norm in zip(
                products, self.norms, reference.norms, strict=True
            )
        ]
        # Length is counted in bigrams, as in coco-caption.
        difference = self.num_bigrams - reference.num_bigrams
        return sum(cosines) / MAX_NGRAM * math.exp(-(difference**2) / (2 * CIDER_SIGMA**2))


def _ngrams(tokens: Sequence[str]) -> Counter[Ngram]:
    """Count the n-grams of 1 to 4 words."""
    return Counter(
        tuple(tokens[start : start + n])
        for n in range(1, MAX_NGRAM + 1)
        for start in range(len(tokens) - n + 1)
    )


def clip_score(
    captions: np.ndarray[Any, Any], images: np.ndarray[Any, Any]
) -> np.ndarray[Any, Any]:
    """Return CLIPScore, ``(N,)``: 2.5 times the cosine of caption and image, at least 0.

    Args:
        captions: text features, ``(N, D)``; published scores embed "A photo depicts ...".
        images: image features, ``(N, D)``.
    """
    return CLIP_SCALE * np.clip(_cosines(captions, images), 0, None)


def reference_clip_score(
    captions: np.ndarray[Any, Any],
    images: np.ndarray[Any, Any],
    references: Sequence[np.ndarray[Any, Any]],
) -> np.ndarray[Any, Any]:
    """Return RefCLIPScore, ``(N,)``: the harmonic mean of CLIPScore and the best reference cosine.

    A negative best cosine counts as 0, as in the paper.

    Args:
        captions: text features, ``(N, D)``.
        images: image features, ``(N, D)``.
        references: N arrays of text features, ``(R, D)``; R may differ.
    """
    with_image = clip_score(captions, images)
    best = np.array(
        [
            max(0.0, float(_cosines(caption[None], others).max()))
            for caption, others in zip(captions, references, strict=True)
        ]
    )
    total = with_image + best
    return np.divide(2 * with_image * best, total, out=np.zeros_like(total), where=total > 0)


def _cosines(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    norms = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
    return (one * other).sum(-1) / norms


def _require_references(
    references: Sequence[Sequence[str]], captions: Sequence[str] | None = None
) -> None:
    if captions is not None and (not captions or len(captions) != len(references)):
        raise ValueError(f"got {len(references)} lists of references for {len(captions)} captions")
    if not all(references):
        raise ValueError("every caption needs at least one reference")
