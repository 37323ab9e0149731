"""Reading and checking the files of a run, to decide whether the run counts as finished.

A run is finished if its ``summary.json`` says so and the files that results are made from can be
read.  A damaged file is named in a one-line warning, and the run counts as unfinished.
Executing its experiment again then recreates the file.
"""

import csv
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from rudolph.files.atomic import DamagedFileError, naming_file, warn_once
from rudolph.reports.schema import (
    CARD,
    CARD_COLUMNS,
    OVERHEAD,
    REPETITION_COLUMNS,
    SPEED_FOLDER,
    TIMINGS_FILE,
    format_cell_value,
)
from rudolph.tracking.event_log import read_event_log, read_header
from rudolph.tracking.run_directory import RunDirectory, started_runs

RERUN_ADVICE = "run its experiment again to repair it"
FIXED = ("run", "variant", "seed", "digest", "commit", "dirty", "seconds")


def finished_summary(folder: Path, *, advice: str = RERUN_ADVICE) -> dict[str, Any] | None:
    """Return the summary of a finished run whose files are intact, else None.

    A damaged file is named in a warning.

    Args:
        folder: folder of the run.
        advice: end of the warning, after the file and its fault.
    """
    directory = RunDirectory(folder)
    if not directory.summary.exists():
        return None
    try:
        summary = directory.read_summary()
        if summary["status"] != "finished":
            return None
        check_files(directory, summary)
    except FileNotFoundError as error:
        warn_once(f"{error.filename}: is missing; the run counts as unfinished, {advice}")
    except OSError as error:
        reason = str(error.strerror).lower()
        warn_once(f"{error.filename}: {reason}; the run counts as unfinished, {advice}")
    except DamagedFileError as error:
        warn_once(f"{error}; the run counts as unfinished, {advice}")
    else:
        return summary
    return None


def finished_row(folder: Path) -> dict[str, Any] | None:
    """Return a run's row with numbers as ``runs.csv`` rounds them; None if it has not finished."""
    summary = finished_summary(folder)
    if summary is None:
        return None
    return {
        name: float(format_cell_value(value)) if isinstance(value, float) else value
        for name, value in run_row(summary).items()
    }


def run_row(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row of ``runs.csv`` of a finished run, from its summary."""
    row = {name: summary[name] for name in FIXED[:-1]}
    row |= {"seconds": float(sum(summary["seconds"].values()))}
    if OVERHEAD in summary["seconds"]:
        row[OVERHEAD] = summary["seconds"][OVERHEAD]
    row |= summary.get("grid", {}) | summary["metrics"]
    for name, (low, high) in summary.get("intervals", {}).items():
        row |= {f"{name}_low": low, f"{name}_high": high}
    for bound in ("chance", "target"):
        row |= {f"{name}_{bound}": value for name, value in summary.get(bound, {}).items()}
    return row


def finished_runs(runs: Path, *, advice: str = RERUN_ADVICE) -> list[tuple[Path, dict[str, Any]]]:
    """Return folder and summary of each finished, intact run directly below a folder.

    Args:
        runs: the folder that holds the runs.
        advice: end of a warning about a damaged file, see ``finished_summary``.
    """
    folders = [directory.path for directory in started_runs(runs)]
    summaries = [(folder, finished_summary(folder, advice=advice)) for folder in folders]
    return [(folder, summary) for folder, summary in summaries if summary is not None]


def check_files(directory: RunDirectory, summary: Mapping[str, Any]) -> None:
    """Check the files that results are made from.

    Args:
        directory: files of the run.
        summary: content of its ``summary.json``.

    Raises:
        DamagedFileError: for the first damaged file.
        OSError: for the first file that is missing or cannot be read.
    """
    directory.read_environment()
    if read_header(directory.event_log)["digest"] != summary["digest"]:
        raise DamagedFileError(directory.event_log, "it belongs to another run")
    for _ in read_event_log(directory.event_log):
        # Reading a record checks it.
        pass
    check_config(directory.config)
    check_table(directory.path / CARD, CARD_COLUMNS, numbers=("value", "low", "high", "count"))
    check_table(
        directory.path / SPEED_FOLDER / TIMINGS_FILE,
        REPETITION_COLUMNS,
        numbers=("seconds", "units", "peak_bytes"),
    )


def check_config(path: Path) -> None:
    """Check that a ``config.yaml`` is text and not cut off; its keys are not read.

    Raises:
        DamagedFileError: if the file is empty, is not text or is cut off.
    """
    with naming_file(path):
        content = path.read_bytes()
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise DamagedFileError(path, f"not UTF-8 at byte {error.start}") from error
    if not text.strip():
        raise DamagedFileError(path, "empty")
    if not text.endswith("\n") or "\0" in text:
        raise DamagedFileError(path, "cut off or overwritten")


def check_table(path: Path, columns: Collection[str], *, numbers: Collection[str]) -> None:
    """Check the columns and numbers of a CSV file, if it exists.

    Args:
        path: the CSV file.
        columns: columns that it must have.
        numbers: columns whose values must be numbers.

    Raises:
        DamagedFileError: if a column is missing or a row is malformed.
    """
    if not path.exists():
        return
    try:
        with naming_file(path), path.open(encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file, strict=True)
            if not set(columns) <= set(rows.fieldnames or ()):
                raise DamagedFileError(path, f"expected the columns {', '.join(columns)}")
            for row in rows:
                if None in row or None in row.values():
                    raise ValueError("a row with another number of columns")
                for name in numbers:
                    float(row[name])
    except DamagedFileError:
        raise
    except (ValueError, csv.Error) as error:
        raise DamagedFileError(path, f"no such table: {' '.join(str(error).split())[:80]}") from (
            error
        )
