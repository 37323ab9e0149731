"""Hard negatives among emoji, and the classes of emoji."""

import re
from pathlib import Path
from typing import Any

import pytest
from tiny_emoji import write_set

from rudolph.data.datasets.emoji import (
    GROUPS,
    SHIPPED_EMOJI,
    Emoji,
    EmojiConfig,
    assign_splits,
    emoji_image,
    read_records,
)
from rudolph.data.pairs import SPLITS, HasClasses, HasHardNegatives, Pair

RECORDS = read_records(SHIPPED_EMOJI)
RECORD_OF = {record.key: record for record in RECORDS}
PLACE = {record.key: place for place, record in enumerate(RECORDS)}


def emoji(split: str = "test", **options: Any) -> Emoji:
    return Emoji(EmojiConfig(**options), split=split, image_size=4)


def content(pair: Pair) -> tuple[Any, ...]:
    assert pair.image is not None
    return pair.key, pair.caption, tuple(pair.attributes.items()), pair.image.tobytes()


@pytest.mark.parametrize("captions", ["name", "name_and_keywords"])
def test_hard_negatives_are_the_kin_in_three_circles_each_sorted_by_tone_and_nearness(
    captions: str,
) -> None:
    for split in SPLITS:
        dataset = emoji(split, captions=captions)
        for index in range(0, len(dataset), 29):
            own = dataset.records[index]
            circles: list[list[Any]] = [[], [], []]
            for other in RECORDS:
                if other.group == own.group and other.tile != own.tile:
                    circle = 2 - (other.subgroup == own.subgroup) - (other.base == own.base)
                    circles[circle].append(other)
            place = PLACE[own.key]
            expected, tiles = [], set()
            for circle in circles:
                circle.sort(key=lambda other: PLACE[other.key])
                circle.sort(key=lambda other: abs(PLACE[other.key] - place))
                circle.sort(key=lambda other: other.skin_tone != own.skin_tone)
                expected += [o.key for o in circle if not (o.tile in tiles or tiles.add(o.tile))]
                if len(expected) >= 8:
                    break
            negatives = dataset.hard_negatives(index, 8)
            assert [negative.key for negative in negatives] == expected[:8]


def test_hard_negatives_differ_in_caption_and_image_from_one_another_and_from_the_emoji() -> None:
    for split in SPLITS:
        dataset = emoji(split)
        for index in range(0, len(dataset), 31):
            pairs = [dataset[index], *dataset.hard_negatives(index, 12)]
            assert len(pairs) == 13
            assert len({pair.caption for pair in pairs}) == 13
            assert len({RECORD_OF[pair.key].tile for pair in pairs}) == 13


def test_the_first_hard_negatives_of_a_toned_emoji_are_its_other_tones() -> None:
    dataset = emoji()
    names = [record.name for record in dataset.records]
    index = names.index("космонавт: темный тон кожи")
    negatives = dataset.hard_negatives(index, 6)
    assert [negative.caption for negative in negatives[:5]] == [
        "космонавт: средний тон кожи",
        "космонавт: очень темный тон кожи",
        "космонавт: светлый тон кожи",
        "космонавт: очень светлый тон кожи",
        "космонавт",
    ]
    assert negatives[5].attributes["skin_tone"] == "medium-dark"
    assert negatives[5].attributes["subgroup"] == "person-role"


def test_hard_negatives_come_from_any_split_with_their_own_images_and_always_the_same() -> None:
    dataset = emoji("validation")
    split_of = assign_splits(RECORDS)
    found = set()
    for index in range(0, len(dataset), 10):
        negatives = dataset.hard_negatives(index, 20)
        found |= {split_of[negative.key] for negative in negatives}
        for negative in negatives:
            expected = emoji_image(SHIPPED_EMOJI, RECORD_OF[negative.key].tile, 4)
            assert negative.image is not None and negative.image.tobytes() == expected.tobytes()
        again = emoji("validation").hard_negatives(index, 20)
        assert [content(negative) for negative in again] == [
            content(negative) for negative in negatives
        ]
    assert found == set(SPLITS)


def test_equal_captions_and_images_are_no_hard_negatives_and_fewer_are_given(
    tmp_path: Path,
) -> None:
    rows = [
        {"name": "а", "tile": 0},
        {"name": "б", "tile": 1},
        {"name": "б", "tile": 2},
        {"name": "в", "tile": 1},
        {"name": "г", "tile": 0},
        {"name": "а", "tile": 3},
        {"name": "д", "tile": 4, "group": "Signs"},
        {"name": "е", "tile": 5},
    ]
    folder = write_set(tmp_path / "set", rows)
    records = read_records(Path(folder))
    split = assign_splits(records)["0"]
    dataset = emoji(split, folder=folder)
    index = [record.key for record in dataset.records].index("0")
    assert [negative.caption for negative in dataset.hard_negatives(index, 99)] == ["б", "е"]
    assert [negative.key for negative in dataset.hard_negatives(index, 1)] == ["1"]
    with pytest.raises(ValueError, match=r"\Anumber of negatives must be at least 1, got 0\Z"):
        dataset.hard_negatives(index, 0)


def test_every_emoji_is_of_the_class_of_its_group() -> None:
    for split in SPLITS:
        dataset = emoji(split)
        assert isinstance(dataset, HasHardNegatives) and isinstance(dataset, HasClasses)
        assert dataset.classes == tuple(GROUPS.values())
        for index, record in enumerate(dataset.records):
            name = dataset.classes[dataset.class_index(index)]
            assert name == GROUPS[record.group]
            assert re.fullmatch("[а-я ]+", name)


def test_a_group_without_a_russian_name_is_a_class_all_the_same(tmp_path: Path) -> None:
    groups = ["Letters", "Flags", "Letters"]
    rows = [{"name": f"{at}", "tile": at, "group": group} for at, group in enumerate(groups)]
    folder = write_set(tmp_path / "set", rows)
    for split in SPLITS:
        dataset = emoji(split, folder=folder)
        assert dataset.classes == ("Letters", "флаги")
        for index, record in enumerate(dataset.records):
            assert dataset.class_index(index) == (record.group == "Flags")
