"""Samples from a model as ``rudolph generate`` and ``rudolph caption`` produce them.

The arguments of each command are a frozen dataclass, whose fields have the names of its flags.
The demo uses the same dataclasses, so it can show the command that reproduces a sample.

Torch is imported inside the functions that need it, because commands check their arguments first.

Shapes: H and W pixels, I image tokens.
"""

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from rudolph.sequence.texts import clean_text

DEFAULT_CLIP = "ruclip-vit-base-patch32-384"
DTYPES = ("float32", "bfloat16", "float16")
# Flags that override a field of ``TokenSamplingConfig``.
SAMPLING_FLAGS = ("temperature", "top_k", "top_p", "min_p", "guidance", "guidance_kind")
# Flags that decide which part of an image prompt is kept.
REGION_FLAGS = ("borders", "mask", "vary")
# Arguments that stand first in a command, without a flag.
POSITIONAL = ("text", "image")


@dataclass(frozen=True)
class SamplingArguments:
    """Arguments that both commands share; None stands for the default of the model."""

    model: str = "shipped"
    number: int = 8
    seed: int = 0
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    dtype: str | None = None
    int8: bool = False
    compile: bool = False

    name: ClassVar[str]

    def record(self) -> dict[str, Any]:
        """Return the arguments besides the text and the model, for the record of a sample."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: str(value) if isinstance(value, Path) else value
            for name, value in values.items()
            if value is not None and name not in ("text", "model")
        }

    def command(self) -> str:
        """Return the shell command with these arguments; flags with default values are left out.

        >>> GenerateArguments(number=2, text="синий кот", top_p=0.9).command()
        "rudolph generate 'синий кот' --number 2 --top-p 0.9"
        """
        flags: list[str] = []
        text = ""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in POSITIONAL:
                text = str(value)
            elif value != field.default:
                flags += _flag(f"--{field.name.replace('_', '-')}", value)
        head = ["rudolph", self.name]
        # argparse would read a text that starts with a hyphen as a flag.
        words = [*head, *flags, "--", text] if text.startswith("-") else [*head, text, *flags]
        return shlex.join(words)


def _flag(name: str, value: Any) -> list[str]:
    if isinstance(value, tuple):
        return [name, *map(str, value)]
    if value is True:
        return [name]
    return [f"{name}={value}"] if str(value).startswith("-") else [name, str(value)]


@dataclass(frozen=True)
class GenerateArguments(SamplingArguments):
    """Arguments of ``rudolph generate``, except its output."""

    text: str = ""
    guidance: float | None = None
    guidance_kind: str | None = None
    keep: int | None = None
    rank: str = "none"
    perplexity: str = "exp_mean_ce"
    clip: str | None = None
    upscale: int | None = None
    upscaler: str | None = None
    image_prompt: Path | None = None
    borders: str | None = None
    mask: Path | None = None
    vary: float | None = None
    window: int = 1
    transparent: bool = False

    name: ClassVar[str] = "generate"


@dataclass(frozen=True)
class CaptionArguments(SamplingArguments):
    """Arguments of ``rudolph caption``, except its output."""

    image: Path = Path()
    question: str | None = None
    classes: tuple[str, ...] | None = None

    name: ClassVar[str] = "caption"


class Generation(NamedTuple):
    """A request to ``Pipeline.generate`` with its record.

    Attributes:
        text: Cleaned text.
        request: Number of images, ranking and given tokens.
        config: Sampling settings.
        record: Prompt, model and parameters, which each PNG stores.
        notes: One line per part of the text that the model cannot encode.
    """

    text: str
    request: Any
    config: Any
    record: dict[str, Any]
    notes: list[str]


def sampling_of(config: Any, arguments: Any) -> Any:
    """Return a ``TokenSamplingConfig``, overridden by the arguments that are not None."""
    settings = {name: getattr(arguments, name, None) for name in SAMPLING_FLAGS}
    return replace(
        config, **{name: value for name, value in settings.items() if value is not None}
    )


def request_of(arguments: GenerateArguments) -> Any:
    """Return the ``GenerationRequest`` for the arguments, without the tokens of an image prompt.

    Raises:
        ValueError: If an argument is out of range.
    """
    from rudolph.generation.pipeline import GenerationRequest

    return GenerationRequest(
        arguments.number,
        arguments.keep,
        arguments.rank,
        arguments.perplexity,
        arguments.seed,
        window=arguments.window,
    )


def prepare_generation(
    arguments: GenerateArguments, images: Mapping[str, Any], source: Any
) -> Generation:
    """Combine arguments, image prompt and model into a generation.

    Args:
        arguments: Arguments of the command.
        images: ``image_prompt`` and ``mask`` as RGB images, each only if it is given.
        source: The ``LoadedModel`` that generates.

    Raises:
        ValueError: If an argument is invalid.
    """
    request = request_of(arguments)
    config = sampling_of(source.sampling.image, arguments)
    if arguments.guidance_kind and config.guidance is None:
        raise ValueError("--guidance-kind: expected --guidance with it, got none")
    if images:
        request = replace(request, known=given_tokens(arguments, images, source))
    text = clean_text(arguments.text)
    num_cut = source.pipeline.texts("text_to_image", text).num_cut
    record = {
        "prompt": text,
        "model": source.name,
        "parameters": arguments.record() | vars(config),
    }
    notes = unreadable_notes(source.pipeline.tokenizer, "text", text, num_cut)
    return Generation(text, request, config, record, notes)


def unreadable_notes(tokenizer: Any, name: str, text: str, num_cut: int) -> list[str]:
    """Return notes on the parts of a text that the model cannot encode, one line each.

    Args:
        tokenizer: The model's ``Tokenizer``.
        name: Name of the text in the messages.
        text: The text.
        num_cut: Number of BPE ids that are cut from the text.
    """
    note = tokenizer.unknown_note(text, name)
    notes = [note] if note else []
    if num_cut:
        notes.append(f"the {name} is too long: its last {num_cut} BPE ids are cut")
    return notes


def check_image_prompt(arguments: GenerateArguments) -> None:
    """Check that an image prompt comes with exactly one valid region.

    Raises:
        ValueError: If ``--image-prompt`` comes without exactly one of ``--borders``, ``--mask``
            and ``--vary``, or if one of these three comes without an image prompt.
    """
    from rudolph.generation import image_prompts

    given = [name for name in REGION_FLAGS if getattr(arguments, name) is not None]
    if arguments.image_prompt is None:
        if given:
            raise ValueError(f"--{given[0]}: expected --image-prompt IMAGE with it, got none")
        return
    if len(given) != 1:
        raise ValueError(
            "--image-prompt: expected one of --borders, --mask and --vary with it, "
            f"got {len(given)}"
        )
    if arguments.borders is not None:
        image_prompts.parse_borders(arguments.borders)
    if arguments.vary is not None:
        image_prompts.require_fraction(arguments.vary)


def given_tokens(arguments: GenerateArguments, images: Mapping[str, Any], source: Any) -> Any:
    """Return the prompt's image indices ``(I,)``, with ``TO_SAMPLE`` at the tokens to generate."""
    import torch

    from rudolph.data.seeds import mixed_seed
    from rudolph.generation import image_prompts

    pipeline = source.pipeline
    side = pipeline.decoder.layout.image_tokens_per_dim
    if arguments.borders is not None:
        known = image_prompts.border_mask(image_prompts.parse_borders(arguments.borders), side)
    elif arguments.mask is not None:
        white = pixels_of(images["mask"], source.image_size).mean(0) > 0.5
        known = image_prompts.token_mask(~white, side)
    else:
        assert arguments.vary is not None
        generator = torch.Generator().manual_seed(mixed_seed(arguments.seed, "vary"))
        known = image_prompts.variation_mask(arguments.vary, side, generator)
    image = pixels_of(images["image_prompt"], source.image_size)
    return image_prompts.known_indices(pipeline.vqgan, image.to(pipeline.device), known).cpu()


