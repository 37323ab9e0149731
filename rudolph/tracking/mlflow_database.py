"""MLflow's SQLite file: created atomically, and checked before MLflow opens it.

MLflow creates some 60 tables one after the other, in the file itself.  If the process is killed
meanwhile, MLflow can never open the file again.  Here the file is created under another name and
then renamed.  If another program left an incomplete file without data, that file is set aside.
"""

import os
import sqlite3
import threading
import time
from contextlib import closing
from pathlib import Path

from rudolph.files.atomic import rename_damaged, warn_once

# SQLite keeps these files next to a database in use; a killed process leaves them behind.
COMPANIONS = ("-journal", "-wal", "-shm")
# Creating the tables adds rows only here; the experiment "Default" is the last step.
BOOKKEEPING = ("alembic_version", "workspaces", "sqlite_sequence")
# Another program may be creating the tables; it changes the file more often than this.
SECONDS_UNTIL_ABANDONED = 10.0
# MLflow's migrations keep their state in a global variable of the process.
_migrating = threading.Lock()


class SlowStoreError(ConnectionError):
    """Error of a store that works but did not answer in time."""


def prepare_database(database: Path) -> None:
    """Create the database if it is missing or incomplete; keep a database that has data.

    Only one process may call this at a time.

    Raises:
        ConnectionError: if the file is not an SQLite database; the message gives the remedy.
    """
    while holds_nothing(database):
        if not database.exists() or _age(database) > SECONDS_UNTIL_ABANDONED:
            break
        time.sleep(0.2)
    else:
        return
    if database.exists() and database.stat().st_size:
        renamed = rename_damaged(database)
        for end in COMPANIONS:
            companion = database.with_name(f"{database.name}{end}")
            if companion.exists():
                os.replace(companion, renamed.with_name(f"{renamed.name}{end}"))
        warn_once(f"{database}: was incomplete and had no runs; renamed {renamed.name}")
    create_database(database)


def holds_nothing(database: Path) -> bool:
    """Return whether a database is missing or has no row outside MLflow's own bookkeeping.

    Raises:
        ConnectionError: if the file is not an SQLite database.
        SlowStoreError: if another program uses it.
    """
    if not database.exists() or database.stat().st_size == 0:
        return True
    advice = "move it away, then `rudolph sync --again` sends all runs to a new one"
    try:
        with closing(sqlite3.connect(database, timeout=10.0)) as connection:
            tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            names = sorted({name for (name,) in tables} - set(BOOKKEEPING))
            return not any(
                connection.execute(f'SELECT 1 FROM "{name}" LIMIT 1').fetchone() for name in names
            )
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY:
            raise SlowStoreError(f"{database}: another program uses it") from error
        raise ConnectionError(f"{database}: {error}") from error
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        raise ConnectionError(f"{database}: {error}; {advice}") from error


def create_database(database: Path) -> None:
    """Create MLflow's tables in a new file, then rename it.

    Exceptions of MLflow and SQLAlchemy are not caught.
    """
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    new = database.with_name(f"{database.name}.new")
    database.parent.mkdir(parents=True, exist_ok=True)
    paths = [new.with_name(f"{new.name}{end}") for end in ("", *COMPANIONS)]
    for path in paths:
        path.unlink(missing_ok=True)
    try:
        artifacts = database.with_name("mlartifacts").as_uri()
        with _migrating:
            store = SqlAlchemyStore(f"sqlite:///{new}", artifacts)  # type: ignore[no-untyped-call]
        store.engine.dispose()
        with new.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(new, database)
    finally:
        for path in paths:
            path.unlink(missing_ok=True)


def _age(database: Path) -> float:
    """Return the seconds since SQLite last wrote."""
    paths = [database.with_name(f"{database.name}{end}") for end in ("", *COMPANIONS)]
    return time.time() - max(path.stat().st_mtime for path in paths if path.exists())
