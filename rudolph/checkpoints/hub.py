"""One file of the Hugging Face hub, brought into a folder, resumed and checked.

huggingface_hub finds the file, its hash, the user's token and mirror; the bytes are streamed here,
because its own download (2.4) throws away what it has when it is interrupted, and these files have
up to 23 GB.  Beside a file ``F`` of the hub may lie

    F.<hash>.part   what an interrupted download has; the next call goes on from its end
    F.lock          empty, held by the process that downloads now
    F.sha256        its hash, and as a comment its repository and commit; ``sha256sum -c`` reads it

HF_ENDPOINT (a mirror), HF_HUB_OFFLINE and HF_TOKEN mean here what they mean to huggingface_hub.
It reads them when it is imported, so functions import it, never this module.
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
# Connections in a row that brought no byte, and the pause before the next.
MAX_IDLE_CONNECTIONS = 5
SECONDS_BETWEEN_CONNECTIONS = 1.0
SECONDS_FOR_LOCK = 1.0

SHA256 = re.compile(r"[0-9a-f]{64}")
GIT_SHA1 = re.compile(r"[0-9a-f]{40}")
HASH_RECORD = re.compile(r"# (?P<repo>\S+)@(?P<commit>\S+)\n(?P<sha256>[0-9a-f]{64})  .+\n")

OnBytes = Callable[[int, int], None]


class FetchedFile(NamedTuple):
    """A whole file on this disk, the hash of its bytes, and the commit they are of."""

    path: Path
    sha256: str
    commit: str


class HubFile(NamedTuple):
    """What the hub says of a file.

    ``hash`` is SHA-256 for what the hub keeps as a large file, else git's SHA-1 of a blob.
    """

    url: str
    commit: str
    size: int
    hash: str


def fetch(
    repo: str, file: str, folder: Path, *, on_progress: OnBytes | None = None
) -> FetchedFile:
    """Bring a file of a repository's newest commit to ``folder / file``, whole and checked.

    Nothing is downloaded when the file there is the hub's already.  When the hub cannot be asked,
    a file that an earlier call has checked, and that has not changed since, is used as it is.

    Args:
        on_progress: told the bytes on this disk and in all, while bytes arrive.

    Raises:
        ValueError: one line that says what to do, whatever failed; an interruption passes through.
    """
    import httpx2

    path = folder / file
    with hub_errors(repo, file, folder):
        try:
            wanted = ask_hub(repo, file)
        except (ConnectionError, httpx2.TransportError):
            kept = read_record(repo, path)
            if kept is None:
                raise
            return kept
        if not is_whole(path, wanted):
            download(wanted, path, label=f"{repo} {file}", on_progress=on_progress)
        return write_record(repo, path, wanted)


def ask_hub(repo: str, file: str) -> HubFile:
    """Commit, size and hash of a file, without its bytes.

    Raises:
        ValueError: the answer is not a hub's.
        Exception: what huggingface_hub and httpx2 raise; ``hub_errors`` translates it.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    # Its user agent asks the hub for a list of coding agents, and its log repeats advice.
    constants.HF_HUB_DISABLE_TELEMETRY = True
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)

    known = get_hf_file_metadata(hf_hub_url(repo, file))
    commit, size, found = known.commit_hash, known.size, known.etag or ""
    if (
        commit is None
        or size is None
        or not (SHA256.fullmatch(found) or GIT_SHA1.fullmatch(found))
    ):
        raise ValueError(
            f"{constants.ENDPOINT} answers without the commit, size or hash of {repo} {file}, so "
            "it is no hub: check HF_ENDPOINT and the network's proxy or sign-in page"
        )
    # Of this commit, so that all connections of a download bring parts of the same file.
    return HubFile(hf_hub_url(repo, file, revision=commit), commit, size, found)


def download(
    wanted: HubFile, path: Path, *, label: str, on_progress: OnBytes | None = None
) -> None:
    """Put a file at ``path`` once all its bytes are here and right.

    Raises:
        ValueError: the bytes are not what the hub's hash says; they are removed.
        TimeoutError: another process downloads the same.
    """
    # Exported, but not by the letter that mypy asks for.
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{wanted.hash[:12]}.part")
    lock = path.with_name(f"{path.name}.lock")
    with WeakFileLock(lock, timeout=SECONDS_FOR_LOCK):
        # Whoever held the lock may have brought it.
        if not is_whole(path, wanted):
            for other in path.parent.glob(f"{escape(path.name)}.*.part"):
                if other != part:
                    other.unlink()
            download_to_end(wanted, part, on_progress or (lambda done, total: None))
            found = file_hash(part, like=wanted.hash)
            if found != wanted.hash:
                part.unlink()
                raise ValueError(
                    f"{label}: the bytes that arrived have the hash {found}, the hub's file has "
                    f"{wanted.hash}; they were removed: pull again, or from another HF_ENDPOINT"
                )
            os.replace(part, path)
    lock.unlink(missing_ok=True)


def download_to_end(wanted: HubFile, part: Path, on_progress: OnBytes) -> None:
    """Fill ``part`` up to the file's size; a broken connection is taken up where it broke."""
    import httpx2

    part.touch()
    if part.stat().st_size > wanted.size:
        part.write_bytes(b"")
    missing = wanted.size - part.stat().st_size
    free = shutil.disk_usage(part.parent).free
    if free < missing:
        reason = f"{missing / 1e9:.2f} GB to come, {free / 1e9:.2f} GB free"
        raise OSError(errno.ENOSPC, reason, str(part))
    num_idle = 0
    while (done := part.stat().st_size) < wanted.size:
        try:
            download_chunk(wanted, part, done, on_progress)
        except httpx2.TransportError:
            num_idle = 0 if part.stat().st_size > done else num_idle + 1
            if num_idle == MAX_IDLE_CONNECTIONS:
                raise
            time.sleep(SECONDS_BETWEEN_CONNECTIONS)


