"""A local hub with the part of huggingface.co's protocol that downloads use.

A client requests a file at ``/{repo}/resolve/{revision}/{file}``. The hub serves a small file
itself, with git's SHA-1 of the blob as ETag. For a large file it redirects to a CDN on another
port, with the SHA-256 as X-Linked-Etag. A renamed repository redirects to its new name. Refusals
carry X-Error-Code and X-Error-Message, and an HTML page that must not reach the user.

    with HubServer() as hub:
        hub.add("ai/model", "weights.bin", b"...", is_large=True)
        hub.cut_after(1000)
        hub.stand_in(monkeypatch, home=tmp_path)  # or a subprocess with hub.environment(tmp_path)
        fetch("ai/model", "weights.bin", tmp_path)
        hub.content_requests()[-1].range  # "bytes=1000-"

Source: the answers that huggingface_hub 2.4.0 reads in ``file_download.py`` and ``_http.py``.
"""

import hashlib
import os
import re
import socket
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self
from urllib.parse import unquote

import pytest
from huggingface_hub import close_session, constants

REPOSITORY = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
BLOCK_BYTES = 2**16
SETTINGS = {
    *("HF_ENDPOINT", "HF_HOME", "HF_TOKEN", "HF_TOKEN_PATH", "HF_HUB_OFFLINE", "HF_DEBUG"),
    *("HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE", "HF_HUB_VERBOSITY", "TRANSFORMERS_OFFLINE"),
}


class Request(NamedTuple):
    """A received request; ``host`` is "hub" or "cdn"."""

    host: str
    method: str
    path: str
    range: str | None
    authorization: str | None


class StoredFile(NamedTuple):
    """A file of a repository."""

    content: bytes
    is_large: bool

    @property
    def hash(self) -> str:
        if self.is_large:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


class HubServer:
    """A hub and its CDN, each on its own port, running while the context is open.

    Attributes:
        valid_tokens: The accepted tokens; None accepts any.
        headers: Extra headers of every answer about a file.
        dropped_headers: Headers that are never sent, as by a faulty mirror.
        status: If not None, the status of every answer.
        is_corrupt: Send every file with a wrong last byte.
        knows_ranges: If False, ignore Range headers and send whole files.
        num_sent: Bytes of files sent so far.
    """

    def __init__(self) -> None:
        self.files: dict[tuple[str, str], StoredFile] = {}
        self.commits: dict[str, str] = {}
        self.gates: dict[str, str] = {}
        self.new_names: dict[str, str] = {}
        self.valid_tokens: set[str] | None = None
        self.headers: dict[str, str] = {}
        self.dropped_headers: set[str] = set()
        self.status: int | None = None
        self.cuts: list[int] = []
        self.is_corrupt = False
        self.knows_ranges = True
        self.requests: list[Request] = []
        self.num_sent = 0
        self.servers = {name: self._server(name) for name in ("hub", "cdn")}

    def __enter__(self) -> Self:
        for server in self.servers.values():
            # The default of 0.5 s would delay every shutdown() by as much.
            loop = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
            loop.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop both servers and close the connections that clients of this process keep open."""
        close_session()
        for server in self.servers.values():
            server.shutdown()
            server.server_close()

    @property
    def endpoint(self) -> str:
        return self.address("hub")

    def address(self, host: str) -> str:
        return f"http://127.0.0.1:{self.servers[host].server_address[1]}"

    def stand_in(self, monkeypatch: pytest.MonkeyPatch, *, home: Path) -> None:
        """Redirect huggingface_hub in this process to this server, without the user's token.

        The library read its environment at import, so its constants are patched.
        """
        template = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", self.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", self.endpoint + template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        for name in SETTINGS & set(os.environ):
            monkeypatch.delenv(name)
        monkeypatch.setenv("NO_PROXY", "*")
        # Its connections outlive a test and remember proxies.
        close_session()

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """Return a subprocess environment that uses this server, without the user's settings."""
        kept = {name: text for name, text in os.environ.items() if name not in SETTINGS}
        return {
            **kept,
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "NO_PROXY": "*",
            **more,
        }

    def add(self, repo: str, file: str, content: bytes, *, is_large: bool = False) -> None:
        """Add a file to a repository as a new commit."""
        self.files[repo, file] = StoredFile(content, is_large)
        held = sorted(
            f"{name} {kept.hash}" for (of, name), kept in self.files.items() if of == repo
        )
        self.commits[repo] = hashlib.sha1("\n".join(held).encode()).hexdigest()

    def gate(self, repo: str, *, token: str) -> None:
        """Restrict a repository to requests with this token."""
        self.gates[repo] = token

    def rename(self, old: str, new: str) -> None:
        """Redirect a repository's old name to the new one."""
        self.new_names[old] = new

    def cut_after(self, *num_bytes: int) -> None:
        """Cut the next connections that carry a large file, each after a number of bytes."""
        self.cuts = list(num_bytes)

    def content_requests(self) -> list[Request]:
        """Return the requests for file contents, without redirected ones."""
        return [
            request
            for request in self.requests
            if request.method == "GET" and (request.host == "cdn" or not self._is_large(request))
        ]

    def _is_large(self, request: Request) -> bool:
        asked = REPOSITORY.fullmatch(unquote(request.path))
        stored = self.files.get((asked["repo"], asked["file"])) if asked else None
        return stored is not None and stored.is_large

    def _server(self, host: str) -> ThreadingHTTPServer:
        class Handler(HubHandler):
            hub, host_name = self, host

        return ThreadingHTTPServer(("127.0.0.1", 0), Handler)


