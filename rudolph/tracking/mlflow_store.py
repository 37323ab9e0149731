"""MLflow at one address; its runs are created from event logs.

Sending twice changes nothing.  The MLflow run is found by its tag ``rudolph.run_key``.  Parameters
and tags are set to their present values, equal metric points are stored once, and artifacts
overwrite earlier copies.  The runs of one experiment have a parent run, which holds the
experiment's exported results.
"""

import logging
import os
import re
import sqlite3
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rudolph.files.atomic import DamagedFileError
from rudolph.tracking.event_log import (
    VALUE_KINDS,
    SendMarker,
    file_lock,
    read_batches,
    read_header,
    without_user,
)
from rudolph.tracking.mlflow_database import SlowStoreError, prepare_database
from rudolph.tracking.run_directory import RunDirectory

if TYPE_CHECKING:
    from mlflow.entities import Metric, Param, RunTag

RUN_KEY = "rudolph.run_key"
REJECTED = "rudolph.rejected"
PARENT = "mlflow.parentRunId"
# The run key of every experiment's parent run.
PARENT_KEY = "parent"
# Limits of MLflow 3.17 per request: 1000 metrics, 100 parameters or tags, 1 MB.  A Cyrillic letter
# takes 6 bytes.
BATCH_WEIGHT, METRIC_WEIGHT, TEXT_WEIGHT = 1000, 1, 10
BATCH_CHARACTERS = 100_000
MAX_VALUE_CHARACTERS = 6000
MLFLOW_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the event log is the retry
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}

