"""Download one file from the Hugging Face hub, with resuming and verification of its hash.

huggingface_hub resolves the file, its hash, the user's token and the mirror; this module streams
the bytes.  The library's own download (version 2.4) discards its bytes when interrupted, and these
files have up to 23 GB.  Next to a file ``F`` of the hub there may be:

    F.<hash>.part   the bytes of an interrupted download, to which the next call appends
    F.lock          empty, held by the process that is downloading
    F.sha256        the hash of F, with repository and commit as a comment, for ``sha256sum -c``

HF_ENDPOINT (a mirror), HF_HUB_OFFLINE and HF_TOKEN have the same meaning as in huggingface_hub.
The library reads them on import, so this module imports it inside functions only.
"""

import errno
import hashlib
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import NamedTuple

CHUNK_BYTES = 2**20
# Maximum number of consecutive connections that receive no byte, and the pause between two.
MAX_IDLE_CONNECTIONS = 5
SECONDS_BETWEEN_CONNECTIONS = 1.0
SECONDS_FOR_LOCK = 1.0

SHA256 = re.compile(r"[0-9a-f]{64}")
GIT_SHA1 = re.compile(r"[0-9a-f]{40}")
HASH_RECORD = re.compile(r"# (?P<repo>\S+)@(?P<commit>\S+)\n(?P<sha256>[0-9a-f]{64})  .+\n")

OnBytes = Callable[[int, int], None]


class FetchedFile(NamedTuple):
    """A complete local file, the SHA-256 of its bytes, and its commit on the hub."""

    path: Path
    sha256: str
    commit: str


class HubFile(NamedTuple):
    """A file's URL, commit, size in bytes and hash on the hub.

    ``hash`` is a SHA-256 for large files of the hub, else git's SHA-1 of the blob.
    """

    url: str
    commit: str
    size: int
    hash: str


def fetch(
    repo: str, file: str, folder: Path, *, on_progress: OnBytes | None = None
) -> FetchedFile:
    """Download a file of a repository's newest commit to ``folder / file``, complete and verified.

    Nothing is downloaded if the local file already equals the hub's.  If the hub is unreachable or
    offline mode is set, an unchanged file that an earlier call verified is used.

    Args:
        repo: the repository on the hub.
        file: the file's path in the repository.
        folder: the local folder.
        on_progress: called as bytes arrive, with the numbers of bytes received and in all.

    Raises:
        ValueError: if anything fails; the message is one line with advice.  A
            ``KeyboardInterrupt`` passes through.
    """
    import httpx2

    path = folder / file
    with hub_errors(repo, file, folder):
        try:
            hub_file = hub_metadata(repo, file)
        except (ConnectionError, httpx2.TransportError):
            verified = read_record(repo, path)
            if verified is None:
                raise
            return verified
        if not matches_hub(path, hub_file):
            download(hub_file, path, label=f"{repo} {file}", on_progress=on_progress)
        return write_record(repo, path, hub_file)


