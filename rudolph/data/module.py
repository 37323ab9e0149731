"""From datasets to batches: splits in memory-mapped arrays, endless seeded streams, loaders.

Training is a stream of examples numbered from 0.  The number decides which pair it is and all that
is drawn for it, so batches are the same whatever the number of workers, machines and
micro-batches, and a resumed run goes on where it stopped.

To add a dataset, write its class (``rudolph.data.pairs``) and name it in ``DATASETS`` and, with
its config, in ``DataConfig``.

Shapes: N pairs, B batch, H and W pixels, I image tokens, T sequence, L and R left and right text.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from rudolph.data.emoji import Emoji, EmojiConfig
from rudolph.data.index_cache import cached_array
from rudolph.data.manifests import Manifest
from rudolph.data.pairs import PairDataset
from rudolph.data.seeds import draws, mixed_seed, shuffled
from rudolph.data.shapes import Shapes, ShapesConfig
from rudolph.data.tables import ManifestConfig
from rudolph.sequence.layout import SequenceLayout, Vocabulary
from rudolph.sequence.tasks import TASKS, Texts, fill_texts
from rudolph.sequence.tokenizer import Tokenizer

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class DataConfig:
    """Which pairs, and how an example of training is made of one.

    ``tasks`` weighs the tasks that examples are drawn for.  ``caption_dropout`` is the share of
    text-to-image examples without their caption, for guidance.  Of their image tokens the decoder
    reads a share as random ones, while their labels stay: it learns to listen to the text rather
    than to continue pictures that it knows (word dropout, Bowman 2016, arXiv:1511.06349).  The
    share falls evenly from ``image_token_noise`` at the first example of a training to 0 at its
    last, since pictures are generated without noise.  ``flip`` is the share of pictures that the
    VQ-GAN sees mirrored.
    """

    dataset: str = "emoji"
    image_size: int = 32
    tasks: dict[str, float] = field(
        default_factory=lambda: {"text_to_image": 1.0, "image_captioning": 1.0}
    )
    caption_dropout: float = 0.1
    image_token_noise: float = 0.0
    flip: float = 0.0
    emoji: EmojiConfig = field(default_factory=EmojiConfig)
    shapes: ShapesConfig = field(default_factory=ShapesConfig)
    manifest: ManifestConfig = field(default_factory=ManifestConfig)

    def __post_init__(self) -> None:
        if self.dataset not in DATASETS:
            raise ValueError(f"dataset must be one of {', '.join(DATASETS)}, got {self.dataset!r}")
        if self.image_size < 1:
            raise ValueError(f"image_size must be at least 1, got {self.image_size}")
        for task, weight in self.tasks.items():
            if task not in TASKS:
                raise ValueError(f"tasks must be of {', '.join(TASKS)}, got {task!r}")
            if weight < 0:
                raise ValueError(f"tasks.{task} must be at least 0, got {weight}")
        if sum(self.tasks.values()) <= 0:
            raise ValueError("tasks must give at least one task a weight above 0")
        for name in ("caption_dropout", "image_token_noise", "flip"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")


DATASETS: dict[str, Callable[..., PairDataset]] = {
    "emoji": Emoji,
    "shapes": Shapes,
    "manifest": Manifest,
}


def open_dataset(config: DataConfig, split: str) -> PairDataset:
    """One split of the dataset that the config names."""
    own = getattr(config, config.dataset)
    return DATASETS[config.dataset](own, split=split, image_size=config.image_size)


class Split:
    """One split as arrays: ``images`` (N, 3, H, W) uint8, and ``keys``, ``captions`` and
    ``questions`` (N,) str; a pair without a question has an empty one.
    """

    def __init__(self, config: DataConfig, split: str, cache: Path) -> None:
        self.dataset = open_dataset(config, split)
        self.name, self.cache = split, cache
        self.digest = self.dataset.digest
        parts = {"dataset": config.dataset, "data": self.digest}
        self.images = cached_array(cache, parts={**parts, "kind": "images"}, compute=self._images)
        kind = {**parts, "kind": "texts and questions"}
        texts = cached_array(cache, parts=kind, compute=self._texts)
        self.keys: list[str] = texts[:, 0].tolist()
        self.captions: list[str] = texts[:, 1].tolist()
        self.questions: list[str] = texts[:, 2].tolist()
        # Decoded pairs are large, and from here on the arrays serve.
        self.__dict__.pop("_pairs", None)

    def __len__(self) -> int:
        return len(self.captions)

    @cached_property
    def _pairs(self) -> list[Any]:
        pairs = [self.dataset[index] for index in range(len(self.dataset))]
        return [
            ((pair.key, pair.caption, pair.question), np.asarray(pair.image)) for pair in pairs
        ]

    def _images(self) -> np.ndarray[Any, Any]:
        return np.stack([image for _, image in self._pairs]).transpose(0, 3, 1, 2)

    def _texts(self) -> np.ndarray[Any, Any]:
        return np.array([texts for texts, _ in self._pairs])

    def pictures(self, indices: Sequence[int] | np.ndarray[Any, Any]) -> Tensor:
        """Pictures ``(len(indices), 3, H, W)`` in [0, 1]."""
        return torch.from_numpy(self.images[np.asarray(indices)]).float() / 255


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
    """Token ids of the texts of every pair for a task; computed once, then read from disk."""
    if TASKS[task].has_question and not all(split.questions):
        raise ValueError(
            f"data.tasks: {task} needs a question of every pair; data.manifest.question_column "
            f"names their column"
        )

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


class ImageBatch(NamedTuple):
    """``images`` (B, 3, H, W) in [-1, 1]; ``examples`` (B,), the numbers of the pairs."""

    images: Tensor
    examples: Tensor


class TokenBatch(NamedTuple):
    """``tokens`` (B, T) are the labels and ``inputs`` (B, T) what the decoder reads.

    ``scored`` has for each segment ``(B,)`` bool; ``examples`` (B,) are the numbers of the pairs.
    """

    tokens: Tensor
    inputs: Tensor
    scored: dict[str, Tensor]
    examples: Tensor


class ImageExamples:
    """Examples of the VQ-GAN: a picture, mirrored or not."""

    def __init__(self, split: Split, *, seed: int, flip: float = 0.0) -> None:
        self.split, self.seed, self.flip = split, seed, flip
        self.num_pairs = len(split)

    def batch(self, numbers: Sequence[int]) -> ImageBatch:
        indices = shuffled(numbers, self.num_pairs, self.seed)
        images = self.split.pictures(indices) * 2 - 1
        if self.flip:
            is_flipped = torch.from_numpy(draws(numbers, self.seed, 1)[:, 0] < self.flip)
            images = torch.where(is_flipped[:, None, None, None], images.flip(3), images)
        return ImageBatch(images, torch.from_numpy(indices))

    def whole(self, indices: Sequence[int]) -> ImageBatch:
        """The pairs themselves, unshuffled and unchanged, for validation."""
        return ImageBatch(self.split.pictures(indices) * 2 - 1, torch.tensor(indices))


class TokenExamples:
    """Examples of the decoder: a pair fills the layout for a task that is drawn by weight."""

    def __init__(
        self,
        indices: np.ndarray[Any, Any],
        texts: dict[str, TaskTexts],
        config: DataConfig,
        *,
        num_codes: int,
        num_examples: int,
        seed: int,
        redraw: Callable[[int, str, torch.Generator], Texts] | None = None,
    ) -> None:
        """``num_examples`` are those of the whole training.

        ``redraw`` encodes a pair's caption anew, with BPE-dropout.
        """
        self.indices, self.texts, self.seed, self.redraw = indices, texts, seed, redraw
        self.tasks = list(texts)
        weights = np.array([config.tasks[task] for task in self.tasks])
        self.bounds = (weights / weights.sum()).cumsum()
        self.caption_dropout, self.noise = config.caption_dropout, config.image_token_noise
        self.num_codes, self.num_examples = num_codes, num_examples
        self.num_pairs = len(indices)
        self.num_right = texts[self.tasks[0]].right.shape[1]

    def batch(self, numbers: Sequence[int]) -> TokenBatch:
        pairs = shuffled(numbers, self.num_pairs, self.seed)
        drawn = draws(numbers, self.seed, 2 + 2 * self.indices.shape[1])
        tasks = np.searchsorted(self.bounds, drawn[:, 0], side="right")
        is_dropped = drawn[:, 1] < self.caption_dropout
        rows = [
            self._texts(number, pair, self.tasks[task], is_dropped=is_without)
            for number, pair, task, is_without in zip(
                numbers, pairs, tasks, is_dropped, strict=True
            )
        ]
        batch = self._tokens(rows, pairs, [self.tasks[task] for task in tasks])
        return batch._replace(inputs=self._noisy(batch, numbers, drawn[:, 2:]))

    def _noisy(
        self, batch: TokenBatch, numbers: Sequence[int], drawn: np.ndarray[Any, Any]
    ) -> Tensor:
        """Tokens with a share of the image tokens random, where a picture is to be drawn."""
        where, codes = np.split(drawn, 2, axis=1)
        share = self.noise * (1 - np.asarray(numbers) / self.num_examples)
        is_noise = torch.from_numpy(where < share[:, None]) & batch.scored["image"][:, None]
        random = torch.from_numpy((codes * self.num_codes).astype(np.int64))
        inputs, num_right = batch.tokens.clone(), self.num_right
        image = slice(inputs.shape[1] - num_right - random.shape[1], inputs.shape[1] - num_right)
        inputs[:, image] = torch.where(is_noise, random, inputs[:, image])
        return inputs

    def whole(self, indices: Sequence[int]) -> TokenBatch:
        """For validation: pair ``index // number of tasks`` for each of the tasks in turn."""
        pairs = np.asarray(indices) // len(self.tasks)
        tasks = [self.tasks[index % len(self.tasks)] for index in indices]
        rows = [
            (self.texts[task].left[pair], self.texts[task].right[pair])
            for pair, task in zip(pairs, tasks, strict=True)
        ]
        return self._tokens(rows, pairs, tasks)

    def _texts(self, number: int, pair: int, task: str, *, is_dropped: bool) -> Any:
        texts = self.texts[task]
        if is_dropped and TASKS[task].caption_is_left:
            return texts.empty.left.numpy(), texts.empty.right.numpy()
        if self.redraw is not None:
            generator = torch.Generator().manual_seed(mixed_seed(self.seed, number))
            filled = self.redraw(int(pair), task, generator)
            return filled.left.numpy(), filled.right.numpy()
        return texts.left[pair], texts.right[pair]

    def _tokens(
        self, rows: Sequence[Any], pairs: np.ndarray[Any, Any], tasks: list[str]
    ) -> TokenBatch:
        left = np.stack([row[0] for row in rows])
        right = np.stack([row[1] for row in rows])
        tokens = np.concatenate([left, self.indices[pairs], right], axis=1).astype(np.int64)
        scored = {
            segment: torch.tensor([segment in TASKS[task].scored_segments for task in tasks])
            for segment in ("left_text", "image", "right_text")
        }
        whole = torch.from_numpy(tokens)
        return TokenBatch(whole, whole, scored, torch.from_numpy(pairs.copy()))


