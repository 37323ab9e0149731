"""The emoji dataset: splits, images, and the builder with a font that every machine has."""

from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from PIL import Image

from rudolph.data.datasets import emoji_builder
from rudolph.data.datasets.emoji import (
    EMOJI_COLUMNS,
    SHIPPED_EMOJI,
    SKIN_TONES,
    Emoji,
    EmojiConfig,
    assign_splits,
    emoji_images,
    families,
    read_records,
)
from rudolph.data.pairs import SPLITS

# Letters do not need raqm, and some machines lack the fribidi that it requires.
pytestmark = pytest.mark.filterwarnings("ignore:Raqm layout was requested")

Sources = dict[str, Any]
RECORDS = read_records(SHIPPED_EMOJI)
SPLIT_OF = assign_splits(RECORDS)
# Monochrome, but like a colour font it merges "e" and an acute accent into one glyph.
FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"

EMOJI_TEST = """\
# group: Letters

# subgroup: letter-latin
0041           ; fully-qualified     # A E1.0 latin a
0041 FE0F      ; unqualified         # A E1.0 latin a
0065 0301      ; fully-qualified     # e E0.6 e with accent

# subgroup: letter-cyrillic
0410           ; fully-qualified     # A E2.0 cyrillic a
0416           ; fully-qualified     # Zh E2.0 nameless

# group: Faults
# subgroup: fault
0041 0042      ; fully-qualified     # AB E3.0 two letters
0020           ; fully-qualified     # _ E3.0 nothing
1F9CC          ; fully-qualified     # T E14.0 troll
"""
TONES_TEST = """\
# group: People & Body
# subgroup: hands
1F91D                        ; fully-qualified     # x E3.0 handshake
1F91D 1F3FB                  ; fully-qualified     # x E14.0 handshake: light skin tone
1FAF1 1F3FB 200D 1FAF2 1F3FF ; fully-qualified     # x E14.0 handshake: light skin tone, dark skin
1F468 200D 2695 FE0F         ; fully-qualified     # x E4.0 man health worker
1F468 1F3FF 200D 2695 FE0F   ; fully-qualified     # x E4.0 man health worker: dark skin tone
1F46D 1F3FE                  ; minimally-qualified # x E12.0 not taken
"""
NAMES = {
    "A": "латинская А",
    "e\u0301": "е с ударением",
    "А": "русская А",
    "AB": "две буквы",
    " ": "пробел",
    "\U0001f9cc": "тролль",
}


def write_annotations(path: Path, names: dict[str, str], keywords: str = "буква | знак") -> Path:
    lines = [
        f'<annotation cp="{characters}">{keywords}</annotation>\n'
        f'<annotation cp="{characters}" type="tts">{name}</annotation>'
        for characters, name in names.items()
    ]
    path.write_text("<ldml><annotations>" + "\n".join(lines) + "</annotations></ldml>", "utf-8")
    return path


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sources:
    monkeypatch.setattr("PIL.features.check", lambda feature: True)
    emoji_test = tmp_path / "emoji-test.txt"
    emoji_test.write_text(EMOJI_TEST, "utf-8")
    annotations = [write_annotations(tmp_path / "ru.xml", NAMES)]
    return {"font": FONT, "annotations": annotations, "emoji_test": emoji_test}


def test_every_pair_is_in_exactly_one_split() -> None:
    keys = [
        record.key
        for split in SPLITS
        for record in Emoji(EmojiConfig(), split=split, image_size=8).records
    ]
    assert len(keys) == len(set(keys))
    assert set(keys) == {record.key for record in RECORDS}


def test_the_shipped_splits_have_not_moved() -> None:
    sizes = [len(Emoji(EmojiConfig(), split=split, image_size=8)) for split in SPLITS]
    assert sizes == [3143, 208, 139, 134]
    named = {record.name: SPLIT_OF[record.key] for record in RECORDS}
    assert named["олень"] == "train"
    assert named["флаг: Румыния"] == "validation"
    assert named["космонавт: темный тон кожи"] == "test"


def test_no_image_and_no_base_of_validation_or_test_is_seen_elsewhere() -> None:
    splits_of_tile, splits_of_base = defaultdict(set), defaultdict(set)
    for record in RECORDS:
        splits_of_tile[record.tile].add(SPLIT_OF[record.key])
        splits_of_base[record.base].add(SPLIT_OF[record.key])
    assert all(len(splits) == 1 for splits in splits_of_tile.values())
    for splits in splits_of_base.values():
        assert len(splits) == 1 or splits == {"train", "compositional"}


