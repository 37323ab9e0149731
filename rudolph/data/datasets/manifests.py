"""Your own pairs: a table of image paths and captions, and of questions where there are any.

Image paths are absolute, or relative to the folder of the table.  Text is UTF-8.  Every image
is opened once when a ``Manifest`` is made; bad rows are skipped, counted and named in its report.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from rudolph.data.datasets.table_parquet import StoredImage
from rudolph.data.datasets.tables import ManifestConfig, TableRow, find_table, kind_of, read_rows
from rudolph.data.image_files import RejectedError, RowReport, center_crop, decode_image
from rudolph.data.pairs import Pair, hash_fraction, require_split
from rudolph.sequence.texts import clean_text

# Part of every digest: raise it when the same files would give other pairs.
MANIFEST_PAIRS_VERSION = 2
URL = re.compile(r"[a-z][a-z0-9+.-]*://|data:", re.IGNORECASE)


class ExaminedImage(NamedTuple):
    """An image that can be used: SHA-256 of its file, what converts it, its shorter side."""

    sha256: str
    changes: tuple[str, ...]
    side: int


@dataclass(frozen=True)
class ManifestEntry:
    """A usable row.  ``sha256`` is that of the image's file.

    ``stored`` is where the table itself holds the image; ``path`` is then the table.
    """

    key: str
    caption: str
    path: str
    sha256: str
    question: str = ""
    stored: StoredImage | None = None

    def data(self) -> bytes:
        """Return the bytes of the image's file."""
        if self.stored is not None:
            return self.stored.data() or b""
        return Path(self.path).read_bytes()


class ExaminedTable(NamedTuple):
    """A table, its usable rows in their order and the report of the others."""

    table: Path
    entries: list[ManifestEntry]
    report: RowReport


