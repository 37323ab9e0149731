"""Generation in the demo: from the values of a form to images, files and the command.

Shapes: H and W pixels.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from rudolph.demo.limits import (
    MAX_SEED,
    DemoLimits,
    Watch,
    optional_integer,
    optional_number,
    require_choice,
    require_integer,
    require_words,
)
from rudolph.demo.shelf import ModelShelf
from rudolph.files.atomic import json_text
from rudolph.generation.pipeline import RANKS, Candidate
from rudolph.generation.png import save_png, to_image
from rudolph.runs.sampling import (
    GenerateArguments,
    check_image_prompt,
    prepare_generation,
    request_of,
)

# Ways to use an image prompt, and their labels in the form.
REGION_LABELS = {
    "none": "no image prompt",
    "mask": "regenerate the painted region",
    "borders": "keep the borders",
    "vary": "vary the whole image",
}
# Names of the files that the command reads.
PROMPT_FILE, MASK_FILE = Path("image_prompt.png"), Path("mask.png")
COMMAND_FILE = "command.txt"


@dataclass(frozen=True)
class GenerationResult:
    """Generated images, best first.

    Attributes:
        captions: Label of each image.
        command: Shell command that reproduces the images.
        settings: Prompt, model and every parameter.
        notes: Warnings about the text, one line each.
        files: File contents keyed by path: the images as the command writes them, the image
            prompt, the mask, the settings and the command.
        candidates: The images with their indices and scores.
    """

    captions: list[str]
    command: str
    settings: dict[str, Any]
    notes: list[str]
    files: dict[str, bytes]
    candidates: list[Candidate]


def generate_arguments(
    form: Mapping[str, Any], shelf: ModelShelf, limits: DemoLimits
) -> GenerateArguments:
    """Check the values of the form and return the arguments of ``rudolph generate``.

    Args:
        form: Unchecked values keyed by field: ``model``, ``text``, ``number``, ``seed``, the
            sampling flags, ``rank``, ``keep``, ``region``, ``borders`` and ``vary``.
        shelf: Models of the demo.
        limits: Limits of the demo.

    Raises:
        ValueError: If a value is missing or out of range.
    """
    region = require_choice(form.get("region", "none"), "image prompt", tuple(REGION_LABELS))
    rank = require_choice(form.get("rank", "none"), "rank", RANKS)
    vary = optional_number(form.get("vary"), "fraction to vary") if region == "vary" else None
    if region == "vary" and vary is None:
        raise ValueError("fraction to vary: expected a number, got none")
    arguments = GenerateArguments(
        **shared_values(form, shelf, limits),
        text=require_words(form.get("text"), "prompt", limits),
        guidance=optional_number(form.get("guidance"), "guidance"),
        keep=optional_integer(form.get("keep"), "keep"),
        rank=rank,
        clip=shelf.settings.clip if rank == "clip" else None,
        image_prompt=None if region == "none" else PROMPT_FILE,
        mask=MASK_FILE if region == "mask" else None,
        borders=str(form.get("borders") or "") if region == "borders" else None,
        vary=vary,
    )
    request_of(arguments)
    check_image_prompt(arguments)
    return arguments


def shared_values(
    form: Mapping[str, Any], shelf: ModelShelf, limits: DemoLimits
) -> dict[str, Any]:
    """Return the arguments that ``generate`` and ``caption`` share; an empty filter is None.

    Raises:
        ValueError: If a value is missing, no number or out of range.
    """
    from rudolph.generation.filters import TokenSamplingConfig

    values: dict[str, Any] = {
        "model": require_choice(form.get("model"), "model", shelf.names),
        "number": require_integer(form.get("number"), "number", 1, limits.max_number),
        "seed": require_integer(form.get("seed"), "seed", 0, MAX_SEED),
        "dtype": shelf.settings.dtype,
        "int8": shelf.settings.int8,
    }
    sampling: dict[str, Any] = {
        "temperature": optional_number(form.get("temperature"), "temperature"),
        "top_k": optional_integer(form.get("top_k"), "top-k"),
        "top_p": optional_number(form.get("top_p"), "top-p"),
        "min_p": optional_number(form.get("min_p"), "min-p"),
    }
    TokenSamplingConfig(**{name: value for name, value in sampling.items() if value is not None})
    return values | sampling


def generate(
    arguments: GenerateArguments,
    images: Mapping[str, Image.Image],
    *,
    shelf: ModelShelf,
    watch: Watch,
) -> GenerationResult:
    """Generate images exactly as the command with the same arguments does.

    Args:
        arguments: Checked arguments.
        images: ``image_prompt`` and ``mask`` as RGB images, each only if the arguments name it.
        shelf: Models of the demo.
        watch: Receives the progress and ends the request.

    Raises:
        ValueError: If an argument does not suit the model.
        StoppedError: If the request was cancelled or took too long.
    """
    watch("load", 0, 1)
    source = shelf.open(arguments)
    if arguments.rank == "clip":
        source = shelf.open_ranker(source)
    generation = prepare_generation(arguments, images, source)
    candidates = source.pipeline.generate(
        generation.text, generation.request, config=generation.config, on_stage=watch
    )
    command = arguments.command()
    files = {f"generated/{name}": content for name, content in _pngs(candidates, generation)}
    paths = {"image_prompt": PROMPT_FILE, "mask": MASK_FILE}
    files |= {str(paths[name]): png_bytes(image, {}) for name, image in images.items()}
    files |= text_files(command, generation.record)
    labels = [_label(candidate) for candidate in candidates]
    return GenerationResult(
        labels, command, generation.record, generation.notes, files, candidates
    )


def text_files(command: str, settings: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the files with the command and the settings of a result."""
    settings_text = json_text(settings, indent=1) + "\n"
    return {"settings.json": settings_text.encode(), COMMAND_FILE: f"{command}\n".encode()}


def png_bytes(image: Image.Image, metadata: Mapping[str, Any]) -> bytes:
    """Return an image as a PNG file with text fields."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "image.png")
        save_png(image, path, metadata)
        return path.read_bytes()


def _pngs(candidates: list[Candidate], generation: Any) -> list[tuple[str, bytes]]:
    """Return name and content of each PNG, with the metadata that the command writes."""
    return [
        (
            f"{index:03}.png",
            png_bytes(
                to_image(candidate.image),
                generation.record | {"seed": candidate.seed, "scores": candidate.scores},
            ),
        )
        for index, candidate in enumerate(candidates)
    ]


def _label(candidate: Candidate) -> str:
    scores = {name: value for name, value in candidate.scores.items() if name in ("self", "clip")}
    return ", ".join(f"{name} {value:.3g}" for name, value in scores.items())


def without_image_prompt(arguments: GenerateArguments, *, number: int) -> GenerateArguments:
    """Return the arguments for ``number`` images from only the text, without a ranking."""
    return replace(
        arguments,
        number=number,
        keep=None,
        rank="none",
        clip=None,
        image_prompt=None,
        mask=None,
        borders=None,
        vary=None,
    )
