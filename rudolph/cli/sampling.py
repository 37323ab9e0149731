"""Verbs that use a trained run: generate, caption."""

import json
from pathlib import Path
from typing import Any

from rudolph.cli.results import folders_here
from rudolph.console import say, stage_progress


def add_generate(verbs: Any) -> None:
    generate = verbs.add_parser("generate", help="draw pictures for a text")
    generate.add_argument("text")
    add_sampling_arguments(generate)
    generate.add_argument("--guidance", type=float)
    generate.set_defaults(verb=generate_pictures)


def add_caption(verbs: Any) -> None:
    caption = verbs.add_parser("caption", help="describe a picture")
    caption.add_argument("picture", type=Path)
    add_sampling_arguments(caption)
    caption.set_defaults(verb=caption_picture)


def add_sampling_arguments(verb: Any) -> None:
    verb.add_argument("--run", type=Path, help="a run's folder; by default the newest finished")
    verb.add_argument("-n", "--number", type=int, default=8)
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--temperature", type=float)
    verb.add_argument("--top-k", type=int, help="filters are the run's where they are not given")
    verb.add_argument("--top-p", type=float)
    verb.add_argument("--output", type=Path, help="path of the PNG; JSON is written beside it")


def sampling_of(config: Any, given: Any, *, guidance: float | None) -> Any:
    """A run's sampling with what the command line gives over it."""
    from dataclasses import replace

    filters = {name: getattr(given, name) for name in ("temperature", "top_k", "top_p")}
    given_ones = {name: value for name, value in filters.items() if value is not None}
    return replace(config, **given_ones, **({} if guidance is None else {"guidance": guidance}))


def chosen_run(given: Any) -> Path:
    """The folder that ``--run`` names, or that of the run which finished last."""
    if given.number < 1:
        raise ValueError(f"-n must be at least 1, got {given.number}")
    if given.run is not None:
        return Path(given.run)
    runs = folders_here().runs
    finished = [
        path
        for path in runs.glob("*/*/summary.json")
        if json.loads(path.read_text())["status"] == "finished"
    ]
    if not finished:
        raise ValueError(f"{runs}: no finished run; `make quickstart` trains one, or give --run")
    return max(finished, key=lambda path: path.stat().st_mtime).parent


def generate_pictures(given: Any) -> int:
    from rudolph.data.module import mixed_seed
    from rudolph.gallery import to_bytes
    from rudolph.results.figures import sample_grid
    from rudolph.stages import load_pipeline

    folder = chosen_run(given)
    pipeline, config = load_pipeline(folder)
    sampling = sampling_of(config.sampling.image, given, guidance=given.guidance)
    text = pipeline.texts("text_to_image", given.text)
    if text.num_cut:
        say(f"the text is too long: its last {text.num_cut} BPE ids are cut")
    seeds = [mixed_seed(given.seed, number) for number in range(given.number)]
    with stage_progress() as progress:
        pictures = pipeline.generate(
            [given.text],
            config=sampling,
            seeds=seeds,
            on_token=lambda done, total: progress("generate", done, total, ""),
        )
    path = given.output or Path("generated.png")
    sample_grid(to_bytes(pictures), [given.text] * len(seeds), path, columns=4)
    record = {
        "text": given.text,
        "run": str(folder),
        "seed": given.seed,
        "sampling": vars(sampling),
    }
    write_beside(path, record)
    return 0


def caption_picture(given: Any) -> int:
    import numpy as np
    import torch

    from rudolph.data.funnel import Rejected, centre_square, open_picture
    from rudolph.data.module import mixed_seed
    from rudolph.results.figures import sample_grid
    from rudolph.stages import load_pipeline

    folder = chosen_run(given)
    pipeline, config = load_pipeline(folder)
    try:
        picture = open_picture(given.picture.read_bytes()).image
    except Rejected as error:
        raise ValueError(f"{given.picture}: {error}") from error
    image = np.asarray(centre_square(picture, config.data.image_size))
    tensor = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255
    sampling = sampling_of(config.sampling.text, given, guidance=None)
    seeds = [mixed_seed(given.seed, number) for number in range(given.number)]
    captions = pipeline.caption(tensor, config=sampling, seeds=seeds)
    counts = {text: captions.count(text) for text in captions}
    for text, count in sorted(counts.items(), key=lambda item: -item[1]):
        print(f"{count:4}  {text}")
    path = given.output or Path("captioned.png")
    sample_grid([image] * len(counts), list(counts), path, columns=4)
    record = {"picture": str(given.picture), "run": str(folder), "seed": given.seed}
    write_beside(path, record | {"sampling": vars(sampling), "captions": counts})
    return 0


def write_beside(path: Path, record: dict[str, Any]) -> None:
    beside = path.with_suffix(".json")
    beside.write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n")
    say(f"{path} and {beside}")
