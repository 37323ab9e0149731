"""Tables from users: columns, separators, open quotes, JSON, and any damage."""

import json
import os
import random
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow
import pytest
from test_manifests import captions, config, encoded, make_pairs, noise, said, train, write_table

from rudolph.cli import main
from rudolph.data.datasets.manifests import Manifest
from rudolph.data.datasets.table_text import TableWarning
from rudolph.data.datasets.tables import ManifestConfig, find_table, read_rows

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
FUZZ_CASES = int(os.environ.get("FUZZ_CASES", "20"))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("names", [("Image", " Caption"), ("IMAGE\xa0", "\u200bcaption")])
def test_columns_in_other_letters_are_taken_and_named(
    tmp_path: Path, suffix: str, names: tuple[str, str]
) -> None:
    rows = [dict(zip(names, ("a.png", "ёж"), strict=True))] * 2
    table = write_table(tmp_path / f"pairs{suffix}", rows)
    with pytest.warns(TableWarning) as warned:
        assert captions(table) == ["ёж"] * 2
    [message] = [str(warning.message) for warning in warned]
    assert message == f"{table}: {names[0]!r} and {names[1]!r} were taken for image and caption"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_exact_name_goes_before_the_same_in_other_letters(tmp_path: Path, suffix: str) -> None:
    rows = [{"Image": "b.png", "image": "a.png", "caption": "ёж"}]
    table = write_table(tmp_path / f"pairs{suffix}", rows)
    assert [row.image for row in read_rows(table, config(table))] == ["a.png"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_two_columns_that_could_be_meant_are_refused(tmp_path: Path, suffix: str) -> None:
    rows = [{"Image": "b.png", "IMAGE": "a.png", "caption": "ёж"}]
    table = write_table(tmp_path / f"pairs{suffix}", rows)
    message = said(lambda: read_rows(table, config(table)))
    assert message.startswith(f"{table}: more than one column 'image' ('Image', 'IMAGE')")
    assert message.endswith("Rename all but one")


def test_one_column_is_not_taken_for_two(tmp_path: Path) -> None:
    table = write_table(tmp_path / "pairs.csv", [{"text": "a.png"}])
    message = said(
        lambda: read_rows(table, config(table, image_column="Text", caption_column="TEXT"))
    )
    assert "expected a column for each of 'Text', 'TEXT', got 'text' for two of them" in message


@pytest.mark.parametrize(
    ("name", "text", "separator"),
    [
        ("a.csv", "sep=;\r\nimage;caption\r\na.png;ёж, кот\r\n", "semicolons"),
        ("a.csv", '"sep=\t"\nimage\tcaption\na.png\tёж, кот\n', "tabs"),
        ("a.csv", "image;caption\na.png;ёж, кот\n", "semicolons"),
        ("a.csv", "\ufeffimage\tcaption\na.png\tёж, кот\n", "tabs"),
        ("a.csv", "image|caption\na.png|ёж, кот\n", "bars"),
        ("a.tsv", 'image,caption\na.png,"ёж, кот"\n', "commas"),
    ],
)
def test_another_separator_is_read_and_named(
    tmp_path: Path, name: str, text: str, separator: str
) -> None:
    (tmp_path / name).write_text(text, newline="")
    with pytest.warns(TableWarning, match=f"columns are separated by {separator}"):
        [row] = read_rows(tmp_path / name, config(tmp_path / name))
    assert (row.image, row.caption) == ("a.png", "ёж, кот")
    assert row.location == ("line 3" if "sep=" in text else "line 2")


def test_a_separator_that_excel_states_as_usual_is_no_news(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("sep=,\nimage,caption\na.png,ёж\n")
    assert captions(tmp_path / "a.csv") == ["ёж"]


def test_a_missing_column_is_told_with_those_that_another_separator_gives(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("image;text\na.png;ёж\n")
    message = said(lambda: captions(tmp_path / "a.csv"))
    assert message == f"{tmp_path}/a.csv: no column 'caption'; columns found: 'image', 'text'"


def test_utf_16_of_excel_is_read_and_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("image\tcaption\r\na.png\tёж\r\n", "utf-16", newline="")
    with pytest.warns(TableWarning) as warned:
        assert captions(tmp_path / "a.csv") == ["ёж"]
    messages = " ".join(str(warning.message) for warning in warned)
    assert "read as UTF-16" in messages and "separated by tabs" in messages


OPEN = "quote that is never closed"


@pytest.mark.parametrize(
    ("lines", "faults"),
    [
        # A quote closed by another quote inside a word of the next line.
        (['a,"one', "b,two", 'c,"three', "d,four"], {2: OPEN, 3: "swallowed", 4: "swallowed"}),
        # Open to the end of the file.
        (["a,one", 'b,"two', "c,three"], {3: OPEN, 4: "swallowed"}),
        # The record starts on the line above the quote.
        (['"a', 'b","two', "c,three"], {2: "malformed row", 3: OPEN, 4: "swallowed"}),
        # A quote closed on its own line swallows nothing.
        (['a,"one" two', "b,three"], {2: "malformed row"}),
        (['a,"one two""', "b,three"], {2: OPEN, 3: "swallowed"}),
        (['a,"two', 'lines"', 'b,"""quoted"""'], {}),
    ],
)
def test_an_open_quote_is_told_by_its_line(
    tmp_path: Path, lines: list[str], faults: dict[int, str]
) -> None:
    (tmp_path / "a.csv").write_text("\n".join(["image,caption", *lines]))
    rows = read_rows(tmp_path / "a.csv", config(tmp_path / "a.csv"))
    errors = {row.location: row.error for row in rows if row.error}
    found = {key: error.removesuffix(" by an open quote") for key, error in errors.items()}
    assert found == {f"line {line}": fault for line, fault in faults.items()}


def open_quotes(folder: Path, number: int = 20) -> Path:
    """Write a table in which every fifth row opens a quote and never closes it."""
    rows = make_pairs(folder, number)
    lines = [
        f"{row['image']},{chr(34) * (index % 5 == 0)}подпись {index}"
        for index, row in enumerate(rows)
    ]
    (folder / "pairs.csv").write_text("\n".join(["image,caption", *lines]))
    return folder / "pairs.csv"


@pytest.mark.parametrize("max_bad_fraction", [0.05, 0.5])
def test_training_on_open_quotes_names_the_first(tmp_path: Path, max_bad_fraction: float) -> None:
    table = open_quotes(tmp_path)
    assert said(lambda: train(table, max_bad_fraction=max_bad_fraction)) == (
        f"{table}: expected closed quotes, got one that is opened in line 2 and never closed; "
        '12 of 20 rows cannot be used. Close it, or write "" for a quote inside a quoted text'
    )
    assert train(table, max_bad_fraction=0.6).report.num_kept == 8


def reported(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["data", "manifest", *map(str, arguments), "--image-size", "8"])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err


def test_the_report_fails_on_an_open_quote_unless_it_is_accepted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = open_quotes(tmp_path, 21)
    code, out, err = reported(capsys, table)
    assert code == 2 and "opened in line 2 and never closed" in err
    assert "skipped: 3 quote that is never closed (line 2, line 12, line 22)" in out
    assert reported(capsys, table, "--max-bad-fraction", "0.7")[0] == 0
    # A single open quote at the end is below every limit, but is still an error.
    rows = "\n".join(f"images/{number}.png,a" for number in range(20))
    table.write_text(f'image,caption\n{rows}\nimages/20.png,"a\n')
    assert reported(capsys, table)[0] == 2
    assert reported(capsys, table, "--max-bad-fraction", "0.5")[0] == 0


@pytest.mark.parametrize(("number_bad", "code"), [(10, 0), (11, 2)])
def test_the_report_fails_on_more_than_half_bad_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], number_bad: int, code: int
) -> None:
    bad = [{"image": "gone.png", "caption": "x"}] * number_bad
    table = write_table(tmp_path / "pairs.csv", make_pairs(tmp_path, 20 - number_bad) + bad)
    found, out, err = reported(capsys, table)
    assert found == code and f"{number_bad} skipped" in out
    assert ("expected at most max_bad_fraction = 50.0%" in err) == (code == 2)
    assert reported(capsys, table, "--max-bad-fraction", "0.6")[0] == 0
    assert reported(capsys, table, "--max-bad-fraction", "0.1")[0] == 2


def test_the_report_counts_the_splits_and_needs_no_pair_in_any(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(1, 4):
        code, out, _ = reported(
            capsys, write_table(tmp_path / "pairs.csv", make_pairs(tmp_path, number))
        )
        counts = dict(part.split(": ") for part in out.splitlines()[-1].split(", "))
        assert code == 0 and sum(map(int, counts.values())) == number
        assert set(counts) == {"train", "validation", "test"}


def test_the_report_takes_columns_and_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"file": row["image"], "text": row["caption"]} for row in make_pairs(tmp_path, 3)]
    table = write_table(tmp_path / "pairs.csv", rows)
    columns = ("--image-column", "file", "--caption-column", "text")
    assert reported(capsys, table, *columns)[0] == 0
    assert reported(capsys, table)[0] == 2
    part = [{"type": "text", "content": "кто?"}, {"type": "image", "content": "images/0.png"}]
    (tmp_path / "asked.json").write_text(json.dumps({"0": part}))
    (tmp_path / "told.json").write_text(json.dumps({"0": part[:1]}))
    arguments = (tmp_path / "asked.json", "--answers", tmp_path / "told.json")
    assert "1 kept" in reported(capsys, *arguments)[1]


