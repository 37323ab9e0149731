"""Packed pairs: the same pairs as the table they came from, whatever interrupts the packing."""

import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rudolph.cli import main
from rudolph.data.datasets.manifests import Manifest
from rudolph.data.datasets.packed_pairs import PackedPairs, PackedPairsConfig
from rudolph.data.datasets.tables import ManifestConfig
from rudolph.data.examples import task_texts
from rudolph.data.pairs import HASH_SPLITS
from rudolph.data.shards import packing, sources
from rudolph.data.shards.layout import BATCH_ROWS
from rudolph.data.shards.packing import pack_pairs
from rudolph.data.shards.sources import Source, open_source
from rudolph.data.splits import DataConfig, Split
from rudolph.sequence.layout import SequenceLayout, Vocabulary
from rudolph.sequence.tokenizer import Tokenizer

NUM_PAIRS = 150


def png(number: int, size: int = 9) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (size, size + 2, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a table in which images repeat and two rows are bad."""
    folder = tmp_path_factory.mktemp("table")
    lines = [{"image": "missing.png", "caption": "нет"}, {"image": "3.png", "caption": " "}]
    for number in range(NUM_PAIRS):
        image = f"{number % 140}.png"
        (folder / image).write_bytes(png(number % 140))
        lines.append({"image": image, "caption": f"подпись {number}", "question": f"что {number}"})
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (folder / "pairs.jsonl").write_text(text, "utf-8")
    return folder / "pairs.jsonl"


def config_of(source: Path, **settings: Any) -> ManifestConfig:
    return ManifestConfig(path=str(source), **settings)


def source_of(path: Path, **settings: Any) -> Source:
    return open_source(config_of(path, **settings))


def files(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PART_ROWS", 90)


@pytest.mark.parametrize("question", [None, "question"])
def test_packed_pairs_are_those_of_the_table(
    question: str | None, table: Path, tmp_path: Path, small_parts: None
) -> None:
    config = config_of(table, question_column=question)
    report = pack_pairs(open_source(config), tmp_path / "packed")
    for name in HASH_SPLITS:
        manifest = Manifest(config, split=name, image_size=8)
        packed = PackedPairs(PackedPairsConfig(str(tmp_path / "packed")), split=name, image_size=8)
        assert report == manifest.report
        assert len(packed) == len(manifest)
        # From the last to the first, across record batches and shards.
        for index in reversed(range(len(manifest))):
            own, expected = packed[index], manifest[index]
            assert (own.key, own.caption, own.question) == (
                expected.key,
                expected.caption,
                expected.question,
            )
            assert np.array_equal(np.asarray(own.image), np.asarray(expected.image))
        copy = pickle.loads(pickle.dumps(packed))
        assert [*copy.texts("caption")] == [entry.caption for entry in manifest.entries]
    assert len(manifest.entries) < BATCH_ROWS < report.num_kept


def test_training_sees_the_same_of_packed_pairs_and_of_the_table(
    table: Path, tmp_path: Path, small_parts: None
) -> None:
    pack_pairs(source_of(table), tmp_path / "packed")
    common = {"image_size": 8, "manifest": config_of(table)}
    data = DataConfig(packed=PackedPairsConfig(str(tmp_path / "packed")), **common)
    one, other = (Split(data, "train", tmp_path, dataset=name) for name in ("manifest", "packed"))
    assert [*one.captions] == [*other.captions] and one.captions[3:5] == other.captions[3:5]
    indices = [70, 0, len(one) - 1]
    assert one.image_batch(indices).equal(other.image_batch(indices))
    first, second = one.image_ids, other.image_ids
    assert np.array_equal(first[:, None] == first, second[:, None] == second)
    assert one.all_captions([5]) == other.all_captions([5])
    tokenizer = Tokenizer.train(one.captions, vocab_size=60, path=tmp_path / "bpe.model")
    layout = SequenceLayout(12, 2, 9)
    vocabulary = Vocabulary(tokenizer.vocab_size, num_left_paddings=12, codebook_size=8)
    sizes: Any = {"tokenizer": tokenizer, "layout": layout, "vocabulary": vocabulary}
    for task in ("text_to_image", "image_captioning"):
        texts, packed_texts = (task_texts(split, task, **sizes) for split in (one, other))
        assert np.array_equal(texts.left, packed_texts.left)
        assert np.array_equal(texts.right, packed_texts.right)
        assert texts.num_cut == packed_texts.num_cut


def test_an_interrupted_packing_continues_to_the_same_files(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_parts: None
) -> None:
    whole, target = tmp_path / "whole", tmp_path / "packed"
    pack_pairs(source_of(table), whole)
    written, write = [], packing._row

    def fail(entry: Any) -> Any:
        written.append(entry)
        if len(written) == 120:
            raise KeyboardInterrupt
        return write(entry)

    monkeypatch.setattr(packing, "_row", fail)
    with pytest.raises(KeyboardInterrupt):
        pack_pairs(source_of(table), target)
    assert not (target / "dataset.json").exists() and (target / "parts/00000.json").is_file()
    pack_pairs(source_of(table), target)
    assert files(target) == files(whole)
    # The first part was not packed twice.
    assert len(written) == 120 + report_rows(target / "parts/00001.json")


def report_rows(record: Path) -> int:
    return int(json.loads(record.read_text("utf-8"))["report"]["num_kept"])


def test_a_damaged_shard_is_found_and_packed_again_alone(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], small_parts: None
) -> None:
    target = tmp_path / "packed"
    pack_pairs(source_of(table), target)
    before = files(target)
    [shard] = target.glob("train/00001-*.arrow")
    times = {path: path.stat().st_mtime_ns for path in target.rglob("*.arrow")}
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    assert main(["data", "verify", str(target)]) == 1
    assert f"{shard}: its SHA-256 differs" in capsys.readouterr().out
    packed = PackedPairs(PackedPairsConfig(str(target)), split="train", image_size=8)
    assert packed[0].caption
    with pytest.raises(ValueError, match="its SHA-256 differs; the same rudolph data pack"):
        packed[len(packed) - 1]
    pack_pairs(source_of(table), target)
    assert files(target) == before
    changed = {path.name for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert changed == {shard.name}
    assert main(["data", "verify", str(target)]) == 0


def test_a_shorter_table_leaves_no_old_parts(
    table: Path, tmp_path: Path, small_parts: None
) -> None:
    lines = table.read_text("utf-8").splitlines(keepends=True)
    shorter = table.with_name("shorter.jsonl")
    shorter.write_text("".join(lines[:80]), "utf-8")
    pack_pairs(source_of(table), tmp_path / "packed")
    pack_pairs(source_of(shorter), tmp_path / "packed")
    pack_pairs(source_of(shorter), tmp_path / "new")
    shorter.unlink()
    assert files(tmp_path / "packed") == files(tmp_path / "new")


def archive(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))


def write_archives(source: Path) -> None:
    """Write archives of img2dataset: three good ones, a bad one, and two that are cut."""
    source.mkdir()
    for number in range(3):
        members: dict[str, bytes] = {}
        for row in range(number * 20, number * 20 + 20):
            members |= {f"{row:09d}.png": png(row), f"{row:09d}.txt": f"кот {row}".encode()}
            members[f"{row:09d}.json"] = json.dumps({"caption": f"другая {row}"}).encode()
        archive(source / f"{number:05d}.tar", members)
    bad = {"1.png": b"not an image", "1.txt": "а".encode(), "2.txt": "без картинки".encode()}
    bad |= {
        "3.png": png(3),
        "3.txt": b"\xff\xfe",
        "4.png": png(4),
        "4.json": b'{"caption": "yes"}',
    }
    # Other files of a sample are not images, and a second sample of the same key is not merged.
    bad |= {
        "5.png": png(5),
        "5.txt": "да".encode(),
        "5.url": b"http",
        "6.npy": b"",
        "7.jpg": png(7),
    }
    archive(source / "00003.tar", bad)
    with tarfile.open(source / "00003.tar", "a") as file:
        for name in ("7.jpg", "8.png"):
            link = tarfile.TarInfo(name)
            link.type = tarfile.SYMTYPE if name == "8.png" else tarfile.REGTYPE
            file.addfile(link)
    # One archive is cut within a sample, another one between two.
    whole = (source / "00000.tar").read_bytes()
    (source / "00004.tar").write_bytes(whole[: len(whole) // 2 + 700])
    with tarfile.open(source / "00000.tar") as file:
        end = file.getmembers()[6].offset
    (source / "00005.tar").write_bytes(whole[:end])


def test_archives_of_img2dataset_are_packed_by_any_number_of_workers(tmp_path: Path) -> None:
    source = tmp_path / "images"
    write_archives(source)
    config = config_of(source, max_bad_fraction=0.5)
    report = pack_pairs(open_source(config), tmp_path / "one")
    assert pack_pairs(open_source(config), tmp_path / "two", num_workers=2) == report
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert {reason: tally.count for reason, tally in report.skipped.items()} == {
        "damaged archive: the rest of it": 2,
        "corrupt image": 1,
        "no image file": 2,
        "caption is not UTF-8": 1,
        "repeated file in a sample": 1,
    }
    captions = []
    for name in HASH_SPLITS:
        packed = PackedPairs(PackedPairsConfig(str(tmp_path / "one")), split=name, image_size=8)
        captions += [*packed.texts("caption")]
    assert {f"кот {row}" for row in range(60)} | {"yes", "да"} == {*captions}


@pytest.mark.parametrize(
    ("prepare", "arguments", "message"),
    [
        ("", ["pack", "missing.csv", "new"], "missing.csv: no such file or folder"),
        ("", ["verify", "."], "expected packed pairs (dataset.json), got none"),
        ("notes.txt", ["pack", "pairs.csv", "."], "expected an empty folder or packed pairs"),
        ("new", ["pack", "pairs.csv", "new"], "new: expected a folder, got a file"),
        ("", ["pack", "pairs.csv", "new", "--jobs", "0"], "--jobs must be at least 1, got 0"),
        ("", ["pack", "bad.csv", "new"], "expected usable rows, got none: missing file"),
        ("dataset.json", ["verify", "."], "dataset.json: damaged (empty)"),
    ],
)
def test_mistakes_are_one_line(
    prepare: str,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "1.png").write_bytes(png(1))
    (tmp_path / "pairs.csv").write_text("image,caption\n1.png,кот\n", "utf-8")
    (tmp_path / "bad.csv").write_text("image,caption\n2.png,кот\n", "utf-8")
    if prepare:
        (tmp_path / prepare).touch()
    assert main(["data", *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error and error.startswith("rudolph: ")
    # A source that cannot be read leaves no folder.
    assert not (tmp_path / "new").is_dir() or arguments[1] == "bad.csv"


def test_a_split_without_pairs_and_a_damaged_record_are_named(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(png(1))
    (tmp_path / "pairs.csv").write_text("image,caption\n1.png,кот\n", "utf-8")
    pack_pairs(source_of(tmp_path / "pairs.csv"), tmp_path / "packed")
    config = PackedPairsConfig(str(tmp_path / "packed"))
    rows = json.loads((tmp_path / "packed/dataset.json").read_text("utf-8"))["rows"]
    for name, number in rows.items():
        if number == 0:
            with pytest.raises(ValueError, match=f"pairs in the split '{name}', got none"):
                PackedPairs(config, split=name, image_size=8)
    with pytest.raises(ValueError, match="a packed dataset has none, legal are train"):
        PackedPairs(config, split="compositional", image_size=8)
    record = tmp_path / "packed/parts/00000.json"
    before = record.read_bytes()
    record.write_text('{"source": "x", "shards": [{"name": 1}], "report": {}}')
    pack_pairs(source_of(tmp_path / "pairs.csv"), tmp_path / "packed")
    assert record.read_bytes() == before


def test_mended_images_and_captions_are_packed_again(tmp_path: Path, small_parts: None) -> None:
    table, target = tmp_path / "pairs.jsonl", tmp_path / "packed"
    lines = [{"image": f"{number}.png", "caption": "кот"} for number in range(5)]
    lines[4]["caption"] = 5
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    (tmp_path / "0.png").unlink()

    def pack() -> int:
        table.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
        return pack_pairs(source_of(table, max_bad_fraction=0.5), target).num_kept

    assert pack() == 3
    (tmp_path / "0.png").write_bytes(png(0))
    (tmp_path / "4.png").write_bytes(png(4))
    assert pack() == 4
    lines[4]["caption"] = "5"
    assert pack() == 5
    before = files(target)
    (tmp_path / "1.png").write_bytes(png(99))
    assert pack() == 5 and files(target) != before


def test_only_files_of_packing_are_removed(table: Path, tmp_path: Path) -> None:
    """Neither the source nor images in folders of the same names are touched."""
    data = tmp_path / "data"
    (data / "train").mkdir(parents=True)
    archive(data / "train" / "00000.tar", {"1.png": png(1), "1.txt": "кот".encode()})
    for source in (data / "train", table):
        with pytest.raises(ValueError, match=r"expected (a path apart|an empty folder)"):
            pack_pairs(source_of(source), data)
    assert (data / "train" / "00000.tar").is_file()
    assert [path.name for path in data.iterdir()] == ["train"]


def test_a_failed_second_packing_leaves_the_first_readable(
    table: Path, tmp_path: Path, small_parts: None
) -> None:
    target = tmp_path / "packed"
    pack_pairs(source_of(table), target)
    packed = PackedPairs(PackedPairsConfig(str(target)), split="train", image_size=8)
    captions = [*packed.texts("caption")]
    bad = table.with_name("bad.jsonl")
    bad.write_text(table.read_text("utf-8") + '{"image": "none.png", "caption": "а"}\n' * 100)
    with pytest.raises(ValueError, match="rows are bad"):
        pack_pairs(source_of(bad), target)
    bad.unlink()
    again = PackedPairs(PackedPairsConfig(str(target)), split="train", image_size=8)
    assert [*again.texts("caption")] == captions
