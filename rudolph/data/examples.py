"""From pairs to batches: examples are numbered from 0, and the number decides all that is drawn.

So batches are the same whatever the number of workers, machines and micro-batches, and a resumed
run goes on where it stopped.

Shapes: N pairs, B batch, H and W pixels, I image tokens, T sequence, L and R left and right text.
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

# Where in a text its task token stands: after BOS.
TASK_TOKEN_AT = 1


class TaskTexts(NamedTuple):
    """The texts of one task for every pair: ``left`` (N, L), ``right`` (N, R), without caption."""

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
    """Token ids of the texts of every pair for a task; computed once, then read from disk.

    Raises:
        ValueError: for a task whose question or image some pair lacks.
    """
    _require_fitting(split, task)

    def fill(caption: str, question: str = "") -> Texts:
        return fill_texts(
            TASKS[task],
            caption,
            tokenizer=tokenizer,
            layout=layout,
            vocabulary=vocabulary,
            beside=question if TASKS[task].has_question else "",
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
    """``images`` (B, 3, H, W) in [-1, 1]; ``examples`` (B,), the numbers of the pairs."""

    images: Tensor
    examples: Tensor


class TokenBatch(NamedTuple):
    """``tokens`` (B, T) are the labels and ``inputs`` (B, T) what the decoder reads.

    ``weights`` (B, 3) are those of left text, image and right text of each example's task;
    ``sources`` (B,) are the rows of the mixture; ``examples`` (B,) are the numbers of the pairs.
    """

    tokens: Tensor
    inputs: Tensor
    weights: Tensor
    sources: Tensor
    examples: Tensor

    @property
    def scored(self) -> dict[str, Tensor]:
        """For each segment ``(B,)`` bool: the examples whose segment is scored."""
        return {name: self.weights[:, at] > 0 for at, name in enumerate(SEGMENTS)}


class ImageExamples:
    """Examples of the VQ-GAN: an image of one of some splits, mirrored or not."""

    def __init__(self, *splits: Split, seed: int, flip_probability: float = 0.0) -> None:
        self.splits, self.seed, self.flip_probability = splits, seed, flip_probability
        self.ends = np.cumsum([len(split) for split in splits])
        self.num_whole = int(self.ends[-1])

    def batch(self, numbers: Sequence[int]) -> ImageBatch:
        indices = shuffled_pairs(numbers, self.num_whole, self.seed)
        images = self._images(indices) * 2 - 1
        if self.flip_probability:
            is_flipped = torch.from_numpy(
                uniform_per_example(numbers, self.seed, 1)[:, 0] < self.flip_probability
            )
            images = torch.where(is_flipped[:, None, None, None], images.flip(3), images)
        return ImageBatch(images, torch.from_numpy(indices))

    def whole(self, indices: Sequence[int]) -> ImageBatch:
        """The pairs themselves, unshuffled and unchanged, for validation."""
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
    """A row of the mixture with its texts and, where its pairs have images, their indices.

    ``indices`` is ``(N, I)``, or of several drawn sets of codes ``(N, S, I)``; ``redraw`` encodes
    a pair's texts anew, with BPE-dropout.
    """

    source: MixtureEntry
    texts: TaskTexts
    indices: np.ndarray[Any, Any] | None
    redraw: Callable[[int, torch.Generator], Texts] | None = None


class TokenExamples:
    """Examples of the decoder: a row of the mixture is drawn by weight, and a pair fills it."""

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
        """``num_examples`` are those of the whole training.

        ``task_weights`` replaces the weights of a task's segments.
        """
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
        """Pair and row of each: pairs in turn, each for every row that has as many, ``(., 2)``."""
        places = [(pair, row) for row, size in enumerate(self.sizes) for pair in range(size)]
        return np.array(sorted(places))

    @property
    def num_whole(self) -> int:
        """Examples that ``whole`` can give: every pair of every row of the mixture."""
        return sum(self.sizes)

    def note(self) -> str:
        """Return how many texts are cut, in one line."""
        num_cut = max(each.texts.num_cut for each in self.sources)
        sizes = {
            each.source.dataset: size for each, size in zip(self.sources, self.sizes, strict=True)
        }
        return f"{num_cut} of {sum(sizes.values())} texts are too long and cut"

    def batch(self, numbers: Sequence[int]) -> TokenBatch:
        size = self.layout.num_image_tokens
        drawn = uniform_per_example(numbers, self.seed, 4 + 2 * size)
        # The last number below 1 may lie above the last bound by rounding.
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
        """For validation: every pair for every row of the mixture, unchanged."""
        pairs, rows = self.all[np.asarray(indices)].T
        texts = [
            (self.sources[row].texts.left[pair], self.sources[row].texts.right[pair])
            for pair, row in zip(pairs, rows, strict=True)
        ]
        return self._tokens(texts, pairs, rows, indices)

    def _pairs(self, numbers: Sequence[int], rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The pair of each example: in every epoch of a row's pairs its order is another."""
        orders = {size: shuffled_pairs(numbers, size, self.seed) for size in set(self.sizes)}
        return np.array([orders[self.sizes[row]][at] for at, row in enumerate(rows)])

    def _with_unknown(self, batch: TokenBatch, drawn: np.ndarray[Any, Any]) -> TokenBatch:
        """Some task tokens replaced by those of an unknown task, left and right by themselves."""
        share = self.config.unknown_task_probability
        if not share or self.vocabulary.num_text_specials == 0:
            return batch
        tokens = batch.tokens.clone()
        starts = (0, self.layout.right_text_start)
        for side, (start, name) in enumerate(
            zip(starts, (UNKNOWN_LEFT, UNKNOWN_RIGHT), strict=True)
        ):
            at, unknown = start + TASK_TOKEN_AT, self.vocabulary.task_token(name) or 0
            # A text that is not there has no task token either.
            is_there = tokens[:, at] >= self.vocabulary.bpe_size
            is_unknown = torch.from_numpy(drawn[:, side] < share) & is_there
            tokens[:, at] = torch.where(is_unknown, unknown, tokens[:, at])
        return batch._replace(tokens=tokens, inputs=tokens)

    def _noisy(
        self, batch: TokenBatch, numbers: Sequence[int], drawn: np.ndarray[Any, Any]
    ) -> Tensor:
        """Tokens with a share of the image tokens random, where an image is to be drawn."""
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
