"""Downloads from a hub: complete files, resumed transfers, and errors that name the remedy."""

import errno
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from filelock import FileLock
from hub_server import HubServer
from huggingface_hub import constants

from rudolph.checkpoints import hub as hub_module
from rudolph.checkpoints.hub import MAX_IDLE_CONNECTIONS, FetchedFile, fetch

ROOT = Path(__file__).parent.parent
REPO = "ai/model"
LARGE, SMALL = "weights/pytorch_model.bin", "config.json"
# Several whole chunks and a partial one.
WEIGHTS = np.random.default_rng(0).bytes(3 * hub_module.CHUNK_BYTES + 123_457)
CONFIG = b'{"family": "decoder"}\n'
CUT = hub_module.CHUNK_BYTES + 54_321
# One whole chunk was written before the cut.
RESUMED = f"bytes={hub_module.CHUNK_BYTES}-"

FETCH = """
import json, sys
from pathlib import Path
from rudolph.checkpoints.hub import fetch
try:
    path, sha256, commit = fetch(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    print(json.dumps([str(path), sha256, commit]))
except ValueError as error:
    print(json.dumps(str(error)))
"""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """Yield a hub with one repository, which this process uses."""
    monkeypatch.setattr(hub_module, "SECONDS_BETWEEN_CONNECTIONS", 0.0)
    with HubServer() as server:
        server.stand_in(monkeypatch, home=tmp_path / "home")
        server.add(REPO, LARGE, WEIGHTS, is_large=True)
        server.add(REPO, SMALL, CONFIG)
        yield server


def complaint(folder: Path, *, repo: str = REPO, file: str = LARGE) -> str:
    """Return the one-line message of a failing fetch."""
    with pytest.raises(ValueError) as caught:
        fetch(repo, file, folder)
    text = str(caught.value)
    assert "\n" not in text
    assert "<" not in text
    return text


def fetch_in_process(hub: HubServer, folder: Path, file: str = LARGE, **settings: str) -> Any:
    """Fetch in a fresh interpreter that must print no warning; return its result or message."""
    command = [sys.executable, "-W", "error", "-c", FETCH, REPO, file, str(folder)]
    environment = hub.environment(folder.parent / "home", **settings)
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert run.stderr == ""
    return json.loads(run.stdout)


def leftovers(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.suffix in (".part", ".lock")}


def interrupt(done: int, total: int) -> None:
    raise KeyboardInterrupt


# Successful downloads.


@pytest.mark.parametrize(("file", "content"), [(LARGE, WEIGHTS), (SMALL, CONFIG)])
def test_a_file_arrives_with_its_hash_and_commit(hub, tmp_path, file, content):
    got = fetch(REPO, file, tmp_path)
    assert got == FetchedFile(
        tmp_path / file, hashlib.sha256(content).hexdigest(), hub.commits[REPO]
    )
    assert got.path.read_bytes() == content
    assert leftovers(tmp_path) == set()


@pytest.mark.parametrize("file", [LARGE, SMALL])
def test_a_file_that_is_there_is_not_sent_again(hub, tmp_path, file):
    first, sent = fetch(REPO, file, tmp_path), hub.num_sent
    assert fetch(REPO, file, tmp_path) == first
    assert hub.num_sent == sent > 0


def test_a_file_that_was_put_there_by_hand_is_not_sent(hub, tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / LARGE).write_bytes(WEIGHTS)
    assert fetch(REPO, LARGE, tmp_path).commit == hub.commits[REPO]
    assert hub.num_sent == 0


def test_a_file_that_was_damaged_here_is_sent_again(hub, tmp_path):
    path = fetch(REPO, LARGE, tmp_path).path
    path.write_bytes(WEIGHTS[:-1] + bytes([WEIGHTS[-1] ^ 1]))
    assert fetch(REPO, LARGE, tmp_path).path.read_bytes() == WEIGHTS


def test_a_new_commit_replaces_the_file(hub, tmp_path):
    old = fetch(REPO, LARGE, tmp_path)
    hub.add(REPO, LARGE, WEIGHTS[::-1], is_large=True)
    new = fetch(REPO, LARGE, tmp_path)
    assert new.path.read_bytes() == WEIGHTS[::-1]
    assert new.commit == hub.commits[REPO] != old.commit


def test_the_old_name_of_a_repository_is_followed(hub, tmp_path):
    hub.rename("sberbank/model", REPO)
    assert fetch("sberbank/model", LARGE, tmp_path).path.read_bytes() == WEIGHTS


