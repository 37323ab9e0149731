"""Rows of files of documents: JSON lists, JSON Lines and Parquet.

Opening a file finds the place of each row: its bytes in JSON, its row group in Parquet.  A row is
read when it is needed.  Only a JSON list is in memory as a whole, while it is opened.

To add a format, write its rows and its writer, and add them to ``ROW_READERS`` and
``ROW_WRITERS``.
"""

import codecs
import json
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from rudolph.data.datasets.table_parquet import ParquetRows, parquet_columns
from rudolph.data.datasets.table_text import read_table_text, require_table, require_utf_8
from rudolph.data.datasets.tables import type_name
from rudolph.files.atomic import json_text, write_atomic

PARQUET_ROWS = 256
SPACE = re.compile(r"[ \t\r\n]*")


class FileRow(NamedTuple):
    """A row of a file.

    Attributes:
        location: Where it is, as in "line 3".
        value: Its values by key.
        error: Why it cannot be read, or "".
    """

    location: str
    value: Mapping[str, Any]
    error: str = ""


class FileRows(Protocol):
    """The rows of one file."""

    path: Path

    def __len__(self) -> int:
        """Return the number of rows."""
        ...

    def __getitem__(self, index: int) -> FileRow:
        """Read the row at ``index``."""
        ...


class JsonRows:
    """The objects of a JSON list, or of JSON Lines, whatever the suffix of the file.

    Args:
        path: The file.

    Raises:
        ValueError: In one line, if the file is no UTF-8 text or its list is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            start = file.read(64)
        require_table(path, start)
        require_utf_8(path, start)
        is_list = start.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
        self.unit = "item" if is_list else "line"
        numbered = list_spans(path) if is_list else line_spans(path)
        self.spans = np.array(numbered, dtype=np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.spans)

    def __getitem__(self, index: int) -> FileRow:
        """Read the row at ``index``."""
        number, start, end = self.spans[index].tolist()
        location = f"{self.unit} {number}"
        with self.path.open("rb") as file:
            file.seek(start)
            data = file.read(end - start)
        try:
            value = json.loads(data.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            if self.unit == "line" and not data.endswith(b"\n"):
                return FileRow(location, {}, "last line is cut off")
            is_text = not isinstance(error, UnicodeDecodeError)
            return FileRow(location, {}, f"row is not {'JSON' if is_text else 'UTF-8'}")
        if not isinstance(value, dict):
            return FileRow(location, {}, f"rows are {type_name(value)}, not objects")
        return FileRow(location, value)


def line_spans(path: Path) -> "array[int]":
    """Return number, first byte and end of each line that is not blank, as a flat array."""
    spans, end = array("q"), 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            start, end = end, end + len(line)
            if line.strip():
                spans.extend((number, start, end))
    return spans


def list_spans(path: Path) -> "array[int]":
    """Return number, first byte and end of each item of a JSON list, as a flat array.

    Raises:
        ValueError: In one line, if the file is not UTF-8 or the list is damaged.
    """
    text, _ = read_table_text(path)
    with path.open("rb") as file:
        has_mark = file.read(3) == codecs.BOM_UTF8
    spans, position, offset = array("q"), 0, 3 * has_mark
    for number, (start, end) in enumerate(list_items(path, text), start=1):
        offset += len(text[position:start].encode())
        size = len(text[start:end].encode())
        spans.extend((number, offset, offset + size))
        position, offset = end, offset + size
    return spans


def list_items(path: Path, text: str) -> Iterator[tuple[int, int]]:
    """Yield the first character and the end of each item of a JSON list.

    Raises:
        ValueError: In one line, at an item that is damaged.
    """

    def skip_space(position: int) -> int:
        match = SPACE.match(text, position)
        assert match is not None
        return match.end()

    decoder, number = json.JSONDecoder(), 0
    start = skip_space(text.index("[") + 1)
    while text[start : start + 1] != "]":
        number += 1
        try:
            _, end = decoder.raw_decode(text, start)
            after = skip_space(end)
            if text[after : after + 1] not in (",", "]"):
                raise ValueError
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path}: expected a whole JSON list, got one that is damaged in item {number}. "
                "Write or download it again"
            ) from error
        yield start, end
        start = skip_space(after + 1) if text[after] == "," else after


class ColumnRows:
    """The rows of a Parquet file.

    Args:
        path: The file.
        columns: Columns to read, of which the file may lack some.

    Raises:
        ValueError: In one line, if the file cannot be read or has none of the columns.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path = path
        known = parquet_columns(path)
        self.columns = [name for name in columns if name in known]
        if not self.columns:
            raise ValueError(
                f"{path}: expected columns {', '.join(columns)}, got {', '.join(known)}"
            )
        self.rows = ParquetRows(path, self.columns, batch_size=PARQUET_ROWS)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def __getitem__(self, index: int) -> FileRow:
        """Read the row at ``index``."""
        location, values = f"row {index + 1}", self.rows[index]
        if values is None:
            return FileRow(location, {}, "row is not UTF-8")
        return FileRow(location, dict(zip(self.columns, values, strict=True)))


