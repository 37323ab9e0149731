"""Verbs that use weights: generate, caption."""

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
# More would not fit into memory, where all of them are ranked and drawn.
MOST_IMAGES = 10_000
POSITIONAL = ("text", "image")
# Arguments that name what is read; two words name runs by themselves.
WEIGHTS, IMAGES = ("model", "clip", "upscaler"), ("image", "image_prompt", "mask")
NO_PATHS = (None, "", "shipped", "newest")


def add_generate(verbs: Any) -> None:
    generate = verbs.add_parser("generate", help="draw images for a text")
    generate.add_argument("text")
    add_sampling_arguments(generate)
    generate.add_argument("--guidance", type=float)
    generate.add_argument("--guidance-kind", choices=("extrapolation", "mixture"))
    generate.add_argument("--keep", type=int, help="so many of them, the best by --rank")
    generate.add_argument("--rank", choices=("self", "clip", "none"), default="none")
    generate.add_argument(
        "--perplexity",
        choices=("exp_mean_ce", "mean_exp_ce"),
        default="exp_mean_ce",
        help="of --rank self; mean_exp_ce is the reference's",
    )
    generate.add_argument(
        "--clip", help=f"a ruCLIP or a run that trained a CLIP; with --rank clip {DEFAULT_CLIP}"
    )
    generate.add_argument("--upscale", type=int, choices=(2, 4, 8), help="with Real-ESRGAN")
    generate.add_argument("--upscaler", help="weights of the upscaler; RealESRGAN-x<scale>")
    given = generate.add_argument_group("an image that is partly given")
    given.add_argument("--image-prompt", type=Path, metavar="IMAGE")
    given.add_argument("--borders", help="what stays, in tokens: up=4,left=2")
    given.add_argument("--mask", type=Path, help="an image that is white where to draw")
    given.add_argument("--vary", type=float, help="the share to draw anew, at random places")
    generate.add_argument(
        "--window",
        type=int,
        default=1,
        help="tokens guessed at once; fewer calls for few images",
    )
    generate.add_argument("--transparent", action="store_true", help="the ground of an emoji")
    generate.set_defaults(verb=generate_images, output=Path("generated.png"))


def add_caption(verbs: Any) -> None:
    caption = verbs.add_parser("caption", help="describe an image")
    caption.add_argument("image", type=Path)
    caption.add_argument("--question", help="answered instead of a description")
    add_sampling_arguments(caption)
    caption.set_defaults(verb=caption_image, output=Path("captioned.png"))


def add_sampling_arguments(verb: Any) -> None:
    verb.add_argument(
        "--model",
        metavar="SOURCE",
        default="shipped",
        help="a run's folder, an MLflow run, a released name, a folder of weights, `newest` for "
        "the run that finished last; by default `shipped`, the emoji model of the package",
    )
    verb.add_argument("-n", "--number", type=int, default=8)
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--temperature", type=float)
    verb.add_argument("--top-k", type=int, help="filters are the source's where not given")
    verb.add_argument("--top-p", type=float)
    verb.add_argument("--min-p", type=float, help="of the likeliest token's probability")
    verb.add_argument("--dtype", choices=DTYPES, help="of the weights; else as in the file")
    verb.add_argument("--int8", action="store_true", help="the decoder's layers in eight bits")
    verb.add_argument(
        "--compile",
        action="store_true",
        help="the decoder's step, for seconds that many tokens repay; for -n 1, or with --int8",
    )
    verb.add_argument("--output", type=Path, help="path of the PNG; JSON is written beside it")


def sampling_of(config: Any, given: Any) -> Any:
    """A source's sampling with what the command line gives over it."""
    from dataclasses import replace

    names = ("temperature", "top_k", "top_p", "min_p", "guidance", "guidance_kind")
    filters = {name: getattr(given, name, None) for name in names}
    return replace(config, **{name: value for name, value in filters.items() if value is not None})


def check_arguments(given: Any, *, suffix: str, has_folder: bool = False) -> None:
    """Raise ``ValueError`` for mistakes that can be told before any weights are read.

    Args:
        suffix: of the text file beside the output.
        has_folder: whether single images are written as well.
    """
    for name, value in vars(given).items():
        if isinstance(value, str | Path):
            flag = name if name in POSITIONAL else f"--{name.replace('_', '-')}"
            require_text(str(value), flag)
            if name not in ("text", "question") and "\0" in str(value):
                raise ValueError(f"{flag}: expected text without NUL, got {str(value)[:40]!r}")
    if given.number < 1:
        raise ValueError(f"-n must be at least 1, got {given.number}")
    if given.number > MOST_IMAGES:
        raise ValueError(f"-n must be at most {MOST_IMAGES}, got {given.number}")
    check_output(given.output, suffix=suffix, has_folder=has_folder)
    check_apart(given.output, sources_of(given), suffix=suffix, has_folder=has_folder)
    # This one takes the seconds that torch needs to be imported.
    from rudolph.generation.filters import TokenSamplingConfig

    sampling_of(TokenSamplingConfig(), given)


