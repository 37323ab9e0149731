"""Runs given to others: a folder that can be moved, and any tracking server that takes it.

    <folder>/<experiment>/<run>/       journal, configuration, summary, scores, samples, weights
    <folder>/<experiment>/results/     what was exported: tables, figures, the answer

Such a folder lies as ``runs/`` does, so that it is shared again as it is.  A run keeps its key,
by which a server finds it: whatever is sent twice is there once.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rudolph.files.atomic import DAMAGED, DamagedFileError, require_apart, write_atomic
from rudolph.reports.run_files import AGAIN, finished_runs
from rudolph.tracking.event_log import JOURNAL, SENT, SendMarker, pending_folders, read_header
from rudolph.tracking.tracker import send_pending, send_results

RESULT_FILES = "results"
WEIGHT_PATTERNS = "checkpoints"
# Files that belong to the machine on which a run was executed.
PARTIAL = ("*.new", "*.part", f"*{DAMAGED}*")
LEFT = (SENT, "*.lock", "*.lock-journal", *PARTIAL, "last.ckpt", "previous.ckpt")


def pack_runs(runs: Path, results: Path, target: Path, *, has_weights: bool) -> list[Path]:
    """Copy the finished runs of an experiment, ``runs/<experiment>``, to a folder; their places.

    What is there already is replaced by what is here, once all copies are whole: a failure or an
    interruption leaves what was there.

    Raises:
        ValueError: when no run has finished, or where the copies would meet what is copied.
    """
    advice = f"it is left out; {AGAIN}"
    finished = [folder for folder, _ in finished_runs(runs, advice=advice)]
    if not finished:
        raise ValueError(f"{runs}: no finished run to share")
    sources = {folder.name: folder for folder in finished}
    if results.is_dir():
        sources[RESULT_FILES] = results
    folder = _place(target, finished[0] / JOURNAL)
    for source in (runs, *sources.values()):
        require_apart(folder, source, "--to")
    left = LEFT if has_weights else (*LEFT, WEIGHT_PATTERNS)
    with _exchanged(folder) as new:
        for name, source in sources.items():
            ignored = () if name == RESULT_FILES else left
            shutil.copytree(source, new / name, ignore=shutil.ignore_patterns(*ignored))
            if not has_weights and name != RESULT_FILES:
                _forget_weights(new / name / JOURNAL)
    return [folder / run.name for run in finished]


def _place(target: Path, journal: Path) -> Path:
    """Return the folder of an experiment below ``target``, by the journal of one of its runs."""
    name = read_header(journal)["experiment"]
    parts = Path(name).parts
    if not parts or ".." in parts or Path(name).is_absolute():
        raise DamagedFileError(journal, f"no name of an experiment, {name[:40]!r}")
    return target.joinpath(*parts)


def send_runs(runs: Path, results: Path, uri: str) -> dict[str, str]:
    """Send the runs in a folder to a server: the id that each has there, by its folder's name.

    Args:
        results: what was exported of the experiment; a folder that is not there is nothing.

    Raises:
        ValueError: when there is no run, or the server did not take all.
    """
    folders = pending_folders(runs, None)
    if not folders:
        raise ValueError(f"{runs}: no run to share")
    waiting = send_pending(runs, uri).waiting
    if waiting:
        raise ValueError(f"{uri}: {waiting} of {len(folders)} runs were not taken")
    header = read_header(folders[0] / JOURNAL)
    if results.is_dir() and not send_results(header["experiment"], results, uri):
        raise ValueError(f"{uri}: {results} was not taken")
    return {folder.name: SendMarker(folder, uri).read()[0] for folder in folders}


@contextmanager
def _exchanged(folder: Path) -> Iterator[Path]:
    """Yield an empty folder whose entries take their places in ``folder`` when all are whole.

    Only renames happen there; where one fails, what was there comes back.
    """
    scratch = folder.with_name(f".{folder.name}.part")
    new, before = scratch / "new", scratch / "before"
    _restore(before, folder)
    shutil.rmtree(scratch, ignore_errors=True)
    new.mkdir(parents=True)
    before.mkdir()
    moved: list[str] = []
    try:
        yield new
        folder.mkdir(exist_ok=True)
        for name in sorted(os.listdir(new)):
            if os.path.lexists(folder / name):
                os.replace(folder / name, before / name)
            os.replace(new / name, folder / name)
            moved.append(name)
    except BaseException:
        for name in moved:
            os.replace(folder / name, new / name)
        _restore(before, folder)
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _restore(before: Path, folder: Path) -> None:
    """Put back what was moved away and has nothing in its place; a killed process may leave it."""
    for name in os.listdir(before) if before.is_dir() else ():
        if not os.path.lexists(folder / name):
            os.replace(before / name, folder / name)


def _forget_weights(journal: Path) -> None:
    """Leave out what a server would be told of files that were not copied."""
    # A line ends with a line feed alone: texts may hold U+2028, which other splitters end at.
    lines = journal.read_bytes().split(b"\n")
    kept = [line for line in lines[:-1] if not _is_of_weights(json.loads(line))]
    write_atomic(journal, lambda new: new.write_bytes(b"".join(line + b"\n" for line in kept)))


def _is_of_weights(record: dict[str, str]) -> bool:
    return record["kind"] == "artifact" and record["path"].startswith(f"{WEIGHT_PATTERNS}/")