def test_progress_never_falls_and_ends_at_the_whole(hub, tmp_path):
    seen: list[tuple[int, int]] = []
    hub.cut_after(CUT)
    fetch(REPO, LARGE, tmp_path, on_progress=lambda *bytes_of: seen.append(bytes_of))
    assert seen == sorted(seen)
    assert len(seen) > 3
    assert {total for _, total in seen} == {len(WEIGHTS)}
    assert seen[-1] == (len(WEIGHTS), len(WEIGHTS))


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="sha256sum is not installed")
def test_the_record_is_read_by_sha256sum(hub, tmp_path):
    record = Path(f"{fetch(REPO, LARGE, tmp_path).path}.sha256")
    command = ["sha256sum", "--strict", "-c", record.name]
    subprocess.run(command, cwd=record.parent, capture_output=True, check=True)


# Interrupted downloads.


def test_a_cut_connection_is_taken_up_where_it_broke(hub, tmp_path):
    hub.cut_after(CUT, CUT)
    assert fetch(REPO, LARGE, tmp_path).path.read_bytes() == WEIGHTS
    ranges = [request.range for request in hub.content_requests()]
    assert ranges == [None, RESUMED, f"bytes={2 * hub_module.CHUNK_BYTES}-"]


def test_an_interrupted_download_goes_on_in_the_next_call(hub, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fetch(REPO, LARGE, tmp_path, on_progress=interrupt)
    assert not (tmp_path / LARGE).exists()
    assert fetch(REPO, LARGE, tmp_path).path.read_bytes() == WEIGHTS
    assert [request.range for request in hub.content_requests()] == [None, RESUMED]
    assert leftovers(tmp_path) == set()


def test_connections_without_a_byte_end_a_call_and_the_next_goes_on(hub, tmp_path):
    hub.cut_after(CUT, *[0] * MAX_IDLE_CONNECTIONS)
    assert "which resumes the download" in complaint(tmp_path)
    assert hub.cuts == []
    assert fetch(REPO, LARGE, tmp_path).path.read_bytes() == WEIGHTS
    assert hub.content_requests()[-1].range == RESUMED


def test_a_server_that_ignores_ranges_sends_the_whole_file(hub, tmp_path):
    hub.knows_ranges = False
    hub.cut_after(CUT)
    assert fetch(REPO, LARGE, tmp_path).path.read_bytes() == WEIGHTS


def test_the_part_of_an_older_file_is_not_gone_on_with(hub, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fetch(REPO, LARGE, tmp_path, on_progress=interrupt)
    hub.add(REPO, LARGE, WEIGHTS[::-1], is_large=True)
    assert fetch(REPO, LARGE, tmp_path).path.read_bytes() == WEIGHTS[::-1]
    assert leftovers(tmp_path) == set()


@pytest.mark.parametrize("file", [LARGE, SMALL])
def test_wrong_bytes_are_told_and_removed(hub, tmp_path, file):
    hub.is_corrupt = True
    text = complaint(tmp_path, file=file)
    stored = hub.files[REPO, file]
    assert f"{REPO} {file}" in text
    assert stored.hash in text
    assert f"got {stored._replace(content=last_bit_flipped(stored.content)).hash}" in text
    assert leftovers(tmp_path) <= {f"{Path(file).name}.lock"}
    assert not (tmp_path / file).exists()
    hub.is_corrupt = False
    assert fetch(REPO, file, tmp_path).path.read_bytes() == stored.content


def last_bit_flipped(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def test_two_processes_do_not_write_one_file(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(hub_module, "SECONDS_FOR_LOCK", 0.1)
    with FileLock(tmp_path / f"{SMALL}.lock"):
        assert "wait until it has finished" in complaint(tmp_path, file=SMALL)
    assert fetch(REPO, SMALL, tmp_path).path.read_bytes() == CONFIG


# Refusals.


@pytest.mark.parametrize("token", [None, "hf_of_another"])
def test_a_gated_repository_names_its_page_and_the_way_in(hub, tmp_path, monkeypatch, token):
    hub.gate(REPO, token="hf_allowed")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    text = complaint(tmp_path)
    assert "gated" in text
    assert f"https://huggingface.co/{REPO}," in text
    assert "`hf auth login` or set HF_TOKEN" in text
    monkeypatch.setenv("HF_TOKEN", "hf_allowed")
    assert fetch(REPO, LARGE, tmp_path).path.read_bytes() == WEIGHTS


@pytest.mark.parametrize("token", [None, "hf_any"])
def test_a_missing_or_private_repository_is_named(hub, tmp_path, monkeypatch, token):
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    text = complaint(tmp_path, repo="ai/nothing")
    assert text.startswith(f"ai/nothing is not on {hub.endpoint}, or is private")
    assert "HF_TOKEN" in text


def test_a_missing_file_is_named(hub, tmp_path):
    text = complaint(tmp_path, file="model.bin")
    assert text.startswith(f"{REPO} has no file model.bin")


def test_a_wrong_token_is_told(hub, tmp_path, monkeypatch):
    hub.valid_tokens = {"hf_right"}
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "rejected your token" in complaint(tmp_path)
    assert "hf_wrong" not in complaint(tmp_path)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (403, "settings/tokens"),
        (429, "wait a few minutes"),
        (503, "responded with 503"),
        (404, "404"),
    ],
)
def test_other_refusals_say_what_to_do(hub, tmp_path, status, words):
    hub.status = status
    assert words in complaint(tmp_path)


@pytest.mark.parametrize("header", ["X-Repo-Commit", "X-Linked-Etag", "X-Linked-Size"])
def test_an_answer_that_is_no_hubs_is_refused(hub, tmp_path, header):
    hub.dropped_headers = {header}
    assert "is not a hub: check HF_ENDPOINT" in complaint(tmp_path)


def test_a_server_that_is_away_is_named_with_the_way_to_a_mirror(hub, tmp_path):
    hub.stop()
    text = complaint(tmp_path)
    assert text.startswith(f"no connection to {hub.endpoint} (")
    assert "HF_ENDPOINT" in text


@pytest.mark.parametrize("endpoint", ["hf-mirror.com", "http://[", "ftp://hub"])
def test_an_endpoint_that_is_no_address_is_told(hub, tmp_path, monkeypatch, endpoint):
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(hub.endpoint, endpoint)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    assert complaint(tmp_path).startswith(f"no connection to {endpoint} (")


def test_a_checked_file_is_used_while_the_server_is_away(hub, tmp_path):
    got = fetch(REPO, LARGE, tmp_path)
    hub.stop()
    assert fetch(REPO, LARGE, tmp_path) == got
    got.path.write_bytes(WEIGHTS[:-1])
    assert "no connection" in complaint(tmp_path)


def test_the_record_of_another_repository_does_not_count(hub, tmp_path):
    hub.add("ai/other", SMALL, CONFIG)
    fetch("ai/other", SMALL, tmp_path)
    hub.stop()
    assert "no connection" in complaint(tmp_path, file=SMALL)


class Usage(NamedTuple):
    """The result type of ``shutil.disk_usage``."""

    total: int
    used: int
    free: int


def test_a_disk_without_room_is_told_before_bytes_are_sent(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 1000))
    text = complaint(tmp_path)
    assert text.startswith(f"no room for {LARGE} in {tmp_path} (0.00 GB to come, 0.00 GB free)")
    assert hub.num_sent == 0


def test_a_disk_that_fills_up_is_told_and_what_came_is_kept(hub, tmp_path):
    def fill(done: int, total: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ValueError, match=r"no room .* which resumes the download"):
        fetch(REPO, LARGE, tmp_path, on_progress=fill)
    assert fetch(REPO, LARGE, tmp_path).path.read_bytes() == WEIGHTS
    assert hub.content_requests()[-1].range == RESUMED


def test_a_folder_that_is_a_file_is_named(hub, tmp_path):
    (tmp_path / "weights").write_text("")
    assert complaint(tmp_path).startswith(f"cannot use {tmp_path / 'weights'}")


# Environment variables, read by a fresh interpreter.


def test_the_token_goes_to_the_mirror_and_not_to_the_cdn(hub, tmp_path):
    hub.headers = {"X-HF-Warning": "advice; set a token, upgrade, and more"}
    path, sha256, commit = fetch_in_process(hub, tmp_path / "a", HF_TOKEN="hf_secret")
    assert Path(path).read_bytes() == WEIGHTS
    assert (sha256, commit) == (hashlib.sha256(WEIGHTS).hexdigest(), hub.commits[REPO])
    tokens = {(request.host, request.authorization) for request in hub.requests}
    assert tokens == {("hub", "Bearer hf_secret"), ("cdn", None)}
    # No other requests are sent to the hub, such as lists of agents.
    assert all("/resolve/" in request.path for request in hub.requests if request.host == "hub")


def test_offline_uses_what_was_checked_and_asks_nothing(hub, tmp_path):
    text = fetch_in_process(hub, tmp_path / "a", HF_HUB_OFFLINE="1")
    assert text.startswith(f"HF_HUB_OFFLINE is set, and {tmp_path / 'a' / LARGE} is not complete")
    assert hub.requests == []
    got = fetch(REPO, LARGE, tmp_path / "a")
    num_requests = len(hub.requests)
    assert fetch_in_process(hub, tmp_path / "a", HF_HUB_OFFLINE="1") == [str(got[0]), *got[1:]]
    assert len(hub.requests) == num_requests


def test_the_module_is_imported_without_the_library():
    code = "import rudolph.checkpoints.hub, sys; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert not {"huggingface_hub", "httpx2", "torch"} & set(run.stdout.split())