def sources_of(given: Any) -> list[Path]:
    """The files and folders that a verb reads, as far as they are given by their paths."""
    values = {name: getattr(given, name, None) for name in (*WEIGHTS, *IMAGES)}
    paths = {name: Path(value) for name, value in values.items() if value not in NO_PATHS}
    return [
        path
        for name, path in paths.items()
        if os.path.isfile(path) or (name in WEIGHTS and os.path.isdir(path))
    ]


def load_requested(given: Any) -> Any:
    """The source that a verb was given."""
    import torch

    from rudolph.runs.resolve import Precision, open_model
    from rudolph.tracking.tracker import tracking_uri

    dtype = getattr(torch, given.dtype) if given.dtype else None
    return open_model(
        given.model,
        runs=folders_here().runs,
        uri=tracking_uri(Path.cwd()),
        precision=Precision(dtype, given.int8),
    )


def generate_images(given: Any) -> int:
    from dataclasses import replace

    check_arguments(given, suffix=".jsonl", has_folder=True)
    from rudolph.generation.pipeline import GenerationRequest, StageError

    if given.compile and given.window > 1:
        raise ValueError(f"--window must be 1 with --compile, got {given.window}")
    images = read_image_prompt(given)
    request = GenerationRequest(
        given.number, given.keep, given.rank, given.perplexity, given.seed, window=given.window
    )
    source = load_requested(given)
    pipeline = source.pipeline
    sampling = sampling_of(source.sampling.image, given)
    if given.guidance_kind and sampling.guidance is None:
        raise ValueError("--guidance-kind needs the number of --guidance")
    add_stages(pipeline, given)
    pipeline.pack(given.number, sampling, window=given.window, is_compiled=given.compile)
    if images:
        request = replace(request, known=given_tokens(given, images, source))
    text = clean_text(given.text)
    warn_unreadable(pipeline, "text", text, pipeline.texts("text_to_image", text).num_cut)
    told = {
        "prompt": text,
        "model": source.name,
        "parameters": request_record(given) | vars(sampling),
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
        raise ValueError(f"{failure}. {rescue_sampled(failure, told, given)}") from failure
    write_candidates(candidates, told, given)
    return 0


def warn_unreadable(pipeline: Any, name: str, text: str, num_cut: int) -> None:
    """Say, before anything is sampled, what of a text the model cannot read."""
    note = pipeline.tokenizer.unknown_note(text, name)
    if note:
        print_line(note)
    if num_cut:
        print_line(f"the {name} is too long: its last {num_cut} BPE ids are cut")


def rescue_sampled(failure: Any, told: dict[str, Any], given: Any) -> str:
    """Write what was sampled before a stage failed and return where it is.

    These are the images as they were sampled or, where none could be decoded, their codes.
    """
    path = given.output
    try:
        if failure.candidates:
            write_candidates(failure.candidates, told, given)
            return f"All {len(failure.candidates)} images are kept as sampled in {path}"
        path = path.with_suffix(".jsonl")
        records = list(unsaved_codes(failure, told))
        write_or_rescue(path, lambda file: write_codes(file, records))
        return f"The image codes of all {len(records)} samples are kept in {path}"
    except ValueError as error:
        return str(error)


def add_stages(pipeline: Any, given: Any) -> None:
    """The CLIP and the upscaler that are asked for, where the pipeline is."""
    from rudolph.runs.resolve import open_clip, open_upscaler

    if given.clip or given.rank == "clip":
        pipeline.clip = open_clip(given.clip or DEFAULT_CLIP, runs=folders_here().runs)
    if given.upscale or given.upscaler:
        pipeline.upscaler = open_upscaler(given.upscaler or f"RealESRGAN-x{given.upscale}")
        scale = pipeline.upscaler.config.scale
        if given.upscale not in (None, scale):
            raise ValueError(f"--upscaler enlarges {scale} times, not {given.upscale}")
    pipeline.to(pipeline.device)


def request_record(given: Any) -> dict[str, Any]:
    """What images depend on beside their text and model, as far as it was given."""
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(given).items()
        if value is not None and name not in ("text", "model", "output", "verb")
    }


