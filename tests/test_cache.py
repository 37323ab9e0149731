"""The disk cache of arrays: never stale, never partial, and computed by one process."""

import errno
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import rudolph
from rudolph.data import cache
from rudolph.data.cache import cached_array

ROOT = Path(rudolph.__file__).parents[1]
PARTS = {"kind": "image_indices", "data": "d1", "vqgan": "v1"}


class Counted:
    """A computation that counts its calls."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.array = array
        self.runs = 0

    def __call__(self) -> np.ndarray[Any, Any]:
        self.runs += 1
        return self.array


def file_of(array: np.ndarray[Any, Any]) -> Path:
    assert isinstance(array, np.memmap)
    return Path(str(array.filename))


def never() -> np.ndarray[Any, Any]:
    raise AssertionError("computed although it was on disk")


def test_a_second_call_maps_what_the_first_computed(tmp_path: Path) -> None:
    computed = np.arange(15, dtype=np.int32).reshape(5, 3)
    first = cached_array(tmp_path / "new" / "folder", parts=PARTS, compute=lambda: computed)
    second = cached_array(tmp_path / "new" / "folder", parts=PARTS, compute=never)
    for array in first, second:
        assert isinstance(array, np.memmap) and array.dtype == np.int32
        np.testing.assert_array_equal(array, computed)
        with pytest.raises(ValueError, match="read-only"):
            array[0, 0] = 7


@settings(max_examples=60, deadline=None)
@given(array=arrays.arrays(np.int32, arrays.array_shapes(min_dims=0, max_dims=3, min_side=0)))
def test_any_shape_survives_the_disk(
    tmp_path_factory: pytest.TempPathFactory, array: np.ndarray[Any, Any]
) -> None:
    read = cached_array(tmp_path_factory.mktemp("cache"), parts=PARTS, compute=lambda: array)
    assert read.shape == array.shape
    np.testing.assert_array_equal(read, array)


@pytest.mark.parametrize("changed", [*PARTS, "tokenizer"])
def test_a_changed_part_never_reads_the_old_array(tmp_path: Path, changed: str) -> None:
    cached_array(tmp_path, parts=PARTS, compute=lambda: np.zeros(3))
    other = cached_array(tmp_path, parts=PARTS | {changed: "new"}, compute=lambda: np.ones(3))
    np.testing.assert_array_equal(other, np.ones(3))
    np.testing.assert_array_equal(cached_array(tmp_path, parts=PARTS, compute=never), np.zeros(3))


texts = st.text(min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(a=st.dictionaries(texts, texts, max_size=3), b=st.dictionaries(texts, texts, max_size=3))
def test_names_are_equal_exactly_where_parts_are(a: dict[str, str], b: dict[str, str]) -> None:
    backwards = dict(reversed(a.items()))
    assert cache._name(a) == cache._name(backwards)
    assert (cache._name(a) == cache._name(b)) == (a == b)


def test_the_record_beside_the_array_tells_its_parts(tmp_path: Path) -> None:
    array = cached_array(tmp_path, parts=PARTS, compute=lambda: np.ones((2, 3), np.int16))
    record = json.loads(file_of(array).with_suffix(".json").read_text())
    assert record["parts"] == PARTS


def test_an_empty_part_is_an_error_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="part 'vqgan'") as error:
        cached_array(tmp_path, parts=PARTS | {"vqgan": ""}, compute=never)
    assert "\n" not in str(error.value)


def truncate(array: Path) -> None:
    array.write_bytes(array.read_bytes()[:-5])


def flip_a_bit(array: Path) -> None:
    data = bytearray(array.read_bytes())
    data[-1] ^= 1
    array.write_bytes(data)


def break_the_header(array: Path) -> None:
    array.write_bytes(b"\0" * 16 + array.read_bytes()[16:])


def empty(array: Path) -> None:
    array.write_bytes(b"")


def delete_the_array(array: Path) -> None:
    array.unlink()


def delete_the_record(array: Path) -> None:
    array.with_suffix(".json").unlink()


def cut_the_record(array: Path) -> None:
    array.with_suffix(".json").write_text('{"parts"')


def give_the_record_other_parts(array: Path) -> None:
    record = array.with_suffix(".json")
    record.write_text(record.read_text().replace("v1", "v2"))


DAMAGES = [
    truncate,
    flip_a_bit,
    break_the_header,
    empty,
    delete_the_array,
    delete_the_record,
    cut_the_record,
    give_the_record_other_parts,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_cache_is_computed_again_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    compute = Counted(np.arange(100))
    file = file_of(cached_array(tmp_path, parts=PARTS, compute=compute))
    damage(file)
    with caplog.at_level(logging.WARNING, logger=cache.__name__):
        again = cached_array(tmp_path, parts=PARTS, compute=compute)
    np.testing.assert_array_equal(again, np.arange(100))
    assert compute.runs == 2
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert str(file) in caplog.text
    np.testing.assert_array_equal(
        cached_array(tmp_path, parts=PARTS, compute=never), np.arange(100)
    )


def test_an_array_that_is_mapped_outlives_its_replacement(tmp_path: Path) -> None:
    old = cached_array(tmp_path, parts=PARTS, compute=lambda: np.zeros(2000))
    file_of(old).with_suffix(".json").unlink()
    new = cached_array(tmp_path, parts=PARTS, compute=lambda: np.ones(2000))
    assert old.sum() == 0 and new.sum() == 2000


def read_with_another(folder: Path, runs: Path, barrier: Any, results: Any) -> None:
    """Read the cache in one of two processes that start together; log computations in ``runs``."""

    def compute() -> np.ndarray[Any, Any]:
        with runs.open("a", encoding="utf-8") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.5)
        return np.arange(6)

    barrier.wait(timeout=30)
    results.put(cached_array(folder, parts=PARTS, compute=compute).tolist())


def test_of_two_processes_at_once_one_computes_and_both_read(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    runs = tmp_path / "runs"
    arguments = (tmp_path / "cache", runs, barrier, results)
    processes = [context.Process(target=read_with_another, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    read = [results.get(timeout=30) for _ in processes]
    for process in processes:
        process.join(timeout=30)
        assert process.exitcode == 0
    assert read == [list(range(6))] * 2
    assert len(runs.read_text().splitlines()) == 1


KILLED_COMPUTING = """
import pathlib, sys, time
from rudolph.data.cache import cached_array
def compute():
    print("computing", flush=True)
    time.sleep(60)
