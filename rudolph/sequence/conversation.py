"""Conversations about images as token ids and labels.

A conversation is a list of turns, and a turn is a list of parts: texts, and images with a known
number of tokens.  Ids and labels are built together, segment by segment, so they stay aligned.
LLaVA instead tokenises the whole conversation, searches it for role words, and masks the sample if
the lengths disagree.

Each segment is tokenised once, without a space before it, because SentencePiece and YouTokenToMe
mark word starts themselves.  Text is never searched for roles, images or end tokens.

To add a template, name it in ``CONVERSATION_TEMPLATES``.

Source: LLaVA, ``llava/train/train.py`` and ``llava/conversation.py``.

Shapes: B rows, T positions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# Label at positions outside answers; ``cross_entropy`` ignores it.
IGNORE = -100


class ImagePart(NamedTuple):
    """An image with its number of tokens; see ``LLaVA.num_image_tokens``."""

    num_tokens: int


class Turn(NamedTuple):
    """A question of the user, or an answer of the assistant, which has no images."""

    is_answer: bool
    parts: tuple[str | ImagePart, ...]


@dataclass(frozen=True)
class Template:
    """The text around turns.

    Attributes:
        system: Text at the start of a conversation.
        user: Text before a question.
        assistant: Text before an answer.
        keeps_questions: Whether the text of questions is kept.  LLaVA's first stage keeps only
            their images.
        ends_with: Text learnt after each answer, before the end token.
        has_end_sign: Whether each answer is followed by the end token.
    """

    system: str = ""
    user: str = ""
    assistant: str = ""
    keeps_questions: bool = True
    ends_with: str = ""
    has_end_sign: bool = True


@dataclass(frozen=True)
class ConversationTokenizer:
    """Tokenizer settings of conversations.

    Attributes:
        encode: Encodes a text without start and end tokens.
        image_token_id: Id of every token of an image.
        start_id: Id at the start of a row; None for no such id.
        end_id: Id after an answer.
        pad_id: Id of padding; the mask, not this id, marks padding.
        max_length: Maximum number of ids per row.
    """

    encode: Callable[[str], list[int]]
    image_token_id: int
    start_id: int | None
    end_id: int
    pad_id: int
    max_length: int


class Example(NamedTuple):
    """One row of a batch.

    Attributes:
        ids: Token ids.
        labels: Ids of answers and ``IGNORE`` elsewhere, as long as ``ids`` and not shifted.
        num_images: Images in the row.
        num_turns: Turns that fit into the row.
    """

    ids: list[int]
    labels: list[int]
    num_images: int
    num_turns: int


def build_example(
    turns: Sequence[Turn], tokenizer: ConversationTokenizer, template: Template
) -> Example:
    """Return the ids and labels of a conversation, which is a prompt if it ends with a question.

    If it is too long, whole question-answer pairs are dropped at its end (see ``num_turns``).
    Images and answers are never cut.

    Raises:
        ValueError: If the roles do not alternate starting with the user, an answer has an image,
            or not even the first pair fits.
    """
    for index, turn in enumerate(turns):
        role = "assistant" if index % 2 else "user"
        if turn.is_answer != (role == "assistant"):
            raise ValueError(f"turns: expected the {role} at turn {index}, got the other role")
        if turn.is_answer and any(isinstance(part, ImagePart) for part in turn.parts):
            raise ValueError(f"turns: expected texts alone in answer {index}, got an image")
    if not turns:
        raise ValueError("turns: expected at least one turn, got none")
    ids = [] if tokenizer.start_id is None else [tokenizer.start_id]
    ids += text_ids(template.system, tokenizer)
    labels = [IGNORE] * len(ids)
    num_images = num_turns = 0
    for first in range(0, len(turns), 2):
        round_turns = turns[first : first + 2]
        new_ids, new_labels = round_ids(round_turns, tokenizer, template)
        if len(ids) + len(new_ids) > tokenizer.max_length:
            break
        ids, labels = ids + new_ids, labels + new_labels
        num_turns += len(round_turns)
        num_images += sum(isinstance(part, ImagePart) for part in round_turns[0].parts)
    if not num_turns:
        raise ValueError(
            f"turns: expected a first round of at most {tokenizer.max_length} tokens, "
            f"got {len(ids) + len(new_ids)}"
        )
    return Example(ids, labels, num_images, num_turns)


def round_ids(
    turns: Sequence[Turn], tokenizer: ConversationTokenizer, template: Template
) -> tuple[list[int], list[int]]:
    """Return the ids and labels of a question and of its answer, if it has an answer."""
    ids = text_ids(template.user, tokenizer)
    for part in turns[0].parts:
        if isinstance(part, ImagePart):
            ids += [tokenizer.image_token_id] * part.num_tokens
        elif template.keeps_questions:
            ids += text_ids(part, tokenizer)
    ids += text_ids(template.assistant, tokenizer)
    labels = [IGNORE] * len(ids)
    if len(turns) == 2:
        # ``build_example`` has checked that an answer has texts only.
        texts = [part for part in turns[1].parts if isinstance(part, str)]
        answer = [token for text in texts for token in text_ids(text, tokenizer)]
        answer += text_ids(template.ends_with, tokenizer)
        answer += [tokenizer.end_id] * template.has_end_sign
        ids, labels = ids + answer, labels + answer
    return ids, labels


def text_ids(text: str, tokenizer: ConversationTokenizer) -> list[int]:
    """Return the ids of a text.

    Raises:
        ValueError: If the text encodes to the id of an image.
    """
    ids = tokenizer.encode(text) if text else []
    if tokenizer.image_token_id in ids:
        raise ValueError(
            f"text: expected no image token ({tokenizer.image_token_id}), got one in {text[:40]!r}"
        )
    return ids


class ConversationBatch(NamedTuple):
    """``input_ids``, ``attention_mask`` (1 at tokens) and ``labels``, ``(B, T)`` int64 each."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


def pad_examples(
    examples: Sequence[Example], tokenizer: ConversationTokenizer, *, side: str
) -> ConversationBatch:
    """Return a batch padded on one side: ``right`` for training, ``left`` for generation.

    Raises:
        ValueError: If ``side`` is neither.
    """
    if side not in ("left", "right"):
        raise ValueError(f"side: expected left or right, got {side!r}")
    longest = max(len(example.ids) for example in examples)

    def filled(values: list[int], fill: int) -> list[int]:
        padding = [fill] * (longest - len(values))
        return padding + values if side == "left" else values + padding

    return ConversationBatch(
        torch.tensor([filled(example.ids, tokenizer.pad_id) for example in examples]),
        torch.tensor([filled([1] * len(example.ids), 0) for example in examples]),
        torch.tensor([filled(example.labels, IGNORE) for example in examples]),
    )


CONVERSATION_TEMPLATES: dict[str, Template] = {
    # LLaVA's first stage has captions without a question.
    "plain": Template(keeps_questions=False, ends_with="\n", has_end_sign=False),
    # LLaVA's second stage uses the template of Vicuna 1.5.
    "vicuna": Template(
        system="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
        user="USER:",
        assistant="ASSISTANT:",
    ),
}
