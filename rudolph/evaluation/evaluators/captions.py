"""Evaluators of captions: whether they are true, and how similar they are to references.

Shapes: N examples.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from rudolph.data.datasets.shapes import Shapes
from rudolph.data.splits import Split
from rudolph.evaluation.context import (
    EvaluationContext,
    Score,
    chance_level,
    corpus_score,
    mean_score,
    score_with_interval,
)
from rudolph.evaluation.evaluators.texts import answer_pairs, answer_scores
from rudolph.evaluation.metrics.answers import MetricProtocol, exact_match, max_over_references
from rudolph.evaluation.metrics.captions import bleu_counts, cider_d, meteor, rouge_l
from rudolph.evaluation.metrics.texts import ANSWER
from rudolph.evaluation.statistics import jackknife_interval

# The number of shifts that pair captions with other images for the chance level.
NUM_CORPUS_SHIFTS = 5
WORDS = "lower-case-words"


def caption_f1(context: EvaluationContext, split: Split) -> list[Score]:
    """Evaluate image to text: token F1 and exact match of the captions of real images.

    For ``shapes`` also score how many captions are true.  A true caption is a sentence that holds
    for the scene and states all that a sentence of its family states.
    """
    asked = answer_pairs("image_captioning", context, split)
    scores = answer_scores(asked, context, split, name="image_to_text")
    if not isinstance(split.dataset, Shapes):
        return scores
    indices, said, *_ = asked
    truths = _references(split, indices)
    true = np.array(
        [max_over_references(exact_match, *pair) for pair in zip(said, truths, strict=True)]
    )
    chance = chance_level(
        lambda i, j: max_over_references(exact_match, said[j], truths[i]), len(said)
    )
    protocol = MetricProtocol("true-sentence", normalization=str(ANSWER))
    place = "image_to_text/caption_accuracy"
    return [
        *scores,
        mean_score(place, split, indices, true, context, chance=chance, protocol=protocol),
    ]


def caption_metrics(context: EvaluationContext, split: Split) -> list[Score]:
    """Evaluate image to text: CIDEr-D, BLEU-4, ROUGE-L and METEOR against all references.

    The references of a ``shapes`` scene are its true sentences.  Those of any other image are all
    captions that the split gives it.  The fraction of distinct captions is scored too.
    """
    indices, said, *_ = answer_pairs("image_captioning", context, split)
    references = _references(split, indices)

    def mean_of(
        name: str, settings: str | None, metric: Callable[[Sequence[str]], np.ndarray[Any, Any]]
    ) -> Score:
        protocol = MetricProtocol(name, tokenization=WORDS, settings=settings)
        chance = _by_chance(lambda texts: float(metric(texts).mean()), said)
        place = f"image_to_text/{name}"
        return mean_score(
            place, split, indices, metric(said), context, chance=chance, protocol=protocol
        )

    def each(score: Callable[[str, Sequence[str]], float]) -> Callable[[Sequence[str]], Any]:
        return lambda texts: np.array([score(*p) for p in zip(texts, references, strict=True)])

    counts = bleu_counts(said, references)
    return [
        mean_of("cider-d", f"corpus:{len(said)}", lambda texts: cider_d(texts, references)),
        mean_of("rouge-l", None, each(rouge_l)),
        mean_of("meteor-nltk", "no-synonyms", each(meteor)),
        corpus_score(
            "image_to_text/bleu-4",
            split,
            indices,
            lambda at: float(counts.bleu(at)[3]),
            context,
            chance=_by_chance(lambda texts: float(bleu_counts(texts, references).bleu()[3]), said),
            protocol=MetricProtocol("bleu-4", tokenization=WORDS),
        ),
        *_distinct(said, split, indices),
    ]


def _distinct(said: Sequence[str], split: Split, indices: Sequence[int]) -> Iterator[Score]:
    """Yield the fraction of distinct captions; nothing if all pairs share one image."""
    clusters = split.clusters(indices)
    if len(set(clusters.tolist())) > 1:
        share = jackknife_interval(
            lambda at: len({said[i] for i in at}) / len(at),
            len(said),
            limits=(0.0, 1.0),
            clusters=clusters,
        )
        protocol = MetricProtocol("distinct-captions", sample_size=len(said))
        yield score_with_interval(
            "image_to_text/distinct", split, share, len(said), None, protocol
        )


def _references(split: Split, indices: Sequence[int]) -> list[list[str]]:
    """Return the reference captions of each image."""
    if isinstance(split.dataset, Shapes):
        return [split.dataset.sentences(index) for index in indices]
    return split.all_captions(indices)


def _by_chance(metric: Callable[[Sequence[str]], float], said: Sequence[str]) -> float | None:
    """Return the mean metric of captions of other images, or None for a single caption."""
    shifts = range(1, min(NUM_CORPUS_SHIFTS, len(said) - 1) + 1)
    values = [metric([*said[shift:], *said[:shift]]) for shift in shifts]
    return float(np.mean(values)) if values else None
