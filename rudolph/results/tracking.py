"""What a run tells MLflow, and how none of it is lost.

Every call is written to the run's journal first.  A background thread sends the journal to MLflow;
a server that is away costs nothing but a warning, and ``send_pending`` sends the rest later.
Sending twice changes nothing: the MLflow run is found by its tag ``rudolph.run_key``, parameters
and tags are set to what they are, equal metric points are stored once, artifacts replace
themselves.
MLflow is imported in the sending thread, so a training neither waits for it nor needs it.
"""

import logging
import os
import re
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rudolph.results.journal import (
    JOURNAL,
    VALUE_KINDS,
    Journal,
    SentMark,
    exclusive,
    flatten,
    json_number,
    pending_folders,
    read_batches,
    read_journal,
    without_user,
)

if TYPE_CHECKING:
    from mlflow.entities import Metric, Param, RunTag

RUN_KEY = "rudolph.run_key"
REJECTED = "rudolph.rejected"

SECONDS_BETWEEN_SENDS = 1.0
LONGEST_BACK_OFF = 60.0
# MLflow 3.17: 1000 metrics, or 100 parameters or tags, or 1 MB a request; a Cyrillic letter takes
# 6 bytes of it.
BATCH_WEIGHT, METRIC_WEIGHT, TEXT_WEIGHT = 1000, 1, 10
BATCH_CHARACTERS = 100_000
LONGEST_VALUE = 6000
MLFLOW_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the journal is the retry
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sent:
    """What one sending did: runs and records sent, records refused, runs that still wait."""

    runs: int = 0
    records: int = 0
    rejected: int = 0
    waiting: int = 0

    def __add__(self, other: "Sent") -> "Sent":
        return Sent(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def tracking_uri(checkout: Path) -> str:
    """``MLFLOW_TRACKING_URI``, or ``mlflow.db`` in the checkout."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{checkout.resolve()}/mlflow.db"


def git_state(folder: Path, *, ignored: tuple[str, ...] = ("results",)) -> tuple[str, bool]:
    """The commit checked out at ``folder`` and whether the files differ from it.

    Untracked files count; ``ignored`` folders of the repository do not, because exporting one run
    must not make the next one dirty.  Without git or a commit: ``("unknown", True)``.
    """
    everything = [":/", *(f":(top,exclude){name}" for name in ignored)]
    answers = []
    for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--", *everything]):
        command = ["git", "-C", str(folder), *arguments]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return "unknown", True
        answers.append(answer.stdout.strip())
    return answers[0], bool(answers[1])


class Tracker:
    """Tracks one run; every method returns at once, whatever the server does.

    Args:
        folder: the run's folder, ``runs/<experiment>/<run>``; an existing journal is continued,
            and so is its MLflow run.
        uri: the tracking server, see ``tracking_uri``.
        experiment: MLflow experiment; run: name of the MLflow run; digest: of its configuration.
        runs_folder: where earlier runs may have left something unsent; it is sent too, after
            what this run has.

    As a context manager it finishes the run: ``failed`` after an exception, else ``finished``.
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
        self._journal = Journal(folder, experiment=experiment, run=run, digest=digest)
        self._journal.append("status", status="running")
        self._is_finished = self._has_warned = False
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._send_until_closed, daemon=True)
        self._thread.start()

    def log_params(self, parameters: Mapping[str, object]) -> None:
        """Parameters of the run; nested ones are flattened to ``a.b.c``."""
        self._journal.append("params", params=flatten(parameters))

    def log_metrics(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Metric values at a step; anything that ``float`` takes, infinities and NaN included."""
        values = {name: json_number(float(value)) for name, value in metrics.items()}
        self._journal.append("metrics", step=int(step), metrics=values)

    def log_tags(self, tags: Mapping[str, object]) -> None:
        """Texts beside the run, such as its commit; a later value replaces an earlier one."""
        self._journal.append("tags", tags=flatten(tags))

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """A file to keep in MLflow under ``folder``; it is read when it is sent."""
        if not path.is_file():
            raise ValueError(f"log_artifact: {path} is not a file")
        file, base = path.resolve(), self._folder.resolve()
        # Relative, so that a runs folder that was moved can still be sent.
        name = file.relative_to(base) if file.is_relative_to(base) else file
        self._journal.append("artifact", path=name.as_posix(), folder=folder)

    def finish(self, status: str = "finished") -> None:
        """The run's last word, ``finished`` or ``failed``."""
        if status not in ("finished", "failed"):
            raise ValueError(f"status must be finished or failed, got {status!r}")
        self._is_finished = True
        self._journal.append("status", status=status)

    def close(self, timeout: float = 5.0) -> bool:
        """Wait at most ``timeout`` seconds for the sending; True when all of it was sent."""
        self._stopping.set()
        self._thread.join(timeout)
        self._journal.close()
        is_sent = not SentMark(self._folder, self._uri).is_pending()
        if not is_sent:
            self._warn(f"the rest of {self._folder.name} was not taken in {timeout:g} s")
        return is_sent

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if not self._is_finished:
            self.finish("finished" if kind is None else "failed")
        self.close()

    def _send_until_closed(self) -> None:
        store: _Store | None = None
        pause = SECONDS_BETWEEN_SENDS
        while True:
            is_last = self._stopping.is_set()
            try:
                store = store or _Store(self._uri)
                store.send(self._folder)
                pause, self._has_warned = SECONDS_BETWEEN_SENDS, False
                self._send_others(store)
            except OSError as error:
                store, pause = None, min(2 * pause, LONGEST_BACK_OFF)
                self._warn(str(error))
            if is_last:
                return
            self._stopping.wait(pause)

    def _warn(self, reason: str) -> None:
        if not self._has_warned:
            _warn_away(self._uri, reason)
        self._has_warned = True

    def _send_others(self, store: "_Store") -> None:
        runs_folder, self._runs_folder = self._runs_folder, None
        for folder in pending_folders(runs_folder, self._uri) if runs_folder else []:
            if not self._stopping.is_set():
                store.send(folder)


def send_pending(runs_folder: Path, uri: str, *, again: bool = False) -> Sent:
    """Send what the runs in ``runs_folder`` could not send to ``uri`` yet.

    Args:
        again: forget what was sent and send everything, for a server that lost it.

    A run that another process is sending is left to it and counted as waiting, as are all that
    are left when the server is away.  Without anything to send MLflow is not even imported.
    """
    folders = pending_folders(runs_folder, None if again else uri)
    total = Sent()
    if not folders:
        return total
    try:
        store = _Store(uri)
        for folder in folders:
            total += store.send(folder, again=again)
    except OSError as error:
        _warn_away(uri, str(error))
    return total + Sent(waiting=len(folders) - total.runs)


def _warn_away(uri: str, reason: str) -> None:
    server = without_user(uri)
    _logger.warning("%s cannot be used now (%s); all is kept and sent later", server, reason)


class _Store:
    """MLflow at one URI; when it cannot be used, for whatever reason, ``OSError``."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._experiment_ids: dict[str, str] = {}
        self._run_ids: dict[Path, str] = {}
        for name, value in MLFLOW_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        self._database = _sqlite_file(uri)
        with _away():
            from mlflow import MlflowClient

            logging.getLogger("alembic").setLevel(logging.WARNING)
            # It logs with a traceback what it then raises.
            logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
            # The first client makes the tables, and MLflow does not keep two from doing so.
            lock = self._database and self._database.with_name(f"{self._database.name}.lock")
            with exclusive(lock, 60.0) if lock else nullcontext():
                self._client = MlflowClient(tracking_uri=uri)

    def send(self, folder: Path, *, again: bool = False) -> Sent:
        """Send what one run has unsent; nothing while another process sends it."""
        mark = SentMark(folder, self.uri)
        if not (again or mark.is_pending()):
            return Sent()
        with exclusive(folder / "journal.lock", 0.5) as is_held, _away():
            if not is_held:
                return Sent()
            known_id, offset = mark.read()
            run_id = self._run_ids.get(folder) or self._open_run(folder, known_id)
            self._run_ids[folder] = run_id
            start = offset if run_id == known_id and not again else 0
            sent = rejected = 0
            for end, records in read_batches(folder / JOURNAL, start):
                rejected += len(self._log(run_id, records, folder))
                mark.write(run_id, end)
                sent += len(records)
        return Sent(runs=1, records=sent, rejected=rejected)

    def _open_run(self, folder: Path, known_id: str) -> str:
        """The id of the MLflow run of a journal, made if there is none; a deleted one is back."""
        from mlflow.entities import ViewType

        _, header = next(read_journal(folder / JOURNAL))
        experiment_id = self._experiment_id(header["experiment"])
        found = self._client.search_runs(
            [experiment_id], f"tags.`{RUN_KEY}` = '{header['key']}'", ViewType.ALL
        )
        if not found:
            tags = {RUN_KEY: header["key"], "rudolph.digest": header["digest"]}
            start, name = header["time"], header["run"]
            return str(self._client.create_run(experiment_id, start, tags, name).info.run_id)
        run = next((run for run in found if run.info.run_id == known_id), found[0])
        if run.info.lifecycle_stage == "deleted":
            self._client.restore_run(run.info.run_id)
        return str(run.info.run_id)

    def _log(self, run_id: str, records: list[dict[str, Any]], folder: Path) -> list[str]:
        """Send records of one batch; what MLflow refuses for good, in words."""
        record, kind, refused = records[0], records[0]["kind"], []
        if kind == "artifact":
            path = folder / record["path"]
            if path.is_file():
                self._client.log_artifact(run_id, str(path), record["folder"] or None)
            else:
                refused = [f"{record['path']}: the file is gone"]
        elif kind in VALUE_KINDS:
            values = [value for record in records for value in _values(record)]
            refused = [line for part in _parts(values) for line in self._log_values(run_id, part)]
        elif kind == "status" and record["status"] == "running":
            self._client.update_run(run_id, "RUNNING")
        elif kind == "status":
            self._client.set_terminated(run_id, record["status"].upper(), record["time"])
        if refused:
            note = f"{len(refused)} refused: {refused[0]}"
            _logger.warning("%s: %s", folder.name, note)
            self._client.set_tag(run_id, REJECTED, note[:LONGEST_VALUE])
        return refused

    def _experiment_id(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        if name not in self._experiment_ids:
            folder = self._database.with_name("mlartifacts") if self._database else None
            try:
                # Not looked up first: another process may make it in between.
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
        """Log values; MLflow takes all or none, so a refused lot is halved until one is left."""
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
def _away() -> Iterator[None]:
    try:
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError
    except ImportError as error:
        raise ConnectionError(f"MLflow cannot be imported: {_one_line(error)}") from error
    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise ConnectionError(_one_line(error)) from error


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
    kind = Param if record["kind"] == "params" else RunTag
    return [kind(name, _cut(text)) for name, text in record[record["kind"]].items()]


def _cut(text: str) -> str:
    note = f" ... [cut, {len(text)} characters]"
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - len(note)] + note


def _parts(values: "list[Metric | Param | RunTag]") -> "Iterator[list[Metric | Param | RunTag]]":
    """Lots within the limits of one request."""
    part: list[Metric | Param | RunTag] = []
    weight = characters = 0
    for value in values:
        value_weight = TEXT_WEIGHT if isinstance(value.value, str) else METRIC_WEIGHT
        length = len(value.key) + len(str(value.value))
        if weight + value_weight > BATCH_WEIGHT or characters + length > BATCH_CHARACTERS:
            yield part
            part, weight, characters = [], 0, 0
        part.append(value)
        weight, characters = weight + value_weight, characters + length
    yield part
