"""Parquet tables: allowed column types, and images stored in cells."""

import random
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from test_manifests import config, encoded, noise, said, train

from rudolph.data.datasets.manifests import examine_table, split_of_image
from rudolph.data.datasets.table_parquet import StoredBytes, parquet_cells
from rudolph.data.image_files import center_crop

CAPTIONS = [f"картинка {number}" for number in range(12)]
BYTES = [encoded(noise(10, 8, seed=number)) for number in range(12)]
HUGGING_FACE = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])


def write(path: Path, images: Any, captions: Any = CAPTIONS, **options: Any) -> Path:
    columns = {"image": images, "caption": captions}
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def structs(data: list[bytes | None], path: str | None = "{}.png") -> pyarrow.Array:
    rows = [
        {"bytes": value, "path": None if path is None else path.format(number)}
        for number, value in enumerate(data)
    ]
    return pyarrow.array(rows, HUGGING_FACE)


@pytest.mark.parametrize(
    "images",
    [
        structs(BYTES),
        structs(BYTES, path=None),
        pyarrow.array([{"bytes": data} for data in BYTES]),
        pyarrow.array(BYTES),
        pyarrow.array(BYTES, pyarrow.large_binary()),
        pyarrow.array([{"path": "x", "bytes": data} for data in BYTES]),
    ],
)
def test_images_of_the_table_itself_give_pairs(tmp_path: Path, images: pyarrow.Array) -> None:
    manifest = train(write(tmp_path / "pairs.parquet", images, row_group_size=5))
    assert manifest.report.num_kept == 12
    expected = {
        caption: center_crop(noise(10, 8, seed=number), 8).tobytes()
        for number, caption in enumerate(CAPTIONS)
    }
    pairs = [manifest[index] for index in range(len(manifest))]
    assert len({pair.key for pair in pairs}) == len(pairs) > 6
    for pair in pairs:
        assert pair.image.tobytes() == expected[pair.caption]


def test_stored_images_and_files_of_the_same_bytes_are_in_the_same_split(tmp_path: Path) -> None:
    stored = train(write(tmp_path / "stored.parquet", structs(BYTES)))
    for number, data in enumerate(BYTES):
        (tmp_path / f"{number}.png").write_bytes(data)
    files = train(write(tmp_path / "files.parquet", [f"{number}.png" for number in range(12)]))
    assert [entry.caption for entry in stored.entries] == [e.caption for e in files.entries]
    assert all(split_of_image(entry.sha256) == "train" for entry in stored.entries)
    assert stored.entries[0].key.startswith("0.png#") and files.entries[0].key.startswith(
        "0.png |"
    )


def test_the_path_of_a_struct_serves_where_it_has_no_bytes(tmp_path: Path) -> None:
    for number in range(0, 12, 2):
        (tmp_path / f"{number}.png").write_bytes(BYTES[number])
    images = structs([None if number % 2 == 0 else data for number, data in enumerate(BYTES)])
    manifest = train(write(tmp_path / "pairs.parquet", images))
    assert manifest.report.num_kept == 12
    by_caption = {manifest[i].caption: manifest[i].image for i in range(len(manifest))}
    for number, caption in enumerate(CAPTIONS):
        if caption in by_caption:
            expected = center_crop(noise(10, 8, seed=number), 8)
            assert by_caption[caption].tobytes() == expected.tobytes()


def test_rows_without_image_and_damaged_images_are_counted(tmp_path: Path) -> None:
    images = structs([*BYTES[:9], b"not an image", BYTES[0][:60], None])
    none = pyarrow.array([*images.to_pylist()[:11], None], HUGGING_FACE)
    report = train(write(tmp_path / "pairs.parquet", none), max_bad_fraction=0.5).report
    counts = {reason: tally.names for reason, tally in report.skipped.items()}
    assert counts == {
        "corrupt image": ["row 10 9.png", "row 11 10.png"],
        "no image path": ["row 12"],
    }


def test_encoded_strings_and_nulls_are_texts_and_missing_texts(tmp_path: Path) -> None:
    captions = pyarrow.array([*CAPTIONS[:11], None]).dictionary_encode()
    paths = pyarrow.array(["a.png"] * 12, pyarrow.large_string())
    table = write(tmp_path / "pairs.parquet", paths, captions)
    assert list(parquet_cells(table, ["image", "caption"])) == [
        ("a.png", caption) for caption in [*CAPTIONS[:11], None]
    ]