class Manifest:
    """One split of the pairs of a table: 90% train, 5% validation, 5% test, by image.

    The hash of an image's file says where all its captions belong: rows may be added, reordered
    or renamed without moving any other to another split, and no image is in two.  A key is the
    image path and the caption.

    Args:
        config: the table and its columns.
        split: "train", "validation" or "test".
        image_size: side of the square images, in pixels.
        progress: called with (rows done, all rows) while the images are opened.

    Raises:
        ValueError: in one line, where the table cannot be read, lacks a column, has more bad rows
            than ``max_bad_fraction`` or no pair in this split.
    """

    def __init__(
        self,
        config: ManifestConfig,
        *,
        split: str,
        image_size: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        require_split(split)
        if split == "compositional":
            raise ValueError(
                "split 'compositional': a manifest has none, legal are train, validation, test"
            )
        if image_size < 1:
            raise ValueError(f"image_size must be at least 1 pixel, got {image_size}")
        examined = examine_table(config, image_size=image_size, progress=progress)
        self.image_size = image_size
        self.report = examined.report
        self.report.require_usable(str(examined.table), max_bad_fraction=config.max_bad_fraction)
        self.entries = [
            entry for entry in examined.entries if split_of_image(entry.sha256) == split
        ]
        if not self.entries:
            raise ValueError(
                f"{examined.table}: none of its {self.report.kept} usable rows falls into the "
                f"split {split!r} (90% train, 5% validation, 5% test): give it more rows"
            )
        self.digest = self._digest()

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Pair:
        """The pair; ``ValueError`` when its image is no longer the one that was examined."""
        entry = self.entries[index]
        try:
            data = entry.data()
        except OSError as error:
            raise ValueError(f"{entry.path}: the image can no longer be read") from error
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise ValueError(f"{entry.path}: the image changed after the manifest was read")
        image = center_crop(decode_image(data).image, self.image_size)
        return Pair(entry.key, entry.caption, image, question=entry.question)

    def _digest(self) -> str:
        digest = hashlib.sha256(f"manifest {MANIFEST_PAIRS_VERSION} {self.image_size}\n".encode())
        for entry in self.entries:
            told = [entry.question] if entry.question else []
            line = json.dumps([entry.key, entry.caption, entry.sha256, *told])
            digest.update(line.encode() + b"\n")
        return digest.hexdigest()


def split_of_image(sha256: str) -> str:
    """The split that an image belongs to, for ever, by the SHA-256 of its file."""
    fraction = hash_fraction(sha256)
    if fraction < 0.90:
        return "train"
    return "validation" if fraction < 0.95 else "test"


def examine_table(
    config: ManifestConfig,
    *,
    image_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> ExaminedTable:
    """Open every image of a table and return the usable rows of all splits.

    Raises:
        ValueError: in one line, if the table cannot be read, lacks a column or has no rows.
    """
    if image_size < 1:
        raise ValueError(f"image_size must be at least 1 pixel, got {image_size}")
    table = find_table(config.path)
    rows = read_rows(table, config)
    if not rows:
        raise ValueError(f"{table}: the table has no rows")
    report, entries = RowReport(), []
    for done, row in enumerate(rows, start=1):
        path = row.image.path if isinstance(row.image, StoredImage) else row.image
        name = f"{row.place} {path}" if isinstance(path, str) else row.place
        try:
            entry, examined = _examine_row(row, table.parent, config)
        except RejectedError as rejected:
            report.skip(name, rejected.reason)
        else:
            report.keep(name, examined.changes + ("enlarged",) * (examined.side < image_size))
            entries.append(entry)
        if progress is not None:
            progress(done, len(rows))
    return ExaminedTable(table, entries, report)


def _examine_row(
    row: TableRow, folder: Path, config: ManifestConfig
) -> tuple[ManifestEntry, ExaminedImage]:
    if row.fault:
        raise RejectedError(row.fault)
    stored = row.image if isinstance(row.image, StoredImage) else None
    data = None if stored is None else stored.data()
    path_given = row.image if stored is None else stored.path
    name = "" if data else _text(path_given, "image path", config.image_column)
    caption = _clean(row.caption, "caption", config.caption_column).strip()
    question = ""
    if row.question is not None:
        question = _clean(row.question, "question", str(config.question_column))
    if stored is not None and data is not None:
        examined = _examine_data(data)
        # Paths of other machines may repeat; the hash tells the images apart.
        name = f"{stored.path or ''}#{examined.sha256[:16]}"
        key = " | ".join(part for part in (name, question, caption) if part)
        return ManifestEntry(
            key, caption, stored.table, examined.sha256, question, stored
        ), examined
    base = Path(os.path.abspath(folder))
    path = os.path.abspath(base / name)
    examined = _examine_file(path, name, config)
    # A folder that is moved as a whole keeps its keys.
    stable = Path(path)
    if stable.is_relative_to(base) or not os.path.isabs(name):
        stable = Path(os.path.relpath(path, base))
    key = " | ".join(part for part in (stable.as_posix(), question, caption) if part)
    return ManifestEntry(key, caption, path, examined.sha256, question), examined


def _examine_file(path: str, name: str, config: ManifestConfig) -> ExaminedImage:
    """Open the image at ``path``, which the table calls ``name``."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise RejectedError("missing file")
        signature = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        return _examine_image(path, signature)
    except OSError as error:
        # The path of a data URI is too long rather than missing.
        if URL.match(name):
            raise RejectedError(
                f"images are URLs in column {config.image_column} (download them, write paths)"
            ) from error
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise RejectedError("unreadable file") from error
        if "\\" in name:
            raise RejectedError("missing file (write its path with / instead of \\)") from error
        raise RejectedError("missing file") from error


# Kept in memory, so that the three splits of a table decode its images once; the signature
# makes a changed file a new question.
@cache
def _examine_image(path: str, signature: tuple[int, ...]) -> ExaminedImage:
    data = Path(path).read_bytes()
    image = decode_image(data)
    return ExaminedImage(hashlib.sha256(data).hexdigest(), image.changes, min(image.image.size))


# By the hash alone: bytes in a table must not be kept.
_EXAMINED_DATA: dict[str, ExaminedImage] = {}


def _examine_data(data: bytes) -> ExaminedImage:
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 not in _EXAMINED_DATA:
        image = decode_image(data)
        _EXAMINED_DATA[sha256] = ExaminedImage(sha256, image.changes, min(image.image.size))
    return _EXAMINED_DATA[sha256]


def _clean(value: object, what: str, column: str) -> str:
    """Return a caption or question as it enters the package; a path stays as it is on disk."""
    text = clean_text(_text(value, what, column))
    if not text.strip():
        raise RejectedError(f"empty {what}")
    return text


def _text(value: object, what: str, column: str) -> str:
    """Return ``value`` if it is text and not blank; else the reason names ``what`` it is."""
    missing = f"no {what}" if what == "image path" else f"empty {what}"
    if value is None or (isinstance(value, float) and value != value):
        raise RejectedError(missing)
    if not isinstance(value, str):
        raise RejectedError(f"{what}s are {kind_of(value)} in column {column}")
    if not value.strip():
        raise RejectedError(missing)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RejectedError(f"{what} is not text") from error
    if "\0" in value:
        raise RejectedError(f"{what} is not text")
    return value
