"""Conversations about images as token ids and labels.

A conversation is a list of turns, and a turn a list of parts: texts, and images that stand for a
known number of tokens.  Ids and labels grow side by side, segment by segment, so a label can never
slip against its id.  LLaVA tokenises a whole conversation, searches it for its role words, and
masks the sample when the lengths disagree.

Each segment is tokenised once, without a space before it: the tokenizer marks where a word starts,
as SentencePiece and YouTokenToMe do.  Text is never searched for roles, images or end signs.

To add a template, name it in ``CONVERSATION_TEMPLATES``.

Source: LLaVA, ``llava/train/train.py`` and ``llava/conversation.py``.

Shapes: B rows, T positions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# Positions of no answer: ``cross_entropy`` ignores them.
IGNORE = -100


class ImagePart(NamedTuple):
    """An image of so many tokens; see ``LLaVA.num_image_tokens``."""

    num_tokens: int


class Turn(NamedTuple):
    """What the user asks or the assistant answers; an answer holds no images."""

    is_answer: bool
    parts: tuple[str | ImagePart, ...]


@dataclass(frozen=True)
class Template:
    """The words around turns.

    ``keeps_questions`` is false in LLaVA's first stage, which keeps a question's images alone.
    ``ends_with`` is text that is learnt after each answer, before the end sign if there is one.
    """

    system: str = ""
    user: str = ""
    assistant: str = ""
    keeps_questions: bool = True
    ends_with: str = ""
    has_end_sign: bool = True


@dataclass(frozen=True)
class ConversationTokenizer:
    """What turns parts into ids.

    Args:
        encode: ids of a text, without start and end signs.
        image_token_id: stands at every token of an image.
        start_id: opens a row; None for no sign.
        end_id: ends an answer.
        pad_id: fills a batch; the mask, not this id, says what is padding.
        max_length: most ids of a row.
    """

    encode: Callable[[str], list[int]]
    image_token_id: int
    start_id: int | None
    end_id: int
    pad_id: int
    max_length: int


class Example(NamedTuple):
    """A row: ``ids`` and ``labels`` of equal length, and what of the conversation it holds.

    ``labels`` are the ids of answers and ``IGNORE`` elsewhere; they are not shifted.
    """

    ids: list[int]
    labels: list[int]
    num_images: int
    num_turns: int


def build_example(
    turns: Sequence[Turn], tokenizer: ConversationTokenizer, template: Template
) -> Example:
    """Return the ids and labels of a conversation; of one that ends with a question, its prompt.

    A conversation that is too long loses whole rounds at its end, which ``num_turns`` tells; an
    image or an answer is never cut.

    Raises:
        ValueError: when the roles do not alternate, starting with the user, when an answer holds
            an image, or when not even the first round fits.
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
    """Return ids and labels of a question and, if there is one, its answer."""
    ids = text_ids(template.user, tokenizer)
    for part in turns[0].parts:
        if isinstance(part, ImagePart):
            ids += [tokenizer.image_token_id] * part.num_tokens
        elif template.keeps_questions:
            ids += text_ids(part, tokenizer)
    ids += text_ids(template.assistant, tokenizer)
    labels = [IGNORE] * len(ids)
    if len(turns) == 2:
        # Checked before: an answer holds texts alone.
        texts = [part for part in turns[1].parts if isinstance(part, str)]
        answer = [token for text in texts for token in text_ids(text, tokenizer)]
        answer += text_ids(template.ends_with, tokenizer)
        answer += [tokenizer.end_id] * template.has_end_sign
        ids, labels = ids + answer, labels + answer
    return ids, labels


def text_ids(text: str, tokenizer: ConversationTokenizer) -> list[int]:
    """Return the ids of a text.

    Raises:
        ValueError: when the text itself gives the id of an image.
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
    """Return a batch, padded at ``side``: ``right`` for training, ``left`` for generation."""
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
    # LLaVA's first stage: captions without a question.
    "plain": Template(keeps_questions=False, ends_with="\n", has_end_sign=False),
    # Vicuna 1.5, LLaVA's second stage.
    "vicuna": Template(
        system="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
        user="USER:",
        assistant="ASSISTANT:",
    ),
}
