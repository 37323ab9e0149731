"""Runs given to others: a folder that can be moved, and any tracking server that takes it.

    <folder>/<experiment>/<run>/       journal, configuration, summary, scores, samples, weights
    <folder>/<experiment>/results/     what was exported: tables, figures, the answer

Such a folder lies as ``runs/`` does, so that it is shared again as it is.  A run keeps its key,
by which a server finds it: whatever is sent twice is there once.
"""

import json
import os
import shutil
from pathlib import Path

from rudolph.disk import DAMAGED, write_text
from rudolph.results.journal import JOURNAL, SENT, SentMark, pending_folders, read_header
from rudolph.results.run_files import AGAIN, finished_runs
from rudolph.results.tracking import send_pending, send_results

RESULTS = "results"
WEIGHTS = "checkpoints"
# What belongs to the machine that executed a run.
PARTIAL = ("*.new", "*.part", f"*{DAMAGED}*")
LEFT = (SENT, "*.lock", "*.lock-journal", *PARTIAL, "last.ckpt", "previous.ckpt")


def pack_runs(runs: Path, results: Path, target: Path, *, has_weights: bool) -> list[Path]:
    """Copy the finished runs of an experiment, ``runs/<experiment>``, to a folder; their places.

    What is there already is replaced by what is here.

    Raises:
        ValueError: when no run has finished.
    """
    advice = f"it is left out; {AGAIN}"
    finished = [folder for folder, _ in finished_runs(runs, advice=advice)]
    if not finished:
        raise ValueError(f"{runs}: no finished run to share")
    header = read_header(finished[0] / JOURNAL)
    folder = target / header["experiment"]
    left = LEFT if has_weights else (*LEFT, WEIGHTS)
    for run in finished:
        _copy(run, folder / run.name, left)
        if not has_weights:
            _forget_weights(folder / run.name / JOURNAL)
    if results.is_dir():
        _copy(results, folder / RESULTS, ())
    return [folder / run.name for run in finished]


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
    return {folder.name: SentMark(folder, uri).read()[0] for folder in folders}


def _copy(source: Path, target: Path, left: tuple[str, ...]) -> None:
    """Copy a folder beside its place first, so that what stands there is whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    new = target.with_name(f".{target.name}.part")
    shutil.rmtree(new, ignore_errors=True)
    shutil.copytree(source, new, ignore=shutil.ignore_patterns(*left))
    shutil.rmtree(target, ignore_errors=True)
    os.replace(new, target)


def _forget_weights(journal: Path) -> None:
    """Leave out what a server would be told of files that were not copied."""
    lines = journal.read_text("utf-8").splitlines(keepends=True)
    kept = [line for line in lines if not _is_of_weights(json.loads(line))]
    write_text(journal, "".join(kept))


def _is_of_weights(record: dict[str, str]) -> bool:
    return record["kind"] == "artifact" and record["path"].startswith(f"{WEIGHTS}/")
