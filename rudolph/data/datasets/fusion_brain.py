"""Pairs of the six tasks of the Fusion Brain Challenge 2; ``fusion_brain_files`` reads the files.

To add a task, add it to ``FUSION_BRAIN_TASKS``.

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

from rudolph.data.datasets.fusion_brain_files import TaskRecord, error_context, read_tasks
from rudolph.data.datasets.manifests import split_of_image
from rudolph.data.image_files import RejectedError, center_crop, decode_image
from rudolph.data.pairs import Pair, require_split

# Part of every digest; increment it when the same files give other pairs.
PAIRS_VERSION = 1
# Joins the variants in an attribute.  A bar would not do, because answers can contain |x|.
VARIANT_SEPARATOR = "\n"
OPTION = re.compile(r"(?:^|(?<=[\s;:]))([a-z])\)\s*([^;]*)")


@dataclass(frozen=True)
class FusionBrainTask:
    """The required content of a task's questions, and the type of its answers, "text" or "image".

    If ``has_context`` is true, several questions can share one context.
    """

    has_image: bool
    needs_text: bool
    answer_type: str = "text"
    has_context: bool = False


# In the order of the challenge's task numbers, 0 to 5.
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
    """A task and the paths of its files.

    Attributes:
        task: Key of ``FUSION_BRAIN_TASKS``.
        questions: Path of the questions.
        answers: Path of the reference answers.
        images: Base folder of image paths; ``None`` is the folder of the file with the paths.
    """

    task: str = "vqa"
    questions: str = ""
    answers: str = ""
    images: str | None = None

    def __post_init__(self) -> None:
        """Raise ``ValueError`` if the task is unknown."""
        if self.task not in FUSION_BRAIN_TASKS:
            raise ValueError(
                f"task must be one of {', '.join(FUSION_BRAIN_TASKS)}, got {self.task!r}"
            )


class TaskEntry(NamedTuple):
    """A record and, if it has an image, the path and SHA-256 of the image file."""

    record: TaskRecord
    path: str = ""
    sha256: str = ""


class FusionBrain:
    """One split of a task: 90% train, 5% validation or 5% test.

    The split depends on a hash of the content.  All questions about one image share a split, and
    so do all questions about one context (the longest text of a TextQA question).  Equal
    mathematical problems share a split too.

    The key of a pair is task and id, and its caption is the first variant of the answer.
    ``attributes["variants"]`` has the other variants, joined with ``VARIANT_SEPARATOR``.  For
    image generation the caption is the text and the image is the answer;
    ``attributes["description"]`` is the text without the instruction.

    Args:
        config: The task and its files.
        split: "train", "validation" or "test".
        image_size: Side of the square images, in pixels.

    Raises:
        ValueError: If a file has the wrong format, a question does not fit the task, an image is
            missing, or no question falls into the split.  The one-line message names file and id.
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
        # Images belong to the answers in image generation, and to the questions otherwise.
        file_with_images = config.answers if self.task.answer_type == "image" else config.questions
        self.file_with_images = file_with_images
        self.folder = (
            Path(file_with_images).parent if config.images is None else Path(config.images)
        )
        entries = [self._entry(record) for record in read_tasks(config.questions, config.answers)]
        self.entries = [
            entry for entry in entries if split_of_image(self._content(entry)) == split
        ]
        if not self.entries:
            raise ValueError(
                f"{config.questions}: none of its {len(entries)} questions falls into the split "
                f"{split!r} (90% train, 5% validation, 5% test): give it more questions"
            )
        rows = [[asdict(entry.record), entry.sha256] for entry in self.entries]
        content = ["fusion brain", PAIRS_VERSION, config.task, image_size, rows]
        self.digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.entries)

    def __getitem__(self, index: int) -> Pair:
        """Return the pair at ``index``.

        Raises:
            ValueError: If its image cannot be decoded or has changed.
        """
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
        """Return the entry of a record, after checking its fit to the task and its image."""
        with error_context(self.config.questions, record.id):
            mismatch = _mismatch(record, self.task)
            if mismatch:
                possible = ", ".join(possible_tasks(record)) or "no task"
                raise ValueError(
                    f"expected a question of {self.config.task}, got one of {possible}: {mismatch}"
                )
        answer = record.answers(self.task.answer_type)[0]
        with error_context(self.config.answers, record.id):
            if not answer.strip():
                raise ValueError("an answer must have words, got an empty text")
        image = answer if self.task.answer_type == "image" else record.image
        if image is None:
            return TaskEntry(record)
        path = os.path.abspath(self.folder / image)
        with error_context(self.file_with_images, record.id):
            try:
                status = os.stat(path)
                signature = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
                return TaskEntry(record, path, _file_sha256(path, signature))
            except OSError as error:
                raise ValueError(f"no image {path} ({error.strerror})") from error

    def _content(self, entry: TaskEntry) -> str:
        """Return a SHA-256 that is equal for all questions that must share a split."""
        if entry.sha256:
            return entry.sha256
        texts = entry.record.texts
        text = max(texts, key=len) if self.task.has_context else entry.record.text
        return hashlib.sha256(text.encode()).hexdigest()

    def _image(self, entry: TaskEntry) -> Image.Image | None:
        if not entry.path:
            return None
        with error_context(self.file_with_images, entry.record.id):
            data = Path(entry.path).read_bytes()
            if hashlib.sha256(data).hexdigest() != entry.sha256:
                raise ValueError(f"{entry.path}: the image changed after the files were read")
            try:
                return center_crop(decode_image(data).image, self.image_size)
            except RejectedError as rejected:
                raise ValueError(f"{entry.path}: {rejected.reason}") from rejected


