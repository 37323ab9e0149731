"""Atomic file writes, errors that name their file, and quarantine of damaged files.

A file is written under a temporary name next to its target and then renamed.  A killed process or
a full disk therefore leaves either the old file or the new one.

Libraries report failed writes in many ways, often without a file name.  ``naming_file`` converts
all of them to one ``OSError`` with the path, and ``explain_os_error`` formats it as one line.
"""

import errno
import hashlib
import io
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

DAMAGED = ".damaged"
ADVICE = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
    errno.EROFS: "the file system is read-only; use a folder that can be written",
    errno.EACCES: "check its permissions and those of its folder",
    errno.EPERM: "check its permissions and those of its folder",
    errno.EIO: "check the disk",
}
# Messages of torch's zip writer after a failed write.
TORCH_WRITE_ERROR = re.compile(
    r"PytorchStreamWriter|unexpected pos|file write failed|iostream error", re.IGNORECASE
)

_logger = logging.getLogger(__name__)
_logged: set[str] = set()


class DamagedFileError(ValueError):
    """An error for a file whose content is not what was written; the message is one line."""

    def __init__(self, path: Path, reason: str, advice: str = "") -> None:
        super().__init__(f"{path}: damaged ({reason}){advice and '. '}{advice}")
        self.path, self.reason = path, reason


def explain_os_error(error: OSError) -> str:
    """Return one line that names the file, the failure and a remedy."""
    error_number: int | None = error.errno
    reason, name = error.strerror, error.filename
    if isinstance(error, shutil.Error) and error.args and isinstance(error.args[0], list):
        # ``copytree`` collects (source, target, message) for every file that failed.
        _, name, text = error.args[0][0]
        error_number = _parse_errno(str(text))
        reason = os.strerror(error_number) if error_number else _collapse(str(text))
    elif error_number in ADVICE and error.filename2 is not None:
        # A copy error names its source first, but the target is the file that cannot be written.
        name = error.filename2
    subject = "a file cannot be read or written" if name is None else os.fsdecode(name)
    advice = f". {ADVICE[error_number].capitalize()}" if error_number in ADVICE else ""
    return f"{subject}: {(reason or _collapse(str(error)) or 'cannot be used').lower()}{advice}"


@contextmanager
def naming_file(path: Path, *, written: Path | None = None) -> Iterator[None]:
    """Name the file in the error of every failed read or write inside the context.

    Args:
        path: file to name in the error.
        written: temporary file that stands in for ``path``.  An error about the temporary file
            names ``path`` instead.

    Raises:
        OSError: with ``filename`` set to ``path``, unless the error already names another file.
    """
    try:
        yield
    except OSError as error:
        if error.filename not in (None, str(written)):
            raise
        error_number = error.errno or _parse_errno(str(error)) or errno.EIO
        raise OSError(error_number, error.strerror or _collapse(str(error)), str(path)) from error
    except SafetensorError as error:
        parsed_number = _parse_errno(str(error))
        if parsed_number is None:
            raise
        raise OSError(parsed_number, os.strerror(parsed_number), str(path)) from error
    except RuntimeError as error:
        if not TORCH_WRITE_ERROR.search(str(error)):
            raise
        error_number = _guess_errno(path)
        raise OSError(error_number, os.strerror(error_number), str(path)) from error


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file atomically: call ``write(new)`` on a temporary name, then rename it.

    Symbolic links stay links.  A device such as ``/dev/stdout`` is written directly.

    Args:
        path: target file; missing parent folders are created.
        write: writes the content to the path that it gets.

    Raises:
        OSError: naming ``path``, whose previous content is kept.
    """
    real_path = Path(os.path.realpath(path))
    temporary = real_path.with_name(f"{real_path.name}.{os.getpid()}.new")
    with naming_file(path, written=temporary):
        if real_path.exists() and not (real_path.is_file() or real_path.is_dir()):
            write(real_path)
            return
        real_path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            # Without fsync before the rename, a power failure could leave an empty file.
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, real_path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text as UTF-8, atomically."""
    write_atomic(path, lambda new: new.write_bytes(text.encode()))


def write_json(path: Path, content: Any) -> None:
    """Write JSON with an indentation of one space, atomically."""
    write_text(path, json_text(content, indent=1) + "\n")


def json_text(content: Any, *, indent: int | None = None) -> str:
    """Return strict JSON, with NaN and infinities as strings.

    >>> json_text({"loss": [1.5, float("nan")]})
    '{"loss": [1.5, "nan"]}'
    """
    return json.dumps(_json_safe(content), ensure_ascii=False, indent=indent, allow_nan=False)


def json_number(value: float) -> float | str:
    """Return the number, or its string form if it is infinite or NaN.

    JSON cannot represent these values; ``float`` parses the strings back.
    """
    return value if math.isfinite(value) else str(value)


def _json_safe(content: Any) -> Any:
    if isinstance(content, float):
        return json_number(content)
    if isinstance(content, dict):
        return {key: _json_safe(value) for key, value in content.items()}
    return (
        [_json_safe(value) for value in content] if isinstance(content, list | tuple) else content
    )


