"""Tables of user data: which pairs are kept, skipped, counted and reported."""

import hashlib
import io
import json
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rudolph.data.datasets import manifests
from rudolph.data.datasets.manifests import Manifest, split_of_image, splits_of_images
from rudolph.data.datasets.tables import ManifestConfig, find_table, read_rows
from rudolph.data.image_files import center_crop, decode_image
from rudolph.data.pairs import HASH_SPLITS, Pair, hash_fraction

SPLITS = ("train", "validation", "test")


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int = 12, height: int = 9, seed: int = 0) -> Image.Image:
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def bomb(side: int) -> bytes:
    """Return a small PNG whose header claims ``side`` by ``side`` pixels."""
    data = encoded(Image.new("1", (8, 8)))
    header = b"IHDR" + struct.pack(">II", side, side) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    frame = pd.DataFrame(rows)
    if path.suffix == ".jsonl":
        path.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
        )
    elif path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, sep="\t" if path.suffix == ".tsv" else ",", index=False)
    return path


def make_pairs(folder: Path, number: int) -> list[dict[str, Any]]:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(number):
        name = f"images/{index}.png"
        noise(10, 8, seed=index).save(folder / name)
        rows.append({"image": name, "caption": f'картинка "{index}", красная', "other": index})
    return rows


def config(path: Path, **options: Any) -> ManifestConfig:
    return ManifestConfig(path=str(path), **options)


def train(path: Path, **options: Any) -> Manifest:
    return Manifest(config(path, **options), split="train", image_size=8)


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def said(action: Callable[[], object]) -> str:
    """Return the one-line message of the ``ValueError`` that ``action`` raises."""
    with pytest.raises(ValueError) as error:
        action()
    assert "\n" not in str(error.value)
    return str(error.value)


def content(pair: Pair) -> tuple[str, str, bytes]:
    return pair.key, pair.caption, pair.image.tobytes()


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_every_kind_of_table_gives_the_same_pairs(tmp_path: Path, suffix: str) -> None:
    # Enough rows that every split has an image by its hash.
    rows = make_pairs(tmp_path, 60)
    manifest = train(write_table(tmp_path / f"pairs{suffix}", rows))
    expected = [
        (f"{row['image']} | {row['caption']}", row["caption"], center_crop(noise(10, 8, i), 8))
        for i, row in enumerate(rows)
        if hash_fraction(digest_of(tmp_path / row["image"])) < 0.9
    ]
    assert [content(manifest[i]) for i in range(len(manifest))] == [
        (key, caption, image.tobytes()) for key, caption, image in expected
    ]
    assert manifest.report.num_kept == manifest.report.num_rows == 60
    assert manifest.digest == train(write_table(tmp_path / "other.jsonl", rows)).digest


def test_the_splits_share_out_images_with_all_their_captions_and_copies(tmp_path: Path) -> None:
    rows = make_pairs(tmp_path, 600)
    for index, row in enumerate(rows[:60]):
        shutil.copyfile(tmp_path / row["image"], tmp_path / f"images/copy-{index}.png")
        rows.append(row | {"image": f"images/copy-{index}.png"})
        rows.append(row | {"caption": f"другая подпись {index}"})
    table = write_table(tmp_path / "pairs.csv", rows)
    parts = {name: Manifest(config(table), split=name, image_size=8) for name in SPLITS}
    assert len({entry.key for part in parts.values() for entry in part.entries}) == 720
    images = {name: {entry.sha256 for entry in part.entries} for name, part in parts.items()}
    assert sum(map(len, images.values())) == len(set.union(*images.values())) == 600
    for name, share in zip(SPLITS, (0.90, 0.05, 0.05), strict=True):
        # Four standard deviations of a binomial fraction.
        assert abs(len(images[name]) / 600 - share) < 4 * (share * (1 - share) / 600) ** 0.5
    assert len({part.digest for part in parts.values()}) == 3


def test_new_rows_and_another_order_move_no_pair_to_another_split(tmp_path: Path) -> None:
    rows = make_pairs(tmp_path, 40)
    some = train(write_table(tmp_path / "some.csv", rows[:30]))
    every = train(write_table(tmp_path / "every.csv", rows[::-1]))
    thirty = {f"{row['image']} | {row['caption']}" for row in rows[:30]}
    assert {entry.key for entry in some.entries} == thirty & {e.key for e in every.entries}


