"""Supervisor of the check: it starts the worker, enforces the time budgets and writes the tables.

A part that hangs or crashes its process does not affect other parts, because the worker is
restarted for the next one. Every row is on disk before the next one is measured. A part is skipped
if it has finished with the same code, sizes, device and torch.

Files: ``checks.csv``, ``speed.csv``, ``parts.csv`` (one line per part), ``environment.json`` and
``log.txt`` (warnings and tracebacks).
"""

import csv
import hashlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from rudolph.files.atomic import json_text
from rudolph.gpu_check.plan import CHECKS, PLAN, SPEED, Part

ROOT = Path(__file__).resolve().parents[2]
ROW_COLUMNS = ("part", "case", "quantity", "value", "unit", "limit", "status", "note")
KEY_COLUMNS = ("code", "sizes", "device", "torch")
PART_COLUMNS = ("part", "status", "seconds", "rows", "commit", *KEY_COLUMNS)
PART_NAMES = "parts.csv"
ENVIRONMENT_FILE = "environment.json"
# Seconds that a part's last case may exceed the budget before the process is killed.
GRACE_SECONDS = 20.0
# Importing torch from a cold disk may take this long.
START_SECONDS = 300.0
# A part is not started if fewer seconds are left.
MIN_SECONDS = 5.0
FINISHED = "ok"


@dataclass
class CheckProcess:
    """The worker process that runs parts; see ``serving`` for its protocol.

    Attributes:
        command: The command line that starts the process.
        log: File for its standard error.
        environment: The machine and package versions that it reports.
    """

    command: Sequence[str]
    log: IO[bytes]
    environment: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        """Start the process and wait for its environment.

        Raises:
            ValueError: If the process does not start.
        """
        # cuBLAS is deterministic only with a workspace of fixed size.
        variables = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            self.command,
            cwd=ROOT,
            env=os.environ | variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            bufsize=0,
            process_group=0,
        )
        self.buffer = b""
        message = next(self.messages(time.monotonic() + START_SECONDS), {})
        if "environment" not in message:
            self.close()
            lines = Path(self.log.name).read_text("utf-8", errors="replace").splitlines()
            raise ValueError(f"the worker did not start: {lines[-1] if lines else 'no reason'}")
        self.environment = message["environment"]

    def run(self, part: str, seconds: float) -> Iterator[dict[str, Any]]:
        """Yield the messages of a part; if the process is lost, the last one is not an ``end``."""
        assert self.process.stdin is not None
        request = json.dumps({"part": part, "seconds": seconds}) + "\n"
        self.process.stdin.write(request.encode())
        for message in self.messages(time.monotonic() + seconds + GRACE_SECONDS):
            yield message
            if "end" in message:
                return

    def messages(self, deadline: float) -> Iterator[dict[str, Any]]:
        """Yield the messages of the process until the deadline or its end.

        Args:
            deadline: Time in seconds, on the clock of ``time.monotonic``.
        """
        assert self.process.stdout is not None
        while True:
            line, newline, rest = self.buffer.partition(b"\n")
            if newline:
                self.buffer = rest
                yield json.loads(line)
                continue
            remaining = max(deadline - time.monotonic(), 0.0)
            if not select.select([self.process.stdout], [], [], remaining)[0]:
                return
            data = self.process.stdout.read(65536)
            if not data:
                return
            self.buffer += data

    def close(self) -> None:
        """Kill the process and close its pipes."""
        # The process group includes the compilers that the process started.
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


