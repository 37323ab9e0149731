"""Tracking of a run in MLflow, without losing any record.

Every call is written to the run's event log first.  A background thread sends the log to MLflow.
If the server is unavailable, only a warning is logged, and ``send_pending`` sends the records
later.  MLflow is imported in the sending thread, so training neither waits for it nor needs it.
"""

import logging
import os
import random
import subprocess
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from rudolph.files.atomic import DamagedFileError, json_number, warn_once
from rudolph.tracking.event_log import (
    EventLog,
    SendMarker,
    flatten,
    pending_folders,
    without_user,
)
from rudolph.tracking.mlflow_database import SlowStoreError
from rudolph.tracking.mlflow_store import MLflowStore, SendProgress

SECONDS_BETWEEN_SENDS = 1.0
MAX_BACK_OFF = 60.0
# Seconds that the end of a run waits for a server that accepts records slowly.
MAX_WAIT, MAX_WAIT_AFTER_ERROR = 60.0, 5.0

_logger = logging.getLogger(__name__)


def tracking_uri(checkout: Path) -> str:
    """Return ``MLFLOW_TRACKING_URI``, or the URI of ``mlflow.db`` in the checkout."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{checkout.resolve()}/mlflow.db"


def git_state(folder: Path, *, ignored: tuple[str, ...] = ("results",)) -> tuple[str, bool]:
    """Return the commit checked out at ``folder``, and whether the files differ from it.

    Untracked files count as a difference.  The ``ignored`` folders of the repository do not count,
    because exporting one run must not make the next run dirty.  Without git or a commit, return
    ``("unknown", True)``.
    """
    paths = [":/", *(f":(top,exclude){name}" for name in ignored)]
    outputs = []
    for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--", *paths]):
        command = ["git", "-C", str(folder), *arguments]
        try:
            result = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
        except (OSError, subprocess.CalledProcessError):
            return "unknown", True
        outputs.append(result.stdout.strip())
    return outputs[0], bool(outputs[1])


class Tracker:
    """The tracker of one run; its logging methods return at once, whatever the server does.

    As a context manager it finishes the run: ``failed`` after an exception, else ``finished``.

    Args:
        folder: the run's folder, ``runs/<experiment>/<run>``; an existing event log and its MLflow
            run are continued.
        uri: the tracking server, see ``tracking_uri``.
        experiment: name of the MLflow experiment.
        run: name of the MLflow run.
        digest: digest of the run's configuration.
        runs_folder: folder of earlier runs, whose unsent records are sent after this run's
            records.
    """

    def __init__(
        self,
        folder: Path,
        uri: str,
        *,
        experiment: str,
        run: str,
        digest: str,
        runs_folder: Path | None = None,
    ) -> None:
        self._folder, self._uri, self._runs_folder = folder, uri, runs_folder
        self._journal = EventLog(folder, experiment=experiment, run=run, digest=digest)
        self._journal.append("status", status="running")
        self.is_continued = self._journal.is_continued
        self._is_finished = self._has_warned = False
        # Opening imports MLflow and may create tables; that takes time even with a fast server.
        self._is_opening, self._last_progress = True, time.monotonic()
        self._stopping, self._jitter = threading.Event(), random.Random(run)
        self._thread = threading.Thread(target=self._send_until_closed, daemon=True)
        self._thread.start()

    def log_params(self, parameters: Mapping[str, object]) -> None:
        """Log parameters of the run; nested ones are flattened to ``a.b.c``."""
        self._journal.append("params", params=flatten(parameters))

    def log_metrics(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Log metric values at a step; infinities and NaN are allowed."""
        values = {name: json_number(float(value)) for name, value in metrics.items()}
        self._journal.append("metrics", step=int(step), metrics=values)

    def log_tags(self, tags: Mapping[str, object]) -> None:
        """Log tags of the run, such as its commit; a later value replaces an earlier one."""
        self._journal.append("tags", tags=flatten(tags))

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Log a file to store in MLflow under ``folder``; the file is read when it is sent.

        Raises:
            ValueError: if ``path`` is not a file.
        """
        if not path.is_file():
            raise ValueError(f"log_artifact: {path} is not a file")
        file, base = path.resolve(), self._folder.resolve()
        # A relative path, so that a moved runs folder can still be sent.
        name = file.relative_to(base) if file.is_relative_to(base) else file
        self._journal.append("artifact", path=name.as_posix(), folder=folder)

    def finish(self, status: str = "finished") -> None:
        """Log the run's final status, ``finished`` or ``failed``.

        Raises:
            ValueError: for any other status.
        """
        if status not in ("finished", "failed"):
            raise ValueError(f"status must be finished or failed, got {status!r}")
        self._is_finished = True
        self._journal.append("status", status=status)

    def close(self, timeout: float = 5.0, *, max_wait: float = MAX_WAIT) -> bool:
        """Wait until all records are sent; return whether all were sent.

        If the server is slow, remaining records are sent in the background while the process
        lives.

        Args:
            timeout: seconds to wait for any progress.
            max_wait: seconds to wait in total, if longer than ``timeout``.
        """
        self._stopping.set()
        end = time.monotonic() + (max(timeout, max_wait) if timeout else 0.0)
        while self._thread.is_alive() and time.monotonic() < end:
            is_idle = time.monotonic() - self._last_progress > timeout
            if is_idle and not self._is_opening:
                break
            self._thread.join(0.05)
        self._journal.close()
        is_sent = not SendMarker(self._folder, self._uri).is_pending()
        if not is_sent and not self._has_warned:
            _logger.warning(
                "%s is slow: the rest of %s is sent in the background, or later by `rudolph sync`",
                without_user(self._uri),
                self._folder.name,
            )
        return is_sent

    def __enter__(self) -> Self:
        """Return the tracker."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Finish the run and close the tracker."""
        if not self._is_finished:
            self.finish("finished" if kind is None else "failed")
        self.close(max_wait=MAX_WAIT if kind is None else MAX_WAIT_AFTER_ERROR)

    def _progress(self) -> None:
        self._last_progress = time.monotonic()

    def _send_until_closed(self) -> None:
        store: MLflowStore | None = None
        pause = SECONDS_BETWEEN_SENDS
        while True:
            is_last = self._stopping.is_set()
            try:
                store = store or MLflowStore(self._uri)
                self._is_opening = False
                self._progress()
                started = time.monotonic()
                store.send(self._folder, on_progress=self._progress)
                pause = pause_after(time.monotonic() - started)
                self._has_warned = False
                self._send_others(store)
            except OSError as error:
                self._is_opening = False
                store, pause = None, min(2 * pause, MAX_BACK_OFF)
                self._warn(error)
            except DamagedFileError as error:
                warn_once(f"{error}; the records after it are not sent")
            if is_last:
                return
            # Jitter keeps runs that started together from sending together.
            self._stopping.wait(pause * self._jitter.uniform(0.75, 1.25))

    def _warn(self, error: OSError) -> None:
        if not self._has_warned:
            _warn_unavailable(self._uri, error)
        self._has_warned = True

    def _send_others(self, store: "MLflowStore") -> None:
        runs_folder, self._runs_folder = self._runs_folder, None
        for folder in pending_folders(runs_folder, self._uri) if runs_folder else []:
            if not self._stopping.is_set():
                _send_one(store, folder)


