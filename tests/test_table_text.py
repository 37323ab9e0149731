"""Text of table files: supported encodings, and messages for the others."""

import gzip
import re
import subprocess
from pathlib import Path

import pytest
from test_manifests import said

from rudolph.data.datasets.table_text import guess_encoding, read_table_text, require_table

RUSSIAN = "image,caption\na.png,ёжик и чайка на «красном» фоне\nb.png,КАРТИНКА НОМЕР 2\n"
WESTERN = "image,caption\na.png,un café crème à Zürich\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_unicode_with_a_byte_order_mark_is_read(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.csv").write_bytes(RUSSIAN.encode(encoding))
    name = "UTF-8" if encoding == "utf-8-sig" else encoding.upper()
    assert read_table_text(tmp_path / "a.csv") == (RUSSIAN, name)


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (RUSSIAN, "cp1251"),
        (RUSSIAN, "koi8-r"),
        (RUSSIAN.replace("«", "").replace("»", ""), "cp866"),
        (RUSSIAN, "mac_cyrillic"),
        (WESTERN, "cp1252"),
        (RUSSIAN, "utf-16-le"),
        (RUSSIAN, "utf-16-be"),
    ],
)
def test_the_command_of_the_message_makes_the_table_readable(
    tmp_path: Path, text: str, encoding: str
) -> None:
    table = tmp_path / "my pairs.csv"
    table.write_bytes(text.encode(encoding, errors="replace"))
    message = said(lambda: read_table_text(table))
    assert message.startswith(f"{table}: expected UTF-8, got ")
    command = re.search(r"Convert it: (iconv -f \S+ -t utf-8 .*)", message)
    assert command is not None
    subprocess.run(command[1], shell=True, check=True)
    expected = text.encode(encoding, errors="replace").decode(encoding)
    assert read_table_text(tmp_path / "my pairs-utf8.csv") == (expected, "UTF-8")


def test_the_message_shows_how_the_guess_reads(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("image,caption\na.png,красный кот\n".encode("cp1251"))
    message = said(lambda: read_table_text(tmp_path / "a.csv"))
    assert "(line 2), which reads as cp1251 ('a.png,красный кот')" in message


def test_what_is_no_known_encoding_is_not_guessed() -> None:
    assert guess_encoding("a.png,红色的猫在街上".encode("gb18030")) == ""
    assert guess_encoding("a.png,赤い猫が通りにいます".encode("shift_jis")) == ""


def test_damaged_bytes_of_utf_8_are_counted_and_can_be_dropped(tmp_path: Path) -> None:
    table = tmp_path / "a.csv"
    table.write_bytes(RUSSIAN.encode().replace("«".encode(), b"\xff"))
    message = said(lambda: read_table_text(table))
    assert "it is UTF-8 with 1 damaged bytes. Drop what is damaged: iconv -c -f UTF-8" in message


def test_damage_after_a_byte_order_mark_is_told_in_one_line(tmp_path: Path) -> None:
    table = tmp_path / "a.csv"
    table.write_bytes(RUSSIAN.encode("utf-16")[:-1])
    assert "expected UTF-16, as in its byte order mark" in said(lambda: read_table_text(table))


@pytest.mark.parametrize(
    ("data", "what", "advice"),
    [
        (gzip.compress(RUSSIAN.encode()), "gzip-compressed data", "gunzip -c"),
        (b"PK\x03\x04\x14\x00", "a ZIP archive or an Excel workbook", "CSV in UTF-8"),
        (b"PAR1\x15\x04", "a Parquet file", "Rename it"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS", "git lfs pull"),
        (b"\n<!DOCTYPE HTML><title>404</title>", "a web page", "Download the file itself"),
        (b"\x89PNG\r\n\x1a\n", "an image", "a table of image paths"),
        (b" \r\n", "an empty file", "Write it again"),
    ],
)
def test_what_is_no_text_is_told_with_what_to_do(
    tmp_path: Path, data: bytes, what: str, advice: str
) -> None:
    (tmp_path / "a.csv").write_bytes(data)
    message = said(lambda: read_table_text(tmp_path / "a.csv"))
    assert f"got {what}. " in message and advice in message


def test_a_parquet_file_may_be_called_so() -> None:
    require_table("a.parquet", b"PAR1")
    assert "Rename it" in said(lambda: require_table("a.csv", b"PAR1"))
