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
        settings = [SHARD_VERSION, asdict(self.config) | {"path": "", "max_bad_fraction": 0}]
        if self.archives:
            for number, archive in enumerate(self.archives):
                status = archive.stat()
                content = [settings, archive.name, status.st_size, status.st_mtime_ns]
                yield SourcePart(number, _digest(content), archive.parent, archive=archive)
            return
        table = find_table(self.config.path)
        status = table.stat()
        # Images inside a table have no name of their own, so its state names them.
        holds_images = table.suffix.lower() == PARQUET
        content = [settings, [status.st_size, status.st_mtime_ns] if holds_images else []]
        rows = iterate_rows(table, self.config)
        for number in range(self.num_parts):
            part = tuple(islice(rows, PART_ROWS))
            digest = _digest([*content, [[str(_name(cell)) for cell in row] for row in part]])
            yield SourcePart(number, digest, table.parent, part)


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
    try:
        with tarfile.open(archive, "r|*") as members:
            files = ((member.name, members.extractfile(member)) for member in members)
            named = ((name, content) for name, content in files if content is not None)
            for key, group in groupby(named, key=lambda file: file[0].rpartition(".")[0]):
                yield _sample(archive, key, group)
    except (tarfile.TarError, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        yield TableRow(archive.name, error="damaged archive: the rest of it")


def _sample(archive: Path, key: str, files: Iterator[tuple[str, IO[bytes]]]) -> TableRow:
    location, image, caption, record = f"{archive.name} {key}", None, None, {}
    for name, content in files:
        suffix = Path(name).suffix.lower()
        if suffix == CAPTION_SUFFIX:
            caption = content.read()
        elif suffix == RECORD_SUFFIX:
            record = _mapping(content.read())
        else:
            image = EmbeddedImage(str(archive), name, content.read())
    if image is None:
        return TableRow(location, error="no image file")
    text = record.get("caption") if caption is None else caption
    try:
        text = text.decode() if isinstance(text, bytes) else text
    except UnicodeDecodeError:
        return TableRow(location, error="caption is not UTF-8")
    return TableRow(location, image, text)


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


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
