"""Commands that sample from a model: generate, caption."""

import os
from pathlib import Path
from typing import Any

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
from rudolph.sequence.texts import clean_text, require_text

DEFAULT_CLIP = "ruclip-vit-base-patch32-384"
DTYPES = ("float32", "bfloat16", "float16")
# All images are held in memory for the ranking and the grid.
MAX_IMAGES = 10_000
POSITIONAL = ("text", "image")
# Arguments that name inputs, and the values that are no paths.
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


def sampling_of(config: Any, args: Any) -> Any:
    """Return sampling settings, overridden by those of the command line."""
    from dataclasses import replace

    names = ("temperature", "top_k", "top_p", "min_p", "guidance", "guidance_kind")
    settings = {name: getattr(args, name, None) for name in names}
    return replace(
        config, **{name: value for name, value in settings.items() if value is not None}
    )


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

    from rudolph.runs.resolve import Precision, open_model
    from rudolph.tracking.tracker import tracking_uri

    dtype = getattr(torch, args.dtype) if args.dtype else None
    return open_model(
        args.model,
        runs=folders_here().runs,
        uri=tracking_uri(Path.cwd()),
        precision=Precision(dtype, args.int8),
    )


def generate_images(args: Any) -> int:
    """Run ``rudolph generate`` and return the exit code."""
    from dataclasses import replace

    check_arguments(args, suffix=".jsonl", has_folder=True)
    from rudolph.generation.pipeline import GenerationRequest, StageError

    if args.compile and args.window > 1:
        raise ValueError(f"--window must be 1 with --compile, got {args.window}")
    images = read_image_prompt(args)
    request = GenerationRequest(
        args.number, args.keep, args.rank, args.perplexity, args.seed, window=args.window
    )
    source = load_requested(args)
    pipeline = source.pipeline
    sampling = sampling_of(source.sampling.image, args)
    if args.guidance_kind and sampling.guidance is None:
        raise ValueError("--guidance-kind: expected --guidance with it, got none")
    add_stages(pipeline, args)
    pipeline.pack(args.number, sampling, window=args.window, is_compiled=args.compile)
    if images:
        request = replace(request, known=given_tokens(args, images, source))
    text = clean_text(args.text)
    warn_unreadable(pipeline, "text", text, pipeline.texts("text_to_image", text).num_cut)
    record = {
        "prompt": text,
        "model": source.name,
        "parameters": request_record(args) | vars(sampling),
    }
    try:
        with stage_progress() as progress:
            candidates = pipeline.generate(
                text,
                request,
                config=sampling,
                on_stage=lambda stage, done, total: progress(stage, done, total, ""),
            )
    except StageError as failure:
        raise ValueError(f"{failure}. {rescue_sampled(failure, record, args)}") from failure
    write_candidates(candidates, record, args)
    return 0


def warn_unreadable(pipeline: Any, name: str, text: str, num_cut: int) -> None:
    """Report the parts of a text that the model cannot encode, before sampling."""
    note = pipeline.tokenizer.unknown_note(text, name)
    if note:
        print_line(note)
    if num_cut:
        print_line(f"the {name} is too long: its last {num_cut} BPE ids are cut")