def read_image_prompt(given: Any) -> dict[str, Any]:
    """Return the images that generation starts from, by their flag.

    Raises:
        ValueError: unless an image comes with one way to say what of it stays.
    """
    from rudolph.generation import image_prompts

    told = [name for name in ("borders", "mask", "vary") if getattr(given, name) is not None]
    if given.image_prompt is None and told:
        raise ValueError(f"--{told[0]} is of an image prompt: give --image-prompt IMAGE")
    if given.image_prompt is None:
        return {}
    if len(told) != 1:
        raise ValueError("--image-prompt takes one of --borders, --mask and --vary")
    if given.borders is not None:
        image_prompts.parse_borders(given.borders)
    if given.vary is not None:
        image_prompts.require_fraction(given.vary)
    paths = {"image_prompt": given.image_prompt, "mask": given.mask}
    return {name: read_image(path) for name, path in paths.items() if path is not None}


def given_tokens(given: Any, images: dict[str, Any], source: Any) -> Any:
    """Indices of the image prompt where it stays."""
    import torch

    from rudolph.data.seeds import mixed_seed
    from rudolph.generation import image_prompts

    pipeline = source.pipeline
    side = pipeline.decoder.layout.image_tokens_per_dim
    if given.borders is not None:
        stays = image_prompts.border_mask(image_prompts.parse_borders(given.borders), side)
    elif given.mask is not None:
        white = pixels_of(images["mask"], source.image_size).mean(0) > 0.5
        stays = image_prompts.token_mask(~white, side)
    else:
        generator = torch.Generator().manual_seed(mixed_seed(given.seed, "vary"))
        stays = image_prompts.variation_mask(given.vary, side, generator)
    image = pixels_of(images["image_prompt"], source.image_size)
    return image_prompts.known_indices(pipeline.vqgan, image.to(pipeline.device), stays).cpu()


def read_image(path: Path) -> Any:
    """Return the image in a file, upright and in RGB."""
    from rudolph.data.image_files import RejectedError, decode_image

    if path.is_char_device() or path.is_block_device():
        raise ValueError(f"{path}: expected an image file, got a device")
    try:
        return decode_image(path.read_bytes()).image
    except RejectedError as error:
        raise ValueError(f"{path}: {error}") from error


def pixels_of(image: Any, size: int) -> Any:
    """Return the centre square of an image, ``(3, size, size)`` in [0, 1]."""
    import numpy as np
    import torch

    from rudolph.data.image_files import center_crop

    pixels = np.asarray(center_crop(image, size)).copy()
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def write_candidates(candidates: list[Any], told: dict[str, Any], given: Any) -> None:
    """Write images, their JSON and the grid, or all of it elsewhere where the disk fails."""

    def write(path: Path) -> None:
        write_images(path, candidates, told, alpha=given.transparent)

    write_or_rescue(given.output, write)


def caption_image(given: Any) -> int:
    from rudolph.data.seeds import mixed_seed

    check_arguments(given, suffix=".json")
    image = read_image(given.image)
    source = load_requested(given)
    pixels = pixels_of(image, source.image_size)
    sampling = sampling_of(source.sampling.text, given)
    seeds = [mixed_seed(given.seed, number) for number in range(given.number)]
    asked = None if given.question is None else [clean_text(given.question)]
    if asked is not None:
        texts = source.pipeline.texts("question_answering", "", other_text=asked[0])
        warn_unreadable(source.pipeline, "question", asked[0], texts.num_cut)
    source.pipeline.pack(given.number, sampling, is_compiled=given.compile)
    captions = source.pipeline.caption(pixels[None], config=sampling, seeds=seeds, questions=asked)
    counts = {text: captions.count(text) for text in captions}
    for text, count in sorted(counts.items(), key=lambda item: -item[1]):
        print(f"{count:4}  {text}")
    record = {"image": str(given.image), "model": source.name, "seed": given.seed}
    record |= {} if asked is None else {"question": asked[0]}
    content = record | {"sampling": vars(sampling), "captions": counts}
    write_or_rescue(given.output, lambda path: write_captions(path, pixels, content))
    return 0


def write_captions(path: Path, image: Any, content: dict[str, Any]) -> None:
    """Write the JSON of captions, and then the image with each of them below it."""
    import numpy as np

    from rudolph.generation.png import to_image
    from rudolph.reports.image_grids import sample_grid

    beside, counts = path.with_suffix(".json"), content["captions"]
    write_json(beside, content)
    sample_grid([np.asarray(to_image(image))] * len(counts), list(counts), path, columns=4)
    print_line(f"{path} and {beside}")
