"""Tracking: every record arrives exactly once, even at a real server that starts late."""

import json
import logging
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from rudolph.tracking import tracker as tracking
from rudolph.tracking.event_log import JOURNAL, SENT, SendMarker, read_event_log
from rudolph.tracking.mlflow_database import SlowStoreError
from rudolph.tracking.tracker import SendProgress, Tracker, git_state, send_pending, tracking_uri


class Server:
    """A real ``mlflow server`` on loopback that can start late."""

    def __init__(self, folder: Path, database: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        shutil.copyfile(database, folder / "server.db")

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self._folder}/server.db"]
        command += ["--artifacts-destination", str(self._folder / "artifacts")]
        environment = os.environ | {
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        with (self._folder / "server.log").open("w") as log:
            self._process = subprocess.Popen(
                command, env=environment, cwd=self._folder, stdout=log, stderr=log
            )

    def wait(self) -> None:
        for _ in range(900):
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=1).close()
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        raise AssertionError((self._folder / "server.log").read_text())

    def stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(20)


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Created once, because MLflow takes seconds to create its tables.
    path = tmp_path_factory.mktemp("empty") / "mlflow.db"
    client_of(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"), empty_database)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> str:
    # A user's checkout may have a space and Cyrillic in its path.
    checkout = tmp_path_factory.mktemp("мой checkout")
    shutil.copyfile(empty_database, checkout / "mlflow.db")
    return tracking_uri_of(checkout)


def tracking_uri_of(checkout: Path) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        return tracking_uri(checkout)


def track(folder: Path, uri: str, *, run: str = "row-s0", timeout: float = 20.0) -> bool:
    """Track a whole small run: parameters, tags, metrics of 3 steps, an artifact and its end."""
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    (folder / "samples" / "grid.png").write_bytes(b"image")
    tracker = Tracker(folder, uri, experiment="masks/ряд", run=run, digest="d1")
    tracker.log_params({"model": {"num_layers": 2, "mask": ["row", "conv"]}, "вопрос": "почему?"})
    tracker.log_tags({"commit": "abc", "dirty": False})
    for step in range(3):
        tracker.log_metrics({"val/loss/image": 2.0 - step, "psnr": 10.5 + step}, step=step)
    tracker.log_metrics({"broken": float("nan"), "ratio": float("inf")}, step=3)
    tracker.log_artifact(folder / "samples" / "grid.png", "samples")
    tracker.finish()
    return tracker.close(timeout)


def client_of(uri: str) -> Any:
    from mlflow import MlflowClient

    logging.getLogger("alembic").setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri)


def runs_of(uri: str, experiment: str = "masks/ряд") -> list[Any]:
    client = client_of(uri)
    found = client.get_experiment_by_name(experiment)
    runs = client.search_runs([found.experiment_id]) if found else []
    # The parent run has no metrics of its own.
    return [run for run in runs if run.info.run_name != experiment]


def assert_run_is_complete(uri: str, name: str) -> None:
    client = client_of(uri)
    (run,) = [run for run in runs_of(uri) if run.info.run_name == name]
    assert run.data.params == {
        "model.num_layers": "2",
        "model.mask": '["row", "conv"]',
        "вопрос": "почему?",
    }
    assert run.data.tags["commit"] == "abc" and run.data.tags["dirty"] == "false"
    points = client.get_metric_history(run.info.run_id, "val/loss/image")
    assert sorted((point.step, point.value) for point in points) == [(0, 2.0), (1, 1.0), (2, 0.0)]
    (broken,) = client.get_metric_history(run.info.run_id, "broken")
    assert broken.value != broken.value
    (ratio,) = client.get_metric_history(run.info.run_id, "ratio")
    assert ratio.value > 1e300
    assert [f.path for f in client.list_artifacts(run.info.run_id, "samples")] == [
        "samples/grid.png"
    ]
    assert run.info.status == "FINISHED"


def test_a_run_arrives_in_the_database_beside_the_checkout(tmp_path: Path, database: str) -> None:
    assert track(tmp_path / "run", database, run="plain")
    assert_run_is_complete(database, "plain")
    kept = list(Path(database.removeprefix("sqlite:///")).parent.glob("mlartifacts/**/grid.png"))
    assert [path.read_bytes() for path in kept] == [b"image"]


