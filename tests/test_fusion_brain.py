"""The six tasks of Fusion Brain: how they are identified, and converted to pairs."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rudolph.data.datasets.fusion_brain import (
    FUSION_BRAIN_TASKS,
    FusionBrain,
    FusionBrainConfig,
    description,
    options,
    possible_tasks,
)
from rudolph.data.datasets.fusion_brain_files import TaskRecord, read_tasks, write_tasks
from rudolph.data.datasets.manifests import Manifest
from rudolph.data.datasets.tables import ManifestConfig
from rudolph.data.image_files import center_crop
from rudolph.data.pairs import Pair

SPLITS = ("train", "validation", "test")


def said(action: Callable[[], object]) -> str:
    """Return the one-line message of the ``ValueError`` that ``action`` raises."""
    with pytest.raises(ValueError) as error:
        action()
    assert "\n" not in str(error.value)
    return str(error.value)


def noise(seed: int) -> Image.Image:
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (9, 12, 3), dtype=np.uint8))


def make(folder: Path, task: str, number: int = 120) -> FusionBrainConfig:
    """Write questions of a task with different contents, and images if the task has any."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    records = []
    for at in range(number):
        name, row = f"images/{at}.png", FUSION_BRAIN_TASKS[task]
        record = TaskRecord(f"{at}", ("Сделай это.", f"Дело {at}: a) да; b) нет"))
        if row.has_image or row.answer_type == "image":
            noise(at).save(folder / name)
        if row.has_image:
            record = replace(record, image=name)
        if row.answer_type == "image":
            records.append(replace(record, answer_images=(name,)))
        else:
            records.append(replace(record, answer_texts=("b", f"нет {at}", "b нет")))
    files = folder / "asked.json", folder / "told.json"
    write_tasks(records, *files)
    return FusionBrainConfig(task, *map(str, files))


def pairs_of(config: FusionBrainConfig, split: str) -> list[Pair]:
    dataset = FusionBrain(config, split=split, image_size=8)
    return [dataset[index] for index in range(len(dataset))]


@pytest.mark.parametrize("task", FUSION_BRAIN_TASKS)
def test_a_record_of_a_task_can_be_of_it_and_says_no_more_than_its_types(
    tmp_path: Path, task: str
) -> None:
    config = make(tmp_path, task, 1)
    (record,) = read_tasks(config.questions, config.answers)
    row = FUSION_BRAIN_TASKS[task]
    alike = [
        name
        for name, other in FUSION_BRAIN_TASKS.items()
        if (other.has_image, other.answer_type) == (row.has_image, row.answer_type)
    ]
    assert task in alike and list(possible_tasks(record)) == alike


def test_what_cannot_be_told_stays_open() -> None:
    assert possible_tasks(TaskRecord("0", ("что?",))) == ("textqa", "mathqa", "generation")
    assert possible_tasks(TaskRecord("0", (), "a.png")) == ("captioning", "text_recognition")
    assert possible_tasks(TaskRecord("0", ("что?",), "a.png", (), ("b.png",))) == ()
    assert possible_tasks(TaskRecord("0")) == ()


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("варианты: a) на велосипеде; b) на лошади", "b", ("a", "b")),
        ("варианты: a) на велосипеде; b) на лошади", "на лошади", ("на велосипеде", "на лошади")),
        ("a) -4; b) -20; c) -5; d) -3", "d -3", ("a -4", "b -20", "c -5", "d -3")),
        ("a) 1; b) 1", "1", ()),
        ("a) 1; c) 2", "a", ()),
        ("a) 1", "a", ()),
        ("вычисли f(a) и f(b)", "a", ()),
        ("что это?", "кот", ()),
    ],
)
def test_options_are_choices_in_the_form_of_the_answer(
    text: str, answer: str, expected: tuple[str, ...]
) -> None:
    assert options(TaskRecord("0", ("Выбери.", text)), answer) == expected


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (("Нарисуй картинку.", "Кот. И пёс."), "Кот. И пёс."),
        (("Нарисуй картинку. Кот. И пёс.",), "Кот. И пёс."),
        (("Кот в шляпе.",), "Кот в шляпе."),
    ],
)
def test_a_description_is_the_text_without_the_instruction(
    parts: tuple[str, ...], expected: str
) -> None:
    assert description(TaskRecord("0", parts)) == expected


