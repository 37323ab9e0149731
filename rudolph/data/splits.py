"""Datasets by name, and their splits as memory-mapped arrays.

To add a dataset, write its class (see ``rudolph.data.pairs``), add it to ``DATASETS`` and add its
config to ``DataConfig``.

Shapes: N pairs, H and W pixels.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rudolph.data.cache import ArrayWriter, cached_array
from rudolph.data.datasets.arithmetic import Arithmetic, ArithmeticConfig
from rudolph.data.datasets.emoji import Emoji, EmojiConfig
from rudolph.data.datasets.emoji_questions import EmojiQuestions, EmojiQuestionsConfig
from rudolph.data.datasets.fusion_brain import FusionBrain, FusionBrainConfig
from rudolph.data.datasets.manifests import Manifest
from rudolph.data.datasets.new_words import NewWords, NewWordsConfig
from rudolph.data.datasets.packed_pairs import PackedPairs, PackedPairsConfig
from rudolph.data.datasets.paragraphs import Paragraphs, ParagraphsConfig
from rudolph.data.datasets.shapes import Shapes, ShapesConfig
from rudolph.data.datasets.shapes_questions import ShapesQuestions, ShapesQuestionsConfig
from rudolph.data.datasets.tables import ManifestConfig
from rudolph.data.datasets.words import Words, WordsConfig
from rudolph.data.pairs import PairDataset, ReadsLazily
from rudolph.files.constraints import Count, Fraction, NonNegativeInt, check
from rudolph.sequence.tasks import TASKS


class MixtureEntry(NamedTuple):
    """One entry of the mixture: name in the configuration, dataset, task and weight."""

    name: str
    dataset: str
    task: str
    weight: float


@dataclass(frozen=True)
class DataConfig:
    """Configuration of the datasets, the task mixture and the augmentation.

    Attributes:
        dataset: Name of the main dataset, a key of ``DATASETS``.
        image_size: Side of the square images, in pixels.
        tasks: Mixture weight of each task.  The key ``words/text_recognition`` takes pairs from
            the dataset ``words``; a key without a slash takes pairs from ``dataset``.
        caption_dropout: Fraction of text-to-image examples that lose their caption in training.
            Guidance needs a decoder that also predicts images without a caption.
        image_token_noise: Fraction of image tokens that are replaced by random codes in the input
            of text-to-image examples, but not in the labels.  This noise teaches the decoder to
            attend to the text instead of continuing images that it knows (word dropout, Bowman
            2016, arXiv:1511.06349).  The fraction decays linearly from this value at the first
            example to 0 at the last, since generation has no such noise.
        unknown_task_probability: Fraction of texts whose task token is replaced by the
            unknown-task token, independently for left and right texts.  The code of the Fusion
            Brain Challenge 2 (fbc2_aij2022) uses 0.25.
        flip_probability: Fraction of images that are mirrored for the VQ-GAN.
        num_code_samples: Number of times that the codes of each image are sampled from the
            probabilities of a Gumbel quantizer.  Each example uses one of these samples.  With
            0, examples use the best code of each cell (DALL-E, arXiv:2102.12092, section 2.2).
    """

    dataset: str = "emoji"
    image_size: Count = 32
    tasks: dict[str, float] = field(
        default_factory=lambda: {"text_to_image": 1.0, "image_captioning": 1.0}
    )
    caption_dropout: Fraction = 0.1
    image_token_noise: Fraction = 0.0
    unknown_task_probability: Fraction = 0.0
    flip_probability: Fraction = 0.0
    num_code_samples: NonNegativeInt = 0
    emoji: EmojiConfig = field(default_factory=EmojiConfig)
    shapes: ShapesConfig = field(default_factory=ShapesConfig)
    manifest: ManifestConfig = field(default_factory=ManifestConfig)
    packed: PackedPairsConfig = field(default_factory=PackedPairsConfig)
    emoji_questions: EmojiQuestionsConfig = field(default_factory=EmojiQuestionsConfig)
    shapes_questions: ShapesQuestionsConfig = field(default_factory=ShapesQuestionsConfig)
    new_words: NewWordsConfig = field(default_factory=NewWordsConfig)
    words: WordsConfig = field(default_factory=WordsConfig)
    paragraphs: ParagraphsConfig = field(default_factory=ParagraphsConfig)
    arithmetic: ArithmeticConfig = field(default_factory=ArithmeticConfig)
    fusion_brain: FusionBrainConfig = field(default_factory=FusionBrainConfig)

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for an invalid field."""
        check(self)
        if self.dataset not in DATASETS:
            raise ValueError(f"dataset must be one of {', '.join(DATASETS)}, got {self.dataset!r}")
        for name, weight in self.tasks.items():
            require_dataset_prefix(name, "tasks")
            task = name.rpartition("/")[2]
            if task not in TASKS:
                raise ValueError(f"tasks must be of {', '.join(TASKS)}, got {task!r}")
            if TASKS[task].filled_as is not None:
                raise ValueError(
                    f"tasks.{name}: expected a task that is trained, got one that is only "
                    "evaluated. "
                    f"Train {TASKS[task].filled_as} instead"
                )
            if weight < 0:
                raise ValueError(f"tasks.{name} must be at least 0, got {weight}")
        if sum(self.tasks.values()) <= 0:
            raise ValueError("tasks must give at least one task a weight above 0")

    @property
    def mixture(self) -> list[MixtureEntry]:
        """Return the mixture entries of weight above 0, in configuration order."""
        rows = []
        for name, weight in self.tasks.items():
            dataset, _, task = name.rpartition("/")
            if weight > 0:
                rows.append(MixtureEntry(name, dataset or self.dataset, task, weight))
        return rows

    @property
    def datasets(self) -> list[str]:
        """Return the names of the main dataset and of all other datasets in the mixture."""
        return list(dict.fromkeys([self.dataset, *(row.dataset for row in self.mixture)]))


