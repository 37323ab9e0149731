"""The shapes dataset: its sentences, its images, its splits, and the reader of its images."""

import io
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

from rudolph.data.datasets.shapes import Shapes, ShapesConfig
from rudolph.data.datasets.shapes_checker import Reading, ReadObject, check_scene, read_scene
from rudolph.data.datasets.shapes_rendering import (
    BACKGROUND,
    PALETTE,
    SIGNED_DISTANCES,
    SIZES,
    SceneObject,
    coverage,
    render,
)
from rudolph.data.datasets.shapes_russian import (
    ADJECTIVES,
    NOUNS,
    RELATIONS,
    counted_phrase,
    noun_phrase,
    position_phrase,
    relation_phrase,
)
from rudolph.data.datasets.shapes_scenes import DIRECTIONS, Scene
from rudolph.data.pairs import SPLITS

CONFIG = ShapesConfig(num_train=2_000, num_validation=2_000, num_test=2_000)


def shapes(split: str = "test", *, image_size: int = 32, config: ShapesConfig = CONFIG) -> Shapes:
    return Shapes(config, split=split, image_size=image_size)


def facts(known: Scene | Reading) -> set[tuple[str, str, str, int, int]]:
    return {(o.shape, o.colour, o.size, o.row, o.column) for o in known.objects}


def perfect_reading(scene: Scene) -> Reading:
    return Reading(tuple(ReadObject(*each, 1.0) for each in sorted(facts(scene))), 1.0)


def jpeg(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=60)
    return Image.open(buffer).convert("RGB")


def blurred(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(0.7))


