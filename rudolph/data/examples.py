"""Training examples built from pairs, numbered from 0 and determined by their number.

Batches are therefore the same for any number of workers, machines and micro-batches, and a resumed
run continues where it stopped.

Shapes: N pairs, B batch size, H and W pixels, I image tokens, S code samples, T sequence length.
L and R are the lengths of the left and right text.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rudolph.data.cache import cached_array
from rudolph.data.seeds import mixed_seed, shuffled_pairs, uniform_per_example
from rudolph.data.splits import DataConfig, MixtureEntry, Split
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
TASK_TOKEN_AT = 1


class TaskTexts(NamedTuple):
    """The token ids of the texts of every pair for one task.

    ``left`` is ``(N, L)`` and ``right`` ``(N, R)``.  ``empty`` holds the texts for an empty
    caption; ``num_cut`` counts the pairs whose text is cut.
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

    def compute() -> np.ndarray[Any, Any]:
        filled = [fill(*texts) for texts in zip(split.captions, split.questions, strict=True)]
        rows = [
            torch.cat([text.left, text.right, torch.tensor([text.num_cut])]) for text in filled
        ]
        return torch.stack(rows).int().numpy()

    parts = {"kind": f"texts of {task}", "data": split.digest, "tokenizer": tokenizer.digest}
    ids = cached_array(
        split.cache, parts={**parts, "layout": f"{layout} {vocabulary}"}, compute=compute
    )
    length = layout.left_text_length
    left, right, cut = ids[:, :length], ids[:, length:-1], int((ids[:, -1] > 0).sum())
    return TaskTexts(left, right, fill(""), cut)


def _require_fitting(split: Split, task: str) -> None:
    if TASKS[task].has_question and not all(split.questions):
        raise ValueError(
            f"data.tasks: {task} needs a question of every pair, which {split.dataset_name} has "
            f"not (of a table data.manifest.question_column names their column)"
        )
    if TASKS[task].image != "none" and split.images is None:
        raise ValueError(
            f"data.tasks: {task} needs images, and the pairs of {split.dataset_name} have none"
        )


class ImageBatch(NamedTuple):
    """A batch for the VQ-GAN: ``images`` ``(B, 3, H, W)`` in [-1, 1] and ``examples`` ``(B,)``.

    ``examples`` holds the indices of the pairs.
    """

    images: Tensor
    examples: Tensor


class TokenBatch(NamedTuple):
    """A batch for the decoder.

    ``tokens`` ``(B, T)`` are the labels and ``inputs`` ``(B, T)`` the decoder input.  ``weights``
    ``(B, 3)`` are the loss weights of left text, image and right text for each example's task.
    ``sources`` ``(B,)`` are indices of mixture entries and ``examples`` ``(B,)`` of pairs.
    """

    tokens: Tensor
    inputs: Tensor
    weights: Tensor
    sources: Tensor
    examples: Tensor

    @property
    def scored(self) -> dict[str, Tensor]:
        """Return a ``(B,)`` bool mask per segment, true where its weight is above 0."""
        return {name: self.weights[:, at] > 0 for at, name in enumerate(SEGMENTS)}


class ImageExamples:
    """Training examples of the VQ-GAN: images of one or more splits, randomly mirrored.

    A training image is mirrored horizontally with probability ``flip_probability``.
    """

    def __init__(self, *splits: Split, seed: int, flip_probability: float = 0.0) -> None:
        self.splits, self.seed, self.flip_probability = splits, seed, flip_probability
        self.ends = np.cumsum([len(split) for split in splits])
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
        owners = np.searchsorted(self.ends, indices, side="right")
        starts = self.ends - [len(split) for split in self.splits]
        rows = [
            self.splits[owner].image_batch([index - starts[owner]])
            for owner, index in zip(owners, indices, strict=True)
        ]
        return torch.cat(rows)


class MixtureExamples(NamedTuple):
    """A mixture entry with its texts and, if its pairs have images, their VQ indices.

    ``indices`` is ``(N, I)``, or ``(N, S, I)`` if each image has S sampled sets of codes.
    ``redraw`` tokenises the texts of a pair again with BPE-dropout.
    """

    source: MixtureEntry
    texts: TaskTexts
    indices: np.ndarray[Any, Any] | None
    redraw: Callable[[int, torch.Generator], Texts] | None = None