def list_files(path: str) -> list[Path]:
    """Return the file at ``path``, or the files of that folder in the order of their names.

    Raises:
        ValueError: In one line, if there is none or its suffix is unknown.
    """
    legal, source = ", ".join(ROW_READERS), Path(path)
    if not path:
        raise ValueError(f"path of the documents is empty: give a file ({legal}) or its folder")
    if source.is_dir():
        files = sorted(file for file in source.iterdir() if file.suffix.lower() in ROW_READERS)
        if not files:
            raise ValueError(f"{source}: expected files of documents ({legal}), got none")
        return files
    if not source.is_file():
        raise ValueError(f"{source}: no such file or folder")
    if source.suffix.lower() not in ROW_READERS:
        raise ValueError(f"{source}: a file of documents must end in one of {legal}")
    return [source]


def open_rows(path: Path, columns: Sequence[str]) -> FileRows:
    """Open the rows of a file; its suffix decides the format.

    Args:
        path: A file of ``list_files``.
        columns: Columns to read.
    """
    return ROW_READERS[path.suffix.lower()](path, columns)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows one at a time; the file appears only when all are written.

    Args:
        path: File whose suffix is one of ``ROW_WRITERS``.
        rows: At least one row; all have the same keys and types in Parquet.

    Raises:
        ValueError: If there are no rows.
    """
    remaining = iter(rows)
    first = next(remaining, None)
    if first is None:
        raise ValueError(f"{path}: expected documents to write, got none")
    write = ROW_WRITERS[path.suffix.lower()]
    write_atomic(path, lambda new: write(new, chain([first], remaining)))


def _write_list(path: Path, rows: Iterator[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for index, row in enumerate(rows):
            file.write(("[\n" if index == 0 else ",\n") + json_text(row))
        file.write("\n]\n")


def _write_lines(path: Path, rows: Iterator[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json_text(row) + "\n" for row in rows)


def _write_parquet(path: Path, rows: Iterator[Mapping[str, Any]]) -> None:
    """Write texts and lists of texts, the only types that layouts have in Parquet."""
    import pyarrow
    import pyarrow.parquet

    batch = list(islice(rows, PARQUET_ROWS))
    text = pyarrow.string()
    schema = pyarrow.schema(
        [
            (name, pyarrow.list_(text) if isinstance(value, list) else text)
            for name, value in batch[0].items()
        ]
    )
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        while batch:
            writer.write_table(pyarrow.Table.from_pylist(batch, schema))
            batch = list(islice(rows, PARQUET_ROWS))


ROW_READERS: dict[str, Callable[[Path, Sequence[str]], FileRows]] = {
    ".json": lambda path, columns: JsonRows(path),
    ".jsonl": lambda path, columns: JsonRows(path),
    ".parquet": ColumnRows,
}
ROW_WRITERS: dict[str, Callable[[Path, Iterator[Mapping[str, Any]]], None]] = {
    ".json": _write_list,
    ".jsonl": _write_lines,
    ".parquet": _write_parquet,
}
