"""Files of the Fusion Brain Challenge 2: questions, answers and predictions.

A file maps ids to lists of parts, ``{"0": [{"type": "text", "content": "..."}, ...]}``.  A part is
a text, or an image whose content is a path.  Texts are cleaned (``texts.clean_text``), paths are
not.

The texts of a question belong together: an instruction, a context, the question itself and
options, each if present.  Only the first image of a question counts.  Only the first text and the
first image of an answer count.  In a file of reference answers a content can be a list of
*variants*, all of them correct.  No file says which task an id belongs to.

Source: fbc2_aij2022, README ("Data structure", "General rules for metric calculation") and
``src/train/utils.py``.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rudolph.data.datasets.table_text import read_table_text
from rudolph.files.atomic import json_text
from rudolph.sequence.texts import clean_text

PART_PATTERN = '{"type": "text" or "image", "content": ...}'
TYPES = ("text", "image")
NO_IMAGES: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class TaskRecord:
    """A question and, if known, the variants of its answer.

    ``image`` and ``answer_images`` are paths as written in the files.
    """

    id: str
    texts: tuple[str, ...] = ()
    image: str | None = None
    answer_texts: tuple[str, ...] = ()
    answer_images: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """Return all texts of the question joined with spaces, or ""."""
        return " ".join(self.texts)

    def answers(self, answer_type: str) -> tuple[str, ...]:
        """Return the answer's variants of type "text" or "image", or ``()`` if there are none."""
        return self.answer_images if answer_type == "image" else self.answer_texts


def read_tasks(questions: str | Path, answers: str | Path | None = None) -> list[TaskRecord]:
    """Return the questions in file order, with their answers if ``answers`` is given.

    Args:
        questions: Path of the questions.
        answers: Path of reference answers or predictions.

    Raises:
        ValueError: With a one-line message that names file and id, if a file has the wrong format
            or the two files have different ids.
    """
    questions_by_id = read_parts(questions)
    records = []
    for record_id, parts in questions_by_id.items():
        with error_context(questions, record_id):
            records.append(parse_question(record_id, parts))
    if answers is None:
        return records
    answers_by_id = read_parts(answers)
    for record_id in answers_by_id:
        if record_id not in questions_by_id:
            raise ValueError(
                f"{answers}: id {record_id!r}: expected an id of {questions}, got an unknown one"
            )
    answered = []
    for record in records:
        with error_context(answers, record.id):
            if record.id not in answers_by_id:
                raise ValueError(f"expected an answer for every id of {questions}, got none")
            answered.append(parse_answer(record, answers_by_id[record.id]))
    return answered


def write_tasks(
    records: Sequence[TaskRecord], questions: str | Path, answers: str | Path | None = None
) -> None:
    """Write records to files from which ``read_tasks`` returns the same records.

    Raises:
        ValueError: If two records have the same id, or ``answers`` is given and a record has none.
    """
    for record_id, count in Counter(record.id for record in records).items():
        if count > 1:
            raise ValueError(
                f"{questions}: id {record_id!r}: expected each id once, got it {count} times"
            )
    questions_by_id, answers_by_id = {}, {}
    for record in records:
        images = () if record.image is None else (record.image,)
        questions_by_id[record.id] = [
            *(_part("text", (text,)) for text in record.texts),
            *(_part("image", (image,)) for image in images),
        ]
        answers_by_id[record.id] = [
            _part(answer_type, record.answers(answer_type))
            for answer_type in TYPES
            if record.answers(answer_type)
        ]
        if answers is not None and not answers_by_id[record.id]:
            raise ValueError(f"{answers}: id {record.id!r}: an answer must be a text or an image")
    _write(questions, questions_by_id)
    if answers is not None:
        _write(answers, answers_by_id)


