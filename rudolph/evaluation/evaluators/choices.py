"""Evaluators that choose among given options by the model's log-likelihood.

Shapes: N examples, C choices, I image tokens.
"""

from collections.abc import Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from rudolph.data.pairs import HasClasses, HasHardNegatives, Pair
from rudolph.data.splits import Split
from rudolph.evaluation.context import (
    EvaluationContext,
    Score,
    corpus_score,
    images_of,
    mean_score,
)
from rudolph.evaluation.metrics.answers import MetricProtocol, calibration_error, choice_hits

# The number of wrong captions or images next to the right one.
NUM_HARD_NEGATIVES = 7


def zero_shot_classification(context: EvaluationContext, split: Split) -> list[Score]:
    """Evaluate how often an image's class is its most likely caption, and the calibration error.

    Raises:
        ValueError: if the dataset has no classes, or no pair of the split has a class.
    """
    indices, true_classes = pairs_with_class(context, split)
    classes = classes_of(split).classes
    likelihoods = context.model.loglikelihood(
        "image_captioning",
        [classes] * len(indices),
        images=split.image_batch(indices),
        on_batch=context.on_token,
    ).numpy()
    hits = choice_hits(likelihoods, np.array(true_classes))
    scores = torch.from_numpy(likelihoods)
    # A model that knows none of the classes finds them equally likely.
    scores = scores.where(scores.isfinite().any(1, keepdim=True), torch.zeros_like(scores))
    probabilities = scores.softmax(1).numpy()
    confidences = probabilities.max(1)
    protocol, chance = (
        MetricProtocol("accuracy", settings=f"classes:{len(classes)}"),
        1 / len(classes),
    )
    name = "zero_shot_classification/accuracy"
    return [
        mean_score(name, split, indices, hits, context, chance=chance, protocol=protocol),
        corpus_score(
            "zero_shot_classification/calibration_error",
            split,
            indices,
            lambda selected: calibration_error(confidences[selected], hits[selected]),
            context,
            protocol=MetricProtocol("calibration-error", settings=f"classes:{len(classes)}"),
        ),
    ]


def pairs_with_class(context: EvaluationContext, split: Split) -> tuple[list[int], list[int]]:
    """Return the first pairs of a split that have a class, and the class of each.

    Raises:
        ValueError: if the dataset has no classes, or no pair of the split has one.
    """
    dataset = classes_of(split)
    numbered = ((index, dataset.class_index(index)) for index in range(len(split)))
    with_class = list(
        islice((row for row in numbered if row[1] is not None), context.num_examples)
    )
    if not with_class:
        raise ValueError(f"{split.dataset_name}: no pair of {split.name} has a class")
    indices, true_classes = zip(*with_class, strict=True)
    return list(indices), list(true_classes)


def classes_of(split: Split) -> HasClasses:
    """Return the dataset of a split.

    Raises:
        ValueError: if it has no classes.
    """
    if not isinstance(split.dataset, HasClasses):
        raise ValueError(f"classification needs classes, which {split.dataset_name} lacks")
    return split.dataset


def text_ranking(context: EvaluationContext, split: Split) -> list[Score]:
    """Evaluate how often the right caption of an image is likelier than its hard negatives.

    A hard negative differs in one thing from the right caption.
    """
    indices, groups = _with_hard_negatives(context, split, "text_ranking")
    captions = [[pair.caption for pair in group] for group in groups]
    likelihoods = context.model.loglikelihood(
        "image_captioning",
        captions,
        images=split.image_batch(indices),
        on_batch=context.on_token,
    )
    return [_ranking_score("text_ranking", split, indices, likelihoods, context)]


def image_ranking(context: EvaluationContext, split: Split) -> list[Score]:
    """Evaluate how often the right image makes a caption likelier than hard negatives do.

    A hard negative is the image of a caption that differs in one thing.
    """
    indices, groups = _with_hard_negatives(context, split, "image_ranking")
    likelihoods = context.model.loglikelihood(
        "image_captioning",
        [[group[0].caption] for group in groups for _ in group],
        images=images_of([pair for group in groups for pair in group]),
        on_batch=context.on_token,
    ).view(len(groups), -1)
    return [_ranking_score("image_ranking", split, indices, likelihoods, context)]


def multiple_choice(context: EvaluationContext, split: Split) -> list[Score]:
    """Evaluate how often the right answer is the most likely of the given choices.

    Pairs without choices are skipped.

    Raises:
        ValueError: if no pair of the split has choices.
    """
    candidates = (
        (index, split.dataset[index].choices) for index in context.shuffled_indices(split)
    )
    questions = list(islice((item for item in candidates if item[1]), context.num_examples))
    if not questions:
        raise ValueError(f"{split.dataset_name}: no pair of {split.name} has choices")
    has_images = split.has_images
    task = "question_answering" if has_images else "math_question_answering"
    scored_indices: list[int] = []
    hits: list[float] = []
    for num_choices in sorted({len(choices) for _, choices in questions}):
        indices, options = zip(
            *[item for item in questions if len(item[1]) == num_choices], strict=True
        )
        likelihoods = context.model.loglikelihood(
            task,
            options,
            images=split.image_batch(indices) if has_images else None,
            questions=[split.questions[index] for index in indices],
            on_batch=context.on_token,
        )
        correct = [
            item.index(split.captions[index]) for index, item in zip(indices, options, strict=True)
        ]
        scored_indices += indices
        hits += choice_hits(likelihoods.numpy(), np.array(correct)).tolist()
    chance = float(np.mean([1 / len(choices) for _, choices in questions]))
    protocol = MetricProtocol("accuracy", settings="given-choices")
    name = f"{'answers' if has_images else task}/choice_accuracy"
    values = np.array(hits)
    return [
        mean_score(name, split, scored_indices, values, context, chance=chance, protocol=protocol)
    ]


def _with_hard_negatives(
    context: EvaluationContext, split: Split, evaluator: str
) -> tuple[list[int], list[Sequence[Pair]]]:
    """Return the indices of pairs with enough hard negatives, and each pair with its negatives.

    Raises:
        ValueError: if the dataset has no hard negatives, or no pair has enough of them.
    """
    dataset = split.dataset
    if not isinstance(dataset, HasHardNegatives):
        raise ValueError(
            f"evaluator {evaluator} needs hard negatives, which {split.dataset_name} lacks"
        )
    groups = [
        (index, [dataset[index], *dataset.hard_negatives(index, NUM_HARD_NEGATIVES)])
        for index in context.eval_indices(split)
    ]
    complete = [(index, group) for index, group in groups if len(group) == NUM_HARD_NEGATIVES + 1]
    if not complete:
        raise ValueError(
            f"{split.dataset_name}: no pair of {split.name} has {NUM_HARD_NEGATIVES} negatives"
        )
    return [index for index, _ in complete], [group for _, group in complete]


def _ranking_score(
    task: str,
    split: Split,
    indices: Sequence[int],
    likelihoods: Tensor,
    context: EvaluationContext,
) -> Score:
    hits = choice_hits(likelihoods.numpy(), np.zeros(len(likelihoods), dtype=np.int64))
    number = likelihoods.shape[1]
    protocol = MetricProtocol("accuracy", settings=f"choices:{number}")
    name, chance = f"{task}/accuracy", 1 / number
    return mean_score(name, split, indices, hits, context, chance=chance, protocol=protocol)
