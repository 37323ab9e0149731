"""Sources of packed pairs, cut into parts: tables of pairs, and archives of img2dataset.

A part is as much as one worker packs at a time.  It is small enough to be sent to a worker: a tar
file, or up to ``PART_ROWS`` rows of a table, which hold texts and the places of images.
"""

import hashlib
import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import IO

from rudolph.data.datasets.table_parquet import EmbeddedImage, StoredImage
from rudolph.data.datasets.tables import (
    PARQUET,
    ManifestConfig,
    TableRow,
    count_rows,
    find_table,
    iterate_rows,
)
from rudolph.data.shards.layout import PART_ROWS, SHARD_VERSION

CAPTION_SUFFIX, RECORD_SUFFIX = ".txt", ".json"
IMAGE_SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".png",
    ".webp",
    ".avif",
    ".gif",
    ".bmp",
    ".tif",
    ".tiff",
    ".jp2",
)


@dataclass(frozen=True)
class SourcePart:
    """A part of a source.

    Attributes:
        number: Its number, from 0.
        digest: Digest of its rows and of the settings that read them.
        folder: Folder to which image paths are relative.
        rows: Rows of a table; empty for a tar file.
        archive: Path of a tar file; None for a table.
    """

    number: int
    digest: str
    folder: Path
    rows: Sequence[TableRow] = ()
    archive: Path | None = None

    def table_rows(self) -> Iterator[TableRow]:
        """Yield the rows; those of a tar file are read from it."""
        return iter(self.rows) if self.archive is None else archive_rows(self.archive)


@dataclass(frozen=True)
class Source:
    """A table, or a folder of tar files named ``00000.tar`` as img2dataset writes them.

    Attributes:
        config: Path and columns of a table; only the path of a folder of tar files.
        archives: The tar files in order; empty for a table.
        num_parts: Number of parts.
    """

    config: ManifestConfig
    archives: tuple[Path, ...]
    num_parts: int

    def parts(self) -> Iterator[SourcePart]:
        """Yield the parts in order; memory holds the texts of one part of a Parquet table."""
        if self.archives:
            for number, archive in enumerate(self.archives):
                content = [SHARD_VERSION, archive.name, _state(archive)]
                yield SourcePart(number, _digest(content), archive.parent, archive=archive)
            return
        table = find_table(self.config.path)
        settings = asdict(self.config) | {"path": "", "max_bad_fraction": 0}
        # Images inside a table have no file of their own, so its state stands for theirs.
        content = [
            SHARD_VERSION,
            settings,
            _state(table) if table.suffix.lower() == PARQUET else [],
        ]
        rows = iterate_rows(table, self.config)
        for number in range(self.num_parts):
            part = tuple(islice(rows, PART_ROWS))
            named = [
                [*map(repr, map(_name, row)), _image_state(row, table.parent)] for row in part
            ]
            yield SourcePart(number, _digest([*content, named]), table.parent, part)


def open_source(config: ManifestConfig) -> Source:
    """Return the source at ``config.path``.

    Raises:
        ValueError: If there is no table and no tar file.
    """
    folder = Path(config.path)
    archives = tuple(sorted(folder.glob("*.tar"))) if folder.is_dir() else ()
    if archives:
        return Source(config, archives, len(archives))
    num_rows = count_rows(find_table(config.path), config)
    return Source(config, (), -(-num_rows // PART_ROWS))


def archive_rows(archive: Path) -> Iterator[TableRow]:
    """Yield a row per sample of a tar file: ``KEY.jpg`` with ``KEY.txt`` or ``KEY.json``.

    The caption is the text file, or ``caption`` of the JSON file.  The members of a sample follow
    each other, as img2dataset and webdataset write them.
    """
    damaged = TableRow(archive.name, error="damaged archive: the rest of it")
    try:
        with tarfile.open(archive, "r|") as members:
            files = (
                (_readable(member.name), members.extractfile(member))
                for member in members
                if member.isfile()
            )
            for key, group in groupby(files, key=lambda file: file[0].rpartition(".")[0]):
                yield _sample(archive, key, group)
            end = members.offset
    except (tarfile.TarError, EOFError):
        yield damaged
        return
    # tarfile stops without an error at a damaged header and at the end of a cut file.
    with archive.open("rb") as file:
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            yield damaged


def _sample(archive: Path, key: str, files: Iterator[tuple[str, IO[bytes] | None]]) -> TableRow:
    location, contents = f"{archive.name} {key}", dict[str, tuple[str, bytes]]()
    for name, file in files:
        suffix = Path(name).suffix.lower()
        if suffix in contents:
            return TableRow(location, error="repeated file in a sample")
        if file is not None and suffix in (CAPTION_SUFFIX, RECORD_SUFFIX, *IMAGE_SUFFIXES):
            contents[suffix] = name, file.read()
    images = [contents[suffix] for suffix in contents if suffix in IMAGE_SUFFIXES]
    if len(images) != 1:
        return TableRow(location, error="several image files" if images else "no image file")
    image = EmbeddedImage(str(archive), *images[0])
    record = _mapping(contents.get(RECORD_SUFFIX, ("", b""))[1])
    text = contents[CAPTION_SUFFIX][1] if CAPTION_SUFFIX in contents else record.get("caption")
    try:
        text = text.decode() if isinstance(text, bytes) else text
    except UnicodeDecodeError:
        return TableRow(location, error="caption is not UTF-8")
    return TableRow(location, image, text)


def _readable(name: str) -> str:
    """Return the name of a member, whose bytes may be in any encoding."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _mapping(content: bytes) -> dict[str, object]:
    """Return a JSON mapping, or an empty one for other content."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _name(cell: object) -> object:
    """Return a cell, or the place of an image in its table wherever the table lies."""
    return (cell.column, cell.row, cell.path) if isinstance(cell, StoredImage) else cell


def _state(path: Path) -> list[int] | None:
    """Return size and time of a file, or None without one."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return [status.st_size, status.st_mtime_ns]


def _image_state(row: TableRow, folder: Path) -> list[int] | None:
    """Return the state of the image file that a row names."""
    return _state(folder / row.image) if isinstance(row.image, str) else None


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