def test_a_run_without_a_server_finishes_and_arrives_once_when_the_server_comes(
    tmp_path: Path, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    runs = tmp_path / "runs"
    with caplog.at_level(logging.WARNING, "rudolph"):
        started = time.monotonic()
        assert not track(runs / "masks" / "away", server.uri, run="away", timeout=10.0)
        assert time.monotonic() - started < 10
    assert len(caplog.records) == 1 and "\n" not in caplog.text.strip()
    assert send_pending(runs, server.uri).waiting == 1

    server.start()
    server.wait()
    sent = send_pending(runs, server.uri)
    assert (sent.runs, sent.rejected, sent.waiting) == (1, 0, 0)
    assert_run_is_complete(server.uri, "away")
    assert send_pending(runs, server.uri) == SendProgress()
    (runs / "masks" / "away" / SENT).unlink()  # simulate a crash before the mark was written
    assert send_pending(runs, server.uri).records == sent.records
    assert_run_is_complete(server.uri, "away")

    # With the server running, the next run is sent at once.
    assert track(runs / "masks" / "present", server.uri, run="present")
    assert_run_is_complete(server.uri, "present")


def test_a_run_that_stopped_in_the_middle_of_a_line_is_continued(
    tmp_path: Path, database: str
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(KeyError), Tracker(folder, database, experiment="e", run="r", digest="d"):
        raise KeyError("training")
    (run,) = runs_of(database, "e")
    assert run.info.status == "FAILED"
    with (folder / JOURNAL).open("a") as journal:
        journal.write('{"kind": "metrics", "ti')
    with Tracker(folder, database, experiment="e", run="r", digest="d") as tracker:
        tracker.log_metrics({"loss": 1.0}, step=7)
    (again,) = runs_of(database, "e")
    assert again.info.run_id == run.info.run_id and again.info.status == "FINISHED"
    assert again.data.metrics == {"loss": 1.0}


def test_what_mlflow_refuses_stops_nothing_else(tmp_path: Path, database: str) -> None:
    folder = tmp_path / "run"
    (folder / "gone.txt").parent.mkdir()
    (folder / "gone.txt").write_text("x")
    with Tracker(folder, database, experiment="refused", run="r", digest="d") as tracker:
        tracker.log_artifact(folder / "gone.txt")
        (folder / "gone.txt").unlink()
        tracker.log_params({"long": "я" * 9000, "layers": 2} | {f"p{i}": i for i in range(250)})
        tracker.log_params({"layers": 3})
        tracker.log_metrics({"good": 1.0, "bad?name": 2.0}, step=0)
        tracker.log_metrics({f"m{i}": float(i) for i in range(2100)}, step=1)
    (run,) = runs_of(database, "refused")
    assert len(run.data.params["long"]) == 6000
    assert run.data.params["long"].endswith("[cut, 9000 characters]")
    assert run.data.params["layers"] == "2" and len(run.data.params) == 252
    assert set(run.data.metrics) == {"good"} | {f"m{i}" for i in range(2100)}
    assert "rejected" in run.data.tags["rudolph.rejected"]


def test_two_processes_may_make_the_database_at_once(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from rudolph.tracking.tracker import Tracker;"
        "t = Tracker(Path(sys.argv[1]), sys.argv[2], experiment='both', run='r', digest='d');"
        "t.log_metrics({'loss': 1.0}, step=0); t.finish(); sys.exit(not t.close(180.0))"
    )
    uri = tracking_uri_of(tmp_path)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / name), uri],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("one", "two")
    ]
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert outputs == [("", ""), ("", "")], "MLflow's chatter reached the terminal"
    assert [run.data.metrics for run in runs_of(uri, "both")] == [{"loss": 1.0}] * 2


def test_a_new_run_sends_what_earlier_runs_left(tmp_path: Path, database: str) -> None:
    runs = tmp_path / "runs"
    track(runs / "left", "http://127.0.0.1:9", run="left", timeout=0.0)
    with Tracker(
        runs / "new", database, experiment="e2", run="new", digest="d", runs_folder=runs
    ) as tracker:
        for _ in range(100):
            if (runs / "left" / SENT).exists():
                break
            time.sleep(0.05)
        tracker.log_metrics({"loss": 1.0}, step=0)
    assert_run_is_complete(database, "left")
    assert send_pending(runs, database) == SendProgress()


def test_logging_metrics_costs_less_than_a_tenth_of_a_millisecond(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path / "run", "http://127.0.0.1:9", experiment="e", run="r", digest="d")
    seconds = []
    for step in range(500):
        started = time.perf_counter()
        tracker.log_metrics({"loss": 1 / (step + 1), "psnr": 1.0}, step=step)
        seconds.append(time.perf_counter() - started)
    tracker.finish()
    tracker.close(0.0)
    records = [record for _, record in read_event_log(tmp_path / "run" / JOURNAL)]
    logged = [record["metrics"]["loss"] for record in records if record["kind"] == "metrics"]
    assert logged == [1 / (step + 1) for step in range(500)]
    # Only the fastest tenth must meet the bound, because the machine may be busy.
    assert sorted(seconds)[50] < 1e-4


def test_the_servers_password_is_not_written_down(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uri = "http://anna:secret@127.0.0.1:9"
    track(tmp_path / "run", uri)
    files = [path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()]
    assert "127.0.0.1:9" in caplog.text and "secret" not in caplog.text
    assert not any(b"secret" in content for content in files)


def test_the_environment_names_the_server_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert tracking_uri(tmp_path) == "http://tracking:5000"


def test_the_git_state_is_the_commit_and_whether_the_code_differs(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        names = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path), *names, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert git_state(tmp_path / "nowhere") == ("unknown", True)
    git("init", "-q")
    assert git_state(tmp_path) == ("unknown", True)
    (tmp_path / "code.py").write_text("x = 1\n")
    shutil.copyfile(Path(__file__).parent.parent / ".gitignore", tmp_path / ".gitignore")
    git("add", "code.py", ".gitignore")
    git("commit", "-qm", "first")
    commit = git("rev-parse", "HEAD")
    assert git_state(tmp_path) == (commit, False)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "runs.csv").write_text("run\n")
    assert git_state(tmp_path) == (commit, False)
    # A store and its lock leave these files for moments, while another run uses it.
    for end in ("", "-journal", "-wal", "-shm", ".lock", ".lock-journal"):
        (tmp_path / f"mlflow.db{end}").touch()
    assert git_state(tmp_path) == (commit, False)
    (tmp_path / "code.py").write_text("x = 2\n")
    assert git_state(tmp_path) == (commit, True)
    (tmp_path / "code.py").write_text("x = 1\n")
    (tmp_path / "new.py").write_text("y = 1\n")
    assert git_state(tmp_path / "results") == (commit, True)


