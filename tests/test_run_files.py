"""A damaged file of a run is named in one line, and the run counts as unfinished."""

import json
import logging
import math
import shutil
from functools import partial
from pathlib import Path
from random import Random

import pytest
from damage import NUM_CASES, copy_run, damage, files_of

from rudolph.files.atomic import DamagedFileError, explain_os_error, write_json
from rudolph.reports.report import read_runs
from rudolph.reports.report_cards import read_card
from rudolph.reports.run_files import finished_runs
from rudolph.reports.schema import CARD, Report
from rudolph.reports.share import pack_runs
from rudolph.reports.store import export_results
from rudolph.runs.execution import is_finished
from rudolph.runs.resolve import load_run, newest_run
from rudolph.tracking.artifacts import local_run
from rudolph.tracking.event_log import JOURNAL, SENT, pending_folders
from rudolph.tracking.run_directory import CONFIG, ENVIRONMENT, SUMMARY, RunDirectory

REPORT = Report("tiny", "Tiny", "Does it hold?", "tiny.yaml", rows=("run",))


@pytest.fixture
def two_runs(finished: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Return a whole run and one to damage, in ``runs/tiny``."""
    runs = tmp_path / "runs" / "tiny"
    return copy_run(finished, runs / "whole"), copy_run(finished, runs / "other")


@pytest.mark.parametrize("name", [SUMMARY, ENVIRONMENT, JOURNAL, CONFIG, CARD])
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\n", b"[]\n"], ids=repr)
def test_a_damaged_file_is_named_and_the_run_is_unfinished(
    two_runs: tuple[Path, Path], caplog: pytest.LogCaptureFixture, name: str, content: bytes
) -> None:
    whole, other = two_runs
    assert is_finished(whole) and is_finished(other)
    (other / name).unlink()
    (other / name).write_bytes(content)
    # A configuration with other keys is only detected on reading.
    is_seen = (name, content) != (CONFIG, b"[]\n")
    with caplog.at_level(logging.WARNING, "rudolph"):
        assert is_finished(other) is not is_seen
    assert len(caplog.messages) == is_seen
    for line in caplog.messages:
        assert line.startswith(f"{other / name}: ") and "\n" not in line
        assert line.endswith("counts as unfinished, run its experiment again to repair it")


def test_commands_over_many_runs_leave_the_damaged_one_out(
    two_runs: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole, other = two_runs
    summary = json.loads((other / SUMMARY).read_text())
    (other / JOURNAL).unlink()
    (other / JOURNAL).write_bytes((whole / JOURNAL).read_bytes().replace(b'"kind"', b'"kin', 1))
    (other / SENT).write_bytes(b"{")
    with caplog.at_level(logging.WARNING, "rudolph"):
        assert newest_run(tmp_path / "runs") == whole
        assert [folder for folder, _ in finished_runs(whole.parent)] == [whole]
        assert pending_folders(tmp_path / "runs", None) == [whole]
        packed = pack_runs(whole.parent, tmp_path / "none", tmp_path / "to", has_weights=False)
        folder = export_results(tmp_path / "runs", tmp_path / "results", report=REPORT)
        assert local_run("0" * 32, tmp_path / "runs") is None
    assert [path.name for path in packed] == ["whole"]
    rows = (folder / "runs.csv").read_text().splitlines()
    assert len(rows) == 2 and summary["digest"] in rows[1]
    assert all(str(other) in line for line in caplog.messages)
    assert any("it is skipped" in line for line in caplog.messages)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("status", "done", "unknown status 'done'"),
        ("digest", None, "digest is a NoneType"),
        ("metrics", {"loss": "low"}, "metrics must hold numbers"),
        ("intervals", {"loss": [1]}, "intervals must hold pairs of numbers"),
        ("grid", [], "grid is a list"),
    ],
)
def test_a_summary_with_other_values_is_damaged(
    two_runs: tuple[Path, Path], key: str, value: object, words: str
) -> None:
    _, other = two_runs
    content = RunDirectory(other).read_summary() | {key: value}
    (other / SUMMARY).unlink()
    (other / SUMMARY).write_text(json.dumps(content))
    with pytest.raises(DamagedFileError, match=words):
        RunDirectory(other).read_summary()


def test_a_number_that_json_has_no_word_for_is_read_back(two_runs: tuple[Path, Path]) -> None:
    whole, other = two_runs
    shutil.rmtree(other)
    content = RunDirectory(whole).read_summary()
    content["metrics"] |= {"lost": math.nan, "far": math.inf}
    content["intervals"] |= {"lost": [math.nan, math.nan], "far": [-math.inf, 1.0]}
    write_json(whole / SUMMARY, content)
    json.loads((whole / SUMMARY).read_text(), parse_constant=pytest.fail)
    # Compared as text, because NaN differs from NaN.
    assert str(RunDirectory(whole).read_summary()) == str(content)
    assert is_finished(whole)
    exported = export_results(whole.parent.parent, whole.parent.parent / "results", report=REPORT)
    row = read_runs(exported).set_index("run").iloc[0]
    assert math.isnan(row["lost"]) and row["far"] == math.inf


def test_a_damaged_report_card_says_how_to_make_it_anew(two_runs: tuple[Path, Path]) -> None:
    _, other = two_runs
    (other / CARD).write_text("score,split\nx,y\n")
    with pytest.raises(DamagedFileError, match=r"expected the columns .*report-card --again"):
        read_card(other / CARD)


def test_any_damage_to_a_run_is_seen_or_does_no_harm(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = files_of(finished)
    for case in range(NUM_CASES or 20):
        rng, folder = Random(case), tmp_path / str(case)
        runs = folder / "runs" / "tiny"
        run = copy_run(finished, runs / "run")
        what = damage(rng.choice(files_of(run)), rng, others=whole)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "rudolph"):
            found = finished_runs(runs)
            assert is_finished(run) <= bool(found), what
            pending_folders(runs, "http://127.0.0.1:9")
            local_run("0" * 32, runs)
        assert all("\n" not in line and str(run) in line for line in caplog.messages), what
        assert found or caplog.messages or not (run / SUMMARY).exists(), what
        attempts = (
            partial(export_results, folder / "runs", folder / "results", report=REPORT),
            partial(pack_runs, runs, folder / "results", folder / "to", has_weights=True),
            partial(load_run, run),
        )
        for attempt in attempts:
            try:
                attempt()
            except (ValueError, OSError) as error:
                line = explain_os_error(error) if isinstance(error, OSError) else str(error)
                assert "\n" not in line and str(folder) in line, (what, line)
        shutil.rmtree(folder)
