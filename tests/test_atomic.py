"""Atomic files: a file is complete or absent, and errors name it in one line."""

import errno
import json
import logging
import math
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError

from rudolph.files.atomic import (
    DamagedFileError,
    append_line,
    explain_os_error,
    json_text,
    naming_file,
    read_json,
    read_mapping,
    rename_damaged,
    require_disjoint_paths,
    warn_once,
    write_atomic,
    write_json,
    write_text,
)
from rudolph.models.weights import read_weights, save_tensors, weights_error

LARGE = {"weight": torch.zeros(20_000)}


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """Limit the size of files to a number of bytes, as ``ulimit -f`` does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def save_image(path: Path) -> None:
    noise = torch.randint(0, 255, (90, 90, 3), dtype=torch.uint8).numpy()
    Image.fromarray(noise).save(path, format="PNG")


def test_a_file_is_written_whole_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "summary.json"
    write_json(path, {"имя": [1, None]})
    write_json(path, {"имя": 2})
    assert path.read_bytes() == '{\n "имя": 2\n}\n'.encode()
    assert read_json(path) == {"имя": 2}
    assert [each.name for each in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_text(path, "x" * 20_000),
        lambda path: save_tensors(LARGE, path),
        lambda path: write_atomic(path, lambda new: torch.save(LARGE, new)),
        lambda path: write_atomic(path, save_image),
    ],
    ids=["text", "safetensors", "torch", "image"],
)
def test_a_limit_on_file_sizes_names_the_file_and_keeps_the_old_one(tmp_path: Path, write) -> None:
    path = tmp_path / "old.bin"
    path.write_bytes(b"old")
    with file_limit(5000), pytest.raises(OSError) as caught:
        write(path)
    assert caught.value.errno == errno.EFBIG and caught.value.filename == str(path)
    assert explain_os_error(caught.value) == (
        f"{path}: file too large. Raise the limit on file sizes (ulimit -f)"
    )
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_told_with_the_file_that_was_written() -> None:
    # The device is opened and not replaced: a rename to this path would remove it.
    with (
        pytest.raises(OSError) as caught,
        naming_file(Path("runs/x.ckpt")),
        Path("/dev/full").open("wb", buffering=0) as full,
    ):
        full.write(b"x")
    assert (
        explain_os_error(caught.value) == "runs/x.ckpt: no space left on device. Free some space"
    )
    words = "I/O error: No space left on device (os error 28)"
    with pytest.raises(OSError) as caught, naming_file(Path("x.safetensors")):
        raise SafetensorError(words)
    assert (
        explain_os_error(caught.value) == "x.safetensors: no space left on device. Free some space"
    )


def test_links_and_devices_stay(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "link.txt").symlink_to(tmp_path / "deep" / "real.txt")
    write_text(tmp_path / "link.txt", "text")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "deep" / "real.txt").read_text() == "text"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_text(tmp_path / "pipe", "through")
    assert os.read(reader, 100) == b"through" and (tmp_path / "pipe").is_fifo()
    os.close(reader)


def test_other_errors_keep_their_names() -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.txt"), naming_file(Path("other")):
        Path("nothing.txt").read_bytes()
    with pytest.raises(RuntimeError, match="no write"), naming_file(Path("other")):
        raise RuntimeError("no write")


def test_a_copy_that_fails_names_its_target(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.bin").write_bytes(b"x" * 9000)
    with file_limit(5000):
        with pytest.raises(OSError) as caught:
            shutil.copyfile(tmp_path / "a" / "x.bin", tmp_path / "y.bin")
        assert explain_os_error(caught.value).startswith(f"{tmp_path / 'y.bin'}: file too large")
        with pytest.raises(OSError) as caught:
            shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert explain_os_error(caught.value).startswith(
        f"{tmp_path / 'b' / 'x.bin'}: file too large. Raise"
    )
    assert explain_os_error(OSError(errno.ENOSPC, "No space left on device")) == (
        "a file cannot be read or written: no space left on device. Free some space"
    )


def test_an_appended_line_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "curves.jsonl"
    append_line(path, "[1]")
    path.write_bytes(path.read_bytes() + b"[2, {")
    append_line(path, "[3]")
    assert path.read_bytes() == b"[1]\n[3]\n"
    with file_limit(20), pytest.raises(OSError, match=r"curves.jsonl"):
        append_line(path, "[4" + " " * 30 + "]")
    assert path.read_bytes() == b"[1]\n[3]\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b'{"a": ', "not JSON at line 1"),
        (b"\xff\xfe", "not UTF-8 at byte 0"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "expected a mapping, got list"),
        (b"{}", "a is missing"),
        (b'{"a": 1}', "a is a int"),
    ],
)
def test_damaged_json_is_named_in_one_line(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(DamagedFileError) as caught:
        read_mapping(path, a=str)
    assert str(caught.value).startswith(f"{path}: damaged (") and words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damaged_weights_are_named_in_one_line(tmp_path: Path) -> None:
    path, model = tmp_path / "x.safetensors", torch.nn.Linear(2, 3)
    save_tensors(dict(model.state_dict()), path)
    assert weights_error(path, model) == "" and set(read_weights(path)) == {"weight", "bias"}
    assert weights_error(path, torch.nn.Linear(3, 3)) == "weight: expected (3, 3), got (3, 2)"
    whole = path.read_bytes()
    for content in (b"", whole[:-1], whole[:9], b"\xff" * 40):
        path.write_bytes(content)
        with pytest.raises(DamagedFileError, match=r"x.safetensors: damaged \(not a complete"):
            read_weights(path)
        assert weights_error(path).startswith("not a complete safetensors file")
    path.unlink()
    path.mkdir()
    with pytest.raises(IsADirectoryError, match=r"x\.safetensors"):
        read_weights(path)


def test_what_is_set_aside_is_kept_under_other_names(tmp_path: Path, caplog) -> None:
    names = []
    for content in ("one", "two"):
        (tmp_path / "x.db").write_text(content)
        names.append(rename_damaged(tmp_path / "x.db"))
    assert [path.name for path in names] == ["x.db.damaged", "x.db.damaged-2"]
    assert [path.read_text() for path in names] == ["one", "two"]
    with caplog.at_level(logging.WARNING, "rudolph"):
        for _ in range(2):
            warn_once(f"{tmp_path}: said once")
    assert caplog.messages == [f"{tmp_path}: said once"]


@pytest.mark.parametrize(
    ("target", "how"),
    [
        ("source", "is the same"),
        ("./source/../source/", "is the same"),
        ("linked", "is the same"),
        ("source/new/a.png", "lies in it"),
        ("linked/new", "lies in it"),
        ("linked/../source/new", "lies in it"),
        (".", "contains it"),
        ("up", "contains it"),
        ("beside", ""),
        ("source2", ""),
        ("linked.png", ""),
        ("loop", ""),
    ],
)
def test_a_target_apart_from_its_source_is_told_from_one_that_meets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, how: str
) -> None:
    (tmp_path / "lab" / "source").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "lab")
    for name, end in (("linked", "source"), ("up", ".."), ("loop", "loop")):
        Path(name).symlink_to(end)
    for source in (Path("source"), Path("linked"), Path.cwd() / "source"):
        if not how:
            require_disjoint_paths(Path(target), source, "--to")
            continue
        with pytest.raises(ValueError, match=f"^--to: expected a path apart from .*, which {how}"):
            require_disjoint_paths(Path(target), source, "--to")


def test_json_without_a_word_for_it_keeps_a_number(tmp_path: Path) -> None:
    values = [math.nan, math.inf, -math.inf, 1e300, 0, True]
    write_json(tmp_path / "a.json", {"кот": [{"scores": tuple(values)}, None]})

    def refuse(word: str) -> None:
        pytest.fail(word)

    text = (tmp_path / "a.json").read_text()
    [inner, nothing] = json.loads(text, parse_constant=refuse)["кот"]
    assert nothing is None and inner["scores"][3:] == values[3:]
    assert str([float(each) for each in inner["scores"][:3]]) == str(values[:3])
    assert json_text({"a": 1}) == '{"a": 1}'
