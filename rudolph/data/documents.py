"""Documents of interleaved images and texts, as ids with labels.

A document of pairs repeats ``[image] question answer EOS``: once for every shot, then for the pair
itself.  A *shot* is a preceding example with its answer.  A document of a file has the images,
questions and answers of the file in their order, with ``EOS`` after each answer.

The task decides which parts occur: captioning has no question, and text tasks have no image.  Ids
and labels are built segment by segment (``sequence.conversation``).

Shapes: B documents, T positions, M images per document, S x S pixels.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from rudolph.data.cache import cached_array
from rudolph.data.mixture import Mixture
from rudolph.data.pairs import HasShots, Shot
from rudolph.data.seeds import uniform_per_example
from rudolph.data.splits import DocumentPiece, DocumentSplit, MixtureEntry, Split
from rudolph.sequence.conversation import (
    IGNORE,
    ConversationTokenizer,
    Example,
    ImagePart,
    Template,
    Turn,
    build_example,
    pad_examples,
    round_ids,
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
        answer: Text to learn; None if the model is to generate it, or if the next panel continues
            the question.
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


def require_prompt(task: str, *, images: Tensor | None, questions: Sequence[str] | None) -> None:
    """Check that images and questions are given exactly if a task has them.

    Raises:
        ValueError: If one of them is missing or superfluous.
    """
    row = TASKS[task]
    for name, given, is_needed in (
        ("images", images, row.image == "given"),
        ("questions", questions, row.has_question),
    ):
        if (given is not None) != is_needed:
            expected, got = (name, "none") if is_needed else (f"no {name}", "some")
            raise ValueError(f"{task}: expected {expected}, got {got}")


def prompt_panels(
    task: str,
    shots: Sequence[Sequence[Panel]],
    *,
    images: Tensor | None,
    questions: Sequence[str] | None,
) -> list[list[Panel]]:
    """Return the prompt of each document of a task: its shots and one panel without an answer.

    Args:
        task: A name in ``TASKS``.
        shots: The answered panels of each document, an empty list for none.
        images: ``(B, 3, H, W)`` in [0, 1] if the task has images.
        questions: One per document if the task has questions.

    Raises:
        ValueError: If images or questions are missing or superfluous.
    """
    require_prompt(task, images=images, questions=questions)
    return [
        [
            *shown,
            Panel(
                None if images is None else images[index],
                "" if questions is None else questions[index],
                None,
            ),
        ]
        for index, shown in enumerate(shots)
    ]


def document_turns(panels: Sequence[Panel], form: DocumentFormat) -> list[Turn]:
    """Return the turns of a document; a question has all panels up to the next answer."""
    turns: list[Turn] = []
    parts: list[str | ImagePart] = []
    for panel in panels:
        image = [] if panel.image is None else [ImagePart(form.num_image_tokens)]
        question = [panel.question] if panel.question else []
        parts += [*question, *image] if form.question_first else [*image, *question]
        if panel.answer is not None:
            turns += [Turn(False, tuple(parts)), Turn(True, (panel.answer,))]
            parts = []
    if panels and panels[-1].answer is None:
        turns.append(Turn(False, tuple(parts)))
    return turns


def document_of(
    panels: Sequence[Panel], form: DocumentFormat, tokenizer: ConversationTokenizer
) -> Example:
    """Return the ids and labels of a document, which is a prompt if the last answer is None.

    Raises:
        ValueError: If the document does not fit into ``tokenizer.max_length``.
    """
    turns = document_turns(panels, form)
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


def longest_document(split: Split, task: str, form: DocumentFormat, tokenizer: Any) -> int:
    """Return the number of positions that the longest training document of a task can have.

    Every panel of an episode counts as long as the longest one.
    """
    row = TASKS[task]
    questions = split.questions if row.has_question else [""] * len(split)
    texts = set(zip(questions, split.captions, strict=True))
    panel = max(len(tokenizer.encode(text)) + len(tokenizer.encode(end)) for text, end in texts)
    panel += 1 + (form.num_image_tokens if row.image == "given" else 0)
    num_shots = split.dataset.max_shots if isinstance(split.dataset, HasShots) else 0
    return 1 + (num_shots + 1) * panel


def training_shots(split: Split, index: int) -> list[Shot]:
    """Return all shots of a pair's training episode, or none if the dataset has no episodes."""
    if not isinstance(split.dataset, HasShots):
        return []
    return split.dataset.shots(index, split.dataset.max_shots)


