"""Your own pairs: a table of image paths and captions, and of questions where there are any.

Image paths are absolute, or relative to the folder of the table.  Text is UTF-8.  Every picture
is opened once when a ``Manifest`` is made; bad rows are skipped, counted and named in its report.
"""

import hashlib
import json
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from rudolph.data.funnel import FunnelReport, Rejected, centre_square, open_picture
from rudolph.data.pairs import Pair, hash_fraction, require_split
from rudolph.data.tables import ManifestConfig, Row, find_table, read_rows

# Part of every digest: raise it when the same files would give other pairs.
PAIRS_VERSION = 2


class Examined(NamedTuple):
    """A picture that can be used: SHA-256 of its file, what converts it, its shorter side."""

    sha256: str
    changes: tuple[str, ...]
    side: int


@dataclass(frozen=True)
class Entry:
    """A usable row.  ``sha256`` is that of the picture's file."""

    key: str
    caption: str
    path: str
    sha256: str
    question: str = ""


class Manifest:
    """One split of the pairs of a table: 90% train, 5% validation, 5% test, by picture.

    The hash of a picture's file says where all its captions belong: rows may be added, reordered
    or renamed without moving any other to another split, and no picture is in two.  A key is the
    image path and the caption.

    Args:
        config: the table and its columns.
        split: "train", "validation" or "test".
        image_size: side of the square pictures, in pixels.
        progress: called with (rows done, all rows) while the pictures are opened.

    Raises:
        ValueError: in one line, where the table cannot be read, lacks a column, has more bad rows
            than ``max_bad_share`` or no pair in this split.
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
        table = find_table(config.path)
        self.image_size = image_size
        self.report = FunnelReport()
        entries = self._usable(read_rows(table, config), table.parent, progress=progress)
        if self.report.rows == 0:
            raise ValueError(f"{table}: the table has no rows")
        self.report.require_few_bad(str(table), max_bad_share=config.max_bad_share)
        self.entries = [entry for entry in entries if split_of(entry.sha256) == split]
        if not self.entries:
            raise ValueError(
                f"{table}: none of its {self.report.kept} usable rows falls into the split "
                f"{split!r} (90% train, 5% validation, 5% test): give it more rows"
            )
        self.digest = self._digest()

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Pair:
        """The pair; ``ValueError`` when its picture is no longer the one that was examined."""
        entry = self.entries[index]
        data = Path(entry.path).read_bytes()
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise ValueError(f"{entry.path}: the picture changed after the manifest was read")
        image = centre_square(open_picture(data).image, self.image_size)
        return Pair(entry.key, entry.caption, image, question=entry.question)

    def _usable(
        self,
        rows: Sequence[Row],
        folder: Path,
        *,
        progress: Callable[[int, int], None] | None,
    ) -> list[Entry]:
        """The rows that survive, in the table's order; fills the report."""
        entries = []
        for done, row in enumerate(rows, start=1):
            name = f"{row.place} {row.image}" if isinstance(row.image, str) else row.place
            try:
                entry, examined = _examine_row(row, folder)
            except Rejected as rejected:
                self.report.skip(name, rejected.reason)
            else:
                is_enlarged = examined.side < self.image_size
                self.report.keep(name, examined.changes + ("enlarged",) * is_enlarged)
                entries.append(entry)
            if progress is not None:
                progress(done, len(rows))
        return entries

    def _digest(self) -> str:
        digest = hashlib.sha256(f"manifest {PAIRS_VERSION} {self.image_size}\n".encode())
        for entry in self.entries:
            told = [entry.question] if entry.question else []
            line = json.dumps([entry.key, entry.caption, entry.sha256, *told])
            digest.update(line.encode() + b"\n")
        return digest.hexdigest()


def split_of(sha256: str) -> str:
    """The split that a picture belongs to, for ever, by the SHA-256 of its file."""
    fraction = hash_fraction(sha256)
    if fraction < 0.90:
        return "train"
    return "validation" if fraction < 0.95 else "test"


def _examine_row(row: Row, folder: Path) -> tuple[Entry, Examined]:
    if row.fault:
        raise Rejected(row.fault)
    name = _text(row.image, missing="no image path", wrong="image path is not text")
    caption = _text(row.caption, missing="empty caption", wrong="caption is not text").strip()
    question = ""
    if row.question is not None:
        question = _text(row.question, missing="empty question", wrong="question is not text")
    base = Path(os.path.abspath(folder))
    path = os.path.abspath(base / name)
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise Rejected("missing file")
        signature = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        examined = _examine_picture(path, signature)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Rejected("missing file") from error
    except OSError as error:
        raise Rejected("unreadable file") from error
    # A folder that is moved as a whole keeps its keys.
    stable = Path(path)
    if stable.is_relative_to(base) or not os.path.isabs(name):
        stable = Path(os.path.relpath(path, base))
    key = " | ".join(part for part in (stable.as_posix(), question, caption) if part)
    return Entry(key, caption, path, examined.sha256, question), examined


# Kept in memory, so that the three splits of a table decode its pictures once; the signature
# makes a changed file a new question.
@cache
def _examine_picture(path: str, signature: tuple[int, ...]) -> Examined:
    data = Path(path).read_bytes()
    picture = open_picture(data)
    return Examined(hashlib.sha256(data).hexdigest(), picture.changes, min(picture.image.size))


def _text(value: object, *, missing: str, wrong: str) -> str:
    if value is None or (isinstance(value, float) and value != value):
        raise Rejected(missing)
    if not isinstance(value, str):
        raise Rejected(wrong)
    if not value.strip():
        raise Rejected(missing)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Rejected(wrong) from error
    if "\0" in value:
        raise Rejected(wrong)
    return value
