"""Texts are cleaned on input, so that texts that look equal are equal."""

import json
import random
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzzing import num_cases, random_text
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rudolph.data.datasets.fusion_brain_files import read_tasks
from rudolph.data.datasets.manifests import Manifest
from rudolph.data.datasets.tables import ManifestConfig, read_rows
from rudolph.runs.resolve import SHIPPED_RUN
from rudolph.sequence.texts import UNPRINTABLE, clean_text, require_text, shorten
from rudolph.sequence.tokenizer import Tokenizer

TEXT = "Ёжик и зелёный чай"
DECOMPOSED = unicodedata.normalize("NFD", TEXT)


@pytest.fixture(scope="module")
def shipped() -> Tokenizer:
    return Tokenizer(SHIPPED_RUN / "checkpoints" / "bpe.model")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (DECOMPOSED, TEXT),
        (TEXT, TEXT),
        ("кот\x85пёс\u2029ёж\x00", "кот пёс ёж "),
        ("a\tb\nc\rd", "a\tb\nc\rd"),
        ("\ud83d кот \udc00", "? кот ?"),
        ("\u202eкот 👩\u200d🚒 שלום\u00a0", "\u202eкот 👩\u200d🚒 שלום\u00a0"),
        ("", ""),
    ],
)
def test_a_text_is_composed_and_free_of_what_cannot_be_written(text: str, expected: str) -> None:
    assert clean_text(text) == expected


@given(st.text())
def test_a_composed_text_without_control_characters_is_left_alone(text: str) -> None:
    cleaned = clean_text(text)
    assert clean_text(cleaned) == cleaned and unicodedata.is_normalized("NFC", cleaned)
    if unicodedata.is_normalized("NFC", text) and not UNPRINTABLE.search(text):
        assert cleaned == text


def test_a_text_that_is_not_utf_8_is_refused_with_its_flag_and_place() -> None:
    require_text("кот 🙂", "text")
    with pytest.raises(ValueError, match=r"^--question: expected text in UTF-8, .* character 5\."):
        require_text("кот \udcff", "--question")


@pytest.mark.parametrize("length", [1, 5, 12, 13])
def test_a_shortened_text_has_at_most_its_length(length: int) -> None:
    found = shorten("красный круг", length)
    assert len(found) <= length and (found == "красный круг") == (length >= 12)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_decomposed_text_has_the_ids_of_the_composed_one(
    shipped: Tokenizer, dropout: float
) -> None:
    found = [
        shipped.encode(text, dropout=dropout, generator=torch.Generator().manual_seed(0))
        for text in (TEXT, DECOMPOSED)
    ]
    assert found[0] == found[1] and len(found[0]) > 3
    assert shipped.decode(shipped.encode(DECOMPOSED)) == TEXT.lower()


def test_a_tokenizer_of_decomposed_texts_is_that_of_composed_ones(tmp_path: Path) -> None:
    found = [
        Tokenizer.train([text] * 3, vocab_size=40, path=tmp_path / f"{at}.model").digest
        for at, text in enumerate((TEXT, DECOMPOSED))
    ]
    assert found[0] == found[1]


def test_a_manifest_composes_captions_and_questions_but_no_paths(tmp_path: Path) -> None:
    decomposed = unicodedata.normalize("NFD", "й.png")
    pixels = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / decomposed)
    row = {"image": decomposed, "подписи": DECOMPOSED + "\x85", "вопросы": DECOMPOSED + "?"}
    table = tmp_path / "pairs.jsonl"
    table.write_text(json.dumps(row) + "\n")
    config = ManifestConfig(str(table), caption_column="подписи", question_column="вопросы")
    found = [
        Manifest(config, split=name, image_size=8).entries
        for name in ("train", "validation", "test")
        if _has_entries(config, name)
    ]
    [[entry]] = found
    assert (entry.caption, entry.question) == (TEXT, TEXT + "?")
    assert Path(entry.path).name == decomposed


def _has_entries(config: ManifestConfig, split: str) -> bool:
    try:
        return bool(Manifest(config, split=split, image_size=8).entries)
    except ValueError as error:
        assert "falls into the split" in str(error)
        return False


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_a_column_is_found_in_whatever_form_its_name_is_written(
    tmp_path: Path, suffix: str
) -> None:
    name = "случай"
    for form in ("NFC", "NFD"):
        table, written = tmp_path / f"{form}{suffix}", unicodedata.normalize(form, name)
        mark = "\t" if suffix == ".tsv" else ","
        lines = [f"image{mark}{written}", f"a.png{mark}кот"]
        if suffix == ".jsonl":
            lines = [json.dumps({"image": "a.png", written: "кот"})]
        table.write_text("\n".join(lines) + "\n", "utf-8")
        for asked in ("NFC", "NFD"):
            column = unicodedata.normalize(asked, name)
            [row] = read_rows(table, ManifestConfig(str(table), caption_column=column))
            assert row.caption == "кот"


def test_texts_of_fusion_brain_are_composed_and_its_paths_are_not(tmp_path: Path) -> None:
    path = unicodedata.normalize("NFD", "й.png")
    asked = {"0": [{"type": "text", "content": DECOMPOSED}, {"type": "image", "content": path}]}
    told = {"0": [{"type": "text", "content": [DECOMPOSED, "кот\x85"]}]}
    files = tmp_path / "asked.json", tmp_path / "told.json"
    for file, content in zip(files, (asked, told), strict=True):
        file.write_text(json.dumps(content))
    [record] = read_tasks(*files)
    assert record.texts == (TEXT,) and record.answer_texts == (TEXT, "кот ")
    assert record.image == path


def test_the_unknown_part_of_a_text_is_named(shipped: Tokenizer) -> None:
    assert shipped.unknown_note("Красный кот", "text") == ""
    note = shipped.unknown_note("кот and a red cat", "text")
    assert note.startswith("text: ") and "\n" not in note
    assert all(repr(word) in note for word in ("and", "a", "red", "cat")) and "кот" not in note
    assert shipped.unknown_words("a red кот") == {"a": "a", "red": "e"}
    assert shipped.unknown_note(DECOMPOSED, "text") == ""


def test_a_prompt_of_20000_letters_fills_its_segment_at_once(shipped: Tokenizer) -> None:
    rng = random.Random(0)
    for text in ("".join(rng.choices("абвгдежз", k=20_000)), "красное сердце и рука " * 1000):
        started = time.process_time()
        segment = shipped.encode_segment(text, 64)
        shipped.unknown_note(text, "text")
        assert time.process_time() - started < 1
        assert len(segment.ids) == 64 and segment.num_cut > 0


def test_any_text_is_encoded_and_its_composed_form_alike(shipped: Tokenizer) -> None:
    rng = random.Random(20)
    for _ in range(num_cases(150)):
        text = random_text(rng, longest=rng.choice([0, 3, 40, 40, 400]))
        ids = shipped.encode(text)
        assert all(0 < token < shipped.vocab_size for token in ids)
        for form in ("NFC", "NFD"):
            assert shipped.encode(unicodedata.normalize(form, text)) == ids
        generator = torch.Generator().manual_seed(0)
        assert shipped.encode(text, dropout=1e-12, generator=generator) == ids
        assert (1 in ids) == bool(shipped.unknown_words(text))
        shipped.unknown_note(text, "text").encode()
