"""Pairs from a user's own table of image paths and captions, and optionally questions.

Image paths are absolute or relative to the folder of the table, and text is UTF-8.  Creating a
``Manifest`` opens every image once.  Bad rows are skipped; ``Manifest.report`` counts and lists
them.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from rudolph.data.datasets.table_parquet import EmbeddedImage, StoredImage
from rudolph.data.datasets.tables import ManifestConfig, TableRow, find_table, read_rows, type_name
from rudolph.data.image_files import RejectedError, RowReport, center_crop, decode_image
from rudolph.data.pairs import HASH_SPLITS, Pair, hash_fraction, require_hash_split
from rudolph.sequence.texts import clean_text

# Part of every digest; increment it when the same files give other pairs.
MANIFEST_PAIRS_VERSION = 2
URL = re.compile(r"[a-z][a-z0-9+.-]*://|data:", re.IGNORECASE)


class ExaminedImage(NamedTuple):
    """A usable image: the SHA-256 of its file, the conversions it needs, and its shorter side."""

    sha256: str
    changes: tuple[str, ...]
    side: int


@dataclass(frozen=True)
class ManifestEntry:
    """A usable row of the table.

    ``sha256`` is the hash of the image file.  If the image is stored inside the table or archive,
    ``stored`` locates it and ``path`` is that file.
    """

    key: str
    caption: str
    path: str
    sha256: str
    question: str = ""
    stored: StoredImage | EmbeddedImage | None = None

    def data(self) -> bytes:
        """Return the bytes of the image file."""
        if self.stored is not None:
            return self.stored.data() or b""
        return Path(self.path).read_bytes()


class ExaminedTable(NamedTuple):
    """A table, its usable rows in order, and the report of all rows."""

    table: Path
    entries: list[ManifestEntry]
    report: RowReport


class Manifest:
    """One split of the pairs of a table: 90% train, 5% validation or 5% test.

    The hash of the image file decides the split of all its captions.  Rows can therefore be added,
    reordered or renamed without moving another row to a different split, and no image is in two
    splits.  Only in small tables, validation and test take an image each from train if they would
    be empty.  A key consists of image path, question and caption.

    Args:
        config: The table and its columns.
        split: "train", "validation" or "test".
        image_size: Side of the square images, in pixels.
        progress: Called with (completed rows, all rows) while the images are opened.

    Raises:
        ValueError: With a one-line message, if the table cannot be read, lacks a column, has no
            pair in this split, or exceeds ``max_bad_fraction``.
    """

    def __init__(
        self,
        config: ManifestConfig,
        *,
        split: str,
        image_size: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        require_hash_split(split, "a manifest")
        if image_size < 1:
            raise ValueError(f"image_size must be at least 1 pixel, got {image_size}")
        examined = examine_table(config, image_size=image_size, progress=progress)
        self.image_size = image_size
        self.report = examined.report
        self.report.require_usable(str(examined.table), max_bad_fraction=config.max_bad_fraction)
        splits = splits_of_images(entry.sha256 for entry in examined.entries)
        self.entries = [entry for entry in examined.entries if splits[entry.sha256] == split]
        if not self.entries:
            raise ValueError(
                f"{examined.table}: none of its {self.report.num_kept} usable rows falls into the "
                f"split {split!r}: give it at least {len(HASH_SPLITS)} different images"
            )
        self.digest = self._digest()

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.entries)

    def __getitem__(self, index: int) -> Pair:
        """Return the pair at ``index``.

        Raises:
            ValueError: If its image can no longer be read or has changed.
        """
        entry = self.entries[index]
        image = square_image(entry.path, entry.data, sha256=entry.sha256, size=self.image_size)
        return Pair(entry.key, entry.caption, image, question=entry.question)

    def _digest(self) -> str:
        digest = hashlib.sha256(f"manifest {MANIFEST_PAIRS_VERSION} {self.image_size}\n".encode())
        for entry in self.entries:
            question = [entry.question] if entry.question else []
            line = json.dumps([entry.key, entry.caption, entry.sha256, *question])
            digest.update(line.encode() + b"\n")
        return digest.hexdigest()


def square_image(path: str, read: Callable[[], bytes], *, sha256: str, size: int) -> Image.Image:
    """Return an image that was examined before, as a square of ``size`` pixels per side.

    Args:
        path: File for the messages.
        read: Returns the bytes of the image file.
        sha256: SHA-256 of these bytes when they were examined.
        size: Side in pixels.

    Raises:
        ValueError: If the image can no longer be read or has changed.
    """
    try:
        data = read()
    except OSError as error:
        raise ValueError(f"{path}: the image can no longer be read") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(f"{path}: the image changed after the data was read")
    return center_crop(decode_image(data).image, size)


def split_of_image(sha256: str) -> str:
    """Return the permanent split of an image, given the SHA-256 of its file."""
    fraction = hash_fraction(sha256)
    if fraction < 0.90:
        return "train"
    return "validation" if fraction < 0.95 else "test"


def splits_of_images(digests: Iterable[str]) -> dict[str, str]:
    """Return the split of each image of a table, given the SHA-256 of the files.

    Validation and test take an image from train if they would be empty and train has another.

    >>> splits_of_images(["a", "b", "c"])
    {'a': 'validation', 'b': 'test', 'c': 'train'}
    """
    splits = {digest: split_of_image(digest) for digest in digests}
    for name in HASH_SPLITS[1:]:
        trained = [digest for digest, split in splits.items() if split == "train"]
        if name not in splits.values() and len(trained) > 1:
            splits[max(trained, key=hash_fraction)] = name
    return splits


def examine_table(
    config: ManifestConfig,
    *,
    image_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> ExaminedTable:
    """Open every image of a table and return the usable rows of all splits.

    Args:
        config: The table and its columns.
        image_size: Side in pixels; smaller images are reported as enlarged.
        progress: Called with (completed rows, all rows) after each row.

    Raises:
        ValueError: With a one-line message, if the table cannot be read, lacks a column or has no
            rows.
    """
    if image_size < 1:
        raise ValueError(f"image_size must be at least 1 pixel, got {image_size}")
    table = find_table(config.path)
    rows = read_rows(table, config)
    if not rows:
        raise ValueError(f"{table}: the table has no rows")
    report, entries = RowReport(), []
    for done, row in enumerate(rows, start=1):
        entry = examine_row(row, table.parent, config, report, image_size=image_size)
        if entry is not None:
            entries.append(entry)
        if progress is not None:
            progress(done, len(rows))
    return ExaminedTable(table, entries, report)


def examine_row(
    row: TableRow,
    folder: Path,
    config: ManifestConfig,
    report: RowReport,
    *,
    image_size: int = 1,
) -> ManifestEntry | None:
    """Open the image of a row and return the row if it is usable; count it in the report.

    Args:
        row: The row.
        folder: Folder to which image paths are relative.
        config: Names of the columns, for messages.
        report: Counts the row.
        image_size: Smaller images are reported as enlarged, in pixels.
    """
    path = row.image.path if isinstance(row.image, StoredImage | EmbeddedImage) else row.image
    name = f"{row.location} {path}" if isinstance(path, str) else row.location
    try:
        entry, examined = _examine_row(row, folder, config)
    except RejectedError as rejected:
        report.skip(name, rejected.reason)
        return None
    report.keep(name, examined.changes + ("enlarged",) * (examined.side < image_size))
    return entry


def forget_examined_images() -> None:
    """Empty the caches of examined images, which otherwise grow with every image."""
    _examine_image.cache_clear()
    _EXAMINED_DATA.clear()


def _examine_row(
    row: TableRow, folder: Path, config: ManifestConfig
) -> tuple[ManifestEntry, ExaminedImage]:
    if row.error:
        raise RejectedError(row.error)
    stored = row.image if isinstance(row.image, StoredImage | EmbeddedImage) else None
    data = None if stored is None else stored.data()
    path_given = row.image if stored is None else stored.path
    name = "" if data else checked_text(path_given, "image path", config.image_column)
    caption = cleaned_text(row.caption, "caption", config.caption_column).strip()
    question = ""
    if row.question is not None:
        question = cleaned_text(row.question, "question", str(config.question_column))
    if stored is not None and data is not None:
        examined = _examine_data(data)
        # Paths from other machines can repeat, so the hash distinguishes the images.
        name = f"{stored.path or ''}#{examined.sha256[:16]}"
        key = " | ".join(part for part in (name, question, caption) if part)
        return ManifestEntry(
            key, caption, stored.table, examined.sha256, question, stored
        ), examined
    base_folder = Path(os.path.abspath(folder))
    path = os.path.abspath(base_folder / name)
    examined = examine_file(path, name, config.image_column)
    # With relative paths, the keys stay the same when the whole folder is moved.
    key_path = Path(path)
    if key_path.is_relative_to(base_folder) or not os.path.isabs(name):
        key_path = Path(os.path.relpath(path, base_folder))
    key = " | ".join(part for part in (key_path.as_posix(), question, caption) if part)
    return ManifestEntry(key, caption, path, examined.sha256, question), examined


def examine_file(path: str, name: str, column: str) -> ExaminedImage:
    """Examine the image at ``path``, whose name in the column of a table is ``name``.

    Raises:
        RejectedError: If the image is missing, unreadable or unusable.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise RejectedError("missing file")
        signature = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        return _examine_image(path, signature)
    except OSError as error:
        # A data URI fails because it is too long for a path, not because a file is missing.
        if URL.match(name):
            raise RejectedError(
                f"images are URLs in column {column} (download them, write paths)"
            ) from error
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise RejectedError("unreadable file") from error
        if "\\" in name:
            raise RejectedError("missing file (write its path with / instead of \\)") from error
        raise RejectedError("missing file") from error


