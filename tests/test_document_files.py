"""Files of documents: layouts, round trips, bad rows, splits, and the arrays of a split."""

import hashlib
import json
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_manifests import noise, said

from rudolph.cli import main
from rudolph.cli.data import LAYOUT_NAMES
from rudolph.data.datasets.document_files import (
    ConversationsConfig,
    DocumentConfig,
    DocumentDataset,
    InterleavedConfig,
    document_config,
    examine_documents,
)
from rudolph.data.datasets.document_layouts import (
    DOCUMENT_LAYOUTS,
    Document,
    DocumentPart,
    write_documents,
)
from rudolph.data.datasets.document_rows import FileRow, JsonRows
from rudolph.data.datasets.manifests import split_of_image
from rudolph.data.image_files import RejectedError, center_crop
from rudolph.data.splits import DataConfig, DocumentSplit

FORMATS = [(layout, suffix) for layout, row in DOCUMENT_LAYOUTS.items() for suffix in row.suffixes]


def image(name: str) -> DocumentPart:
    return DocumentPart("image", name)


def question(text: str) -> DocumentPart:
    return DocumentPart("question", text)


def answer(text: str) -> DocumentPart:
    return DocumentPart("answer", text)


def turns(*texts: str) -> list[dict[str, str]]:
    speakers = ("human", "gpt")
    return [{"from": speakers[at % 2], "value": text} for at, text in enumerate(texts)]


def conversation(name: Any, *texts: str, **image: Any) -> dict[str, Any]:
    return {"id": name, **image, "conversations": turns(*texts)}


CONVERSATIONS = [
    conversation(7, "<image>\nЧто это?", "Кот", "Какой?", "Рыжий", image="0.png"),
    conversation("б", "Сравни <image> и <image>.", "Разные", image=["1.png", "0.png"]),
    conversation("text", "Сколько будет 2 + 2?", "4"),
]
DOCUMENTS = [
    Document(
        "7",
        (image("0.png"), question("Что это?"), answer("Кот"), question("Какой?"), answer("Рыжий")),
    ),
    Document(
        "б",
        (
            question("Сравни"),
            image("1.png"),
            question("и"),
            image("0.png"),
            question("."),
            answer("Разные"),
        ),
    ),
    Document("text", (question("Сколько будет 2 + 2?"), answer("4"))),
]
MMC4 = {
    "url": "https://a.example/ё",
    "text_list": ["Лес.", "Вот ёж.", " ", "Вот лиса."],
    "image_info": [
        {"image_name": "1.png", "matched_text_index": 3, "matched_sim": 0.3},
        {"image_name": "0.png", "matched_text_index": 3, "matched_sim": 0.2},
        {"image_name": "2.png", "matched_text_index": 1, "matched_sim": 0.1},
    ],
    "similarity_matrix": [[0.0] * 4] * 3,
}
OBELICS = {
    "images": [None, None, "0.png", "1.png", None, "2.png"],
    "texts": ["Лес.", "Поле.", None, None, "Ёж и лиса.", None],
    "metadata": "[]",
    "general_metadata": '{"url": "https://b.example", "warc_filename": "x"}',
}


def write_images(folder: Path, number: int) -> None:
    for index in range(number):
        noise(10, 8, seed=index).save(folder / f"{index}.png")


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_all(config: DocumentConfig) -> list[Document]:
    examined = examine_documents(config, image_size=8)
    assert examined.report.num_skipped == 0, examined.report.summary()
    return [examined.document(entry, config) for entry in examined.entries]


def reasons(config: DocumentConfig) -> dict[str, list[str]]:
    """Return the names of skipped rows by reason."""
    report = examine_documents(config, image_size=8).report
    return {reason: tally.names for reason, tally in report.skipped.items()}


def parsed(layout: str, row: dict[str, Any], **settings: Any) -> Document:
    config = document_config(layout, **settings)
    return config.finish(config.parse(FileRow("", row)), ())


def test_a_conversation_has_an_image_at_each_tag() -> None:
    assert [parsed("llava", row) for row in CONVERSATIONS] == DOCUMENTS


