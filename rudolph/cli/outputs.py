"""Files of generate and caption: checked before anything is sampled, and kept if a disk fails."""

import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from rudolph.files.atomic import json_text, require_disjoint_paths, write_text
from rudolph.runs.console import print_line

# Written where an output is checked: a full disk still takes an empty file.
PROBE = b"0" * 4096
# Text fields in the metadata of each generated PNG.
RECORD_FILE = ("prompt", "model", "parameters", "seed", "scores")


def check_output(path: Path, *, suffix: str, has_folder: bool = False) -> None:
    """Raise ``ValueError`` unless a PNG, its text beside it and single images can be written.

    Args:
        path: of the PNG.
        suffix: of the text file beside it.
        has_folder: whether single images go into a folder of the PNG's name.
    """
    if path.suffix.lower() != ".png":
        raise ValueError(f"--output must end with .png, got {path}")
    for file in (path, path.with_suffix(suffix)):
        if file.is_dir():
            raise ValueError(
                f"--output: expected a file, got the folder {file}. Give another name"
            )
    folders = [path.parent, path.with_suffix("")] if has_folder else [path.parent]
    for folder in folders:
        nearest = next(each for each in (folder, *folder.parents) if os.path.lexists(each))
        if not nearest.is_dir():
            raise ValueError(
                f"--output: expected {folder} to be a folder or free, and {nearest} is a file. "
                "Give another name"
            )
        try:
            with tempfile.TemporaryFile(dir=nearest) as probe:
                probe.write(PROBE)
        except OSError as error:
            raise ValueError(
                f"--output: expected a folder that can be written, got {nearest} "
                f"({_reason(error)}). Give another path"
            ) from error


def check_apart(path: Path, sources: Iterable[Path], *, suffix: str, has_folder: bool) -> None:
    """Raise ``ValueError`` where what is written for a PNG could meet a source.

    Args:
        path, suffix, has_folder: as in ``check_output``.
    """
    targets = [path, path.with_suffix(suffix), *([path.with_suffix("")] if has_folder else [])]
    for source in sources:
        for target in targets:
            require_disjoint_paths(target, source, "--output")


def write_or_rescue(path: Path, write: Callable[[Path], None]) -> None:
    """Call ``write(path)``; where the file system fails, write into a temporary folder instead.

    Raises:
        ValueError: in one line that says where the files are.
    """
    try:
        write(path)
    except OSError as error:
        reason = f"{path}: cannot be written ({_reason(error)})"
        try:
            rescued = Path(tempfile.mkdtemp(prefix="rudolph-")) / f"rescued{path.suffix}"
            write(rescued)
        except OSError as second:
            raise ValueError(f"{reason}, nor can a temporary file ({_reason(second)})") from error
        raise ValueError(f"{reason}. All is in {rescued.parent} instead") from error


def write_images(path: Path, candidates: list[Any], told: dict[str, Any], *, alpha: bool) -> None:
    """Write each image with what it was made of, a line of JSON for each, and then the grid.

    They replace all that an earlier call wrote there; other files stay.

    Args:
        path: of the grid, whose name the others take.
        told: prompt, model and parameters.
        alpha: whether single images lose their ground.

    Raises:
        OSError: where the file system fails.
        ValueError: where only the grid cannot be drawn or written.
    """
    import numpy as np

    from rudolph.generation.png import save_png, to_image
    from rudolph.generation.transparency import to_rgba
    from rudolph.reports.image_grids import sample_grid
    from rudolph.reports.style import DrawingError

    folder, images, lines = path.with_suffix(""), [], []
    earlier = earlier_images(folder)
    for place, candidate in enumerate(candidates):
        image = to_image(candidate.image)
        images.append(np.asarray(image))
        file = folder / f"{place:03}.png"
        record = told | {"seed": candidate.seed, "scores": candidate.scores}
        save_png(to_rgba(image) if alpha else image, file, record)
        lines.append(record | {"file": str(file)})
    remove(earlier - {Path(line["file"]) for line in lines})
    write_lines(path.with_suffix(".jsonl"), lines)
    labels = [
        ", ".join(f"{name} {value:.3g}" for name, value in candidate.scores.items())
        or told["prompt"]
        for candidate in candidates
    ]
    try:
        sample_grid(images, labels, path, columns=min(4, len(images)))
    except DrawingError as error:
        remove({path} if earlier else set())
        raise ValueError(f"{error}. The single images are in {folder}") from error
    print_line(f"{path}, {path.with_suffix('.jsonl')} and {len(lines)} images in {folder}")


def write_codes(path: Path, records: list[dict[str, Any]]) -> None:
    """Write image codes where no image could be decoded; images of an earlier call go."""
    write_lines(path, records)
    earlier = earlier_images(path.with_suffix(""))
    # The grid shows them.
    remove(earlier | ({path.with_suffix(".png")} if earlier else set()))


def earlier_images(folder: Path) -> set[Path]:
    """Return the single images that ``write_images`` left in a folder, as far as they tell so."""
    from rudolph.generation.png import has_text_fields

    numbered = (path for path in folder.glob("*.png") if re.fullmatch(r"\d{3,}", path.stem))
    return {path for path in numbered if has_text_fields(path, RECORD_FILE)}


def remove(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """Write a line of JSON for each record."""
    lines = [json_text(record) + "\n" for record in records]
    write_text(path, "".join(lines))


def unsaved_codes(failure: Any, told: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a record for each sample of a failed generation: its seed and its image codes."""
    for seed, indices in zip(failure.seeds, failure.indices.tolist(), strict=True):
        yield told | {"seed": seed, "indices": indices}


def _reason(error: OSError) -> str:
    return (error.strerror or " ".join(str(error).split())).lower()
