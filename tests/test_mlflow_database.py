"""MLflow's SQLite file is created completely or not at all, and never lost if it holds a run."""

import logging
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from random import Random

import pytest
from damage import NUM_CASES

from rudolph.tracking import mlflow_database
from rudolph.tracking.mlflow_database import SlowStoreError, holds_nothing, prepare_database
from rudolph.tracking.mlflow_store import MLflowStore
from rudolph.tracking.tracker import Tracker, send_pending

OLD = time.time() - 60


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an MLflow database with only its default experiment."""
    path = tmp_path_factory.mktemp("whole") / "mlflow.db"
    prepare_database(path)
    return path


def write_half(path: Path, *, experiments: int = 0) -> None:
    """Write what MLflow leaves if it is killed while it creates its tables."""
    with closing(sqlite3.connect(path)) as connection:
        for name in ("experiments", "runs", "_alembic_tmp_model_versions"):
            connection.execute(f"CREATE TABLE {name} (name TEXT)")
        connection.execute("CREATE TABLE alembic_version (version_num TEXT)")
        connection.execute("INSERT INTO alembic_version VALUES ('451aebb31d03')")
        for number in range(experiments):
            connection.execute("INSERT INTO experiments VALUES (?)", [f"experiment {number}"])
        connection.commit()
    os.utime(path, (OLD, OLD))


def tables(path: Path) -> set[str]:
    with closing(sqlite3.connect(path)) as connection:
        found = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        return {name for (name,) in found}


def test_a_new_database_is_whole_and_nothing_lies_beside_it(whole: Path) -> None:
    assert {"experiments", "runs", "metrics"} <= tables(whole)
    assert not any(name.startswith("_alembic") for name in tables(whole))
    assert {path.name for path in whole.parent.iterdir()} <= {"mlflow.db", "mlartifacts"}
    before = whole.stat().st_mtime_ns
    assert not holds_nothing(whole)
    prepare_database(whole)
    assert whole.stat().st_mtime_ns == before


def test_a_half_made_database_is_set_aside_and_records_are_sent(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    database = tmp_path / "mlflow.db"
    write_half(database)
    monkeypatch.setattr(
        mlflow_database, "create_database", lambda path: shutil.copyfile(whole, path)
    )
    folder = tmp_path / "runs" / "e" / "r"
    with (
        caplog.at_level(logging.WARNING, "rudolph"),
        Tracker(folder, f"sqlite:///{database}", experiment="e", run="r", digest="d") as tracker,
    ):
        tracker.log_metrics({"loss": 1.0}, step=0)
    assert caplog.messages == [
        f"{database}: was incomplete and had no runs; renamed mlflow.db.damaged"
    ]
    assert "_alembic_tmp_model_versions" in tables(tmp_path / "mlflow.db.damaged")
    assert send_pending(tmp_path / "runs", f"sqlite:///{database}").runs == 0
    with closing(sqlite3.connect(database)) as connection:
        assert connection.execute("SELECT value FROM metrics").fetchall() == [(1.0,)]


def test_a_database_that_holds_an_experiment_is_never_set_aside(tmp_path: Path) -> None:
    database = tmp_path / "mlflow.db"
    write_half(database, experiments=1)
    content = database.read_bytes()
    with pytest.raises(ConnectionError) as caught:
        MLflowStore(f"sqlite:///{database}")
    assert "\n" not in str(caught.value)
    with closing(sqlite3.connect(database)) as connection:
        assert connection.execute("SELECT name FROM experiments").fetchall() == [("experiment 0",)]
    assert not (tmp_path / "mlflow.db.damaged").exists()
    assert content[:16] == database.read_bytes()[:16]


def test_a_file_that_is_no_database_stays_and_is_told_with_what_to_do(tmp_path: Path) -> None:
    database = tmp_path / "mlflow.db"
    database.write_bytes(b"no database" * 90)
    with pytest.raises(ConnectionError, match="move it away, then `rudolph sync --again`"):
        MLflowStore(f"sqlite:///{database}")
    assert database.read_bytes() == b"no database" * 90


def test_a_database_that_another_program_makes_now_is_waited_for(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = tmp_path / "mlflow.db"
    write_half(database)
    os.utime(database)

    def finish(seconds: float) -> None:
        shutil.copyfile(whole, database)

    monkeypatch.setattr(mlflow_database.time, "sleep", finish)
    prepare_database(database)
    assert {path.name for path in tmp_path.iterdir()} == {"mlflow.db"}


def test_a_locked_database_is_slow_and_not_damaged(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = tmp_path / "mlflow.db"
    shutil.copyfile(whole, database)
    connect = sqlite3.connect
    monkeypatch.setattr(
        mlflow_database.sqlite3, "connect", lambda path, timeout: connect(path, timeout=0.05)
    )
    with closing(connect(database, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(SlowStoreError, match="another program uses it"):
            prepare_database(database)


KILLED = (
    "import sys; from pathlib import Path;"
    "from rudolph.tracking.mlflow_database import prepare_database;"
    "prepare_database(Path(sys.argv[1]))"
)


def test_a_process_killed_while_it_makes_the_tables_leaves_no_database(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = tmp_path / "mlflow.db"
    new = tmp_path / "mlflow.db.new"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(database)])
    while not (new.exists() and new.stat().st_size > Random(0).randrange(10_000, 90_000)):
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not database.exists() and new.exists()
    monkeypatch.setattr(
        mlflow_database, "create_database", lambda path: shutil.copyfile(whole, path)
    )
    prepare_database(database)
    assert not holds_nothing(database)


def test_any_damage_to_a_database_keeps_the_records_in_the_journal(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        mlflow_database, "create_database", lambda path: shutil.copyfile(whole, path)
    )
    content = whole.read_bytes()
    for case in range(NUM_CASES or 4):
        rng, folder = Random(case), tmp_path / str(case)
        folder.mkdir()
        database = folder / "mlflow.db"
        start = rng.randrange(len(content))
        garbage = rng.randbytes(rng.choice((1, 100, 5000)))
        database.write_bytes(
            content[:start]
            if rng.random() < 0.5
            else content[:start] + garbage + content[start + len(garbage) :]
        )
        os.utime(database, (OLD, OLD))
        tracker = Tracker(
            folder / "run", f"sqlite:///{database}", experiment="e", run="r", digest="d"
        )
        tracker.log_metrics({"loss": 1.0}, step=0)
        tracker.finish()
        is_sent = tracker.close(20.0)
        assert is_sent or tracker._has_warned, case