def download_chunk(wanted: HubFile, part: Path, done: int, on_progress: OnBytes) -> None:
    """One connection: append to ``part``, which holds ``done`` bytes.

    Raises:
        TransportError: of httpx2, when the connection ends before the file does.
    """
    import httpx2
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        build_hf_headers,
        hf_raise_for_status,
    )

    headers = build_hf_headers(headers={"Accept-Encoding": "identity"})
    if done:
        headers["Range"] = f"bytes={done}-"
    # httpx2 drops the token where the hub redirects to another host.
    with get_session().stream(
        "GET",
        wanted.url,
        headers=headers,
        follow_redirects=True,
        timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
    ) as response:
        hf_raise_for_status(response)
        # A server that ignores Range sends the file from its first byte, with status 200.
        with part.open("ab" if response.status_code == 206 else "wb") as content:
            for chunk in response.iter_bytes(CHUNK_BYTES):
                content.write(chunk)
                on_progress(content.tell(), wanted.size)
            if content.tell() < wanted.size:
                raise httpx2.ReadError(f"the file ended after {content.tell()} bytes")


def is_whole(path: Path, wanted: HubFile) -> bool:
    """Whether ``path`` is the hub's file, to the last bit."""
    if not path.is_file() or path.stat().st_size != wanted.size:
        return False
    return file_hash(path, like=wanted.hash) == wanted.hash


def file_hash(path: Path, *, like: str) -> str:
    """A file's SHA-256, or git's SHA-1 of it, whichever has as many digits as ``like``."""
    blob = b"blob %d\0" % path.stat().st_size
    with path.open("rb") as content:
        if SHA256.fullmatch(like):
            return hashlib.file_digest(content, "sha256").hexdigest()
        return hashlib.file_digest(content, lambda: hashlib.sha1(blob)).hexdigest()


def write_record(repo: str, path: Path, wanted: HubFile) -> FetchedFile:
    """Note the SHA-256 of a checked file beside it."""
    is_sha256 = SHA256.fullmatch(wanted.hash)
    sha256 = wanted.hash if is_sha256 else file_hash(path, like="0" * 64)
    record = f"# {repo}@{wanted.commit}\n{sha256}  {path.name}\n"
    # A file that is right already may lie in a folder that cannot be written.
    if read_response_text(record_path(path)) != record:
        record_path(path).write_text(record, encoding="utf-8")
    return FetchedFile(path, sha256, wanted.commit)


def read_record(repo: str, path: Path) -> FetchedFile | None:
    """A file as an earlier call has checked it; None if there was none, or it has changed."""
    record = HASH_RECORD.fullmatch(read_response_text(record_path(path)))
    if record is None or record["repo"] != repo or not path.is_file():
        return None
    if file_hash(path, like=record["sha256"]) != record["sha256"]:
        return None
    return FetchedFile(path, record["sha256"], record["commit"])


def record_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def read_response_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


@contextmanager
def hub_errors(repo: str, file: str, folder: Path) -> Iterator[None]:
    """Every failure of the network, hub or disk becomes a ``ValueError`` of one line."""
    import httpx2

    try:
        yield
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
        raise ValueError(explain_hub_error(error, repo, file, folder)) from error


def explain_hub_error(error: Exception, repo: str, file: str, folder: Path) -> str:
    """What failed and what to do, in one line."""
    from huggingface_hub import constants, errors

    hub, page = constants.ENDPOINT, f"https://huggingface.co/{repo}"
    sign_in = "run `hf auth login` or set HF_TOKEN, and pull again"
    match error:
        case errors.GatedRepoError():
            return f"{repo} is gated: ask for access at {page}, then {sign_in}"
        case errors.RepositoryNotFoundError():
            return f"{repo} is not on {hub}, or is private: check the name, or {sign_in}"
        case errors.RemoteEntryNotFoundError():
            return f"{repo} has no file {file}: {page}/tree/main lists what it has"
        case errors.HfHubHTTPError():
            return explain_http_status(error.response.status_code, hub, f"{repo} {file}")
        case errors.OfflineModeIsEnabled():
            return (
                f"HF_HUB_OFFLINE is set, and {folder / file} is not there whole: unset it and "
                "pull again, or copy the file and its .sha256 from a machine that pulled it"
            )
        case TimeoutError():
            return f"another process downloads {file} to {folder}: wait until it is done"
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            reason = f"no room for {file} in {folder} ({error.strerror})"
            return f"{reason}: free some and pull again, which goes on where this stopped"
        case OSError():
            return (
                f"cannot use {error.filename or folder}: {error.strerror or collapse_lines(error)}"
            )
        case _:
            return (
                f"no connection to {hub} ({collapse_lines(error)}): check the network, or set "
                "HF_ENDPOINT to a mirror, and pull again, which goes on where this stopped"
            )


def explain_http_status(status: int, hub: str, label: str) -> str:
    """What a refusal without further words means, and what to do."""
    if status == 401:
        return (
            f"{hub} does not take your token for {label}: run `hf auth login` or correct "
            "HF_TOKEN; for a public file unset it"
        )
    if status == 403:
        return (
            f"{hub} does not let you read {label}: give your token the right to read this "
            "repository at https://huggingface.co/settings/tokens"
        )
    if status == 429:
        return f"{hub} asks to slow down (429): wait some minutes and pull {label} again"
    return f"{hub} answers {status} for {label}: pull again later, or from another HF_ENDPOINT"


def collapse_lines(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
