"""The event log of a run: one JSON line per tracking call, in the run's own folder.

It is written before anything is sent anywhere, so a run's curves outlive any tracking server.
Each record has a ``kind``, a ``time`` in milliseconds and these fields:

    run       experiment, run, digest, key (of the MLflow run); always the first line
    status    status: running, finished or failed
    metrics   step, metrics: name -> number, or "nan", "inf", "-inf"
    params    params: flattened name -> text
    tags      tags: name -> text
    artifact  path (relative if inside the run's folder), folder (in MLflow)
"""

import errno
import json
import re
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from rudolph.files.atomic import (
    DamagedFileError,
    naming_file,
    read_mapping,
    rename_damaged,
    warn_once,
    write_all,
    write_atomic,
    write_json,
)

JOURNAL = "journal.jsonl"
SENT = "journal.sent"
VALUE_KINDS = ("metrics", "params", "tags")
VALUES_IN_BATCH = 1000
# The fields of each kind of record besides ``kind`` and ``time``.
FIELDS: dict[str, dict[str, type]] = {
    "run": {"experiment": str, "run": str, "digest": str, "key": str},
    "status": {"status": str},
    "metrics": {"step": int, "metrics": dict},
    "params": {"params": dict},
    "tags": {"tags": dict},
    "artifact": {"path": str, "folder": str},
}
STATUSES = ("running", "finished", "failed")
LARGEST_INTEGER = 2**63 - 1


