"""How an example fills the layout, and which of its segments are scored.

A task says what stands in the left text, whether there is an image, and what stands in the right
text.  The same function serves training and answering, so that both see the same prompt.

To add a task, write a ``Task`` row in ``TASKS``.

Source: ru-dolph, ``rudolph/api.py``, and fbc2_aij2022 (special tokens of each task).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rudolph.sequence.layout import SequenceLayout, Vocabulary
from rudolph.sequence.tokenizer import Tokenizer


@dataclass(frozen=True)
class Task:
    """Where the caption of a pair stands, the task tokens, and the segments that are scored.

    ``has_question`` says that the other text is the pair's question, and the caption its answer.
    """

    caption_is_left: bool
    left_token: str
    right_token: str | None
    scored_segments: tuple[str, ...]
    has_question: bool = False


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

    ``beside`` stands in the text where the caption does not.
    """
    left, right = (caption, beside) if task.caption_is_left else (beside, caption)
    left_segment = tokenizer.encode_segment(
        left,
        layout.left_text_length,
        task_token=vocabulary.task_token(task.left_token),
        dropout=dropout,
        generator=generator,
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


TASKS = {
    "text_to_image": Task(
        caption_is_left=True,
        left_token="<LT_T2I>",
        right_token=None,
        scored_segments=("left_text", "image"),
    ),
    "image_captioning": Task(
        caption_is_left=False,
        left_token="<LT_I2T>",
        right_token="<RT_I2T>",
        scored_segments=("right_text",),
    ),
    "question_answering": Task(
        caption_is_left=False,
        left_token="<LT_VQA>",
        right_token="<RT_VQA>",
        scored_segments=("right_text",),
        has_question=True,
    ),
}