def test_an_image_of_mmc4_comes_before_its_sentence() -> None:
    parts = parsed("mmc4", MMC4).parts
    assert [(part.value, part.similarity) for part in parts] == [
        ("Лес.", None),
        ("2.png", 0.1),
        ("Вот ёж.", None),
        ("1.png", 0.3),
        ("0.png", 0.2),
        ("Вот лиса.", None),
    ]
    # Without the image between them, two sentences are one text.
    similar = parsed("mmc4", MMC4, min_similarity=0.2)
    assert [part.value for part in similar.parts] == [
        "Лес. Вот ёж.",
        "1.png",
        "0.png",
        "Вот лиса.",
    ]
    assert parsed("mmc4", MMC4, min_similarity=0.0).parts == parts
    unmatched = MMC4 | {"image_info": [{"image_name": "0.png", "matched_text_index": 0}]}
    with pytest.raises(RejectedError, match="no matched_sim"):
        parsed("mmc4", unmatched, min_similarity=0.0)


def test_obelics_keeps_the_order_of_its_lists() -> None:
    document = parsed("obelics", OBELICS)
    images = [image(f"{number}.png") for number in range(3)]
    assert document == Document(
        "https://b.example",
        (answer("Лес.\n\nПоле."), *images[:2], answer("Ёж и лиса."), images[2]),
    )


WORDS = st.text("ёа \n\"'<>{}🦊", min_size=1, max_size=8).map(str.strip).filter(bool)
NAMES = st.text("ёa/. ", min_size=1, max_size=6).filter(str.strip)


@st.composite
def normal_documents(draw: Any, layout: str) -> Document:
    parts: list[DocumentPart] = []
    for _ in range(draw(st.integers(1, 3))):
        # Only the first text of an interleaved document may come without an image.
        least = 0 if layout == "llava" or not parts else 1
        for name in draw(st.lists(NAMES, min_size=least, max_size=2)):
            similarity = draw(st.none() | st.floats(0, 1)) if layout == "mmc4" else None
            parts.append(DocumentPart("image", name, similarity))
        if layout == "llava" and (draw(st.booleans()) or not parts or parts[-1].kind == "answer"):
            parts.append(question(draw(WORDS)))
        parts.append(answer(draw(WORDS)))
    return Document(draw(WORDS), tuple(parts))


@pytest.mark.parametrize("layout", DOCUMENT_LAYOUTS)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_the_row_of_a_document_is_parsed_to_the_same_document(layout: str, data: Any) -> None:
    document = data.draw(normal_documents(layout))
    row = DOCUMENT_LAYOUTS[layout].build(document)
    assert parsed(layout, json.loads(json.dumps(row))) == document


KEYS = "from value image_name matched_text_index matched_sim url a"
SCALARS = st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats()
WORDS_OF_FILES = st.sampled_from(["human", "gpt", "<image>", "0.png", "", "\0", "\ud83d", "{"])
ANYTHING = st.recursive(
    SCALARS | WORDS_OF_FILES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYS.split()), inner, max_size=3)
    ),
    max_leaves=8,
)


@pytest.mark.parametrize("layout", DOCUMENT_LAYOUTS)
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_any_row_is_a_document_with_a_text_or_rejected(layout: str, data: Any) -> None:
    columns = DOCUMENT_LAYOUTS[layout].columns
    row = data.draw(st.dictionaries(st.sampled_from(columns), ANYTHING, min_size=1))
    try:
        document = parsed(layout, row)
    except RejectedError as rejected:
        assert rejected.reason and "\n" not in rejected.reason
    else:
        assert any(part.kind == "answer" and part.value.strip() for part in document.parts)


@pytest.mark.parametrize(("layout", "suffix"), FORMATS)
def test_written_documents_are_read_back(layout: str, suffix: str, tmp_path: Path) -> None:
    write_images(tmp_path, 3)
    rows = {"llava": CONVERSATIONS, "mmc4": [MMC4] * 300, "obelics": [OBELICS] * 300}[layout]
    source = document_config(layout, path=str(write_lines(tmp_path / "source.jsonl", rows)))
    documents = read_all(source)
    target = tmp_path / f"target{suffix}"
    write_documents(target, iter(documents), layout)
    assert read_all(document_config(layout, path=str(target))) == documents
    assert len(documents) == len(rows)


