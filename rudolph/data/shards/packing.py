"""Packing of pairs into shards: resumable, by several workers, in memory that does not grow.

The shards of a part depend on the part alone.  So any number of workers and any interruption give
the same files.  A part whose record and shards are intact is not packed again.
"""

import os
import re
import shutil
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
from rudolph.data.shards.sources import Source, SourcePart
from rudolph.files.atomic import (
    DamagedFileError,
    file_sha256,
    naming_file,
    require_disjoint_paths,
    write_json,
)

# Held while a folder is written.
LOCK = "packing.lock"
# The files that packing writes; only these are ever removed.
OWN_NAMES = re.compile(
    rf"({re.escape(DATASET)}|{PARTS}/\d{{5,}}\.json)(\.\d+\.new)?|{PARTS}/\d{{5,}}\.\d+\.new"
    rf"|({'|'.join(HASH_SPLITS)})/\d{{5,}}-[0-9a-f]{{8}}\.arrow|{re.escape(LOCK)}(-journal)?"
)

Progress = Callable[[int, int], None]


def pack_pairs(
    source: Source, folder: Path, *, num_workers: int = 1, progress: Progress | None = None
) -> RowReport:
    """Pack the pairs of a table or of img2dataset's archives and return the report of all rows.

    Args:
        source: What ``open_source`` returns.  ``max_bad_fraction`` is applied to all rows.
        folder: Folder to write: new, empty, or with packed pairs, whose intact parts are kept.
        num_workers: Number of processes.
        progress: Called with (finished parts, all parts).

    Raises:
        ValueError: If the source cannot be read, too many rows are bad, or the folder holds other
            files.
    """
    config = source.config
    require_disjoint_paths(folder, Path(config.path), "FOLDER")
    require_own_folder(folder)
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
        shards = [_publish(folder, partial, name, part, rows) for name, rows in counts]
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


def _publish(folder: Path, partial: Path, split: str, part: SourcePart, rows: int) -> Shard:
    """Give a complete file its name and return its shard.

    The name has the digest of the part, so packing again keeps the shards of ``dataset.json``
    until that file is replaced.
    """
    name = f"{split}/{part.number:05d}-{part.digest[:8]}.arrow"
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


def require_own_folder(folder: Path) -> None:
    """Raise ``ValueError`` if a folder holds anything that packing does not write."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder, got a file")
    for path in _entries_of(folder):
        if not OWN_NAMES.fullmatch(path.relative_to(folder).as_posix()):
            raise ValueError(
                f"{folder}: expected an empty folder or packed pairs, got "
                f"{path.relative_to(folder)}"
            )


def _entries_of(folder: Path) -> Iterator[Path]:
    """Yield the entries of a folder, and those of the folders that packing writes."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name in (PARTS, *HASH_SPLITS) and path.is_dir():
            yield from sorted(path.iterdir())
        else:
            yield path


def _remove_others(folder: Path, num_parts: int, splits: dict[str, list[Shard]]) -> None:
    """Remove what an earlier source or a killed process left; other files stay."""
    kept = {shard.name for shards in splits.values() for shard in shards}
    kept |= {f"{PARTS}/{number:05d}.json" for number in range(num_parts)}
    for path in _entries_of(folder):
        name = path.relative_to(folder).as_posix()
        if name in kept or path.parent == folder or not OWN_NAMES.fullmatch(name):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
