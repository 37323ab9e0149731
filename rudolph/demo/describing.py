"""Captions, answers and zero-shot classes in the demo."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from rudolph.demo.generating import png_bytes, shared_values, text_files
from rudolph.demo.limits import (
    DemoLimits,
    Watch,
    require_choice,
    require_words,
)
from rudolph.demo.shelf import ModelShelf
from rudolph.runs.sampling import CaptionArguments, caption_image_of, check_caption

# Requests about an image, and their labels in the form.
REQUEST_LABELS = {
    "caption": "Describe the image",
    "question": "Answer a question",
    "classes": "Choose between classes",
}
IMAGE_FILE = Path("image.png")


@dataclass(frozen=True)
class Description:
    """Texts about an image.

    Attributes:
        values: Fraction of the samples with each text, or probability of each class.
        command: Shell command that reproduces the values.
        notes: Warnings about the question, one line each.
        files: File contents keyed by path: the image, the values with their settings, the command.
    """

    values: dict[str, float]
    command: str
    notes: list[str]
    files: dict[str, bytes]


def caption_arguments(
    form: Mapping[str, Any], shelf: ModelShelf, limits: DemoLimits
) -> CaptionArguments:
    """Check the values of the form and return the arguments of ``rudolph caption``.

    Args:
        form: Unchecked values keyed by field: ``model``, ``request``, ``question``, ``classes``,
            ``number``, ``seed`` and the sampling flags.
        shelf: Models of the demo.
        limits: Limits of the demo.

    Raises:
        ValueError: If a value is missing or out of range.
    """
    request = require_choice(form.get("request"), "request", tuple(REQUEST_LABELS))
    question, classes = None, None
    if request == "question":
        question = require_words(form.get("question"), "question", limits)
    if request == "classes":
        classes = _classes_of(form.get("classes"), limits)
    arguments = CaptionArguments(
        **shared_values(form, shelf, limits),
        image=IMAGE_FILE,
        question=question,
        classes=classes,
    )
    check_caption(arguments)
    return arguments


def describe(
    arguments: CaptionArguments, image: Image.Image, *, shelf: ModelShelf, watch: Watch
) -> Description:
    """Describe an image exactly as the command with the same arguments does.

    Raises:
        ValueError: If the model cannot describe images.
        StoppedError: If the request was cancelled or took too long.
    """
    watch("load", 0, 1)
    source = shelf.open(arguments)
    captions = caption_image_of(arguments, image, source, on_token=partial(watch, "sample"))
    total = sum(captions.values.values())
    values = {text or "-": value / total for text, value in captions.values.items()}
    command = arguments.command()
    files = {str(IMAGE_FILE): png_bytes(image, {})} | text_files(command, captions.record)
    return Description(values, command, captions.notes, files)


def _classes_of(value: Any, limits: DemoLimits) -> tuple[str, ...]:
    """Return the names of classes, which commas or line ends separate."""
    names = str(value or "").replace("\n", ",").split(",")
    classes = tuple(name.strip() for name in names if name.strip())
    if len(classes) > limits.max_classes:
        raise ValueError(
            f"classes: expected at most {limits.max_classes} names, got {len(classes)}"
        )
    for name in classes:
        require_words(name, "class", limits)
        if name.startswith("-"):
            raise ValueError(f"class: expected a name without a leading hyphen, got {name!r}")
    return classes
