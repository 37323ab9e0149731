"""The journal of a run: what is to be tracked, one JSON line a call, in the run's own folder.

It is written before anything is sent anywhere, so a run's curves outlive any tracking server.
Each record has a ``kind``, a ``time`` in milliseconds and its fields:

    run       experiment, run, digest, key (of the MLflow run); always the first line
    status    status: running, finished or failed
    metrics   step, metrics: name -> number, or "nan", "inf", "-inf"
    params    params: flattened name -> text
    tags      tags: name -> text
    artifact  path (relative to the run's folder when inside), folder (in MLflow)
"""

import json
import math
import re
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

JOURNAL = "journal.jsonl"
SENT = "journal.sent"
VALUE_KINDS = ("metrics", "params", "tags")
VALUES_IN_BATCH = 1000


def flatten(parameters: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """Nested parameters as ``a.b.c`` -> text; what is not a string is written as JSON.

    >>> flatten({"decoder": {"num_layers": 2, "dropout": None}, "mask": ["row", "conv"]})
    {'decoder.num_layers': '2', 'decoder.dropout': 'null', 'mask': '["row", "conv"]'}
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


def read_journal(path: Path, offset: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """The complete records from byte ``offset`` on, each with the offset of its end.

    Metric values are floats again.  A last line that was cut off by a crash is left out.
    """
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            record = json.loads(line)
            if record["kind"] == "metrics":
                record["metrics"] = {name: float(v) for name, v in record["metrics"].items()}
            yield offset, record


def read_batches(path: Path, offset: int) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Records in groups of some 1000 values; what is no value (artifact, status) comes alone."""
    group: list[dict[str, Any]] = []
    weight, end = 0, offset
    for after, record in read_journal(path, offset):
        is_value = record["kind"] in VALUE_KINDS
        if group and (not is_value or weight >= VALUES_IN_BATCH):
            yield end, group
            group, weight = [], 0
        group.append(record)
        weight += len(record["metrics"]) if record["kind"] == "metrics" else VALUES_IN_BATCH
        end = after
    if group:
        yield end, group


class Journal:
    """The append-only record of one run, safe to write from several threads.

    Opening an existing journal continues it.  ``ValueError`` when it belongs to another
    configuration than ``digest``.
    """

    def __init__(self, folder: Path, *, experiment: str, run: str, digest: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / JOURNAL
        self._lock = threading.Lock()
        written = self.path.read_bytes() if self.path.exists() else b""
        # Unbuffered: one record is one write, and survives the process.
        self._file = self.path.open("ab", buffering=0)
        self._file.truncate(written.rfind(b"\n") + 1)
        first = next(read_journal(self.path), None)
        if first is None:
            key = f"{digest}-{uuid.uuid4().hex}"
            self.append("run", experiment=experiment, run=run, digest=digest, key=key)
        elif first[1]["digest"] != digest:
            self._file.close()
            raise ValueError(
                f"{self.path}: belongs to digest {first[1]['digest']}, got {digest}; "
                "a folder holds one configuration"
            )

    def append(self, kind: str, **fields: object) -> None:
        """Write one record; it is on its way to the disk when this returns."""
        record = {"kind": kind, "time": int(time.time() * 1000), **fields}
        line = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
        with self._lock:
            self._file.write(line.encode())

    def close(self) -> None:
        """Nothing can be appended any more."""
        self._file.close()


class SentMark:
    """How far one server has one run's journal; ``journal.sent`` keeps a mark for each server.

    Args:
        folder: the run's folder.
        server: the server's address; name and password in it are not written down.
    """

    def __init__(self, folder: Path, server: str) -> None:
        self._folder, self._server = folder, without_user(server)

    def read(self) -> tuple[str, int]:
        """The id of the MLflow run and the byte up to which it is sent; ``("", 0)`` if never."""
        mark = self._marks().get(self._server, {"run_id": "", "offset": 0})
        return mark["run_id"], mark["offset"]

    def write(self, run_id: str, offset: int) -> None:
        """Move the mark; a crash leaves the old one or the new one."""
        marks = self._marks() | {self._server: {"run_id": run_id, "offset": offset}}
        partial = self._folder / f"{SENT}.part"
        partial.write_text(json.dumps(marks, indent=1) + "\n", "utf-8")
        partial.replace(self._folder / SENT)

    def is_pending(self) -> bool:
        """Whether the journal is longer than what was sent."""
        return (self._folder / JOURNAL).stat().st_size > self.read()[1]

    def _marks(self) -> dict[str, Any]:
        path = self._folder / SENT
        return json.loads(path.read_text("utf-8")) if path.exists() else {}


def pending_folders(runs_folder: Path, server: str | None) -> list[Path]:
    """The run folders with something that ``server`` lacks; all of them for None."""
    journals = [path for path in runs_folder.rglob(JOURNAL) if any(read_journal(path))]
    folders = sorted(path.parent for path in journals)
    return [f for f in folders if server is None or SentMark(f, server).is_pending()]


def without_user(uri: str) -> str:
    """The URI without name and password."""
    return re.sub(r"//[^/@]*@", "//", uri)


def json_number(value: float) -> float | str:
    """JSON has no word for infinities and NaN: they become strings that ``float`` reads back."""
    return value if math.isfinite(value) else str(value)


@contextmanager
def exclusive(path: Path, seconds: float) -> Iterator[bool]:
    """Hold a lock that a dying process lets go; yields whether it was got in time.

    SQLite is the one file lock of the standard library that works on every system.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path, timeout=seconds, isolation_level=None)) as lock:
        is_held = True
        try:
            lock.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError:
            is_held = False
        yield is_held
