"""What a decoder is asked to do, and how an example of it fills the layout.

A task says what stands in the left text, whether there is an image, what stands in the right text,
with which task tokens, which segments are scored with which weights, how it is answered, and by
what number against which chance level an answer is judged.  The same row serves training and
answering, so that both see the same prompt.

Some tasks need no training of their own: they ask a decoder that has learned another one in
another way, and ``filled_as`` names that one.

A task without an image has code 0 at every place of the image, in training and in answering, and
is never scored there.

To add a task, write a ``Task`` row in ``TASKS``.

Source: ru-dolph, ``rudolph/api.py``, and fbc2_aij2022, ``train/dataloader.py`` (task tokens,
weights, no image as zeros).
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from rudolph.sequence.layout import SequenceLayout, Vocabulary
from rudolph.sequence.tokenizer import Tokenizer

# What stands at every place of the image where a task has none.
MISSING_IMAGE_CODE = 0
UNKNOWN_LEFT, UNKNOWN_RIGHT = "<LT_UNK>", "<RT_UNK>"


@dataclass(frozen=True)
class Task:
    """One row of the table of tasks.

    ``left`` and ``right`` are ``caption``, ``question`` or, for no words, empty; a question's
    answer is its caption.  ``right`` is None where there is no right text at all.  ``image`` is
    ``drawn``, ``given`` or ``none``.  ``weights`` are those of left text, image and right text.
    ``answer`` is what is given back, ``metric`` how it is judged and ``chance`` what a decoder
    that knows nothing of the prompt would reach.
    """

    left: str
    image: str
    right: str | None
    left_token: str
    right_token: str | None
    weights: tuple[float, float, float]
    answer: str
    metric: str
    chance: str = "answers to other prompts"
    filled_as: str | None = None

    @property
    def caption_is_left(self) -> bool:
        return self.left == "caption"

    @property
    def has_question(self) -> bool:
        return self.left == "question"


class Texts(NamedTuple):
    """Both texts of an example, ``left`` (L,) and ``right`` (R,) int64, and how much was cut."""

    left: Tensor
    right: Tensor
    num_cut: int


def fill_texts(
    task: Task,
    caption: str,
    *,
    tokenizer: Tokenizer,
    layout: SequenceLayout,
    vocabulary: Vocabulary,
    beside: str = "",
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
) -> Texts:
    """The left and right text of one example; an absent right text is all padding.

    ``beside`` stands in the text where the caption does not: the question, or nothing.
    """
    left, right = (caption, beside) if task.caption_is_left else (beside, caption)
    left_segment = tokenizer.encode_segment(
        left,
        layout.left_text_length,
        task_token=vocabulary.task_token(task.left_token),
        dropout=dropout,
        generator=generator,
        keeps_end=task.has_question,
    )
    if task.right_token is None:
        empty = torch.zeros(layout.right_text_length, dtype=torch.long)
        return Texts(left_segment.ids, empty, left_segment.num_cut)
    right_segment = tokenizer.encode_segment(
        right,
        layout.right_text_length,
        task_token=vocabulary.task_token(task.right_token),
        dropout=dropout,
        generator=generator,
    )
    return Texts(left_segment.ids, right_segment.ids, left_segment.num_cut + right_segment.num_cut)


_TO_IMAGE = Task(
    left="caption",
    image="drawn",
    right=None,
    left_token="<LT_T2I>",
    right_token=None,
    weights=(1.0, 7.0, 0.0),
    answer="an image",
    metric="objects right",
    chance="images of other captions",
)
_CAPTIONING = Task(
    left="",
    image="given",
    right="caption",
    left_token="<LT_I2T>",
    right_token="<RT_I2T>",
    weights=(0.0, 0.0, 1.0),
    answer="a text",
    metric="exact",
)


def _question(image: str, name: str, *, metric: str) -> Task:
    """A question on the left, its answer on the right."""
    return Task(
        left="question",
        image=image,
        right="caption",
        left_token=f"<LT_{name}>",
        right_token=f"<RT_{name}>",
        weights=(0.0, 0.0, 1.0),
        answer="a text",
        metric=metric,
    )


TASKS = {
    "text_to_image": _TO_IMAGE,
    "image_captioning": _CAPTIONING,
    "question_answering": _question("given", "VQA", metric="exact"),
    "text_question_answering": _question("none", "TQA", metric="token F1"),
    "math_question_answering": _question("none", "MQA", metric="exact"),
    "text_recognition": replace(
        _CAPTIONING, left_token="<LT_REC>", right_token="<RT_REC>", metric="1-NED"
    ),
    "text_to_text": Task(
        left="caption",
        image="none",
        right=None,
        left_token="<LT_T2T>",
        right_token=None,
        weights=(1.0, 0.0, 0.0),
        answer="the left text continued",
        metric="a sentence of the world",
        chance="words in any order",
    ),
    "image_variation": replace(
        _TO_IMAGE, answer="an image after its own caption", filled_as="text_to_image"
    ),
    "inpainting": replace(
        _TO_IMAGE, answer="an image of which a part is given", filled_as="text_to_image"
    ),
    "zero_shot_classification": replace(
        _CAPTIONING,
        answer="the likeliest of all classes",
        metric="accuracy",
        chance="one of all classes",
        filled_as="image_captioning",
    ),
    "text_ranking": replace(
        _CAPTIONING,
        answer="the likeliest of some captions",
        metric="accuracy",
        chance="one of the captions",
        filled_as="image_captioning",
    ),
    "image_ranking": replace(
        _CAPTIONING,
        answer="the image of some that makes the caption likeliest",
        metric="accuracy",
        chance="one of the images",
        filled_as="image_captioning",
    ),
    "self_reranking": replace(
        _TO_IMAGE,
        answer="of some images of its own the one that makes the caption likeliest",
        chance="any of the images",
        filled_as="text_to_image",
    ),
}