DATASETS: dict[str, Callable[..., PairDataset]] = {
    "emoji": Emoji,
    "shapes": Shapes,
    "manifest": Manifest,
    "packed": PackedPairs,
    "emoji_questions": EmojiQuestions,
    "shapes_questions": ShapesQuestions,
    "new_words": NewWords,
    "words": Words,
    "paragraphs": Paragraphs,
    "arithmetic": Arithmetic,
    "fusion_brain": FusionBrain,
}


def require_dataset_prefix(name: str, field: str) -> None:
    """Raise ``ValueError`` if ``name`` is ``dataset/...`` with an unknown dataset.

    Args:
        name: Name with or without a dataset prefix.
        field: Configuration field that starts the error message.
    """
    dataset, slash, _ = name.rpartition("/")
    if slash and dataset not in DATASETS:
        raise ValueError(f"{field} must name a dataset of {', '.join(DATASETS)}, got {dataset!r}")


def open_dataset(config: DataConfig, split: str, dataset: str | None = None) -> PairDataset:
    """Open one split of a dataset, by default of ``config.dataset``."""
    name = dataset or config.dataset
    return DATASETS[name](getattr(config, name), split=split, image_size=config.image_size)


class Split:
    """One split of a dataset as arrays and lists.

    ``keys``, ``captions`` and ``questions`` are sequences of N strings; the question is empty if a
    pair has none.  Images are decoded once into a cached array, unless the dataset reads lazily.
    """

    keys: Sequence[str]
    captions: Sequence[str]
    questions: Sequence[str]

    def __init__(
        self, config: DataConfig, split: str, cache: Path, *, dataset: str | None = None
    ) -> None:
        self.dataset_name = dataset or config.dataset
        self.dataset = open_dataset(config, split, self.dataset_name)
        self.name, self.cache = split, cache
        # Texts read while decoding the images, so that no pair is loaded twice.
        self.cached_texts: list[tuple[str, str, str]] = []
        self.digest = self.dataset.digest
        self.has_images = self.dataset[0].image is not None
        self.images: np.ndarray[Any, Any] | None = None
        if isinstance(self.dataset, ReadsLazily):
            columns = (self.dataset.texts(name) for name in ("key", "caption", "question"))
            self.keys, self.captions, self.questions = columns
            return
        if self.has_images:
            self.images = self._cached("images", self._images)
        texts = json.loads(self._cached("texts as JSON", self._texts).tobytes())
        self.keys, self.captions, self.questions = (list(column) for column in texts)

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.captions)

    def _cached(
        self, kind: str, compute: Callable[[], np.ndarray[Any, Any] | ArrayWriter]
    ) -> np.ndarray[Any, Any]:
        parts = {"dataset": self.dataset_name, "data": self.digest, "kind": kind}
        return cached_array(self.cache, parts=parts, compute=compute)

    def _images(self) -> ArrayWriter:
        """Return the images as rows; writing them also collects the texts of the pairs."""
        first = np.asarray(self.dataset[0].image)
        texts: list[tuple[str, str, str]] = []

        def images() -> Iterator[np.ndarray[Any, Any]]:
            for index in range(len(self.dataset)):
                pair = self.dataset[index]
                texts.append((pair.key, pair.caption, pair.question))
                yield np.asarray(pair.image).transpose(2, 0, 1)
            self.cached_texts = texts

        shape = (len(self.dataset), first.shape[2], *first.shape[:2])
        return ArrayWriter(shape, first.dtype, images())

    def _texts(self) -> np.ndarray[Any, Any]:
        """Return keys, captions and questions as JSON bytes, about as large as the texts."""
        pairs = (self.dataset[index] for index in range(len(self.dataset)))
        rows = self.cached_texts or [(pair.key, pair.caption, pair.question) for pair in pairs]
        self.cached_texts = []
        return np.frombuffer(json.dumps(list(zip(*rows, strict=True))).encode(), dtype=np.uint8)

    @cached_property
    def image_ids(self) -> np.ndarray[Any, Any]:
        """Return an image number ``(N,)`` for every pair; equal images have equal numbers.

        Each pair without an image has a number of its own.
        """
        images, dataset = self.images, self.dataset
        if isinstance(dataset, ReadsLazily):
            return self._cached("image numbers", dataset.image_numbers)
        if images is None:
            return np.arange(len(self))

        def compute() -> np.ndarray[Any, Any]:
            digests = [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
            return np.unique(digests, return_inverse=True)[1]

        return self._cached("image numbers", compute)

    def clusters(self, indices: Sequence[int] | np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return the image numbers of the pairs at ``indices``, ``(len(indices),)``."""
        return np.asarray(self.image_ids[np.asarray(indices)])

    def all_captions(self, indices: Sequence[int]) -> list[list[str]]:
        """Return, for each pair, all captions that the split has for its image.

        The pair's own caption comes first.
        """
        clusters = self.clusters(range(len(self))).tolist()
        members: dict[int, list[str]] = {}
        for cluster, caption in zip(clusters, self.captions, strict=True):
            members.setdefault(cluster, []).append(caption)
        return [
            list(dict.fromkeys([self.captions[index], *members[clusters[index]]]))
            for index in indices
        ]

    def image_batch(self, indices: Sequence[int] | np.ndarray[Any, Any]) -> Tensor:
        """Return images ``(len(indices), 3, H, W)`` as float in [0, 1].

        Raises:
            ValueError: If the pairs have no images.
        """
        if isinstance(self.dataset, ReadsLazily):
            return torch.from_numpy(self.dataset.images(indices)).float() / 255
        if self.images is None:
            raise ValueError(f"{self.dataset_name}: its pairs have no images")
        return torch.from_numpy(self.images[np.asarray(indices)]).float() / 255


class Splits:
    """The splits of all datasets of a configuration, opened on first use."""

    def __init__(self, config: DataConfig, cache: Path) -> None:
        self.config, self.cache = config, cache
        self.opened: dict[tuple[str, str], Split] = {}

    def __call__(self, name: str, dataset: str | None = None) -> Split:
        """Return a split of a dataset, by default of the main one."""
        key = (dataset or self.config.dataset, name)
        if key not in self.opened:
            self.opened[key] = Split(self.config, name, self.cache, dataset=key[0])
        return self.opened[key]

    def all(self, name: str) -> list[Split]:
        """Return the split ``name`` of every dataset of the mixture, the main one first."""
        return [self(name, dataset) for dataset in self.config.datasets]

    def with_images(self, name: str) -> list[Split]:
        """Return the split ``name`` of every dataset whose pairs have images."""
        return [split for split in self.all(name) if split.has_images]

    @property
    def digests(self) -> dict[str, str]:
        """Return the digests of the opened splits.

        The key is ``data.SPLIT`` for the main dataset and ``data.SPLIT.DATASET`` for any other.
        """
        return {
            f"data.{name}" if dataset == self.config.dataset else f"data.{name}.{dataset}": (
                split.digest
            )
            for (dataset, name), split in self.opened.items()
        }
