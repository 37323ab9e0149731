"""Documents of interleaved images and texts, as ids with labels.

A document repeats ``[image] question answer EOS``: once for every shot, then for the pair itself.
A *shot* is a preceding example with its answer.  The task decides which parts occur: captioning
has no question, and text tasks have no image.  Ids and labels are built segment by segment
(``sequence.conversation``).

Shapes: B documents, T positions, M images per document, S x S pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rudolph.data.mixture import Mixture
from rudolph.data.pairs import HasShots, Shot
from rudolph.data.seeds import uniform_per_example
from rudolph.data.splits import MixtureEntry, Split
from rudolph.sequence.conversation import (
    IGNORE,
    ConversationTokenizer,
    Example,
    ImagePart,
    Template,
    Turn,
    build_example,
    pad_examples,
)
from rudolph.sequence.layout import BOS, EOS, PAD
from rudolph.sequence.tasks import TASKS
from rudolph.sequence.tokenizer import Tokenizer


@dataclass(frozen=True)
class DocumentFormat:
    """How a model reads documents.

    Attributes:
        image_token_id: Id of every image token.
        num_image_tokens: Image tokens per image.
        max_length: Maximum number of positions.
        question_first: Whether a question comes before its image.
    """

    image_token_id: int
    num_image_tokens: int
    max_length: int
    question_first: bool = False

    def tokenizer(self, tokenizer: Tokenizer) -> ConversationTokenizer:
        """Return the settings with which ``sequence.conversation`` builds documents."""
        return ConversationTokenizer(
            tokenizer.encode, self.image_token_id, BOS, EOS, PAD, self.max_length
        )


class Panel(NamedTuple):
    """One image of a document with its texts.

    Attributes:
        image: ``(3, H, W)`` in [0, 1]; None if there is no image.
        question: Text before the answer; "" if there is no question.
        answer: Text to learn; None if the model is to generate it.
    """

    image: Tensor | None
    question: str
    answer: str | None


class DocumentBatch(NamedTuple):
    """A batch of documents.

    Attributes:
        input_ids: ``(B, T)``.
        attention_mask: ``(B, T)``, 1 at tokens and 0 at padding.
        labels: ``(B, T)``, not shifted; ``IGNORE`` at positions that are not scored.
        images: ``(B, M, 3, S, S)`` in [0, 1]; None if no document has one.
        present: ``(B, M)`` bool, true at images and false at the padding of shorter documents.
        sources: ``(B,)``, indices of mixture entries.
        examples: ``(B,)``, indices of pairs.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    images: Tensor | None
    present: Tensor | None
    sources: Tensor
    examples: Tensor

    def to(self, device: torch.device) -> "DocumentBatch":
        """Return the batch on a device."""
        moved: Any = [None if part is None else part.to(device) for part in self]
        return DocumentBatch(*moved)


def prompt_panels(
    task: str, number: int, *, images: Tensor | None, questions: Sequence[str] | None
) -> list[list[Panel]]:
    """Return the prompt of each document of a task: one panel without an answer.

    Args:
        task: A name in ``TASKS``.
        number: Number of documents.
        images: ``(B, 3, H, W)`` in [0, 1] if the task has images.
        questions: One per document if the task has questions.

    Raises:
        ValueError: If images or questions are missing or superfluous.
    """
    row = TASKS[task]
    for name, given, is_needed in (
        ("images", images, row.image == "given"),
        ("questions", questions, row.has_question),
    ):
        if (given is not None) != is_needed:
            expected, got = (name, "none") if is_needed else (f"no {name}", "some")
            raise ValueError(f"{task}: expected {expected}, got {got}")
    return [
        [
            Panel(
                None if images is None else images[index],
                "" if questions is None else questions[index],
                None,
            )
        ]
        for index in range(number)
    ]


def document_of(
    panels: Sequence[Panel], form: DocumentFormat, tokenizer: ConversationTokenizer
) -> Example:
    """Return the ids and labels of a document, which is a prompt if the last answer is None.

    Raises:
        ValueError: If the document does not fit into ``tokenizer.max_length``.
    """
    turns = []
    for panel in panels:
        parts: list[str | ImagePart] = []
        if panel.image is not None:
            parts.append(ImagePart(form.num_image_tokens))
        if panel.question:
            parts.insert(0 if form.question_first else len(parts), panel.question)
        turns.append(Turn(False, tuple(parts)))
        if panel.answer is not None:
            turns.append(Turn(True, (panel.answer,)))
    example = build_example(turns, tokenizer, Template())
    if example.num_turns < len(turns):
        raise ValueError(
            f"model.max_length: expected room for {len(panels)} images with their texts, "
            f"got {tokenizer.max_length} positions"
        )
    return example


