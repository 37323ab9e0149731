"""An image-text pair, and what every dataset of pairs offers.

To add a dataset, write a class with the three members of ``PairDataset`` and name it in
``rudolph.data.module.DATASETS``.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from PIL import Image

SPLITS = ("train", "validation", "test", "compositional")


@dataclass(frozen=True)
class Pair:
    """One picture with its caption, or with a question and, as its caption, the answer.

    ``key`` names the pair for ever (splits and sample files use it); ``image`` is RGB and square;
    ``attributes`` is what else is known of it, by name.
    """

    key: str
    caption: str
    image: Image.Image
    attributes: Mapping[str, str] = field(default_factory=dict)
    question: str = ""


class PairDataset(Protocol):
    """One split of a dataset: as many pairs as ``len`` says, the same pair for the same index.

    ``digest`` is a SHA-256 in hexadecimal of everything that decides the pairs of this split.
    """

    digest: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Pair: ...


def hash_fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text alone: a split by hash never moves a pair."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def require_split(split: str) -> None:
    """Raise ``ValueError`` when there is no such split."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
