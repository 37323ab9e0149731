"""The files of Fusion Brain: read, written, and damaged in every way."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rudolph.data.datasets.fusion_brain_files import (
    TaskRecord,
    read_tasks,
    write_predictions,
    write_tasks,
)
from rudolph.data.datasets.tables import ManifestConfig, read_rows
from rudolph.sequence.texts import clean_text

# The examples of the challenge's README, shortened.
ASKED = {
    "0": [
        {"type": "text", "content": "Ответь на вопрос. На чём едет человек?"},
        {"type": "image", "content": "images/0.png"},
        {"type": "text", "content": "варианты: a) на велосипеде; b) на лошади"},
    ],
    "1": [{"type": "image", "content": "images/1.png"}],
    "2": [
        {"type": "text", "content": " Сгенерируй изображение."},
        {"type": "text", "content": "Торт с медведем."},
    ],
    "3": [{"type": "text", "content": "6 на y - 54 это -72"}],
}
TOLD = {
    "0": [{"type": "text", "content": ["a на велосипеде", "a", "на велосипеде"]}],
    "1": [{"type": "text", "content": "две птицы"}, {"type": "image", "content": "b.png"}],
    "2": [{"type": "image", "content": "images/2.png"}],
    "3": {"type": "text", "content": ["d", "-3"]},
}


def write_files(folder: Path, asked: Any = ASKED, told: Any = TOLD) -> tuple[Path, Path]:
    files = folder / "input.json", folder / "ground_truth.json"
    for path, content in zip(files, (asked, told), strict=True):
        path.write_text(json.dumps(content, ensure_ascii=False), "utf-8")
    return files


def said(action: Callable[[], object]) -> str:
    """Return the one-line message of the ``ValueError`` that ``action`` raises."""
    with pytest.raises(ValueError) as error:
        action()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_examples_of_the_challenge_are_read(tmp_path: Path) -> None:
    assert read_tasks(*write_files(tmp_path)) == [
        TaskRecord(
            "0",
            ("Ответь на вопрос. На чём едет человек?", "варианты: a) на велосипеде; b) на лошади"),
            "images/0.png",
            ("a на велосипеде", "a", "на велосипеде"),
        ),
        TaskRecord("1", (), "images/1.png", ("две птицы",), ("b.png",)),
        TaskRecord(
            "2", (" Сгенерируй изображение.", "Торт с медведем."), answer_images=("images/2.png",)
        ),
        TaskRecord("3", ("6 на y - 54 это -72",), None, ("d", "-3")),
    ]


def test_reading_takes_what_a_walk_through_the_json_takes(tmp_path: Path) -> None:
    files = write_files(tmp_path)
    asked, told = (json.loads(path.read_text("utf-8")) for path in files)
    for record in read_tasks(*files):
        texts = [part["content"] for part in asked[record.id] if part["type"] == "text"]
        assert record.text == " ".join(texts)
        parts = told[record.id] if isinstance(told[record.id], list) else [told[record.id]]
        for kind in ("text", "image"):
            contents = [part["content"] for part in parts if part["type"] == kind]
            first = contents[0] if contents else []
            assert list(record.answers(kind)) == ([first] if isinstance(first, str) else first)


def test_only_the_first_part_of_each_type_answers(tmp_path: Path) -> None:
    parts = [("image", "1.png"), ("text", "первый"), ("text", "второй"), ("image", "2.png")]
    told = {"0": [{"type": kind, "content": content} for kind, content in parts]}
    (record,) = read_tasks(*write_files(tmp_path, {"0": ASKED["0"]}, told))
    assert (record.answer_texts, record.answer_images) == (("первый",), ("1.png",))


names = st.text(st.characters(codec="utf-8"), max_size=8)
paths = names.filter(str.strip)
# Texts are cleaned on reading.
texts = names.map(clean_text)
answers = st.tuples(
    st.lists(texts, max_size=3).map(tuple), st.lists(paths, max_size=3).map(tuple)
).filter(any)


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(
        names, st.tuples(st.lists(texts, max_size=3).map(tuple), st.none() | paths, answers)
    )
)
def test_what_is_written_is_read_again(
    tmp_path_factory: pytest.TempPathFactory, contents: dict[str, Any]
) -> None:
    files = [tmp_path_factory.getbasetemp() / name for name in ("asked.json", "told.json")]
    records = [
        TaskRecord(name, asked, image, *told) for name, (asked, image, told) in contents.items()
    ]
    write_tasks(records, *files)
    assert read_tasks(*files) == records
    bare = [replace(record, answer_texts=(), answer_images=()) for record in records]
    assert read_tasks(files[0]) == bare
    first = [path.read_bytes() for path in files]
    write_tasks(read_tasks(*files), *files)
    assert [path.read_bytes() for path in files] == first


def test_predictions_have_the_shape_that_is_scored(tmp_path: Path) -> None:
    asked, _ = write_files(tmp_path)
    path = tmp_path / "predictions.json"
    told = {"0": "a)", "1": "две большие птицы", "3": ""}
    write_predictions(path, told, {"2": "images/image_2.jpg", "1": "images/image_1.jpg"})
    assert json.loads(path.read_text("utf-8")) == {
        "0": [{"type": "text", "content": "a)"}],
        "1": [
            {"type": "text", "content": "две большие птицы"},
            {"type": "image", "content": "images/image_1.jpg"},
        ],
        "2": [{"type": "image", "content": "images/image_2.jpg"}],
        "3": [{"type": "text", "content": ""}],
    }
    found = {record.id: record.answer_texts for record in read_tasks(asked, path)}
    assert found == {"0": ("a)",), "1": ("две большие птицы",), "2": (), "3": ("",)}


BAD_PARTS: list[tuple[Any, str]] = [
    ("что?", "must be a list of"),
    (None, "must be a list of"),
    (["что?"], "a part must be"),
    ([{"type": "sound", "content": "a"}], 'type must be "text" or "image", got \'sound\''),
    ([{"type": ["text"], "content": "a"}], "type must be"),
    ([{"type": "text" + "\n" * 99, "content": "a"}], "type must be"),
    ([{"content": "a"}], "type must be"),
    ([{"type": "text"}], "content must be text, got NoneType"),
    ([{"type": "text", "content": 5}], "content must be text, got int"),
    ([{"type": "text", "content": "\ud83d"}], "half of a surrogate pair"),
    ([{"type": "text", "content": "a"}, {"type": "image", "content": " "}], "must be a path"),
]


@pytest.mark.parametrize(("parts", "words"), BAD_PARTS)
def test_a_broken_part_is_told_with_its_file_and_id(
    tmp_path: Path, parts: Any, words: str
) -> None:
    for broken, name in enumerate(("input.json", "ground_truth.json")):
        contents = [dict(ASKED), dict(TOLD)]
        contents[broken]["2"] = parts
        files = [tmp_path / "input.json", tmp_path / "ground_truth.json"]
        for path, content in zip(files, contents, strict=True):
            path.write_text(json.dumps(content))
        message = said(lambda files=files: read_tasks(*files))
        assert message.startswith(f"{tmp_path / name}: id '2': ") and words in message


@pytest.mark.parametrize(
    ("asked", "told", "words"),
    [
        ({"0": [{"type": "text", "content": ["а", "б"]}]}, {"0": []}, "must be text, got list"),
        ({"0": []}, {"0": []}, "ground_truth.json: id '0': an answer: expected at least one"),
        ({"0": []}, {"0": [{"type": "text", "content": []}]}, "at least one, got []"),
        ({"0": []}, {"0": [{"type": "text", "content": ["а", 1]}]}, "must be text, got int"),
        (
            {"0": [], "1": []},
            {"0": TOLD["0"]},
            "ground_truth.json: id '1': expected an answer for every id",
        ),
        ({"0": []}, {"0": TOLD["0"], "7": []}, "ground_truth.json: id '7': expected an id of"),
        ({"\ud83d": []}, {}, "an id must be text"),
        ([], {}, "input.json: must map ids to lists, got list"),
        ({}, 5, "ground_truth.json: must map ids to lists, got int"),
    ],
)
def test_what_is_not_of_the_format_is_told_in_one_line(
    tmp_path: Path, asked: Any, told: Any, words: str
) -> None:
    (tmp_path / "input.json").write_text(json.dumps(asked))
    (tmp_path / "ground_truth.json").write_text(json.dumps(told))
    files = tmp_path / "input.json", tmp_path / "ground_truth.json"
    assert words in said(lambda: read_tasks(*files))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "expected data, got an empty file"),
        (b"{", "expected JSON in UTF-8"),
        ("{'0': []}".encode("cp1251"), "expected JSON in UTF-8"),
        ('{"0": [{"type": "text", "content": "ёж"}]}'.encode("cp1251"), "byte 0xb8"),
        (b'{"0": [], "1": [], "0": []}', "got key '0' 2 times"),
        (b'{"0": [{"type": "text", "type": "image", "content": "a"}]}', "got key 'type' 2"),
        (b"[" * 100_000, "expected JSON in UTF-8"),
        (None, "no such file"),
    ],
)
def test_what_is_not_json_is_told_in_one_line(
    tmp_path: Path, data: bytes | None, words: str
) -> None:
    path = tmp_path / "input.json"
    if data is not None:
        path.write_bytes(data)
    message = said(lambda: read_tasks(path))
    assert message.startswith(f"{path}: ") and words in message


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 10_000), st.binary(max_size=3), st.integers(0, 30))
def test_a_file_with_any_bytes_changed_is_read_or_told_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, at: int, new: bytes, number: int
) -> None:
    data = json.dumps(ASKED, ensure_ascii=False).encode()
    at %= len(data)
    path = tmp_path_factory.getbasetemp() / "mutated.json"
    path.write_bytes(data[:at] + new + data[at + number :])
    try:
        records = read_tasks(path)
    except ValueError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
    else:
        write_tasks(records, path)
        assert read_tasks(path) == records


def test_what_cannot_be_read_again_is_not_written(tmp_path: Path) -> None:
    files = tmp_path / "a.json", tmp_path / "b.json"
    twice = [TaskRecord("5", ("а",)), TaskRecord("5", ("б",))]
    assert "id '5': expected each id once, got it 2 times" in said(
        lambda: write_tasks(twice, *files)
    )
    assert "id '5': an answer must be" in said(lambda: write_tasks(twice[:1], *files))
    assert not any(path.exists() for path in files)


def test_a_byte_order_mark_is_no_part_of_the_file(tmp_path: Path) -> None:
    asked, _ = write_files(tmp_path)
    expected = read_tasks(asked)
    asked.write_bytes(b"\xef\xbb\xbf" + asked.read_bytes())
    assert read_tasks(asked) == expected


def test_a_manifest_takes_the_first_of_several_variants(tmp_path: Path) -> None:
    asked, told = write_files(tmp_path)
    rows = read_rows(asked, ManifestConfig(str(asked), answers=str(told)))
    assert [(row.image, row.caption) for row in rows[:2]] == [
        ("images/0.png", "a на велосипеде"),
        ("images/1.png", "две птицы"),
    ]
