"""Sheets of sample images, and the parts cut out of them to compare runs at one prompt.

A sheet is ``samples/<run>-<kind>.png``.  ``image_grids.sample_grid`` draws sheets of generated
images (``grid``) and of generated texts (``captions-<split>``, ``answers-<split>``): square images
in rows, each with its text below.  Other kinds, such as ``masks``, are compared as a whole.
"""

from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from rudolph.files.atomic import DamagedFileError, write_atomic
from rudolph.reports.run_configs import read_configs
from rudolph.tracking.run_directory import SAMPLES

CellBox = tuple[int, int, int, int]

GAP, LINE_HEIGHT = 8, 16  # pixels
GRID_SHEET = "grid"
GRID_COLUMNS, TEXT_COLUMNS = 8, 5
# Number of images of a sheet of texts.
NUM_SHOWN = 10
# Tasks whose generated texts are shown with their images, and the names of the files.
SHOWN_TASKS = {"image_captioning": "captions", "question_answering": "answers"}
# Folder of the parts that are cut out of sheets.
COMPARED_PARTS = "compared"


class Comparison(NamedTuple):
    """Samples of several runs for one prompt, or their whole sheets.

    Attributes:
        label: the kind of the sheets and the prompt.
        images: path of each run's image, relative to the experiment's page.
    """

    label: str
    images: dict[str, str]


def grid_columns(num_samples: int) -> int:
    """Return the number of columns with which all samples of a prompt lie in one row of a grid."""
    return max(GRID_COLUMNS // num_samples, 1) * num_samples


def cell_boxes(size: tuple[int, int], *, columns: int, count: int) -> list[CellBox]:
    """Return the box (left, upper, right, lower) of each cell of a sheet, including its text.

    Args:
        size: width and height of the sheet, in pixels.
        columns: number of images per full row.
        count: number of images.

    Returns:
        One box per image; empty if ``size`` does not fit a sheet of this many images.
    """
    if count < 1:
        return []
    columns = min(columns, count)
    (width, width_rest), (height, height_rest) = (
        divmod(side - GAP, number)
        for side, number in zip(size, (columns, -(-count // columns)), strict=True)
    )
    text_height = height - (width - GAP) - 2 * GAP
    if width_rest or height_rest or text_height < LINE_HEIGHT or text_height % LINE_HEIGHT:
        return []
    corners = [(i % columns * width + GAP, i // columns * height + GAP) for i in range(count)]
    return [(left, top, left + width - GAP, top + height - GAP) for left, top in corners]


def compare_samples(folder: Path, runs: Collection[str], target: Path) -> Iterator[Comparison]:
    """Cut out the samples that several runs share and yield one comparison per prompt.

    Args:
        folder: results folder of the experiment.
        runs: names of its runs.
        target: folder of the experiment's page, to which the parts are written.

    Raises:
        DamagedFileError: if a sheet or the runs' configurations are damaged.
        OSError: if a file cannot be read or written.
    """
    for kind, paths in _sheets_by_kind(folder, runs).items():
        if len(paths) < 2:
            continue
        sheets = {run: _read_image(path) for run, path in paths.items()}
        boxes = _shared_boxes(folder, kind, {run: sheet.size for run, sheet in sheets.items()})
        if not boxes:
            files = {run: f"{SAMPLES}/{path.name}" for run, path in paths.items()}
            yield Comparison(kind, files)
        for number, (label, box_of_run) in enumerate(boxes.items()):
            parts = {
                run: f"{COMPARED_PARTS}/{path.stem}-{number:02d}.png"
                for run, path in paths.items()
            }
            for run, sheet in sheets.items():
                part = sheet.crop(box_of_run[run])
                write_atomic(target / parts[run], partial(part.save, format="PNG"))
            yield Comparison(f"{kind}: {label}", parts)


def _sheets_by_kind(folder: Path, runs: Collection[str]) -> dict[str, dict[str, Path]]:
    """Return the sheets, keyed by kind and by run.

    A run's name may be the start of another run's name.
    """
    sheets: dict[str, dict[str, Path]] = {}
    for path in sorted((folder / SAMPLES).glob("*.png")):
        run = max((name for name in runs if path.stem.startswith(f"{name}-")), key=len, default="")
        sheets.setdefault(path.stem.removeprefix(f"{run}-"), {})[run] = path
    return sheets


def _shared_boxes(
    folder: Path, kind: str, sizes: Mapping[str, tuple[int, int]]
) -> dict[str, dict[str, CellBox]]:
    """Return the regions of the sheets, keyed by prompt and by run.

    The result is empty if whole sheets are compared.
    """
    if kind == GRID_SHEET:
        return _prompt_boxes(folder, sizes)
    if not kind.startswith(tuple(SHOWN_TASKS.values())):
        return {}
    boxes = {
        run: cell_boxes(size, columns=TEXT_COLUMNS, count=NUM_SHOWN) for run, size in sizes.items()
    }
    if not all(boxes.values()):
        return {}
    return {
        f"image {number + 1}": {run: cells[number] for run, cells in boxes.items()}
        for number in range(NUM_SHOWN)
    }


def _prompt_boxes(
    folder: Path, sizes: Mapping[str, tuple[int, int]]
) -> dict[str, dict[str, CellBox]]:
    """Return the boxes around all samples of a prompt, keyed by prompt and by run.

    There are none unless all runs have equal prompts.
    """
    settings = [
        _grid_settings(content) for name, _, content in read_configs(folder) if name in sizes
    ]
    if not settings or any(other != settings[0] for other in settings):
        return {}
    prompts, num_samples = settings[0]
    boxes: dict[str, dict[str, CellBox]] = {prompt: {} for prompt in prompts}
    for run, size in sizes.items():
        cells = cell_boxes(
            size, columns=grid_columns(num_samples), count=len(prompts) * num_samples
        )
        if not cells:
            return {}
        for number, prompt in enumerate(prompts):
            first, last = cells[number * num_samples], cells[(number + 1) * num_samples - 1]
            boxes[prompt][run] = (*first[:2], *last[2:])
    return boxes


def _grid_settings(content: Mapping[str, Any]) -> tuple[list[str], int]:
    evaluation = content.get("evaluation", {})
    return evaluation.get("grid_prompts", []), evaluation.get("grid_samples", 1)


def _read_image(path: Path) -> Image.Image:
    """Read all pixels of an image.

    Raises:
        DamagedFileError: if it is no image.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        # Pillow raises OSErrors without a number for files that it cannot decode.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DamagedFileError(path, "no image that can be read") from error