def test_the_digest_stays_when_the_folder_moves_or_bad_rows_come(tmp_path: Path) -> None:
    rows = make_pairs(tmp_path, 10)
    digest = train(write_table(tmp_path / "pairs.csv", rows)).digest
    moved = tmp_path / "moved"
    absolute = [row | {"image": str(moved / row["image"])} for row in make_pairs(moved, 10)]
    assert train(write_table(moved / "pairs.csv", absolute)).digest == digest
    more = write_table(tmp_path / "more.csv", [{"image": "none.png", "caption": "x"}, *rows])
    assert train(more, max_bad_fraction=0.5).digest == digest


def test_the_digest_changes_with_whatever_changes_the_pairs(tmp_path: Path) -> None:
    rows = make_pairs(tmp_path, 10)
    table = write_table(tmp_path / "pairs.csv", rows)
    first = train(table)
    digests = {first.digest, Manifest(config(table), split="train", image_size=9).digest}
    digests.add(train(write_table(table, rows[::-1])).digest)
    changed = [row | {"caption": row["caption"] + "!"} for row in rows]
    digests.add(train(write_table(table, changed)).digest)
    noise(10, 8, seed=99).save(first.entries[0].path)
    digests.add(train(write_table(table, rows)).digest)
    assert len(digests) == 5


def test_a_image_that_changes_after_the_report_is_an_error(tmp_path: Path) -> None:
    manifest = train(write_table(tmp_path / "pairs.csv", make_pairs(tmp_path, 5)))
    image = Path(manifest.entries[0].path)
    image.write_bytes(encoded(Image.new("RGB", (10, 8))))
    assert said(lambda: manifest[0]).startswith(f"{image}: the image changed")


def test_the_three_splits_decode_each_image_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Mock(wraps=decode_image)
    monkeypatch.setattr(manifests, "decode_image", opened)
    rows = make_pairs(tmp_path, 60)
    table = write_table(tmp_path / "pairs.csv", rows)
    seen: list[tuple[int, int]] = []
    for name in SPLITS:
        Manifest(config(table), split=name, image_size=8, progress=lambda *step: seen.append(step))
    read = sorted(call.args[0] for call in opened.call_args_list)
    assert read == sorted((tmp_path / row["image"]).read_bytes() for row in rows)
    assert seen == [(done, 60) for done in range(1, 61)] * 3


BAD_ROWS: list[Any] = [
    {"image": "cut.png", "caption": "x"},
    {"image": "bomb.png", "caption": "x"},
    {"image": "tiny.png", "caption": "x"},
    {"image": "none.png", "caption": "x"},
    {"image": "images", "caption": "x"},
    {"image": "images/0.png/a.png", "caption": "x"},
    {"image": "n" * 5000, "caption": "x"},
    {"image": "images/0.png", "caption": " \t"},
    {"image": "images/0.png"},
    {"image": "images/0.png", "caption": 5},
    {"image": "images/0.png", "caption": "\ud83d"},
    {"image": "", "caption": "x"},
    {"image": ["a"], "caption": "x"},
    {"image": "a\0b", "caption": "x"},
    ["images/0.png", "x"],
]


def test_bad_rows_are_skipped_counted_and_named(tmp_path: Path) -> None:
    good = make_pairs(tmp_path, 30)
    (tmp_path / "cut.png").write_bytes(encoded(noise(64, 64))[:2000])
    (tmp_path / "bomb.png").write_bytes(bomb(60000))
    (tmp_path / "tiny.png").write_bytes(encoded(Image.new("RGB", (1, 1))))
    Image.new("CMYK", (9, 9)).save(tmp_path / "print.jpg")
    lines = [json.dumps(row) for row in [*good, *BAD_ROWS, {"image": "print.jpg", "caption": "x"}]]
    (tmp_path / "pairs.jsonl").write_text("\n".join([*lines, '{"image": "a.png', ""]))
    report = train(tmp_path / "pairs.jsonl", max_bad_fraction=0.4).report
    counts = {reason: tally.count for reason, tally in report.skipped.items()}
    assert counts == {
        "corrupt image": 1,
        "decompression bomb": 1,
        "too small": 1,
        "missing file": 3,
        "unreadable file": 1,
        "empty caption": 2,
        "captions are numbers in column caption": 1,
        "caption is not text": 1,
        "no image path": 1,
        "image paths are arrays in column image": 1,
        "image path is not text": 1,
        "rows are arrays, not objects with 'image', 'caption'": 1,
        "row is not JSON": 1,
    }
    assert report.skipped["too small"].names == ["line 33 tiny.png"]
    assert report.skipped["row is not JSON"].names == ["line 47"]
    assert report.converted["CMYK"].names == ["line 46 print.jpg"]
    assert (report.num_rows, report.num_kept, report.num_skipped) == (47, 31, 16)


