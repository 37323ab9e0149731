"""Images of a run: its masks, reconstructions, captions and the grid of fixed prompts.

Those that runs have in common are drawn by the first of them.  One that cannot be drawn is a
warning and fails no run.  Matplotlib is imported only where an image is drawn.
"""

import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rudolph.config.run import RunConfig, digest_of, to_plain
from rudolph.data.seeds import mixed_seed
from rudolph.data.splits import Split, Splits
from rudolph.evaluation.context import ignore_notes
from rudolph.families.interface import Capabilities
from rudolph.files.atomic import rename_damaged, warn_once
from rudolph.generation.answering import OnToken
from rudolph.generation.pipeline import Pipeline
from rudolph.generation.png import is_whole_png
from rudolph.generation.trained_models import ImageTokenizer
from rudolph.models.rudolph.decoder import MaskedDecoder
from rudolph.runs.execution import Execution, copy_to_run, is_main_process
from rudolph.sequence.masks import mask_table, parse_mask, right_without_left
from rudolph.sequence.texts import UnknownTextWarning
from rudolph.sequence.tokenizer import Tokenizer

GRID_COLUMNS = 8
NUM_SHOWN = 10


def save_masks(execution: Execution, model: nn.Module) -> None:
    """Save the different masks of a masked decoder as one image; other models have none."""
    if not isinstance(model, MaskedDecoder) or not is_main_process():
        return
    names, sees_left = tuple(dict.fromkeys(model.config.masks)), model.config.right_attends_left

    def draw(path: Path) -> None:
        from rudolph.reports import image_grids

        rules = {name: parse_mask(name) for name in names}
        if not sees_left:
            rules = {name: right_without_left(rule) for name, rule in rules.items()}
        tables = {name: mask_table(rule, model.layout).numpy() for name, rule in rules.items()}
        image_grids.draw_masks_image(tables, path, segments=model.layout.segment_lengths)

    path = execution.folder / "samples" / "masks.png"
    save_once(execution, path, draw, decided_by=(names, sees_left, to_plain(model.layout)))
    if path.is_file():
        execution.tracker.log_artifact(path)


def save_samples(
    execution: Execution, model: Capabilities, splits: Splits, *, made_of: str
) -> None:
    """Save reconstructions, captions of each split and the grid of fixed prompts.

    A model shows what it can do, and nothing else.

    Args:
        made_of: the digest of the data and the parts.
    """
    folder, provided = execution.folder / "samples", type(model).provided()
    if "image_tokenizer" in provided:
        save_reconstructions(execution, model.image_tokenizer(), splits, made_of=made_of)
    tasks = {(row.dataset, row.task) for row in splits.config.mixture}
    if "token_pipeline" in provided:
        if (splits.config.dataset, "image_captioning") in tasks:
            for name in execution.config.evaluation.splits:
                save_captions(execution, model.token_pipeline(), splits(name))
        if grid_prompts_of(execution.config):
            save_grid(execution, model.token_pipeline())
    for path in sorted(folder.glob("*.png")):
        execution.tracker.log_artifact(path, "samples")


def save_reconstructions(
    execution: Execution, tokenizer: ImageTokenizer, splits: Splits, *, made_of: str
) -> None:
    """Save some validation images, their reconstructions and the differences."""

    def draw(path: Path) -> None:
        from rudolph.reports import image_grids

        seen = splits.with_images("validation")
        originals = torch.cat([split.image_batch(_spread(split, len(seen))) for split in seen])
        decoded = tokenizer.decode(tokenizer.encode(originals))
        image_grids.reconstructions(to_bytes(originals), to_bytes(decoded), path)

    path = execution.folder / "samples" / "reconstructions.png"
    save_once(execution, path, draw, decided_by=(made_of,))


def save_once(
    execution: Execution,
    path: Path,
    draw: Callable[[Path], None],
    *,
    decided_by: tuple[Any, ...],
) -> None:
    """An image in the run's folder; ``draw(path)`` if no run before drew it.

    It is missing, with a warning, where it cannot be drawn.
    """
    name = f"{path.stem}-{digest_of(*decided_by)[:16]}{path.suffix}"
    cached = execution.folders.cache / "images" / name
    if is_whole_png(cached):
        copy_to_run(cached, path)
        return
    if os.path.lexists(cached):
        aside = rename_damaged(cached)
        warn_once(f"{cached}: damaged, renamed {aside.name}; it is drawn again")
    from rudolph.reports.style import warned_drawing

    with warned_drawing():
        draw(path)
        copy_to_run(path, cached)


def save_captions(execution: Execution, pipeline: Pipeline, split: Split) -> None:
    """Images of a split with what the decoder says of them."""
    from rudolph.reports import image_grids
    from rudolph.reports.style import warned_drawing

    images = split.image_batch(_spread(split))
    sampling = execution.config.sampling.text
    captions = pipeline.caption(images, config=sampling, seeds=range(len(images)))
    path = execution.folder / "samples" / f"captions-{split.name}.png"
    with warned_drawing():
        labels = [text or "-" for text in captions]
        image_grids.sample_grid(to_bytes(images), labels, path, columns=5)


def grid_prompts_of(config: RunConfig) -> tuple[str, ...]:
    """Return the fixed prompts of a run that learns to draw what they say, or none."""
    tasks = {(row.dataset, row.task) for row in config.data.mixture}
    is_drawing = (config.data.dataset, "text_to_image") in tasks
    return config.evaluation.grid_prompts if is_drawing else ()


def warn_of_unknown(config: RunConfig, tokenizer: Tokenizer) -> None:
    """Warn, before any training, of fixed prompts that the tokenizer of a run cannot read."""
    for at, prompt in enumerate(grid_prompts_of(config)):
        note = tokenizer.unknown_note(prompt, f"evaluation.grid_prompts[{at}]")
        if note:
            warnings.warn(note, UnknownTextWarning, stacklevel=2)


def save_grid(execution: Execution, pipeline: Pipeline) -> None:
    """Images of the fixed prompts, so that runs can be compared by eye."""
    path = execution.folder / "samples" / "grid.png"
    with execution.stage("samples") as advance:
        generate_prompts(pipeline, execution.config, path, on_token=partial(ignore_notes, advance))


def generate_prompts(
    pipeline: Pipeline, config: RunConfig, path: Path, *, on_token: OnToken | None = None
) -> None:
    """Images of the fixed prompts of a configuration, as it draws and seeds them."""
    from rudolph.reports import image_grids
    from rudolph.reports.style import warned_drawing

    prompts, number = config.evaluation.grid_prompts, config.evaluation.grid_samples
    seeds = [mixed_seed(config.seed, at, k) for at in range(len(prompts)) for k in range(number)]
    images = pipeline.generate_images(
        prompts, config=config.sampling.image, seeds=seeds, on_token=on_token
    )
    labels = [prompt for prompt in prompts for _ in range(number)]
    columns = max(GRID_COLUMNS // number, 1) * number
    with warned_drawing():
        image_grids.sample_grid(to_bytes(images), labels, path, columns=columns)


def _spread(split: Split, num_splits: int = 1) -> list[int]:
    """A few pairs from all over a split, always the same; fewer where several share an image."""
    number = min(NUM_SHOWN // num_splits, len(split))
    return [at * len(split) // number for at in range(number)]


def to_bytes(images: torch.Tensor) -> list[np.ndarray[Any, Any]]:
    """``(B, 3, H, W)`` in [0, 1] to a list of ``(H, W, 3)`` uint8."""
    return list(images.mul(255).round().byte().permute(0, 2, 3, 1).numpy())