class _Batches(Dataset[Any]):
    """Whole batches by the list of their examples' numbers."""

    def __init__(self, make: Callable[[Sequence[int]], Any]) -> None:
        self.make = make

    def __getitem__(self, numbers: Any) -> Any:
        return self.make(numbers)


class _StreamSampler(Sampler[Any]):
    """Lists of example numbers, from the batch at which training stands.

    Its length is that of the whole training: the loop counts resumed batches as done.
    """

    def __init__(self, size: int, total: int, *, rank: int, world: int, start: int) -> None:
        self.size, self.total, self.rank, self.world, self.start = size, total, rank, world, start

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(self.start, self.total):
            first = (batch * self.world + self.rank) * self.size
            yield list(range(first, first + self.size))


class Streams(pl.LightningDataModule):
    """The loaders of one training.

    Args:
        train: makes a batch of the stream.
        validation: makes a batch of whole pairs, ``num_validation`` in all.
        batch_size: examples of a batch on one device.
        num_batches: batches of the whole training on one device.
    """

    def __init__(
        self,
        train: Callable[[Sequence[int]], Any],
        validation: Callable[[Sequence[int]], Any],
        *,
        batch_size: int,
        num_batches: int,
        num_validation: int,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.train, self.validation = train, validation
        self.batch_size, self.num_batches = batch_size, num_batches
        self.num_validation, self.num_workers = num_validation, num_workers

    def train_dataloader(self) -> DataLoader[Any]:
        trainer: Any = self.trainer
        start = trainer.fit_loop.epoch_loop.batch_progress.current.completed
        sampler = _StreamSampler(
            self.batch_size,
            self.num_batches,
            rank=trainer.global_rank,
            world=trainer.world_size,
            start=start,
        )
        return self._loader(self.train, sampler)

    def val_dataloader(self) -> DataLoader[Any]:
        size = max(self.batch_size, 64)
        rank, world = self.trainer.global_rank, self.trainer.world_size  # type: ignore[union-attr]
        mine = range(rank, self.num_validation, world)
        sampler = [list(mine[first : first + size]) for first in range(0, len(mine), size)]
        return self._loader(self.validation, sampler)

    def _loader(self, make: Callable[[Sequence[int]], Any], sampler: Any) -> DataLoader[Any]:
        # Batches are made whole, so the loader itself must not batch.
        return DataLoader(
            _Batches(make), sampler=sampler, batch_size=None, num_workers=self.num_workers
        )
