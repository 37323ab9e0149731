"""Parquet tables: text columns, and images whose bytes are stored in the table itself.

Text columns are read in batches that never contain image bytes.  A ``StoredImage`` refers to its
row.  The file is read only once if images are read in ascending order of rows.  Memory holds one
page of the file: about 1,000 rows, unless the file was written with smaller pages or row groups.
An image cell holds text (a path), bytes, or a struct of bytes and path, as in Hugging Face
datasets.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from rudolph.data.datasets.table_text import require_table

TEXT_ROWS = 4096
IMAGE_ROWS = 16


class StoredImage(NamedTuple):
    """A reference to the stored image of a row.

    ``row`` counts from 0.  ``path`` is the path that the table gives for the image, if any.
    """

    table: str
    column: str
    row: int
    path: str | None = None

    def data(self) -> bytes | None:
        """Return the bytes of the image, or None if the row has none."""
        status = Path(self.table).stat()
        signature = (status.st_size, status.st_mtime_ns)
        return _stored_bytes(self.table, self.column, signature)[self.row]


class EmbeddedImage(NamedTuple):
    """The bytes of an image read from an archive, with the paths of both."""

    table: str
    path: str
    content: bytes

    def data(self) -> bytes:
        """Return the bytes of the image."""
        return self.content


class ParquetRows:
    """The rows of some columns, indexed by row and efficient for rows in ascending order.

    Args:
        table: Path of the Parquet file.
        columns: Columns to read.
        batch_size: Rows that are read at once.

    Raises:
        ValueError: In one line, if the file cannot be read.
    """

    def __init__(self, table: Path, columns: Sequence[str], *, batch_size: int) -> None:
        self.table, self.columns, self.batch_size = table, list(columns), batch_size
        with _parquet_errors(table):
            self.file = _open(table)
            sizes = [
                self.file.metadata.row_group(group).num_rows
                for group in range(self.file.metadata.num_row_groups)
            ]
        # First row of each row group, followed by the total number of rows.
        self.starts = list(accumulate(sizes, initial=0))
        self.group, self.first, self.size = -1, 0, 0
        self.cells: list[Any] = []
        self.batches: Iterator[Any] = iter(())

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.starts[-1]

    def __getitem__(self, row: int) -> tuple[Any, ...] | None:
        """Return the values of a row, one per column, or None if its text is damaged."""
        with _parquet_errors(self.table):
            # If several groups start at the same row, only the last has rows.
            group = bisect_right(self.starts, row) - 1
            if group != self.group or row < self.first:
                self._start(group)
            while row >= self.first + self.size:
                self._advance()
            return _values(self.cells, row - self.first)

    def _start(self, group: int) -> None:
        self.group, self.first, self.size = group, self.starts[group], 0
        self.batches = self.file.iter_batches(
            batch_size=self.batch_size,
            row_groups=[group],
            columns=self.columns,
            use_threads=False,
        )

    def _advance(self) -> None:
        batch = next(self.batches, None)
        if batch is None:
            raise ValueError(f"{self.table}: expected more rows in row group {self.group}")
        self.first, self.size = self.first + self.size, batch.num_rows
        self.cells = [batch.column(batch.schema.get_field_index(name)) for name in self.columns]


class StoredBytes:
    """The image bytes of a column, indexed by row and efficient for rows in ascending order."""

    def __init__(self, table: Path, column: str) -> None:
        self.rows = ParquetRows(table, [column], batch_size=IMAGE_ROWS)

    def __getitem__(self, row: int) -> bytes | None:
        """Return the image bytes of a row, or None if it has none."""
        values = self.rows[row]
        value = None if values is None else values[0]
        data = value.get("bytes") if isinstance(value, dict) else value
        return data or None


# Keeps a few tables open; the signature makes a changed file a different key.
@lru_cache(maxsize=4)
def _stored_bytes(table: str, column: str, signature: tuple[int, ...]) -> StoredBytes:
    return StoredBytes(Path(table), column)


def parquet_columns(table: Path) -> list[str]:
    """Return the column names of a Parquet file."""
    with _parquet_errors(table):
        names: list[str] = _open(table).schema_arrow.names
    return names


def parquet_length(table: Path) -> int:
    """Return the number of rows of a Parquet file."""
    with _parquet_errors(table):
        number: int = _open(table).metadata.num_rows
    return number


def parquet_cells(table: Path, columns: Sequence[str]) -> Iterator[tuple[Any, ...] | None]:
    """Yield the values of each row, the image first; None for a row with damaged text.

    Args:
        table: Path of the Parquet file.
        columns: The image column, followed by the text columns.

    Raises:
        ValueError: With a one-line message, if the file cannot be read or a column has the wrong
            type.
    """
    with _parquet_errors(table):
        file = _open(table)
        image = _image_column(table, file.schema_arrow.field(columns[0]))
        for name in columns[1:]:
            _require_text(table, name, file.schema_arrow.field(name).type)
        columns_to_read = [*filter(None, [image.path]), *columns[1:]]
        first = 0
        for batch in file.iter_batches(
            batch_size=TEXT_ROWS, columns=columns_to_read, use_threads=False
        ):
            indices = [batch.schema.get_field_index(name) for name in columns]
            # A column of image bytes is not read and therefore has no index.
            cells = [batch.column(index) if index >= 0 else None for index in indices]
            for index in range(batch.num_rows):
                values = _values(cells, index)
                if values is not None and image.is_stored:
                    stored = StoredImage(str(table), columns[0], first + index, _path(values[0]))
                    values = (stored, *values[1:])
                yield values
            first += batch.num_rows


class _ImageColumn(NamedTuple):
    """The format of an image column: its path column, or "", and whether it stores bytes."""

    path: str
    is_stored: bool


def _image_column(table: Path, field: Any) -> _ImageColumn:
    from pyarrow import types

    data_type, name = field.type, field.name
    if types.is_struct(data_type):
        fields = {member.name: member.type for member in data_type}
        has_path = "path" in fields and _is_text(fields["path"])
        if has_path or ("bytes" in fields and _is_binary(fields["bytes"])):
            return _ImageColumn(f"{name}.path" if has_path else "", is_stored=True)
    elif _is_binary(data_type):
        return _ImageColumn("", is_stored=True)
    elif _is_text(data_type) or types.is_null(data_type):
        return _ImageColumn(name, is_stored=False)
    raise ValueError(
        f"{table}: expected paths, bytes or a struct of bytes and path in column {name!r}, "
        f"got {data_type}. Write one image per row"
    )


def _require_text(table: Path, name: str, data_type: Any) -> None:
    """Raise ``ValueError`` unless a column has type text, number or null.

    Numbers are rejected row by row, so that missing values are reported separately.
    """
    from pyarrow import types

    is_number = (
        types.is_integer(data_type) or types.is_floating(data_type) or types.is_decimal(data_type)
    )
    if _is_text(data_type) or is_number or types.is_null(data_type):
        return
    is_list = (
        types.is_nested(data_type)
        and not types.is_struct(data_type)
        and not types.is_map(data_type)
    )
    advice = (
        f"Write a row for each text: pandas.read_parquet(...).explode({name!r})"
        if is_list
        else "Convert it to text"
    )
    raise ValueError(
        f"{table}: expected one text per row in column {name!r}, got {data_type}. {advice}"
    )


def _is_text(data_type: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(data_type):
        data_type = data_type.value_type
    return (
        types.is_string(data_type)
        or types.is_large_string(data_type)
        or types.is_string_view(data_type)
    )


def _is_binary(data_type: Any) -> bool:
    from pyarrow import types

    is_fixed = types.is_binary_view(data_type) or types.is_fixed_size_binary(data_type)
    return types.is_binary(data_type) or types.is_large_binary(data_type) or is_fixed


def _values(cells: Sequence[Any], index: int) -> tuple[Any, ...] | None:
    try:
        return tuple(None if column is None else column[index].as_py() for column in cells)
    except UnicodeDecodeError:
        return None


def _path(value: Any) -> str | None:
    """Return the path of an image struct that was read without its bytes."""
    return value.get("path") if isinstance(value, dict) else None


def _open(table: Path) -> Any:
    import pyarrow.parquet

    # With a buffer, a batch can be read without the rest of its row group.
    return pyarrow.parquet.ParquetFile(table, pre_buffer=False, buffer_size=1 << 20)


@contextmanager
def _parquet_errors(table: Path) -> Iterator[None]:
    """Convert PyArrow's errors on damaged files to a one-line ``ValueError``."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        with open(table, "rb") as file:
            require_table(table, file.read(64))
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{table}: expected a whole Parquet file, got one that is not readable ({reason}). "
            f"Write or download it again"
        ) from error
