"""Image-text pairs and the interfaces of their datasets.

To add a dataset, write a class with the members of ``PairDataset`` that is constructed as
``(config, *, split, image_size)``.  Add it to ``DATASETS`` in ``rudolph.data.splits``, and its
config under the same name to ``DataConfig``.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from PIL import Image

SPLITS = ("train", "validation", "test", "compositional")
# Those that the hash of an image file decides.
HASH_SPLITS = SPLITS[:3]


@dataclass(frozen=True)
class Pair:
    """One image with its caption, or one question whose answer is the caption.

    Attributes:
        key: Permanent name of the pair, used by splits and sample files.
        caption: Caption of the image, or answer to ``question``.
        image: Square RGB image, or None for a pair without an image.
        attributes: Further properties of the pair, keyed by name.
        question: Question, or "" for a captioned image.
        choices: Answer options, which include the caption; empty for an open question.
    """

    key: str
    caption: str
    image: Image.Image | None
    attributes: Mapping[str, str] = field(default_factory=dict)
    question: str = ""
    choices: tuple[str, ...] = ()


class PairDataset(Protocol):
    """One split of a dataset; the same index always gives the same pair.

    ``digest`` is the hexadecimal SHA-256 of everything that determines the pairs of this split.
    """

    digest: str

    def __len__(self) -> int:
        """Return the number of pairs."""
        ...

    def __getitem__(self, index: int) -> Pair:
        """Return the pair at ``index``."""
        ...


@runtime_checkable
class ReadsLazily(Protocol):
    """A dataset whose texts and images are read when they are used, not kept in memory."""

    def texts(self, column: str) -> Sequence[str]:
        """Return the texts of all pairs; ``column`` is ``key``, ``caption`` or ``question``."""
        ...

    def images(self, indices: Sequence[int] | np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Decode the images of some pairs, ``(len(indices), 3, H, W)`` uint8."""
        ...

    def image_numbers(self) -> np.ndarray[Any, Any]:
        """Return an image number for every pair, ``(N,)``, equal where images are equal."""
        ...


@runtime_checkable
class HasHardNegatives(Protocol):
    """A dataset that provides hard negatives of its pairs."""

    def hard_negatives(self, index: int, number: int) -> list[Pair]:
        """Return ``number`` pairs that differ from the pair at ``index`` in one thing.

        The negatives may be from any split.  Their captions differ from one another and from the
        caption at ``index``.  The list is shorter if there are fewer such pairs.
        """
        ...


@runtime_checkable
class HasClasses(Protocol):
    """A dataset whose images fall into classes."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Return the captions that name the classes."""
        ...

    def class_index(self, index: int) -> int | None:
        """Return the pair's class as an index of ``classes``, or None for a pair without class."""
        ...


class Shot(NamedTuple):
    """An example that precedes a pair: an image of the same split, with another caption.

    Attributes:
        pair: Index of the pair whose image and question are shown.
        caption: Caption that replaces that pair's own.
    """

    pair: int
    caption: str


@runtime_checkable
class HasShots(Protocol):
    """A few-shot dataset: each pair is the last of an episode of several images."""

    @property
    def max_shots(self) -> int:
        """Return the number of shots of a training episode."""
        ...

    def shots(self, index: int, number: int) -> list[Shot]:
        """Return ``number`` shots that precede the pair at ``index``.

        The shots for a smaller ``number`` are a prefix of those for a larger one.
        """
        ...

    def chance(self, number: int) -> float:
        """Return the accuracy of a model that ignores all images, after ``number`` shots."""
        ...


def hash_fraction(text: str) -> float:
    """Return a number in [0, 1) that depends on the text alone, so that hash splits are stable."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def require_split(split: str) -> None:
    """Raise ``ValueError`` if ``split`` is not one of ``SPLITS``."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")


def require_hash_split(split: str, owner: str) -> None:
    """Raise ``ValueError`` unless ``split`` is one of the three that hashes decide.

    Args:
        split: Name of the split.
        owner: Kind of the dataset for the message, with its article.
    """
    require_split(split)
    if split not in HASH_SPLITS:
        raise ValueError(f"split {split!r}: {owner} has none, legal are {', '.join(HASH_SPLITS)}")