@pytest.mark.parametrize(("number_bad", "stops"), [(1, False), (2, True)])
def test_more_than_the_stated_share_of_bad_rows_stops(
    tmp_path: Path, number_bad: int, stops: bool
) -> None:
    rows = make_pairs(tmp_path, 20 - number_bad)
    bad = [{"image": "gone.png", "caption": f"x\n{i}"} for i in range(number_bad)]
    table = write_table(tmp_path / "pairs.csv", rows + bad)
    if not stops:
        assert train(table).report.num_skipped == 1
        return
    message = said(lambda: train(table))
    assert message == (
        f"{table}: 2 of 20 rows are bad (10.0%), expected at most max_bad_fraction = 5.0%: "
        "2 missing file (line 20 gone.png, line 22 gone.png). "
        "Correct them, or raise max_bad_fraction to skip them"
    )


def test_a_small_image_is_enlarged_and_counted(tmp_path: Path) -> None:
    table = write_table(tmp_path / "pairs.csv", make_pairs(tmp_path, 5))
    manifest = Manifest(config(table), split="train", image_size=16)
    assert manifest.report.converted["enlarged"].count == 5
    assert manifest[0].image.size == (16, 16) and manifest[0].image.mode == "RGB"


def captions(table: Path) -> list[object]:
    return [row.error or row.caption for row in read_rows(table, config(table))]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path, suffix: str) -> None:
    table = write_table(tmp_path / f"pairs{suffix}", [{"image": "a.png", "caption": "ёж"}])
    table.write_bytes(b"\xef\xbb\xbf" + table.read_bytes())
    assert captions(table) == ["ёж"]


def test_a_cp1251_table_is_told_by_its_first_such_byte(tmp_path: Path) -> None:
    table = tmp_path / "pairs.csv"
    table.write_bytes("image,caption\na.png,ok\nb.png,ёж\n".encode("cp1251"))
    message = said(lambda: train(table))
    assert message.startswith(f"{table}: expected UTF-8, got byte 0xb8 at offset 29 (line 3)")
    assert table.read_bytes()[29] == 0xB8


line_texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(line_texts, min_size=1, max_size=5), suffix=st.sampled_from([".csv", ".tsv"])
)
def test_quotes_delimiters_and_line_ends_in_captions_survive(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], suffix: str
) -> None:
    table = tmp_path_factory.mktemp("table") / f"pairs{suffix}"
    frame = pd.DataFrame({"caption": texts, "image": "a.png"})
    frame.to_csv(table, index=False, sep="," if suffix == ".csv" else "\t", quoting=1)
    assert captions(table) == texts


def test_line_separators_inside_json_strings_do_not_end_a_row(tmp_path: Path) -> None:
    table = write_table(
        tmp_path / "pairs.jsonl", [{"image": "a.png", "caption": "a\u2028b\x85c"}] * 2
    )
    assert captions(table) == ["a\u2028b\x85c"] * 2


def test_ragged_and_blank_lines_of_a_csv_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text(
        'image,caption\n\na.png,one\nb.png\nc.png,too,many\nd.png,"a"b\ne.png,two\n'
    )
    rows = read_rows(tmp_path / "pairs.csv", config(tmp_path))
    assert [(row.location, row.error) for row in rows] == [
        (f"line {line}", "malformed row" if line in (4, 5, 6) else "") for line in range(3, 8)
    ]
    assert (rows[0].caption, rows[-1].caption) == ("one", "two")


def test_a_quote_that_never_closes_counts_every_line_that_it_swallows(tmp_path: Path) -> None:
    lines = ["image,caption", "a.png,one", 'b.png,"two', *["c.png,three"] * 10]
    (tmp_path / "pairs.csv").write_text("\n".join(lines) + "\n")
    rows = read_rows(tmp_path / "pairs.csv", config(tmp_path))
    assert [row.location for row in rows] == [f"line {number}" for number in range(2, 14)]
    assert [bool(row.error) for row in rows] == [False] + [True] * 11


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_an_unknown_column_names_those_found_and_the_nearest(tmp_path: Path, suffix: str) -> None:
    table = write_table(tmp_path / f"pairs{suffix}", [{"image": "a.png", "captions": "x"}])
    assert said(lambda: train(table)) == (
        f"{table}: no column 'caption'; columns found: 'image', 'captions'; "
        "did you mean 'captions'?"
    )


