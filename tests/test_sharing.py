"""Runs given to others: what arrives is what was there, once, however often it is given."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from rudolph.cli import main
from rudolph.results.sharing import pack_runs, send_runs
from rudolph.results.tracking import Tracker

EXPERIMENT = "masks/ряд"


def write_run(runs: Path, name: str, *, status: str = "finished") -> Path:
    """A run that told a server which was away."""
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
    tracker.log_params({"seed": 3})
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
    # Given again, and from a copy that does not know that it was given.
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


def test_mistakes_are_one_line(lab: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (lab / "empty").mkdir()
    for arguments, words in (
        (["nothing", "--to", "given"], "nothing: neither an experiment in runs/ nor a folder"),
        (["empty", "--to", "given"], "no finished run to share"),
        (["empty", "--to", "sqlite:///x.db"], "no run to share"),
    ):
        assert main(["share", *arguments]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
