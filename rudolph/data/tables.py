"""Tables of image-text pairs: CSV, TSV, JSONL, Parquet, and the questions of Fusion Brain.

A reader gives every row of a table, a malformed one with its fault.

To add a format, write a reader and name it in ``READERS``.
"""

import csv
import difflib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rudolph.data.fusion_brain_files import parse_answer, parse_question, read_parts


@dataclass(frozen=True)
class ManifestConfig:
    """Where the pairs are, and which share of bad rows stops the run.

    ``path`` is the table, or a folder that holds exactly one table.  A table of questions has its
    answers in ``caption_column`` and names its ``question_column``; the JSON of Fusion Brain has
    them in two files, and ``answers`` is the path of the second.
    """

    path: str = ""
    image_column: str = "image"
    caption_column: str = "caption"
    question_column: str | None = None
    answers: str | None = None
    max_bad_share: float = 0.05

    def __post_init__(self) -> None:
        if not 0.0 <= self.max_bad_share <= 1.0:
            raise ValueError(f"max_bad_share must be from 0 to 1, got {self.max_bad_share}")
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
        """The columns that are read: image, caption and, if there is one, question."""
        asked = [] if self.question_column is None else [self.question_column]
        return [self.image_column, self.caption_column, *asked]


class Row(NamedTuple):
    """A row as it stands in the table; ``place`` says where, ``fault`` why it cannot be read.

    ``question`` is None where the table has none.
    """

    place: str
    image: object = None
    caption: object = None
    question: object = None
    fault: str = ""


def find_table(path: str) -> Path:
    """The table at ``path``, or the only one in the folder ``path``; else ``ValueError``."""
    legal = ", ".join(READERS)
    table = Path(path)
    if not path:
        raise ValueError(f"path of the manifest is empty: give a table ({legal}) or its folder")
    if table.is_dir():
        # Questions in JSON are two files, so a folder does not say which.
        suffixes = READERS.keys() - {".json"}
        found = sorted(file for file in table.iterdir() if file.suffix.lower() in suffixes)
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
    wanted = [columns.index(name) for name in config.columns]
    rows = []
    for record in records:
        if record.fields is not None and len(record.fields) == len(columns):
            place = f"line {record.first_line}"
            rows.append(Row(place, *(record.fields[at] for at in wanted)))
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
            image, caption, *asked = (value.get(name) for name in config.columns)
            # A question that a row lacks is an empty one, not a table without questions.
            rows.append(Row(place, image, caption, (asked[0] or "") if asked else None))
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
        columns = pyarrow.parquet.read_table(table, columns=config.columns)
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{table}: not a readable Parquet file: {reason}") from error
    rows = zip(*(columns.column(name) for name in config.columns), strict=True)
    return [_parquet_row(f"row {number}", cells) for number, cells in enumerate(rows, start=1)]


def _parquet_row(place: str, cells: Sequence[Any]) -> Row:
    try:
        return Row(place, *(cell.as_py() for cell in cells))
    except UnicodeDecodeError:
        return Row(place, fault="malformed row")


def _read_fusion_brain(table: Path, config: ManifestConfig) -> list[Row]:
    """Questions and answers of the Fusion Brain Challenge 2, of the variants the first."""
    if config.answers is None:
        raise ValueError(f"{table}: questions in JSON need answers, the path of the second file")
    asked, told = read_parts(table), read_parts(config.answers)
    rows = []
    for name, parts in asked.items():
        place = f"question {name}"
        if name not in told:
            rows.append(Row(place, fault="no answer"))
            continue
        try:
            record = parse_answer(parse_question(name, parts), told[name])
        except ValueError:
            rows.append(Row(place, fault="malformed question"))
        else:
            answer = record.answer_texts[0] if record.answer_texts else None
            rows.append(Row(place, record.image, answer, record.text))
    return rows


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
    for wanted in config.columns:
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
    ".json": _read_fusion_brain,
}
