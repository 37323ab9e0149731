"""Many runs of many files: some at a time, and one that fails stops no other."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from tiny_run import OPTIM, TINY

from rudolph.cli import main
from rudolph.laboratory import experiment_files
from rudolph.settings import ConfigError


def write(folder: Path, name: str, **changes: Any) -> None:
    folder.mkdir(exist_ok=True)
    content = TINY | {"title": name, "targets": {}} | changes
    (folder / f"{name}.yaml").write_text(
        yaml.safe_dump(content, allow_unicode=True, sort_keys=False)
    )


def summaries(folder: Path) -> dict[str, Any]:
    return {
        path.parent.parent.name + "/" + path.parent.name.rpartition("-")[0]: json.loads(
            path.read_text()
        )
        for path in folder.glob("runs/*/*/summary.json")
    }


def test_a_folder_is_its_experiments_without_bases(tmp_path: Path) -> None:
    for name in ("a.yaml", "inner/b.yaml", "base/c.yaml", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = [path.name for path in experiment_files(tmp_path)]
    assert names == ["a.yaml", "b.yaml"]
    assert experiment_files(tmp_path / "a.yaml") == [tmp_path / "a.yaml"]
    with pytest.raises(ConfigError, match="holds no experiment"):
        experiment_files(tmp_path / "base")


def test_runs_at_once_are_those_of_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two files in two processes, one run of which loses its numbers: the others end as alone."""
    folder = tmp_path / "experiments"
    write(folder, "one", seeds=[0, 1])
    broken = {"decoder_optim": {**OPTIM, "learning_rate": 1e30, "gradient_clip": None}}
    write(folder, "two", variants={"good": {}, "broken": broken})
    monkeypatch.chdir(tmp_path)
    assert main(["run", "experiments", "--jobs", "2", "--precision", "32-true"]) == 1
    error = capsys.readouterr().err
    assert "failed: two / broken-seed0: " in error and error.count("failed: ") == 1
    found = summaries(tmp_path)
    assert {name: each["status"] for name, each in found.items()} == {
        "one/seed0": "finished",
        "one/seed1": "finished",
        "two/good-seed0": "finished",
        "two/broken-seed0": "failed",
    }
    assert (tmp_path / "results" / "one" / "runs.csv").is_file()
    # The same settings and seed: who trains the shared parts is of no matter.
    assert found["one/seed0"]["metrics"] == found["two/good-seed0"]["metrics"]
    # All have one picture of the masks, and one of reconstructions for each VQ-GAN.
    for name, number in (("masks", 1), ("reconstructions", 2)):
        drawn = {path.read_bytes() for path in tmp_path.glob(f"runs/*/*/samples/{name}.png")}
        assert len(drawn) == len(list(tmp_path.glob(f"runs/.cache/pictures/{name}-*"))) == number
    again = [main(["run", "experiments/one.yaml"]), main(["run", "experiments", "--dry-run"])]
    assert again == [0, 0]
    captured = capsys.readouterr()
    assert captured.err.count("finished before") == 2
    assert [line.split()[:3] for line in captured.out.splitlines()] == [
        ["0", "one", "seed0"],
        ["1", "one", "seed1"],
        ["2", "two", "good-seed0"],
        ["3", "two", "broken-seed0"],
    ]


def test_a_mistake_in_one_of_many_runs_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = {"vqgan.init": "runs/nowhere/seed0"}
    write(tmp_path, "some", variants={"lost": lost, "good": {}})
    monkeypatch.chdir(tmp_path)
    assert main(["run", "some.yaml", "--precision", "32-true"]) == 1
    assert (
        "failed: some / lost-seed0: runs/nowhere/seed0: no such folder" in capsys.readouterr().err
    )
    assert summaries(tmp_path)["some/good-seed0"]["status"] == "finished"
    # Alone it is the user's mistake.
    assert main(["run", "some.yaml", "--index", "0"]) == 2


def test_a_search_by_two_processes_finds_what_one_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = {
        "space": {"sampling.image.temperature": {"low": 0.1, "high": 3.0}},
        "domains": {"all": "text_to_image/objects_right"},
        "trials": 8,
        "settings": {"evaluation.splits": ["train"]},
    }
    asked = {"questions": ["scene_right"], "splits": ["test"], "num_examples": 4}
    settings = TINY["settings"] | {"evaluation": asked}
    found = []
    for jobs in ("1", "2"):
        write(tmp_path / jobs, "some", settings=settings, search=search, report={})
        monkeypatch.chdir(tmp_path / jobs)
        assert main(["run", "some.yaml", "--jobs", jobs, "--precision", "32-true"]) == 0
        table = pd.read_csv(tmp_path / jobs / "results" / "some" / "runs.csv")
        found.append(table.drop(columns=["seconds", "overhead"]))
    assert len(found[0]) == 1 + 8 + 1
    pd.testing.assert_frame_equal(*found)
