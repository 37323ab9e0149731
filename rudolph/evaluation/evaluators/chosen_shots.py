"""Few-shot evaluation with support examples of the training split.

A prompt is ``[image] question answer EOS`` for each shot and then the query without its answer.
``evaluation.shots`` has the numbers of shots, their choice and their order.

Two controls have ``ShotConfig.num_control`` shots.  ``shuffled`` moves every image of the shots to
the text of the next shot.  ``blind`` gives the query a grey image, so that only its shots help.

Shapes: N queries, H and W pixels.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rudolph.data.documents import Panel, document_panels
from rudolph.data.splits import Split
from rudolph.evaluation.context import EvaluationContext, Score, mean_score
from rudolph.evaluation.evaluators.captions import caption_scores, cider_score
from rudolph.evaluation.evaluators.choices import classes_of, pairs_with_class
from rudolph.evaluation.evaluators.texts import AnsweredPairs, answer_scores
from rudolph.evaluation.metrics.answers import MetricProtocol, choice_hits
from rudolph.evaluation.shots import SupportSet
from rudolph.sequence.tasks import TASKS

CAPTIONS, ANSWERS, CLASSIFICATION = (
    "few_shot_captions",
    "few_shot_answers",
    "few_shot_classification",
)
CONTROLS = ("shuffled", "blind")


class ShotPrompts(NamedTuple):
    """The prompts of all queries with one number of shots, or of a control.

    Attributes:
        case: The number of shots, or a name in ``CONTROLS``.
        shots: The answered panels of each query.
        images: Images of the queries, ``(N, 3, H, W)`` in [0, 1].
    """

    case: str
    shots: list[list[Panel]]
    images: Tensor


def few_shot_captions(context: EvaluationContext, split: Split) -> list[Score]:
    """Evaluate captions after captioned training images: token F1, exact match and CIDEr-D.

    For ``shapes`` also score how many captions are true.
    """

    def score(answered: AnsweredPairs) -> list[Score]:
        scores = caption_scores(answered, context, split, name=CAPTIONS)
        return [*scores, cider_score(answered, context, split, name=CAPTIONS)]

    return _scores_of_answers("image_captioning", context, split, score)


def few_shot_answers(context: EvaluationContext, split: Split) -> list[Score]:
    """Evaluate answers after answered training questions: token F1 and exact match.

    Raises:
        ValueError: If a pair has no question.
    """
    if not all(split.questions):
        raise ValueError("evaluator few_shot_answers needs pairs with questions")
    return _scores_of_answers(
        "question_answering",
        context,
        split,
        lambda answered: answer_scores(answered, context, split, name=ANSWERS),
    )


def few_shot_classification(context: EvaluationContext, split: Split) -> list[Score]:
    """Evaluate how often the right class is the likeliest after training images of known class.

    Raises:
        ValueError: If the dataset has no classes, or no pair of the split has one.
    """
    indices, true_classes = pairs_with_class(context, split)
    dataset = classes_of(open_support(context))
    classes, chance = dataset.classes, 1 / len(dataset.classes)

    def name_of_class(index: int) -> str:
        number = dataset.class_index(index)
        assert number is not None
        return classes[number]

    support = SupportSet(
        open_support(context),
        context.shots,
        seed=context.seed,
        is_eligible=lambda index: dataset.class_index(index) is not None,
    )
    scores = []
    for case, shots, images in shot_prompts(
        "image_captioning", context, split, indices, support, answer_of=name_of_class
    ):
        likelihoods = context.model.loglikelihood_after_shots(
            "image_captioning",
            [classes] * len(indices),
            shots,
            images=images,
            on_batch=context.on_token,
        ).numpy()
        hits = choice_hits(likelihoods, np.array(true_classes))
        settings = f"classes:{len(classes)}/{context.shots.protocol(len(shots[0]))}"
        protocol = MetricProtocol("accuracy", settings=settings)
        name = f"{CLASSIFICATION}/accuracy_{case}"
        scores.append(
            mean_score(name, split, indices, hits, context, chance=chance, protocol=protocol)
        )
    return scores


def _scores_of_answers(
    task: str,
    context: EvaluationContext,
    split: Split,
    score: Callable[[AnsweredPairs], list[Score]],
) -> list[Score]:
    """Return the scores of the answers after each number of shots, and of the controls."""
    indices = context.eval_indices(split)
    truths = [split.captions[index] for index in indices]
    has_question = TASKS[task].has_question
    questions = [split.questions[index] for index in indices] if has_question else None
    support = SupportSet(open_support(context), context.shots, seed=context.seed)
    scores = []
    for case, shots, images in shot_prompts(task, context, split, indices, support):
        answers = context.model.generate_text_after_shots(
            task,
            shots,
            config=context.text_sampling,
            seeds=context.sampling_seeds(indices),
            images=images,
            questions=questions,
            on_token=context.on_token,
        )
        protocol = context.shots.protocol(len(shots[0]))
        answered = AnsweredPairs(indices, answers, truths, protocol)
        scores += [replace(one, metric=f"{one.metric}_{case}") for one in score(answered)]
    return scores


def open_support(context: EvaluationContext) -> Split:
    """Return the training split of the evaluated dataset."""
    assert context.support is not None
    return context.support()


def shot_prompts(
    task: str,
    context: EvaluationContext,
    split: Split,
    indices: Sequence[int],
    support: SupportSet,
    *,
    answer_of: Callable[[int], str] | None = None,
) -> Iterator[ShotPrompts]:
    """Yield the prompts of some queries for each number of shots, then those of the controls.

    Args:
        task: A name in ``TASKS`` with given images.
        context: The evaluation.
        split: Split of the queries.
        indices: The queries, as indices of ``split``.
        support: The pairs to choose shots from.
        answer_of: Returns the answer of a shot by its index; None for the pair's own.
    """
    chosen = support.choose(split, indices, ranker=context.ranker).tolist()
    images, config = split.image_batch(indices), context.shots

    @cache
    def panel(index: int) -> Panel:
        [own] = document_panels(support.split, task, index)
        return own if answer_of is None else own._replace(answer=answer_of(index))

    def shots(number: int) -> list[list[Panel]]:
        return [[panel(index) for index in config.ordered(row[:number])] for row in chosen]

    for number in config.numbers:
        yield ShotPrompts(str(number), shots(number), images)
    controls = shots(config.num_control)
    if config.num_control > 1:
        yield ShotPrompts(CONTROLS[0], [shuffled_images(row) for row in controls], images)
    yield ShotPrompts(CONTROLS[1], controls, torch.full_like(images, 0.5))


def shuffled_images(shots: Sequence[Panel]) -> list[Panel]:
    """Return shots of which each has the image of the shot before it, the first that of the last.

    >>> [panel.image for panel in shuffled_images([Panel(1, "", "a"), Panel(2, "", "b")])]
    [2, 1]
    """
    before = [*shots[-1:], *shots[:-1]]
    return [panel._replace(image=other.image) for panel, other in zip(shots, before, strict=True)]
