"""Pairs of the six tasks of the Fusion Brain Challenge 2; ``fusion_brain_files`` is the format.

To add a task, write its row in ``FUSION_BRAIN_TASKS``.

Source: fbc2_aij2022, README (the sub-tasks) and ``evaluation/split_tasks.py`` (their names).
"""

import hashlib
import json
import os
import re
import string
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from rudolph.data.datasets.fusion_brain_files import TaskRecord, naming_record, read_tasks
from rudolph.data.datasets.manifests import split_of_image
from rudolph.data.image_files import RejectedError, center_crop, decode_image
from rudolph.data.pairs import Pair, require_split

# Part of every digest: raise it when the same files would give other pairs.
PAIRS_VERSION = 1
# Between the variants of an attribute.  No bar: one may stand in an answer, as in |x|.
VARIANT_SEPARATOR = "\n"
OPTION = re.compile(r"(?:^|(?<=[\s;:]))([a-z])\)\s*([^;]*)")


@dataclass(frozen=True)
class FusionBrainTask:
    """What a question of a task holds, and which type its answer is of, "text" or "image".

    Where there is a context, several questions are asked of one text.
    """

    has_image: bool
    needs_text: bool
    answer_type: str = "text"
    has_context: bool = False


# In the order of the challenge's numbers, 0 to 5.
FUSION_BRAIN_TASKS = {
    "textqa": FusionBrainTask(has_image=False, needs_text=True, has_context=True),
    "mathqa": FusionBrainTask(has_image=False, needs_text=True),
    "generation": FusionBrainTask(has_image=False, needs_text=True, answer_type="image"),
    "captioning": FusionBrainTask(has_image=True, needs_text=False),
    "vqa": FusionBrainTask(has_image=True, needs_text=True),
    "text_recognition": FusionBrainTask(has_image=True, needs_text=False),
}


@dataclass(frozen=True)
class FusionBrainConfig:
    """One task, and the files of its questions and truths.

    ``images`` is the folder that image paths start from; ``None`` is that of the file that names
    them.
    """

    task: str = "vqa"
    questions: str = ""
    answers: str = ""
    images: str | None = None

    def __post_init__(self) -> None:
        if self.task not in FUSION_BRAIN_TASKS:
            raise ValueError(
                f"task must be one of {', '.join(FUSION_BRAIN_TASKS)}, got {self.task!r}"
            )


class TaskEntry(NamedTuple):
    """A record and its image, where there is one: the path and the SHA-256 of the file."""

    record: TaskRecord
    path: str = ""
    sha256: str = ""


