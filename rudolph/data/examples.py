"""Training examples built from pairs.

Examples are numbered from 0, and the number of an example determines it.  Batches are therefore
the same for any number of workers, machines and micro-batches, and a resumed run continues where
it stopped.

Shapes: N pairs, B batch size, H and W pixels, I image tokens, S code samples, T sequence length.
L and R are the lengths of the left and right text.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rudolph.data.cache import ArrayWriter, cached_array
from rudolph.data.mixture import Mixture
from rudolph.data.seeds import mixed_seed, shuffled_pairs, uniform_per_example
from rudolph.data.splits import DataConfig, MixtureEntry, Split, SplitArrays
from rudolph.sequence.layout import SEGMENTS, SequenceLayout, Vocabulary
from rudolph.sequence.tasks import (
    MISSING_IMAGE_CODE,
    TASKS,
    UNKNOWN_LEFT,
    UNKNOWN_RIGHT,
    Texts,
    fill_texts,
)
from rudolph.sequence.tokenizer import Tokenizer

# Position of the task token in a text: after BOS.
TASK_TOKEN_POSITION = 1


class TaskTexts(NamedTuple):
    """The token ids of every pair's left and right text, for one task.

    ``left`` is ``(N, L)`` and ``right`` is ``(N, R)``.  ``empty`` holds the texts for an empty
    caption.  ``num_cut`` counts the pairs whose text is cut.
    """

    left: np.ndarray[Any, Any]
    right: np.ndarray[Any, Any]
    empty: Texts
    num_cut: int


def task_texts(
    split: Split,
    task: str,
    *,
    tokenizer: Tokenizer,
    layout: SequenceLayout,
    vocabulary: Vocabulary,
) -> TaskTexts:
    """Return the token ids of every pair's texts for a task, cached on disk.

    Raises:
        ValueError: If a pair lacks the question or the image that the task needs.
    """
    _require_fitting(split, task)

    def fill(caption: str, question: str = "") -> Texts:
        return fill_texts(
            TASKS[task],
            caption,
            tokenizer=tokenizer,
            layout=layout,
            vocabulary=vocabulary,
            other_text=question if TASKS[task].has_question else "",
        )

    def compute() -> ArrayWriter:
        filled = (fill(*texts) for texts in zip(split.captions, split.questions, strict=True))
        rows = (
            torch.cat([text.left, text.right, torch.tensor([text.num_cut])]).int().numpy()
            for text in filled
        )
        width = layout.left_text_length + layout.right_text_length + 1
        return ArrayWriter((len(split), width), np.dtype(np.int32), rows)

    parts = {"kind": f"texts of {task}", "data": split.digest, "tokenizer": tokenizer.digest}
    ids = cached_array(
        split.cache, parts={**parts, "layout": f"{layout} {vocabulary}"}, compute=compute
    )
    length = layout.left_text_length
    left, right, num_cut = ids[:, :length], ids[:, length:-1], int((ids[:, -1] > 0).sum())
    return TaskTexts(left, right, fill(""), num_cut)


def _require_fitting(split: Split, task: str) -> None:
    if TASKS[task].has_question and not all(split.questions):
        raise ValueError(
            f"data.tasks: {task} needs a question for every pair, which {split.dataset_name} "
            "lacks. "
            f"For a table, name the column in data.manifest.question_column"
        )
    if TASKS[task].image != "none" and not split.has_images:
        raise ValueError(
            f"data.tasks: {task} needs images, which the pairs of {split.dataset_name} lack"
        )


class ImageBatch(NamedTuple):
    """A batch for the VQ-GAN: ``images`` ``(B, 3, H, W)`` in [-1, 1] and ``examples`` ``(B,)``.

    ``examples`` holds the indices of the pairs.
    """

    images: Tensor
    examples: Tensor


class TokenBatch(NamedTuple):
    """A batch for the decoder.

    ``tokens`` ``(B, T)`` holds the labels, and ``inputs`` ``(B, T)`` holds the decoder input.
    ``weights`` ``(B, 3)`` holds the loss weights of left text, image and right text for each
    example's task.  ``sources`` ``(B,)`` holds indices of mixture entries.  ``examples`` ``(B,)``
    holds indices of pairs.
    """

    tokens: Tensor
    inputs: Tensor
    weights: Tensor
    sources: Tensor
    examples: Tensor

    @property
    def scored(self) -> dict[str, Tensor]:
        """Return a bool mask ``(B,)`` per segment: true if the segment's weight is above 0."""
        return {name: self.weights[:, index] > 0 for index, name in enumerate(SEGMENTS)}


