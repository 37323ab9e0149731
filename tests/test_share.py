"""Shared runs: the copy equals the original and arrives once, however often it is sent."""

import json
import os
import re
import shutil
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from rudolph.cli import main
from rudolph.reports import share
from rudolph.reports.share import pack_runs, send_runs
from rudolph.tracking.event_log import read_event_log
from rudolph.tracking.tracker import Tracker

EXPERIMENT = "masks/ряд"


def write_run(
    runs: Path, name: str, *, status: str = "finished", parameters: dict[str, object] | None = None
) -> Path:
    """Write a run whose tracking server was unavailable."""
    folder = runs / EXPERIMENT / name
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "decoder.safetensors").write_bytes(b"weights")
    summary = {"run": name, "variant": "", "digest": f"digest-{name}", "commit": "0123456789ab"}
    summary |= {"seed": 0, "dirty": False, "metrics": {}, "seconds": {}, "status": status}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.yaml").write_text(f"run: {name}\n")
    (folder / "environment.json").write_text('{"machine": {"threads": 2}}')
    away = "http://127.0.0.1:9"
    tracker = Tracker(folder, away, experiment=EXPERIMENT, run=name, digest=f"digest-{name}")
    tracker.log_params({"seed": 3} | (parameters or {}))
    for step in range(3):
        tracker.log_metrics({"loss": 2.0 - step}, step=step)
    for kept in ("summary.json", "checkpoints/decoder.safetensors"):
        tracker.log_artifact(folder / kept, "checkpoints" if "/" in kept else "")
    tracker.finish()
    tracker.close(0.1)
    return folder


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, status in (("a-seed0", "finished"), ("a-seed1", "finished"), ("b", "failed")):
        write_run(tmp_path / "runs", name, status=status)
    results = tmp_path / "results" / EXPERIMENT
    results.mkdir(parents=True)
    (results / "runs.csv").write_text("run\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def runs_at(uri: str) -> dict[str, Any]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}


def test_a_folder_that_was_moved_arrives_at_another_server_once(lab: Path) -> None:
    from mlflow import MlflowClient

    assert main(["share", EXPERIMENT, "--to", "given"]) == 0
    shutil.move(lab / "given", lab / "elsewhere")
    shutil.rmtree(lab / "runs")
    given, uri = lab / "elsewhere" / EXPERIMENT, f"sqlite:///{lab}/other.db"
    first = send_runs(given, given / "results", uri)
    found = runs_at(uri)
    assert set(first) == {"a-seed0", "a-seed1"} and set(found) == {*first, EXPERIMENT}
    client, parent = MlflowClient(tracking_uri=uri), found[EXPERIMENT].info.run_id
    for name, run_id in first.items():
        run = found[name]
        assert run.info.run_id == run_id and run.data.params == {"seed": "3"}
        assert run.data.tags["mlflow.parentRunId"] == parent
        history = client.get_metric_history(run_id, "loss")
        assert sorted((point.step, point.value) for point in history) == [(0, 2), (1, 1), (2, 0)]
        assert [f.path for f in client.list_artifacts(run_id, "checkpoints")] == [
            "checkpoints/decoder.safetensors"
        ]
    assert [f.path for f in client.list_artifacts(parent, "results")] == ["results/runs.csv"]
    # Send it again, also from a copy without the mark of an earlier transfer.
    for mark in given.glob("*/journal.sent"):
        mark.unlink()
    assert send_runs(given, given / "results", uri) == first
    assert runs_at(uri).keys() == found.keys()
    history = client.get_metric_history(first["a-seed0"], "loss")
    assert len(history) == 3


def test_a_folder_without_weights_tells_of_none(lab: Path) -> None:
    source, results = lab / "runs" / EXPERIMENT, lab / "results" / EXPERIMENT
    packed = pack_runs(source, results, lab / "light", has_weights=False)
    again = pack_runs(source, results, lab / "light", has_weights=False)
    assert packed == again and [path.name for path in packed] == ["a-seed0", "a-seed1"]
    for folder in packed:
        assert not (folder / "checkpoints").exists()
        assert "decoder.safetensors" not in (folder / "journal.jsonl").read_text()
        assert "summary.json" in (folder / "journal.jsonl").read_text()
    send_runs(lab / "light" / EXPERIMENT, lab / "nothing", f"sqlite:///{lab}/other.db")
    assert all(
        "rudolph.rejected" not in run.data.tags
        for run in runs_at(f"sqlite:///{lab}/other.db").values()
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Return all files below a folder except locks, by path."""
    files = (path for path in folder.rglob("*") if path.is_file() and ".lock" not in path.name)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("experiment", "target"),
    [
        (EXPERIMENT, "runs"),
        (EXPERIMENT, "given/../runs/"),
        (EXPERIMENT, "linked"),
        (EXPERIMENT, f"runs/{EXPERIMENT}"),
        (EXPERIMENT, f"runs/{EXPERIMENT}/a-seed0/copy"),
        (EXPERIMENT, "results"),
        (f"given/{EXPERIMENT}", "given"),
    ],
)
def test_a_copy_that_would_meet_what_is_copied_is_refused(
    lab: Path, capsys: pytest.CaptureFixture[str], experiment: str, target: str
) -> None:
    assert main(["share", EXPERIMENT, "--to", "given"]) == 0
    (lab / "linked").symlink_to("runs")
    before = contents(lab)
    capsys.readouterr()
    assert main(["share", experiment, "--to", target, "--no-weights"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("rudolph: --to: expected a path apart from ")
    assert contents(lab) == before


SEPARATORS = "кот\u2028a\u2029b\x85c\x1cd\x0ce"


def test_texts_with_any_separator_are_shared_without_weights(lab: Path) -> None:
    run = write_run(lab / "runs", "c", parameters={"prompt": SEPARATORS})
    assert "\u2028" in (run / "journal.jsonl").read_text()
    assert main(["share", EXPERIMENT, "--to", "light", "--no-weights"]) == 0
    journals = [
        [record for _, record in read_event_log(path / "journal.jsonl")]
        for path in (run, lab / "light" / EXPERIMENT / "c")
    ]
    kept = [record for record in journals[0] if "checkpoints/" not in record.get("path", "")]
    assert journals[1] == kept and len(kept) == len(journals[0]) - 1
    assert [record["params"]["prompt"] for record in kept if "params" in record] == [SEPARATORS]


@pytest.mark.parametrize("step", ["copytree", "_forget_weights", "replace"])
def test_what_is_interrupted_leaves_the_earlier_copy(
    lab: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    runs, results, given = lab / "runs" / EXPERIMENT, lab / "results" / EXPERIMENT, lab / "given"
    pack_runs(runs, results, given, has_weights=True)
    before = contents(given)
    (runs / "a-seed0" / "config.yaml").write_text("run: another\n")
    owner: Any = {"copytree": shutil, "replace": os}.get(step, share)
    real, calls = getattr(owner, step), count()

    def interrupted(*arguments: Any, **settings: Any) -> Any:
        if next(calls) == at:
            raise KeyboardInterrupt
        return real(*arguments, **settings)

    for at in range(4 if step == "replace" else 2):
        calls = count()
        with monkeypatch.context() as patch:
            patch.setattr(owner, step, interrupted)
            with pytest.raises(KeyboardInterrupt):
                pack_runs(runs, results, given, has_weights=False)
        assert contents(given) == before, at
        assert [path.name for path in (given / "masks").iterdir()] == ["ряд"]
    pack_runs(runs, results, given, has_weights=False)
    assert contents(given)["masks/ряд/a-seed0/config.yaml"] == b"run: another\n"


def test_what_a_killed_process_moved_away_comes_back(lab: Path) -> None:
    runs, results, given = lab / "runs" / EXPERIMENT, lab / "results" / EXPERIMENT, lab / "given"
    pack_runs(runs, results, given, has_weights=True)
    aside = given / "masks" / ".ряд.part" / "before"
    aside.mkdir(parents=True)
    shutil.move(given / EXPERIMENT / "a-seed0", aside / "mine")
    pack_runs(runs, results, given, has_weights=True)
    names = {path.name for path in (given / EXPERIMENT).iterdir()}
    assert names == {"mine", "a-seed0", "a-seed1", "results"}


def test_a_shared_experiment_has_a_web_page(lab: Path, caplog: pytest.LogCaptureFixture) -> None:
    results = lab / "results" / EXPERIMENT
    (results / "report.json").write_text("{")
    assert main(["share", EXPERIMENT, "--to", "damaged"]) == 0
    page = Path("results", "index.html")
    assert not (lab / "damaged" / EXPERIMENT / page).exists()
    assert "report.json: damaged (not JSON at line 1); its page is left out" in caplog.text
    shutil.rmtree(results)
    committed = Path(__file__).parent.parent / "results" / "loss_weights" / "reduction"
    shutil.copytree(committed, results)
    assert main(["share", EXPERIMENT, "--to", "given"]) == 0
    text = (lab / "given" / EXPERIMENT / page).read_text("utf-8")
    assert "Averaging the loss per segment or per token" in text
    addresses = re.findall(r'(?:href|src)="([^"]+)"', text)
    assert len(addresses) > 40
    folder = (lab / "given" / EXPERIMENT / page).parent
    assert [name for name in addresses if not (folder / unquote(name)).is_file()] == []
    before = contents(lab / "given")
    assert main(["share", f"given/{EXPERIMENT}", "--to", "again"]) == 0
    assert contents(lab / "again") == before


def test_mistakes_are_one_line(lab: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (lab / "empty").mkdir()
    for arguments, words in (
        (
            ["nothing", "--to", "given"],
            "nothing: no experiment has this name in runs; there are masks/ряд",
        ),
        (["empty", "--to", "given"], "no finished run to share"),
        (["empty", "--to", "sqlite:///x.db"], "no run to share"),
    ):
        assert main(["share", *arguments]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