def test_importing_the_module_does_not_import_mlflow_or_torch() -> None:
    program = (
        "import sys, json, rudolph.tracking.tracker;"
        "print(json.dumps([m for m in ('mlflow', 'torch', 'pandas') if m in sys.modules]))"
    )
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    assert json.loads(output) == []


class SlowStore:
    """A healthy store that takes 0.2 s per record."""

    def __init__(self, uri: str, *, opening: float = 0.0, parts: int = 4) -> None:
        self.uri, self.parts = uri, parts
        time.sleep(opening)

    def send(self, folder: Path, *, again: bool = False, on_progress: Any = None) -> SendProgress:
        for _ in range(self.parts):
            time.sleep(0.2)
            if on_progress is not None:
                on_progress()
        SendMarker(folder, self.uri).write("id", (folder / JOURNAL).stat().st_size)
        return SendProgress(runs=1)


def test_a_slow_server_is_waited_for_while_it_makes_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracking, "MLflowStore", partial(SlowStore, opening=0.6))
    tracker = Tracker(tmp_path / "run", "http://slow", experiment="e", run="r", digest="d")
    tracker.finish()
    with caplog.at_level(logging.WARNING, "rudolph"):
        # Opening takes longer than 0.4 s without progress, and so do all parts together.
        assert tracker.close(0.4)
    assert caplog.messages == []


def test_a_server_that_is_too_slow_is_called_slow_and_gets_the_rest_in_the_background(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracking, "MLflowStore", partial(SlowStore, parts=3))
    uri = "http://anna:secret@slow"
    tracker = Tracker(tmp_path / "run", uri, experiment="e", run="r", digest="d")
    tracker.finish()
    with caplog.at_level(logging.WARNING, "rudolph"):
        assert not tracker.close(0.05)
    [line] = caplog.messages
    assert line.startswith("http://slow is slow: the rest of run is sent in the background")
    tracker._thread.join(20)
    assert not SendMarker(tmp_path / "run", uri).is_pending()


def test_an_error_after_a_slow_answer_is_told_once_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Refusing(SlowStore):
        def send(self, folder: Path, **rest: Any) -> SendProgress:
            raise SlowStoreError("Read timed out")

    monkeypatch.setattr(tracking, "MLflowStore", Refusing)
    with caplog.at_level(logging.WARNING, "rudolph"):
        tracker = Tracker(tmp_path / "run", "http://slow", experiment="e", run="r", digest="d")
        assert not tracker.close(5.0)
    assert caplog.messages == [
        "http://slow is slow (Read timed out); records are kept and sent later"
    ]


def test_a_full_disk_of_the_store_does_not_end_a_run(
    tmp_path: Path,
    database: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(*arguments: Any, **keywords: Any) -> None:
        error = sqlite3.OperationalError("database or disk is full")
        raise OperationalError("INSERT", {}, error)

    from mlflow import MlflowClient

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "rudolph"):
        patch.setattr(MlflowClient, "log_batch", full)
        assert not track(tmp_path / "runs" / "r", database, run="full")
    [line] = caplog.messages
    assert "disk is full" in line and line.endswith("records are kept and sent later")
    assert send_pending(tmp_path / "runs", database).waiting == 0
    assert_run_is_complete(database, "full")


def test_a_damaged_journal_stops_no_other_run(
    tmp_path: Path, database: str, caplog: pytest.LogCaptureFixture
) -> None:
    runs = tmp_path / "runs"
    for name in ("damaged", "headless", "whole"):
        track(runs / name, "http://127.0.0.1:9", run=f"journal-{name}", timeout=0.0)
    journals = {name: runs / name / JOURNAL for name in ("damaged", "headless")}
    content = journals["damaged"].read_bytes()
    journals["damaged"].write_bytes(content.replace(b'{"kind": "tags"', b"\xff\xfe", 1))
    journals["headless"].write_bytes(content.partition(b"\n")[2])
    (runs / "whole" / SENT).write_bytes(b"[]")
    with caplog.at_level(logging.WARNING, "rudolph"):
        sent = send_pending(runs, database)
    assert (sent.runs, sent.waiting) == (1, 1)
    assert_run_is_complete(database, "journal-whole")
    for name in ("damaged/journal.jsonl", "headless/journal.jsonl", "whole/journal.sent"):
        assert any(name in line and "damaged (" in line for line in caplog.messages), name
