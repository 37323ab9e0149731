"""Sharing of runs: as a folder that can be moved, or through a tracking server.

    <folder>/<experiment>/<run>/       event log, configuration, summary, scores, samples, weights
    <folder>/<experiment>/results/     what was exported: tables, figures, the answer, index.html

The folder has the layout of ``runs/``, so it can be shared again as it is.  A run keeps the key by
which a server finds it, so a run that is sent twice is stored once.
"""

import json
import shutil
from pathlib import Path

from rudolph.files.atomic import (
    DAMAGED,
    DamagedFileError,
    explain_os_error,
    require_disjoint_paths,
    swapped_in,
    warn_once,
    write_atomic,
)
from rudolph.reports.run_files import RERUN_ADVICE, finished_runs
from rudolph.reports.site import write_single_page
from rudolph.tracking.event_log import SENT, SendMarker, pending_folders, read_header
from rudolph.tracking.run_directory import CHECKPOINTS, RunDirectory
from rudolph.tracking.tracker import send_pending, send_results

RESULT_FILES = "results"
# Files that belong to the machine on which a run was executed.
PARTIAL = ("*.new", "*.part", f"*{DAMAGED}*")
NOT_COPIED = (SENT, "*.lock", "*.lock-journal", *PARTIAL, "last.ckpt", "previous.ckpt")


def pack_runs(runs: Path, results: Path, target: Path, *, has_weights: bool) -> list[Path]:
    """Copy the finished runs of an experiment to a folder and return the paths of the copies.

    Existing copies are replaced once all new copies are complete.  A failure or an interruption
    leaves the existing copies unchanged.

    Args:
        runs: ``runs/<experiment>``.
        results: exported results of the experiment, copied if they exist.
        target: the folder to copy to.
        has_weights: whether checkpoints are copied too.

    Raises:
        ValueError: if no run has finished, or the target overlaps with what is copied.
    """
    advice = f"it is skipped; {RERUN_ADVICE}"
    finished = [folder for folder, _ in finished_runs(runs, advice=advice)]
    if not finished:
        raise ValueError(f"{runs}: no finished run to share")
    sources = {folder.name: folder for folder in finished}
    if results.is_dir():
        sources[RESULT_FILES] = results
    folder = _target_folder(target, RunDirectory(finished[0]).event_log)
    for source in (runs, *sources.values()):
        require_disjoint_paths(folder, source, "--to")
    not_copied = NOT_COPIED if has_weights else (*NOT_COPIED, CHECKPOINTS)
    with swapped_in(folder) as new:
        for name, source in sources.items():
            ignored = () if name == RESULT_FILES else not_copied
            shutil.copytree(source, new / name, ignore=shutil.ignore_patterns(*ignored))
            if not has_weights and name != RESULT_FILES:
                _forget_weights(RunDirectory(new / name).event_log)
        if results.is_dir():
            _write_page_unless_damaged(results, new / RESULT_FILES)
    return [folder / run.name for run in finished]


def _write_page_unless_damaged(results: Path, target: Path) -> None:
    """Write the page of exported results; leave it out with a warning if they are damaged."""
    try:
        write_single_page(results, target)
    except OSError as error:
        warn_once(f"{explain_os_error(error)}; its page is left out")
    except ValueError as error:
        warn_once(f"{error}; its page is left out")


def _target_folder(target: Path, journal: Path) -> Path:
    """Return the folder below ``target`` of the experiment that an event log belongs to."""
    name = read_header(journal)["experiment"]
    path_parts = Path(name).parts
    if not path_parts or ".." in path_parts or Path(name).is_absolute():
        raise DamagedFileError(journal, f"expected the name of an experiment, got {name[:40]!r}")
    return target.joinpath(*path_parts)


def send_runs(runs: Path, results: Path, uri: str) -> dict[str, str]:
    """Send the runs of a folder to a server; return the ids there, keyed by folder name.

    Args:
        runs: the folder that holds the runs.
        results: exported results of the experiment, sent if they exist.
        uri: address of the server.

    Raises:
        ValueError: if there is no run, or the server did not take all of them.
    """
    folders = pending_folders(runs, None)
    if not folders:
        raise ValueError(f"{runs}: no run to share")
    waiting = send_pending(runs, uri).waiting
    if waiting:
        raise ValueError(f"{uri}: {waiting} of {len(folders)} runs were not accepted")
    header = read_header(RunDirectory(folders[0]).event_log)
    if results.is_dir() and not send_results(header["experiment"], results, uri):
        raise ValueError(f"{uri}: {results} was not accepted")
    return {folder.name: SendMarker(folder, uri).read()[0] for folder in folders}


def _forget_weights(journal: Path) -> None:
    """Remove the records of weights, which are not copied, from an event log."""
    # Only a line feed ends a line: ``splitlines`` would also split at U+2028 within texts.
    lines = journal.read_bytes().split(b"\n")
    kept = [line for line in lines[:-1] if not _is_of_weights(json.loads(line))]
    write_atomic(journal, lambda new: new.write_bytes(b"".join(line + b"\n" for line in kept)))


def _is_of_weights(record: dict[str, str]) -> bool:
    return record["kind"] == "artifact" and record["path"].startswith(f"{CHECKPOINTS}/")
