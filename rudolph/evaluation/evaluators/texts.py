"""Evaluators of generated text (answers, recognised text, continuations) and of likelihood.

Shapes: N examples.
"""

import math
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from rudolph.data.datasets.shapes import Shapes, is_sentence
from rudolph.data.datasets.shapes_questions import ShapesQuestions
from rudolph.data.splits import Split
from rudolph.evaluation.context import (
    EvaluationContext,
    Score,
    chance_level,
    corpus_score,
    mean_score,
)
from rudolph.evaluation.metrics.answers import MetricProtocol, exact_match, token_f1
from rudolph.evaluation.metrics.texts import ANSWER, TRANSCRIPT, character_edits, edit_similarity
from rudolph.generation.answering import continue_texts
from rudolph.generation.ranking import perplexities
from rudolph.sequence.tasks import TASKS

# The number of words given at the start of a sentence to continue.
NUM_GIVEN_WORDS = 1
ARITHMETIC_CHARACTERS = "0123456789-абвгд"


def answer_f1(context: EvaluationContext, split: Split) -> list[Score]:
    """Evaluate question answering about images: token F1 and exact match.

    For ``shapes_questions`` also score the exact match of each family of questions.

    Raises:
        ValueError: if a pair has no question.
    """
    if not all(split.questions):
        raise ValueError("evaluator answer_f1 needs pairs with questions")
    answered = answer_pairs("question_answering", context, split)
    scores = answer_scores(answered, context, split, name="answers")
    if isinstance(split.dataset, ShapesQuestions):
        scores += scores_by_family(answered, context, split, name="answers/exact_match")
    return scores


def scores_by_family(
    answered: "AnsweredPairs", context: EvaluationContext, split: Split, *, name: str
) -> list[Score]:
    """Return the exact match of each family of questions, as metric ``<name>_<family>``."""
    positions: dict[str, list[int]] = {}
    for position, index in enumerate(answered.indices):
        family = split.dataset[index].attributes["family"]
        positions.setdefault(family, []).append(position)
    scores = []
    for family, rows in sorted(positions.items()):
        answers, truths = ([texts[row] for row in rows] for texts in answered[1:3])
        chance = chance_level(partial(_swapped_match, answers, truths), len(rows))
        values = np.array([exact_match(*pair) for pair in zip(answers, truths, strict=True)])
        indices = [answered.indices[row] for row in rows]
        protocol = MetricProtocol("exact", normalization=str(ANSWER))
        scores.append(
            mean_score(
                f"{name}_{family}",
                split,
                indices,
                values,
                context,
                chance=chance,
                protocol=protocol,
            )
        )
    return scores


def _swapped_match(answers: list[str], truths: list[str], row: int, other: int) -> float:
    """Return the exact match of the answer to prompt ``other`` as an answer to prompt ``row``."""
    return exact_match(answers[other], truths[row])


def text_answers(context: EvaluationContext, split: Split) -> list[Score]:
    """Evaluate question answering about texts: token F1 and exact match."""
    task = "text_question_answering"
    return answer_scores(answer_pairs(task, context, split), context, split, name=task)


def math_answers(context: EvaluationContext, split: Split) -> list[Score]:
    """Evaluate arithmetic with and without options: token F1 and exact match.

    Answers are generated from digits, the minus sign and option letters only.
    """
    task = "math_question_answering"
    answered = answer_pairs(task, context, split, characters=ARITHMETIC_CHARACTERS)
    return answer_scores(answered, context, split, name=task)


def text_recognition(context: EvaluationContext, split: Split) -> list[Score]:
    """Evaluate recognition of text in images: 1-NED, character error rate and exact match."""
    indices, answers, truths, _ = answer_pairs("text_recognition", context, split)
    similarities = [edit_similarity(*pair) for pair in zip(answers, truths, strict=True)]
    chance = chance_level(lambda i, j: edit_similarity(answers[j], truths[i]), len(indices))
    edits, lengths = character_edits(answers, truths)
    exact = [exact_match(*pair, TRANSCRIPT) for pair in zip(answers, truths, strict=True)]
    normalization = str(TRANSCRIPT)
    return [
        mean_score(
            "text_recognition/1-ned",
            split,
            indices,
            np.array(similarities),
            context,
            chance=chance,
            protocol=MetricProtocol("1-ned", normalization=normalization),
        ),
        corpus_score(
            "text_recognition/cer",
            split,
            indices,
            lambda selected: float(edits[selected].sum() / lengths[selected].sum()),
            context,
            protocol=MetricProtocol("cer", normalization=normalization),
        ),
        mean_score(
            "text_recognition/exact_match",
            split,
            indices,
            np.array(exact),
            context,
            protocol=MetricProtocol("exact", normalization=normalization),
        ),
    ]