class Captions(NamedTuple):
    """Texts about an image, from a model.

    Attributes:
        values: Number of samples of each text, or probability of each class.
        record: Image, model, seed, sampling settings and the values, for JSON.
        notes: One line per part of the question that the model cannot encode.
    """

    values: dict[str, float]
    record: dict[str, Any]
    notes: list[str]


def check_caption(arguments: CaptionArguments) -> None:
    """Raise ``ValueError`` if the classes are invalid or come with a question."""
    if arguments.classes is None:
        return
    if arguments.question is not None:
        raise ValueError("--classes: expected no --question with it, got both")
    names = [clean_text(name).strip() for name in arguments.classes]
    if len(set(names)) < 2 or len(set(names)) < len(names) or "" in names:
        raise ValueError(
            f"--classes: expected at least 2 different names, got {', '.join(names) or 'none'}"
        )


def caption_image_of(
    arguments: CaptionArguments,
    image: Any,
    source: Any,
    *,
    on_token: Callable[[int, int], None] | None = None,
) -> Captions:
    """Sample captions or answers for an image, or score class names as its captions.

    The probability of a class is its likelihood as a caption, normalised over all classes.

    Args:
        arguments: Arguments of the command.
        image: RGB image of any size.
        source: The ``LoadedModel`` that answers.
        on_token: Called with the number of generated tokens and the total.
    """
    from rudolph.data.seeds import mixed_seed

    pixels = pixels_of(image, source.image_size)
    record = {"image": str(arguments.image), "model": source.name}
    if arguments.classes is not None:
        values = class_probabilities(source.pipeline, pixels, arguments.classes)
        return Captions(values, record | {"classes": values}, [])
    config, notes, questions = sampling_of(source.sampling.text, arguments), [], None
    record["seed"] = arguments.seed
    if arguments.question is not None:
        questions = [clean_text(arguments.question)]
        texts = source.pipeline.texts("question_answering", "", other_text=questions[0])
        notes = unreadable_notes(
            source.pipeline.tokenizer, "question", questions[0], texts.num_cut
        )
        record["question"] = questions[0]
    seeds = [mixed_seed(arguments.seed, index) for index in range(arguments.number)]
    captions = source.pipeline.caption(
        pixels[None], config=config, seeds=seeds, questions=questions, on_token=on_token
    )
    counts = {text: captions.count(text) for text in captions}
    return Captions(counts, record | {"sampling": vars(config), "captions": counts}, notes)


def class_probabilities(pipeline: Any, pixels: Any, classes: Sequence[str]) -> dict[str, float]:
    """Return the probability of each class as the caption of an image ``(3, H, W)`` in [0, 1]."""
    from rudolph.generation.answering import answer_prompts, score_choices

    names = [clean_text(name).strip() for name in classes]
    prompt = answer_prompts(pipeline, "image_captioning", indices=pipeline.encode(pixels[None]))
    scores = score_choices(pipeline, "image_captioning", prompt, [names])
    probabilities = scores.log_likelihoods[0].softmax(0).tolist()
    return dict(zip(names, probabilities, strict=True))


def pixels_of(image: Any, size: int) -> Any:
    """Return the centre crop of an RGB image as a tensor ``(3, size, size)`` in [0, 1]."""
    import numpy as np
    import torch

    from rudolph.data.image_files import center_crop

    pixels = np.asarray(center_crop(image, size)).copy()
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
