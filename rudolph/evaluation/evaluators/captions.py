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
from rudolph.evaluation.evaluators.texts import AnsweredPairs, answer_pairs, answer_scores
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
    answered = answer_pairs("image_captioning", context, split)
    return caption_scores(answered, context, split, name="image_to_text")


def caption_scores(
    answered: AnsweredPairs, context: EvaluationContext, split: Split, *, name: str
) -> list[Score]:
    """Return token F1, exact match and, for ``shapes``, truth of captions, under ``name``."""
    scores = answer_scores(answered, context, split, name=name)
    if not isinstance(split.dataset, Shapes):
        return scores
    indices, captions, _, settings = answered
    truths = _references(split, indices)
    is_true = np.array(
        [max_over_references(exact_match, *pair) for pair in zip(captions, truths, strict=True)]
    )
    chance = chance_level(
        lambda i, j: max_over_references(exact_match, captions[j], truths[i]), len(captions)
    )
    protocol = MetricProtocol("true-sentence", normalization=str(ANSWER), settings=settings)
    metric = f"{name}/caption_accuracy"
    return [
        *scores,
        mean_score(metric, split, indices, is_true, context, chance=chance, protocol=protocol),
    ]


def caption_metrics(context: EvaluationContext, split: Split) -> list[Score]:
    """Evaluate image to text: CIDEr-D, BLEU-4, ROUGE-L and METEOR against all references.

    The references of a ``shapes`` scene are its true sentences.  The references of any other image
    are all its captions in the split.  The fraction of distinct captions is scored too.
    """
    answered = answer_pairs("image_captioning", context, split)
    indices, captions, *_ = answered
    references = _references(split, indices)

    def mean_metric(
        name: str, settings: str | None, metric: Callable[[str, Sequence[str]], float]
    ) -> Score:
        protocol = MetricProtocol(name, tokenization=WORDS, settings=settings)

        def values_of(texts: Sequence[str]) -> np.ndarray[Any, Any]:
            return np.array([metric(*pair) for pair in zip(texts, references, strict=True)])

        chance = _chance_of_corpus(lambda texts: float(values_of(texts).mean()), captions)
        name, values = f"image_to_text/{name}", values_of(captions)
        return mean_score(name, split, indices, values, context, chance=chance, protocol=protocol)

    counts = bleu_counts(captions, references)
    return [
        cider_score(answered, context, split, name="image_to_text"),
        mean_metric("rouge-l", None, rouge_l),
        mean_metric("meteor-nltk", "no-synonyms", meteor),
        corpus_score(
            "image_to_text/bleu-4",
            split,
            indices,
            lambda selected: float(counts.bleu(selected)[3]),
            context,
            chance=_chance_of_corpus(
                lambda texts: float(bleu_counts(texts, references).bleu()[3]), captions
            ),
            protocol=MetricProtocol("bleu-4", tokenization=WORDS),
        ),
        *_distinct(captions, split, indices),
    ]


def cider_score(
    answered: AnsweredPairs, context: EvaluationContext, split: Split, *, name: str
) -> Score:
    """Return the CIDEr-D of captions against all references, as a metric under ``name``."""
    indices, captions, _, settings = answered
    references = _references(split, indices)

    def cider(texts: Sequence[str]) -> np.ndarray[Any, Any]:
        return cider_d(texts, references)

    parts = [f"corpus:{len(captions)}", *([settings] if settings else [])]
    return mean_score(
        f"{name}/cider-d",
        split,
        indices,
        cider(captions),
        context,
        chance=_chance_of_corpus(lambda texts: float(cider(texts).mean()), captions),
        protocol=MetricProtocol("cider-d", tokenization=WORDS, settings="/".join(parts)),
    )


def _distinct(captions: Sequence[str], split: Split, indices: Sequence[int]) -> Iterator[Score]:
    """Yield the fraction of distinct captions; nothing if all pairs share one image."""
    clusters = split.clusters(indices)
    if len(set(clusters.tolist())) > 1:
        estimate = jackknife_interval(
            lambda selected: len({captions[i] for i in selected}) / len(selected),
            len(captions),
            limits=(0.0, 1.0),
            clusters=clusters,
        )
        protocol = MetricProtocol("distinct-captions", sample_size=len(captions))
        yield score_with_interval(
            "image_to_text/distinct", split, estimate, len(captions), None, protocol
        )


def _references(split: Split, indices: Sequence[int]) -> list[list[str]]:
    """Return the reference captions of each image."""
    if isinstance(split.dataset, Shapes):
        return [split.dataset.sentences(index) for index in indices]
    return split.all_captions(indices)


def _chance_of_corpus(
    metric: Callable[[Sequence[str]], float], captions: Sequence[str]
) -> float | None:
    """Return the mean metric of captions paired with other images; None for a single caption."""
    shifts = range(1, min(NUM_CORPUS_SHIFTS, len(captions) - 1) + 1)
    values = [metric([*captions[shift:], *captions[:shift]]) for shift in shifts]
    return float(np.mean(values)) if values else None
