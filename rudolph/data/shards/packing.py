"""Packing of pairs into shards: resumable, by several workers, in memory that does not grow.

The shards of a part depend on the part alone.  So any number of workers and any interruption give
the same files.  A part whose record and shards are intact is not packed again.
"""

import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rudolph.data.datasets.manifests import (
    ManifestEntry,
    examine_row,
    forget_examined_images,
    split_of_image,
)
from rudolph.data.datasets.tables import ManifestConfig
from rudolph.data.image_files import RowReport
from rudolph.data.pairs import HASH_SPLITS
from rudolph.data.shards.layout import (
    BATCH_ROWS,
    DATASET,
    PARTS,
    SHARD_VERSION,
    PartRecord,
    Shard,
    row_schema,
    shards_digest,
)
from rudolph.data.shards.sources import SourcePart, open_source
from rudolph.files.atomic import DamagedFileError, file_sha256, naming_file, write_json

# A partial folder of this age was left by a killed process.
SECONDS_TO_ABANDON = 3600

Progress = Callable[[int, int], None]


def pack_pairs(
    config: ManifestConfig, folder: Path, *, num_workers: int = 1, progress: Progress | None = None
) -> RowReport:
    """Pack the pairs of a table or of img2dataset's archives and return the report of all rows.

    Args:
        config: Path and columns of the source.  ``max_bad_fraction`` is applied to all rows.
        folder: Folder to write: new, empty, or with packed pairs, whose intact parts are kept.
        num_workers: Number of processes.
        progress: Called with (finished parts, all parts).

    Raises:
        ValueError: If the source cannot be read, too many rows are bad, or the folder holds other
            files.
    """
    source = open_source(config)
    _require_own_folder(folder)
    report, splits = RowReport(), {name: list[Shard]() for name in HASH_SPLITS}
    jobs = ((part, config, folder) for part in source.parts())
    for done, record in enumerate(_records(jobs, num_workers), start=1):
        report.add(record.report)
        for shard in record.shards:
            splits[shard.name.partition("/")[0]].append(shard)
        if progress is not None:
            progress(done, source.num_parts)
    report.require_usable(config.path, max_bad_fraction=config.max_bad_fraction)
    _write_dataset(folder, splits, report)
    _remove_others(folder, source.num_parts, splits)
    return report


def faults_of_shards(folder: Path, splits: dict[str, list[Shard]]) -> Iterator[str]:
    """Yield one line per shard, an empty one if it is intact."""
    for shards in splits.values():
        for shard in shards:
            error = shard.error(folder)
            yield error and f"{folder / shard.name}: {error}"


def _records(
    jobs: Iterator[tuple[SourcePart, ManifestConfig, Path]], num_workers: int
) -> Iterator[PartRecord]:
    """Yield the record of each part in order; a few parts are in memory at a time."""
    if num_workers == 1:
        for job in jobs:
            yield _pack_part(*job)
        return
    with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
        waiting: deque[Future[PartRecord]] = deque()
        try:
            for job in jobs:
                waiting.append(pool.submit(_pack_part, *job))
                if len(waiting) > 2 * num_workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _pack_part(part: SourcePart, config: ManifestConfig, folder: Path) -> PartRecord:
    """Return the record of a part, packed now unless its files are intact."""
    path = folder / PARTS / f"{part.number:05d}.json"
    known = _known_record(path, part, folder)
    if known is not None:
        return known
    report = RowReport()
    # Only complete files get their names.
    partial = folder / PARTS / f"{part.number:05d}.{os.getpid()}.new"
    partial.mkdir(parents=True, exist_ok=True)
    try:
        counts = _write_rows(_entries(part, config, report), partial)
        shards = [_publish(folder, partial, name, part.number, rows) for name, rows in counts]
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        forget_examined_images()
    record = PartRecord(part.digest, shards, report)
    write_json(path, record.to_json())
    return record


