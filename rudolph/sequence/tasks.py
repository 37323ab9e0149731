"""Tasks of the decoder and how an example of each fills the sequence layout.

A task defines the content of the left text, image and right text, the task tokens and the loss
weight of each segment.  It also defines what an answer is, its metric and its chance level.
Training and inference read the same row, so both build the same prompt.

Some tasks are never trained themselves: they query the decoder of another task in a new way.
Their ``filled_as`` names that other task.

A task without an image fills the image segment with code 0, in training and in inference.  That
segment is then never scored.

To add a task, add a ``Task`` row to ``TASKS``.

Source: task tokens, loss weights and zeros for a missing image follow ru-dolph
(``rudolph/api.py``) and fbc2_aij2022 (``train/dataloader.py``).
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from rudolph.sequence.layout import SequenceLayout, Vocabulary
from rudolph.sequence.tokenizer import Tokenizer

# The code at every image position if the task has no image.
MISSING_IMAGE_CODE = 0
UNKNOWN_LEFT, UNKNOWN_RIGHT = "<LT_UNK>", "<RT_UNK>"


@dataclass(frozen=True)
class Task:
    """One row of the task table.

    Attributes:
        left: content of the left text: ``caption``, ``question`` or ``""`` for no words.
        image: ``drawn`` if the model generates it, ``given`` if it is part of the prompt, ``none``
            if there is no image.
        right: content of the right text, like ``left``; None if the task has no right text.  The
            right text of a question task is ``caption``, which holds the answer.
        left_token: task token of the left text.
        right_token: task token of the right text, or None.
        weights: loss weights of left text, image and right text.
        answer: description of the output.
        metric: name of the metric that scores an answer.
        chance: description of the baseline that ignores the prompt.
        filled_as: the trained task that this one reuses, or None if it is trained itself.
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
        """Return whether the caption is the left text."""
        return self.left == "caption"

    @property
    def has_question(self) -> bool:
        """Return whether the left text is a question."""
        return self.left == "question"


class Texts(NamedTuple):
    """The token ids of both texts of an example.

    Attributes:
        left: ``(L,)`` int64.
        right: ``(R,)`` int64.
        num_cut: number of BPE ids that were cut because they did not fit.
    """

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
    other_text: str = "",
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
) -> Texts:
    """Encode the left and right text of one example; an absent right text is all padding.

    Args:
        task: the row that decides where the caption goes.
        caption: caption or answer text.
        tokenizer: encoder of both texts.
        layout: lengths of both texts.
        vocabulary: source of the task-token ids.
        other_text: text of the segment that does not hold the caption: the question or ``""``.
        dropout: BPE-dropout probability.
        generator: source of the dropout samples; required if ``dropout`` is not 0.

    Raises:
        ValueError: if a segment is too short for its special tokens.
    """
    left, right = (caption, other_text) if task.caption_is_left else (other_text, caption)
    left_segment = tokenizer.encode_segment(
        left,
        layout.left_text_length,
        task_token=vocabulary.task_token(task.left_token),
        dropout=dropout,
        generator=generator,
        truncate_left=task.has_question,
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
    """Return a task with a question on the left and its answer on the right."""
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