def test_json_rows_that_are_arrays_are_told_with_their_lines(tmp_path: Path) -> None:
    table = tmp_path / "a.jsonl"
    table.write_text('["a.png", "x"]\n' * 4)
    assert said(lambda: train(table)) == (
        f"{table}: expected usable rows, got none: rows are arrays, not objects with "
        "'image', 'caption', 4 of 4 rows skipped (line 1, line 2, line 3, ...)"
    )


@pytest.mark.parametrize("name", ["my pairs.jsonl", "my pairs.json"])
@pytest.mark.parametrize("indent", [None, 1])
def test_one_array_of_json_is_told_with_the_command_that_converts_it(
    tmp_path: Path, name: str, indent: int | None
) -> None:
    rows = [{"image": "a.png", "caption": "x"}] * 2
    (tmp_path / name).write_text(json.dumps(rows, indent=indent))
    message = said(lambda: train(tmp_path / name))
    assert message == (
        f"{tmp_path / name}: expected an object per line (JSONL), got one JSON array. "
        f"Convert it: jq -c '.[]' '{tmp_path / name}' > '{tmp_path}/my pairs-lines.jsonl'"
    )


def test_json_lines_may_have_a_mark_blank_lines_and_carriage_returns(tmp_path: Path) -> None:
    row = json.dumps({"image": "a.png", "caption": "ёж"}, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_text(f"\ufeff{row}\r\n\r\n  \r\n{row}\r\n", newline="")
    rows = read_rows(tmp_path / "a.jsonl", config(tmp_path / "a.jsonl"))
    assert [(row.location, row.caption) for row in rows] == [("line 1", "ёж"), ("line 4", "ёж")]


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ("https://example.org/a.png", "images are URLs in column image"),
        ("data:image/png;base64," + "iVBORw0KGgo" * 900, "images are URLs in column image"),
        ("img\\a.png", "missing file (write its path with / instead of \\)"),
        ("/no/such/a.png", "missing file"),
        ({"url": "a.png"}, "image paths are objects in column image"),
    ],
)
def test_images_that_are_no_files_are_told_by_kind(
    tmp_path: Path, image: object, reason: str
) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": image, "caption": "x"}))
    assert f"got none: {reason}" in said(lambda: train(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("name", ["pairs.csv.gz", "pairs.xlsx", "pairs.txt"])
def test_a_file_of_another_kind_is_told_with_what_to_do(tmp_path: Path, name: str) -> None:
    data = {"gz": b"\x1f\x8b\x08\x00", "xlsx": b"PK\x03\x04", "txt": b"image,caption\n"}
    (tmp_path / name).write_bytes(data[name.rpartition(".")[2]])
    message = said(lambda: find_table(str(tmp_path / name)))
    expected = {
        "gz": f"gunzip -c {tmp_path}/{name} > {tmp_path}/pairs.csv",
        "xlsx": "save it as CSV in UTF-8",
        "txt": "a manifest must end in one of .csv",
    }
    assert expected[name.rpartition(".")[2]] in message


def damaged(data: bytes, generator: random.Random) -> bytes:
    """Change, insert, remove, repeat or cut bytes at a few random positions."""
    found = bytearray(data)
    for _ in range(generator.choice((1, 1, 2, 5, 20))):
        at = generator.randrange(len(found) + 1)
        length = generator.choice((1, 1, 2, 8, 64))
        some = bytes(generator.choice((0, 9, 10, 13, 34, 44, 59, 92, 123, 255, 208)) for _ in "ab")
        change = generator.choice(("flip", "insert", "remove", "repeat", "cut", "random"))
        if change == "flip" and at < len(found):
            found[at] ^= 1 << generator.randrange(8)
        elif change == "insert":
            found[at:at] = some
        elif change == "remove":
            del found[at : at + length]
        elif change == "repeat":
            found[at:at] = found[at : at + length]
        elif change == "random":
            found[at : at + length] = generator.randbytes(length)
        elif change == "cut" and generator.random() < 0.2:
            del found[at:]
    return bytes(found)


STRANGE: list[Any] = [None, 5, 2.5, True, "", " ", "\0", "a\nb", '"', "ё" * 3000, b"\xff", [], {}]
STRANGE += ["http://a/b.png", "../..", "/", ".", "img\\a.png", "\u202e", "x" * 5000, {"path": 3}]
NAMES = ["Image", "IMAGE ", "image", "caption", " Caption", "", "a;b", 'a"b', "image\n", "\ufeff"]


def fuzzed(folder: Path, generator: random.Random) -> Path:
    """Write a table in a random format with unusual names, values, images or bytes."""
    suffix = generator.choice(SUFFIXES)
    image = encoded(noise(9, 9, generator.randrange(5)), generator.choice(("PNG", "GIF", "JPEG")))
    rows: list[dict[str, Any]] = []
    kind = generator.choice(("header", "row", "image", "bytes", "bytes"))
    for number in range(8):
        data = damaged(image, generator) if kind == "image" else image
        path = folder / f"{number}.png"
        path.write_bytes(data)
        is_stored = suffix == ".parquet" and kind in ("image", "bytes")
        rows.append(
            {
                "image": {"bytes": data, "path": path.name} if is_stored else path.name,
                "caption": f"ёж {number}",
            }
        )
    if kind == "row":
        for row in generator.sample(rows, 3):
            row[generator.choice(list(row))] = generator.choice(STRANGE)
    if kind == "header":
        names = generator.sample(NAMES, 2) if generator.random() < 0.7 else [NAMES[0]] * 2
        rows = [dict(zip(names, row.values(), strict=False)) for row in rows]
    table = folder / f"pairs{suffix}"
    try:
        write_table(table, rows)
    except (pyarrow.ArrowException, TypeError, UnicodeEncodeError):
        # Values that this format cannot store in one column are written as text.
        frame = pd.DataFrame([{name: str(value) for name, value in row.items()} for row in rows])
        write_table(table, frame.to_dict("records"))
    if kind == "bytes":
        table.write_bytes(damaged(table.read_bytes(), generator))
    return table


def fuzzed_questions(folder: Path, generator: random.Random) -> tuple[Path, Path]:
    """Write questions and answers in JSON, with unusual values or bytes in one file."""
    (folder / "a.png").write_bytes(encoded(noise()))
    text, image = {"type": "text", "content": "кто?"}, {"type": "image", "content": "a.png"}
    files: list[dict[str, Any]] = [{}, {}]
    for number in range(6):
        for file, parts in zip(files, ([text, image], [text]), strict=True):
            file[str(number)] = [dict(part) for part in parts]
    damaged_file, value = generator.randrange(2), generator.choice(STRANGE)
    if not isinstance(value, bytes) and generator.random() < 0.5:
        part = files[damaged_file]["3"][0]
        part[generator.choice(("type", "content"))] = value
    paths = folder / "asked.json", folder / "told.json"
    for path, file in zip(paths, files, strict=True):
        path.write_text(json.dumps(file, ensure_ascii=False))
    if generator.random() < 0.6:
        data = paths[damaged_file].read_bytes()
        paths[damaged_file].write_bytes(damaged(data, generator))
    return paths


def test_any_damage_is_read_or_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = random.Random(0)
    outcomes: Counter[str] = Counter()
    for case in range(FUZZ_CASES):
        folder = tmp_path / str(case)
        folder.mkdir()
        answers: list[str] = []
        if generator.random() < 0.15:
            table, told = fuzzed_questions(folder, generator)
            answers = [str(told)]
        else:
            table = fuzzed(folder, generator)
        settings = ManifestConfig(
            str(table), answers=next(iter(answers), None), max_bad_fraction=1
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TableWarning)
            flags = [f"--answers={path}" for path in answers]
            code = main(["data", "manifest", str(table), "--image-size", "8", *flags])
            error = capsys.readouterr().err
            assert code in (0, 2) and "Traceback" not in error
            assert error.count("rudolph: ") == (code == 2)
            outcomes["accepted" if code == 0 else "refused"] += 1
            try:
                manifest = Manifest(settings, split="train", image_size=8)
            except ValueError as refusal:
                assert "\n" not in str(refusal)
                assert str(refusal).startswith((str(table), *answers))
                outcomes["not opened"] += 1
            else:
                for index in range(len(manifest)):
                    assert manifest[index].image.size == (8, 8)
                outcomes["opened"] += 1
    print(dict(outcomes))
    assert outcomes["accepted"] and outcomes["refused"]
    assert outcomes["opened"] and outcomes["not opened"]
