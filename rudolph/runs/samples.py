"""Sample images of a run: masks, reconstructions, captions and a grid of fixed prompts.

Images that several runs share are drawn once and cached.  A failed drawing causes a warning and
does not fail the run.  Matplotlib is imported only where an image is drawn.
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
from rudolph.data.seeds import grid_seeds
from rudolph.data.splits import DataConfig, Split, SplitArrays, Splits, has_documents
from rudolph.evaluation.context import ignore_notes
from rudolph.families.interface import Capabilities
from rudolph.files.atomic import rename_damaged, warn_once
from rudolph.generation.answering import OnToken
from rudolph.generation.pipeline import Pipeline
from rudolph.generation.png import is_whole_png
from rudolph.generation.trained_models import ImageTokenizer
from rudolph.models.rudolph.decoder import MaskedDecoder
from rudolph.reports.sample_sheets import NUM_SHOWN, SHOWN_TASKS, TEXT_COLUMNS, grid_columns
from rudolph.runs.execution import Execution, copy_to_run
from rudolph.sequence.masks import mask_table, parse_mask, right_without_left
from rudolph.sequence.tasks import TASKS
from rudolph.sequence.texts import UnknownTextWarning
from rudolph.sequence.tokenizer import Tokenizer
from rudolph.tracking.run_directory import SAMPLES


def save_masks(execution: Execution, model: nn.Module) -> None:
    """Save the distinct attention masks of a masked decoder as one image; skip other models."""
    if not isinstance(model, MaskedDecoder) or not execution.is_main_process:
        return
    names, attends_left = tuple(dict.fromkeys(model.config.masks)), model.config.right_attends_left

    def draw(path: Path) -> None:
        from rudolph.reports import image_grids

        rules = {name: parse_mask(name) for name in names}
        if not attends_left:
            rules = {name: right_without_left(rule) for name, rule in rules.items()}
        tables = {name: mask_table(rule, model.layout).numpy() for name, rule in rules.items()}
        image_grids.draw_masks_image(tables, path, segments=model.layout.segment_lengths)

    path = execution.directory.samples / "masks.png"
    save_once(execution, path, draw, decided_by=(names, attends_left, to_plain(model.layout)))
    if path.is_file():
        execution.tracker.log_artifact(path)


def save_samples(
    execution: Execution, model: Capabilities, splits: Splits, *, digest: str
) -> None:
    """Save reconstructions, texts of each split and the grid of fixed prompts.

    Samples are skipped if the model lacks a capability that they need.

    Args:
        execution: The run.
        model: Capabilities of the trained model.
        splits: Splits of the run's datasets.
        digest: Digest of the data and the parts.
    """
    folder, provided = execution.directory.samples, type(model).provided()
    if "image_tokenizer" in provided:
        save_reconstructions(execution, model.image_tokenizer(), splits, digest=digest)
    if "generate_text" in provided:
        for task, dataset in shown_datasets(splits.config).items():
            for name in execution.config.evaluation.splits:
                save_texts(execution, model, task, splits(name, dataset))
    if "token_pipeline" in provided and grid_prompts_of(execution.config):
        save_grid(execution, model.token_pipeline())
    for path in sorted(folder.glob("*.png")):
        execution.tracker.log_artifact(path, SAMPLES)


def save_reconstructions(
    execution: Execution, tokenizer: ImageTokenizer, splits: Splits, *, digest: str
) -> None:
    """Save ``NUM_SHOWN`` validation images, their reconstructions and the differences."""

    def draw(path: Path) -> None:
        from rudolph.reports import image_grids

        image_splits = splits.with_images("validation")
        originals = torch.cat(
            [split.image_batch(_evenly_spaced(split, len(image_splits))) for split in image_splits]
        )
        decoded = tokenizer.decode(tokenizer.encode(originals))
        image_grids.draw_reconstructions(to_bytes(originals), to_bytes(decoded), path)

    path = execution.directory.samples / "reconstructions.png"
    save_once(execution, path, draw, decided_by=(digest,))


def save_once(
    execution: Execution,
    path: Path,
    draw: Callable[[Path], None],
    *,
    decided_by: tuple[Any, ...],
) -> None:
    """Save an image in the run's folder, from the cache or with ``draw(path)``.

    If drawing fails, warn and leave the image out.

    Args:
        execution: The run.
        path: Path of the image in the run's folder.
        draw: Draws the image at a path.
        decided_by: Everything that determines the image; its digest names the cached file.
    """
    name = f"{path.stem}-{digest_of(*decided_by)[:16]}{path.suffix}"
    cached_path = execution.folders.cache / "images" / name
    if is_whole_png(cached_path):
        copy_to_run(cached_path, path)
        return
    if os.path.lexists(cached_path):
        renamed = rename_damaged(cached_path)
        warn_once(f"{cached_path}: damaged, renamed {renamed.name}; drawing it again")
    from rudolph.reports.style import warned_drawing

    with warned_drawing():
        draw(path)
        copy_to_run(path, cached_path)


def shown_datasets(config: DataConfig) -> dict[str, str]:
    """Return, for each task in ``SHOWN_TASKS``, the dataset of pairs whose images are shown.

    The main dataset takes precedence over the other datasets of the mixture.
    """
    rows = sorted(config.mixture, key=lambda row: row.dataset == config.dataset)
    return {
        row.task: row.dataset
        for row in rows
        if row.task in SHOWN_TASKS and not has_documents(row.dataset)
    }


def save_texts(execution: Execution, model: Capabilities, task: str, split: Split) -> None:
    """Save ``NUM_SHOWN`` images of a split with generated captions, or with answered questions."""
    from rudolph.reports import image_grids
    from rudolph.reports.style import warned_drawing

    indices = _evenly_spaced(split)
    images, questions = split.image_batch(indices), None
    if TASKS[task].has_question:
        questions = [split.questions[index] for index in indices]
    texts = model.generate_text(
        task,
        config=execution.config.sampling.text,
        seeds=range(len(indices)),
        images=images,
        questions=questions,
    )
    path = execution.directory.samples / f"{SHOWN_TASKS[task]}-{split.name}.png"
    with warned_drawing():
        asked = questions or [""] * len(texts)
        labels = [
            f"{question} {text or '-'}".strip()
            for question, text in zip(asked, texts, strict=True)
        ]
        image_grids.sample_grid(to_bytes(images), labels, path, columns=TEXT_COLUMNS)


def grid_prompts_of(config: RunConfig) -> tuple[str, ...]:
    """Return the fixed prompts of a run trained on text-to-image generation, else ()."""
    tasks = {(row.dataset, row.task) for row in config.data.mixture}
    has_generation = (config.data.dataset, "text_to_image") in tasks
    return config.evaluation.grid_prompts if has_generation else ()


def warn_of_unknown(config: RunConfig, tokenizer: Tokenizer) -> None:
    """Warn before training if the tokenizer cannot encode parts of the fixed prompts."""
    for index, prompt in enumerate(grid_prompts_of(config)):
        note = tokenizer.unknown_note(prompt, f"evaluation.grid_prompts[{index}]")
        if note:
            warnings.warn(note, UnknownTextWarning, stacklevel=2)


def save_grid(execution: Execution, pipeline: Pipeline) -> None:
    """Save generated images of the fixed prompts, for a visual comparison of runs."""
    path = execution.directory.samples / "grid.png"
    with execution.stage("samples") as advance:
        generate_prompts(pipeline, execution.config, path, on_token=partial(ignore_notes, advance))


def generate_prompts(
    pipeline: Pipeline, config: RunConfig, path: Path, *, on_token: OnToken | None = None
) -> None:
    """Generate images of the fixed prompts and save them as one grid.

    Args:
        pipeline: Pipeline that generates the images.
        config: Configuration with the prompts, the sampling settings and the seed.
        path: Path of the PNG.
        on_token: Called with the number of generated tokens and the total.
    """
    from rudolph.reports import image_grids
    from rudolph.reports.style import warned_drawing

    prompts, num_samples = config.evaluation.grid_prompts, config.evaluation.grid_samples
    seeds = grid_seeds(config.seed, len(prompts), num_samples)
    images = pipeline.generate_images(
        prompts, config=config.sampling.image, seeds=seeds, on_token=on_token
    )
    labels = [prompt for prompt in prompts for _ in range(num_samples)]
    with warned_drawing():
        image_grids.sample_grid(to_bytes(images), labels, path, columns=grid_columns(num_samples))


def _evenly_spaced(split: SplitArrays, num_splits: int = 1) -> list[int]:
    """Return evenly spaced indices of the images of one of ``num_splits`` splits.

    The splits have ``NUM_SHOWN`` images in all.
    """
    count = min(NUM_SHOWN // num_splits, split.num_images)
    return [index * split.num_images // count for index in range(count)]


def to_bytes(images: torch.Tensor) -> list[np.ndarray[Any, Any]]:
    """Convert images ``(B, 3, H, W)`` in [0, 1] to uint8 arrays ``(H, W, 3)``."""
    return list(images.mul(255).round().byte().permute(0, 2, 3, 1).numpy())
