"""Commands that sample from a model: generate, caption."""

import os
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from rudolph.cli.outputs import (
    check_apart,
    check_output,
    unsaved_codes,
    write_codes,
    write_images,
    write_or_rescue,
)
from rudolph.cli.results import folders_here
from rudolph.files.atomic import write_json
from rudolph.runs.console import print_line, stage_progress
from rudolph.runs.sampling import (
    DEFAULT_CLIP,
    DTYPES,
    POSITIONAL,
    CaptionArguments,
    GenerateArguments,
    SamplingArguments,
    caption_image_of,
    check_caption,
    check_image_prompt,
    pixels_of,
    prepare_generation,
    request_of,
    sampling_of,
)
from rudolph.sequence.texts import require_text

Arguments = TypeVar("Arguments", bound=SamplingArguments)

# All images are held in memory for the ranking and the grid.
MAX_IMAGES = 10_000
# Arguments that name inputs, and their values that are not paths.
WEIGHTS, IMAGES = ("model", "clip", "upscaler"), ("image", "image_prompt", "mask")
NO_PATHS = (None, "", "shipped", "newest")


def add_generate(commands: Any) -> None:
    """Add the parser of ``rudolph generate``."""
    generate = commands.add_parser("generate", help="generate images from a text")
    generate.add_argument("text")
    add_sampling_arguments(generate)
    generate.add_argument("--guidance", type=float)
    generate.add_argument("--guidance-kind", choices=("extrapolation", "mixture"))
    generate.add_argument("--keep", type=int, help="keep this many images, the best by --rank")
    generate.add_argument("--rank", choices=("self", "clip", "none"), default="none")
    generate.add_argument(
        "--perplexity",
        choices=("exp_mean_ce", "mean_exp_ce"),
        default="exp_mean_ce",
        help="perplexity of --rank self; mean_exp_ce is that of the reference",
    )
    generate.add_argument(
        "--clip",
        help=f"a ruCLIP or a run that trained a CLIP (default with --rank clip: {DEFAULT_CLIP})",
    )
    generate.add_argument(
        "--upscale", type=int, choices=(2, 4, 8), help="enlarge with Real-ESRGAN"
    )
    generate.add_argument(
        "--upscaler", help="weights of the upscaler (default: RealESRGAN-x<scale>)"
    )
    image_prompt = generate.add_argument_group("image prompt (keep part of an image)")
    image_prompt.add_argument("--image-prompt", type=Path, metavar="IMAGE")
    image_prompt.add_argument("--borders", help="borders to keep, in tokens: up=4,left=2")
    image_prompt.add_argument("--mask", type=Path, help="an image that is white where to generate")
    image_prompt.add_argument(
        "--vary", type=float, help="fraction of tokens to regenerate, at random positions"
    )
    generate.add_argument(
        "--window",
        type=int,
        default=1,
        help="tokens guessed per step; fewer decoder calls for few images",
    )
    generate.add_argument(
        "--transparent", action="store_true", help="make the background of an emoji transparent"
    )
    generate.set_defaults(command=generate_images, output=Path("generated.png"))


def add_caption(commands: Any) -> None:
    """Add the parser of ``rudolph caption``."""
    caption = commands.add_parser("caption", help="generate captions or answers for an image")
    caption.add_argument("image", type=Path)
    caption.add_argument(
        "--question", help="generate answers to this question instead of captions"
    )
    caption.add_argument(
        "--classes",
        nargs="+",
        metavar="NAME",
        help="print the probability of each of these captions instead",
    )
    add_sampling_arguments(caption)
    caption.set_defaults(command=caption_image, output=Path("captioned.png"))


