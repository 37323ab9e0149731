"""Questions that are answered in words.

Shapes: N examples.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

from rudolph.data.datasets.shapes import Shapes, is_sentence
from rudolph.data.splits import Split
from rudolph.evaluation.evaluator import Score, Subject, chance_level, scored, scored_together
from rudolph.evaluation.metrics.answers import Measure, exact_match, token_f1
from rudolph.evaluation.metrics.texts import ANSWER, TRANSCRIPT, character_edits, edit_similarity
from rudolph.generation.answering import answer, continue_texts, ids_of, imagined, prompts
from rudolph.generation.ranking import perplexities
from rudolph.sequence.tasks import TASKS

# Words of a sentence that are given when the rest of it is to be said.
NUM_GIVEN_WORDS = 1
ARITHMETIC_CHARACTERS = "0123456789-абвгд"


def answer_f1(subject: Subject, split: Split) -> list[Score]:
    """Questions about pictures: token F1 of the answer, and how many are exact."""
    if not all(split.questions):
        raise ValueError("the question answer_f1 needs pairs that have questions")
    asked = answered("question_answering", subject, split)
    return compared(asked, subject, split, name="answers")


def text_answers(subject: Subject, split: Split) -> list[Score]:
    """Questions about a text: token F1 of the answer, and how many are exact."""
    task = "text_question_answering"
    return compared(answered(task, subject, split), subject, split, name=task)


def math_answers(subject: Subject, split: Split) -> list[Score]:
    """Sums, with options and without: how many answers are exact; digits and letters alone."""
    task = "math_question_answering"
    asked = answered(task, subject, split, characters=ARITHMETIC_CHARACTERS)
    return compared(asked, subject, split, name=task)


def recognition(subject: Subject, split: Split) -> list[Score]:
    """Text in a picture: 1-NED, character error rate, and how many are exact."""
    indices, answers, truths, _ = answered("text_recognition", subject, split)
    near = [edit_similarity(*pair) for pair in zip(answers, truths, strict=True)]
    by_chance = chance_level(lambda i, j: edit_similarity(answers[j], truths[i]), len(indices))
    edits, lengths = character_edits(answers, truths)
    exact = [exact_match(*pair, TRANSCRIPT) for pair in zip(answers, truths, strict=True)]
    told = str(TRANSCRIPT)
    return [
        scored(
            "text_recognition/1-ned",
            split,
            indices,
            np.array(near),
            subject,
            chance=by_chance,
            measure=Measure("1-ned", normalization=told),
        ),
        scored_together(
            "text_recognition/cer",
            split,
            indices,
            lambda at: float(edits[at].sum() / lengths[at].sum()),
            subject,
            measure=Measure("cer", normalization=told),
        ),
        scored(
            "text_recognition/exact",
            split,
            indices,
            np.array(exact),
            subject,
            measure=Measure("exact", normalization=told),
        ),
    ]


def continuation(subject: Subject, split: Split) -> list[Score]:
    """Text to text: the first word of a sentence is given; is the whole one of the world's?"""
    if not isinstance(split.dataset, Shapes):
        raise ValueError("the question continuation needs the dataset shapes")
    world, indices = split.dataset.config, subject.chosen(split)
    truths = [split.captions[index] for index in indices]
    given = [" ".join(truth.split()[:NUM_GIVEN_WORDS]) for truth in truths]
    said = continue_texts(
        subject.pipeline,
        given,
        config=subject.text_sampling,
        seeds=subject.seeds(indices),
        on_token=subject.on_token,
    )
    values = np.array([is_sentence(text, world) for text in said], dtype=float)
    # The words of true sentences in any order.
    rng = np.random.default_rng(subject.seed)
    mixed = [" ".join(rng.permutation(truth.split())) for truth in truths]
    chance = float(np.mean([is_sentence(text, world) for text in mixed]))
    measure = Measure("sentence-of-the-world", settings=f"given:{NUM_GIVEN_WORDS}")
    name = "text_to_text/is_sentence"
    return [scored(name, split, indices, values, subject, chance=chance, measure=measure)]


def likelihood(subject: Subject, split: Split) -> list[Score]:
    """Nats a token of the real picture after its caption, and of the caption after its picture.

    Of the picture also the bits a pixel that all its tokens take: what is compared between image
    tokenizers, whose tokens differ.
    """
    indices = subject.chosen(split)
    pipeline = subject.pipeline
    pictures = subject.codes(split, indices)
    scores = []
    for task, segment, metric in (
        ("text_to_image", "image", "text_to_image/nats"),
        ("image_captioning", "right_text", "image_to_text/nats"),
    ):
        texts = [pipeline.texts(task, split.captions[index]) for index in indices]
        left, right = (torch.stack(list(side)) for side in list(zip(*texts, strict=True))[:2])
        found = perplexities(
            pipeline.decoder,
            torch.cat([left, pictures, right], dim=1),
            segments=(segment,),
            batch_size=pipeline.batch_size,
        )
        nats = found[segment].log().double().numpy()
        scores.append(scored(metric, split, indices, nats, subject))
        if segment == "image":
            # A token stands for a square of so many pixels.
            bits = nats / (math.log(2) * pipeline.vqgan.config.factor**2)
            name = "text_to_image/bits_per_pixel"
            scores.append(scored(name, split, indices, bits, subject))
    return scores


class Asked(NamedTuple):
    """The pairs that were asked about, what was answered, the truths, and how it was asked."""

    indices: list[int]
    answers: list[str]
    truths: list[str]
    settings: str | None = None


def answered(task: str, subject: Subject, split: Split, *, characters: str | None = None) -> Asked:
    """Asks a task of the chosen pairs."""
    indices, row = subject.chosen(split), TASKS[task]
    questions = [split.questions[index] for index in indices] if row.has_question else None
    codes = None if row.image == "none" else subject.codes(split, indices)
    settings = None
    if codes is None and questions is not None and subject.no_image == "legacy":
        settings = "after-a-drawn-picture"
        codes = imagined(
            subject.pipeline,
            task,
            questions,
            config=subject.image_sampling,
            seeds=subject.seeds(indices),
        )
    tokens = prompts(
        subject.pipeline, task, indices=codes, questions=questions, number=len(indices)
    )
    answers = answer(
        subject.pipeline,
        tokens,
        config=subject.text_sampling,
        seeds=subject.seeds(indices),
        allowed=None if characters is None else ids_of(subject.pipeline, characters),
        on_token=subject.on_token,
    )
    truths = [split.captions[index] for index in indices]
    return Asked(indices, answers, truths, settings)


def compared(asked: Asked, subject: Subject, split: Split, *, name: str) -> list[Score]:
    """Token F1 of what the decoder says, and how many answers are exact."""
    indices, answers, truths, settings = asked
    values = np.array([token_f1(*pair) for pair in zip(answers, truths, strict=True)])
    exact = np.array([exact_match(*pair) for pair in zip(answers, truths, strict=True)])
    told = str(ANSWER)
    return [
        scored(
            f"{name}/token_f1",
            split,
            indices,
            values,
            subject,
            chance=chance_level(lambda i, j: token_f1(answers[j], truths[i]), len(truths)),
            measure=Measure("token-f1", normalization=told, settings=settings),
        ),
        scored(
            f"{name}/exact",
            split,
            indices,
            exact,
            subject,
            chance=chance_level(lambda i, j: exact_match(answers[j], truths[i]), len(truths)),
            measure=Measure("exact", normalization=told, settings=settings),
        ),
    ]
