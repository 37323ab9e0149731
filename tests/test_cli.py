"""The commands through ``main``: their output, their files and their error messages."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from PIL import Image
from tiny_run import write

from rudolph.cli import main


def test_a_runs_folder_samples_alone(finished: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("config.yaml", "checkpoints"):
        os.symlink(finished / name, moved / name)
    monkeypatch.chdir(tmp_path)
    call = ["generate", "Синий крест", "-n", "3", "--model", "moved", "--guidance", "2"]
    first = [main([*call, "--output", name]) for name in ("a.png", "b.png")]
    assert first == [0, 0]
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    record = json.loads(Path("a.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert record["parameters"]["guidance"] == 2.0 and record["prompt"] == "Синий крест"
    assert main(["caption", "a.png", "-n", "2", "--model", "moved"]) == 0
    assert sum(int(line.split()[0]) for line in capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "круг", "--model", "newest"], "expected a finished run, got none"),
        (["generate", "круг", "--model", "nowhere"], "no released model has this name"),
        (["generate", "круг", "--model", "moved", "--top-k", "0"], "top_k must be at least 1"),
        (["generate", "круг", "--model", "moved", "-n", "0"], "-n must be at least 1"),
        (["caption", "text.png", "--model", "moved", "-n", "0"], "-n must be at least 1"),
        (["run", "tiny.yaml", "--devices", "0"], "--devices must be at least 1, got 0"),
        (["run", "tiny.yaml", "--micro-batch-size", "0"], "--micro-batch-size must be at least 1"),
        (["caption", "nothing.png", "--model", "moved"], "nothing.png: no such file or directory"),
        (["caption", ".", "--model", "moved"], "rudolph: .: is a directory"),
        (["caption", "text.png", "--model", "moved"], "text.png"),
        (["export", "tiny.yaml"], "no finished run"),
    ],
)
def test_mistakes_of_sampling_are_one_line_and_exit_code_2(
    finished: Path, tmp_path: Path, monkeypatch, capsys, arguments: list[str], words: str
) -> None:
    os.symlink(finished, tmp_path / "moved")
    (tmp_path / "text.png").write_text("no image")
    write(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error and "Errno" not in error


def test_a_finished_run_is_skipped_exported_checked_and_redrawn(
    finished: Path, monkeypatch, capsys
) -> None:
    folder = finished.parent.parent.parent
    write(folder)
    monkeypatch.chdir(folder)
    started = time.monotonic()
    assert main(["run", "tiny.yaml"]) == 0
    assert time.monotonic() - started < 20
    said = capsys.readouterr().err
    assert "already finished" in said and "results/tiny has" not in said
    for words in ("page: results/tiny/README.md", "images: results/tiny/samples/seed0-grid.png"):
        assert Path(words.split()[1]).is_file() and words in said
    assert 'next: rudolph generate "' in said
    results = folder / "results"
    exported = {path: path.read_bytes() for path in results.rglob("*") if path.is_file()}
    assert main(["export", "tiny.yaml"]) == 0
    assert {path: path.read_bytes() for path in results.rglob("*") if path.is_file()} == exported
    assert main(["figures", "tiny"]) == 0
    assert {path: path.read_bytes() for path in results.rglob("*") if path.is_file()} == exported
    assert main(["run", "tiny.yaml"]) == 0
    assert "tiny: results/tiny has 1 run, " in capsys.readouterr().err
    # Without git every run counts as dirty, and nobody has written the page yet.
    assert main(["check"]) == 1
    problems = capsys.readouterr().err.splitlines()
    expected = (
        "used code that differs from its commit",
        "Finding is not",
        "Limitations is not",
        "3 problems",
    )
    assert len(problems) == 4 and all(
        words in line for words, line in zip(expected, problems, strict=True)
    ), problems


def test_show_prints_what_was_run_and_its_schema_holds_it(
    finished: Path, monkeypatch, capsys
) -> None:
    folder = finished.parent.parent.parent
    write(folder)
    monkeypatch.chdir(folder)
    assert main(["show", "tiny.yaml"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed == yaml.safe_load((finished / "config.yaml").read_text())
    assert main(["show", "tiny.yaml", "--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert set(schema["properties"]) == set(printed)


def test_a_reader_that_leaves_early_is_no_error() -> None:
    command = f"{sys.executable} -m rudolph models | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("name ") and "Traceback" not in done.stderr


def test_sync_sends_what_is_waiting(finished: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(finished.parent.parent.parent)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/other.db")
    said = []
    for _ in range(2):
        assert main(["sync"]) == 0
        said.append(capsys.readouterr().err)
    assert "sent 0 records" not in said[0] and "0 runs are waiting" in said[0]
    assert "sent 0 records of 0 runs" in said[1]


def test_data_manifest_reports_a_table(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (30, 20), "red").save("red.png")
    Path("pairs.csv").write_text(
        "image,caption\nred.png,красный\nblue.png,синий\n", encoding="utf-8"
    )
    assert main(["data", "manifest", "pairs.csv"]) == 0
    printed = capsys.readouterr().out
    assert "1 skipped" in printed and "blue.png" in printed