def _known_record(path: Path, part: SourcePart, folder: Path) -> PartRecord | None:
    """Return the record of a part if it and all of its shards are intact."""
    try:
        record = PartRecord.read(path)
    except (DamagedFileError, FileNotFoundError):
        return None
    is_same = record.source == part.digest
    return record if is_same and not any(s.error(folder) for s in record.shards) else None


def _entries(
    part: SourcePart, config: ManifestConfig, report: RowReport
) -> Iterator[ManifestEntry]:
    """Yield the usable rows of a part and count all of them."""
    for row in part.table_rows():
        entry = examine_row(row, part.folder, config, report)
        if entry is not None:
            yield entry


def _write_rows(entries: Iterator[ManifestEntry], partial: Path) -> list[tuple[str, int]]:
    """Write the rows of each split to its file; return split and number of rows of each file."""
    import pyarrow

    rows: dict[str, list[dict[str, Any]]] = {}
    writers: dict[str, Any] = {}
    counts = dict.fromkeys(HASH_SPLITS, 0)
    with ExitStack() as stack:

        def write(name: str) -> None:
            if name not in writers:
                sink = stack.enter_context(pyarrow.OSFile(str(partial / name), "wb"))
                writers[name] = stack.enter_context(pyarrow.ipc.new_file(sink, row_schema()))
            with naming_file(partial / name):
                batch = pyarrow.RecordBatch.from_pylist(rows.pop(name), schema=row_schema())
                writers[name].write_batch(batch)

        for entry in entries:
            name = split_of_image(entry.sha256)
            rows.setdefault(name, []).append(_row(entry))
            counts[name] += 1
            if len(rows[name]) == BATCH_ROWS:
                write(name)
        for name in [*rows]:
            write(name)
    return [(name, number) for name, number in counts.items() if number]


def _row(entry: ManifestEntry) -> dict[str, Any]:
    return {
        "key": entry.key,
        "caption": entry.caption,
        "question": entry.question,
        "image": entry.data(),
        "sha256": bytes.fromhex(entry.sha256),
    }


def _publish(folder: Path, partial: Path, split: str, number: int, rows: int) -> Shard:
    """Give a complete file its name and return its shard."""
    name = f"{split}/{number:05d}.arrow"
    with naming_file(folder / name, written=partial / split):
        with (partial / split).open("rb") as file:
            os.fsync(file.fileno())
        digest = file_sha256(partial / split)
        (folder / split).mkdir(exist_ok=True)
        os.replace(partial / split, folder / name)
    return Shard(name, rows, digest)


def _write_dataset(folder: Path, splits: dict[str, list[Shard]], report: RowReport) -> None:
    content = {
        "version": SHARD_VERSION,
        "rows": {name: sum(shard.rows for shard in shards) for name, shards in splits.items()},
        "digests": {name: shards_digest(shards) for name, shards in splits.items()},
        "skipped": {reason: tally.count for reason, tally in report.skipped.items()},
        "splits": {name: [vars(shard) for shard in shards] for name, shards in splits.items()},
    }
    write_json(folder / DATASET, content)


def _require_own_folder(folder: Path) -> None:
    """Raise ``ValueError`` if a folder holds files that packing does not write."""
    own = {DATASET, PARTS, *HASH_SPLITS}
    others = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    others = [name for name in others if name not in own and not name.startswith(DATASET)]
    if others:
        raise ValueError(f"{folder}: expected an empty folder or packed pairs, got {others[0]}")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder, got a file")


def _remove_others(folder: Path, num_parts: int, splits: dict[str, list[Shard]]) -> None:
    """Remove what an earlier source with more parts, or a killed process, left."""
    names = {shard.name for shards in splits.values() for shard in shards}
    kept = {folder / name for name in names}
    kept |= {folder / PARTS / f"{number:05d}.json" for number in range(num_parts)}
    for each in (PARTS, *HASH_SPLITS):
        for path in sorted((folder / each).glob("*")):
            if path.is_dir():
                # Another process may be packing into this folder.
                if time.time() - path.stat().st_mtime > SECONDS_TO_ABANDON:
                    shutil.rmtree(path, ignore_errors=True)
            elif path not in kept:
                path.unlink()