def hub_metadata(repo: str, file: str) -> HubFile:
    """Request the commit, size and hash of a file, without its bytes.

    Raises:
        ValueError: if the response is not that of a hub.
        Exception: errors of huggingface_hub and httpx2, which ``hub_errors`` translates.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    # The library's user agent requests a list of coding agents from the hub, and the library's log
    # repeats advice.
    constants.HF_HUB_DISABLE_TELEMETRY = True
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)

    metadata = get_hf_file_metadata(hf_hub_url(repo, file))
    commit, size, etag = metadata.commit_hash, metadata.size, metadata.etag or ""
    if commit is None or size is None or not (SHA256.fullmatch(etag) or GIT_SHA1.fullmatch(etag)):
        raise ValueError(
            f"{constants.ENDPOINT}: expected commit, size and hash of {repo} {file}, got none. "
            "It is not a hub: check HF_ENDPOINT and the network's proxy or sign-in page"
        )
    # Fix the commit, so that all connections of a download get parts of the same file.
    return HubFile(hf_hub_url(repo, file, revision=commit), commit, size, etag)


def download(
    hub_file: HubFile, path: Path, *, label: str, on_progress: OnBytes | None = None
) -> None:
    """Download a file and move it to ``path`` once its hash is verified.

    Args:
        hub_file: the file on the hub.
        path: the local file.
        label: the name of the file in error messages.
        on_progress: called with the numbers of local bytes and of all bytes, as bytes arrive.

    Raises:
        ValueError: if the bytes do not match the hub's hash; they are removed.
        TimeoutError: if another process is downloading the same file.
        OSError: if the disk lacks the space.
    """
    # The name is exported, but not in the way that mypy requires.
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{hub_file.hash[:12]}.part")
    lock = path.with_name(f"{path.name}.lock")
    with WeakFileLock(lock, timeout=SECONDS_FOR_LOCK):
        # The last holder of the lock may have downloaded the file.
        if not matches_hub(path, hub_file):
            for stale in path.parent.glob(f"{escape(path.name)}.*.part"):
                if stale != part:
                    stale.unlink()
            download_to_end(hub_file, part, on_progress or (lambda done, total: None))
            digest = file_hash(part, like=hub_file.hash)
            if digest != hub_file.hash:
                part.unlink()
                raise ValueError(
                    f"{label}: expected the hash {hub_file.hash}, got {digest}. The downloaded "
                    "bytes were removed: pull again, or from another HF_ENDPOINT"
                )
            os.replace(part, path)
    lock.unlink(missing_ok=True)


def download_to_end(hub_file: HubFile, part: Path, on_progress: OnBytes) -> None:
    """Download the rest of ``part``, resuming after broken connections.

    Raises:
        OSError: if the disk lacks the space.
        TransportError: of httpx2, after ``MAX_IDLE_CONNECTIONS`` connections without a byte.
    """
    import httpx2

    part.touch()
    if part.stat().st_size > hub_file.size:
        part.write_bytes(b"")
    num_missing = hub_file.size - part.stat().st_size
    num_free = shutil.disk_usage(part.parent).free
    if num_free < num_missing:
        reason = f"{num_missing / 1e9:.2f} GB to come, {num_free / 1e9:.2f} GB free"
        raise OSError(errno.ENOSPC, reason, str(part))
    num_idle = 0
    while (num_bytes := part.stat().st_size) < hub_file.size:
        try:
            download_once(hub_file, part, num_bytes, on_progress)
        except httpx2.TransportError:
            num_idle = 0 if part.stat().st_size > num_bytes else num_idle + 1
            if num_idle == MAX_IDLE_CONNECTIONS:
                raise
            time.sleep(SECONDS_BETWEEN_CONNECTIONS)


def download_once(hub_file: HubFile, part: Path, num_bytes: int, on_progress: OnBytes) -> None:
    """Append to ``part``, which has ``num_bytes`` bytes, over one connection.

    Raises:
        TransportError: of httpx2, if the connection ends before the file does.
    """
    import httpx2
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        build_hf_headers,
        hf_raise_for_status,
    )

    headers = build_hf_headers(headers={"Accept-Encoding": "identity"})
    if num_bytes:
        headers["Range"] = f"bytes={num_bytes}-"
    # httpx2 drops the token where the hub redirects to another host.
    with get_session().stream(
        "GET",
        hub_file.url,
        headers=headers,
        follow_redirects=True,
        timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
    ) as response:
        hf_raise_for_status(response)
        # A server that ignores Range sends the file from its first byte, with status 200.
        with part.open("ab" if response.status_code == 206 else "wb") as content:
            for chunk in response.iter_bytes(CHUNK_BYTES):
                content.write(chunk)
                on_progress(content.tell(), hub_file.size)
            if content.tell() < hub_file.size:
                raise httpx2.ReadError(f"the file ended after {content.tell()} bytes")


def matches_hub(path: Path, hub_file: HubFile) -> bool:
    """Return whether ``path`` is identical to the hub's file."""
    if not path.is_file() or path.stat().st_size != hub_file.size:
        return False
    return file_hash(path, like=hub_file.hash) == hub_file.hash


def file_hash(path: Path, *, like: str) -> str:
    """Return a file's SHA-256 or git's SHA-1 of it, depending on the length of ``like``."""
    blob = b"blob %d\0" % path.stat().st_size
    with path.open("rb") as content:
        if SHA256.fullmatch(like):
            return hashlib.file_digest(content, "sha256").hexdigest()
        return hashlib.file_digest(content, lambda: hashlib.sha1(blob)).hexdigest()