def add_sampling_arguments(parser: Any) -> None:
    """Add the arguments that ``generate`` and ``caption`` share."""
    parser.add_argument(
        "--model",
        metavar="SOURCE",
        default="shipped",
        help="a run's folder, an MLflow run, a released name, a folder of weights, or `newest` "
        "for the run that finished last (default: `shipped`, the emoji model of the package)",
    )
    parser.add_argument("-n", "--number", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--temperature", type=float)
    parser.add_argument(
        "--top-k", type=int, help="top-k, top-p and min-p default to those of SOURCE"
    )
    parser.add_argument("--top-p", type=float)
    parser.add_argument(
        "--min-p", type=float, help="fraction of the most likely token's probability"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="dtype of the weights (default: as stored)"
    )
    parser.add_argument("--int8", action="store_true", help="store the decoder's layers in int8")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the decoding step, which takes seconds; for -n 1, or with --int8",
    )
    parser.add_argument("--output", type=Path, help="path of the PNG; JSON is written next to it")


def check_arguments(args: Any, *, suffix: str, has_folder: bool = False) -> None:
    """Check the arguments before any weights are loaded.

    Args:
        args: Arguments of ``generate`` or ``caption``.
        suffix: Suffix of the text file next to the output.
        has_folder: Whether single images are written as well.

    Raises:
        ValueError: If an argument is invalid, or an output cannot be written or overlaps an input.
    """
    for name, value in vars(args).items():
        if isinstance(value, str | Path):
            flag = name if name in POSITIONAL else f"--{name.replace('_', '-')}"
            require_text(str(value), flag)
            if name not in ("text", "question") and "\0" in str(value):
                raise ValueError(f"{flag}: expected text without NUL, got {str(value)[:40]!r}")
    if args.number < 1:
        raise ValueError(f"-n must be at least 1, got {args.number}")
    if args.number > MAX_IMAGES:
        raise ValueError(f"-n must be at most {MAX_IMAGES}, got {args.number}")
    check_output(args.output, suffix=suffix, has_folder=has_folder)
    check_apart(args.output, sources_of(args), suffix=suffix, has_folder=has_folder)
    # Last, because importing torch takes seconds.
    from rudolph.generation.filters import TokenSamplingConfig

    sampling_of(TokenSamplingConfig(), args)


def sources_of(args: Any) -> list[Path]:
    """Return the existing files and folders among a command's inputs."""
    values = {name: getattr(args, name, None) for name in (*WEIGHTS, *IMAGES)}
    paths = {name: Path(value) for name, value in values.items() if value not in NO_PATHS}
    return [
        path
        for name, path in paths.items()
        if os.path.isfile(path) or (name in WEIGHTS and os.path.isdir(path))
    ]


def load_requested(args: Any) -> Any:
    """Load the model of ``--model``."""
    import torch

    from rudolph.runs.resolve import NEWEST, Precision, newest_run, open_model
    from rudolph.tracking.tracker import tracking_uri

    dtype = getattr(torch, args.dtype) if args.dtype else None
    runs, source = folders_here().runs, args.model
    if source == NEWEST:
        # Without its name, a failed training would leave an older model unnoticed.
        source = str(newest_run(runs))
        print_line(f"model: {source}")
    return open_model(
        source, runs=runs, uri=tracking_uri(Path.cwd()), precision=Precision(dtype, args.int8)
    )


