"""Results of a speed experiment: every repetition, and profiles of our own implementations.

    <run>/speed/repetitions.csv              one row per repetition of each timed part
    <run>/speed/<implementation>.profile.csv     one row per operation
    results/<experiment>/repetitions.csv     the rows of all runs, with the name of each run
    results/<experiment>/profiles/<run>-<implementation>.csv

The tables of the page are made from these files and ``runs.csv`` alone.
"""

import csv
import io
import json
import re
import shutil
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from rudolph.files.atomic import write_text
from rudolph.reports.markdown import table_row
from rudolph.reports.schema import (
    REPETITION_COLUMNS,
    SPEED_FOLDER,
    TIMINGS_FILE,
    Timing,
    implementation_name,
)

PROFILES = "profiles"
PROFILE_COLUMNS = ("part", "operation", "calls", "milliseconds", "share")
PROFILE_END = ".profile.csv"
OPERATIONS_SHOWN = 12
ROOFLINE_FRACTION = "fraction of the roofline"
ROOFLINE_NOTE = (
    "The `roofline` rows measure the machine's limits: reading memory and multiplying matrices. "
    "The fraction of the roofline is the achieved rate divided by the limit. For decoding, the "
    "rate counts the bytes that each token must read, and the limit is `roofline/read`. "
    "Otherwise, the rate counts operations, and the limit is the fastest matrix product."
)


def write_timings(run_folder: Path, timings: Sequence[Timing]) -> Path:
    """Write the repetitions of one run as CSV and return the path."""
    path = run_folder / SPEED_FOLDER / TIMINGS_FILE
    rows = [list(asdict(timing).values()) for timing in timings]
    return _write(path, REPETITION_COLUMNS, rows)


def write_profile(
    run_folder: Path, implementation: str, rows: Sequence[tuple[str, str, int, float, float]]
) -> Path:
    """Write the operations of one implementation of a run as CSV and return the path.

    Each row has the values of ``PROFILE_COLUMNS`` in their order, and the longest operation comes
    first.  Operations below 0.01 % of the time are left out.
    """
    path = run_folder / SPEED_FOLDER / f"{implementation}{PROFILE_END}"
    kept = [[*row[:3], f"{row[3]:.3f}", f"{row[4]:.4f}"] for row in rows if row[4] >= 1e-4]
    return _write(path, PROFILE_COLUMNS, kept)


def _write(path: Path, head: Sequence[str], rows: Sequence[Sequence[object]]) -> Path:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([head, *rows])
    write_text(path, text.getvalue())
    return path


def export_timings(run_folders: dict[str, Path], folder: Path) -> None:
    """Copy the repetitions and profiles of runs to the results folder of their experiment.

    Args:
        run_folders: folder of each run, keyed by run name.
        folder: results folder of the experiment.
    """
    (folder / TIMINGS_FILE).unlink(missing_ok=True)
    shutil.rmtree(folder / PROFILES, ignore_errors=True)
    tables = []
    for run, run_folder in sorted(run_folders.items()):
        if not (run_folder / SPEED_FOLDER / TIMINGS_FILE).is_file():
            continue
        table = pd.read_csv(
            run_folder / SPEED_FOLDER / TIMINGS_FILE, dtype=str, keep_default_na=False
        )
        table.insert(0, "run", run)
        tables.append(table)
        for path in sorted((run_folder / SPEED_FOLDER).glob(f"*{PROFILE_END}")):
            name = f"{run}-{path.name.removesuffix(PROFILE_END)}.csv"
            (folder / PROFILES).mkdir(exist_ok=True)
            shutil.copyfile(path, folder / PROFILES / name)
    if tables:
        text = pd.concat(tables).to_csv(index=False, lineterminator="\n")
        write_text(folder / TIMINGS_FILE, text)


def is_speed(folder: Path) -> bool:
    """Return whether an experiment's folder holds repetitions."""
    return (folder / TIMINGS_FILE).is_file()


def read_timings(folder: Path) -> pd.DataFrame:
    """Read the ``repetitions.csv`` of an experiment."""
    texts = dict.fromkeys(("run", "implementation", "part", "unit"), str)
    return pd.read_csv(folder / TIMINGS_FILE, dtype=texts, keep_default_na=False)


