"""Verbs that use weights: generate, caption."""

import json
from pathlib import Path
from typing import Any

from rudolph.cli.results import folders_here
from rudolph.console import say, stage_progress
from rudolph.disk import write_json, write_text

DEFAULT_CLIP = "ruclip-vit-base-patch32-384"
DTYPES = ("float32", "bfloat16", "float16")


def add_generate(verbs: Any) -> None:
    generate = verbs.add_parser("generate", help="draw pictures for a text")
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
    given = generate.add_argument_group("a picture that is partly given")
    given.add_argument("--image-prompt", type=Path, metavar="PICTURE")
    given.add_argument("--borders", help="what stays, in tokens: up=4,left=2")
    given.add_argument("--mask", type=Path, help="a picture that is white where to draw")
    given.add_argument("--vary", type=float, help="the share to draw anew, at random places")
    generate.add_argument(
        "--window",
        type=int,
        default=1,
        help="tokens guessed at once; fewer calls for few pictures",
    )
    generate.add_argument("--transparent", action="store_true", help="the ground of an emoji")
    generate.set_defaults(verb=generate_pictures)


def add_caption(verbs: Any) -> None:
    caption = verbs.add_parser("caption", help="describe a picture")
    caption.add_argument("picture", type=Path)
    caption.add_argument("--question", help="answered instead of a description")
    add_sampling_arguments(caption)
    caption.set_defaults(verb=caption_picture)


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


def check_arguments(given: Any) -> None:
    """Raise ``ValueError`` for mistakes that can be told before any weights are read."""
    if given.number < 1:
        raise ValueError(f"-n must be at least 1, got {given.number}")
    if given.output is not None and given.output.suffix.lower() != ".png":
        raise ValueError(f"--output must end with .png, got {given.output}")


def opened(given: Any) -> Any:
    """The source that a verb was given."""
    import torch

    from rudolph.results.tracking import tracking_uri
    from rudolph.sources import Precision, open_source

    dtype = getattr(torch, given.dtype) if given.dtype else None
    return open_source(
        given.model,
        runs=folders_here().runs,
        uri=tracking_uri(Path.cwd()),
        precision=Precision(dtype, given.int8),
    )


def generate_pictures(given: Any) -> int:
    from dataclasses import replace

    from rudolph.sampling.pipeline import Request

    check_arguments(given)
    if given.compile and given.window > 1:
        raise ValueError(f"--window must be 1 with --compile, got {given.window}")
    check_image_prompt(given)
    request = Request(
        given.number,
        given.keep,
        given.rank,
        given.perplexity,
        given.seed,
        window=given.window,
    )
    source = opened(given)
    pipeline = source.pipeline
    sampling = sampling_of(source.sampling.image, given)
    if given.guidance_kind and sampling.guidance is None:
        raise ValueError("--guidance-kind needs the number of --guidance")
    add_stages(pipeline, given)
    pipeline.pack(given.number, sampling, window=given.window, is_compiled=given.compile)
    if given.image_prompt is not None:
        request = replace(request, known=given_tokens(given, source))
    text = pipeline.texts("text_to_image", given.text)
    if text.num_cut:
        say(f"the text is too long: its last {text.num_cut} BPE ids are cut")
    with stage_progress() as progress:
        candidates = pipeline.generate(
            given.text,
            request,
            config=sampling,
            on_stage=lambda stage, done, total: progress(stage, done, total, ""),
        )
    parameters = asked_for(given) | vars(sampling)
    told = {"prompt": given.text, "model": source.name, "parameters": parameters}
    write_candidates(candidates, told, given)
    return 0


def add_stages(pipeline: Any, given: Any) -> None:
    """The CLIP and the upscaler that are asked for, where the pipeline is."""
    from rudolph.sources import open_clip, open_upscaler

    if given.clip or given.rank == "clip":
        pipeline.clip = open_clip(given.clip or DEFAULT_CLIP)
    if given.upscale or given.upscaler:
        pipeline.upscaler = open_upscaler(given.upscaler or f"RealESRGAN-x{given.upscale}")
        scale = pipeline.upscaler.config.scale
        if given.upscale not in (None, scale):
            raise ValueError(f"--upscaler enlarges {scale} times, not {given.upscale}")
    pipeline.to(pipeline.device)


def asked_for(given: Any) -> dict[str, Any]:
    """What pictures depend on beside their text and model, as far as it was given."""
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(given).items()
        if value is not None and name not in ("text", "model", "output", "verb")
    }