class HubHandler(BaseHTTPRequestHandler):
    """Request handler of the hub and, depending on ``host_name``, of the CDN."""

    hub: HubServer
    host_name: str
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        """Print nothing: ``HubServer.requests`` has the requests."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.hub.requests.append(
            Request(
                self.host_name,
                self.command,
                self.path,
                self.headers["Range"],
                self.headers["Authorization"],
            )
        )
        if self.host_name == "cdn":
            self.answer_cdn()
        else:
            self.answer_hub()

    def answer_cdn(self) -> None:
        stored = {kept.hash: kept for kept in self.hub.files.values()}[self.path.strip("/")]
        self.send_content(stored, {})

    def answer_hub(self) -> None:
        asked = REPOSITORY.fullmatch(unquote(self.path))
        if self.hub.status is not None:
            return self.refuse(self.hub.status, "", "")
        if asked is None:
            return self.refuse(404, "", "no such page")
        repo, revision, file = asked["repo"], asked["revision"], asked["file"]
        if repo in self.hub.new_names:
            new = f"/{self.hub.new_names[repo]}/resolve/{revision}/{file}"
            return self.send_head(307, {"Location": new, "Content-Length": "0"})
        if not self.is_allowed(repo):
            return None
        if repo not in self.hub.commits:
            return self.refuse(401 if self.token is None else 404, "RepoNotFound", "not found")
        if revision not in ("main", self.hub.commits[repo]):
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        if (repo, file) not in self.hub.files:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        stored = self.hub.files[repo, file]
        headers = {"X-Repo-Commit": self.hub.commits[repo], **self.hub.headers}
        if not stored.is_large:
            return self.send_content(stored, headers)
        linked = {"X-Linked-Etag": f'"{stored.hash}"', "X-Linked-Size": str(len(stored.content))}
        location = {"Location": f"{self.hub.address('cdn')}/{stored.hash}", "Content-Length": "0"}
        return self.send_head(302, {**headers, **linked, **location})

    @property
    def token(self) -> str | None:
        return (self.headers["Authorization"] or "").removeprefix("Bearer ") or None

    def is_allowed(self, repo: str) -> bool:
        """Return whether the token gives access to a repository; otherwise send the refusal."""
        valid = self.hub.valid_tokens
        if self.token is not None and valid is not None and self.token not in valid:
            self.refuse(401, "", "Invalid credentials in Authorization header")
        elif repo in self.hub.gates and self.token != self.hub.gates[repo]:
            message = f"Access to model {repo} is restricted."
            self.refuse(401 if self.token is None else 403, "GatedRepo", message)
        else:
            return True
        return False

    def send_content(self, stored: StoredFile, headers: Mapping[str, str]) -> None:
        content = stored.content
        if self.hub.is_corrupt:
            content = content[:-1] + bytes([content[-1] ^ 1])
        size, first = len(content), 0
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        if wanted and self.hub.knows_ranges:
            first = int(wanted[1])
        if first >= size > 0:
            return self.send_head(416, {"Content-Range": f"bytes */{size}", "Content-Length": "0"})
        ranges = {"Content-Range": f"bytes {first}-{size - 1}/{size}"} if first else {}
        about = {"ETag": f'"{stored.hash}"', "Accept-Ranges": "bytes", **ranges}
        about["Content-Length"] = str(size - first)
        self.send_head(206 if first else 200, {**headers, **about})
        if self.command == "GET":
            self.send_body(content[first:])
        return None

    def send_body(self, content: bytes) -> None:
        whole = len(content)
        last = min(self.hub.cuts.pop(0), whole) if self.hub.cuts else whole
        try:
            for start in range(0, last, BLOCK_BYTES):
                block = content[start : min(start + BLOCK_BYTES, last)]
                self.hub.num_sent += len(block)
                self.wfile.write(block)
            if last < whole:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
        except (BrokenPipeError, ConnectionResetError):
            # The client has closed the connection.
            self.close_connection = True

    def refuse(self, status: int, code: str, message: str) -> None:
        page = b"<html><body>Sorry, this page is for browsers.</body></html>"
        errors = {"X-Error-Code": code, "X-Error-Message": message}
        about = {"Content-Type": "text/html", "Content-Length": str(len(page))}
        self.send_head(status, {**about, **{name: text for name, text in errors.items() if text}})
        if self.command == "GET":
            self.wfile.write(page)

    def send_head(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name not in self.hub.dropped_headers:
                self.send_header(name, value)
        self.end_headers()