def test_training_sees_both_parts_of_a_compositional_pair_and_never_the_pair() -> None:
    train = [record for record in RECORDS if SPLIT_OF[record.key] == "train"]
    compositional = [record for record in RECORDS if SPLIT_OF[record.key] == "compositional"]
    seen = {(record.base, record.skin_tone) for record in train}
    assert len(compositional) > 100
    for record in compositional:
        assert record.skin_tone in SKIN_TONES.values()
        assert (record.base, record.skin_tone) not in seen
        assert (record.base, "none") in seen
        assert any((record.base, tone) in seen for tone in SKIN_TONES.values())
        assert any(tone == record.skin_tone for base, tone in seen if base != record.base)


def test_a_new_emoji_moves_no_other_pair() -> None:
    new = replace(RECORDS[0], key="1fae8", base="1fae8", tile=10**6)
    moved = assign_splits([*RECORDS, new])
    assert {key: split for key, split in moved.items() if key != "1fae8"} == SPLIT_OF


def test_about_a_tenth_of_the_toned_pairs_is_held_out_unless_they_share_a_image() -> None:
    tones = ("none", *SKIN_TONES.values())
    records = [
        replace(
            RECORDS[0], key=f"{base}-{tone}", base=f"{base}", skin_tone=tone, tile=6 * base + i
        )
        for base in range(500)
        for i, tone in enumerate(tones)
    ]
    split_of = assign_splits(records)
    train_bases = {record.base for record in records if split_of[record.key] == "train"}
    held_out = [key for key, split in split_of.items() if split == "compositional"]
    assert len(held_out) / (5 * len(train_bases)) == pytest.approx(0.1, abs=0.02)
    assert max(Counter(key.split("-")[0] for key in held_out).values()) == 2
    alike = [replace(record, tile=int(record.base)) for record in records]
    assert "compositional" not in assign_splits(alike).values()


def test_families_are_the_connected_bases_of_shared_tiles() -> None:
    bases_and_tiles = [("a", 0), ("b", 1), ("c", 0), ("c", 1), ("d", 2)]
    records = [replace(RECORDS[0], base=base, tile=tile) for base, tile in bases_and_tiles]
    family_of = families(records)
    assert family_of["a"] == family_of["b"] == family_of["c"] != family_of["d"]


def test_the_names_are_those_of_cldr() -> None:
    name_of = {record.key: record.name for record in RECORDS}
    assert name_of["1f98c"] == "олень"
    assert name_of["1f9d1-1f3fe-200d-1f692"] == "пожарный: темный тон кожи"
    assert name_of["1f1ee-1f1f9"] == "флаг: Италия"
    assert len(set(name_of.values())) == len(RECORDS) == 3624


def test_the_shipped_images_are_all_different_and_none_is_blank() -> None:
    keys, images = emoji_images(64)
    assert keys == [record.key for record in RECORDS]
    tiles = {record.tile: image.tobytes() for record, image in zip(RECORDS, images, strict=True)}
    assert len(set(tiles.values())) == len(tiles)
    # Even the smallest emoji, two small squares, covers some of the 64 x 64 pixels.
    assert ((images < 250).any(axis=3).sum(axis=(1, 2)) > 50).all()


def test_the_shipped_set_is_small_and_has_its_licences() -> None:
    sizes = {path.name: path.stat().st_size for path in SHIPPED_EMOJI.iterdir()}
    assert sum(sizes.values()) <= 20e6
    assert set(sizes) >= {"emoji.csv", "emoji.png", "README.md"}
    assert "SIL OPEN FONT LICENSE" in (SHIPPED_EMOJI / "OFL-1.1.txt").read_text("utf-8")
    assert "Unicode, Inc." in (SHIPPED_EMOJI / "Unicode-DFS-2016.txt").read_text("utf-8")