def text_continuation(context: EvaluationContext, split: Split) -> list[Score]:
    """Evaluate text to text: how often a caption's first word is continued to a valid sentence.

    A sentence is valid if the world of ``shapes`` can produce it.  The chance level is how often
    the words of a true sentence, in random order, form a valid sentence.

    Raises:
        ValueError: if the dataset is not ``shapes``.
    """
    if not isinstance(split.dataset, Shapes):
        raise ValueError("evaluator text_continuation needs the dataset shapes")
    config, indices = split.dataset.config, context.eval_indices(split)
    truths = [split.captions[index] for index in indices]
    prompts = [" ".join(truth.split()[:NUM_GIVEN_WORDS]) for truth in truths]
    continuations = continue_texts(
        context.pipeline,
        prompts,
        config=context.text_sampling,
        seeds=context.sampling_seeds(indices),
        on_token=context.on_token,
    )
    values = np.array([is_sentence(text, config) for text in continuations], dtype=float)
    # The chance level: the words of true sentences in random order.
    rng = np.random.default_rng(context.seed)
    shuffled = [" ".join(rng.permutation(truth.split())) for truth in truths]
    chance = float(np.mean([is_sentence(text, config) for text in shuffled]))
    protocol = MetricProtocol("sentence-of-the-world", settings=f"given:{NUM_GIVEN_WORDS}")
    name = "text_to_text/sentence_accuracy"
    return [mean_score(name, split, indices, values, context, chance=chance, protocol=protocol)]


def likelihood(context: EvaluationContext, split: Split) -> list[Score]:
    """Evaluate the nats per token of an image given its caption, and of a caption given its image.

    Images are also scored in bits per pixel, which is comparable between image tokenizers whose
    tokens differ.
    """
    indices = context.eval_indices(split)
    pipeline = context.pipeline
    images = context.image_indices(split, indices)
    scores = []
    for task, segment, metric in (
        ("text_to_image", "image", "text_to_image/nats"),
        ("image_captioning", "right_text", "image_to_text/nats"),
    ):
        texts = [pipeline.texts(task, split.captions[index]) for index in indices]
        left, right = (torch.stack(list(side)) for side in list(zip(*texts, strict=True))[:2])
        segment_perplexities = perplexities(
            pipeline.decoder,
            torch.cat([left, images, right], dim=1),
            segments=(segment,),
            batch_size=pipeline.batch_size,
        )
        nats = segment_perplexities[segment].log().double().numpy()
        scores.append(mean_score(metric, split, indices, nats, context))
        if segment == "image":
            # One token covers ``factor`` x ``factor`` pixels.
            bits = nats / (math.log(2) * pipeline.vqgan.config.factor**2)
            name = "text_to_image/bits_per_pixel"
            scores.append(mean_score(name, split, indices, bits, context))
    return scores


class AnsweredPairs(NamedTuple):
    """The answers generated for the evaluated pairs.

    Attributes:
        indices: indices of the pairs in the split.
        answers: the generated answers.
        truths: the correct answers.
        settings: what the protocol must note about the generation, if anything.
    """

    indices: list[int]
    answers: list[str]
    truths: list[str]
    settings: str | None = None


def answer_pairs(
    task: str, context: EvaluationContext, split: Split, *, characters: str | None = None
) -> AnsweredPairs:
    """Generate the answers of a task for the chosen pairs.

    ``characters`` limits the characters that are generated; None allows all.
    """
    indices, row = context.eval_indices(split), TASKS[task]
    questions = [split.questions[index] for index in indices] if row.has_question else None
    images = None if row.image == "none" else split.image_batch(indices)
    is_legacy = images is None and questions is not None and context.missing_image == "legacy"
    answers = context.model.generate_text(
        task,
        config=context.text_sampling,
        seeds=context.sampling_seeds(indices),
        images=images,
        questions=questions,
        allowed_characters=characters,
        missing_image=context.image_sampling if is_legacy else None,
        on_token=context.on_token,
    )
    settings = "after-a-generated-image" if is_legacy else None
    truths = [split.captions[index] for index in indices]
    return AnsweredPairs(indices, answers, truths, settings)


def answer_scores(
    answered: AnsweredPairs, context: EvaluationContext, split: Split, *, name: str
) -> list[Score]:
    """Return the token F1 and the exact match of answers, as metrics under ``name``."""
    indices, answers, truths, settings = answered
    values = np.array([token_f1(*pair) for pair in zip(answers, truths, strict=True)])
    exact = np.array([exact_match(*pair) for pair in zip(answers, truths, strict=True)])
    normalization = str(ANSWER)
    return [
        mean_score(
            f"{name}/token_f1",
            split,
            indices,
            values,
            context,
            chance=chance_level(lambda i, j: token_f1(answers[j], truths[i]), len(truths)),
            protocol=MetricProtocol("token-f1", normalization=normalization, settings=settings),
        ),
        mean_score(
            f"{name}/exact_match",
            split,
            indices,
            exact,
            context,
            chance=chance_level(lambda i, j: exact_match(answers[j], truths[i]), len(truths)),
            protocol=MetricProtocol("exact", normalization=normalization, settings=settings),
        ),
    ]