def halved_and_doubled(image: Image.Image) -> Image.Image:
    half = image.resize((image.width // 2, image.height // 2), Image.Resampling.BICUBIC)
    return half.resize(image.size, Image.Resampling.BICUBIC)


def noisy(image: Image.Image, *, deviation: float, seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).normal(0, deviation, (*image.size, 3))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


# --- sentences -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("phrase", "expected"),
    [
        (noun_phrase("small", "blue", "circle"), "маленький синий круг"),
        (noun_phrase("small", "blue", "star"), "маленькая синяя звезда"),
        (noun_phrase("large", "cyan", "star"), "большая голубая звезда"),
        (relation_phrase("круг", "left", "green", "square"), "круг слева от зелёного квадрата"),
        (relation_phrase("круг", "right", "blue", "cross"), "круг справа от синего креста"),
        (relation_phrase("крест", "left", "blue", "star"), "крест слева от синей звезды"),
        (relation_phrase("крест", "above", "yellow", "square"), "крест над жёлтым квадратом"),
        (relation_phrase("крест", "below", "violet", "star"), "крест под фиолетовой звездой"),
        (counted_phrase(1, "blue", "star"), "одна синяя звезда"),
        (counted_phrase(2, "blue", "star"), "две синие звезды"),
        (counted_phrase(5, "red", "square"), "пять красных квадратов"),
        (counted_phrase(5, "black", "star"), "пять чёрных звёзд"),
        (position_phrase(0, 0, grid=3), "слева сверху"),
        (position_phrase(1, 1, grid=3), "в центре"),
        (position_phrase(1, 1, grid=2), "справа снизу"),
    ],
)
def test_a_phrase_is_the_russian_worked_out_by_hand(phrase: str, expected: str) -> None:
    assert phrase == expected


def test_everything_in_the_world_has_a_russian_word() -> None:
    assert set(ADJECTIVES) == set(PALETTE) | set(SIZES)
    assert set(NOUNS) == {*SIGNED_DISTANCES, "figure"}
    assert set(RELATIONS) == set(DIRECTIONS)


def test_a_sentence_is_true_of_its_objects() -> None:
    numerals = {"од": 1, "дв": 2, "тр": 3, "че": 4, "пя": 5}
    seen = set()
    for index in range(400):
        scene = shapes().scene(index)
        seen.add(scene.family)
        first, last = scene.objects[0], scene.objects[-1]
        if scene.family == "count":
            assert numerals[scene.sentence[:2]] == len(scene.objects)
            assert len({(each.row, each.column) for each in scene.objects}) == len(scene.objects)
        elif scene.family == "relation":
            holds = {
                "слева от": first.row == last.row and first.column < last.column,
                "справа от": first.row == last.row and first.column > last.column,
                "над": first.column == last.column and first.row < last.row,
                "под": first.column == last.column and first.row > last.row,
            }
            assert all(true for word, true in holds.items() if f" {word} " in scene.sentence)
        else:
            phrases = scene.sentence.split(", ")
            assert len(phrases) == len(scene.objects)
            for phrase, each in zip(phrases, scene.objects, strict=True):
                assert ("сверху" in phrase) == (each.row == 0)
                assert ("снизу" in phrase) == (each.row == 2)
                assert ("слева" in phrase) == (each.column == 0)
                assert ("справа" in phrase) == (each.column == 2)
    assert seen == set(CONFIG.families)


# --- splits --------------------------------------------------------------------------------------


def test_no_sentence_is_in_two_splits() -> None:
    sentences = {split: {shapes(split).scene(i).sentence for i in range(1000)} for split in SPLITS}
    assert len(set.union(*sentences.values())) == sum(map(len, sentences.values()))
    assert min(map(len, sentences.values())) > 300


def test_only_compositional_scenes_join_a_held_out_colour_and_shape() -> None:
    met = {
        split: [{(o.colour, o.shape) for o in shapes(split).scene(i).objects} for i in range(500)]
        for split in SPLITS
    }
    assert all(pairs & CONFIG.held_out for pairs in met.pop("compositional"))
    assert not any(pairs & CONFIG.held_out for scenes in met.values() for pairs in scenes)
    trained = set.union(*met["train"])
    assert {colour for colour, _ in trained} == set(CONFIG.colours)
    assert {shape for _, shape in trained} == set(CONFIG.shapes)


def test_a_scene_depends_on_its_split_and_index_alone() -> None:
    backwards = [shapes().scene(index) for index in reversed(range(20))]
    longer = shapes(config=replace(CONFIG, num_test=10**9))
    assert backwards[::-1] == [longer.scene(index) for index in range(20)]
    assert backwards[::-1] != [shapes("validation").scene(index) for index in range(20)]
    reseeded = shapes(config=replace(CONFIG, seed=1))
    assert backwards[::-1] != [reseeded.scene(index) for index in range(20)]
    assert shapes()[7].image.tobytes() == shapes()[7].image.tobytes()


def test_the_first_sentences_stay_what_they_are() -> None:
    assert [shapes(split).scene(0).sentence for split in SPLITS] == [
        "большой жёлтый квадрат сверху, маленький голубой круг слева",
        "маленький жёлтый квадрат справа от синего треугольника",
        "четыре синих треугольника",
        "маленькая синяя звезда справа сверху, большая чёрная звезда справа",
    ]


def test_distinct_scenes_repeat_no_sentence_and_leave_none_out() -> None:
    dataset = shapes()
    indices = dataset.distinct(200)
    sentences = [dataset.scene(index).sentence for index in range(indices[-1] + 1)]
    assert [sentences[index] for index in indices] == list(dict.fromkeys(sentences))
    assert len(indices) == 200
    with pytest.raises(
        ValueError, match=r"^test has \d+ different sentences in 2000 scenes, expected"
    ):
        dataset.distinct(2_000)


def test_a_pair_tells_what_its_scene_knows() -> None:
    pair, scene = shapes()[3], shapes().scene(3)
    told = [tuple(each.split()) for each in pair.attributes["objects"].split("; ")]
    assert told == [(o.size, o.colour, o.shape, str(o.row), str(o.column)) for o in scene.objects]
    assert (pair.caption, pair.attributes["family"]) == (scene.sentence, scene.family)
    assert pair.key != shapes()[4].key != shapes("train")[4].key


def test_a_digest_changes_with_whatever_decides_the_pairs() -> None:
    changes: list[dict[str, Any]] = [{"jitter": 0.0}, {"colours": ("red", "blue")}, {"seed": 1}]
    others = [shapes(config=replace(CONFIG, **change)) for change in changes]
    digests = [each.digest for each in [shapes(), shapes("train"), shapes(image_size=64), *others]]
    assert len(set(digests)) == 6
    assert shapes().digest == shapes().digest


# --- images ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SIGNED_DISTANCES)
def test_a_coverage_is_the_share_of_a_pixel_inside_the_shape(shape: str) -> None:
    pixels, fine = 24, 16
    points = (np.arange(pixels * fine) + 0.5) / (pixels * fine) * 2.6 - 1.3
    inside = SIGNED_DISTANCES[shape](points[None, :], points[:, None]) < 0
    expected = inside.reshape(pixels, fine, pixels, fine).mean(axis=(1, 3))
    centres = (np.arange(pixels) + 0.5) / pixels * 2.6 - 1.3
    actual = coverage(shape, centres[None, :], centres[:, None], radius=1.0, softness=2.6 / pixels)
    assert np.abs(actual - expected).max() < 0.3  # at a corner
    assert np.abs(actual - expected).mean() < 0.012


def test_an_object_stays_in_its_cell_but_for_its_soft_edge() -> None:
    for shape in SIGNED_DISTANCES:
        for shift in (-0.05, 0.05):
            each = SceneObject(shape, "black", "large", 1, 1, shift=(shift, shift))
            image = np.array(render([each], grid=3, image_size=96))
            assert (image[32:64, 32:64] < 128).any()
            image[31:65, 31:65] = BACKGROUND
            assert (image == BACKGROUND).all()


def test_a_large_image_shrunk_is_the_small_image() -> None:
    for index in range(10):
        small = np.asarray(shapes()[index].image, dtype=np.float64)
        large = shapes(image_size=256)[index].image.resize((32, 32), Image.Resampling.BOX)
        assert np.abs(small - np.asarray(large)).mean() < 1.0


# --- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_size", [32, 64])
def test_the_reader_is_right_after_a_jpeg_of_quality_60(image_size: int) -> None:
    dataset = shapes(image_size=image_size)
    right = [
        facts(read_scene(jpeg(dataset[index].image), grid=3)) == facts(dataset.scene(index))
        for index in range(300)
    ]
    assert np.mean(right) >= 0.99


@pytest.mark.parametrize(
    ("change", "image_size"), [(blurred, 32), (blurred, 64), (halved_and_doubled, 64)]
)
def test_the_reader_is_right_after_a_blur(
    change: Callable[[Image.Image], Image.Image], image_size: int
) -> None:
    dataset = shapes(image_size=image_size)
    right = [
        facts(read_scene(change(dataset[index].image), grid=3)) == facts(dataset.scene(index))
        for index in range(100)
    ]
    assert np.mean(right) >= 0.99


@pytest.mark.parametrize(("grid", "image_size"), [(2, 24), (3, 24), (2, 50), (3, 100), (3, 256)])
def test_the_reader_reads_any_size_and_grid(grid: int, image_size: int) -> None:
    config = ShapesConfig(grid=grid, max_count=4)
    dataset = shapes("compositional", image_size=image_size, config=config)
    for index in range(20):
        reading = read_scene(np.asarray(dataset[index].image), grid=grid)
        assert facts(reading) == facts(dataset.scene(index))
        assert check_scene(dataset.scene(index), reading).is_correct


def test_an_empty_image_surely_has_no_objects() -> None:
    for colour in (BACKGROUND, (240, 236, 244)):
        reading = read_scene(Image.new("RGB", (32, 32), colour), grid=3)
        assert reading.objects == () and reading.confidence > 0.99


def test_a_reading_is_less_sure_of_a_noisier_image_and_of_its_mistakes() -> None:
    dataset, means = shapes(), list[float]()
    right: list[float] = []
    wrong: list[float] = []
    for deviation in (0.0, 40.0, 80.0):
        readings = [
            read_scene(noisy(dataset[i].image, deviation=deviation, seed=i), grid=3)
            for i in range(80)
        ]
        means.append(sum(reading.confidence for reading in readings) / len(readings))
        for index, reading in enumerate(readings):
            correct = facts(reading) == facts(dataset.scene(index))
            (right if correct else wrong).append(reading.confidence)
    assert means[0] > 0.99
    assert means[0] > means[1] + 0.02 and means[1] > means[2] + 0.2
    assert len(wrong) >= 10 and np.mean(wrong) < np.mean(right) - 0.2


# --- scoring -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CONFIG.families)
def test_a_true_reading_is_right_and_any_lacking_or_added_object_is_not(family: str) -> None:
    dataset = shapes(config=replace(CONFIG, families=(family,)))
    for index in range(30):
        scene = dataset.scene(index)
        reading = perfect_reading(scene)
        assert (
            check_scene(scene, reading).is_correct
            and check_scene(scene, reading).object_accuracy == 1
        )
        lacking = check_scene(scene, replace(reading, objects=reading.objects[1:]))
        assert not lacking.is_correct
        assert lacking.object_accuracy == pytest.approx(1 - 1 / len(scene.objects))
        taken = {(each.row, each.column) for each in scene.objects}
        free = min(set(product(range(3), repeat=2)) - taken)
        added = replace(reading.objects[0], row=free[0], column=free[1])
        more = check_scene(scene, replace(reading, objects=(*reading.objects, added)))
        assert not more.is_correct and 0.5 <= more.object_accuracy < 1


@pytest.mark.parametrize("family", CONFIG.families)
def test_another_colour_or_shape_is_not_right(family: str) -> None:
    dataset = shapes(config=replace(CONFIG, families=(family,)))
    for index in range(30):
        scene = dataset.scene(index)
        first, *others = perfect_reading(scene).objects
        colour = "red" if first.colour != "red" else "blue"
        shape = "cross" if first.shape != "cross" else "circle"
        for wrong in (replace(first, colour=colour), replace(first, shape=shape)):
            judgement = check_scene(scene, Reading((wrong, *others), 1.0))
            assert not judgement.is_correct
            assert judgement.object_accuracy == pytest.approx(1 - 1 / len(scene.objects))


def test_a_moved_or_resized_object_is_right_only_where_the_sentence_leaves_it_open() -> None:
    def moved(scene: Scene) -> Reading:
        mirrored = [
            replace(each, row=2 - each.row, column=2 - each.column)
            for each in perfect_reading(scene).objects
        ]
        return Reading(tuple(mirrored), 1.0)

    def resized(scene: Scene) -> Reading:
        other = {"small": "large", "large": "small"}
        changed = [replace(each, size=other[each.size]) for each in perfect_reading(scene).objects]
        return Reading(tuple(changed), 1.0)

    def scene(family: str, relation: str | None, *cells: tuple[int, int]) -> Scene:
        objects = [SceneObject("circle", "red", "small", *cell) for cell in cells]
        if family == "relation":
            objects[1] = replace(objects[1], colour="green")
        return Scene(family, tuple(objects), "", relation)

    one, count = scene("one", None, (0, 0)), scene("count", None, (0, 0), (0, 1))
    left = scene("relation", "left", (0, 0), (0, 2))
    assert not check_scene(one, moved(one)).is_correct
    assert not check_scene(one, resized(one)).is_correct
    assert check_scene(count, moved(count)).is_correct
    assert check_scene(count, resized(count)).is_correct
    assert not check_scene(left, moved(left)).is_correct
    assert check_scene(left, moved(left)).object_accuracy == 1
    assert check_scene(left, perfect_reading(scene("relation", "left", (1, 1), (1, 2)))).is_correct
    assert not check_scene(
        left, perfect_reading(scene("relation", "left", (0, 1), (1, 2)))
    ).is_correct
    second_resized = replace(
        left, objects=(left.objects[0], replace(left.objects[1], size="large"))
    )
    assert check_scene(left, perfect_reading(second_resized)).is_correct
    assert not check_scene(left, resized(left)).is_correct


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"grid": 4}, "grid must be one of 2, 3, got 4"),
        ({"families": ()}, "families must be at least 1 of one, two, relation, count"),
        ({"shapes": ("circle", "heart")}, "shapes must be at least 2 of circle, square"),
        ({"colours": ("red", "red")}, "colours must be at least 2 of red, green"),
        ({"grid": 2}, "max_count must be 1 to 4 when grid is 2, got 5"),
        ({"jitter": 0.2}, "jitter must be 0 to 0.05, got 0.2"),
        ({"num_test": 0}, "num_test must be at least 1, got 0"),
    ],
)
def test_a_wrong_field_is_named_with_what_is_legal(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=f"^{says}"):
        replace(CONFIG, **wrong)


def test_a_wrong_split_size_or_index_is_named() -> None:
    with pytest.raises(ValueError, match="split must be one of"):
        shapes("dev")
    with pytest.raises(ValueError, match="image_size must be at least 24, got 16"):
        shapes(image_size=16)
    with pytest.raises(IndexError, match="test has 2000 scenes, got index 2000"):
        shapes().scene(2_000)
    with pytest.raises(ValueError, match="24 pixels a side or more, got 32 x 16"):
        read_scene(Image.new("RGB", (32, 16)), grid=3)


def test_a_world_too_small_for_a_split_is_refused() -> None:
    few: dict[str, Any] = {"shapes": ("circle", "cross"), "colours": ("red", "blue")}
    config = ShapesConfig(families=("count",), max_count=1, **few)
    with pytest.raises(ValueError, match="no sentence falls into validation"):
        shapes("validation", config=config).scene(0)