class TokenExamples:
    """Training examples of the decoder, sampled from the mixture.

    Each example samples a mixture entry in proportion to its weight, then takes a pair from it.

    Args:
        sources: Mixture entries with their texts and VQ indices.
        config: Rates of caption dropout, image-token noise and unknown-task tokens.
        layout: Positions of the segments in the sequence.
        vocabulary: Ranges of text, special and image tokens.
        num_examples: Number of examples in the whole training.
        seed: Seed of every random choice.
        task_weights: Segment weights by task, which replace those of ``TASKS``.
    """

    def __init__(
        self,
        sources: Sequence[MixtureExamples],
        config: DataConfig,
        *,
        layout: SequenceLayout,
        vocabulary: Vocabulary,
        num_examples: int,
        seed: int,
        task_weights: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        self.sources, self.config, self.seed = list(sources), config, seed
        self.layout, self.vocabulary, self.num_examples = layout, vocabulary, num_examples
        shares = np.array([each.source.weight for each in sources])
        self.bounds = (shares / shares.sum()).cumsum()
        weights = task_weights or {}
        self.weights = torch.tensor(
            [
                list(weights.get(each.source.task, TASKS[each.source.task].weights))
                for each in sources
            ]
        )
        self.sizes = [len(each.texts.left) for each in sources]

    @cached_property
    def all(self) -> np.ndarray[Any, Any]:
        """Return the (pair, entry) indices of all validation examples, ``(num_whole, 2)``.

        They are sorted by pair; a pair index occurs once for every entry that has as many pairs.
        """
        places = [(pair, row) for row, size in enumerate(self.sizes) for pair in range(size)]
        return np.array(sorted(places))

    @property
    def num_whole(self) -> int:
        """Return the number of validation examples: the pairs of every mixture entry, summed."""
        return sum(self.sizes)

    def note(self) -> str:
        """Return one line with the number of cut texts, the maximum over the mixture entries."""
        num_cut = max(each.texts.num_cut for each in self.sources)
        sizes = {
            each.source.dataset: size for each, size in zip(self.sources, self.sizes, strict=True)
        }
        return f"{num_cut} of {sum(sizes.values())} texts are too long and cut"

    def batch(self, numbers: Sequence[int]) -> TokenBatch:
        """Return the training batch of these example numbers, with dropout and noise."""
        size = self.layout.num_image_tokens
        drawn = uniform_per_example(numbers, self.seed, 4 + 2 * size)
        # Rounding can make the last bound smaller than a sampled number, so it is not compared.
        rows = np.searchsorted(self.bounds[:-1], drawn[:, 0], side="right")
        pairs = self._pairs(numbers, rows)
        is_dropped = drawn[:, 1] < self.config.caption_dropout
        texts = [
            self._texts(number, pair, self.sources[row], is_dropped=is_without)
            for number, pair, row, is_without in zip(numbers, pairs, rows, is_dropped, strict=True)
        ]
        batch = self._with_unknown(
            self._tokens(texts, pairs, rows, numbers), drawn[:, 2 + 2 * size :]
        )
        return batch._replace(inputs=self._noisy(batch, numbers, drawn[:, 2 : 2 + 2 * size]))

    def whole(self, indices: Sequence[int]) -> TokenBatch:
        """Return the validation examples at ``indices`` of ``all``, without dropout and noise."""
        pairs, rows = self.all[np.asarray(indices)].T
        texts = [
            (self.sources[row].texts.left[pair], self.sources[row].texts.right[pair])
            for pair, row in zip(pairs, rows, strict=True)
        ]
        return self._tokens(texts, pairs, rows, indices)

    def _pairs(self, numbers: Sequence[int], rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return the pair index of each example; every epoch of an entry is a new permutation."""
        orders = {size: shuffled_pairs(numbers, size, self.seed) for size in set(self.sizes)}
        return np.array([orders[self.sizes[row]][at] for at, row in enumerate(rows)])

    def _with_unknown(self, batch: TokenBatch, drawn: np.ndarray[Any, Any]) -> TokenBatch:
        """Replace random task tokens by the unknown-task token, left and right independently."""
        share = self.config.unknown_task_probability
        if not share or self.vocabulary.num_text_specials == 0:
            return batch
        tokens = batch.tokens.clone()
        starts = (0, self.layout.right_text_start)
        for side, (start, name) in enumerate(
            zip(starts, (UNKNOWN_LEFT, UNKNOWN_RIGHT), strict=True)
        ):
            at, unknown = start + TASK_TOKEN_AT, self.vocabulary.task_token(name) or 0
            # An absent text has no task token.
            is_there = tokens[:, at] >= self.vocabulary.bpe_size
            is_unknown = torch.from_numpy(drawn[:, side] < share) & is_there
            tokens[:, at] = torch.where(is_unknown, unknown, tokens[:, at])
        return batch._replace(tokens=tokens, inputs=tokens)

    def _noisy(
        self, batch: TokenBatch, numbers: Sequence[int], drawn: np.ndarray[Any, Any]
    ) -> Tensor:
        """Return the inputs with random codes as noise, in tasks that generate an image."""
        where, codes = np.split(drawn, 2, axis=1)
        share = self.config.image_token_noise * (1 - np.asarray(numbers) / self.num_examples)
        is_drawn = torch.tensor(
            [TASKS[self.sources[row].source.task].image == "drawn" for row in batch.sources]
        )
        is_noise = torch.from_numpy(where < share[:, None]) & is_drawn[:, None]
        random = torch.from_numpy((codes * self.vocabulary.codebook_size).astype(np.int64))
        inputs = batch.inputs.clone()
        image = slice(self.layout.image_start, self.layout.right_text_start)
        inputs[:, image] = torch.where(is_noise, random, inputs[:, image])
        return inputs

    def _texts(self, number: int, pair: int, filled: MixtureExamples, *, is_dropped: bool) -> Any:
        texts, task = filled.texts, TASKS[filled.source.task]
        if is_dropped and task.image == "drawn":
            return texts.empty.left.numpy(), texts.empty.right.numpy()
        if filled.redraw is not None:
            generator = torch.Generator().manual_seed(mixed_seed(self.seed, number))
            redrawn = filled.redraw(int(pair), generator)
            return redrawn.left.numpy(), redrawn.right.numpy()
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
                self._image(self.sources[row], pair, number)
                for pair, row, number in zip(pairs, rows, numbers, strict=True)
            ]
        )
        tokens = torch.from_numpy(np.concatenate([left, image, right], axis=1).astype(np.int64))
        sources, examples = torch.from_numpy(rows.copy()), torch.from_numpy(pairs.copy())
        return TokenBatch(tokens, tokens, self.weights[sources], sources, examples)

    def _image(self, filled: MixtureExamples, pair: int, number: int) -> np.ndarray[Any, Any]:
        if filled.indices is None or TASKS[filled.source.task].image == "none":
            return np.full(self.layout.num_image_tokens, MISSING_IMAGE_CODE)
        row: np.ndarray[Any, Any] = filled.indices[pair]
        if row.ndim == 2:
            row = row[mixed_seed(self.seed, "codes", int(number)) % len(row)]
        return row
