"""Which pairs there are: datasets by name, and their splits in memory-mapped arrays.

To add a dataset, write its class (``rudolph.data.pairs``) and name it in ``DATASETS`` and, with
its config, in ``DataConfig``.

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
from rudolph.data.datasets.paragraphs import Paragraphs, ParagraphsConfig
from rudolph.data.datasets.shapes import Shapes, ShapesConfig
from rudolph.data.datasets.shapes_questions import ShapesQuestions, ShapesQuestionsConfig
from rudolph.data.datasets.tables import ManifestConfig
from rudolph.data.datasets.words import Words, WordsConfig
from rudolph.data.pairs import PairDataset
from rudolph.sequence.tasks import TASKS


class MixtureEntry(NamedTuple):
    """A row of the mixture: its name in the configuration, pairs of which dataset, which task."""

    name: str
    dataset: str
    task: str
    weight: float


@dataclass(frozen=True)
class DataConfig:
    """Which pairs, and how an example of training is made of one.

    ``tasks`` is the mixture: it weighs the tasks that examples are drawn for.  A task is of the
    pairs of ``dataset``, or, as ``words/text_recognition``, of those of the dataset that it names.
    ``caption_dropout`` is the share of text-to-image examples without their caption, for guidance.
    Of their image tokens the decoder reads a share as random ones, while their labels stay: it
    learns to listen to the text rather than to continue images that it knows (word dropout,
    Bowman 2016, arXiv:1511.06349).  The share falls evenly from ``image_token_noise`` at the first
    example of a training to 0 at its last, since images are generated without noise.
    ``unknown_task_probability`` is the share of texts whose task token is that of an unknown
    task, left and right by themselves (fbc2_aij2022: 0.25).  ``flip_probability`` is the share of
    images that the VQ-GAN sees mirrored.  With ``num_code_samples`` an example's image tokens are
    one of so many drawn sets of codes, by the weights of a Gumbel quantizer, instead of the best
    code of each cell
    (DALL-E, arXiv:2102.12092, section 2.2).
    """

    dataset: str = "emoji"
    image_size: int = 32
    tasks: dict[str, float] = field(
        default_factory=lambda: {"text_to_image": 1.0, "image_captioning": 1.0}
    )
    caption_dropout: float = 0.1
    image_token_noise: float = 0.0
    unknown_task_probability: float = 0.0
    flip_probability: float = 0.0
    num_code_samples: int = 0
    emoji: EmojiConfig = field(default_factory=EmojiConfig)
    shapes: ShapesConfig = field(default_factory=ShapesConfig)
    manifest: ManifestConfig = field(default_factory=ManifestConfig)
    emoji_questions: EmojiQuestionsConfig = field(default_factory=EmojiQuestionsConfig)
    shapes_questions: ShapesQuestionsConfig = field(default_factory=ShapesQuestionsConfig)
    words: WordsConfig = field(default_factory=WordsConfig)
    paragraphs: ParagraphsConfig = field(default_factory=ParagraphsConfig)
    arithmetic: ArithmeticConfig = field(default_factory=ArithmeticConfig)
    fusion_brain: FusionBrainConfig = field(default_factory=FusionBrainConfig)

    def __post_init__(self) -> None:
        if self.dataset not in DATASETS:
            raise ValueError(f"dataset must be one of {', '.join(DATASETS)}, got {self.dataset!r}")
        if self.image_size < 1:
            raise ValueError(f"image_size must be at least 1, got {self.image_size}")
        for name, weight in self.tasks.items():
            require_dataset_prefix(name, "tasks")
            task = name.rpartition("/")[2]
            if task not in TASKS:
                raise ValueError(f"tasks must be of {', '.join(TASKS)}, got {task!r}")
            if TASKS[task].filled_as is not None:
                raise ValueError(
                    f"tasks.{name} is not trained: a decoder that learned "
                    f"{TASKS[task].filled_as} is asked"
                )
            if weight < 0:
                raise ValueError(f"tasks.{name} must be at least 0, got {weight}")
        if sum(self.tasks.values()) <= 0:
            raise ValueError("tasks must give at least one task a weight above 0")
        for name in (
            "caption_dropout",
            "image_token_noise",
            "unknown_task_probability",
            "flip_probability",
        ):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if self.num_code_samples < 0:
            raise ValueError(f"num_code_samples must be at least 0, got {self.num_code_samples}")

    @property
    def mixture(self) -> list[MixtureEntry]:
        """The rows of the mixture that weigh anything, in the order of the configuration."""
        rows = []
        for name, weight in self.tasks.items():
            dataset, _, task = name.rpartition("/")
            if weight > 0:
                rows.append(MixtureEntry(name, dataset or self.dataset, task, weight))
        return rows

    @property
    def datasets(self) -> list[str]:
        """All datasets of the mixture, after the main one, each once."""
        return list(dict.fromkeys([self.dataset, *(row.dataset for row in self.mixture)]))


DATASETS: dict[str, Callable[..., PairDataset]] = {
    "emoji": Emoji,
    "shapes": Shapes,
    "manifest": Manifest,
    "emoji_questions": EmojiQuestions,
    "shapes_questions": ShapesQuestions,
    "words": Words,
    "paragraphs": Paragraphs,
    "arithmetic": Arithmetic,
    "fusion_brain": FusionBrain,
}


def require_dataset_prefix(name: str, field: str) -> None:
    """Raise ``ValueError`` for ``dataset/...`` of a dataset that is not."""
    dataset, slash, _ = name.rpartition("/")
    if slash and dataset not in DATASETS:
        raise ValueError(f"{field} must name a dataset of {', '.join(DATASETS)}, got {dataset!r}")


def open_dataset(config: DataConfig, split: str, dataset: str | None = None) -> PairDataset:
    """One split of a dataset: of the one that the config names, if no other is told."""
    name = dataset or config.dataset
    return DATASETS[name](getattr(config, name), split=split, image_size=config.image_size)


class Split:
    """One split as arrays: ``images`` (N, 3, H, W) uint8, and ``keys``, ``captions`` and
    ``questions`` (N,) str; a pair without a question has an empty one.

    ``images`` is None where pairs have no image.
    """

    def __init__(
        self, config: DataConfig, split: str, cache: Path, *, dataset: str | None = None
    ) -> None:
        self.dataset_name = dataset or config.dataset
        self.dataset = open_dataset(config, split, self.dataset_name)
        self.name, self.cache = split, cache
        # Texts that were read while the images were decoded.
        self.texts_read: list[tuple[str, str, str]] = []
        self.digest = self.dataset.digest
        has_images = self.dataset[0].image is not None
        self.images = self._cached("images", self._images) if has_images else None
        texts = json.loads(self._cached("texts as JSON", self._texts).tobytes())
        self.keys, self.captions, self.questions = (list(column) for column in texts)

    def __len__(self) -> int:
        return len(self.captions)

    def _cached(
        self, kind: str, compute: Callable[[], np.ndarray[Any, Any] | ArrayWriter]
    ) -> np.ndarray[Any, Any]:
        parts = {"dataset": self.dataset_name, "data": self.digest, "kind": kind}
        return cached_array(self.cache, parts=parts, compute=compute)

    def _images(self) -> ArrayWriter:
        """Each image once, and at the same time the texts, so that no pair is read twice."""
        first = np.asarray(self.dataset[0].image)
        texts: list[tuple[str, str, str]] = []

        def images() -> Iterator[np.ndarray[Any, Any]]:
            for index in range(len(self.dataset)):
                pair = self.dataset[index]
                texts.append((pair.key, pair.caption, pair.question))
                yield np.asarray(pair.image).transpose(2, 0, 1)
            self.texts_read = texts

        shape = (len(self.dataset), first.shape[2], *first.shape[:2])
        return ArrayWriter(shape, first.dtype, images())

    def _texts(self) -> np.ndarray[Any, Any]:
        """Keys, captions and questions as bytes of JSON: as large as the texts, no more."""
        pairs = (self.dataset[index] for index in range(len(self.dataset)))
        rows = self.texts_read or [(pair.key, pair.caption, pair.question) for pair in pairs]
        self.texts_read = []
        return np.frombuffer(json.dumps(list(zip(*rows, strict=True))).encode(), dtype=np.uint8)

    @cached_property
    def image_numbers(self) -> np.ndarray[Any, Any]:
        """A number for the image of every pair, ``(N,)``, equal where images are equal.

        Pairs without an image have a number of their own each.
        """
        images = self.images
        if images is None:
            return np.arange(len(self))

        def compute() -> np.ndarray[Any, Any]:
            digests = [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
            return np.unique(digests, return_inverse=True)[1]

        return self._cached("image numbers", compute)

    def clusters(self, indices: Sequence[int] | np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return the image's number of each pair, ``(len(indices),)``."""
        return np.asarray(self.image_numbers[np.asarray(indices)])

    def all_captions(self, indices: Sequence[int]) -> list[list[str]]:
        """Return all captions that the split has of the image of each pair, its own first."""
        clusters = self.clusters(range(len(self))).tolist()
        members: dict[int, list[str]] = {}
        for cluster, caption in zip(clusters, self.captions, strict=True):
            members.setdefault(cluster, []).append(caption)
        return [list(dict.fromkeys([self.captions[at], *members[clusters[at]]])) for at in indices]

    def image_batch(self, indices: Sequence[int] | np.ndarray[Any, Any]) -> Tensor:
        """Images ``(len(indices), 3, H, W)`` in [0, 1]."""
        if self.images is None:
            raise ValueError(f"{self.dataset_name}: its pairs have no images")
        return torch.from_numpy(self.images[np.asarray(indices)]).float() / 255


class Splits:
    """The splits of all datasets of a configuration, each opened when it is asked for first."""

    def __init__(self, config: DataConfig, cache: Path) -> None:
        self.config, self.cache = config, cache
        self.opened: dict[tuple[str, str], Split] = {}

    def __call__(self, name: str, dataset: str | None = None) -> Split:
        """A split of a dataset; of the main one, if no other is told."""
        place = (dataset or self.config.dataset, name)
        if place not in self.opened:
            self.opened[place] = Split(self.config, name, self.cache, dataset=place[0])
        return self.opened[place]

    def all(self, name: str) -> list[Split]:
        """That split of every dataset of the mixture, the main one's first."""
        return [self(name, dataset) for dataset in self.config.datasets]

    def with_images(self, name: str) -> list[Split]:
        """That split of every dataset whose pairs have images."""
        return [split for split in self.all(name) if split.images is not None]

    @property
    def digests(self) -> dict[str, str]:
        """The digest of every opened split, by ``data.split`` or ``data.split.dataset``."""
        return {
            f"data.{name}" if dataset == self.config.dataset else f"data.{name}.{dataset}": (
                split.digest
            )
            for (dataset, name), split in self.opened.items()
        }