def require_disjoint_paths(target: Path, source: Path, name: str) -> None:
    """Raise ``ValueError`` if writing a target could change the source that it is made from.

    This is the case if both are the same path or one contains the other.  The file system resolves
    links, ``..`` and differences in letter case.

    Args:
        target: file or folder to write; it need not exist.
        source: file or folder that is read.
        name: flag or key of the target, for the message.
    """
    target_lineage, source_lineage = _lineage(target), _lineage(source)
    if target_lineage[0] == source_lineage[0]:
        relation = "is the same"
    elif source_lineage[0] in target_lineage:
        relation = "lies in it"
    elif target_lineage[0] in source_lineage:
        relation = "contains it"
    else:
        return
    raise ValueError(
        f"{name}: expected a path apart from {source}, got {target}, which {relation}. "
        "Give another path"
    )


def _lineage(path: Path) -> list[tuple[int, int] | str]:
    """Return the (device, inode) of a path and its parents, or the name of a missing one."""
    real_path = Path(os.path.realpath(path))
    identities: list[tuple[int, int] | str] = []
    for ancestor in (real_path, *real_path.parents):
        try:
            status = ancestor.stat()
        except OSError:
            identities.append(str(ancestor))
        else:
            identities.append((status.st_dev, status.st_ino))
    return identities


@contextmanager
def swapped_in(folder: Path) -> Iterator[Path]:
    """Yield an empty folder whose entries replace those in ``folder`` once all are complete.

    The replacement consists of renames only; if one fails, the previous entries are restored.
    """
    scratch = folder.with_name(f".{folder.name}.part")
    new, before = scratch / "new", scratch / "before"
    _restore_entries(before, folder)
    shutil.rmtree(scratch, ignore_errors=True)
    new.mkdir(parents=True)
    before.mkdir()
    moved_names: list[str] = []
    try:
        yield new
        folder.mkdir(exist_ok=True)
        for name in sorted(os.listdir(new)):
            if os.path.lexists(folder / name):
                os.replace(folder / name, before / name)
            os.replace(new / name, folder / name)
            moved_names.append(name)
    except BaseException:
        for name in moved_names:
            os.replace(folder / name, new / name)
        _restore_entries(before, folder)
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _restore_entries(before: Path, folder: Path) -> None:
    """Move back the entries of ``before`` that have no replacement in ``folder``."""
    for name in os.listdir(before) if before.is_dir() else ():
        if not os.path.lexists(folder / name):
            os.replace(before / name, folder / name)


def append_line(path: Path, line: str) -> None:
    """Append a line to a file completely or not at all; first drop an incomplete last line.

    Raises:
        OSError: naming the file.
    """
    with naming_file(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
                if file.read(1) != b"\n":
                    file.truncate(path.read_bytes().rfind(b"\n") + 1)
            write_all(file, f"{line}\n".encode())


def write_all(file: io.FileIO, content: bytes) -> None:
    """Append bytes to an unbuffered file; truncate it to its old size if the write fails.

    Raises:
        OSError: after the truncation.
    """
    end = os.fstat(file.fileno()).st_size
    written = 0
    try:
        while written < len(content):
            # On a full disk the first call may write a part and only the next one fails.
            written += file.write(content[written:])
    except OSError:
        file.truncate(end)
        raise


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal.

    Raises:
        OSError: If the file cannot be read; the error names it.
    """
    with naming_file(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> Any:
    """Load a JSON file.

    Raises:
        DamagedFileError: if the content is not UTF-8 or not JSON.
        OSError: if the file cannot be read.
    """
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DamagedFileError(path, f"not UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        reason = "empty" if not error.doc.strip() else f"not JSON at line {error.lineno}"
        raise DamagedFileError(path, reason) from error
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(path, f"not JSON: {str(error)[:80]}") from error


def read_mapping(path: Path, **kinds: type | tuple[type, ...]) -> dict[str, Any]:
    """Load a JSON file that must be a mapping with the given keys.

    Args:
        path: JSON file.
        **kinds: type, or tuple of types, of the value of each required key.

    Raises:
        DamagedFileError: naming the key that is missing or has another type.
        OSError: if the file cannot be read.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise DamagedFileError(path, f"expected a mapping, got {type(content).__name__}")
    for key, kind in kinds.items():
        if key not in content:
            raise DamagedFileError(path, f"{key} is missing")
        if not isinstance(content[key], kind):
            raise DamagedFileError(path, f"{key} is a {type(content[key]).__name__}")
    return content


def rename_damaged(path: Path) -> Path:
    """Rename a damaged file or folder to ``<name>.damaged`` and return its new path.

    A number is appended if that name is taken.
    """
    renamed, count = path.with_name(f"{path.name}{DAMAGED}"), 1
    while os.path.lexists(renamed):
        count += 1
        renamed = path.with_name(f"{path.name}{DAMAGED}-{count}")
    os.rename(path, renamed)
    return renamed


def warn_once(line: str) -> None:
    """Log a warning unless this process has already logged the same line."""
    if line not in _logged:
        _logged.add(line)
        _logger.warning("%s", line)


def _collapse(text: str) -> str:
    return re.sub(r"^\[Errno \d+\] ", "", " ".join(text.split()))


def _parse_errno(text: str) -> int | None:
    match = re.search(r"\(os error (\d+)\)|\[Errno (\d+)\]", text)
    return int(match[1] or match[2]) if match else None


def _guess_errno(path: Path) -> int:
    """Return the probable errno of a failed torch write, which torch does not report."""
    if shutil.disk_usage(path.parent).free < 1 << 20:
        return errno.ENOSPC
    try:
        import resource
    except ImportError:  # Windows
        return errno.EIO
    is_limited = resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY
    return errno.EFBIG if is_limited else errno.EIO
