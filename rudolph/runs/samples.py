"""Pictures of a run: its masks, reconstructions, captions and the grid of fixed prompts.

Those that runs have in common are drawn by the first of them.  One that cannot be drawn is a
warning and fails no run.  Matplotlib is imported only where a picture is drawn.
"""

import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rudolph.config.run import RunConfig, digest_of, plain
from rudolph.data.seeds import mixed_seed
from rudolph.data.splits import Split, Splits
from rudolph.evaluation.evaluator import without_note
from rudolph.files.atomic import say_once, set_aside
from rudolph.generation.pictures import is_whole_png
from rudolph.generation.pipeline import OnToken, Pipeline
from rudolph.models.rudolph.decoder import MaskedDecoder
from rudolph.runs.execution import Execution, is_main_process, keep_file
from rudolph.sequence.masks import mask_table, parse_mask, right_without_left
from rudolph.sequence.texts import UnknownTextWarning
from rudolph.sequence.tokenizer import Tokenizer

GRID_COLUMNS = 8
NUM_SHOWN = 10


def draw_masks(execution: Execution, model: MaskedDecoder) -> None:
    """The different masks of the decoder as one picture."""
    if not is_main_process():
        return
    names, sees_left = tuple(dict.fromkeys(model.config.masks)), model.config.right_sees_left

    def draw(path: Path) -> None:
        from rudolph.reports import drawings

        rules = {name: parse_mask(name) for name in names}
        if not sees_left:
            rules = {name: right_without_left(rule) for name, rule in rules.items()}
        tables = {name: mask_table(rule, model.layout).numpy() for name, rule in rules.items()}
        drawings.mask_picture(tables, path, segments=model.layout.segment_lengths)

    path = execution.folder / "samples" / "masks.png"
    draw_once(execution, path, draw, decided_by=(names, sees_left, plain(model.layout)))
    if path.is_file():
        execution.tracker.log_artifact(path)


def draw_samples(
    execution: Execution, pipeline: Pipeline, splits: Splits, *, made_of: str
) -> None:
    """Reconstructions, and what the decoder learned: captions of each split, fixed prompts.

    Args:
        made_of: the digest of data, tokenizer and VQ-GAN.
    """
    folder = execution.folder / "samples"

    def draw(path: Path) -> None:
        from rudolph.reports import drawings

        seen = splits.with_pictures("validation")
        originals = torch.cat([split.pictures(_spread(split, len(seen))) for split in seen])
        decoded = pipeline.decode(pipeline.encode(originals))
        drawings.reconstructions(to_bytes(originals), to_bytes(decoded), path)

    draw_once(execution, folder / "reconstructions.png", draw, decided_by=(made_of,))
    tasks = {(row.dataset, row.task) for row in splits.config.mixture}
    main = splits.config.dataset
    if (main, "image_captioning") in tasks:
        for name in execution.config.evaluation.splits:
            draw_captions(execution, pipeline, splits(name))
    if shown_prompts(execution.config):
        draw_grid(execution, pipeline)
    for path in sorted(folder.glob("*.png")):
        execution.tracker.log_artifact(path, "samples")


def draw_once(
    execution: Execution,
    path: Path,
    draw: Callable[[Path], None],
    *,
    decided_by: tuple[Any, ...],
) -> None:
    """A picture in the run's folder; ``draw(path)`` if no run before drew it.

    It is missing, with a warning, where it cannot be drawn.
    """
    name = f"{path.stem}-{digest_of(*decided_by)[:16]}{path.suffix}"
    cached = execution.folders.cache / "pictures" / name
    if is_whole_png(cached):
        keep_file(cached, path)
        return
    if os.path.lexists(cached):
        aside = set_aside(cached)
        say_once(f"{cached}: damaged, renamed {aside.name}; it is drawn again")
    from rudolph.reports.style import warned_drawing

    with warned_drawing():
        draw(path)
        keep_file(path, cached)


def draw_captions(execution: Execution, pipeline: Pipeline, split: Split) -> None:
    """Pictures of a split with what the decoder says of them."""
    from rudolph.reports import drawings
    from rudolph.reports.style import warned_drawing

    pictures = split.pictures(_spread(split))
    sampling = execution.config.sampling.text
    captions = pipeline.caption(pictures, config=sampling, seeds=range(len(pictures)))
    path = execution.folder / "samples" / f"captions-{split.name}.png"
    with warned_drawing():
        labels = [text or "-" for text in captions]
        drawings.sample_grid(to_bytes(pictures), labels, path, columns=5)


def shown_prompts(config: RunConfig) -> tuple[str, ...]:
    """Return the fixed prompts of a run that learns to draw what they say, or none."""
    tasks = {(row.dataset, row.task) for row in config.data.mixture}
    is_drawing = (config.data.dataset, "text_to_image") in tasks
    return config.evaluation.grid_prompts if is_drawing else ()


def warn_of_unknown(config: RunConfig, tokenizer: Tokenizer) -> None:
    """Warn, before any training, of fixed prompts that the tokenizer of a run cannot read."""
    for at, prompt in enumerate(shown_prompts(config)):
        note = tokenizer.unknown_note(prompt, f"evaluation.grid_prompts[{at}]")
        if note:
            warnings.warn(note, UnknownTextWarning, stacklevel=2)


def draw_grid(execution: Execution, pipeline: Pipeline) -> None:
    """Pictures of the fixed prompts, so that runs can be compared by eye."""
    path = execution.folder / "samples" / "grid.png"
    with execution.stage("samples") as advance:
        draw_prompts(pipeline, execution.config, path, on_token=partial(without_note, advance))


def draw_prompts(
    pipeline: Pipeline, config: RunConfig, path: Path, *, on_token: OnToken | None = None
) -> None:
    """Pictures of the fixed prompts of a configuration, as it draws and seeds them."""
    from rudolph.reports import drawings
    from rudolph.reports.style import warned_drawing

    prompts, number = config.evaluation.grid_prompts, config.evaluation.grid_samples
    seeds = [mixed_seed(config.seed, at, k) for at in range(len(prompts)) for k in range(number)]
    pictures = pipeline.pictures(
        prompts, config=config.sampling.image, seeds=seeds, on_token=on_token
    )
    labels = [prompt for prompt in prompts for _ in range(number)]
    columns = max(GRID_COLUMNS // number, 1) * number
    with warned_drawing():
        drawings.sample_grid(to_bytes(pictures), labels, path, columns=columns)


def _spread(split: Split, num_splits: int = 1) -> list[int]:
    """A few pairs from all over a split, always the same; fewer where several share a picture."""
    number = min(NUM_SHOWN // num_splits, len(split))
    return [at * len(split) // number for at in range(number)]


def to_bytes(pictures: torch.Tensor) -> list[np.ndarray[Any, Any]]:
    """``(B, 3, H, W)`` in [0, 1] to a list of ``(H, W, 3)`` uint8."""
    return list(pictures.mul(255).round().byte().permute(0, 2, 3, 1).numpy())