def speed_tables(folder: Path, runs: pd.DataFrame, rows: Sequence[str]) -> Iterator[str]:
    """Yield Markdown lines: a row per implementation and run, then profiles of our code.

    Args:
        folder: exported folder of the experiment.
        runs: the table ``runs.csv``.
        rows: columns of ``runs.csv`` that distinguish the runs.
    """
    timings = read_timings(folder)
    rows = [row for row in rows if row != "run"] or ["run"]
    head = [*rows, "implementation", "time per unit [min, max]", "units/s"]
    head += ["speedup [95 % CI]", ROOFLINE_FRACTION, "peak MiB", "weights MiB", "cache MiB"]
    lines: list[list[str]] = []
    for record in runs.to_dict("records"):
        run_timings = timings[timings["run"] == record["run"]]
        for (implementation, part), group in run_timings.groupby(
            ["implementation", "part"], sort=False
        ):
            name = implementation_name(implementation, part)
            cells = ["" if pd.isna(record[row]) else str(record[row]) for row in rows]
            cells += [name, *_times(group), *_ratios(record, name)]
            sizes = [group["peak_bytes"].max()]
            sizes += [
                record.get(f"{implementation}/{size}_bytes") for size in ("weights", "cache")
            ]
            lines.append([*cells, *map(mebibytes_text, sizes)])
    shown_columns = [column for column in range(len(head)) if any(line[column] for line in lines)]
    for cells in (head, ["---"] * len(head), *lines):
        yield table_row([cells[column] for column in shown_columns])
    yield ""
    yield (
        f"{timings['repetition'].max() + 1} repetitions, interleaved across implementations; "
        "means are geometric."
    )
    yield from _machines(folder)
    if head.index(ROOFLINE_FRACTION) in shown_columns:
        yield ROOFLINE_NOTE
    for path in sorted((folder / PROFILES).glob("*.csv")):
        yield from _profile(path)


def _machines(folder: Path) -> Iterator[str]:
    """Yield one line per machine that the runs were measured on: processor, threads, instructions.

    Runs that did not record their instructions have no line.
    """
    path = folder / "environment.json"
    records = json.loads(path.read_text("utf-8")) if path.is_file() else []
    machines = [record["machine"] for record in records if "instructions" in record["machine"]]
    lines = {
        f"Measured on {machine['processor']}, {machine['threads']} threads, instructions "
        f"{machine['instructions']}, native products in {', '.join(machine['native_products'])}."
        for machine in machines
    }
    yield from sorted(lines)


def _times(group: pd.DataFrame) -> list[str]:
    times, unit = group["seconds"] / group["units"], group["unit"].iloc[0]
    mean = float(np.exp(np.log(times).mean()))
    mean_text, min_text, max_text = (seconds_text(t) for t in (mean, times.min(), times.max()))
    return [f"{mean_text} [{min_text}, {max_text}] per {unit}", rate_text(1 / mean, unit)]


def _ratios(record: Mapping[Hashable, Any], name: str) -> list[str]:
    names = ("speedup", "speedup_low", "speedup_high", "roofline_fraction")
    ratio, low, high, fraction = (record.get(f"{name}/{suffix}") for suffix in names)
    return [
        "" if pd.isna(ratio) else f"{ratio:.3g} [{low:.3g}, {high:.3g}]",
        "" if pd.isna(fraction) else f"{fraction:.1%}",
    ]


def _profile(path: Path) -> Iterator[str]:
    table = pd.read_csv(path, dtype={"part": str}, keep_default_na=False)
    for part, group in table.groupby("part", sort=False):
        head = ["operation", "calls", "ms", "fraction"]
        yield from ("", f"Profile of `{path.stem}`, {part}:", "")
        yield from (table_row(head), table_row(["---"] * len(head)))
        for row in group.head(OPERATIONS_SHOWN).itertuples():
            name = operation_text(str(row.operation))
            cells = [f"`{name}`", str(row.calls), f"{row.milliseconds:.4g}"]
            yield table_row([*cells, f"{float(str(row.share)):.1%}"])


def operation_text(name: str) -> str:
    """Return a readable name of an operation; torch's compiler names its graphs by a hash.

    >>> operation_text("## Call CompiledFxGraph fzzl6mggzxscwx ##"), operation_text("aten::mm")
    ('compiled layer or product fzzl6m', 'aten::mm')
    """
    return re.sub(r"## Call CompiledFxGraph (\w{6})\w* ##", r"compiled layer or product \1", name)


def seconds_text(seconds: float) -> str:
    """Format seconds with three digits and a fitting unit, as in ``12.3 ms``."""
    for size, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns")):
        if seconds >= size:
            return f"{seconds / size:.3g} {name}"
    return f"{seconds / 1e-12:.3g} ps"


def mebibytes_text(size: Any) -> str:
    """Format a size in bytes as MiB; a missing size is empty."""
    if pd.isna(size):
        return ""
    # Whole MiB from 100 on: with three digits, 999.6 would become 1e+03.
    return f"{size / 2**20:,.0f}" if size >= 100 * 2**20 else f"{size / 2**20:.3g}"


def rate_text(rate: float, unit: str) -> str:
    """Format bytes as ``1.2 GB/s``, operations as ``3.4 TFLOP/s``, other units as a number."""
    if unit not in ("byte", "operation"):
        return f"{rate:.4g} {unit}s"
    short = {"byte": "B/s", "operation": "FLOP/s"}[unit]
    for size, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if rate >= size:
            return f"{rate / size:.3g} {name}{short}"
    return f"{rate:.3g} {short}"