@dataclass
class Check:
    """One invocation of the check.

    Attributes:
        command: The command line that starts the worker.
        folder: The folder that receives the tables.
        sizes: "full" or "smoke"; a finished part runs again if this differs.
        minutes: Time budget for all parts.
        is_again: Run finished parts again.
        commit: The commit recorded with the results.
        plan: The parts with their tables and time budgets.
    """

    command: Sequence[str]
    folder: Path
    sizes: str
    minutes: float
    is_again: bool = False
    commit: str = "unknown"
    plan: Mapping[str, Part] = field(default_factory=lambda: PLAN)

    def run(self, names: Sequence[str]) -> int:
        """Run the parts, write and print their results, and return the exit code.

        Args:
            names: The parts to run, in order.

        Returns:
            1 if a part failed, else 0.
        """
        started = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "log.txt").open("ab") as log:
            self.log = log
            self.worker: CheckProcess | None = CheckProcess(self.command, log)
            self.key = self._key(self.worker.environment)
            self._write_environment(self.worker.environment)
            try:
                for name in names:
                    remaining = 60 * self.minutes - (time.monotonic() - started)
                    self._run_or_skip(name, remaining)
            finally:
                if self.worker is not None:
                    self.worker.close()
        print(results_table(self.folder, names))
        return int(any(self._lines()[name]["status"] == "failed" for name in names))

    def _run_or_skip(self, name: str, remaining: float) -> None:
        previous = self._lines().get(name, {})
        is_same = all(previous.get(column) == self.key[column] for column in KEY_COLUMNS)
        if is_same and previous.get("status") == FINISHED and not self.is_again:
            print(f"{name}: skipped, already finished", flush=True)
            return
        self._forget(name)
        started, num_rows, status = time.monotonic(), 0, "no time left"
        if remaining >= MIN_SECONDS:
            status, num_rows = self._run_part(name, min(self.plan[name].seconds, remaining))
        seconds = round(time.monotonic() - started, 1)
        line = {"part": name, "status": status, "seconds": seconds, "rows": num_rows}
        append_row(
            self.folder / PART_NAMES, PART_COLUMNS, {**line, "commit": self.commit, **self.key}
        )
        print(f"{name}: {status}, {num_rows} rows in {seconds} s", flush=True)

    def _run_part(self, name: str, seconds: float) -> tuple[str, int]:
        """Run one part in the worker; return its status and the number of its rows."""
        if self.worker is None:
            self.worker = CheckProcess(self.command, self.log)
        started, num_rows, status = time.monotonic(), 0, ""
        path = self.folder / self.plan[name].table
        for message in self.worker.run(name, seconds):
            if "row" in message:
                append_row(path, ROW_COLUMNS, {"part": name, **message["row"]})
                num_rows += 1
            else:
                status = message["end"]
        if status in ("", "lost"):
            # After a crash, a timeout or a lost device, the next part needs a new process.
            is_late = time.monotonic() - started >= seconds
            self.worker.close()
            code = self.worker.process.returncode
            self.worker = None
            note = "killed after its time limit" if is_late else f"the process ended ({code})"
            note = "the device was lost" if status else note
            error = {"case": "", "quantity": "error", "status": "failed", "note": note}
            append_row(path, ROW_COLUMNS, {"part": name, **error})
            return "failed", num_rows + 1
        return status, num_rows

    def _key(self, environment: Mapping[str, Any]) -> dict[str, str]:
        names = {"device": environment["device"], "torch": environment["torch"]}
        return {"code": code_digest(), "sizes": self.sizes, **names}

    def _write_environment(self, environment: Mapping[str, Any]) -> None:
        content = {"commit": self.commit, **self.key, **environment}
        text = json_text(content, indent=1) + "\n"
        (self.folder / ENVIRONMENT_FILE).write_text(text, encoding="utf-8")

    def _lines(self) -> dict[str, dict[str, str]]:
        return {line["part"]: line for line in read_lines(self.folder / PART_NAMES)}

    def _forget(self, name: str) -> None:
        """Remove a part's rows written by an earlier invocation."""
        tables = dict.fromkeys((CHECKS, SPEED), ROW_COLUMNS) | {PART_NAMES: PART_COLUMNS}
        for file, columns in tables.items():
            lines = [line for line in read_lines(self.folder / file) if line["part"] != name]
            with (self.folder / file).open("w", encoding="utf-8", newline="") as out:
                writer = csv.DictWriter(out, columns, lineterminator="\n")
                writer.writeheader()
                writer.writerows(lines)


def read_lines(path: Path) -> list[dict[str, str]]:
    """Return the rows of a table; empty if the file does not exist."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def append_row(path: Path, columns: Sequence[str], line: Mapping[str, Any]) -> None:
    """Append a row to a table and flush it to disk."""
    with path.open("a", encoding="utf-8", newline="") as file:
        csv.DictWriter(file, columns, lineterminator="\n").writerow(line)
        file.flush()
        os.fsync(file.fileno())


def code_digest() -> str:
    """Return the first 16 hex digits of a SHA-256 of the package's code and the golden data."""
    sha = hashlib.sha256()
    golden = (ROOT / "tests" / "parity").rglob("*.*")
    for path in sorted([*(ROOT / "rudolph").rglob("*.py"), *golden]):
        sha.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return sha.hexdigest()[:16]


def results_table(folder: Path, names: Sequence[str]) -> str:
    """Return the rows of the named parts as one aligned table, then a line per part."""
    rows = [line for file in (CHECKS, SPEED) for line in read_lines(folder / file)]
    rows.sort(key=lambda line: list(PLAN).index(line["part"]) if line["part"] in PLAN else 0)
    columns = [name for name in ROW_COLUMNS if name != "limit"]
    cells = [columns, *([format_cell(line, name) for name in columns] for line in rows)]
    cells = [line for line in cells if line is cells[0] or line[0] in names]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]
    lines += [
        "",
        *(
            f"{row['part']}, {row['case']}: failed, {row['quantity']} {row['note']}"
            for row in rows
            if row["part"] in names and row["status"] == "failed"
        ),
    ]
    parts = [line for line in read_lines(folder / PART_NAMES) if line["part"] in names]
    lines += [f"{line['part']}: {line['status']}" for line in parts]
    return "\n".join(lines)


def format_cell(line: Mapping[str, str], column: str) -> str:
    """Return a cell of the printed table.

    Numbers are rounded to four digits, and long notes are cut.
    """
    text = line[column]
    if column == "value" and text:
        text = f"{float(text):.4g}"
        if line["limit"]:
            text += f" (limit {float(line['limit']):.2g})"
    return text if len(text) <= 70 else f"{text[:67]}..."


def worker_command(sizes: str) -> list[str]:
    """Return the command line of the worker."""
    return [sys.executable, "-m", "rudolph.gpu_check.worker", sizes]