@pytest.mark.parametrize(
    ("name", "header", "expected"),
    [
        ("a.csv", "image,caption,caption", "more than one column 'caption'"),
        ("a.csv", "", "expected data, got an empty file"),
        ("a.parquet", "", "expected data, got an empty file"),
        ("a.csv", 'image,"cap"tion', "the first line must name the columns"),
        ("a.csv", "image,caption\n", "the table has no rows"),
        ("a.jsonl", "", "expected data, got an empty file"),
        ("a.jsonl", "[]", "1 of 1 rows skipped (line 1)"),
        ("a.parquet", "image,caption", "expected a whole Parquet file"),
    ],
)
def test_a_table_that_cannot_be_read_is_told_in_one_line(
    tmp_path: Path, name: str, header: str, expected: str
) -> None:
    (tmp_path / name).write_text(header)
    message = said(lambda: train(tmp_path))
    assert message.startswith(f"{tmp_path / name}: ") and expected in message


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_missing_captions_of_a_parquet_table_are_empty(
    tmp_path: Path, missing: float | None
) -> None:
    noise().save(tmp_path / "a.png")
    table = tmp_path / "pairs.parquet"
    columns = pyarrow.table({"image": ["a.png"] * 3, "caption": [missing] * 3})
    pyarrow.parquet.write_table(columns, table)
    with pytest.raises(ValueError, match="got none: empty caption, 3 of 3 rows skipped"):
        train(table)


def test_a_folder_must_hold_exactly_one_table(tmp_path: Path) -> None:
    assert "exactly one table" in said(lambda: find_table(str(tmp_path)))
    table = write_table(tmp_path / "a.csv", [{"image": "a", "caption": "b"}])
    (tmp_path / "readme.md").write_text("not a table")
    assert find_table(str(tmp_path)) == find_table(str(table)) == table
    write_table(tmp_path / "b.jsonl", [{"image": "a", "caption": "b"}])
    assert said(lambda: find_table(str(tmp_path))).endswith("got 2: a.csv, b.jsonl")


def test_a_path_that_is_no_table_is_told_in_one_line() -> None:
    assert said(lambda: find_table("")).startswith("path of the manifest is empty")
    assert said(lambda: find_table("no/such.csv")) == "no/such.csv: no such file or folder"
    legal = ".py: a manifest must end in one of .csv, .tsv, .jsonl, .parquet, .json"
    assert said(lambda: find_table(__file__)).endswith(legal)


def test_settings_without_sense_are_told_in_one_line() -> None:
    assert "got 1.5" in said(lambda: ManifestConfig(max_bad_fraction=1.5))
    assert "must differ" in said(lambda: ManifestConfig(caption_column="image"))


@pytest.mark.parametrize(
    ("split", "image_size", "expected"),
    [
        ("compositional", 8, "split 'compositional': a manifest has none"),
        ("dev", 8, "split must be one of"),
        ("train", 0, "image_size must be at least 1 pixel, got 0"),
    ],
)
def test_a_split_or_size_that_a_manifest_cannot_have_is_told_in_one_line(
    tmp_path: Path, split: str, image_size: int, expected: str
) -> None:
    table = config(write_table(tmp_path / "pairs.csv", make_pairs(tmp_path, 1)))
    message = said(lambda: Manifest(table, split=split, image_size=image_size))
    assert message.startswith(expected)


def test_a_split_without_pairs_is_told_in_one_line(tmp_path: Path) -> None:
    table = write_table(tmp_path / "pairs.csv", make_pairs(tmp_path, 1))
    is_test = hash_fraction(digest_of(tmp_path / "images/0.png")) >= 0.95
    empty = "train" if is_test else "test"
    message = said(lambda: Manifest(config(table), split=empty, image_size=8))
    assert f"none of its 1 usable rows falls into the split '{empty}'" in message


@pytest.mark.parametrize("number", [1, 2, 3, 12, 3000])
def test_every_split_of_a_small_table_has_an_image(number: int) -> None:
    digests = [hashlib.sha256(f"{number} {row}".encode()).hexdigest() for row in range(number)]
    splits = splits_of_images(digests)
    assert [*splits] == digests
    moved = {splits[digest] for digest in digests if splits[digest] != split_of_image(digest)}
    hashed = {split_of_image(digest) for digest in digests}
    if number >= 3:
        assert {*splits.values()} == {*HASH_SPLITS}
        # Only images that an empty split needs change their place.
        assert moved == {*HASH_SPLITS} - hashed
    if number == 3000:
        assert not moved
