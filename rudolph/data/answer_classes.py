"""Examples for a classifier of answers: image, question and the class of the answer.

The task of a mixture entry decides whether an example has an image, a question or both.  Modality
dropout hides one of both in a fraction of the training examples.

Shapes: B examples, N pairs, K classes, L question tokens, S pixels per side.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rudolph.data.mixture import Mixture
from rudolph.data.seeds import uniform_per_example
from rudolph.data.splits import MixtureEntry, Split
from rudolph.data.text_image import encoded_texts
from rudolph.models.vision.clip import CLIPConfig, pixel_values
from rudolph.sequence.conversation import IGNORE
from rudolph.sequence.tasks import TASKS
from rudolph.sequence.tokenizer import Tokenizer, normalize_unicode


class QuestionBatch(NamedTuple):
    """A batch of images and questions with the classes of their answers.

    Attributes:
        pixel_values: ``(B, 3, S, S)``, normalised; zeros for an example without an image.
        input_ids: ``(B, L)``; an empty text for an example without a question.
        present: ``(B, 2)`` bool, whether an example has an image, and a question.
        labels: ``(B,)``; ``IGNORE`` for an answer that is no class.
        examples: ``(B,)``, indices of pairs.
    """

    pixel_values: Tensor
    input_ids: Tensor
    present: Tensor
    labels: Tensor
    examples: Tensor


def modalities_of(task: str, *, key: str) -> tuple[bool, bool]:
    """Return whether the examples of a task have an image, and a question.

    Args:
        task: A name in ``TASKS``.
        key: Setting or argument that names the task, for the message.

    Raises:
        ValueError: If they have neither.
    """
    modalities = (TASKS[task].image == "given", TASKS[task].has_question)
    if not any(modalities):
        raise ValueError(f"{key}: expected a task that reads an image or a question, got {task}")
    return modalities


def frequent_answers(splits: Iterable[Split], number: int) -> tuple[str, ...]:
    """Return the ``number`` most frequent answers of some splits, the most frequent first.

    Answers are normalised as the tokenizer does.  Equally frequent ones are in alphabetical order.

    Raises:
        ValueError: If there are fewer different answers.
    """
    counts: Counter[str] = Counter()
    for split in splits:
        for answer, count in Counter(split.captions).items():
            counts[normalize_unicode(answer)] += count
    if len(counts) < number:
        raise ValueError(
            f"num_answers: expected at most {len(counts)}, the different answers of the "
            f"training data, got {number}"
        )
    ranked = sorted(counts, key=lambda answer: (-counts[answer], answer))
    return tuple(ranked[:number])


class ClassifiedPairs:
    """The pairs of a split for a task, with encoded questions and classes of answers.

    Attributes:
        split: The split.
        has_image: Whether the task has images.
        present: ``(2,)`` bool, see ``QuestionBatch``.
        input_ids: ``(N, L)`` int32.
        labels: ``(N,)`` int64; ``IGNORE`` for an answer that is no class.
        num_cut: Number of questions that are too long and lose their end.

    Raises:
        ValueError: If the pairs lack the images or questions that the task has.
    """

    def __init__(
        self,
        entry: MixtureEntry,
        split: Split,
        answers: Sequence[str],
        tokenizer: Tokenizer,
        length: int,
    ) -> None:
        self.split = split
        key = f"data.tasks.{entry.name}"
        self.has_image, has_question = modalities_of(entry.task, key=key)
        for name, is_needed, is_given in (
            ("images", self.has_image, split.has_images),
            ("questions", has_question, all(split.questions)),
        ):
            if is_needed and not is_given:
                raise ValueError(f"{key}: expected {name}, which {split.dataset_name} lacks")
        self.present = torch.tensor([self.has_image, has_question])
        self.input_ids, self.num_cut = empty_questions(len(split), tokenizer, length), 0
        if has_question:
            self.input_ids, self.num_cut = encoded_texts(
                split, split.questions, tokenizer, length, kind="questions of a classifier"
            )
        classes = {answer: number for number, answer in enumerate(answers)}
        labels = [classes.get(normalize_unicode(answer), IGNORE) for answer in split.captions]
        self.labels = np.array(labels)


def empty_questions(number: int, tokenizer: Tokenizer, length: int) -> np.ndarray[Any, Any]:
    """Return the ids of ``number`` empty texts, ``(number, L)`` int64."""
    return np.tile(tokenizer.encode_segment("", length).ids.numpy(), (number, 1))


class AnswerExamples:
    """Training examples of a classifier of answers; see ``families.interface.Examples``.

    Attributes:
        answers: The answer of each class.

    Args:
        entries: Mixture entries with the split of their dataset.
        answers: The answer of each class.
        tokenizer: Encoder of the questions.
        towers: Shapes of the encoders, for the length of questions and the size of images.
        seed: Seed of the mixture, of the order of the pairs and of the dropout.
        modality_dropout: Fraction of the training examples with both modalities that lose one.
    """

    def __init__(
        self,
        entries: Sequence[tuple[MixtureEntry, Split]],
        answers: Sequence[str],
        tokenizer: Tokenizer,
        towers: CLIPConfig,
        *,
        seed: int,
        modality_dropout: float = 0.0,
    ) -> None:
        self.answers, self.seed, self.modality_dropout = tuple(answers), seed, modality_dropout
        self.image_size, length = towers.image_resolution, towers.context_length
        self.entries = [
            ClassifiedPairs(entry, split, answers, tokenizer, length) for entry, split in entries
        ]
        sizes = [len(split) for _, split in entries]
        self.mixture = Mixture([entry.weight for entry, _ in entries], sizes, seed=seed)
        self.num_whole = sum(sizes)

    def note(self) -> str:
        """Return one line with the numbers of answers that are no class and of cut questions."""
        outside = sum(int((entry.labels == IGNORE).sum()) for entry in self.entries)
        num_cut = sum(entry.num_cut for entry in self.entries)
        return (
            f"{outside} of {self.num_whole} answers are none of {len(self.answers)} classes and "
            f"not scored, {num_cut} questions are too long and cut"
        )

    def batch(self, numbers: Sequence[int]) -> QuestionBatch:
        """Return the training batch of these example numbers, some with a hidden modality."""
        uniform = uniform_per_example(numbers, self.seed, 2)
        rows = self.mixture.rows(uniform[:, 0])
        batch = self._batch(self.mixture.pairs(numbers, rows), rows)
        kept = kept_modalities(torch.from_numpy(uniform[:, 1]), self.modality_dropout)
        has_both = batch.present.all(1, keepdim=True)
        return batch._replace(present=torch.where(has_both, kept, batch.present))

    def whole(self, indices: Sequence[int]) -> QuestionBatch:
        """Return validation examples; ``indices`` are rows of ``mixture.validation_entries``."""
        return self._batch(*self.mixture.validation_entries[np.asarray(indices)].T)

    def _batch(self, pairs: np.ndarray[Any, Any], rows: np.ndarray[Any, Any]) -> QuestionBatch:
        length = self.entries[0].input_ids.shape[1]
        batch = QuestionBatch(
            torch.zeros(len(rows), 3, self.image_size, self.image_size),
            torch.zeros(len(rows), length, dtype=torch.long),
            torch.zeros(len(rows), 2, dtype=torch.bool),
            torch.zeros(len(rows), dtype=torch.long),
            torch.from_numpy(pairs.copy()),
        )
        for row in np.unique(rows):
            entry, chosen = self.entries[row], pairs[rows == row]
            is_own = torch.from_numpy(rows == row)
            if entry.has_image:
                images = entry.split.image_batch(chosen)
                batch.pixel_values[is_own] = pixel_values(images, self.image_size)
            batch.input_ids[is_own] = torch.from_numpy(entry.input_ids[chosen].astype(np.int64))
            batch.present[is_own] = entry.present
            batch.labels[is_own] = torch.from_numpy(entry.labels[chosen])
        return batch


def kept_modalities(uniform: Tensor, dropout: float) -> Tensor:
    """Return which modalities stay, ``(B, 2)`` bool, for uniform numbers in [0, 1), ``(B,)``.

    One half of the dropout hides the image, the other half the question, never both.

    >>> kept_modalities(torch.tensor([0.1, 0.3, 0.5]), 0.4).tolist()
    [[False, True], [True, False], [True, True]]
    """
    hides_image, hides_any = uniform < dropout / 2, uniform < dropout
    return torch.stack([~hides_image, hides_image | ~hides_any], dim=1)
