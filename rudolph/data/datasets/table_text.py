"""Decoding of table files, and error messages for files that are not UTF-8 text.

UTF-8 is read with or without a byte order mark.  UTF-16 and UTF-32 are read only with a byte order
mark.  Any other file raises an error with a command that converts the file.

To recognise another type of file by its first bytes, add a row to ``OTHER_CONTENTS``.
"""

import codecs
import re
import shlex
from pathlib import Path

BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "UTF-8"),
    # UTF-32 comes first, because its little-endian mark starts with that of UTF-16.
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)

SPREADSHEET = "Save it as CSV in UTF-8."
# First bytes, type of file, advice.
OTHER_CONTENTS = (
    (b"\x1f\x8b", "gzip-compressed data", "Unpack it: gunzip -c {source} > {unpacked}"),
    (b"BZh", "bzip2-compressed data", "Unpack it: bunzip2 -c {source} > {unpacked}"),
    (b"\xfd7zXZ\x00", "xz-compressed data", "Unpack it: xz -dc {source} > {unpacked}"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed data", "Unpack it: zstd -dc {source} > {unpacked}"),
    (b"PK\x03\x04", "a ZIP archive or an Excel workbook", "Unzip it, or save it as CSV in UTF-8."),
    (b"\xd0\xcf\x11\xe0", "an old Excel workbook", SPREADSHEET),
    (b"PAR1", "a Parquet file", "Rename it to end in .parquet."),
    (b"ARROW1", "an Arrow file", "Write it as Parquet."),
    (b"\x89PNG", "an image", "Give a table of image paths and captions."),
    (b"\xff\xd8\xff", "an image", "Give a table of image paths and captions."),
    (b"%PDF", "a PDF document", "Give a table of image paths and captions."),
    (b"version https://git-lfs", "a pointer of Git LFS", "Fetch the file: git lfs pull"),
    (b"<!doctype html", "a web page", "Download the file itself."),
    (b"<html", "a web page", "Download the file itself."),
)

# Letters by decreasing frequency in Russian texts; the weight decreases linearly with rank.
CYRILLIC_FREQUENCIES = "оеаинтсрвлкмдпуяыьгзбчйхжшюцщэфъё"
CYRILLIC_WEIGHTS = {letter: 1 - rank / 33 for rank, letter in enumerate(CYRILLIC_FREQUENCIES)}
CYRILLIC_ENCODINGS = ("cp1251", "koi8-r", "cp866", "mac_cyrillic")
CYRILLIC_MARKS = "«»„“”–—…№\xa0ієїґІЄЇҐўЎ"
ICONV_NAMES = {"mac_cyrillic": "MACCYRILLIC"}


class TableWarning(UserWarning):
    """A warning that a table was read although it deviates from its name or configuration."""


def read_table_text(path: str | Path) -> tuple[str, str]:
    """Return the text of a file without its byte order mark, and the name of its encoding.

    Raises:
        ValueError: If the file is not UTF-8 and has no byte order mark.  The one-line message has
            the recognised encoding and a command that converts the file.
    """
    data = Path(path).read_bytes()
    require_table(path, data.lstrip()[:64])
    mark, encoding = next(
        (row for row in BYTE_ORDER_MARKS if data.startswith(row[0])), (b"", "UTF-8")
    )
    without_mark = _utf_16_without_mark(data)
    if without_mark:
        raise ValueError(
            f"{path}: expected UTF-8, got {without_mark} without a byte order mark. "
            f"{_conversion(path, without_mark)}"
        )
    try:
        return data.decode(encoding).removeprefix("\ufeff"), encoding
    except UnicodeDecodeError as error:
        if mark not in (b"", codecs.BOM_UTF8):
            raise ValueError(
                f"{path}: expected {encoding}, as in its byte order mark, got damaged bytes at "
                f"offset {error.start}. {_conversion(path, encoding, dropping=True)}"
            ) from error
        raise ValueError(_not_utf_8(path, data, error.start)) from error


def require_utf_8(path: str | Path, start: bytes) -> None:
    """Raise ``ValueError`` if the first bytes of a file are those of UTF-16 or UTF-32.

    Lines of such a file cannot be read one by one.
    """
    marked = [name for mark, name in BYTE_ORDER_MARKS if start.startswith(mark)]
    encoding = marked[0] if marked else _utf_16_without_mark(start)
    if encoding not in ("", "UTF-8"):
        raise ValueError(f"{path}: expected UTF-8, got {encoding}. {_conversion(path, encoding)}")


def require_table(path: str | Path, start: bytes) -> None:
    """Raise ``ValueError`` if a file is blank or starts with the bytes of another file type.

    A Parquet file is accepted under the suffix ``.parquet``.
    """
    if not start.removeprefix(codecs.BOM_UTF8).strip():
        raise ValueError(f"{path}: expected data, got an empty file. Write it again")
    suffix = Path(path).suffix.lower()
    for magic, description, advice in OTHER_CONTENTS:
        is_expected = magic == b"PAR1" and suffix == ".parquet"
        # HTML tags can be in upper case and follow empty lines.
        text = start.lstrip().lower() if magic.startswith(b"<") else start
        if text.startswith(magic) and not is_expected:
            instruction = advice.format(
                source=shlex.quote(str(path)), unpacked=_unpacked(Path(path))
            )
            raise ValueError(f"{path}: expected a table, got {description}. {instruction}")


def guess_encoding(data: bytes) -> str:
    r"""Return the most likely encoding of text that is not UTF-8, or "" if none is likely.

    >>> guess_encoding("image,caption\na.png,ёж и кот".encode("koi8-r"))
    'koi8-r'
    >>> guess_encoding("a.png,un café crème".encode("latin-1"))
    'cp1252'
    """
    high = re.findall(rb"[\x80-\xff]+", data[:1_000_000])
    count = sum(map(len, high))
    # Western text has single non-ASCII bytes; Cyrillic text has runs of them, which are words.
    if sum(len(run) == 1 for run in high) > count / 2:
        return _if_decodable(data, "cp1252")
    letters = b" ".join(high)
    scores = {name: _cyrillic_score(letters, count, name) for name in CYRILLIC_ENCODINGS}
    best = max(scores, key=lambda name: scores[name])
    return _if_decodable(data, best) if scores[best] > 0 else ""


def _cyrillic_score(letters: bytes, count: int, encoding: str) -> float:
    """Return the mean weight of the decoded letters; 0 if over a tenth are not Cyrillic."""
    text = letters.decode(encoding, errors="replace").replace(" ", "")
    num_unexpected = sum(
        character.lower() not in CYRILLIC_WEIGHTS and character not in CYRILLIC_MARKS
        for character in text
    )
    if num_unexpected > count / 10:
        return 0.0
    return sum(
        CYRILLIC_WEIGHTS.get(character.lower(), 0) * (1.0 if character.islower() else 0.8)
        for character in text
    ) / max(count, 1)


def _if_decodable(data: bytes, encoding: str) -> str:
    try:
        data.decode(encoding)
    except UnicodeDecodeError:
        return ""
    return encoding


def _utf_16_without_mark(data: bytes) -> str:
    """Return "UTF-16LE" or "UTF-16BE", whichever gives ASCII for the first letters, or ""."""
    first, second = data[0:8:2], data[1:8:2]
    if len(second) == 4 and second == b"\0" * 4 and 0 not in first:
        return "UTF-16LE"
    if len(second) == 4 and first == b"\0" * 4 and 0 not in second:
        return "UTF-16BE"
    return ""


def _not_utf_8(path: str | Path, data: bytes, start: int) -> str:
    """Return the error message for text that is not UTF-8 from byte offset ``start`` on."""
    line = data.count(b"\n", 0, start) + 1
    problem = (
        f"{path}: expected UTF-8, got byte 0x{data[start]:02x} at offset {start} (line {line})"
    )
    replaced = data.decode("utf-8", errors="replace")
    damaged = replaced.count("\ufffd")
    if sum(character > "\x7f" for character in replaced) - damaged > 3 * damaged:
        advice = _conversion(path, "UTF-8", dropping=True)
        return f"{problem}; it is UTF-8 with {damaged} damaged bytes. {advice}"
    encoding = guess_encoding(data)
    if not encoding:
        return f"{problem}, in an encoding that is not recognised. {_conversion(path, 'ENCODING')}"
    line_start = data.rfind(b"\n", 0, start) + 1
    sample = data[line_start : start + 200].decode(encoding).splitlines()[0].strip()[-60:]
    return f"{problem}, which reads as {encoding} ({sample!r}). {_conversion(path, encoding)}"


def _conversion(path: str | Path, encoding: str, *, dropping: bool = False) -> str:
    """Return the command that converts a file to UTF-8."""
    source = Path(path)
    target = source.with_name(f"{source.stem}-utf8{source.suffix}")
    name = ICONV_NAMES.get(encoding, encoding)
    option = "-c " * dropping
    purpose = "Drop what is damaged" if dropping else "Convert it"
    return (
        f"{purpose}: iconv {option}-f {name} -t utf-8 "
        f"{shlex.quote(str(source))} > {shlex.quote(str(target))}"
    )


def _unpacked(path: Path) -> str:
    packed = {".gz", ".bz2", ".xz", ".zst"}
    name = path.stem if path.suffix.lower() in packed else f"{path.stem}-unpacked{path.suffix}"
    return shlex.quote(str(path.with_name(name)))
