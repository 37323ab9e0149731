"""Output files of generate and caption, checked before sampling and rescued from disk errors."""

import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from rudolph.files.atomic import json_text, require_disjoint_paths, write_text
from rudolph.runs.console import print_line

# The probe file is not empty, because a full disk still accepts empty files.
PROBE = b"0" * 4096
# Text fields in the metadata of each generated PNG.
RECORD_FILE = ("prompt", "model", "parameters", "seed", "scores")


def check_output(path: Path, *, suffix: str, has_folder: bool = False) -> None:
    """Check that a PNG, its text file and single images can be written.

    Args:
        path: Path of the PNG.
        suffix: Suffix of the text file next to it.
        has_folder: Whether single images go into a folder with the PNG's name.

    Raises:
        ValueError: If one of them cannot be written.
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
        nearest = next(parent for parent in (folder, *folder.parents) if os.path.lexists(parent))
        if not nearest.is_dir():
            raise ValueError(
                f"--output: expected the folder {folder}, got the file {nearest}. "
                "Give another name"
            )
        try:
            with tempfile.TemporaryFile(dir=nearest) as probe:
                probe.write(PROBE)
        except OSError as error:
            raise ValueError(
                f"--output: expected a folder that can be written, got {nearest} "
                f"({_error_text(error)}). Give another path"
            ) from error


def check_apart(path: Path, sources: Iterable[Path], *, suffix: str, has_folder: bool) -> None:
    """Check that the output files do not overlap the inputs.

    Args:
        path: Path of the PNG.
        sources: Files and folders that the command reads.
        suffix: Suffix of the text file next to the PNG.
        has_folder: Whether single images go into a folder with the PNG's name.

    Raises:
        ValueError: If an output could overwrite an input.
    """
    targets = [path, path.with_suffix(suffix), *([path.with_suffix("")] if has_folder else [])]
    for source in sources:
        for target in targets:
            require_disjoint_paths(target, source, "--output")


def write_or_rescue(path: Path, write: Callable[[Path], None]) -> None:
    """Call ``write(path)``; if the file system fails, write to a temporary folder instead.

    Raises:
        ValueError: If ``path`` cannot be written; the message names the temporary folder.
    """
    try:
        write(path)
    except OSError as error:
        reason = f"{path}: cannot be written ({_error_text(error)})"
        try:
            rescued = Path(tempfile.mkdtemp(prefix="rudolph-")) / f"rescued{path.suffix}"
            write(rescued)
        except OSError as second_error:
            raise ValueError(
                f"{reason}, nor can a temporary file ({_error_text(second_error)})"
            ) from error
        raise ValueError(f"{reason}. The files are in {rescued.parent} instead") from error


def write_images(
    path: Path, candidates: list[Any], prompt_record: dict[str, Any], *, alpha: bool
) -> None:
    """Write single images with metadata, one JSON line per image, and the grid.

    Files of an earlier call are replaced; other files are kept.

    Args:
        path: Path of the grid; the other files are named after it.
        candidates: The images with their seeds and scores.
        prompt_record: Prompt, model and parameters.
        alpha: Whether to make the background of single images transparent.

    Raises:
        OSError: If the file system fails.
        ValueError: If the grid cannot be drawn or written, but every image was.
    """
    import numpy as np

    from rudolph.generation.png import save_png, to_image
    from rudolph.generation.transparency import to_rgba
    from rudolph.reports.image_grids import sample_grid
    from rudolph.reports.style import DrawingError

    folder, images, lines = path.with_suffix(""), [], []
    earlier_files = earlier_images(folder)
    for index, candidate in enumerate(candidates):
        image = to_image(candidate.image)
        images.append(np.asarray(image))
        file = folder / f"{index:03}.png"
        record = prompt_record | {"seed": candidate.seed, "scores": candidate.scores}
        save_png(to_rgba(image) if alpha else image, file, record)
        lines.append(record | {"file": str(file)})
    remove(earlier_files - {Path(line["file"]) for line in lines})
    write_lines(path.with_suffix(".jsonl"), lines)
    labels = [
        ", ".join(f"{name} {value:.3g}" for name, value in candidate.scores.items())
        or prompt_record["prompt"]
        for candidate in candidates
    ]
    try:
        sample_grid(images, labels, path, columns=min(4, len(images)))
    except DrawingError as error:
        remove({path} if earlier_files else set())
        raise ValueError(f"{error}. The single images are in {folder}") from error
    print_line(f"{path}, {path.with_suffix('.jsonl')} and {len(lines)} images in {folder}")


def write_codes(path: Path, records: list[dict[str, Any]]) -> None:
    """Write image codes when decoding failed, and remove the images of an earlier call."""
    write_lines(path, records)
    earlier_files = earlier_images(path.with_suffix(""))
    # The grid is removed too, because it shows the removed images.
    remove(earlier_files | ({path.with_suffix(".png")} if earlier_files else set()))


def earlier_images(folder: Path) -> set[Path]:
    """Return the images in a folder whose metadata show that ``write_images`` wrote them."""
    from rudolph.generation.png import has_text_fields

    numbered = (path for path in folder.glob("*.png") if re.fullmatch(r"\d{3,}", path.stem))
    return {path for path in numbered if has_text_fields(path, RECORD_FILE)}


def remove(paths: Iterable[Path]) -> None:
    """Remove files that may already be missing."""
    for path in paths:
        path.unlink(missing_ok=True)


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """Write one line of JSON per record."""
    lines = [json_text(record) + "\n" for record in records]
    write_text(path, "".join(lines))


def unsaved_codes(failure: Any, record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a record with seed and image codes per sample of a failed generation."""
    for seed, indices in zip(failure.seeds, failure.indices.tolist(), strict=True):
        yield record | {"seed": seed, "indices": indices}


def _error_text(error: OSError) -> str:
    return (error.strerror or " ".join(str(error).split())).lower()