def batch_documents(
    documents: Sequence[Sequence[Panel]], form: DocumentFormat, tokenizer: Any, *, side: str
) -> DocumentBatch:
    """Return documents as one batch.

    ``side`` is the side of the padding: ``right`` for training, ``left`` for generation.  All
    images of the batch must have the same size.
    """
    conversation = form.tokenizer(tokenizer)
    examples = [document_of(panels, form, conversation) for panels in documents]
    padded = pad_examples(examples, conversation, side=side)
    images = [[panel.image for panel in panels if panel.image is not None] for panels in documents]
    most, size = max(map(len, images)), len(documents)
    stacked = present = None
    if most:
        shape = next(row[0] for row in images if row).shape
        stacked, present = torch.zeros(size, most, *shape), torch.zeros(size, most).bool()
        for index, row in enumerate(images):
            if row:
                stacked[index, : len(row)], present[index, : len(row)] = torch.stack(row), True
    zeros = torch.zeros(size, dtype=torch.long)
    mask = padded.attention_mask
    return DocumentBatch(padded.input_ids, mask, padded.labels, stacked, present, zeros, zeros)


def document_panels(
    split: Split, task: str, index: int, *, shots: Sequence[Shot] = ()
) -> list[Panel]:
    """Return the panels of a document: those of the shots, then that of the pair itself.

    Raises:
        ValueError: If the task generates images, or needs images or questions that the pairs lack.
    """
    row = TASKS[task]
    if row.image == "drawn":
        raise ValueError(f"data.tasks: {task} generates images, which a language model cannot")
    has_image = row.image == "given"
    if has_image and not split.has_images:
        raise ValueError(f"data.tasks: {task} needs images, which {split.dataset_name} lacks")
    panels = []
    for shown, caption in [*shots, Shot(index, split.captions[index])]:
        question = split.questions[shown] if row.has_question else ""
        if row.has_question and not question:
            raise ValueError(f"data.tasks: {task} needs questions; {split.dataset_name} has none")
        image = split.image_batch([shown])[0] if has_image else None
        panels.append(Panel(image, question, caption))
    return panels


def training_shots(split: Split, index: int) -> list[Shot]:
    """Return all shots of a pair's training episode, or none if the dataset has no episodes."""
    if not isinstance(split.dataset, HasShots):
        return []
    return split.dataset.shots(index, split.dataset.max_shots)


class DocumentExamples:
    """Training documents sampled from the mixture; see ``families.interface.Examples``.

    Args:
        entries: Mixture entries with the split of their dataset.
        tokenizer: Text tokenizer.
        document_format: How the model reads documents.
        seed: Seed of the mixture and of the order of the pairs.
        scores_questions: Whether the labels include the questions in addition to the answers.
    """

    def __init__(
        self,
        entries: Sequence[tuple[MixtureEntry, Split]],
        tokenizer: Tokenizer,
        document_format: DocumentFormat,
        *,
        seed: int,
        scores_questions: bool,
    ) -> None:
        self.entries, self.seed, self.scores_questions = list(entries), seed, scores_questions
        self.format, self.tokenizer = document_format, tokenizer
        sizes = [len(split) for _, split in entries]
        self.mixture = Mixture([entry.weight for entry, _ in entries], sizes, seed=seed)
        self.num_whole = sum(sizes)

    def note(self) -> str:
        """Return one line with the numbers of pairs."""
        return ", ".join(f"{len(split)} pairs of {entry.name}" for entry, split in self.entries)

    def batch(self, numbers: Sequence[int]) -> DocumentBatch:
        """Return the training batch of these example numbers."""
        rows = self.mixture.rows(uniform_per_example(numbers, self.seed, 1)[:, 0])
        return self._batch(self.mixture.pairs(numbers, rows), rows)

    def whole(self, indices: Sequence[int]) -> DocumentBatch:
        """Return validation documents; ``indices`` are rows of ``mixture.validation_entries``."""
        return self._batch(*self.mixture.validation_entries[np.asarray(indices)].T)

    def _batch(self, pairs: np.ndarray[Any, Any], rows: np.ndarray[Any, Any]) -> DocumentBatch:
        documents = []
        for pair, row in zip(pairs.tolist(), rows, strict=True):
            entry, split = self.entries[row]
            shots = training_shots(split, pair)
            documents.append(document_panels(split, entry.task, pair, shots=shots))
        batch = batch_documents(documents, self.format, self.tokenizer, side="right")
        labels = batch.labels
        if self.scores_questions:
            is_scored = batch.attention_mask.bool()
            is_scored &= batch.input_ids != self.format.image_token_id
            labels = torch.where(is_scored, batch.input_ids, IGNORE)
        sources, examples = torch.from_numpy(rows.copy()), torch.from_numpy(pairs.copy())
        return batch._replace(labels=labels, sources=sources, examples=examples)