# Cached so that the three splits read each image once; the signature makes a changed file a
# different key.
@cache
def _file_sha256(path: str, signature: tuple[int, ...]) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def possible_tasks(record: TaskRecord) -> tuple[str, ...]:
    """Return the tasks to which a record can belong; its content cannot distinguish them.

    >>> possible_tasks(TaskRecord("0", ("Что это?",), "0.jpg"))
    ('captioning', 'vqa', 'text_recognition')
    >>> possible_tasks(TaskRecord("0", ("Нарисуй кота.",), answer_images=("0.jpg",)))
    ('generation',)
    """
    return tuple(name for name, task in FUSION_BRAIN_TASKS.items() if not _mismatch(record, task))


def description(record: TaskRecord) -> str:
    """Return the description of the image to generate, without the instruction.

    The ruCLIP score of the challenge uses it.

    >>> description(TaskRecord("0", ("Сгенерируй изображение.", "Кот в шляпе.")))
    'Кот в шляпе.'

    Source: fbc2_aij2022, ``evaluation/generation/metrics/ruclip.py``.  There, a text of one
    sentence has an empty description; here, the text is its own description.
    """
    if len(record.texts) > 1:
        return record.texts[1].strip()
    return record.text.strip().partition(". ")[2] or record.text.strip()


def options(record: TaskRecord, answer: str) -> tuple[str, ...]:
    """Return the options of a question in the form that includes ``answer``, or ``()``.

    The options have three forms: their markers, their texts, or both.

    >>> record = TaskRecord("0", ("2x = 4, чему равен x?", "a) -4; b) 2"))
    >>> options(record, "b"), options(record, "2"), options(record, "b 2"), options(record, "c")
    (('a', 'b'), ('-4', '2'), ('a -4', 'b 2'), ())
    """
    matches = OPTION.findall(record.texts[-1]) if record.texts else []
    markers = tuple(marker for marker, _ in matches)
    if len(markers) < 2 or "".join(markers) != string.ascii_lowercase[: len(markers)]:
        return ()
    words = tuple(text.strip() for _, text in matches)
    marked_words = tuple(f"{marker} {text}" for marker, text in zip(markers, words, strict=True))
    for form in (markers, words, marked_words):
        if answer in form and len(set(form)) == len(form):
            return form
    return ()


def _mismatch(record: TaskRecord, task: FusionBrainTask) -> str:
    """Return why a record cannot belong to a task, or "" if it can."""
    if task.has_image and record.image is None:
        return "the question needs an image"
    if not task.has_image and record.image is not None:
        return "the question must be without image"
    if task.needs_text and not record.text.strip():
        return "the question needs a text"
    if (record.answer_texts or record.answer_images) and not record.answers(task.answer_type):
        return f"the answer must be of type {task.answer_type!r}"
    return ""