def check_image_prompt(given: Any) -> None:
    """Raise ``ValueError`` unless a picture comes with one way to say what of it stays."""
    told = [name for name in ("borders", "mask", "vary") if getattr(given, name) is not None]
    if given.image_prompt is None and told:
        raise ValueError(f"--{told[0]} is of an image prompt: give --image-prompt PICTURE")
    if given.image_prompt is not None and len(told) != 1:
        raise ValueError("--image-prompt takes one of --borders, --mask and --vary")


def given_tokens(given: Any, source: Any) -> Any:
    """Indices of the image prompt where it stays."""
    import torch

    from rudolph.data.seeds import mixed_seed
    from rudolph.sampling import image_prompts

    pipeline = source.pipeline
    side = pipeline.decoder.layout.image_tokens_per_dim
    if given.borders is not None:
        stays = image_prompts.border_mask(image_prompts.parse_borders(given.borders), side)
    elif given.mask is not None:
        white = read_picture(given.mask, source.image_size).mean(0) > 0.5
        stays = image_prompts.mask_of_picture(~white, side)
    else:
        generator = torch.Generator().manual_seed(mixed_seed(given.seed, "vary"))
        stays = image_prompts.variation_mask(given.vary, side, generator)
    picture = read_picture(given.image_prompt, source.image_size)
    return image_prompts.known_indices(pipeline.vqgan, picture.to(pipeline.device), stays).cpu()


def read_picture(path: Path, size: int) -> Any:
    """The centre square of a picture, ``(3, size, size)`` in [0, 1]."""
    import numpy as np
    import torch

    from rudolph.data.funnel import Rejected, centre_square, open_picture

    try:
        picture = open_picture(path.read_bytes()).image
    except Rejected as error:
        raise ValueError(f"{path}: {error}") from error
    pixels = np.asarray(centre_square(picture, size)).copy()
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def write_candidates(candidates: list[Any], told: dict[str, Any], given: Any) -> None:
    """The grid, each picture with what it was made of, and a line of JSON for each."""
    import numpy as np

    from rudolph.results.drawings import sample_grid
    from rudolph.sampling.pictures import save_png, to_image
    from rudolph.sampling.transparency import to_rgba

    path = given.output or Path("generated.png")
    folder, lines, images = path.with_suffix(""), [], []
    for place, candidate in enumerate(candidates):
        image = to_image(candidate.image)
        images.append(np.asarray(image))
        image = to_rgba(image) if given.transparent else image
        file = folder / f"{place:03}.png"
        record = told | {"seed": candidate.seed, "scores": candidate.scores}
        save_png(image, file, record)
        lines.append(json.dumps(record | {"file": str(file)}, ensure_ascii=False))
    labels = [
        ", ".join(f"{name} {value:.3g}" for name, value in candidate.scores.items())
        or told["prompt"]
        for candidate in candidates
    ]
    sample_grid(images, labels, path, columns=min(4, len(images)))
    beside = path.with_suffix(".jsonl")
    write_text(beside, "\n".join(lines) + "\n")
    say(f"{path}, {beside} and {len(lines)} pictures in {folder}")


def caption_picture(given: Any) -> int:
    from rudolph.data.seeds import mixed_seed
    from rudolph.results.drawings import sample_grid
    from rudolph.sampling.pictures import to_image

    check_arguments(given)
    source = opened(given)
    picture = read_picture(given.picture, source.image_size)
    sampling = sampling_of(source.sampling.text, given)
    seeds = [mixed_seed(given.seed, number) for number in range(given.number)]
    asked = None if given.question is None else [given.question]
    if given.question is not None:
        texts = source.pipeline.texts("question_answering", "", beside=given.question)
        if texts.num_cut:
            say(f"the question is too long: its last {texts.num_cut} BPE ids are cut")
    source.pipeline.pack(given.number, sampling, is_compiled=given.compile)
    captions = source.pipeline.caption(
        picture[None], config=sampling, seeds=seeds, questions=asked
    )
    counts = {text: captions.count(text) for text in captions}
    for text, count in sorted(counts.items(), key=lambda item: -item[1]):
        print(f"{count:4}  {text}")
    import numpy as np

    path = given.output or Path("captioned.png")
    image = np.asarray(to_image(picture))
    sample_grid([image] * len(counts), list(counts), path, columns=4)
    record = {"picture": str(given.picture), "model": source.name, "seed": given.seed}
    record |= {} if given.question is None else {"question": given.question}
    beside = path.with_suffix(".json")
    content = record | {"sampling": vars(sampling), "captions": counts}
    write_json(beside, content)
    say(f"{path} and {beside}")
    return 0
