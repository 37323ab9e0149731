"""Datasets by name, and their splits as memory-mapped arrays.

To add a dataset, write its class (see ``rudolph.data.pairs``), add it to ``DATASETS`` and add its
config to ``DataConfig``.

Shapes: N pairs, M images, H and W pixels.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rudolph.data.cache import ArrayWriter, cached_array
from rudolph.data.datasets.arithmetic import Arithmetic, ArithmeticConfig
from rudolph.data.datasets.document_files import (
    ConversationsConfig,
    DocumentDataset,
    InterleavedConfig,
)
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
from rudolph.data.image_files import RowReport
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
    conversations: ConversationsConfig = field(default_factory=ConversationsConfig)
    interleaved: InterleavedConfig = field(default_factory=InterleavedConfig)

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


DATASETS: dict[str, Callable[..., PairDataset | DocumentDataset]] = {
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
    "conversations": DocumentDataset,
    "interleaved": DocumentDataset,
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


def open_dataset(config: DataConfig, split: str, dataset: str | None = None) -> Any:
    """Open one split of a dataset, by default of ``config.dataset``."""
    name = dataset or config.dataset
    return DATASETS[name](getattr(config, name), split=split, image_size=config.image_size)


def has_documents(dataset: str) -> bool:
    """Return whether the examples of a dataset are documents, not pairs."""
    return DATASETS[dataset] is DocumentDataset


class SplitArrays:
    """The memory-mapped images and the texts of one split of a dataset.

    ``images`` is ``(M, 3, H, W)`` uint8, or None if there are none.  ``report`` counts the bad
    rows of a dataset of files.
    """

    images: np.ndarray[Any, Any] | None = None
    report: RowReport | None = None

    def __init__(self, dataset_name: str, name: str, digest: str, cache: Path) -> None:
        self.dataset_name, self.name = dataset_name, name
        self.digest, self.cache = digest, cache

    def __len__(self) -> int:
        """Return the number of pairs or documents."""
        raise NotImplementedError

    def texts(self) -> Iterator[str]:
        """Yield all texts, for the training of a tokenizer."""
        raise NotImplementedError

    @property
    def num_images(self) -> int:
        """Return the number of images, M."""
        return 0 if self.images is None else len(self.images)

    @property
    def has_images(self) -> bool:
        """Return whether there are images."""
        return self.num_images > 0

    def image_batch(self, indices: Sequence[int] | np.ndarray[Any, Any]) -> Tensor:
        """Return images ``(len(indices), 3, H, W)`` as float in [0, 1].

        Raises:
            ValueError: If there are no images.
        """
        if self.images is None:
            raise ValueError(f"{self.dataset_name}: its pairs have no images")
        return torch.from_numpy(self.images[np.asarray(indices)]).float() / 255

    def _cached(
        self, kind: str, compute: Callable[[], np.ndarray[Any, Any] | ArrayWriter]
    ) -> np.ndarray[Any, Any]:
        parts = {"dataset": self.dataset_name, "data": self.digest, "kind": kind}
        return cached_array(self.cache, parts=parts, compute=compute)


class Split(SplitArrays):
    """One split of a dataset of pairs as arrays and lists.

    ``keys``, ``captions`` and ``questions`` are sequences of N strings; the question is empty if a
    pair has none.  Images are decoded once into a cached array, unless the dataset reads lazily.
    """

    keys: Sequence[str]
    captions: Sequence[str]
    questions: Sequence[str]
    num_lazy_images = 0

    def __init__(
        self, config: DataConfig, split: str, cache: Path, *, dataset: str | None = None
    ) -> None:
        name = dataset or config.dataset
        self.dataset: PairDataset = open_dataset(config, split, name)
        super().__init__(name, split, self.dataset.digest, cache)
        if isinstance(self.dataset, Manifest):
            self.report = self.dataset.report
        # Texts read while decoding the images, so that no pair is loaded twice.
        self.cached_texts: list[tuple[str, str, str]] = []
        shows_image, num_pairs = self.dataset[0].image is not None, len(self.dataset)
        if isinstance(self.dataset, ReadsLazily):
            self.num_lazy_images = num_pairs if shows_image else 0
            columns = (self.dataset.texts(name) for name in ("key", "caption", "question"))
            self.keys, self.captions, self.questions = columns
            return
        if shows_image:
            self.images = self._cached("images", self._images)
        texts = json.loads(self._cached("texts as JSON", self._texts).tobytes())
        self.keys, self.captions, self.questions = (list(column) for column in texts)

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.captions)

    def texts(self) -> Iterator[str]:
        """Yield all captions, then all questions."""
        yield from filter(None, chain(self.captions, self.questions))

    @property
    def num_images(self) -> int:
        """Return the number of images, which is that of the pairs, or 0."""
        return self.num_lazy_images or super().num_images

    def image_batch(self, indices: Sequence[int] | np.ndarray[Any, Any]) -> Tensor:
        """Return images ``(len(indices), 3, H, W)`` as float in [0, 1].

        Raises:
            ValueError: If the pairs have no images.
        """
        if isinstance(self.dataset, ReadsLazily):
            return torch.from_numpy(self.dataset.images(indices)).float() / 255
        return super().image_batch(indices)

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
        """Return an image number for every pair, ``(N,)``, equal where images are equal.

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
        """Return all captions in the split of each pair's image, the pair's own caption first."""
        clusters = self.clusters(range(len(self))).tolist()
        members: dict[int, list[str]] = {}
        for cluster, caption in zip(clusters, self.captions, strict=True):
            members.setdefault(cluster, []).append(caption)
        return [
            list(dict.fromkeys([self.captions[index], *members[clusters[index]]]))
            for index in indices
        ]