# --- pairs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", FUSION_BRAIN_TASKS)
def test_a_pair_says_what_the_files_say(tmp_path: Path, task: str) -> None:
    config, row = make(tmp_path, task), FUSION_BRAIN_TASKS[task]
    pairs = {pair.attributes["id"]: pair for split in SPLITS for pair in pairs_of(config, split)}
    assert len(pairs) == 120
    for name, pair in pairs.items():
        asked = f"Сделай это. Дело {name}: a) да; b) нет"
        assert pair.key == f"{task}/{name}"
        if row.has_image or row.answer_type == "image":
            expected = center_crop(noise(int(name)), 8)
            assert pair.image is not None and pair.image.tobytes() == expected.tobytes()
        else:
            assert pair.image is None
        if row.answer_type == "image":
            assert (pair.caption, pair.question, pair.choices) == (asked, "", ())
            assert pair.attributes["description"] == f"Дело {name}: a) да; b) нет"
        else:
            assert (pair.question, pair.caption, pair.choices) == (asked, "b", ("a", "b"))
            assert pair.attributes["variants"].split("\n") == [f"нет {name}", "b нет"]


@pytest.mark.parametrize("task", ["textqa", "mathqa", "vqa", "generation"])
def test_the_splits_share_out_all_questions_by_content(tmp_path: Path, task: str) -> None:
    config = make(tmp_path, task, 400)
    parts = {split: {pair.key for pair in pairs_of(config, split)} for split in SPLITS}
    assert sum(map(len, parts.values())) == len(set.union(*parts.values())) == 400
    for split, share in zip(SPLITS, (0.90, 0.05, 0.05), strict=True):
        # Four standard deviations of a binomial fraction.
        assert abs(len(parts[split]) / 400 - share) < 4 * (share * (1 - share) / 400) ** 0.5
    records = read_tasks(config.questions, config.answers)
    renamed = [replace(record, id=f"новый {record.id}") for record in records[::-1]]
    write_tasks(renamed, config.questions, config.answers)
    for split in SPLITS:
        keys = {pair.key.replace("новый ", "") for pair in pairs_of(config, split)}
        assert keys == parts[split]


def test_questions_about_one_context_or_image_are_in_one_split(tmp_path: Path) -> None:
    config = make(tmp_path, "vqa", 60)
    records = read_tasks(config.questions, config.answers)
    copies = []
    for record in records:
        shutil.copyfile(tmp_path / str(record.image), tmp_path / f"images/copy-{record.id}.png")
        copies.append(replace(record, id=f"{record.id}-2", image=f"images/copy-{record.id}.png"))
    write_tasks([*records, *copies], config.questions, config.answers)
    text_config = FusionBrainConfig("textqa", *(str(tmp_path / name) for name in ("q", "a")))
    contexts = [
        TaskRecord(f"{at}{part}", (f"Текст, о котором спросят {at}", part), None, ("да",))
        for at in range(60)
        for part in ("-1", "-2")
    ]
    write_tasks(contexts, text_config.questions, text_config.answers)
    for each in (config, text_config):
        parts = [
            {pair.attributes["id"].split("-")[0] for pair in pairs_of(each, split)}
            for split in SPLITS
        ]
        assert sum(map(len, parts)) == len(set.union(*parts)) == 60


def test_a_manifest_of_the_same_files_has_the_same_pairs(tmp_path: Path) -> None:
    config = make(tmp_path, "vqa")
    table = ManifestConfig(config.questions, answers=config.answers)
    for split in SPLITS:
        manifest = Manifest(table, split=split, image_size=8)
        ours, theirs = pairs_of(config, split), [manifest[at] for at in range(len(manifest))]
        assert [(pair.question, pair.caption) for pair in ours] == [
            (pair.question, pair.caption) for pair in theirs
        ]
        for one, other in zip(ours, theirs, strict=True):
            assert np.array_equal(np.asarray(one.image), np.asarray(other.image))