@pytest.mark.parametrize("image_size", [7, 32, 64, 80])
def test_a_pair_has_the_tile_of_its_row_in_the_size_asked(image_size: int) -> None:
    dataset = Emoji(EmojiConfig(), split="validation", image_size=image_size)
    pair = dataset[5]
    tile = dataset.records[5].tile
    left, top = 64 * (tile % EMOJI_COLUMNS), 64 * (tile // EMOJI_COLUMNS)
    with Image.open(SHIPPED_EMOJI / "emoji.png") as atlas:
        cut = atlas.crop((left, top, left + 64, top + 64))
    expected = cut.resize((image_size, image_size), Image.Resampling.LANCZOS)
    assert pair.image.mode == "RGB"
    assert np.array_equal(np.asarray(pair.image), np.asarray(expected))


def test_keywords_follow_the_name_without_repeating_it() -> None:
    name_only = Emoji(EmojiConfig(), split="train", image_size=8)
    with_keywords = Emoji(EmojiConfig(captions="name_and_keywords"), split="train", image_size=8)
    for index, record in enumerate(name_only.records[:200]):
        caption = with_keywords[index].caption
        assert name_only[index].caption == record.name
        assert caption.split(", ")[0] == record.name.split(", ")[0]
        assert set(caption.removeprefix(record.name).strip(", ").split(", ")) == set(
            ", ".join(set(record.keywords.split("|")) - {record.name}).split(", ")
        )


def test_the_digest_tells_every_question_apart() -> None:
    questions = [
        (EmojiConfig(), "train", 32),
        (EmojiConfig(), "test", 32),
        (EmojiConfig(), "train", 64),
        (EmojiConfig(captions="name_and_keywords"), "train", 32),
    ]
    digests = [
        Emoji(config, split=split, image_size=size).digest for config, split, size in questions
    ]
    assert len(set(digests)) == len(questions)
    assert (
        Emoji(EmojiConfig(folder=str(SHIPPED_EMOJI)), split="train", image_size=32).digest
        == digests[0]
    )


def test_a_wrong_question_is_answered_in_one_line(tmp_path: Path) -> None:
    for question in (
        lambda: EmojiConfig(captions="title"),
        lambda: Emoji(EmojiConfig(), split="dev", image_size=8),
        lambda: Emoji(EmojiConfig(), split="train", image_size=0),
        lambda: Emoji(EmojiConfig(folder=str(tmp_path)), split="train", image_size=8),
    ):
        with pytest.raises(ValueError, match=r"\A[^\n]+\Z"):
            question()


def test_skin_tones_and_bases_are_read_from_the_sequence(tmp_path: Path) -> None:
    path = tmp_path / "emoji-test.txt"
    path.write_text(TONES_TEST, "utf-8")
    entries = emoji_builder.read_emoji_test(path)
    assert [(entry.key, entry.skin_tone, entry.base) for entry in entries] == [
        ("1f91d", "none", "1f91d"),
        ("1f91d-1f3fb", "light", "1f91d"),
        ("1faf1-1f3fb-200d-1faf2-1f3ff", "mixed", "1f91d"),
        ("1f468-200d-2695", "none", "1f468-200d-2695"),
        ("1f468-1f3ff-200d-2695", "dark", "1f468-200d-2695"),
    ]
    assert {(entry.group, entry.subgroup) for entry in entries} == {("People & Body", "hands")}
    assert entries[3].characters == "\U0001f468\u200d\u2695\ufe0f"


def test_names_are_found_with_and_without_the_variation_selector(tmp_path: Path) -> None:
    first = write_annotations(tmp_path / "main.xml", {"\u260e": "телефон"})
    second = write_annotations(
        tmp_path / "derived.xml", {"\u260e\ufe0f": "другой", "\u2764\ufe0f": "сердце"}, "a | b  "
    )
    names, keywords = emoji_builder.read_annotations([first, second])
    assert names == {"260e": "телефон", "2764": "сердце"}
    assert keywords == {"260e": ("буква", "знак"), "2764": ("a", "b")}


def test_the_builder_takes_what_is_one_named_glyph_and_reports_the_rest(
    sources: Sources, tmp_path: Path
) -> None:
    report = emoji_builder.build_emoji_set(tmp_path / "built", size=32, **sources)
    assert report.skipped == {
        emoji_builder.NO_NAME: ("416",),
        emoji_builder.SEVERAL_GLYPHS: ("41-42",),
        emoji_builder.BLANK: ("20",),
        emoji_builder.MISSING: ("1f9cc",),
    }
    records = read_records(tmp_path / "built")
    # Latin and Cyrillic A have the same image, so they get one tile.
    assert [(record.key, record.tile) for record in records] == [
        ("41", 0),
        ("65-301", 1),
        ("410", 0),
    ]
    assert (report.num_pairs, report.num_images) == (3, 2)
    assert records[2].subgroup == "letter-cyrillic"
    assert "skipped, without a Russian name: 1 (416)" in str(report)


def test_built_images_have_one_scale_a_white_ground_and_nothing_clipped(
    sources: Sources, tmp_path: Path
) -> None:
    emoji_builder.build_emoji_set(tmp_path / "built", size=64, **sources)
    _, images = emoji_images(64, tmp_path / "built")
    ink = 255 - images[:, :, :, 0].astype(int)
    font = emoji_builder.EmojiFont(FONT)
    boxes = [font.measure(characters)[1] for characters in ("A", "e\u0301")]
    left, top, right, bottom = emoji_builder.bounding_square(boxes)
    assert right - left == bottom - top
    for image, characters in zip(ink, ("A", "e\u0301"), strict=False):
        drawn = 255 - np.asarray(font.canvas(characters, "RGB"))[:, :, 0].astype(float)
        assert image.mean() == pytest.approx(drawn.sum() / (right - left) ** 2, rel=0.02)
    assert (images == 255).all(axis=3).mean() > 0.3


def test_a_second_build_is_byte_equal(sources: Sources, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    emoji_builder.build_emoji_set(tmp_path / "a", size=16, **sources)
    emoji_builder.build_emoji_set(
        tmp_path / "b",
        size=16,
        on_progress=lambda done, total: steps.append((done, total)),
        **sources,
    )
    for name in ("emoji.csv", "emoji.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert [done for done, _ in steps] == sorted({done for done, _ in steps})
    assert steps[-1] == (12, 12)


def test_a_source_is_never_written_over(sources: Sources, tmp_path: Path) -> None:
    own = tmp_path / "emoji.csv"
    own.write_bytes(sources["emoji_test"].read_bytes())
    before = own.read_bytes()
    with pytest.raises(ValueError, match=r"^target: expected a path apart from .*emoji\.csv"):
        emoji_builder.build_emoji_set(tmp_path, size=16, **{**sources, "emoji_test": own})
    assert own.read_bytes() == before


def test_a_built_set_can_be_trained_on(sources: Sources, tmp_path: Path) -> None:
    emoji_builder.build_emoji_set(tmp_path / "built", size=16, **sources)
    config = EmojiConfig(folder=str(tmp_path / "built"))
    pairs = [
        dataset[index]
        for dataset in (Emoji(config, split=split, image_size=16) for split in SPLITS)
        for index in range(len(dataset))
    ]
    captions = {"A": "латинская А", "e\u0301": "е с ударением", "А": "русская А"}
    assert {pair.attributes["characters"]: pair.caption for pair in pairs} == captions


@pytest.mark.parametrize(
    ("source", "package"),
    [
        ("font", "fonts-noto-color-emoji"),
        ("annotations", "unicode-cldr-core"),
        ("emoji_test", "unicode-data"),
    ],
)
def test_a_missing_source_names_its_debian_package(
    source: str, package: str, sources: Sources, tmp_path: Path
) -> None:
    missing = tmp_path / "missing"
    sources[source] = [missing] if source == "annotations" else missing
    with pytest.raises(ValueError, match=rf"\A[^\n]*missing[^\n]*{package}[^\n]*\Z"):
        emoji_builder.build_emoji_set(tmp_path / "built", **sources)


def test_a_source_of_the_wrong_kind_is_named(sources: Sources, tmp_path: Path) -> None:
    for source, value in {
        "font": sources["emoji_test"],
        "emoji_test": sources["annotations"][0],
        "annotations": [sources["emoji_test"]],
    }.items():
        wrong = value[0] if isinstance(value, list) else value
        with pytest.raises(ValueError, match=rf"\A[^\n]*{wrong.name}[^\n]*\Z"):
            emoji_builder.build_emoji_set(tmp_path / "built", **{**sources, source: value})


def test_without_raqm_the_builder_names_the_library(
    sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("PIL.features.check", lambda feature: False)
    with pytest.raises(ValueError, match=r"\A[^\n]*libfribidi0[^\n]*\Z"):
        emoji_builder.build_emoji_set(tmp_path / "built", **sources)
