"""A pair of image and text, and what every dataset of pairs offers.

To add a dataset, write a class with the three members of ``PairDataset`` and name it in
``rudolph.data.splits.DATASETS``.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from PIL import Image

SPLITS = ("train", "validation", "test", "compositional")


@dataclass(frozen=True)
class Pair:
    """One image with its caption, or a question with, as its caption, the answer.

    ``key`` names the pair for ever (splits and sample files use it); ``image`` is RGB and square,
    or None where no image is asked about; ``attributes`` is what else is known of it, by name;
    ``choices`` are the answers there are to choose from, the caption among them, or nothing.
    """

    key: str
    caption: str
    image: Image.Image | None
    attributes: Mapping[str, str] = field(default_factory=dict)
    question: str = ""
    choices: tuple[str, ...] = ()


class PairDataset(Protocol):
    """One split of a dataset: as many pairs as ``len`` says, the same pair for the same index.

    ``digest`` is a SHA-256 in hexadecimal of everything that decides the pairs of this split.
    """

    digest: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Pair: ...


@runtime_checkable
class HasHardNegatives(Protocol):
    """A dataset that knows pairs that are easily taken for another."""

    def hard_negatives(self, index: int, number: int) -> list[Pair]:
        """``number`` pairs that differ from the one at ``index`` in one thing, in any split.

        All captions differ from one another and from that pair's; fewer where there are no more.
        """
        ...


@runtime_checkable
class HasClasses(Protocol):
    """A dataset whose images fall into classes; ``classes`` are captions that name them."""

    @property
    def classes(self) -> tuple[str, ...]: ...

    def class_index(self, index: int) -> int | None:
        """The class of the pair at ``index``; None for a pair of no class."""
        ...


def hash_fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text alone: a split by hash never moves a pair."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def require_split(split: str) -> None:
    """Raise ``ValueError`` when there is no such split."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