class EntryDocuments(Protocol):
    """The training documents of a mixture entry."""

    def __len__(self) -> int:
        """Return the number of documents."""
        ...

    def note(self) -> str:
        """Return their number in words."""
        ...

    def index(self, number: int) -> int:
        """Return the index of a document among the pairs or documents of its split."""
        ...

    def panels(self, number: int) -> list[Panel]:
        """Return the panels of a document."""
        ...


class PairDocuments:
    """One document per pair of a split, with its shots."""

    def __init__(self, entry: MixtureEntry, split: Split) -> None:
        self.entry, self.split = entry, split

    def __len__(self) -> int:
        """Return the number of documents."""
        return len(self.split)

    def note(self) -> str:
        """Return their number in words."""
        return f"{len(self.split)} pairs of {self.entry.name}"

    def index(self, number: int) -> int:
        """Return the index of a pair."""
        return number

    def panels(self, number: int) -> list[Panel]:
        """Return the panels of a document."""
        shots = training_shots(self.split, number)
        return document_panels(self.split, self.entry.task, number, shots=shots)


class FileDocuments:
    """The documents of a split of files, each cut after the last answer that fits.

    Args:
        entry: Its mixture entry.
        split: The split.
        document_format: How the model reads documents.
        tokenizer: Text tokenizer.

    Raises:
        ValueError: If no document fits.
    """

    def __init__(
        self,
        entry: MixtureEntry,
        split: DocumentSplit,
        document_format: DocumentFormat,
        tokenizer: Tokenizer,
    ) -> None:
        self.entry, self.split = entry, split
        lengths = fitting_pieces(split, entry.task, document_format, tokenizer)
        self.fitting, self.num_pieces = lengths[:, 0], lengths[:, 1]
        # Documents of which at least the first answer fits.
        self.usable = np.flatnonzero(self.fitting)
        if not len(self.usable):
            raise ValueError(
                f"model.max_length: expected room for the first answer of a document of "
                f"{entry.name}, got {document_format.max_length} positions"
            )

    def __len__(self) -> int:
        """Return the number of documents."""
        return len(self.usable)

    def note(self) -> str:
        """Return their number in words, with those that are cut or left out."""
        num_cut = int((self.fitting < self.num_pieces)[self.usable].sum())
        num_left_out = len(self.split) - len(self.usable)
        return (
            f"{len(self.usable)} documents of {self.entry.name} ({num_cut} cut after an answer, "
            f"{num_left_out} left out as too long)"
        )

    def index(self, number: int) -> int:
        """Return the index of a document in its split."""
        return int(self.usable[number])

    def panels(self, number: int) -> list[Panel]:
        """Return the panels of a document, one per image or text."""
        index = self.index(number)
        pieces = task_pieces(self.split, self.entry.task, index)[: self.fitting[index]]
        rows = [piece.image for piece in pieces if piece.kind == "image"]
        images = iter(self.split.image_batch(rows) if rows else ())
        return [piece_panel(piece, images) for piece in pieces]


def task_pieces(split: DocumentSplit, task: str, index: int) -> list[DocumentPiece]:
    """Return the images and texts of a document that a task has.

    Raises:
        ValueError: If the task generates images.
    """
    row = TASKS[task]
    if row.image == "drawn":
        raise ValueError(f"data.tasks: {task} generates images, which a language model cannot")
    kinds = {"answer"}
    kinds |= {"image"} if row.image == "given" else set()
    kinds |= {"question"} if row.has_question else set()
    return [piece for piece in split.pieces(index) if piece.kind in kinds]


def piece_panel(piece: DocumentPiece, images: Iterator[Tensor]) -> Panel:
    """Return the panel of an image, which is the next of ``images``, or of a text."""
    if piece.kind == "image":
        return Panel(next(images), "", None)
    if piece.kind == "question":
        return Panel(None, piece.text, None)
    return Panel(None, "", piece.text)