class ImageExamples:
    """Training examples of the VQ-GAN: images of one or more splits, randomly mirrored.

    A training image is mirrored horizontally with probability ``flip_probability``.
    """

    def __init__(self, *splits: SplitArrays, seed: int, flip_probability: float = 0.0) -> None:
        self.splits, self.seed, self.flip_probability = splits, seed, flip_probability
        self.ends = np.cumsum([split.num_images for split in splits])
        self.num_whole = int(self.ends[-1])

    def batch(self, numbers: Sequence[int]) -> ImageBatch:
        """Return the training batch of these example numbers; every epoch is a new permutation."""
        indices = shuffled_pairs(numbers, self.num_whole, self.seed)
        images = self._images(indices) * 2 - 1
        if self.flip_probability:
            is_flipped = torch.from_numpy(
                uniform_per_example(numbers, self.seed, 1)[:, 0] < self.flip_probability
            )
            images = torch.where(is_flipped[:, None, None, None], images.flip(3), images)
        return ImageBatch(images, torch.from_numpy(indices))

    def whole(self, indices: Sequence[int]) -> ImageBatch:
        """Return the pairs at ``indices``, unshuffled and never mirrored, for validation."""
        return ImageBatch(self._images(np.asarray(indices)) * 2 - 1, torch.tensor(indices))

    def _images(self, indices: np.ndarray[Any, Any]) -> Tensor:
        if len(self.splits) == 1:
            return self.splits[0].image_batch(indices)
        split_indices = np.searchsorted(self.ends, indices, side="right")
        starts = self.ends - [split.num_images for split in self.splits]
        rows = [
            self.splits[split_index].image_batch([index - starts[split_index]])
            for split_index, index in zip(split_indices, indices, strict=True)
        ]
        return torch.cat(rows)


class MixtureExamples(NamedTuple):
    """A mixture entry with its texts and, if its pairs have images, their VQ indices.

    ``indices`` is ``(N, I)``, or ``(N, S, I)`` if the codes of each image were sampled S times.
    ``retokenise`` tokenises the texts of a pair again with BPE-dropout.
    """

    source: MixtureEntry
    texts: TaskTexts
    indices: np.ndarray[Any, Any] | None
    retokenise: Callable[[int, torch.Generator], Texts] | None = None