def test_a_document_that_a_layout_cannot_hold_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    trailing = Document("", (answer("a"), image("0.png")))
    for layout, document, reason in (
        ("mmc4", DOCUMENTS[0], "it would be read as another"),
        ("mmc4", trailing, "matched_text_index is out of range"),
        ("llava", trailing, "empty question"),
        ("llava", Document("", (question("<image>"), answer("a"))), "more <image> tags than"),
        ("obelics", Document("", (answer("a"), answer("b"))), "it would be read as another"),
    ):
        message = said(partial(write_documents, path, [document], layout))
        assert message.startswith(
            f"{path}: expected a document that layout {layout} can hold, got document 1 ({reason}"
        )
    assert list(tmp_path.iterdir()) == []
    assert said(lambda: write_documents(path, [], "mmc4")).endswith("documents to write, got none")
    wrong = said(lambda: write_documents(tmp_path / "a.csv", DOCUMENTS, "mmc4"))
    assert wrong.endswith("a.csv: expected one of .jsonl for layout mmc4, got .csv")


GOOD = turns("q", "a")
# Bad rows, the name of the bad image, and the reason.
BAD_CONVERSATIONS: list[tuple[Any, str, str]] = [
    ({"image": "gone.png", "conversations": turns("<image>", "a")}, "gone.png", "missing file"),
    (
        {"image": ["0.png", "bad.png"], "conversations": turns("<image><image>", "a")},
        "bad.png",
        "corrupt image",
    ),
    (
        {"image": "0.png", "conversations": turns("<image> <image>", "a")},
        "",
        "more <image> tags than images",
    ),
    ({"conversations": turns("<image>", "a")}, "", "more <image> tags than images"),
    ({"image": "0.png", "conversations": GOOD}, "", "fewer <image> tags than images"),
    (
        {"conversations": [{"from": "system", "value": "s"}, *GOOD]},
        "",
        "from is neither human nor gpt",
    ),
    ({"conversations": GOOD[::-1]}, "", "human and gpt do not alternate, human first"),
    ({"conversations": GOOD[:1]}, "", "no answer to the last question"),
    ({"conversations": turns("q", " ")}, "", "empty answer"),
    ({"conversations": turns("q", "<image>")}, "", "<image> in an answer"),
    (
        {"image": "https://a.example/0.png", "conversations": turns("<image>", "a")},
        "https://a.example/0.png",
        "images are URLs in column image (download them, write paths)",
    ),
    (
        {"image": {"bytes": "x"}, "conversations": turns("<image>", "a")},
        "",
        "image paths are objects in column image",
    ),
    ({"conversations": "no list"}, "", "no list of conversations"),
    (["no object"], "", "rows are arrays, not objects"),
]


def test_bad_conversations_are_counted_with_their_reasons(tmp_path: Path) -> None:
    write_images(tmp_path, 2)
    (tmp_path / "bad.png").write_bytes(b"no image")
    path = write_lines(tmp_path / "rows.jsonl", [row for row, _, _ in BAD_CONVERSATIONS])
    data = path.read_bytes() + json.dumps(CONVERSATIONS[0]).encode() + b"\n"
    cut = json.dumps(CONVERSATIONS[2], ensure_ascii=False)[:-4].encode()
    path.write_bytes(data + '{"id": "кот"}\n'.encode("cp1251") + b"{]\n\n" + cut)
    expected: dict[str, list[str]] = {}
    for number, (_, name, reason) in enumerate(BAD_CONVERSATIONS, start=1):
        expected.setdefault(reason, []).append(f"line {number} {name}".strip())
    expected["row is not UTF-8"] = ["line 16"]
    expected["row is not JSON"] = ["line 17"]
    expected["last line is cut off"] = ["line 19"]
    assert reasons(ConversationsConfig(str(path))) == expected
    message = said(
        lambda: DocumentDataset(ConversationsConfig(str(path)), split="train", image_size=8)
    )
    assert message.startswith(f"{path}: 17 of 18 rows are bad (94.4%), expected at most")


