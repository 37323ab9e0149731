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
        ValueError: if the dataset has no classes, or no pair of the split has one.
    """
    dataset = split.dataset
    if not isinstance(dataset, HasClasses):
        raise ValueError(
            f"zero_shot_classification needs classes, which {split.dataset_name} lacks"
        )
    found = [(index, dataset.class_index(index)) for index in range(len(split))]
    known = [(index, own) for index, own in found if own is not None][: context.num_examples]
    if not known:
        raise ValueError(f"{split.dataset_name}: no pair of {split.name} has a class")
    indices, own_classes = zip(*known, strict=True)
    classes = dataset.classes
    likelihoods = context.model.loglikelihood(
        "image_captioning",
        [classes] * len(indices),
        images=split.image_batch(indices),
        on_batch=context.on_token,
    ).numpy()
    hits = choice_hits(likelihoods, np.array(own_classes))
    shares = torch.from_numpy(likelihoods).softmax(1).numpy()
    surest = shares.max(1)
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
            lambda at: calibration_error(surest[at], hits[at]),
            context,
            protocol=MetricProtocol("calibration-error", settings=f"classes:{len(classes)}"),
        ),
    ]


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
    return [_first_of("text_ranking", split, indices, likelihoods, context)]


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
    return [_first_of("image_ranking", split, indices, likelihoods, context)]


def multiple_choice(context: EvaluationContext, split: Split) -> list[Score]:
    """Evaluate how often the right answer is the most likely of the given choices.

    Pairs without choices are skipped.

    Raises:
        ValueError: if no pair of the split has choices.
    """
    found = ((index, split.dataset[index].choices) for index in context.order(split))
    asked = list(islice((each for each in found if each[1]), context.num_examples))
    if not asked:
        raise ValueError(f"{split.dataset_name}: no pair of {split.name} has choices")
    has_images = split.images is not None
    task = "question_answering" if has_images else "math_question_answering"
    judged_pairs: list[int] = []
    hits: list[float] = []
    for number in sorted({len(choices) for _, choices in asked}):
        indices, options = zip(*[each for each in asked if len(each[1]) == number], strict=True)
        likelihoods = context.model.loglikelihood(
            task,
            options,
            images=split.image_batch(indices) if has_images else None,
            questions=[split.questions[index] for index in indices],
            on_batch=context.on_token,
        )
        own = [each.index(split.captions[at]) for at, each in zip(indices, options, strict=True)]
        judged_pairs += indices
        hits += choice_hits(likelihoods.numpy(), np.array(own)).tolist()
    chance = float(np.mean([1 / len(choices) for _, choices in asked]))
    protocol = MetricProtocol("accuracy", settings="given-choices")
    name = f"{'answers' if has_images else task}/choice_accuracy"
    values = np.array(hits)
    return [
        mean_score(name, split, judged_pairs, values, context, chance=chance, protocol=protocol)
    ]


def _with_hard_negatives(
    context: EvaluationContext, split: Split, question: str
) -> tuple[list[int], list[Sequence[Pair]]]:
    """Return the chosen pairs that have enough hard negatives, each followed by those.

    Raises:
        ValueError: if the dataset has no hard negatives, or no pair has enough of them.
    """
    dataset = split.dataset
    if not isinstance(dataset, HasHardNegatives):
        raise ValueError(
            f"the question {question} needs negatives, which {split.dataset_name} lacks"
        )
    groups = [
        (index, [dataset[index], *dataset.hard_negatives(index, NUM_HARD_NEGATIVES)])
        for index in context.chosen(split)
    ]
    whole = [(index, group) for index, group in groups if len(group) == NUM_HARD_NEGATIVES + 1]
    if not whole:
        raise ValueError(
            f"{split.dataset_name}: no pair of {split.name} has {NUM_HARD_NEGATIVES} negatives"
        )
    return [index for index, _ in whole], [group for _, group in whole]


def _first_of(
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