class FusionBrain:
    """One split of a task: 90% train, 5% validation, 5% test, by content.

    All questions about an image are in one split, and so are all about a context, the longest
    text of a TextQA, and equal mathematical problems.  The caption of a pair is the first variant
    of its answer; ``attributes["variants"]`` has the others, joined with ``VARIANT_SEPARATOR``.
    For image generation the caption is the text and the image the answer; its
    ``attributes["description"]`` is the text without the instruction.  A key is task and id.

    Args:
        config: the task and its files.
        split: "train", "validation" or "test".
        image_size: side of the square images, in pixels.

    Raises:
        ValueError: in one line with file and id, where a file is not of the format, a question not
            of the task, an image missing, or where no question falls into the split.
    """

    def __init__(self, config: FusionBrainConfig, *, split: str, image_size: int) -> None:
        require_split(split)
        if split == "compositional":
            raise ValueError(
                "split 'compositional': Fusion Brain has none, legal are train, validation, test"
            )
        if image_size < 1:
            raise ValueError(f"image_size must be at least 1 pixel, got {image_size}")
        for field in ("questions", "answers"):
            if not getattr(config, field):
                raise ValueError(f"{field} of Fusion Brain is empty: give the path of a JSON file")
        self.config, self.image_size = config, image_size
        self.task = FUSION_BRAIN_TASKS[config.task]
        # Images are asked about in the one file, or answer in the other.
        shown = config.answers if self.task.answer_type == "image" else config.questions
        self.file_with_images = shown
        self.folder = Path(shown).parent if config.images is None else Path(config.images)
        entries = [self._entry(each) for each in read_tasks(config.questions, config.answers)]
        self.entries = [
            entry for entry in entries if split_of_image(self._content(entry)) == split
        ]
        if not self.entries:
            raise ValueError(
                f"{config.questions}: none of its {len(entries)} questions falls into the split "
                f"{split!r} (90% train, 5% validation, 5% test): give it more questions"
            )
        told = [[asdict(entry.record), entry.sha256] for entry in self.entries]
        question = ["fusion brain", PAIRS_VERSION, config.task, image_size, told]
        self.digest = hashlib.sha256(json.dumps(question).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Pair:
        """The pair; ``ValueError`` when its image cannot be read, or is no longer the same."""
        entry = self.entries[index]
        record, answers = entry.record, entry.record.answers(self.task.answer_type)
        attributes = {"task": self.config.task, "id": record.id}
        if answers[1:]:
            attributes["variants"] = VARIANT_SEPARATOR.join(answers[1:])
        key, image = f"{self.config.task}/{record.id}", self._image(entry)
        if self.task.answer_type == "image":
            attributes["description"] = description(record)
            return Pair(key, record.text.strip(), image, attributes)
        caption = answers[0].strip()
        question = record.text.strip()
        choices = options(record, caption)
        return Pair(key, caption, image, attributes, question=question, choices=choices)

    def _entry(self, record: TaskRecord) -> TaskEntry:
        """The record, seen to be of the task, and its image, seen to be there."""
        with naming_record(self.config.questions, record.id):
            misfit = _misfit(record, self.task)
            if misfit:
                possible = ", ".join(possible_tasks(record)) or "no task"
                raise ValueError(f"not of {self.config.task}: {misfit}; it can be of {possible}")
        answer = record.answers(self.task.answer_type)[0]
        with naming_record(self.config.answers, record.id):
            if not answer.strip():
                raise ValueError("an answer must hold words, got an empty text")
        image = answer if self.task.answer_type == "image" else record.image
        if image is None:
            return TaskEntry(record)
        path = os.path.abspath(self.folder / image)
        with naming_record(self.file_with_images, record.id):
            try:
                status = os.stat(path)
                signature = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
                return TaskEntry(record, path, _file_sha256(path, signature))
            except OSError as error:
                raise ValueError(f"no image {path} ({error.strerror})") from error

    def _content(self, entry: TaskEntry) -> str:
        """The SHA-256 of what all questions that must share a split have in common."""
        if entry.sha256:
            return entry.sha256
        texts = entry.record.texts
        text = max(texts, key=len) if self.task.has_context else entry.record.text
        return hashlib.sha256(text.encode()).hexdigest()

    def _image(self, entry: TaskEntry) -> Image.Image | None:
        if not entry.path:
            return None
        with naming_record(self.file_with_images, entry.record.id):
            data = Path(entry.path).read_bytes()
            if hashlib.sha256(data).hexdigest() != entry.sha256:
                raise ValueError(f"{entry.path}: the image changed after the files were read")
            try:
                return center_crop(decode_image(data).image, self.image_size)
            except RejectedError as rejected:
                raise ValueError(f"{entry.path}: {rejected.reason}") from rejected


# Kept in memory, so that the three splits read each image once; the signature makes a changed
# file a new question.
@cache
def _file_sha256(path: str, signature: tuple[int, ...]) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def possible_tasks(record: TaskRecord) -> tuple[str, ...]:
    """The tasks that a record can be of; nothing in it tells these apart.

    >>> possible_tasks(TaskRecord("0", ("Что это?",), "0.jpg"))
    ('captioning', 'vqa', 'text_recognition')
    >>> possible_tasks(TaskRecord("0", ("Нарисуй кота.",), answer_images=("0.jpg",)))
    ('generation',)
    """
    return tuple(name for name, task in FUSION_BRAIN_TASKS.items() if not _misfit(record, task))


def description(record: TaskRecord) -> str:
    """What is to be drawn, without the instruction, as the challenge's ruCLIP score reads it.

    >>> description(TaskRecord("0", ("Сгенерируй изображение.", "Кот в шляпе.")))
    'Кот в шляпе.'

    Source: fbc2_aij2022, ``evaluation/generation/metrics/ruclip.py``.  Unlike it, a text of one
    sentence is its own description, not an empty one.
    """
    if len(record.texts) > 1:
        return record.texts[1].strip()
    return record.text.strip().partition(". ")[2] or record.text.strip()


def options(record: TaskRecord, answer: str) -> tuple[str, ...]:
    """The options of a question, in the form in which ``answer`` is one of them; or none.

    >>> record = TaskRecord("0", ("2x = 4, чему равен x?", "a) -4; b) 2"))
    >>> options(record, "b"), options(record, "2"), options(record, "b 2"), options(record, "c")
    (('a', 'b'), ('-4', '2'), ('a -4', 'b 2'), ())
    """
    found = OPTION.findall(record.texts[-1]) if record.texts else []
    markers = tuple(marker for marker, _ in found)
    if len(markers) < 2 or "".join(markers) != string.ascii_lowercase[: len(markers)]:
        return ()
    words = tuple(text.strip() for _, text in found)
    both = tuple(f"{marker} {text}" for marker, text in zip(markers, words, strict=True))
    for form in (markers, words, both):
        if answer in form and len(set(form)) == len(form):
            return form
    return ()


def _misfit(record: TaskRecord, task: FusionBrainTask) -> str:
    """Why a record cannot be of a task; nothing where it can."""
    if task.has_image and record.image is None:
        return "the question needs an image"
    if not task.has_image and record.image is not None:
        return "the question must be without image"
    if task.needs_text and not record.text.strip():
        return "the question needs a text"
    if (record.answer_texts or record.answer_images) and not record.answers(task.answer_type):
        return f"the answer must be of type {task.answer_type!r}"
    return ""
