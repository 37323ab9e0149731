"""The event log keeps every record through crashes and with many threads."""

import logging
import math
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_atomic import file_limit

from rudolph.files.atomic import DamagedFileError, json_number
from rudolph.tracking.event_log import (
    JOURNAL,
    VALUES_IN_BATCH,
    EventLog,
    SendMarker,
    file_lock,
    flatten,
    pending_folders,
    read_batches,
    read_event_log,
)


def open_journal(folder: Path, digest: str = "d") -> EventLog:
    return EventLog(folder, experiment="e", run="r", digest=digest)


def records(folder: Path) -> list[dict[str, Any]]:
    return [record for _, record in read_event_log(folder / JOURNAL)]


def test_what_is_appended_is_read_back_from_any_offset(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    for step in range(5):
        journal.append("metrics", step=step, metrics={"ряд": json_number(step - math.inf)})
    journal.close()
    ends = list(read_event_log(tmp_path / JOURNAL))
    assert [r["step"] for _, r in ends[1:]] == list(range(5))
    assert ends[3][1]["metrics"] == {"ряд": -math.inf}
    for position, (end, _) in enumerate(ends):
        assert list(read_event_log(tmp_path / JOURNAL, end)) == ends[position + 1 :]


def test_a_line_cut_off_by_a_crash_is_dropped_and_the_run_goes_on(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    journal.append("tags", tags={"a": "1"})
    journal.close()
    whole = records(tmp_path)
    with (tmp_path / JOURNAL).open("a") as file:
        file.write('{"kind": "metrics", "ti')
    assert records(tmp_path) == whole
    journal = open_journal(tmp_path)
    journal.append("tags", tags={"a": "2"})
    journal.close()
    assert records(tmp_path)[:-1] == whole and records(tmp_path)[-1]["tags"] == {"a": "2"}


@pytest.mark.parametrize("place", ["header", "middle"])
def test_a_damaged_journal_keeps_its_whole_records_and_is_sent_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, place: str
) -> None:
    journal = open_journal(tmp_path)
    for name in "abc":
        journal.append("tags", tags={"name": name})
    journal.close()
    path = tmp_path / JOURNAL
    lines = path.read_bytes().splitlines(keepends=True)
    lines[0 if place == "header" else 2] = b"\x00\x00 garbage\n"
    path.write_bytes(b"".join(lines))
    damaged = path.read_bytes()
    SendMarker(tmp_path, "http://host").write("id", len(damaged))
    with pytest.raises(
        DamagedFileError, match=r"journal.jsonl: damaged \(expected a record at byte \d+"
    ):
        records(tmp_path)
    with caplog.at_level(logging.WARNING, "rudolph"):
        journal = open_journal(tmp_path)
    journal.append("tags", tags={"name": "d"})
    journal.close()
    assert not journal.is_continued and len(caplog.messages) == 1
    kept = records(tmp_path)
    assert [record["kind"] for record in kept[:2]] == ["run", "tags"]
    names = [record["tags"]["name"] for record in kept[1:]]
    assert names == (["a", "b", "c", "d"] if place == "header" else ["a", "c", "d"])
    assert (tmp_path / f"{JOURNAL}.damaged").read_bytes() == damaged
    assert SendMarker(tmp_path, "http://host").read() == ("", 0)
    again = open_journal(tmp_path)
    again.close()
    assert again.is_continued


def test_a_mark_of_another_journal_counts_for_nothing(tmp_path: Path) -> None:
    open_journal(tmp_path).close()
    size = (tmp_path / JOURNAL).stat().st_size
    mark = SendMarker(tmp_path, "http://host")
    for offset in (size + 1, size - 3):
        mark.write("id", offset)
        assert mark.read() == ("id", 0) and mark.is_pending()
    mark.write("id", size)
    assert not mark.is_pending()


def test_a_failed_write_leaves_no_half_record(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    before = journal.path.read_bytes()
    with file_limit(len(before) + 20), pytest.raises(OSError, match=r"journal\.jsonl"):
        journal.append("tags", tags={"name": "x" * 100})
    assert journal.path.read_bytes() == before
    journal.append("tags", tags={"name": "y"})
    journal.close()
    assert [record.get("tags") for record in records(tmp_path)] == [None, {"name": "y"}]


def test_a_lock_that_cannot_be_made_is_told_with_its_file(tmp_path: Path) -> None:
    (tmp_path / "x.lock").mkdir()
    with pytest.raises(IsADirectoryError, match=r"x\.lock"), file_lock(tmp_path / "x.lock", 0.0):
        pass
    (tmp_path / "y.lock").write_bytes(b"garbage" * 100)
    with file_lock(tmp_path / "y.lock", 0.0) as is_held:
        assert is_held


def test_a_folder_of_another_configuration_is_refused(tmp_path: Path) -> None:
    open_journal(tmp_path, "one").close()
    with pytest.raises(ValueError, match="expected the event log of digest two, got one"):
        open_journal(tmp_path, "two")


def test_appends_from_many_threads_are_all_kept_and_cost_little(tmp_path: Path) -> None:
    journal, seconds = open_journal(tmp_path), []

    def write(thread: int) -> None:
        for step in range(200):
            started = time.perf_counter()
            journal.append("metrics", step=step, metrics={"loss": thread + step / 1000})
            seconds.append(time.perf_counter() - started)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    journal.close()
    values = Counter(record["metrics"]["loss"] for record in records(tmp_path)[1:])
    assert values == {number + step / 1000: 1 for number in range(4) for step in range(200)}
    assert sorted(seconds)[len(seconds) // 2] < 1e-3


def test_batches_hold_every_record_once_and_in_order(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    for step in range(VALUES_IN_BATCH):
        journal.append("metrics", step=step, metrics={"a": 1.0, "b": 2.0})
        if step % 300 == 7:
            journal.append("artifact", path="x.png", folder="")
            journal.append("params", params={"a": "b"})
    journal.close()
    batches = list(read_batches(tmp_path / JOURNAL, 0))
    assert [record for _, batch in batches for record in batch] == records(tmp_path)
    assert batches[-1][0] == (tmp_path / JOURNAL).stat().st_size
    for _, batch in batches:
        kinds = Counter(record["kind"] for record in batch)
        assert kinds == {"artifact": 1} or "artifact" not in kinds
        assert 2 * kinds["metrics"] < VALUES_IN_BATCH + 2


def test_each_server_has_its_own_mark_without_its_password(tmp_path: Path) -> None:
    open_journal(tmp_path / "run").close()
    size = (tmp_path / "run" / JOURNAL).stat().st_size
    mark = SendMarker(tmp_path / "run", "http://anna:secret@host:5000")
    assert mark.read() == ("", 0) and mark.is_pending()
    mark.write("id-1", size)
    assert SendMarker(tmp_path / "run", "http://host:5000").read() == ("id-1", size)
    assert pending_folders(tmp_path, "http://host:5000") == []
    assert pending_folders(tmp_path, "http://other:5000") == [tmp_path / "run"]
    assert pending_folders(tmp_path, None) == [tmp_path / "run"]
    assert not any(b"secret" in file.read_bytes() for file in (tmp_path / "run").iterdir())


def test_a_lock_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    lock = tmp_path / "deep" / "lock"
    with file_lock(lock, 0.0) as first, file_lock(lock, 0.0) as second:
        assert (first, second) == (True, False)
    with file_lock(lock, 0.0) as third:
        assert third


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="."), min_size=1, max_size=4)
LEAVES = st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.lists(st.integers())


@given(st.dictionaries(NAMES, LEAVES | st.dictionaries(NAMES, LEAVES, min_size=1)))
def test_flattening_keeps_every_leaf_under_its_path(tree: dict[str, object]) -> None:
    flat = flatten(tree)
    paths = {
        path
        for name, value in tree.items()
        for path in ([f"{name}.{inner}" for inner in value] if isinstance(value, dict) else [name])
    }
    assert set(flat) == paths and all(isinstance(text, str) for text in flat.values())
