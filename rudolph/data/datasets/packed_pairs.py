"""Packed pairs as a dataset: the shards that ``rudolph data pack`` writes.

Nothing is read before it is used, so opening takes milliseconds for any number of pairs.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rudolph.data.image_files import center_crop, decode_image
from rudolph.data.pairs import Pair
from rudolph.data.shards.reader import ShardReader, TextColumn

# Part of every digest; increment it when the same shards give other pairs.
PACKED_PAIRS_VERSION = 1


@dataclass(frozen=True)
class PackedPairsConfig:
    """Configuration of packed pairs.

    Attributes:
        path: Folder that ``rudolph data pack`` wrote.
    """

    path: str = ""


class PackedPairs:
    """One split of packed pairs, by the hash of the image file as in a manifest.

    Args:
        config: The folder.
        split: "train", "validation" or "test".
        image_size: Side of the square images, in pixels.

    Raises:
        ValueError: In one line, if the folder has no packed pairs or none of this split.
    """

    def __init__(self, config: PackedPairsConfig, *, split: str, image_size: int) -> None:
        if not config.path:
            raise ValueError("data.packed.path: expected the folder of packed pairs, got ''")
        if image_size < 1:
            raise ValueError(f"image_size must be at least 1 pixel, got {image_size}")
        self.image_size = image_size
        self.reader = ShardReader(Path(config.path), split)
        content = f"packed {PACKED_PAIRS_VERSION} {image_size} {self.reader.digest}"
        self.digest = hashlib.sha256(content.encode()).hexdigest()

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.reader)

    def __getitem__(self, index: int) -> Pair:
        """Return the pair at ``index``."""
        row = self.reader.row(index)
        return Pair(
            row["key"], row["caption"], self._image(row["image"]), question=row["question"]
        )

    def texts(self, column: str) -> TextColumn:
        """Return the keys, captions or questions (``key``, ``caption``, ``question``)."""
        return TextColumn(self.reader, column)

    def images(self, indices: Sequence[int] | np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Decode the images of some pairs, ``(len(indices), 3, H, W)`` uint8."""
        images = [self._image(self.reader.cell("image", int(index))) for index in indices]
        return np.stack([np.asarray(image).transpose(2, 0, 1) for image in images])

    def image_numbers(self) -> np.ndarray[Any, Any]:
        """Return an image number for every pair, ``(N,)``, equal where image files are equal."""
        starts = (int.from_bytes(digest[:8], "big") for digest in self.reader.cells("sha256"))
        digests = np.fromiter(starts, np.uint64, len(self))
        return np.unique(digests, return_inverse=True)[1]

    def _image(self, data: bytes) -> Image.Image:
        return center_crop(decode_image(data).image, self.image_size)
