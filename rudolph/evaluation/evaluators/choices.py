"""Questions that are answered by choosing: the decoder's own likelihood decides.

Shapes: N examples, C choices, I image tokens.
"""

from collections.abc import Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from rudolph.data.pairs import Classified, Pair, Ranked
from rudolph.data.splits import Split
from rudolph.evaluation.evaluator import Score, Subject, scored, scored_together
from rudolph.evaluation.metrics.answers import Measure, calibration_error, choice_hits
from rudolph.generation.answering import judge, prompts

# Captions or pictures that stand beside the right one.
NUM_RIVALS = 7


def zero_shot(subject: Subject, split: Split) -> list[Score]:
    """Which of the dataset's classes is the likeliest caption of a picture?"""
    dataset = split.dataset
    if not isinstance(dataset, Classified):
        raise ValueError(f"the question zero_shot needs classes, which {split.dataset_name} lacks")
    found = [(index, dataset.class_of(index)) for index in range(len(split))]
    known = [(index, own) for index, own in found if own is not None][: subject.num_examples]
    if not known:
        raise ValueError(f"{split.dataset_name}: no pair of {split.name} has a class")
    indices, own_classes = zip(*known, strict=True)
    classes = dataset.classes
    tokens = prompts(subject.pipeline, "image_captioning", indices=subject.codes(split, indices))
    judged = judge(
        subject.pipeline,
        "image_captioning",
        tokens,
        [classes] * len(indices),
        on_batch=subject.on_token,
    )
    likelihoods = judged.log_likelihoods.numpy()
    hits = choice_hits(likelihoods, np.array(own_classes))
    shares = torch.from_numpy(likelihoods).softmax(1).numpy()
    surest = shares.max(1)
    measure, chance = Measure("accuracy", settings=f"classes:{len(classes)}"), 1 / len(classes)
    name = "zero_shot_classification/accuracy"
    return [
        scored(name, split, indices, hits, subject, chance=chance, measure=measure),
        scored_together(
            "zero_shot_classification/calibration_error",
            split,
            indices,
            lambda at: calibration_error(surest[at], hits[at]),
            subject,
            measure=Measure("calibration-error", settings=f"classes:{len(classes)}"),
        ),
    ]


def text_ranking(subject: Subject, split: Split) -> list[Score]:
    """Which of some captions that differ in one thing is the picture's?"""
    indices, groups = _with_rivals(subject, split, "text_ranking")
    captions = [[pair.caption for pair in group] for group in groups]
    tokens = prompts(subject.pipeline, "image_captioning", indices=subject.codes(split, indices))
    judged = judge(
        subject.pipeline, "image_captioning", tokens, captions, on_batch=subject.on_token
    )
    return [_first_of("text_ranking", split, indices, judged.log_likelihoods, subject)]


def image_ranking(subject: Subject, split: Split) -> list[Score]:
    """Which of some pictures that differ in one thing makes the caption likeliest?"""
    indices, groups = _with_rivals(subject, split, "image_ranking")
    codes = subject.codes_of([pair for group in groups for pair in group])
    tokens = prompts(subject.pipeline, "image_captioning", indices=codes)
    captions = [[group[0].caption] for group in groups for _ in group]
    judged = judge(
        subject.pipeline, "image_captioning", tokens, captions, on_batch=subject.on_token
    )
    likelihoods = judged.log_likelihoods.view(len(groups), -1)
    return [_first_of("image_ranking", split, indices, likelihoods, subject)]


def multiple_choice(subject: Subject, split: Split) -> list[Score]:
    """Which of the answers that a question leaves to choose from is the likeliest?

    Of pairs whose answer is open none is asked about.
    """
    found = ((index, split.dataset[index].choices) for index in subject.order(split))
    asked = list(islice((each for each in found if each[1]), subject.num_examples))
    if not asked:
        raise ValueError(f"{split.dataset_name}: no pair of {split.name} has choices")
    has_pictures = split.images is not None
    task = "question_answering" if has_pictures else "math_question_answering"
    judged_pairs: list[int] = []
    hits: list[float] = []
    for number in sorted({len(choices) for _, choices in asked}):
        indices, options = zip(*[each for each in asked if len(each[1]) == number], strict=True)
        tokens = prompts(
            subject.pipeline,
            task,
            indices=subject.codes(split, indices) if has_pictures else None,
            questions=[split.questions[index] for index in indices],
        )
        judged = judge(subject.pipeline, task, tokens, options, on_batch=subject.on_token)
        own = [each.index(split.captions[at]) for at, each in zip(indices, options, strict=True)]
        judged_pairs += indices
        hits += choice_hits(judged.log_likelihoods.numpy(), np.array(own)).tolist()
    chance = float(np.mean([1 / len(choices) for _, choices in asked]))
    measure = Measure("accuracy", settings="given-choices")
    name = f"{'answers' if has_pictures else task}/choice_accuracy"
    values = np.array(hits)
    return [scored(name, split, judged_pairs, values, subject, chance=chance, measure=measure)]


def _with_rivals(
    subject: Subject, split: Split, question: str
) -> tuple[list[int], list[Sequence[Pair]]]:
    """Pairs that are asked about, each followed by its rivals; those with fewer are left out."""
    dataset = split.dataset
    if not isinstance(dataset, Ranked):
        raise ValueError(f"the question {question} needs rivals, which {split.dataset_name} lacks")
    groups = [
        (index, [dataset[index], *dataset.rivals(index, NUM_RIVALS)])
        for index in subject.chosen(split)
    ]
    whole = [(index, group) for index, group in groups if len(group) == NUM_RIVALS + 1]
    if not whole:
        raise ValueError(f"{split.dataset_name}: no pair of {split.name} has {NUM_RIVALS} rivals")
    return [index for index, _ in whole], [group for _, group in whole]


def _first_of(
    task: str, split: Split, indices: Sequence[int], likelihoods: Tensor, subject: Subject
) -> Score:
    hits = choice_hits(likelihoods.numpy(), np.zeros(len(likelihoods), dtype=np.int64))
    number = likelihoods.shape[1]
    measure = Measure("accuracy", settings=f"choices:{number}")
    name, chance = f"{task}/accuracy", 1 / number
    return scored(name, split, indices, hits, subject, chance=chance, measure=measure)