def test_the_digest_changes_with_whatever_changes_the_pairs(tmp_path: Path) -> None:
    config = make(tmp_path, "vqa", 40)

    def digest(config: FusionBrainConfig = config, split: str = "train", size: int = 8) -> str:
        return FusionBrain(config, split=split, image_size=size).digest

    digests = {digest(), digest(size=9), digest(replace(config, task="captioning"))}
    shutil.copytree(tmp_path / "images", tmp_path / "elsewhere/images")
    assert digest(replace(config, images=str(tmp_path / "elsewhere"))) in digests
    records = read_tasks(config.questions, config.answers)
    at = int(FusionBrain(config, split="train", image_size=8).entries[0].record.id)
    for changed in (
        replace(records[at], texts=("иначе",)),
        replace(records[at], answer_texts=("иначе",)),
        replace(records[at], answer_texts=("b", "иначе")),
    ):
        write_tasks([*records[:at], changed, *records[at + 1 :]], config.questions, config.answers)
        digests.add(digest())
    write_tasks(records, config.questions, config.answers)
    shown = FusionBrain(config, split="train", image_size=8).entries[0]
    noise(999).save(shown.path)
    digests.add(digest())
    assert len(digests) == 7


def mutated(config: FusionBrainConfig, **changes: object) -> None:
    """Change the record with id 7."""
    records = read_tasks(config.questions, config.answers)
    records[7] = replace(records[7], **changes)
    write_tasks(records, config.questions, config.answers)


@pytest.mark.parametrize(
    ("task", "changes", "file", "words"),
    [
        ("vqa", {"image": None}, "asked", "the question needs an image"),
        ("vqa", {"texts": (" ",)}, "asked", "the question needs a text"),
        ("vqa", {"image": "gone.png"}, "asked", "gone.png (No such file or directory)"),
        ("mathqa", {"image": "a.png"}, "asked", "expected a question of mathqa, got one of "),
        ("mathqa", {"answer_texts": (" ",)}, "told", "an answer must have words"),
        ("textqa", {"answer_texts": (), "answer_images": ("a",)}, "asked", "of type 'text'"),
        ("generation", {"answer_images": ("gone.png",)}, "told", "gone.png (No such file"),
        ("generation", {"answer_images": (), "answer_texts": ("а",)}, "asked", "of type 'image'"),
    ],
)
def test_a_question_that_the_task_cannot_have_is_told_with_file_and_id(
    tmp_path: Path, task: str, changes: dict[str, object], file: str, words: str
) -> None:
    config = make(tmp_path, task, 10)
    mutated(config, **changes)
    message = said(lambda: FusionBrain(config, split="train", image_size=8))
    assert message.startswith(f"{tmp_path / file}.json: id '7': ") and words in message


def test_a_image_that_is_broken_or_changes_is_told_with_file_and_id(tmp_path: Path) -> None:
    config = make(tmp_path, "vqa", 20)
    for entry in FusionBrain(config, split="train", image_size=8).entries:
        Path(entry.path).write_bytes(b"no image")
    dataset = FusionBrain(config, split="train", image_size=8)
    first = dataset.entries[0]
    start = f"{config.questions}: id {first.record.id!r}: {first.path}: "
    assert said(lambda: dataset[0]) == f"{start}corrupt image"
    noise(0).save(first.path)
    assert said(lambda: dataset[0]) == f"{start}the image changed after the files were read"


def test_a_setting_without_sense_is_told_in_one_line(tmp_path: Path) -> None:
    config = make(tmp_path, "mathqa", 1)
    empty = FusionBrainConfig(answers="a.json")
    splits = [(config, "dev", 8), (config, "compositional", 8), (config, "train", 0)]
    messages = [
        said(lambda each=each: FusionBrain(each[0], split=each[1], image_size=each[2]))
        for each in [*splits, (empty, "train", 8), (replace(empty, questions="b"), "train", 8)]
    ]
    for message, words in zip(
        messages,
        ["split must be one of", "Fusion Brain has none", "got 0", "questions of", "b: no such"],
        strict=True,
    ):
        assert words in message
    assert "task must be one of textqa, mathqa," in said(lambda: FusionBrainConfig("ocr"))


def test_a_split_without_questions_is_told_in_one_line(tmp_path: Path) -> None:
    config = make(tmp_path, "mathqa", 1)
    counts = []
    for split in SPLITS:
        try:
            counts.append(len(FusionBrain(config, split=split, image_size=8)))
        except ValueError as error:
            assert f"none of its 1 questions falls into the split {split!r}" in str(error)
    assert counts == [1]