def write_record(repo: str, path: Path, hub_file: HubFile) -> FetchedFile:
    """Write the SHA-256 of a verified file next to it."""
    is_sha256 = SHA256.fullmatch(hub_file.hash)
    sha256 = hub_file.hash if is_sha256 else file_hash(path, like="0" * 64)
    record = f"# {repo}@{hub_file.commit}\n{sha256}  {path.name}\n"
    # A correct file may lie in a read-only folder, so an unchanged record is not written again.
    if read_text_or_empty(record_path(path)) != record:
        record_path(path).write_text(record, encoding="utf-8")
    return FetchedFile(path, sha256, hub_file.commit)


def read_record(repo: str, path: Path) -> FetchedFile | None:
    """Return a file that an earlier call verified, or None if there is none or it has changed."""
    record = HASH_RECORD.fullmatch(read_text_or_empty(record_path(path)))
    if record is None or record["repo"] != repo or not path.is_file():
        return None
    if file_hash(path, like=record["sha256"]) != record["sha256"]:
        return None
    return FetchedFile(path, record["sha256"], record["commit"])


def record_path(path: Path) -> Path:
    """Return the path of a file's hash record."""
    return path.with_name(f"{path.name}.sha256")


def read_text_or_empty(path: Path) -> str:
    """Return the text of a file, or "" if there is no such file."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


@contextmanager
def hub_errors(repo: str, file: str, folder: Path) -> Iterator[None]:
    """Translate every network, hub or disk error into a ``ValueError`` of one line."""
    import httpx2

    try:
        yield
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
        raise ValueError(explain_hub_error(error, repo, file, folder)) from error


def explain_hub_error(error: Exception, repo: str, file: str, folder: Path) -> str:
    """Describe in one line why a download failed and how to fix it."""
    from huggingface_hub import constants, errors

    hub, url = constants.ENDPOINT, f"https://huggingface.co/{repo}"
    sign_in = "run `hf auth login` or set HF_TOKEN, and pull again"
    match error:
        case errors.GatedRepoError():
            return f"{repo} is gated: request access at {url}, then {sign_in}"
        case errors.RepositoryNotFoundError():
            return f"{repo} is not on {hub}, or is private: check the name, or {sign_in}"
        case errors.RemoteEntryNotFoundError():
            return f"{repo} has no file {file}: {url}/tree/main lists its files"
        case errors.HfHubHTTPError():
            return explain_http_status(error.response.status_code, hub, f"{repo} {file}")
        case errors.OfflineModeIsEnabled():
            return (
                f"HF_HUB_OFFLINE is set, and {folder / file} is not complete: unset it and "
                "pull again, or copy the file and its .sha256 from a machine that pulled it"
            )
        case TimeoutError():
            return f"another process is downloading {file} to {folder}: wait until it has finished"
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            reason = f"no room for {file} in {folder} ({error.strerror})"
            return f"{reason}: free some space and pull again, which resumes the download"
        case OSError():
            return (
                f"cannot use {error.filename or folder}: {error.strerror or collapse_lines(error)}"
            )
        case _:
            return (
                f"no connection to {hub} ({collapse_lines(error)}): check the network, or set "
                "HF_ENDPOINT to a mirror, and pull again, which resumes the download"
            )


def explain_http_status(status: int, hub: str, label: str) -> str:
    """Describe in one line the meaning of an HTTP error status and how to fix it."""
    if status == 401:
        return (
            f"{hub} rejected your token for {label}: run `hf auth login` or correct "
            "HF_TOKEN; for a public file unset it"
        )
    if status == 403:
        return (
            f"{hub} denied access to {label}: give your token read access to this repository "
            "at https://huggingface.co/settings/tokens"
        )
    if status == 429:
        return (
            f"{hub} limits the rate of requests (429): wait a few minutes and pull {label} again"
        )
    return (
        f"{hub} responded with {status} for {label}: pull again later, or from another HF_ENDPOINT"
    )


def collapse_lines(error: Exception) -> str:
    """Return an error's message on one line, or the error's type if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__
