"""Tables of image-text pairs: CSV, TSV, JSONL, Parquet and the JSON of Fusion Brain.

A reader returns every row of a table; a malformed row has an ``error``.

To add a format, write a reader and add it to ``READERS``.
"""

import csv
import difflib
import io
import json
import re
import shlex
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Number
from pathlib import Path
from typing import Any, NamedTuple

from rudolph.data.datasets.fusion_brain_files import parse_answer, parse_question, read_parts
from rudolph.data.datasets.table_parquet import parquet_cells, parquet_columns, parquet_length
from rudolph.data.datasets.table_text import TableWarning, read_table_text, require_table
from rudolph.data.image_files import OPEN_QUOTE
from rudolph.files.constraints import Fraction, check
from rudolph.sequence.texts import clean_text

NAMES_LISTED = 20
# The header must end within this many characters for its separator to be found.
HEADER_LENGTH = 100_000
# Excel writes and reads this line above the header.
SEPARATOR_LINE = re.compile(r'"?sep=([^\r\n"])"?(?:\r\n|\r|\n|$)', re.IGNORECASE)
PARQUET = ".parquet"
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}


@dataclass(frozen=True)
class ManifestConfig:
    """Configuration of a table of pairs, and the accepted fraction of bad rows.

    Attributes:
        path: The table, or a folder with exactly one table.
        image_column: Column of the images.
        caption_column: Column of the captions or, in a table of questions, of the answers.
        question_column: Column of the questions; None if there are none.
        answers: Path of the answers for the JSON of Fusion Brain, which has two files.
        max_bad_fraction: Largest fraction of bad rows that is accepted, 0 to 1.
    """

    path: str = ""
    image_column: str = "image"
    caption_column: str = "caption"
    question_column: str | None = None
    answers: str | None = None
    max_bad_fraction: Fraction = 0.05

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for an invalid field."""
        check(self)
        if self.image_column == self.caption_column:
            raise ValueError(
                f"image_column and caption_column must differ, both are {self.image_column!r}"
            )
        if self.question_column in (self.image_column, self.caption_column):
            raise ValueError(
                f"question_column must be a column of its own, got {self.question_column!r}"
            )

    @property
    def columns(self) -> list[str]:
        """Return the columns to read: image, caption and question, if any."""
        question_columns = [] if self.question_column is None else [self.question_column]
        return [self.image_column, self.caption_column, *question_columns]


class TableRow(NamedTuple):
    """A row as it is in the table.

    ``location`` locates the row in the table, and ``error`` is the reason why the row cannot be
    read, or "".  ``question`` is None if the table has no questions.
    """

    location: str
    image: object = None
    caption: object = None
    question: object = None
    error: str = ""


def find_table(path: str) -> Path:
    """Return the table at ``path`` or, if that is a folder, its only table.

    Raises:
        ValueError: If there is no such table, the folder has several, or the suffix is unknown.
    """
    legal = ", ".join(READERS)
    table = Path(path)
    if not path:
        raise ValueError(f"path of the manifest is empty: give a table ({legal}) or its folder")
    if table.is_dir():
        # Questions in JSON have two files, so a folder would be ambiguous.
        suffixes = READERS.keys() - {".json"}
        tables = sorted(file for file in table.iterdir() if file.suffix.lower() in suffixes)
        if len(tables) != 1:
            names = ", ".join(file.name for file in tables[:5]) or "none"
            raise ValueError(
                f"{table}: expected exactly one table in the folder ({legal}), "
                f"got {len(tables)}: {names}"
            )
        table = tables[0]
    if not table.is_file():
        raise ValueError(f"{table}: no such file or folder")
    if table.suffix.lower() not in READERS:
        with table.open("rb") as file:
            require_table(table, file.read(64))
        raise ValueError(f"{table}: a manifest must end in one of {legal}")
    return table


def read_rows(table: Path, config: ManifestConfig) -> list[TableRow]:
    """Return every row of a table; malformed rows have an ``error``.

    A ``TableWarning`` reports every column name, separator or encoding that is accepted although
    it differs from the expected one.

    Raises:
        ValueError: With a one-line message, if the table cannot be read or lacks a column.
    """
    return list(iterate_rows(table, config))


def iterate_rows(table: Path, config: ManifestConfig) -> Iterator[TableRow]:
    """Yield every row of a table as ``read_rows`` returns them.

    Memory holds one batch of a Parquet file; text formats are read whole.
    """
    return iter(READERS[table.suffix.lower()](table, config))


def count_rows(table: Path, config: ManifestConfig) -> int:
    """Return the number of rows of a table."""
    if table.suffix.lower() == PARQUET:
        return parquet_length(table)
    return len(read_rows(table, config))


def match_columns(table: Path, columns: Sequence[str], config: ManifestConfig) -> list[int]:
    """Return the index in ``columns`` of each column of the configuration.

    An exact match takes precedence.  Otherwise a name that differs only in case, spaces or
    invisible characters is used with a ``TableWarning``, if there is exactly one.

    Raises:
        ValueError: With a one-line message, if a column is missing or ambiguous.
    """
    indices = [_match_column(table, columns, requested) for requested in config.columns]
    if len(set(indices)) < len(indices):
        twice = next(columns[index] for index in indices if indices.count(index) > 1)
        raise ValueError(
            f"{table}: expected a column for each of {_listed(config.columns)}, got {twice!r} for "
            "two of them. Name the columns exactly"
        )
    matched = zip(config.columns, (columns[index] for index in indices), strict=True)
    _warn_of_names(table, [(requested, name) for requested, name in matched if requested != name])
    return indices


def _match_column(table: Path, columns: Sequence[str], requested: str) -> int:
    for names, name in (columns, requested), (list(map(_folded, columns)), _folded(requested)):
        if names.count(name) == 1:
            return names.index(name)
        if name in names:
            matches = [
                column for column, folded in zip(columns, names, strict=True) if folded == name
            ]
            raise ValueError(
                f"{table}: more than one column {requested!r} ({_listed(matches)}); "
                f"columns found: {_listed(columns)}. Rename all but one"
            )
    nearest = difflib.get_close_matches(requested, columns, n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(f"{table}: no column {requested!r}; columns found: {_listed(columns)}{hint}")


def _listed(names: Sequence[str]) -> str:
    more = f", ... ({len(names)} in all)" if len(names) > NAMES_LISTED else ""
    return ", ".join(f"{name[:60]!r}" for name in names[:NAMES_LISTED]) + more


def _folded(name: str) -> str:
    """Return a column name without differences that readers would not notice."""
    text = unicodedata.normalize("NFKC", name)
    return (
        "".join(letter for letter in text if unicodedata.category(letter) != "Cf")
        .strip()
        .casefold()
    )


def _warn_of_names(table: Path, matched: Sequence[tuple[str, str]]) -> None:
    """Warn about inexact column matches, except those that differ only in Unicode normal form."""
    matched = [match for match in matched if clean_text(match[0]) != clean_text(match[1])]
    if matched:
        names = " and ".join(repr(name) for _, name in matched)
        requested = " and ".join(name for name, _ in matched)
        verb = "was" if len(matched) == 1 else "were"
        warnings.warn(f"{table}: {names} {verb} taken for {requested}", TableWarning, stacklevel=2)


def _read_csv(table: Path, config: ManifestConfig) -> list[TableRow]:
    return _read_delimited(table, config, delimiter=",")


def _read_tsv(table: Path, config: ManifestConfig) -> list[TableRow]:
    return _read_delimited(table, config, delimiter="\t")


def _read_delimited(table: Path, config: ManifestConfig, *, delimiter: str) -> list[TableRow]:
    """Read rows with quotes as in RFC 4180; the first row has the column names."""
    text = _decoded(table)
    lines = io.StringIO(text, newline="")
    first_line, separator_line = 1, SEPARATOR_LINE.match(text)
    if separator_line:
        lines.readline()
        first_line = 2
    start = separator_line.end() if separator_line else 0
    head = text[start : start + HEADER_LENGTH]
    separator = _delimiter(head, config, separator_line[1] if separator_line else delimiter)
    records = _records(lines, separator, first_line)
    header = next(records, None)
    if header is None or header.fields is None:
        raise ValueError(f"{table}: the first line must name the columns, it cannot be read")
    columns = header.fields
    indices = match_columns(table, columns, config)
    if separator != delimiter:
        name = SEPARATORS.get(separator, repr(separator))
        warnings.warn(
            f"{table}: columns are separated by {name}; this separator is used",
            TableWarning,
            stacklevel=2,
        )
    rows = []
    for record in records:
        if record.fields is not None and len(record.fields) == len(columns):
            location = f"line {record.first_line}"
            rows.append(TableRow(location, *(record.fields[index] for index in indices)))
            continue
        # A quote that is never closed swallows the lines below it, so each of them counts as bad.
        for line in range(record.first_line, record.last_line + 1):
            rows.append(TableRow(f"line {line}", error=record.error_of(line)))
    return rows


def _delimiter(head: str, config: ManifestConfig, default: str) -> str:
    """Return the first separator that fits the header, beginning with ``default``.

    A separator fits if it splits the header into columns that include all requested ones.  If none
    fits, return ``default`` unless it gives a single column.  In that case return the separator
    that gives the most columns.
    """
    names = {
        separator: _header(head, separator) for separator in dict.fromkeys([default, *SEPARATORS])
    }
    requested = set(map(_folded, config.columns))
    for separator, columns in names.items():
        if requested <= set(map(_folded, columns)):
            return separator
    # No separator fits: the error about the missing column lists the columns as readers see them.
    if len(names[default]) != 1:
        return default
    return max(names, key=lambda separator: len(names[separator]))


def _header(head: str, delimiter: str) -> list[str]:
    """Return the column names with this delimiter, or ``[]`` if the line is malformed."""
    record = next(_records(io.StringIO(head, newline=""), delimiter), None)
    return [] if record is None or record.fields is None else record.fields


class _Record(NamedTuple):
    """A record of a delimited table; ``fields`` is None if it is malformed.

    ``open_line`` is the line of a quote that is never closed, or 0.
    """

    first_line: int
    last_line: int
    fields: list[str] | None
    open_line: int = 0

    def error_of(self, line: int) -> str:
        """Return why a line of a malformed record is skipped."""
        if not self.open_line or line < self.open_line:
            return "malformed row"
        return OPEN_QUOTE if line == self.open_line else "swallowed by an open quote"


def _records(lines: Iterable[str], delimiter: str, first_line: int = 1) -> Iterator[_Record]:
    lines_read: list[str] = []

    def recorded_lines() -> Iterator[str]:
        for line in lines:
            lines_read.append(line)
            yield line

    reader = csv.reader(recorded_lines(), delimiter=delimiter, strict=True)
    while True:
        lines_read.clear()
        fields: list[str] | None
        open_line = 0
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error:
            fields = None
            open_index = _open_quote(lines_read, delimiter)
            open_line = 0 if open_index is None else first_line + open_index
        if fields != []:
            last_line = first_line + max(len(lines_read), 1) - 1
            yield _Record(first_line, last_line, fields, open_line)
        first_line += len(lines_read)


def _open_quote(lines: Sequence[str], delimiter: str) -> int | None:
    """Return the index of the line whose quote is still open at the end of a malformed record.

    Return None if the record is malformed within one line.
    """
    open_index: int | None = None
    at_start = True
    for number, line in enumerate(lines):
        position = 0
        while position < len(line):
            letter = line[position]
            following = line[position + 1 : position + 2]
            if open_index is not None:
                if letter == '"' and following == '"':
                    position += 1
                elif letter == '"' and following in ("", delimiter, "\r", "\n"):
                    open_index = None
                elif letter == '"':
                    return open_index if open_index < number else None
            elif letter == '"' and at_start:
                open_index = number
            at_start = open_index is None and letter in (delimiter, "\r", "\n")
            position += 1
    return open_index


def _read_jsonl(table: Path, config: ManifestConfig) -> list[TableRow]:
    text = _decoded(table)
    _require_lines(table, text)
    rows = []
    columns: dict[str, None] = {}
    matched: dict[tuple[str, str], None] = {}
    # Not splitlines, because JSON strings can hold U+2028 and similar characters unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        location = f"line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            rows.append(TableRow(location, error="row is not JSON"))
            continue
        if not isinstance(value, dict):
            required = _listed(config.columns)
            error = f"rows are {type_name(value)}, not objects with {required}"
            rows.append(TableRow(location, error=error))
            continue
        columns.update(dict.fromkeys(value))
        names = [_key(value, requested) for requested in config.columns]
        matched.update(dict.fromkeys(zip(config.columns, names, strict=True)))
        image, caption, *questions = (value.get(name) for name in names)
        # A row without a question has an empty one; None would mean a table without questions.
        rows.append(
            TableRow(location, image, caption, (questions[0] or "") if questions else None)
        )
    if columns:
        found_columns = [requested for requested, name in matched if name in columns]
        missing = [requested for requested in config.columns if requested not in found_columns]
        if missing:
            _match_column(table, list(columns), missing[0])
        _warn_of_names(table, [pair for pair in matched if pair[0] != pair[1]])
    return rows


def _key(value: Mapping[str, Any], requested: str) -> str:
    """Return the key that matches a column name, exactly or after ``_folded``."""
    if requested in value:
        return requested
    matches = [name for name in value if _folded(name) == _folded(requested)]
    return matches[0] if len(matches) == 1 else requested


def _require_lines(table: Path, text: str) -> None:
    """Raise ``ValueError`` if a JSON table is one array instead of an object per line."""
    if not text.lstrip().startswith("["):
        return
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return
    if isinstance(value, list) and any(isinstance(row, dict) for row in value):
        source = shlex.quote(str(table))
        target = table.with_name(f"{table.stem}-lines.jsonl")
        raise ValueError(
            f"{table}: expected an object per line (JSONL), got one JSON array. "
            f"Convert it: jq -c '.[]' {source} > {shlex.quote(str(target))}"
        )


def type_name(value: object) -> str:
    """Return the JSON or Parquet term for values of this type, in the plural.

    >>> type_name(3.5), type_name([]), type_name(None)
    ('numbers', 'arrays', 'null')
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "booleans"
    type_names = {Number: "numbers", str: "texts", bytes: "bytes", dict: "objects", list: "arrays"}
    return next(
        (name for type_, name in type_names.items() if isinstance(value, type_)), "not texts"
    )