def fitting_pieces(
    split: DocumentSplit, task: str, form: DocumentFormat, tokenizer: Tokenizer
) -> np.ndarray[Any, Any]:
    """Return how many pieces of each document fit, and how many there are, ``(N, 2)`` int64.

    The last piece that fits is an answer; 0 fit if the first answer does not.  The numbers are
    cached on disk.
    """
    conversation = form.tokenizer(tokenizer)
    no_pixels = torch.empty(0)

    def numbers(index: int) -> tuple[int, int]:
        pieces = task_pieces(split, task, index)
        panels = [piece_panel(piece, repeat(no_pixels)) for piece in pieces]
        return fitting_panels(panels, form, conversation), len(pieces)

    def compute() -> np.ndarray[Any, Any]:
        return np.array([numbers(index) for index in range(len(split))])

    parts = {"kind": "pieces of documents that fit", "task": task, "format": repr(form)}
    parts |= {"data": split.digest, "tokenizer": tokenizer.digest}
    return cached_array(split.cache, parts=parts, compute=compute)


def fitting_panels(
    panels: Sequence[Panel], form: DocumentFormat, tokenizer: ConversationTokenizer
) -> int:
    """Return how many panels fit, up to a whole answer; 0 if the first answer does not."""
    length, fitting = int(tokenizer.start_id is not None), 0
    for number, panel in enumerate(panels, start=1):
        if panel.answer is None:
            continue
        turns = document_turns(panels[fitting:number], form)
        length += len(round_ids(turns, tokenizer, Template())[0])
        if length > tokenizer.max_length:
            break
        fitting = number
    return fitting


class DocumentExamples:
    """Training documents sampled from the mixture; see ``families.interface.Examples``.

    Args:
        entries: Mixture entries with the split of their dataset.
        tokenizer: Text tokenizer.
        document_format: How the model reads documents.
        seed: Seed of the mixture and of the order of the pairs.
        scores_questions: Whether the labels include the questions in addition to the answers.

    Raises:
        ValueError: If a document of pairs can be longer than ``document_format.max_length``.
    """

    def __init__(
        self,
        entries: Sequence[tuple[MixtureEntry, Split | DocumentSplit]],
        tokenizer: Tokenizer,
        document_format: DocumentFormat,
        *,
        seed: int,
        scores_questions: bool,
    ) -> None:
        self.entries, self.seed, self.scores_questions = list(entries), seed, scores_questions
        self.format, self.tokenizer = document_format, tokenizer
        self.documents: list[EntryDocuments] = [
            PairDocuments(entry, split)
            if isinstance(split, Split)
            else FileDocuments(entry, split, document_format, tokenizer)
            for entry, split in entries
        ]
        sizes = [len(documents) for documents in self.documents]
        self.mixture = Mixture([entry.weight for entry, _ in entries], sizes, seed=seed)
        self.num_whole = sum(sizes)
        self._check_lengths()

    def _check_lengths(self) -> None:
        """Raise ``ValueError`` for pairs whose documents are too long, before a loader meets them.

        Documents of files are cut instead.
        """
        for entry, split in self.entries:
            if not isinstance(split, Split):
                continue
            length = longest_document(split, entry.task, self.format, self.tokenizer)
            if length > self.format.max_length:
                raise ValueError(
                    f"model.max_length: expected at least {length}, the longest documents of "
                    f"{entry.name} in {split.name}, got {self.format.max_length}"
                )

    def note(self) -> str:
        """Return one line with the numbers of pairs and documents."""
        return ", ".join(documents.note() for documents in self.documents)

    def batch(self, numbers: Sequence[int]) -> DocumentBatch:
        """Return the training batch of these example numbers."""
        rows = self.mixture.rows(uniform_per_example(numbers, self.seed, 1)[:, 0])
        return self._batch(self.mixture.pairs(numbers, rows), rows)

    def whole(self, indices: Sequence[int]) -> DocumentBatch:
        """Return validation documents; ``indices`` are rows of ``mixture.validation_entries``."""
        return self._batch(*self.mixture.validation_entries[np.asarray(indices)].T)

    def _batch(self, pairs: np.ndarray[Any, Any], rows: np.ndarray[Any, Any]) -> DocumentBatch:
        chosen = [
            (self.documents[row], pair) for pair, row in zip(pairs.tolist(), rows, strict=True)
        ]
        panels = [documents.panels(number) for documents, number in chosen]
        batch = batch_documents(panels, self.format, self.tokenizer, side="right")
        labels = batch.labels
        if self.scores_questions:
            is_scored = batch.attention_mask.bool()
            is_scored &= batch.input_ids != self.format.image_token_id
            labels = torch.where(is_scored, batch.input_ids, IGNORE)
        sources = torch.from_numpy(rows.copy())
        examples = torch.tensor([documents.index(number) for documents, number in chosen])
        return batch._replace(labels=labels, sources=sources, examples=examples)