# Cached so that the three splits of a table decode its images once; the signature makes a
# changed file a different key.
@cache
def _examine_image(path: str, signature: tuple[int, ...]) -> ExaminedImage:
    data = Path(path).read_bytes()
    image = decode_image(data)
    return ExaminedImage(hashlib.sha256(data).hexdigest(), image.changes, min(image.image.size))


# Keyed by hash, so that the cache does not keep the image bytes of a table in memory.
_EXAMINED_DATA: dict[str, ExaminedImage] = {}


def _examine_data(data: bytes) -> ExaminedImage:
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 not in _EXAMINED_DATA:
        image = decode_image(data)
        _EXAMINED_DATA[sha256] = ExaminedImage(sha256, image.changes, min(image.image.size))
    return _EXAMINED_DATA[sha256]


def cleaned_text(value: object, description: str, column: str) -> str:
    """Return a caption or question after cleaning; raise ``RejectedError`` if empty."""
    text = clean_text(checked_text(value, description, column))
    if not text.strip():
        raise RejectedError(f"empty {description}")
    return text


def checked_text(value: object, description: str, column: str) -> str:
    """Return ``value`` if it is non-blank text, else raise ``RejectedError``."""
    missing = f"no {description}" if description == "image path" else f"empty {description}"
    if value is None or (isinstance(value, float) and value != value):
        raise RejectedError(missing)
    if not isinstance(value, str):
        raise RejectedError(f"{description}s are {type_name(value)} in column {column}")
    if not value.strip():
        raise RejectedError(missing)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RejectedError(f"{description} is not text") from error
    if "\0" in value:
        raise RejectedError(f"{description} is not text")
    return value