class TokenExamples:
    """Training examples of the decoder, sampled from the mixture.

    Each example samples a mixture entry in proportion to its weight, then takes a pair from it.

    Args:
        entries: Mixture entries with their texts and VQ indices.
        config: Rates of caption dropout, image-token noise and unknown-task tokens.
        layout: Positions of the segments in the sequence.
        vocabulary: Ranges of text, special and image tokens.
        num_examples: Number of examples in the whole training.
        seed: Seed of every random choice.
        task_weights: Loss weights of the segments, keyed by task; they replace those of ``TASKS``.
    """

    def __init__(
        self,
        entries: Sequence[MixtureExamples],
        config: DataConfig,
        *,
        layout: SequenceLayout,
        vocabulary: Vocabulary,
        num_examples: int,
        seed: int,
        task_weights: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        self.entries, self.config, self.seed = list(entries), config, seed
        self.layout, self.vocabulary, self.num_examples = layout, vocabulary, num_examples
        self.sizes = [len(entry.texts.left) for entry in entries]
        self.mixture = Mixture([entry.source.weight for entry in entries], self.sizes, seed=seed)
        weights_by_task = task_weights or {}
        self.weights = torch.tensor(
            [
                list(weights_by_task.get(entry.source.task, TASKS[entry.source.task].weights))
                for entry in entries
            ]
        )

    @property
    def num_whole(self) -> int:
        """Return the number of validation examples: the pairs of every mixture entry, summed."""
        return sum(self.sizes)

    def note(self) -> str:
        """Return one line with the number of cut texts of the mixture entry that has the most."""
        num_cut = max(entry.texts.num_cut for entry in self.entries)
        sizes = {
            entry.source.dataset: size
            for entry, size in zip(self.entries, self.sizes, strict=True)
        }
        return f"{num_cut} of {sum(sizes.values())} texts are too long and cut"

    def batch(self, numbers: Sequence[int]) -> TokenBatch:
        """Return the training batch of these example numbers, with dropout and noise."""
        size = self.layout.num_image_tokens
        uniform = uniform_per_example(numbers, self.seed, 4 + 2 * size)
        rows = self.mixture.rows(uniform[:, 0])
        pairs = self.mixture.pairs(numbers, rows)
        is_dropped = uniform[:, 1] < self.config.caption_dropout
        texts = [
            self._texts(number, pair, self.entries[row], is_dropped=drops_caption)
            for number, pair, row, drops_caption in zip(
                numbers, pairs, rows, is_dropped, strict=True
            )
        ]
        batch = self._with_unknown_task_tokens(
            self._tokens(texts, pairs, rows, numbers), uniform[:, 2 + 2 * size :]
        )
        return batch._replace(
            inputs=self._with_token_noise(batch, numbers, uniform[:, 2 : 2 + 2 * size])
        )

    def whole(self, indices: Sequence[int]) -> TokenBatch:
        """Return validation examples, without dropout and noise.

        Args:
            indices: Rows of ``mixture.validation_entries``.
        """
        pairs, rows = self.mixture.validation_entries[np.asarray(indices)].T
        texts = [
            (self.entries[row].texts.left[pair], self.entries[row].texts.right[pair])
            for pair, row in zip(pairs, rows, strict=True)
        ]
        return self._tokens(texts, pairs, rows, indices)

    def _with_unknown_task_tokens(
        self, batch: TokenBatch, uniform: np.ndarray[Any, Any]
    ) -> TokenBatch:
        """Replace task tokens at random by the unknown-task token, independently for each side."""
        probability = self.config.unknown_task_probability
        if not probability or self.vocabulary.num_text_specials == 0:
            return batch
        tokens = batch.tokens.clone()
        starts = (0, self.layout.right_text_start)
        for side, (start, name) in enumerate(
            zip(starts, (UNKNOWN_LEFT, UNKNOWN_RIGHT), strict=True)
        ):
            position, unknown = start + TASK_TOKEN_POSITION, self.vocabulary.task_token(name) or 0
            # An absent text has no task token.
            is_present = tokens[:, position] >= self.vocabulary.bpe_size
            is_unknown = torch.from_numpy(uniform[:, side] < probability) & is_present
            tokens[:, position] = torch.where(is_unknown, unknown, tokens[:, position])
        return batch._replace(tokens=tokens, inputs=tokens)

    def _with_token_noise(
        self, batch: TokenBatch, numbers: Sequence[int], uniform: np.ndarray[Any, Any]
    ) -> Tensor:
        """Return the inputs; in tasks that generate an image, random codes replace some tokens."""
        uniform_noise, uniform_codes = np.split(uniform, 2, axis=1)
        probability = self.config.image_token_noise * (1 - np.asarray(numbers) / self.num_examples)
        is_generated = torch.tensor(
            [TASKS[self.entries[row].source.task].image == "drawn" for row in batch.sources]
        )
        is_noise = torch.from_numpy(uniform_noise < probability[:, None]) & is_generated[:, None]
        noise = torch.from_numpy((uniform_codes * self.vocabulary.codebook_size).astype(np.int64))
        inputs = batch.inputs.clone()
        image = slice(self.layout.image_start, self.layout.right_text_start)
        inputs[:, image] = torch.where(is_noise, noise, inputs[:, image])
        return inputs

    def _texts(self, number: int, pair: int, entry: MixtureExamples, *, is_dropped: bool) -> Any:
        texts, task = entry.texts, TASKS[entry.source.task]
        if is_dropped and task.image == "drawn":
            return texts.empty.left.numpy(), texts.empty.right.numpy()
        if entry.retokenise is not None:
            generator = torch.Generator().manual_seed(mixed_seed(self.seed, number))
            retokenised = entry.retokenise(int(pair), generator)
            return retokenised.left.numpy(), retokenised.right.numpy()
        return texts.left[pair], texts.right[pair]

    def _tokens(
        self,
        texts: Sequence[Any],
        pairs: np.ndarray[Any, Any],
        rows: np.ndarray[Any, Any],
        numbers: Sequence[int],
    ) -> TokenBatch:
        left = np.stack([text[0] for text in texts])
        right = np.stack([text[1] for text in texts])
        image = np.stack(
            [
                self._image(self.entries[row], pair, number)
                for pair, row, number in zip(pairs, rows, numbers, strict=True)
            ]
        )
        tokens = torch.from_numpy(np.concatenate([left, image, right], axis=1).astype(np.int64))
        sources, examples = torch.from_numpy(rows.copy()), torch.from_numpy(pairs.copy())
        return TokenBatch(tokens, tokens, self.weights[sources], sources, examples)

    def _image(self, entry: MixtureExamples, pair: int, number: int) -> np.ndarray[Any, Any]:
        if entry.indices is None or TASKS[entry.source.task].image == "none":
            return np.full(self.layout.num_image_tokens, MISSING_IMAGE_CODE)
        row: np.ndarray[Any, Any] = entry.indices[pair]
        if row.ndim == 2:
            row = row[mixed_seed(self.seed, "codes", int(number)) % len(row)]
        return row
