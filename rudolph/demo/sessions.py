"""The state of a running demo: models, users, their requests and their files."""

import re
import shutil
import tempfile
import threading
import time
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rudolph.demo.limits import DemoLimits, StoppedError, Watch
from rudolph.demo.shelf import ModelShelf
from rudolph.demo.uploads import Uploads

ARCHIVE = "result.zip"
# Entries of an archive carry no time, so that equal results are equal files.
NO_TIME = (1980, 1, 1, 0, 0, 0)
MAX_AGE = 3600.0  # seconds


class DemoError(Exception):
    """A request that failed, with one line for its user."""


class Demo:
    """One demo and its users.

    Requests are computed one at a time, because they share processor and memory.

    Args:
        shelf: Models of the demo.
        limits: Largest request of one user.
        results: Folder of results, which may be missing.
        files: Folder of uploads and of files to download, which the demo may fill.
    """

    def __init__(
        self, shelf: ModelShelf, limits: DemoLimits, *, results: Path, files: Path
    ) -> None:
        self.shelf, self.limits, self.results, self.files = shelf, limits, results, files
        self.uploads = Uploads(files, limits.max_upload_bytes)
        self.compute_lock, self.watches_lock = threading.Lock(), threading.Lock()
        self.watches: dict[str, set[Watch]] = defaultdict(set)

    @contextmanager
    def request(
        self, user: str, on_progress: Callable[[str, int, int], None] | None = None
    ) -> Iterator[Watch]:
        """Wait for the turn of a request; a failure becomes a ``DemoError``.

        Args:
            user: Name of the user's session.
            on_progress: Called with the stage and the amounts done and in total.

        Raises:
            DemoError: With one line, if the request fails or is stopped.
        """
        watch = Watch(self.limits.max_seconds, on_progress)
        with self.watches_lock:
            self.watches[user].add(watch)
        try:
            with self.compute_lock:
                watch.start()
                yield watch
        # Torch, the file system and our own checks raise these.
        except (StoppedError, ValueError, RuntimeError, MemoryError, OSError) as error:
            raise DemoError(one_line(error)) from error
        finally:
            with self.watches_lock:
                self.watches[user].discard(watch)
                if not self.watches[user]:
                    del self.watches[user]

    def cancel(self, user: str) -> int:
        """End the requests of a user and return their number."""
        with self.watches_lock:
            watches = list(self.watches.get(user, ()))
        for watch in watches:
            watch.cancel()
        return len(watches)

    def save(self, files: Mapping[str, bytes]) -> Path:
        """Write the files of a result and an archive of them into a new folder.

        Results that are older than ``MAX_AGE`` are removed.
        """
        for old in self.files.glob("result-*"):
            if time.time() - old.stat().st_mtime > MAX_AGE:
                shutil.rmtree(old, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix="result-", dir=self.files))
        with zipfile.ZipFile(folder / ARCHIVE, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
                archive.writestr(zipfile.ZipInfo(name, NO_TIME), content)
        return folder


def one_line(error: BaseException) -> str:
    """Return the message of an error in one line, without paths of this machine's folders."""
    text = " ".join(str(error).split()) or type(error).__name__
    return re.sub(r"(?<![\w.])/(?:[^\s/]+/)+", "", text)