class DocumentPiece(NamedTuple):
    """An image or a text of a document in a split.

    Attributes:
        kind: ``image``, ``question`` or ``answer``, see ``DocumentPart``.
        text: The text; "" for an image.
        image: Row in ``images``; -1 for a text.
    """

    kind: str
    text: str
    image: int = -1


class DocumentSplit(SplitArrays):
    """One split of a dataset of documents as arrays.

    ``images`` is ``(M, 3, H, W)`` uint8, with different images in the order of first use.
    """

    def __init__(
        self, config: DataConfig, split: str, cache: Path, *, dataset: str | None = None
    ) -> None:
        name = dataset or config.dataset
        # The files stay open only until the arrays are there, so workers need none of them.
        documents: DocumentDataset = open_dataset(config, split, name)
        super().__init__(name, split, documents.digest, cache)
        self.report = documents.report
        if documents.image_rows:
            self.images = self._cached("images", partial(_square_images, documents))
        self.lines = self._cached("documents as JSON lines", partial(_json_lines, documents))
        self.ends = self._cached(
            "ends of documents", lambda: np.flatnonzero(self.lines == ord("\n"))
        )

    def __len__(self) -> int:
        """Return the number of documents."""
        return len(self.ends)

    def pieces(self, index: int) -> list[DocumentPiece]:
        """Return the images and texts of the document at ``index`` in order."""
        start = self.ends[index - 1] + 1 if index else 0
        line = self.lines[start : self.ends[index]].tobytes()
        return [DocumentPiece(*piece) for piece in json.loads(line)]

    def texts(self) -> Iterator[str]:
        """Yield all questions and answers."""
        for index in range(len(self)):
            yield from (piece.text for piece in self.pieces(index) if piece.text)


def _square_images(documents: DocumentDataset) -> ArrayWriter:
    size = documents.image_size
    rows = (np.asarray(image).transpose(2, 0, 1) for image in documents.images())
    return ArrayWriter((len(documents.image_rows), 3, size, size), np.dtype(np.uint8), rows)


def _json_lines(documents: DocumentDataset) -> np.ndarray[Any, Any]:
    """Return the pieces of all documents as JSON bytes, about as large as the texts."""
    lines = []
    for index in range(len(documents)):
        rows = iter(documents.rows_of_images(index))
        pieces = [
            (part.kind, "", next(rows)) if part.kind == "image" else (part.kind, part.value)
            for part in documents[index].parts
        ]
        lines.append(json.dumps(pieces, ensure_ascii=False).encode() + b"\n")
    return np.frombuffer(b"".join(lines), dtype=np.uint8)


class Splits:
    """The splits of all datasets of a configuration, opened on first use."""

    def __init__(self, config: DataConfig, cache: Path) -> None:
        self.config, self.cache = config, cache
        self.opened: dict[tuple[str, str], Split | DocumentSplit] = {}

    def open(self, name: str, dataset: str | None = None) -> Split | DocumentSplit:
        """Return a split of pairs or of documents, by default of the main dataset."""
        key = (dataset or self.config.dataset, name)
        if key not in self.opened:
            kind = DocumentSplit if has_documents(key[0]) else Split
            self.opened[key] = kind(self.config, name, self.cache, dataset=key[0])
        return self.opened[key]

    def __call__(self, name: str, dataset: str | None = None) -> Split:
        """Return a split of pairs, by default of the main dataset.

        Raises:
            ValueError: If the dataset has documents.
        """
        split = self.open(name, dataset)
        if not isinstance(split, Split):
            raise ValueError(f"{split.dataset_name}: expected pairs, got a dataset of documents")
        return split

    def all(self, name: str) -> list[Split | DocumentSplit]:
        """Return the split ``name`` of every dataset of the mixture, the main one first."""
        return [self.open(name, dataset) for dataset in self.config.datasets]

    def with_images(self, name: str) -> list[SplitArrays]:
        """Return the split ``name`` of every dataset that has images."""
        return [split for split in self.all(name) if split.has_images]

    @property
    def digests(self) -> dict[str, str]:
        """Return the digests of opened splits, by ``data.split`` or ``data.split.dataset``."""
        return {
            f"data.{name}" if dataset == self.config.dataset else f"data.{name}.{dataset}": (
                split.digest
            )
            for (dataset, name), split in self.opened.items()
        }