def rescue_sampled(failure: Any, record: dict[str, Any], args: Any) -> str:
    """Write what was sampled before a stage failed and return a message with its location.

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


def request_record(args: Any) -> dict[str, Any]:
    """Return the given arguments besides the text and the model, for the record of an image."""
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(args).items()
        if value is not None and name not in ("text", "model", "output", "command")
    }


def read_image_prompt(args: Any) -> dict[str, Any]:
    """Read the image prompt and its mask, keyed by argument name.

    Raises:
        ValueError: If ``--image-prompt`` comes without exactly one of ``--borders``, ``--mask``
            and ``--vary``, or one of these without an image prompt.
    """
    from rudolph.generation import image_prompts

    region_flags = [
        name for name in ("borders", "mask", "vary") if getattr(args, name) is not None
    ]
    if args.image_prompt is None and region_flags:
        raise ValueError(f"--{region_flags[0]}: expected --image-prompt IMAGE with it, got none")
    if args.image_prompt is None:
        return {}
    if len(region_flags) != 1:
        raise ValueError(
            "--image-prompt: expected one of --borders, --mask and --vary with it, "
            f"got {len(region_flags)}"
        )
    if args.borders is not None:
        image_prompts.parse_borders(args.borders)
    if args.vary is not None:
        image_prompts.require_fraction(args.vary)
    paths = {"image_prompt": args.image_prompt, "mask": args.mask}
    return {name: read_image(path) for name, path in paths.items() if path is not None}


def given_tokens(args: Any, images: dict[str, Any], source: Any) -> Any:
    """Return the image indices of the prompt, marked where they are kept."""
    import torch

    from rudolph.data.seeds import mixed_seed
    from rudolph.generation import image_prompts

    pipeline = source.pipeline
    side = pipeline.decoder.layout.image_tokens_per_dim
    if args.borders is not None:
        known = image_prompts.border_mask(image_prompts.parse_borders(args.borders), side)
    elif args.mask is not None:
        white = pixels_of(images["mask"], source.image_size).mean(0) > 0.5
        known = image_prompts.token_mask(~white, side)
    else:
        generator = torch.Generator().manual_seed(mixed_seed(args.seed, "vary"))
        known = image_prompts.variation_mask(args.vary, side, generator)
    image = pixels_of(images["image_prompt"], source.image_size)
    return image_prompts.known_indices(pipeline.vqgan, image.to(pipeline.device), known).cpu()


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


def pixels_of(image: Any, size: int) -> Any:
    """Return the centre crop of an image as a tensor ``(3, size, size)`` in [0, 1]."""
    import numpy as np
    import torch

    from rudolph.data.image_files import center_crop

    pixels = np.asarray(center_crop(image, size)).copy()
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def write_candidates(candidates: list[Any], record: dict[str, Any], args: Any) -> None:
    """Write images, JSON lines and grid; on a file-system error, use a temporary folder."""

    def write(path: Path) -> None:
        write_images(path, candidates, record, alpha=args.transparent)

    write_or_rescue(args.output, write)


def caption_image(args: Any) -> int:
    """Run ``rudolph caption`` and return the exit code."""
    from rudolph.data.seeds import mixed_seed

    check_arguments(args, suffix=".json")
    image = read_image(args.image)
    source = load_requested(args)
    pixels = pixels_of(image, source.image_size)
    sampling = sampling_of(source.sampling.text, args)
    seeds = [mixed_seed(args.seed, index) for index in range(args.number)]
    questions = None if args.question is None else [clean_text(args.question)]
    if questions is not None:
        texts = source.pipeline.texts("question_answering", "", other_text=questions[0])
        warn_unreadable(source.pipeline, "question", questions[0], texts.num_cut)
    source.pipeline.pack(args.number, sampling, is_compiled=args.compile)
    captions = source.pipeline.caption(
        pixels[None], config=sampling, seeds=seeds, questions=questions
    )
    counts = {text: captions.count(text) for text in captions}
    for text, count in sorted(counts.items(), key=lambda item: -item[1]):
        print(f"{count:4}  {text}")
    record = {"image": str(args.image), "model": source.name, "seed": args.seed}
    record |= {} if questions is None else {"question": questions[0]}
    content = record | {"sampling": vars(sampling), "captions": counts}
    write_or_rescue(args.output, lambda path: write_captions(path, pixels, content))
    return 0


def write_captions(path: Path, image: Any, content: dict[str, Any]) -> None:
    """Write the captions as JSON and a grid of the image labelled with each caption."""
    import numpy as np

    from rudolph.generation.png import to_image
    from rudolph.reports.image_grids import sample_grid

    json_path, counts = path.with_suffix(".json"), content["captions"]
    write_json(json_path, content)
    sample_grid([np.asarray(to_image(image))] * len(counts), list(counts), path, columns=4)
    print_line(f"{path} and {json_path}")