cached_array(pathlib.Path(sys.argv[1]), parts=dict(kind="tokens", data="d"), compute=compute)
"""

KILLED_WRITING = """
import os, pathlib, signal, sys
import numpy
from rudolph.data.cache import cached_array
os.fsync = lambda handle: (print("writing", flush=True), os.kill(os.getpid(), signal.SIGKILL))
parts = dict(kind="tokens", data="d")
cached_array(pathlib.Path(sys.argv[1]), parts=parts, compute=lambda: numpy.arange(5000))
"""


@pytest.mark.parametrize(
    "script", [KILLED_COMPUTING, KILLED_WRITING], ids=["computing", "writing"]
)
def test_a_killed_process_leaves_no_lock_and_no_half_array(tmp_path: Path, script: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() in (b"computing", b"writing")
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not list(tmp_path.glob("*.npy"))
    parts = {"kind": "tokens", "data": "d"}
    again = cached_array(tmp_path, parts=parts, compute=lambda: np.arange(3))
    np.testing.assert_array_equal(again, np.arange(3))
    assert sorted(file.suffix for file in tmp_path.iterdir()) == [".json", ".lock", ".npy"]


def test_a_failed_computation_leaves_nothing_to_read(tmp_path: Path) -> None:
    def fail() -> np.ndarray[Any, Any]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cached_array(tmp_path, parts=PARTS, compute=fail)
    with pytest.raises(ValueError, match="Object arrays"):
        cached_array(tmp_path, parts=PARTS, compute=lambda: np.array([None]))
    assert [file.suffix for file in tmp_path.iterdir()] == [".lock"]
    assert cached_array(tmp_path, parts=PARTS, compute=lambda: np.ones(1)).tolist() == [1]


def test_a_full_disk_is_told_with_the_file_and_leaves_nothing_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"No space left.*\.npy") as error:
            cached_array(tmp_path, parts=PARTS, compute=lambda: np.ones(9))
    assert error.value.errno == errno.ENOSPC and "\n" not in str(error.value)
    assert [file.suffix for file in tmp_path.iterdir()] == [".lock"]
    assert cached_array(tmp_path, parts=PARTS, compute=lambda: np.ones(1)).tolist() == [1]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match="file"):
        cached_array(tmp_path / "file", parts=PARTS, compute=never)


def test_without_locks_the_array_is_computed_and_read_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(file: object, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", unsupported)
    assert cached_array(tmp_path, parts=PARTS, compute=lambda: np.ones(2)).tolist() == [1, 1]
    assert "no file locks" in caplog.text
    monkeypatch.setattr(cache, "fcntl", None)
    other = PARTS | {"data": "d2"}
    assert cached_array(tmp_path, parts=other, compute=lambda: np.ones(3)).tolist() == [1] * 3
