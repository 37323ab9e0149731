"""Your own pairs: a table of image paths and captions, in CSV, TSV, JSONL or Parquet.

Image paths are absolute, or relative to the folder of the table.  Text is UTF-8.  Every picture
is opened once when a ``Manifest`` is made; bad rows are skipped, counted and named in its report.

To read another kind of table, write its reader and name its suffix in ``READERS``.
"""

import csv
import difflib
import hashlib
import io
import json
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from rudolph.data.funnel import FunnelReport, Rejected, centre_square, open_picture
from rudolph.data.pairs import Pair, hash_fraction, require_split

# Part of every digest: raise it when the same files would give other pairs.
PAIRS_VERSION = 2


@dataclass(frozen=True)
class ManifestConfig:
    """Where the pairs are, and which share of bad rows stops the run.

    ``path`` is the table, or a folder that holds exactly one table.
    """

    path: str = ""
    image_column: str = "image"
    caption_column: str = "caption"
    max_bad_share: float = 0.05

    def __post_init__(self) -> None:
        if not 0.0 <= self.max_bad_share <= 1.0:
            raise ValueError(f"max_bad_share must be from 0 to 1, got {self.max_bad_share}")
        if self.image_column == self.caption_column:
            raise ValueError(
                f"image_column and caption_column must differ, both are {self.image_column!r}"
            )


class Row(NamedTuple):
    """A row as it stands in the table; ``place`` says where, ``fault`` why it cannot be read."""

    place: str
    image: object = None
    caption: object = None
    fault: str = ""


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
        return Pair(key=entry.key, caption=entry.caption, image=image)

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
            line = json.dumps([entry.key, entry.caption, entry.sha256])
            digest.update(line.encode() + b"\n")
        return digest.hexdigest()


def split_of(sha256: str) -> str:
    """The split that a picture belongs to, for ever, by the SHA-256 of its file."""
    fraction = hash_fraction(sha256)
    if fraction < 0.90:
        return "train"
    return "validation" if fraction < 0.95 else "test"


def find_table(path: str) -> Path:
    """The table at ``path``, or the only one in the folder ``path``; else ``ValueError``."""
    legal = ", ".join(READERS)
    table = Path(path)
    if not path:
        raise ValueError(f"path of the manifest is empty: give a table ({legal}) or its folder")
    if table.is_dir():
        found = sorted(file for file in table.iterdir() if file.suffix.lower() in READERS)
        if len(found) != 1:
            names = ", ".join(file.name for file in found[:5]) or "none"
            raise ValueError(
                f"{table}: the folder must hold exactly one table ({legal}), "
                f"it holds {len(found)}: {names}"
            )
        table = found[0]
    if not table.is_file():
        raise ValueError(f"{table}: no such file or folder")
    if table.suffix.lower() not in READERS:
        raise ValueError(f"{table}: a manifest must end in one of {legal}")
    return table


def read_rows(table: Path, config: ManifestConfig) -> list[Row]:
    """Every row of a table, a malformed one with its fault; ``ValueError`` if none can be read."""
    return READERS[table.suffix.lower()](table, config)


def _examine_row(row: Row, folder: Path) -> tuple[Entry, Examined]:
    if row.fault:
        raise Rejected(row.fault)
    name = _text(row.image, missing="no image path", wrong="image path is not text")
    caption = _text(row.caption, missing="empty caption", wrong="caption is not text").strip()
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
    key = f"{stable.as_posix()} | {caption}"
    return Entry(key, caption, path, examined.sha256), examined


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


def _read_csv(table: Path, config: ManifestConfig) -> list[Row]:
    return _read_delimited(table, config, delimiter=",")


def _read_tsv(table: Path, config: ManifestConfig) -> list[Row]:
    return _read_delimited(table, config, delimiter="\t")


def _read_delimited(table: Path, config: ManifestConfig, *, delimiter: str) -> list[Row]:
    """Quotes as in RFC 4180, with either delimiter; the first row names the columns."""
    records = _records(_decoded(table), delimiter)
    header = next(records, None)
    if header is None or header.fields is None:
        raise ValueError(f"{table}: the first line must name the columns, it cannot be read")
    columns = header.fields
    _require_columns(table, columns, config=config)
    image = columns.index(config.image_column)
    caption = columns.index(config.caption_column)
    rows = []
    for record in records:
        if record.fields is not None and len(record.fields) == len(columns):
            place = f"line {record.first_line}"
            rows.append(Row(place, record.fields[image], record.fields[caption]))
            continue
        # A quote that never closes swallows the lines below it, so each of them counts as bad.
        for line in range(record.first_line, record.last_line + 1):
            rows.append(Row(f"line {line}", fault="malformed row"))
    return rows


class _Record(NamedTuple):
    first_line: int
    last_line: int
    fields: list[str] | None


def _records(text: str, delimiter: str) -> Iterator[_Record]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    while True:
        first_line = reader.line_num + 1
        fields: list[str] | None
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error:
            fields = None
        if fields != []:
            yield _Record(first_line, max(first_line, reader.line_num), fields)


def _read_jsonl(table: Path, config: ManifestConfig) -> list[Row]:
    rows = []
    columns: dict[str, None] = {}
    # Not splitlines: JSON strings may hold U+2028 and its kin as they are.
    for number, line in enumerate(_decoded(table).split("\n"), start=1):
        if not line.strip():
            continue
        place = f"line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            columns.update(dict.fromkeys(value))
            image, caption = value.get(config.image_column), value.get(config.caption_column)
            rows.append(Row(place, image, caption))
        else:
            rows.append(Row(place, fault="malformed row"))
    if columns:
        _require_columns(table, list(columns), config=config)
    return rows


def _read_parquet(table: Path, config: ManifestConfig) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        _require_columns(table, pyarrow.parquet.read_schema(table).names, config=config)
        wanted = [config.image_column, config.caption_column]
        columns = pyarrow.parquet.read_table(table, columns=wanted)
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{table}: not a readable Parquet file: {reason}") from error
    pairs = zip(*(columns.column(name) for name in wanted), strict=True)
    return [
        _parquet_row(f"row {number}", image=image, caption=caption)
        for number, (image, caption) in enumerate(pairs, start=1)
    ]


def _parquet_row(place: str, *, image: Any, caption: Any) -> Row:
    try:
        return Row(place, image.as_py(), caption.as_py())
    except UnicodeDecodeError:
        return Row(place, fault="malformed row")


def _decoded(table: Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark."""
    data = table.read_bytes()
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{table}: not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start} "
            f"(line {line}); save the table as UTF-8"
        ) from error


def _require_columns(table: Path, columns: Sequence[str], *, config: ManifestConfig) -> None:
    for wanted in (config.image_column, config.caption_column):
        if columns.count(wanted) == 1:
            continue
        found = ", ".join(map(repr, columns))
        if wanted in columns:
            raise ValueError(f"{table}: more than one column {wanted!r}; columns found: {found}")
        nearest = difflib.get_close_matches(wanted, columns, n=1, cutoff=0.5)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        for delimiter, name in (";", "semicolons"), ("\t", "tabs"), (",", "commas"):
            if len(columns) == 1 and delimiter in columns[0]:
                hint = f"; its header is separated by {name}: .csv needs commas, .tsv tabs"
        raise ValueError(f"{table}: no column {wanted!r}; columns found: {found}{hint}")


READERS: dict[str, Callable[[Path, ManifestConfig], list[Row]]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