# Error messages of a store that works but did not answer in time.
SLOW = re.compile(r"database is locked|Read timed out|read timeout", re.IGNORECASE)

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SendProgress:
    """Counts of one send: runs and records sent, records refused, runs still waiting."""

    runs: int = 0
    records: int = 0
    rejected: int = 0
    waiting: int = 0

    def __add__(self, other: "SendProgress") -> "SendProgress":
        """Return the sums of the counts."""
        return SendProgress(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


class MLflowStore:
    """MLflow at one URI.

    Raises:
        OSError: if MLflow cannot be used, for any reason.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._experiment_ids: dict[str, str] = {}
        self._run_ids: dict[Path, str] = {}
        self._parents: dict[str, str] = {}
        for name, value in MLFLOW_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        self._database = _sqlite_file(uri)
        with _as_os_error():
            from mlflow import MlflowClient

            logging.getLogger("alembic").setLevel(logging.WARNING)
            # MLflow logs the traceback of an error and then also raises the error.
            logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
            # The first client creates the tables; MLflow does not prevent two clients from doing
            # so.
            lock = self._database and self._database.with_name(f"{self._database.name}.lock")
            with file_lock(lock, 60.0) if lock else nullcontext(True) as is_held:
                if not is_held:
                    raise SlowStoreError("another process is creating its tables")
                if self._database:
                    prepare_database(self._database)
                self._client = MlflowClient(tracking_uri=uri)

    def send(
        self, folder: Path, *, again: bool = False, on_progress: Callable[[], None] | None = None
    ) -> SendProgress:
        """Send the unsent records of one run; do nothing while another process sends them.

        Args:
            folder: the run's folder.
            again: send all records again.
            on_progress: called after every batch that the server has taken.

        Raises:
            OSError: if the server cannot be used now; ``SlowStoreError`` if the server is slow.
            DamagedFileError: at a record that cannot be read; the records before it are sent.
        """
        marker, directory = SendMarker(folder, self.uri), RunDirectory(folder)
        if not (again or marker.is_pending()):
            return SendProgress()
        with file_lock(directory.sending_lock, 0.5) as is_held, _as_os_error():
            if not is_held:
                return SendProgress()
            known_id, offset = marker.read()
            run_id = self._run_ids.get(folder) or self._open_run(folder, known_id)
            self._run_ids[folder] = run_id
            start = offset if run_id == known_id and not again else 0
            num_sent = num_rejected = 0
            for end, records in read_batches(directory.event_log, start):
                num_rejected += len(self._log(run_id, records, folder))
                marker.write(run_id, end)
                num_sent += len(records)
                if on_progress is not None:
                    on_progress()
        return SendProgress(runs=1, records=num_sent, rejected=num_rejected)

    def _open_run(self, folder: Path, known_id: str) -> str:
        """Return the id of an event log's MLflow run.

        A missing run is created and a deleted one restored.
        """
        from mlflow.entities import ViewType

        header = read_header(RunDirectory(folder).event_log)
        experiment_id = self._experiment_id(header["experiment"])
        runs = self._client.search_runs(
            [experiment_id], f"tags.`{RUN_KEY}` = '{header['key']}'", ViewType.ALL
        )
        if not runs:
            parent = self.parent(header["experiment"])
            tags = {RUN_KEY: header["key"], "rudolph.digest": header["digest"], PARENT: parent}
            start, name = header["time"], header["run"]
            return str(self._client.create_run(experiment_id, start, tags, name).info.run_id)
        run = next((run for run in runs if run.info.run_id == known_id), runs[0])
        if run.info.lifecycle_stage == "deleted":
            self._client.restore_run(run.info.run_id)
        return str(run.info.run_id)

    def parent(self, experiment: str) -> str:
        """Return the id of an experiment's parent run, which is created if missing."""
        if experiment not in self._parents:
            parent_ids = self._parents_of(experiment)
            if not parent_ids:
                tags = {RUN_KEY: PARENT_KEY}
                created = self._client.create_run(
                    self._experiment_id(experiment), tags=tags, run_name=experiment
                )
                self._client.set_terminated(created.info.run_id)
                # Another process may have created a parent meanwhile; both processes then keep the
                # same one.
                parent_ids = self._parents_of(experiment)
                if created.info.run_id != parent_ids[0]:
                    self._client.delete_run(created.info.run_id)
            self._parents[experiment] = parent_ids[0]
        return self._parents[experiment]

    def _parents_of(self, experiment: str) -> list[str]:
        runs = self._client.search_runs(
            [self._experiment_id(experiment)], f"tags.`{RUN_KEY}` = '{PARENT_KEY}'"
        )
        ordered = sorted(runs, key=lambda run: (run.info.start_time, run.info.run_id))
        return [str(run.info.run_id) for run in ordered]

    def send_results(self, experiment: str, folder: Path) -> None:
        """Store an experiment's exported results as artifacts of its parent run."""
        with _as_os_error():
            self._client.log_artifacts(self.parent(experiment), str(folder), "results")

    def _log(self, run_id: str, records: list[dict[str, Any]], folder: Path) -> list[str]:
        """Send the records of one batch; return a message per value that MLflow refuses."""
        record, kind, rejected = records[0], records[0]["kind"], []
        if kind == "artifact":
            path = folder / record["path"]
            if path.is_file():
                self._client.log_artifact(run_id, str(path), record["folder"] or None)
            else:
                rejected = [f"{record['path']}: the file is missing"]
        elif kind in VALUE_KINDS:
            values = [value for record in records for value in _values(record)]
            rejected = [
                line
                for batch in _request_batches(values)
                for line in self._log_values(run_id, batch)
            ]
        elif kind == "status" and record["status"] == "running":
            self._client.update_run(run_id, "RUNNING")
        elif kind == "status":
            self._client.set_terminated(run_id, record["status"].upper(), record["time"])
        if rejected:
            note = f"{len(rejected)} rejected: {rejected[0]}"
            _logger.warning("%s: %s", folder.name, note)
            self._client.set_tag(run_id, REJECTED, note[:MAX_VALUE_CHARACTERS])
        return rejected

    def _experiment_id(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        if name not in self._experiment_ids:
            folder = self._database.with_name("mlartifacts") if self._database else None
            try:
                # Do not look it up first: another process may create the experiment in between.
                self._experiment_ids[name] = self._client.create_experiment(
                    name, artifact_location=folder.as_uri() if folder else None
                )
            except MlflowException as error:
                if (experiment := self._client.get_experiment_by_name(name)) is None:
                    raise error
                if experiment.lifecycle_stage == "deleted":
                    self._client.restore_experiment(experiment.experiment_id)
                self._experiment_ids[name] = experiment.experiment_id
        return self._experiment_ids[name]

    def _log_values(self, run_id: str, values: "list[Metric | Param | RunTag]") -> list[str]:
        """Log values and return a message per refused value.

        MLflow accepts all values of a batch or none, so a refused batch is halved until single
        values are left.
        """
        from mlflow.entities import Metric, Param, RunTag
        from mlflow.exceptions import MlflowException

        metrics = [v for v in values if isinstance(v, Metric)]
        params = [v for v in values if isinstance(v, Param)]
        tags = [v for v in values if isinstance(v, RunTag)]
        try:
            self._client.log_batch(run_id, metrics, params, tags, synchronous=True)
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            if self._client.get_run(run_id).info.lifecycle_stage == "deleted":
                raise ConnectionError(f"MLflow run {run_id} was deleted") from error
            if len(values) == 1:
                return [f"{values[0].key}: {_one_line(error)}"]
            halves = values[: len(values) // 2], values[len(values) // 2 :]
            return [line for half in halves for line in self._log_values(run_id, half)]
        return []


@contextmanager
def _as_os_error() -> Iterator[None]:
    """Turn every failure of MLflow and its database into an ``OSError``."""
    try:
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError
    except ImportError as error:
        raise ConnectionError(f"MLflow cannot be imported: {_one_line(error)}") from error
    # A damaged database may hold invalid UTF-8.
    error_types = (MlflowException, SQLAlchemyError, sqlite3.Error, OSError, UnicodeError)
    try:
        yield
    except (SlowStoreError, DamagedFileError):
        raise
    except error_types as error:
        error_type = SlowStoreError if SLOW.search(str(error)) else ConnectionError
        raise error_type(_one_line(error)) from error
    except _migration_errors() as error:
        raise ConnectionError(_one_line(error)) from error


def _migration_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions of MLflow's migrations, if this process has loaded them."""
    alembic_util = sys.modules.get("alembic.util")
    return (alembic_util.CommandError,) if alembic_util else ()


def _one_line(error: Exception) -> str:
    return without_user(" ".join(str(error).split()))[:200]


def _sqlite_file(uri: str) -> Path | None:
    match = re.match(r"sqlite(?:\+\w+)?:///([^?]+)", uri)
    return Path(match[1]).resolve() if match else None


def _values(record: Mapping[str, Any]) -> "list[Metric | Param | RunTag]":
    from mlflow.entities import Metric, Param, RunTag

    if record["kind"] == "metrics":
        time, step = record["time"], record["step"]
        return [Metric(name, value, time, step) for name, value in record["metrics"].items()]
    value_type = Param if record["kind"] == "params" else RunTag
    return [value_type(name, _cut(text)) for name, text in record[record["kind"]].items()]


def _cut(text: str) -> str:
    note = f" ... [cut, {len(text)} characters]"
    return (
        text
        if len(text) <= MAX_VALUE_CHARACTERS
        else text[: MAX_VALUE_CHARACTERS - len(note)] + note
    )


def _request_batches(
    values: "list[Metric | Param | RunTag]",
) -> "Iterator[list[Metric | Param | RunTag]]":
    """Yield batches within the limits of one request."""
    batch: list[Metric | Param | RunTag] = []
    weight = characters = 0
    for value in values:
        value_weight = TEXT_WEIGHT if isinstance(value.value, str) else METRIC_WEIGHT
        length = len(value.key) + len(str(value.value))
        if weight + value_weight > BATCH_WEIGHT or characters + length > BATCH_CHARACTERS:
            yield batch
            batch, weight, characters = [], 0, 0
        batch.append(value)
        weight, characters = weight + value_weight, characters + length
    yield batch