def test_a_row_that_lacks_its_question_is_left_out(tmp_path: Path) -> None:
    noise().save(tmp_path / "a.png")
    columns = {"image": ["a.png"] * 2, "caption": ["да", "нет"], "question": ["это кот?", None]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    table = config(tmp_path / "a.parquet", question_column="question")
    report = examine_table(table, image_size=8).report
    assert report.num_kept == 1 and report.skipped["empty question"].names == ["row 2 a.png"]


@pytest.mark.parametrize("numbers", [list(range(12)), [float(number) for number in range(12)]])
def test_captions_that_are_numbers_are_told_with_their_column(
    tmp_path: Path, numbers: list[Any]
) -> None:
    noise().save(tmp_path / "a.png")
    table = write(tmp_path / "pairs.parquet", ["a.png"] * 12, numbers)
    assert said(lambda: train(table)) == (
        f"{table}: expected usable rows, got none: captions are numbers in column caption, "
        "12 of 12 rows skipped (row 1 a.png, row 2 a.png, row 3 a.png, ...)"
    )


@pytest.mark.parametrize(
    ("images", "captions", "expected"),
    [
        (["a"], [["x", "y"]], "got list<element: string>. Write a row for each text"),
        (["a"], [{"en": "x"}], "got struct<en: string>. Convert it to text"),
        (["a"], [True], "got bool. Convert it to text"),
        ([["a"]], ["x"], "in column 'image', got list<element: string>. Write one image per row"),
        ([{"url": "a"}], ["x"], "in column 'image', got struct<url: string>"),
        ([1.5], ["x"], "in column 'image', got double"),
    ],
)
def test_columns_that_cannot_hold_pairs_are_refused_by_their_type(
    tmp_path: Path, images: list[Any], captions: list[Any], expected: str
) -> None:
    table = write(tmp_path / "pairs.parquet", images, captions)
    assert expected in said(lambda: train(table))


def test_stored_bytes_are_the_same_in_any_order_of_rows(tmp_path: Path) -> None:
    data = [bytes([number]) * 3 for number in range(200)]
    table = write(tmp_path / "a.parquet", data, ["x"] * 200, row_group_size=90)
    stored = StoredBytes(table, "image")
    order = [199, 0, 89, 90, 88, 0, 179, 180, 64, 63, 65]
    assert [stored[row] for row in order] == [data[row] for row in order]


def test_a_table_of_images_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    number, generator = 300, random.Random(0)
    data = [bytes([row % 256]) + generator.randbytes(40_000) for row in range(number)]
    table = write(tmp_path / "a.parquet", structs(data), ["x"] * number, write_batch_size=20)
    assert table.stat().st_size > number * len(data[0]) * 0.9
    before = pyarrow.total_allocated_bytes()
    peak = 0
    for values in parquet_cells(table, ["image", "caption"]):
        assert values is not None
        assert values[0].data()[:1] == data[values[0].row][:1]
        peak = max(peak, pyarrow.total_allocated_bytes() - before)
    assert peak < number * len(data[0]) / 2


def test_a_stored_image_that_changes_after_the_report_is_an_error(tmp_path: Path) -> None:
    table = write(tmp_path / "pairs.parquet", structs(BYTES))
    manifest = train(table)
    write(table, structs([encoded(Image.new("RGB", (9, 9)))] * 12))
    assert "changed after the data was read" in said(lambda: manifest[0])
    table.unlink()
    assert said(lambda: manifest[0]) == f"{table}: the image can no longer be read"


@pytest.mark.parametrize("kept", [0.2, 0.5, 0.99])
def test_a_truncated_file_is_told_in_one_line(tmp_path: Path, kept: float) -> None:
    table = write(tmp_path / "pairs.parquet", structs(BYTES))
    table.write_bytes(table.read_bytes()[: int(table.stat().st_size * kept)])
    message = said(lambda: train(table))
    assert message.startswith(f"{table}: expected a whole Parquet file")


def test_a_damaged_page_of_images_is_told_in_one_line(tmp_path: Path) -> None:
    table = write(tmp_path / "pairs.parquet", structs(BYTES), compression="zstd")
    data = bytearray(table.read_bytes())
    data[30:400] = b"\xff" * 370
    table.write_bytes(data)
    assert said(lambda: train(table)).startswith(f"{table}: expected a whole Parquet file")