def pause_after(seconds: float) -> float:
    """Return the pause after a send, four times its duration, to spare a busy server.

    >>> pause_after(0.1), pause_after(2.0), pause_after(1000.0) == MAX_BACK_OFF
    (1.0, 8.0, True)
    """
    return min(max(SECONDS_BETWEEN_SENDS, 4 * seconds), MAX_BACK_OFF)


def send_pending(runs_folder: Path, uri: str, *, again: bool = False) -> SendProgress:
    """Send the records of the runs in ``runs_folder`` that ``uri`` lacks.

    If another process is sending a run, that run is skipped and counts as waiting.  If the server
    becomes unavailable, all remaining runs count as waiting too.  MLflow is imported only if there
    is something to send.

    Args:
        runs_folder: the folder that holds the runs.
        uri: the tracking server, see ``tracking_uri``.
        again: send all records again, for a server that lost them.
    """
    folders = pending_folders(runs_folder, None if again else uri)
    total = SendProgress()
    if not folders:
        return total
    try:
        store = MLflowStore(uri)
        for folder in folders:
            total += _send_one(store, folder, again=again)
    except OSError as error:
        _warn_unavailable(uri, error)
    return total + SendProgress(waiting=len(folders) - total.runs)


def send_results(experiment: str, folder: Path, uri: str) -> bool:
    """Send an experiment's exported results to its parent run; return whether this worked."""
    try:
        MLflowStore(uri).send_results(experiment, folder)
    except OSError as error:
        _warn_unavailable(uri, error)
        return False
    return True


def _send_one(store: MLflowStore, folder: Path, *, again: bool = False) -> SendProgress:
    """Send the unsent records of one run; a damaged event log is named in a warning."""
    try:
        return store.send(folder, again=again)
    except DamagedFileError as error:
        warn_once(
            f"{error}; the records after it are not sent, run its experiment again to repair it"
        )
        return SendProgress()


def _warn_unavailable(uri: str, error: OSError) -> None:
    state = "is slow" if isinstance(error, SlowStoreError) else "is unavailable"
    _logger.warning("%s %s (%s); records are kept and sent later", without_user(uri), state, error)
