"""Arrays that are computed once and cached on disk, such as VQ indices and token ids.

The name of a cached array is the hash of its ``parts``: every input that determines its content.
A changed part therefore gives a new file, never a stale one.  Each cached array has three files:
``<name>.npy`` is the array, ``<name>.json`` its record and ``<name>.lock`` an empty lock file.
The record holds the parts and the SHA-256 of the array file.  Any of the files may be deleted
while no process is computing.
"""

import errno
import hashlib
import json
import logging
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from rudolph.files.atomic import file_sha256, rename_damaged

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# Part of every name; increment it when the file format changes.
FORMAT_VERSION = 1

# Errors that flock raises on network file systems mounted without locks.
NO_LOCKS_HERE = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)

log = logging.getLogger(__name__)


class ArrayWriter(NamedTuple):
    """An array too large for memory, given as rows that are written one at a time.

    ``rows`` yields ``shape[0]`` arrays of shape ``shape[1:]`` and dtype ``dtype``.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    rows: Iterable[np.ndarray[Any, Any]]


def cached_array(
    folder: Path,
    *,
    parts: Mapping[str, str],
    compute: Callable[[], np.ndarray[Any, Any] | ArrayWriter],
) -> np.ndarray[Any, Any]:
    """Return the array for ``parts``, memory-mapped and read-only, and compute it if not cached.

    If several processes need the same array, one computes it and the others wait.  On file systems
    without locks every process computes it, which only costs time.  A damaged file is recomputed,
    with a warning.

    Args:
        folder: Cache folder, created if missing.
        parts: Everything that determines the array, e.g. its kind "image_indices" and the digests
            of data and VQ-GAN.
        compute: Returns the array, of any shape and any dtype except object, or an
            ``ArrayWriter``.

    Raises:
        ValueError: If a part is empty, the array holds Python objects, or the rows of an
            ``ArrayWriter`` do not match its shape and dtype.
        OSError: If the folder cannot be written; the message names the file.
    """
    for name, value in parts.items():
        if not value:
            raise ValueError(f"part {name!r} of a cached array: expected a digest or name, got ''")
    name = _name(parts)
    array_path, record_path = folder / f"{name}.npy", folder / f"{name}.json"
    # Check without the lock first, because a complete cache may be in a read-only folder.
    if _cache_error(array_path, record_path, parts=parts) is None:
        return _open_memory_mapped(array_path)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / f"{name}.lock") as is_locked:
        error_message = _cache_error(array_path, record_path, parts=parts)
        if error_message is None:
            return _open_memory_mapped(array_path)
        if array_path.exists() or record_path.exists():
            log.warning("%s: %s; computing it again", array_path, error_message)
        array = compute()
        for path in (array_path, record_path):
            if path.is_dir():
                rename_damaged(path)
        if is_locked:
            _remove_leftovers(folder, name)
        _write(array_path, lambda file: _save(file, array))
        _write_record(record_path, array_path, parts=parts)
        return _open_memory_mapped(array_path)


def _save(file: IO[bytes], array: np.ndarray[Any, Any] | ArrayWriter) -> None:
    if isinstance(array, np.ndarray):
        np.save(file, array, allow_pickle=False)
        return
    header = {
        "descr": np.lib.format.dtype_to_descr(array.dtype),
        "fortran_order": False,
        "shape": array.shape,
    }
    np.lib.format.write_array_header_2_0(file, header)
    num_rows = 0
    for row in array.rows:
        if row.shape != array.shape[1:] or row.dtype != array.dtype:
            raise ValueError(
                f"row {num_rows} of a cached array: expected {array.dtype} {array.shape[1:]}, "
                f"got {row.dtype} {row.shape}"
            )
        file.write(row.tobytes())
        num_rows += 1
    if num_rows != array.shape[0]:
        raise ValueError(f"a cached array: expected {array.shape[0]} rows, got {num_rows}")


def _name(parts: Mapping[str, str]) -> str:
    canonical = json.dumps([FORMAT_VERSION, dict(parts)], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _write_record(record_path: Path, array_path: Path, *, parts: Mapping[str, str]) -> None:
    record = {"parts": dict(parts), "sha256": file_sha256(array_path), "format": FORMAT_VERSION}
    text = json.dumps(record, indent=2, sort_keys=True) + "\n"
    _write(record_path, lambda file: file.write(text.encode()))


def _open_memory_mapped(path: Path) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return array


def _cache_error(array_path: Path, record_path: Path, *, parts: Mapping[str, str]) -> str | None:
    """Return why the cached files cannot be used for these parts, or None if they can."""
    try:
        record = json.loads(record_path.read_bytes())
        if not isinstance(record, dict) or record.get("parts") != dict(parts):
            return "its record has other parts"
        if record.get("sha256") != file_sha256(array_path):
            return "its content differs from its record"
    except FileNotFoundError as error:
        return f"{Path(error.filename).suffix} file is missing"
    except IsADirectoryError as error:
        return f"{Path(error.filename).suffix} file is a folder"
    except (ValueError, RecursionError):
        return "its record cannot be read"
    return None


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold the file lock inside the context; yield False if the file system has no locks.

    The operating system releases the lock when the process ends.
    """
    # Never delete the lock file: another process could then lock a new file of the same name.
    with path.open("ab") as file:
        is_locked = _lock(file, path)
        try:
            yield is_locked
        finally:
            # Unlock explicitly: after close() alone, a worker forked earlier would hold the lock.
            if is_locked:
                fcntl.flock(file, fcntl.LOCK_UN)


def _lock(file: IO[bytes], path: Path) -> bool:
    if fcntl is None:
        return False
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("%s: waiting for another process that computes it", path)
            fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in NO_LOCKS_HERE:
            raise OSError(error.errno, error.strerror, str(path)) from error
        log.warning(
            "%s: the file system has no file locks; other processes may compute the same array",
            path,
        )
        return False
    return True


def _remove_leftovers(folder: Path, name: str) -> None:
    """Delete partial files of killed processes.  Only the holder of the lock may call this."""
    for leftover in folder.glob(f"{name}.*.partial"):
        leftover.unlink(missing_ok=True)


def _write(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file atomically: write a temporary file, fsync it, then rename it."""
    partial = path.with_suffix(f"{path.suffix}.{secrets.token_hex(8)}.partial")
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    except OSError as error:
        # Errors of a full disk have no file name, and those raised by NumPy have no errno.
        reason = error.strerror or str(error)
        raise OSError(error.errno or errno.EIO, reason, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Flush a rename to disk so that it survives a power cut.

    This does nothing on Windows, which cannot open folders.
    """
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