def test_bad_interleaved_rows_are_counted_with_their_reasons(tmp_path: Path) -> None:
    write_images(tmp_path, 3)
    info = MMC4["image_info"][0]
    rows = [
        MMC4,
        MMC4 | {"image_info": [info | {"matched_text_index": 4}]},
        MMC4 | {"image_info": [info | {"matched_text_index": -1}]},
        MMC4 | {"image_info": [{"image_name": "0.png"}]},
        MMC4 | {"image_info": [info | {"matched_sim": "0.3"}]},
        MMC4 | {"image_info": [{"matched_text_index": 1}]},
        MMC4 | {"image_info": {}},
        MMC4 | {"text_list": []},
        MMC4 | {"text_list": ["", " "], "image_info": []},
        MMC4 | {"text_list": ["a", 3], "image_info": []},
    ]
    path = write_lines(tmp_path / "mmc4.jsonl", rows)
    assert reasons(InterleavedConfig(str(path), layout="mmc4")) == {
        "matched_text_index is out of range": ["line 2", "line 3", "line 4"],
        "matched_sim is no number": ["line 5"],
        "no image path": ["line 6"],
        "image_info is not a list": ["line 7"],
        "no text_list": ["line 8"],
        "no text": ["line 9"],
        "texts are numbers in column text_list": ["line 10"],
    }
    rows = [
        OBELICS,
        {"images": ["0.png", None], "texts": ["a", "b"]},
        {"images": [None, None], "texts": ["a", None]},
        {"images": [None], "texts": ["a", "b"]},
        {"images": ["0.png"], "texts": [None]},
        {"images": None, "texts": ["a"]},
    ]
    write_lines(path, rows)
    assert reasons(InterleavedConfig(str(path))) == {
        "both an image and a text at a place": ["line 2"],
        "neither an image nor a text at a place": ["line 3"],
        "images and texts differ in length": ["line 4"],
        "no text": ["line 5"],
        "images and texts are not two lists": ["line 6"],
    }


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_items_of_a_list_are_found_at_their_bytes(mark: str, tmp_path: Path) -> None:
    values = [{"ё": ["🦊", "]"]}, {}, {"a": {"b": "\u2028,"}}]
    text = mark + " [ \n" + " ,\t\n".join(json.dumps(v, ensure_ascii=False) for v in values)
    path = tmp_path / "a.json"
    path.write_text(f"{text}\n ]\n", encoding="utf-8")
    rows = JsonRows(path)
    assert [rows[index] for index in range(len(rows))] == [
        (f"item {number}", value, "") for number, value in enumerate(values, start=1)
    ]
    for end, item in ((-2, 3), (-20, 3)):
        path.write_text(text[:end], encoding="utf-8")
        assert said(lambda: JsonRows(path)).startswith(
            f"{path}: expected a whole JSON list, got one that is damaged in item {item}. "
        )