def _read_parquet(table: Path, config: ManifestConfig) -> Iterator[TableRow]:
    columns = parquet_columns(table)
    names = [columns[index] for index in match_columns(table, columns, config)]
    for number, values in enumerate(parquet_cells(table, names), start=1):
        location = f"row {number}"
        if values is None:
            yield TableRow(location, error="malformed row")
            continue
        image, caption, *questions = values
        # A row without a question has an empty one; None would mean a table without questions.
        yield TableRow(location, image, caption, (questions[0] or "") if questions else None)


def _read_fusion_brain(table: Path, config: ManifestConfig) -> list[TableRow]:
    """Read the JSON of the Fusion Brain Challenge 2, with the first variant of each answer."""
    if config.answers is None:
        _require_lines(table, _decoded(table))
        raise ValueError(
            f"{table}: questions in JSON need answers, the path of the second file. "
            "A table of pairs must be JSONL, an object per line"
        )
    questions_by_id, answers_by_id = read_parts(table), read_parts(config.answers)
    rows = []
    for name, parts in questions_by_id.items():
        location = f"question {name}"
        if name not in answers_by_id:
            rows.append(TableRow(location, error="no answer"))
            continue
        try:
            record = parse_answer(parse_question(name, parts), answers_by_id[name])
        except ValueError:
            rows.append(TableRow(location, error="malformed question"))
        else:
            answer = record.answer_texts[0] if record.answer_texts else None
            rows.append(TableRow(location, record.image, answer, record.text))
    return rows


def _decoded(table: Path) -> str:
    text, encoding = read_table_text(table)
    if encoding != "UTF-8":
        warnings.warn(f"{table}: read as {encoding}", TableWarning, stacklevel=2)
    return text


READERS: dict[str, Callable[[Path, ManifestConfig], Iterable[TableRow]]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_jsonl,
    PARQUET: _read_parquet,
    ".json": _read_fusion_brain,
}
