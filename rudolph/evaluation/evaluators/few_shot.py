"""Few-shot evaluation: the likeliest answer after some images with their answers.

Shapes: N examples, C choices.
"""

from collections.abc import Sequence

import numpy as np
import torch

from rudolph.data.documents import Panel, document_panels
from rudolph.data.pairs import HasShots
from rudolph.data.splits import Split
from rudolph.evaluation.context import EvaluationContext, Score, mean_score
from rudolph.evaluation.metrics.answers import MetricProtocol, choice_hits

FEW_SHOT, FEW_SHOT_TEXT = "few_shot/accuracy", "few_shot_text/accuracy"

Episodes = list[list[Panel]]


def few_shot(context: EvaluationContext, split: Split) -> list[Score]:
    """Evaluate how often the right word is the likeliest after each number of shots.

    Two controls have ``ShotConfig.num_control`` shots.  ``shuffled`` replaces the images of an
    episode by those of another episode, and ``blank`` replaces them by grey images.

    Raises:
        ValueError: If the dataset has no shots.
    """
    scores = _shot_curve(FEW_SHOT, "image_captioning", context, split)
    indices, dataset = context.eval_indices(split), dataset_with_shots(split)
    if len(indices) < 2:
        # The control ``shuffled`` needs a second episode.
        return scores
    number = context.shots.num_control
    chance = dataset.chance(number)
    for case, replace_images in (("shuffled", _other_images), ("blank", _grey_images)):
        episodes = replace_images(_episodes(split, "image_captioning", indices, number))
        name = f"{FEW_SHOT}_{case}"
        scores.append(_accuracy(name, context, split, indices, episodes, chance=chance))
    return scores


def few_shot_text(context: EvaluationContext, split: Split) -> list[Score]:
    """Evaluate the episodes of ``few_shot`` with a description in place of each image.

    Raises:
        ValueError: If the dataset has no shots.
    """
    return _shot_curve(FEW_SHOT_TEXT, "text_question_answering", context, split)


def dataset_with_shots(split: Split) -> HasShots:
    """Return the dataset of a split.

    Raises:
        ValueError: If it has no shots.
    """
    if not isinstance(split.dataset, HasShots):
        raise ValueError(f"few-shot evaluators need shots, which {split.dataset_name} lacks")
    return split.dataset


def _shot_curve(name: str, task: str, context: EvaluationContext, split: Split) -> list[Score]:
    """Return the accuracy after each number of ``ShotConfig.numbers``."""
    indices, dataset = context.eval_indices(split), dataset_with_shots(split)
    scores = []
    for number in context.shots.numbers:
        episodes, chance = _episodes(split, task, indices, number), dataset.chance(number)
        scores.append(
            _accuracy(f"{name}_{number}", context, split, indices, episodes, chance=chance)
        )
    return scores


def _episodes(split: Split, task: str, indices: Sequence[int], number: int) -> Episodes:
    """Return the panels of each pair's episode for a task, the pair itself last."""
    dataset = dataset_with_shots(split)
    return [
        document_panels(split, task, index, shots=dataset.shots(index, number))
        for index in indices
    ]


def _other_images(episodes: Episodes) -> Episodes:
    """Return the episodes with the images of the next episode."""
    return [
        [panel._replace(image=other.image) for panel, other in zip(episode, next_one, strict=True)]
        for episode, next_one in zip(episodes, [*episodes[1:], episodes[0]], strict=True)
    ]


def _grey_images(episodes: Episodes) -> Episodes:
    """Return the episodes with grey images."""
    return [
        [
            panel._replace(
                image=None if panel.image is None else torch.full_like(panel.image, 0.5)
            )
            for panel in episode
        ]
        for episode in episodes
    ]


def _accuracy(
    name: str,
    context: EvaluationContext,
    split: Split,
    indices: Sequence[int],
    episodes: Episodes,
    *,
    chance: float,
) -> Score:
    """Score how often the right one of a pair's choices is the likeliest after its shots."""
    choices = [split.dataset[index].choices for index in indices]
    asked = [episode[-1] for episode in episodes]
    images = [panel.image for panel in asked if panel.image is not None]
    likelihoods = context.model.loglikelihood_after_shots(
        "image_captioning" if images else "text_question_answering",
        choices,
        [episode[:-1] for episode in episodes],
        images=torch.stack(images) if images else None,
        questions=None if images else [panel.question for panel in asked],
        on_batch=context.on_token,
    ).numpy()
    truths = [
        row.index(split.captions[index]) for index, row in zip(indices, choices, strict=True)
    ]
    hits = choice_hits(likelihoods, np.array(truths))
    protocol = MetricProtocol("accuracy", settings=f"choices:{likelihoods.shape[1]}")
    return mean_score(name, split, indices, hits, context, chance=chance, protocol=protocol)