def test_a_file_that_is_no_text_in_utf_8_is_an_error_with_its_conversion(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for data, start in (
        (json.dumps(CONVERSATIONS).encode("utf-16"), "expected UTF-8, got UTF-16. Convert it"),
        (json.dumps(CONVERSATIONS).encode("utf-16-le"), "expected UTF-8, got UTF-16LE. Convert"),
        ('[{"id": "рыжий кот"}]'.encode("cp1251"), "expected UTF-8, got byte 0xf0 at offset 9"),
        (b"", "expected data, got an empty file"),
        (b"\x1f\x8b12345678", "expected a table, got gzip-compressed data"),
    ):
        path.write_bytes(data)
        assert said(lambda: read_all(ConversationsConfig(str(path)))).startswith(
            f"{path}: {start}"
        )


def test_a_wrong_path_is_an_error_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a", encoding="utf-8")
    for path, message in (
        ("", "path of the documents is empty: give a file"),
        (str(tmp_path / "none.json"), f"{tmp_path}/none.json: no such file or folder"),
        (str(tmp_path), f"{tmp_path}: expected files of documents (.json, .jsonl, .parquet)"),
        (str(tmp_path / "a.txt"), f"{tmp_path}/a.txt: a file of documents must end in one of"),
    ):
        assert said(partial(read_all, ConversationsConfig(path))).startswith(message)
    with pytest.raises(ValueError, match="min_similarity must be null for layout obelics, got"):
        InterleavedConfig(min_similarity=0.2)


def test_files_of_a_folder_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    write_images(tmp_path, 2)
    write_lines(tmp_path / "b.jsonl", [*CONVERSATIONS[1:], {}])
    (tmp_path / "a.json").write_text(json.dumps(CONVERSATIONS[:1]), encoding="utf-8")
    config = ConversationsConfig(str(tmp_path))
    assert reasons(config) == {"no list of conversations": ["b.jsonl line 3"]}
    write_lines(tmp_path / "b.jsonl", CONVERSATIONS[1:])
    assert read_all(config) == DOCUMENTS


def test_a_document_is_cut_before_the_first_image_too_many(tmp_path: Path) -> None:
    write_images(tmp_path, 3)
    path = write_lines(tmp_path / "a.jsonl", [OBELICS, OBELICS])
    for most, kept in ((3, 5), (2, 4), (1, 1)):
        config = InterleavedConfig(str(path), max_images=most)
        assert {len(document.parts) for document in read_all(config)} == {kept}
        converted = examine_documents(config, image_size=8).report.converted
        assert ("cut at max_images" in converted) == (kept < 5)
    late = {"images": ["0.png", "1.png", None], "texts": [None, None, "a"]}
    write_lines(path, [late])
    reason = "more than max_images images before the first text to learn"
    assert reasons(InterleavedConfig(str(path), max_images=1)) == {reason: ["line 1"]}


def test_a_bad_image_is_left_out_of_its_document_on_request(tmp_path: Path) -> None:
    write_images(tmp_path, 1)
    path = write_lines(
        tmp_path / "a.jsonl",
        [
            OBELICS
            | {
                "texts": ["a", None, None, "b", "c", "d"],
                "images": [None, "gone.png", "1.png", None, None, None],
            },
            OBELICS,
        ],
    )
    config = InterleavedConfig(str(path), drop_bad_images=True)
    examined = examine_documents(config, image_size=8)
    documents = [examined.document(entry, config) for entry in examined.entries]
    assert documents[0].parts == (answer("a\n\nb\n\nc\n\nd"),)
    assert documents[1].parts == (answer("Лес.\n\nПоле."), image("0.png"), answer("Ёж и лиса."))
    assert [len(entry.images) for entry in examined.entries] == [0, 1]
    converted = examined.report.converted
    assert converted["image left out (missing file)"].names == ["line 1", "line 2"]
    assert reasons(InterleavedConfig(str(path))) == {
        "missing file": ["line 1 gone.png", "line 2 1.png"]
    }


def many_rows(folder: Path, number: int) -> list[dict[str, Any]]:
    """Write images and return conversations, of which each third shows an earlier image."""
    write_images(folder, number)
    rows = []
    for index in range(number):
        shown = [f"{index // 3 * 3}.png", f"{index}.png"]
        value = "<image> <image> что?"
        rows.append(conversation(index, value, f"ответ {index}", image=shown))
    rows[1] = conversation(1, "что?", "ничего")
    return rows


def splits_of(rows: Sequence[Any], folder: Path) -> dict[str, str]:
    """Return the split of each document by its name."""
    path = write_lines(folder / "rows.jsonl", rows)
    config = ConversationsConfig(str(path))
    examined = examine_documents(config, image_size=8)
    return {examined.document(entry, config).name: entry.split for entry in examined.entries}


def test_documents_that_start_with_the_same_image_are_in_one_split(tmp_path: Path) -> None:
    rows = many_rows(tmp_path, 60)
    before = splits_of(rows[:40], tmp_path)
    shuffled = random.Random(0).sample(rows, len(rows))
    after = splits_of(shuffled, tmp_path)
    assert {name: after[name] for name in before} == before
    assert set(after.values()) == {"train", "validation", "test"}
    for index in range(0, 60, 3):
        names = [str(name) for name in range(index, index + 3) if name != 1]
        assert len({after[name] for name in names}) == 1
    config = ConversationsConfig(str(tmp_path / "rows.jsonl"))
    for split in ("train", "validation", "test"):
        dataset = DocumentDataset(config, split=split, image_size=8)
        names = [dataset[index].name for index in range(len(dataset))]
        assert sorted(names) == sorted(name for name, own in after.items() if own == split)
    assert said(lambda: DocumentDataset(config, split="compositional", image_size=8)).startswith(
        "split 'compositional': a dataset of documents has none"
    )


def test_a_row_or_an_image_that_changes_later_is_an_error(tmp_path: Path) -> None:
    rows = many_rows(tmp_path, 6)
    path = write_lines(tmp_path / "a.jsonl", rows)
    dataset = DocumentDataset(ConversationsConfig(str(path)), split="train", image_size=8)
    noise(10, 8, seed=99).save(tmp_path / "0.png")
    assert said(lambda: list(dataset.images())) == (
        f"{tmp_path}/0.png: the image changed after the data was read"
    )
    write_lines(path, [row | {"id": "other"} for row in rows])
    index = next(i for i, entry in enumerate(dataset.entries) if entry.row != 1)
    assert said(lambda: dataset[index]).endswith("changed after the data was read")


def test_a_split_holds_each_image_once_and_all_texts(tmp_path: Path) -> None:
    rows = many_rows(tmp_path, 12)
    path = write_lines(tmp_path / "a.jsonl", rows)
    config = DataConfig(
        "conversations", 8, {"question_answering": 1}, conversations=ConversationsConfig(str(path))
    )
    split = DocumentSplit(config, "train", tmp_path / "cache")
    dataset = DocumentDataset(config.conversations, split="train", image_size=8)
    assert len(split) == len(dataset) > 6
    shown = {name for index in range(len(dataset)) for name in dataset[index].images}
    assert (
        split.num_images == len(shown) < sum(len(dataset[i].images) for i in range(len(dataset)))
    )
    for index in range(len(dataset)):
        pieces, parts = split.pieces(index), dataset[index].parts
        assert [piece.kind for piece in pieces] == [part.kind for part in parts]
        for piece, part in zip(pieces, parts, strict=True):
            if part.kind != "image":
                assert piece.text == part.value
                continue
            number = int(Path(part.value).stem)
            expected = center_crop(noise(10, 8, seed=number), 8)
            pixels = split.image_batch([piece.image])[0].permute(1, 2, 0).mul(255).round()
            assert np.array_equal(pixels.byte().numpy(), np.asarray(expected))
    texts = [p.value for i in range(len(dataset)) for p in dataset[i].parts if p.kind != "image"]
    assert list(split.texts()) == texts


def test_the_command_reports_and_writes_documents(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(DOCUMENT_LAYOUTS) == list(LAYOUT_NAMES)
    write_images(tmp_path, 3)
    source = write_lines(tmp_path / "a.jsonl", [MMC4, MMC4, {}])
    target = tmp_path / "b.parquet"
    command = ["data", "documents", str(source), "--layout", "mmc4", "--image-size", "8"]
    assert main([*command, "--write", str(target), "--as", "obelics"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("3 rows: 2 kept, 1 skipped (33.3%)\nskipped: 1 no text_list (line 3)")
    counted = split_of_image(examine_first_image(tmp_path))
    assert f"{counted}: 2" in output and f"{target}: 2 documents" in output
    written = read_all(InterleavedConfig(str(target)))
    expected = [part.value for part in parsed("mmc4", MMC4).parts]
    assert [[part.value for part in document.parts] for document in written] == [expected] * 2
    flags = ["--layout", "llava", "--drop-bad-images"]
    assert main(["data", "documents", str(source), *flags]) == 2
    message = "rudolph: --drop-bad-images: expected layout mmc4 or obelics, got llava\n"
    assert capsys.readouterr().err == message
    assert main([*command, "--max-bad-fraction", "0.1"]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith(f"rudolph: {source}: 1 of 3 rows are bad (33.3%)")
    assert main([*command, "--write", str(target), "--as", "llava"]) == 2
    assert "b.parquet: expected one of .json, .jsonl for layout llava" in capsys.readouterr().err


def examine_first_image(folder: Path) -> str:
    """Return the SHA-256 of the first image that MMC4 shows."""
    return hashlib.sha256((folder / "2.png").read_bytes()).hexdigest()


def test_a_text_has_one_split_under_all_names(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "кто?"}, {"from": "gpt", "value": "кот"}]
    rows = [{"id": str(number), "conversations": turns} for number in range(9)]
    (tmp_path / "a.json").write_text(json.dumps(rows), "utf-8")
    config = ConversationsConfig(path=str(tmp_path / "a.json"))
    entries = examine_documents(config, image_size=8).entries
    assert len({entry.sha256 for entry in entries}) == 9
    assert len({entry.split for entry in entries}) == 1


def test_images_after_the_cut_need_not_exist(tmp_path: Path) -> None:
    noise(8, 8, 0).save(tmp_path / "0.png")
    turns = [
        {"from": "human", "value": "<image>\nкто?"},
        {"from": "gpt", "value": "кот"},
        {"from": "human", "value": "<image>\nа это?"},
        {"from": "gpt", "value": "пёс"},
    ]
    row = {"id": "1", "image": ["0.png", "missing.png"], "conversations": turns}
    (tmp_path / "a.json").write_text(json.dumps([row]), "utf-8")
    config = ConversationsConfig(path=str(tmp_path / "a.json"), max_images=1)
    examined = examine_documents(config, image_size=8)
    [entry] = examined.entries
    assert len(entry.images) == 1 and examined.document(entry, config).images == ["0.png"]
    assert examined.report.converted["cut at max_images"].count == 1