def write_predictions(
    path: str | Path, texts: Mapping[str, str], images: Mapping[str, str] = NO_IMAGES
) -> None:
    """Write predictions by id in the format that the challenge scores.

    Args:
        path: Output file.
        texts: Answer texts by id.
        images: Image paths by id, relative to the folder of ``path``; the text comes first if an
            id has both.
    """
    predictions = {
        name: [
            _part(answer_type, (answers[name],))
            for answer_type, answers in zip(TYPES, (texts, images), strict=True)
            if name in answers
        ]
        for name in dict.fromkeys([*texts, *images])
    }
    _write(path, predictions)


def read_parts(path: str | Path) -> dict[str, Any]:
    """Return the parts of each id without checking them.

    Raises:
        ValueError: If the file is missing, is not JSON, or does not map ids.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    text, _ = read_table_text(path)
    try:
        content = json.loads(text, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{path}: expected JSON in UTF-8 with every key once, got {reason}"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must map ids to lists, got {type(content).__name__}")
    return content


def parse_question(name: str, parts: Any) -> TaskRecord:
    """Return the record of a question; raise ``ValueError`` for invalid parts."""
    _require_text(name, "an id")
    contents = _contents(parts, allow_variants=False)
    texts = tuple(text for (text,) in contents["text"])
    image = contents["image"][0][0] if contents["image"] else None
    return TaskRecord(name, texts, image)


def parse_answer(record: TaskRecord, parts: Any) -> TaskRecord:
    """Return the record with the first text and the first image of an answer.

    Raises:
        ValueError: If the parts are invalid or empty.
    """
    contents = _contents(parts, allow_variants=True)
    if not contents["text"] and not contents["image"]:
        raise ValueError(f"an answer: expected at least one {PART_PATTERN}, got none")
    first = {name: variants[0] if variants else () for name, variants in contents.items()}
    return replace(record, answer_texts=first["text"], answer_images=first["image"])


@contextmanager
def error_context(path: str | Path, name: str) -> Iterator[None]:
    """Prefix every ``ValueError`` raised inside with the file and the id."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: id {name!r}: {error}") from error


def _contents(parts: Any, *, allow_variants: bool) -> dict[str, list[tuple[str, ...]]]:
    """Return the contents of each type in file order; each is a tuple of its variants."""
    # The README shows reference answers of two tasks without a list around their only part.
    listed = [parts] if isinstance(parts, dict) else parts
    if not isinstance(listed, list):
        raise ValueError(f"must be a list of {PART_PATTERN}, got {type(parts).__name__}")
    contents: dict[str, list[tuple[str, ...]]] = {name: [] for name in TYPES}
    for part in listed:
        if not isinstance(part, dict):
            raise ValueError(f"a part must be {PART_PATTERN}, got {type(part).__name__}")
        part_type: Any = part.get("type")
        content: Any = part.get("content")
        if part_type not in TYPES:
            raise ValueError(f'type must be "text" or "image", got {part_type!r:.40}')
        variants = content if allow_variants and isinstance(content, list) else [content]
        if not variants:
            raise ValueError("content must be a text or a list of at least one, got []")
        for variant in variants:
            _require_text(variant, "content")
            if part_type == "image" and not variant.strip():
                raise ValueError("content of an image must be a path, got an empty text")
        # Paths stay unchanged, because another Unicode normal form names another file.
        cleaned = map(clean_text, variants) if part_type == "text" else variants
        contents[part_type].append(tuple(cleaned))
    return contents


def _part(part_type: str, variants: Sequence[str]) -> dict[str, Any]:
    return {"type": part_type, "content": variants[0] if len(variants) == 1 else list(variants)}


def _write(path: str | Path, content: Mapping[str, Any]) -> None:
    text = json_text(content, indent=0)
    Path(path).write_text(text + "\n", encoding="utf-8")


def _without_repeats(items: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(items)
    if len(content) < len(items):
        name, count = Counter(name for name, _ in items).most_common(1)[0]
        raise ValueError(f"key {name!r:.40} {count} times")
    return content


def _require_text(value: Any, field: str) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{field} must be text, got {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{field} must be text, got half of a surrogate pair") from error