def flatten(parameters: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """Flatten nested parameters to ``a.b.c`` -> text; a value other than a string becomes JSON.

    >>> flatten({"model": {"num_layers": 2, "dropout": None}, "mask": ["row", "conv"]})
    {'model.num_layers': '2', 'model.dropout': 'null', 'mask': '["row", "conv"]'}
    """
    flat: dict[str, str] = {}
    for name, value in parameters.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        elif isinstance(value, str):
            flat[f"{prefix}{name}"] = value
        else:
            flat[f"{prefix}{name}"] = json.dumps(value, ensure_ascii=False, default=str)
    return flat


def read_event_log(path: Path, offset: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the complete records from byte ``offset`` on, each with the offset of its end.

    Metric values are converted to floats.  A last line that a crash cut off is left out.

    Raises:
        DamagedFileError: at a line that is not a record.
    """
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            try:
                record = parse_record(line)
            except (ValueError, TypeError, RecursionError) as error:
                reason = f"expected a record at byte {offset}, got {_one_line(error)}"
                raise DamagedFileError(path, reason) from error
            offset += len(line)
            yield offset, record


def parse_record(line: bytes) -> dict[str, Any]:
    """Return the record in a line.

    Raises:
        ValueError: if it is not a record.
        TypeError: if a value has an illegal type.
    """
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError(f"expected a mapping, got {type(record).__name__}")
    fields = FIELDS.get(str(record.get("kind")))
    if fields is None:
        raise ValueError(f"unknown kind {record.get('kind')!r}")
    for name, kind in {"time": int, **fields}.items():
        value = record.get(name)
        if not isinstance(value, kind):
            raise ValueError(f"{name} must be of type {kind.__name__}")
        if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
            raise ValueError(f"{name} is too large")
    if record["kind"] == "status" and record["status"] not in STATUSES:
        raise ValueError(f"unknown status {record['status']!r}")
    if record["kind"] == "metrics":
        record["metrics"] = {name: float(v) for name, v in record["metrics"].items()}
    elif record["kind"] in VALUE_KINDS:
        for value in record[record["kind"]].values():
            if not isinstance(value, str):
                raise ValueError(f"values of {record['kind']} must be text")
    return record


def read_header(path: Path) -> dict[str, Any]:
    """Return the first record of an event log, which identifies its run.

    Raises:
        DamagedFileError: if the first line is not such a record.
    """
    _, record = next(read_event_log(path), (0, {"kind": "nothing"}))
    if record["kind"] != "run":
        raise DamagedFileError(path, f"expected a header, got {record['kind']}")
    return record


def read_batches(path: Path, offset: int) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Yield records in batches of about 1000 values, each with the offset of its end.

    A record without values (artifact, status) forms a batch of its own.
    """
    group: list[dict[str, Any]] = []
    weight, end = 0, offset
    for next_offset, record in read_event_log(path, offset):
        is_value = record["kind"] in VALUE_KINDS
        if group and (not is_value or weight >= VALUES_IN_BATCH):
            yield end, group
            group, weight = [], 0
        group.append(record)
        weight += len(record["metrics"]) if record["kind"] == "metrics" else VALUES_IN_BATCH
        end = next_offset
    if group:
        yield end, group


class EventLog:
    """The append-only event log of one run, safe to write from several threads.

    Opening an existing log continues it.  If the log is damaged, its readable lines are continued
    in a new file, and the damaged file is kept next to that.

    Attributes:
        path: the file of the log.
        is_continued: whether an intact log of an earlier attempt is continued.

    Raises:
        ValueError: if the log belongs to another configuration than ``digest``.
    """

    def __init__(self, folder: Path, *, experiment: str, run: str, digest: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / JOURNAL
        self._lock = threading.Lock()
        key = f"{digest}-{uuid.uuid4().hex}"
        header = {"experiment": experiment, "run": run, "digest": digest, "key": key}
        content = self.path.read_bytes() if self.path.exists() else b""
        complete_lines = content[: content.rfind(b"\n") + 1]
        readable_lines = _readable_lines(complete_lines)
        has_header = bool(readable_lines) and parse_record(readable_lines[0])["kind"] == "run"
        self.is_continued = has_header and b"".join(readable_lines) == complete_lines
        if complete_lines and not self.is_continued:
            repair_event_log(self.path, readable_lines, header=_line("run", header))
        # Unbuffered: one record is one write, which survives a crash of the process.
        with naming_file(self.path):
            self._file = self.path.open("ab", buffering=0)
            if self.is_continued:
                self._file.truncate(len(complete_lines))
            elif not complete_lines:
                self._file.truncate(0)
                self.append("run", **header)
        logged_digest = read_header(self.path)["digest"]
        if logged_digest != digest:
            self._file.close()
            raise ValueError(
                f"{self.path}: expected the event log of digest {digest}, got {logged_digest}. "
                "Move the file away to start a new log"
            )

    def append(self, kind: str, **fields: object) -> None:
        """Write one record; when this returns, the record survives a crash of the process.

        Raises:
            OSError: if writing fails; the log then has no part of the record.
        """
        line = _line(kind, fields)
        with self._lock, naming_file(self.path):
            write_all(self._file, line)

    def close(self) -> None:
        """Close the file; no record can be appended afterwards."""
        self._file.close()


class SendMarker:
    """The progress of sending one run's event log to one server.

    ``journal.sent`` keeps a marker per server.

    Args:
        folder: the run's folder.
        server: the server's address; a user name and password in it are not stored.
    """

    def __init__(self, folder: Path, server: str) -> None:
        self._folder, self._server = folder, without_user(server)

    def read(self) -> tuple[str, int]:
        """Return the id of the MLflow run and the byte up to which the log has been sent.

        If nothing was sent, return ``("", 0)``.

        If another log was sent, the byte is 0: all is sent again, because sending twice is
        harmless.
        """
        mark = self._marks().get(self._server, {"run_id": "", "offset": 0})
        return mark["run_id"], mark["offset"] if self._ends_line(mark["offset"]) else 0

    def _ends_line(self, offset: int) -> bool:
        with (self._folder / JOURNAL).open("rb") as journal:
            journal.seek(max(offset - 1, 0))
            return offset > 0 and journal.read(1) == b"\n"

    def write(self, run_id: str, offset: int) -> None:
        """Store the marker; a crash leaves either the old or the new marker."""
        marks = self._marks() | {self._server: {"run_id": run_id, "offset": offset}}
        write_json(self._folder / SENT, marks)

    def is_pending(self) -> bool:
        """Return whether the event log is longer than the part that was sent."""
        return (self._folder / JOURNAL).stat().st_size > self.read()[1]

    def _marks(self) -> dict[str, Any]:
        path = self._folder / SENT
        try:
            return read_markers(path) if path.exists() else {}
        except (DamagedFileError, OSError) as error:
            warn_once(f"{path}: damaged ({error}); all records of the run are sent again")
            return {}


def read_markers(path: Path) -> dict[str, Any]:
    """Return how far the log has been sent to each server.

    Raises:
        DamagedFileError: if the file holds anything else.
    """
    marks = read_mapping(path)
    for mark in marks.values():
        is_mark = isinstance(mark, dict) and isinstance(mark.get("run_id"), str)
        if not (is_mark and isinstance(mark.get("offset"), int) and mark["offset"] >= 0):
            raise DamagedFileError(path, "expected run_id and offset of each server")
    return marks


def pending_folders(runs_folder: Path, server: str | None) -> list[Path]:
    """Return the run folders with records that ``server`` lacks, or all if ``server`` is None.

    If the event log of a run cannot be read, a warning names the run, which is then left out.
    """
    folders = []
    for path in sorted(runs_folder.rglob(JOURNAL)):
        try:
            if any(read_event_log(path)):
                read_header(path)
                folders.append(path.parent)
        except (DamagedFileError, OSError) as error:
            warn_once(f"{error}; the run is skipped, run its experiment again to repair it")
    return [f for f in folders if server is None or SendMarker(f, server).is_pending()]


def repair_event_log(path: Path, kept: list[bytes], *, header: bytes) -> None:
    """Rewrite an event log from its readable lines; the damaged file is set aside."""
    renamed = rename_damaged(path)
    if not kept or parse_record(kept[0])["kind"] != "run":
        kept = [header, *kept]
    write_atomic(path, lambda new: new.write_bytes(b"".join(kept)))
    # Offsets into the old file are invalid in the new one.
    (path.parent / SENT).unlink(missing_ok=True)
    warn_once(f"{path}: damaged, renamed {renamed.name}; its {len(kept)} whole records are kept")


def _readable_lines(content: bytes) -> list[bytes]:
    """Return the lines that are records."""
    kept = []
    for line in content.split(b"\n")[:-1]:
        try:
            parse_record(line)
        except (ValueError, TypeError, RecursionError):
            continue
        kept.append(line + b"\n")
    return kept


def _line(kind: str, fields: Mapping[str, object]) -> bytes:
    record = {"kind": kind, "time": int(time.time() * 1000), **fields}
    return (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:80] or type(error).__name__


def without_user(uri: str) -> str:
    """Return the URI without user name and password."""
    return re.sub(r"//[^/@]*@", "//", uri)


@contextmanager
def file_lock(path: Path, seconds: float) -> Iterator[bool]:
    """Hold a lock that ends with the process; yield whether it was acquired in ``seconds``.

    The lock is SQLite's: no other file lock in the standard library works on every system.

    Raises:
        OSError: if the lock file cannot be created, written or locked.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # No process holds a file that is not a lock, so the file can be removed.
    if path.is_file() and not _is_lock(path):
        path.unlink()
    with naming_file(path), path.open("ab"):
        # Raise the error of a folder, or of a path that is not writable.
        pass
    with closing(sqlite3.connect(path, timeout=seconds, isolation_level=None)) as lock:
        is_held = True
        try:
            lock.execute("BEGIN EXCLUSIVE")
        except sqlite3.Error as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
                raise OSError(errno.EIO, f"no lock ({error})", str(path)) from error
            is_held = False
        yield is_held


def _is_lock(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(16)
    return not start or start == b"SQLite format 3\0"
