"""Many runs of many files: several at once, and a failed run stops no other."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import yaml
from tiny_run import OPTIM, TINY

from rudolph.cli import main
from rudolph.evaluation.context import Score
from rudolph.files.settings import ConfigError
from rudolph.reports.report import UNANSWERED, WITHOUT_LIMITS, finding_of, section_of
from rudolph.runs import runner
from rudolph.runs.execution import Execution
from rudolph.runs.runner import experiment_files
from rudolph.runs.stages.run import run_stages

ASKED = {"evaluators": ["scene_accuracy"], "splits": ["test"], "num_examples": 4}
METRIC = "text_to_image/object_accuracy"


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
    with pytest.raises(ConfigError, match="expected experiment files"):
        experiment_files(tmp_path / "base")


def require_shared_images(folder: Path) -> None:
    """Require one image of the masks in all runs, and one of reconstructions per VQ-GAN."""
    for name, number in (("masks", 1), ("reconstructions", 2)):
        drawn = {path.read_bytes() for path in folder.glob(f"runs/*/*/samples/{name}.png")}
        assert len(drawn) == len(list(folder.glob(f"runs/.cache/images/{name}-*"))) == number


def test_runs_at_once_are_those_of_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two files run in two processes; a diverging run does not affect the others."""
    folder = tmp_path / "experiments"
    write(folder, "one", seeds=[0, 1])
    broken = {"optim": {**OPTIM, "learning_rate": 1e30, "gradient_clip": None}}
    # More bytes than any machine can address.
    huge = {"model": {"hidden_size": 10**13, "num_heads": 1}}
    write(folder, "two", variants={"good": {}, "broken": broken, "huge": huge})
    monkeypatch.chdir(tmp_path)
    assert main(["run", "experiments", "--jobs", "2", "--precision", "32-true"]) == 1
    error = capsys.readouterr().err
    assert "failed: two / broken-seed0: " in error and error.count("\nfailed: ") == 2
    assert "failed: two / huge-seed0: RuntimeError: " in error and "Traceback" not in error
    [kept] = tmp_path.glob("runs/two/huge-seed0-*/traceback.txt")
    assert f"; traceback: {kept}" in error and "MaskedDecoder(" in kept.read_text()
    page = (tmp_path / "results" / "two" / "README.md").read_text()
    assert "**Not finished:** `broken-seed0`, `huge-seed0`." in page
    found = summaries(tmp_path)
    assert {name: each["status"] for name, each in found.items()} == {
        "one/seed0": "finished",
        "one/seed1": "finished",
        "two/good-seed0": "finished",
        "two/broken-seed0": "failed",
        "two/huge-seed0": "failed",
    }
    assert (tmp_path / "results" / "one" / "runs.csv").is_file()
    # Settings and seed are the same, so it does not matter which run trains the common parts.
    assert found["one/seed0"]["metrics"] == found["two/good-seed0"]["metrics"]
    require_shared_images(tmp_path)
    again = [main(["run", "experiments/one.yaml"]), main(["run", "experiments", "--dry-run"])]
    assert again == [0, 0]
    captured = capsys.readouterr()
    assert captured.err.count("already finished") == 2
    assert [line.split()[:3] for line in captured.out.splitlines()] == [
        ["0", "one", "seed0"],
        ["1", "one", "seed1"],
        ["2", "two", "good-seed0"],
        ["3", "two", "broken-seed0"],
        ["4", "two", "huge-seed0"],
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
    # Run alone, it is a user error.
    assert main(["run", "some.yaml", "--index", "0"]) == 2


def test_a_search_by_two_processes_finds_what_one_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = {
        "space": {"sampling.image.temperature": {"low": 0.1, "high": 3.0}},
        "domains": {"all": "text_to_image/object_accuracy"},
        "trials": 8,
        "settings": {"evaluation.splits": ["train"]},
    }
    asked = {"evaluators": ["scene_accuracy"], "splits": ["test"], "num_examples": 4}
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


def work_without_training(execution: Execution) -> tuple[list[Score], dict[str, str]]:
    """Score a run by its settings; a temperature above 2 raises an internal error."""
    config = execution.config
    temperature = config.sampling.image.temperature
    if temperature > 2:
        raise RuntimeError(f"boom\nat {temperature}")
    value = 0.5 + 0.1 * temperature
    return [
        Score(METRIC, config.evaluation.splits[0], value, value - 0.1, value + 0.1, None, 4)
    ], {}


@pytest.fixture
def untracked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a working directory without MLflow, which takes longer than the rest of the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rudolph.tracking.tracker.Tracker._send_until_closed", lambda own: None)
    monkeypatch.setattr("rudolph.tracking.tracker.send_results", lambda *given: True)
    return tmp_path


@pytest.fixture
def worked(untracked: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("rudolph.runs.experiment.train_or_benchmark", work_without_training)
    return untracked


def ask(folder: Path, name: str = "some", **changes: Any) -> None:
    settings = TINY["settings"] | {"evaluation": ASKED}
    write(folder, name, **{"settings": settings, "report": {}} | changes)


def test_an_error_in_one_run_is_named_and_the_others_are_exported(
    worked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    variants = {
        name: {"sampling.image.temperature": value}
        for name, value in (("bad", 3.0), ("cold", 0.5), ("warm", 1.0))
    }
    metric = f"{METRIC}/test"
    ask(
        worked,
        variants=variants,
        seeds=[0, 1],
        claim={"metric": metric, "better": "warm", "than": "bad"},
        report={"table": [metric], "effects": [metric], "against": "cold"},
    )
    assert main(["run", "some.yaml"]) == 1
    error = capsys.readouterr().err
    for seed in (0, 1):
        [kept] = worked.glob(f"runs/some/bad-seed{seed}-*/traceback.txt")
        line = f"failed: some / bad-seed{seed}: RuntimeError: boom at 3.0; traceback: {kept}"
        assert line in error.splitlines()
        assert "Traceback (most recent call last)" in kept.read_text()
    assert "Traceback" not in error and error.count("\nfailed: ") == 2
    page = (worked / "results" / "some" / "README.md").read_text()
    assert "**Not finished:** `bad-seed0`, `bad-seed1`." in page
    assert "**Verdict" not in page and "| warm | 2 |" in page and f"| `{metric}` | warm |" in page
    # After the correction, every run is present again.
    variants["bad"] = {"sampling.image.temperature": 1.5}
    ask(worked, variants=variants, seeds=[0, 1])
    assert main(["run", "some.yaml"]) == 0
    assert "Not finished" not in (worked / "results" / "some" / "README.md").read_text()
    report = json.loads((worked / "results" / "some" / "report.json").read_text())
    assert "missing" not in report


def test_an_error_in_the_only_run_is_one_line_too(
    worked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask(worked, variants={"bad": {"sampling.image.temperature": 3.0}})
    assert main(["run", "some.yaml"]) == 1
    assert "failed: some / bad-seed0: RuntimeError: boom at 3.0;" in capsys.readouterr().err
    assert not (worked / "results").exists()


def test_a_mistake_that_all_runs_share_stops_at_the_first(
    untracked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = {"data": {"dataset": "manifest", "image_size": 24, "manifest": {"path": "no.csv"}}}
    settings = TINY["settings"] | lost | {"evaluation": {}}
    del settings["data.shapes"]
    ask(untracked, settings=settings, seeds=[0, 1], variants={"a": {}, "b": {}})
    assert main(["run", "some.yaml"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("rudolph: no.csv: no such file")
    assert len(list(untracked.glob("runs/some/*/summary.json"))) == 1
    own = {"data.manifest.path": "other.csv"}
    ask(untracked, settings=settings, variants={"a": {}, "b": own})
    assert main(["run", "some.yaml"]) == 1
    assert capsys.readouterr().err.count("\nfailed: ") == 2


def test_an_error_in_a_shared_stage_is_that_of_the_runs_that_need_it(
    untracked: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(execution: Execution, *given: Any, **named: Any) -> None:
        raise RuntimeError(f"no VQ-GAN of {execution.config.vqgan.z_channels} channels")

    def train_or_benchmark(execution: Execution) -> tuple[list[Score], dict[str, str]]:
        needs = execution.config.vqgan.z_channels == 6
        return run_stages(execution) if needs else work_without_training(execution)

    monkeypatch.setattr("rudolph.runs.stages.image_tokenizer.fit", failing)
    monkeypatch.setattr("rudolph.runs.experiment.train_or_benchmark", train_or_benchmark)
    variants = {"shared": {"vqgan.z_channels": 6}, "own": {}}
    ask(untracked, variants=variants, seeds=[0, 1])
    assert main(["run", "some.yaml"]) == 1
    error = capsys.readouterr().err
    for seed in (0, 1):
        assert f"failed: some / shared-seed{seed}: RuntimeError: no VQ-GAN of 6 channels" in error
    table = pd.read_csv(untracked / "results" / "some" / "runs.csv")
    assert list(table["run"]) == ["own-seed0", "own-seed1"]


@pytest.mark.parametrize(("low", "high", "left"), [(0.1, 3.0, 0), (500.0, 900.0, 5)])
def test_errors_in_trials_stop_no_search(
    worked: Path, capsys: pytest.CaptureFixture[str], low: float, high: float, left: int
) -> None:
    """Eight trials, a test and the file's run: without a good trial, nothing is proposed."""
    search = {
        "space": {"sampling.image.temperature": {"low": low, "high": high}},
        "domains": {"all": METRIC},
        "trials": 8,
        "settings": {"evaluation.splits": ["train"]},
    }
    ask(worked, search=search)
    assert main(["run", "some.yaml"]) == 1
    failed = capsys.readouterr().err.count("\nfailed: some / trial")
    table = pd.read_csv(worked / "results" / "some" / "runs.csv")
    assert failed >= 1 and len(table) + failed + left == 10
    assert "region_all-seed0" in set(table["run"]) or left
    page = (worked / "results" / "some" / "README.md").read_text()
    assert "**Not finished:** `trial" in page
    assert (f"`{left} more runs of its search`." in page) == (left > 0)


def test_a_mistake_of_memory_says_what_helps() -> None:
    for error in (MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")):
        assert "--micro-batch-size" in runner.error_line(error)
    assert runner.error_line(RuntimeError("boom\nbang")) == "RuntimeError: boom bang"


def test_a_process_that_is_killed_costs_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def in_processes(jobs: Any, place: Any, number: int) -> Any:
        """Run jobs in a pool that breaks when its second job is killed."""
        names = [job.name for job in jobs]
        kept = names.index("killer") if "killer" in names else len(names)
        for job in jobs[:kept]:
            yield job, ""
        return jobs[kept:]

    monkeypatch.setattr(runner, "_run_in_pool", in_processes)
    names = ["first", "killer", "third", "fourth"]
    jobs: Any = [SimpleNamespace(name=name) for name in names]
    place: Any = None
    ended = {job.name: why for job, why in runner.run_parallel(jobs, place, number=2)}
    assert ended == dict.fromkeys(names, "") | {"killer": runner.KILLED}


def test_ctrl_c_ends_runs_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "SECONDS_TO_STOP", 0.2)
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), runner._shutting_down(pool):
        futures = [pool.submit(time.sleep, 60) for _ in range(3)]
        raise KeyboardInterrupt
    while not all(future.done() for future in futures) or multiprocessing.active_children():
        assert time.monotonic() - started < 20
        time.sleep(0.05)


def test_a_name_of_another_file_is_refused_before_any_work(
    worked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two files have one name: outside the working directory only the file name counts."""
    here = worked / "here"
    here.mkdir()
    other = {"question": "Is it another?", "seeds": [0, 1]}
    ask(worked / "a", "x")
    ask(worked / "b", "x", title="Another", **other)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        assert main(["run", "../a/x.yaml"]) == 0
        capsys.readouterr()
        before = sorted(here.rglob("*"))
        for verb in (["run"], ["run", "--dry-run"], ["export"]):
            assert main([*verb, "../b/x.yaml"]) == 2
            [line] = capsys.readouterr().err.splitlines()
            assert "../b/x.yaml: expected a unique experiment name, got 'x'" in line
            assert str(worked / "a" / "x.yaml") in line
        assert sorted(here.rglob("*")) == before
        # With the runs removed, the results still record which file they belong to.
        (here / "runs" / "x" / "experiment.txt").unlink()
        assert main(["run", "../b/x.yaml"]) == 2
        assert "in results/x" in capsys.readouterr().err
        # A copy with the same experiment reuses the runs; a moved file keeps its name.
        ask(worked / "c", "x")
        assert main(["run", "../c/x.yaml"]) == 0
        assert "already finished" in capsys.readouterr().err
        (worked / "c" / "x.yaml").rename(worked / "b" / "x.yaml")
        assert main(["run", "../b/x.yaml"]) == 0
    # Below the working directory, the names include the folder.
    ask(worked / "c", "x", title="Another", **other)
    assert main(["run", "a/x.yaml"]) == main(["run", "c/x.yaml"]) == 0
    assert (worked / "results" / "c" / "x" / "README.md").read_text().startswith("# Another\n")
    assert (worked / "results" / "a" / "x" / "README.md").read_text().startswith("# x\n")
    (worked / "c" / "y.yml").write_bytes((worked / "c" / "x.yaml").read_bytes())
    ask(worked / "c", "y")
    assert main(["run", "c/y.yml"]) == 0
    assert main(["run", "c/y.yaml"]) == 2


def test_an_edited_file_has_results_of_its_own_question(worked: Path) -> None:
    warm = {"sampling.image.temperature": 1.0}
    ask(worked, variants={"warm": warm, "cold": {"sampling.image.temperature": 0.5}})
    assert main(["run", "some.yaml"]) == 0
    readme = worked / "results" / "some" / "README.md"
    page = readme.read_text("utf-8").replace(WITHOUT_LIMITS, "Two seeds.")
    readme.write_text(page.replace(UNANSWERED, "Warm is better. By far."), "utf-8")
    # A renamed variant is the same run, so it appears once.
    ask(worked, variants={"hot": warm})
    assert main(["run", "some.yaml"]) == 0
    table = pd.read_csv(worked / "results" / "some" / "runs.csv")
    assert list(table["run"]) == ["hot-seed0"]
    assert finding_of(readme) == "Warm is better."
    changed = {"sampling.image.temperature": 0.7}
    ask(worked, variants={"hot": changed}, title="New", question="Is it new?")
    assert main(["run", "some.yaml"]) == 0
    page = readme.read_text()
    assert page.startswith("# New\n")
    assert section_of(page, "Finding") == f"{UNANSWERED}\n\nWarm is better. By far."
    assert finding_of(readme) == "" and "**Question.** Is it new?" in page
    assert main(["export", "some.yaml"]) == 0
    assert readme.read_text() == page


PARENT = """
import os, sys, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from rudolph.runs.runner import _initialize_process

if __name__ == "__main__":
    context = get_context("spawn")
    settings = {"initializer": _initialize_process, "initargs": (1,)}
    pool = ProcessPoolExecutor(1, mp_context=context, **settings)
    print(pool.submit(os.getpid).result(), flush=True)
    pool.submit(time.sleep, 600)
    time.sleep(600)
"""


def test_a_run_ends_when_the_command_that_started_it_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT, "utf-8")
    environment = os.environ | {"PYTHONPATH": str(Path(runner.__file__).parents[2])}
    command = [sys.executable, str(script)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, env=environment, encoding="utf-8"
    ) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        assert is_running(worker)
        parent.kill()
    deadline = time.monotonic() + 20
    while is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_running(worker)


def is_running(process: int) -> bool:
    """Return whether a process runs; its new parent may leave a zombie for a while."""
    try:
        state = Path(f"/proc/{process}/stat").read_text("utf-8").rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
