"""Shapes: hard negatives of a scene, classes, and the grammar of sentences."""

import re
from collections import Counter
from dataclasses import replace
from random import Random

from small_worlds import COUNTED, PLACES, SIZED, coloured, masculine, meaning, pairs, world

from rudolph.data.datasets.shapes import ShapesConfig, is_sentence
from rudolph.data.datasets.shapes_checker import check_scene, read_scene
from rudolph.data.datasets.shapes_hard_negatives import CHANGES, hard_negatives_of
from rudolph.data.datasets.shapes_scenes import Scene
from rudolph.data.pairs import SPLITS, HasClasses, HasHardNegatives

LOOKS = ("colour", "shape", "size", "place")


def looks(scene: Scene) -> Counter[tuple[object, ...]]:
    return Counter((o.colour, o.shape, o.size, (o.row, o.column)) for o in scene.objects)


def test_a_hard_negative_differs_in_the_one_thing_that_it_names() -> None:
    dataset, seen = world("shapes", "test"), Counter[str]()
    for index in range(60):
        scene = dataset.scene(index)
        for changed, other in hard_negatives_of(scene, dataset.config, Random(index)):
            seen[changed] += 1
            assert other.family == scene.family
            if changed == "number":
                assert len(other.objects) != len(scene.objects)
                assert len({look[:3] for look in looks(scene) | looks(other)}) == 1
                continue
            lost = list((looks(scene) - looks(other)).elements())
            won = list((looks(other) - looks(scene)).elements())
            if changed == "relation":
                assert other.relation != scene.relation
                assert sorted(o[:3] for o in looks(scene)) == sorted(o[:3] for o in looks(other))
                continue
            assert other.relation == scene.relation
            assert len(lost) == len(won) == (len(scene.objects) if scene.family == "count" else 1)
            for one, two in zip(lost, won, strict=True):
                differs = [name for name, a, b in zip(LOOKS, one, two, strict=True) if a != b]
                assert differs == [changed]
    assert set(seen) == set(CHANGES)


def test_the_image_of_a_hard_negative_shows_its_own_sentence_and_not_the_other() -> None:
    dataset = world("shapes", "test")
    assert isinstance(dataset, HasHardNegatives)
    for index in range(30):
        scene, found = dataset.scene(index), dataset.hard_negatives(index, 5)
        every = hard_negatives_of(scene, dataset.config, Random(f"0/test/{index}/rivals"))
        assert [each.caption for each in found] == [each.scene.sentence for each in every[:5]]
        assert len({scene.sentence, *(each.caption for each in found)}) == 6
        for pair, (_, other) in zip(found, every, strict=False):
            reading = read_scene(pair.image, grid=3)
            assert is_sentence(pair.caption, dataset.config)
            assert check_scene(other, reading).is_correct
            assert not check_scene(scene, reading).is_correct


def test_hard_negatives_are_the_same_each_time_and_no_more_than_there_are() -> None:
    dataset = world("shapes")
    captions = [each.caption for each in dataset.hard_negatives(3, 1000)]
    assert captions[:4] == [each.caption for each in dataset.hard_negatives(3, 4)]
    assert len(captions) == len(set(captions)) < 100
    few = world("shapes", families=("count",), max_count=2).hard_negatives(0, 50)
    # Six other colours, four other shapes, and the other number.
    assert Counter(each.attributes["changed"] for each in few) == {
        "colour": 6,
        "shape": 4,
        "number": 1,
    }
    # Kinds of change alternate, so that the many negatives of position do not dominate.
    first = world("shapes", families=("two",)).hard_negatives(0, 4)
    assert {each.attributes["changed"] for each in first} == set(LOOKS)
    assert len({each.key for each in first}) == 4


def test_a_class_is_the_colour_and_the_shape_of_the_only_object() -> None:
    dataset, seen = world("shapes"), set()
    assert isinstance(dataset, HasClasses)
    assert len(dataset.classes) == 35 and dataset.classes[4] == "одна красная звезда"
    for index in range(400):
        scene, number = dataset.scene(index), dataset.class_index(index)
        assert (number is None) == (len(scene.objects) > 1)
        if number is not None:
            only = scene.objects[0]
            phrase = dataset.classes[number].split(" ", 1)[1]
            assert meaning(phrase) == {only.colour, only.shape}
            seen.add(scene.family)
    assert seen == {"one", "count"}


def legal_sentence(text: str) -> bool:
    """Match a sentence against an independent grammar of regular expressions."""

    whose, by_whom = coloured("ого", "его"), coloured("ым", "им")
    her = coloured("ой", "ей")
    beside = rf"(?:слева|справа) от ({whose} {masculine('а')}|{her} звезды)"
    over = rf"(?:над|под) ({by_whom} {masculine('ом')}|{her} звездой)"
    place = "|".join(PLACES)
    if found := re.fullmatch(rf"({SIZED}) (?:{beside}|{over})", text):
        return meaning(found[1].split(" ", 1)[1]) != meaning(found[2] or found[3])
    if found := re.fullmatch(rf"{SIZED} ({place}), {SIZED} ({place})", text):
        return PLACES.index(found[1]) < PLACES.index(found[2])
    return re.fullmatch(rf"{SIZED} (?:{place})|{COUNTED}", text) is not None


def test_a_sentence_is_what_the_grammar_of_the_world_allows() -> None:
    config, rng, verdicts = ShapesConfig(), Random(0), Counter[bool]()
    said = [pair.caption for split in SPLITS for pair in pairs("shapes", split, 200)]
    assert all(is_sentence(sentence, config) and legal_sentence(sentence) for sentence in said)
    words = sorted({word for sentence in said for word in sentence.split(" ")})
    for sentence in said[::3]:
        own, other = sentence.split(" "), words[int(rng.random() * len(words))]
        place = int(rng.random() * len(own))
        for mutant in (
            sentence + " ",
            sentence[:-1],
            sentence.capitalize(),
            " ".join([*own[:place], *own[place + 1 :]]),
            " ".join([*own[:place], other, *own[place:]]),
            " ".join([*own[:place], other, *own[place + 1 :]]),
            f"{sentence}, {said[place]}",
            ", ".join(reversed(sentence.split(", "))),
        ):
            verdicts[is_sentence(mutant, config)] += 1
            assert is_sentence(mutant, config) == legal_sentence(mutant), mutant
    assert min(verdicts.values()) > 100 and verdicts[False] > 1000


def test_a_sentence_of_another_world_is_none() -> None:
    config, sentence = ShapesConfig(), "одна красная звезда"
    assert is_sentence(sentence, config)
    assert not is_sentence(sentence, replace(config, families=("one", "two")))
    assert not is_sentence(sentence, replace(config, shapes=("circle", "cross")))
    assert not is_sentence("пять красных звёзд", replace(config, max_count=4))
    assert not is_sentence("большой синий круг в центре", replace(config, grid=2, max_count=4))
    assert is_sentence("маленький чёрный крест под синим крестом", config)
    assert not is_sentence("маленький чёрный крест под чёрным крестом", config)
    assert not is_sentence("", config)