def arguments_of(kind: type[Arguments], args: Any) -> Arguments:
    """Return the arguments of a command without those that only its output needs."""
    values: dict[str, Any] = {}
    for field in fields(kind):
        value = getattr(args, field.name)
        values[field.name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


def generate_images(args: Any) -> int:
    """Run ``rudolph generate`` and return the exit code."""
    check_arguments(args, suffix=".jsonl", has_folder=True)
    from rudolph.generation.pipeline import StageError

    if args.compile and args.window > 1:
        raise ValueError(f"--window must be 1 with --compile, got {args.window}")
    arguments = arguments_of(GenerateArguments, args)
    request_of(arguments)
    images = read_image_prompt(arguments)
    source = load_requested(args)
    pipeline = source.pipeline
    add_stages(pipeline, args)
    text, request, config, record, notes = prepare_generation(arguments, images, source)
    pipeline.pack(args.number, config, window=args.window, is_compiled=args.compile)
    print_lines(notes)
    try:
        with stage_progress() as progress:
            candidates = pipeline.generate(
                text,
                request,
                config=config,
                on_stage=lambda stage, done, total: progress(stage, done, total, ""),
            )
    except StageError as failure:
        raise ValueError(f"{failure}. {rescue_sampled(failure, record, args)}") from failure
    write_candidates(candidates, record, args)
    return 0


def print_lines(lines: list[str]) -> None:
    """Print lines on standard error."""
    for line in lines:
        print_line(line)


def rescue_sampled(failure: Any, record: dict[str, Any], args: Any) -> str:
    """Write the samples from before a stage failed; return a message with their location.

    The files hold the images before the failed stage, or their codes if decoding failed.
    """
    path = args.output
    try:
        if failure.candidates:
            write_candidates(failure.candidates, record, args)
            return f"All {len(failure.candidates)} images are saved as sampled in {path}"
        path = path.with_suffix(".jsonl")
        records = list(unsaved_codes(failure, record))
        write_or_rescue(path, lambda file: write_codes(file, records))
        return f"The image codes of all {len(records)} samples are saved in {path}"
    except ValueError as error:
        return str(error)


def add_stages(pipeline: Any, args: Any) -> None:
    """Load the requested CLIP and upscaler onto the device of the pipeline."""
    from rudolph.runs.resolve import open_clip, open_upscaler

    if args.clip or args.rank == "clip":
        pipeline.clip = open_clip(args.clip or DEFAULT_CLIP, runs=folders_here().runs)
    if args.upscale or args.upscaler:
        pipeline.upscaler = open_upscaler(args.upscaler or f"RealESRGAN-x{args.upscale}")
        scale = pipeline.upscaler.config.scale
        if args.upscale not in (None, scale):
            raise ValueError(
                f"--upscale: expected {scale} with this --upscaler, got {args.upscale}"
            )
    pipeline.to(pipeline.device)


def read_image_prompt(arguments: GenerateArguments) -> dict[str, Any]:
    """Read the image prompt and its mask, keyed by argument name.

    Raises:
        ValueError: If the image prompt and its region do not match, or a file is no image.
    """
    check_image_prompt(arguments)
    paths = {"image_prompt": arguments.image_prompt, "mask": arguments.mask}
    return {name: read_image(path) for name, path in paths.items() if path is not None}


def read_image(path: Path) -> Any:
    """Read an image file as RGB, with its EXIF orientation applied.

    Raises:
        ValueError: If the file is no readable image.
    """
    from rudolph.data.image_files import RejectedError, decode_image

    if path.is_char_device() or path.is_block_device():
        raise ValueError(f"{path}: expected an image file, got a device")
    try:
        return decode_image(path.read_bytes()).image
    except RejectedError as error:
        raise ValueError(f"{path}: {error}") from error


def write_candidates(candidates: list[Any], record: dict[str, Any], args: Any) -> None:
    """Write images, JSON lines and grid; on a file-system error, use a temporary folder."""

    def write(path: Path) -> None:
        write_images(path, candidates, record, alpha=args.transparent)

    write_or_rescue(args.output, write)


def caption_image(args: Any) -> int:
    """Run ``rudolph caption`` and return the exit code."""
    check_arguments(args, suffix=".json")
    arguments = arguments_of(CaptionArguments, args)
    check_caption(arguments)
    image = read_image(args.image)
    source = load_requested(args)
    source.pipeline.pack(args.number, source.sampling.text, is_compiled=args.compile)
    values, record, notes = caption_image_of(arguments, image, source)
    print_lines(notes)
    width = ".3f" if args.classes else "4"
    for text, value in sorted(values.items(), key=lambda item: -item[1]):
        print(f"{value:{width}}  {text}")
    pixels = pixels_of(image, source.image_size)
    write_or_rescue(args.output, lambda path: write_captions(path, pixels, list(values), record))
    return 0


def write_captions(path: Path, image: Any, texts: list[str], content: dict[str, Any]) -> None:
    """Write the captions as JSON and a grid of the image labelled with each caption."""
    import numpy as np

    from rudolph.generation.png import to_image
    from rudolph.reports.image_grids import sample_grid

    json_path = path.with_suffix(".json")
    write_json(json_path, content)
    sample_grid([np.asarray(to_image(image))] * len(texts), texts, path, columns=4)
    print_line(f"{path} and {json_path}")
