"""A whole run at the smallest size: resumed, skipped, exported, sampled from, tracked."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from rudolph.cli import main
from rudolph.config import load_experiment
from rudolph.execution import Folders, Hardware
from rudolph.experiment import execute, run_folder
from rudolph.results.journal import read_journal
from rudolph.training.callbacks import NonFiniteLossError

OPTIM = {
    "num_steps": 8,
    "global_batch_size": 4,
    "validate_every": 4,
    "warmup_steps": 2,
    "checkpoint_every": 3,
    "learning_rate": 0.01,
}
TINY: dict[str, Any] = {
    "title": "Tiny",
    "question": "Does a run hold together?",
    "settings": {
        "data": {"dataset": "shapes", "image_size": 24, "flip": 0.5},
        "data.shapes": {"num_train": 40, "num_validation": 6, "num_test": 6},
        "tokenizer": {"vocab_size": 120, "bpe_dropout": 0.1},
        "layout": {"left_text_length": 20, "right_text_length": 20},
        "vqgan": {
            "resolution": 24,
            "channels": [4, 8, 8],
            "num_res_blocks": 1,
            "attention_resolutions": [],
            "z_channels": 4,
            "quantizer": {"kind": "ema", "num_codes": 12, "embedding_dim": 4},
        },
        "vqgan_optim": {**OPTIM, "ema_decay": 0.5},
        "decoder": {"num_layers": 2, "hidden_size": 16, "num_heads": 2},
        "decoder_optim": {**OPTIM, "ema_decay": 0.9},
        "evaluation": {
            "questions": ["scene_right", "caption_f1", "reconstruction"],
            "splits": ["train", "test"],
            "num_examples": 4,
            "grid_prompts": ["красный круг в центре"],
            "grid_samples": 2,
        },
    },
    "targets": {"vqgan/psnr/test": 5},
    "report": {"table": ["vqgan/psnr/test"], "curves": ["decoder/val/loss"]},
}


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY | changes, allow_unicode=True))
    return path


def quiet(stage: str, done: int, total: int, note: str) -> None:
    """No progress."""


def run_tiny(folder: Path, overrides: tuple[str, ...] = (), **hardware: Any) -> Path:
    experiment = load_experiment(write(folder), overrides)
    folders = Folders(folder, folder / "runs")
    flags = {"precision": "32-true", "accelerator": "cpu"} | hardware
    execute(
        experiment,
        experiment.runs[0],
        folders=folders,
        hardware=Hardware(**flags),
        uri=f"sqlite:///{folder}/mlflow.db",
        progress=quiet,
    )
    return run_folder(folders, experiment, experiment.runs[0])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_tiny(tmp_path_factory.mktemp("finished"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    checkpoints = folder / "checkpoints"
    return load_file(checkpoints / "decoder.safetensors") | {
        f"vqgan.{name}": value
        for name, value in load_file(checkpoints / "vqgan.safetensors").items()
    }


def assert_equal_weights(first: Path, second: Path) -> None:
    one, other = weights(first), weights(second)
    assert one.keys() == other.keys()
    assert [name for name, value in one.items() if not torch.equal(value, other[name])] == []


def curves(folder: Path) -> dict[str, dict[int, float]]:
    """Every metric of a run by step, the later value where a step was done twice."""
    found: dict[str, dict[int, float]] = {}
    for _, record in read_journal(folder / "journal.jsonl"):
        for name, value in record.get("metrics", {}).items():
            found.setdefault(name, {})[record["step"]] = value
    return found


def test_a_run_writes_all_that_the_readme_promises(finished: Path) -> None:
    names = {path.relative_to(finished).as_posix() for path in finished.rglob("*.*")}
    assert {
        "config.yaml",
        "summary.json",
        "environment.json",
        "journal.jsonl",
        "samples/masks.png",
        "samples/grid.png",
        "samples/captions-test.png",
        "samples/reconstructions.png",
        "checkpoints/bpe.model",
    } <= names
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert 0 < curves(finished)["vqgan/val/codebook_usage"][8] <= 1
    for name, value in summary["metrics"].items():
        low, high = summary["intervals"][name]
        assert low <= value <= high
    assert {"data", "vqgan", "decoder", "scene_right on test"} <= set(summary["seconds"])
    environment = json.loads((finished / "environment.json").read_text())
    assert set(environment["digests"]) == {
        "data.train",
        "data.validation",
        "data.test",
        "tokenizer",
        "vqgan",
        "decoder",
    }


def test_the_same_run_again_gives_the_same_weights_and_numbers(
    finished: Path, tmp_path: Path
) -> None:
    again = run_tiny(tmp_path)
    assert_equal_weights(finished, again)
    one, other = (json.loads((f / "summary.json").read_text()) for f in (finished, again))
    assert one["metrics"] == other["metrics"]


def test_micro_batches_and_workers_change_no_step(finished: Path, tmp_path: Path) -> None:
    again = run_tiny(tmp_path, micro_batch_size=2, num_workers=1)
    # Segments are means over what a micro-batch scores, and the codebook follows each of them, so
    # the numbers are not the same; but a step is a step of the whole batch.
    for name in ("vqgan/val/psnr", "decoder/val/loss"):
        assert curves(again)[name].keys() == curves(finished)[name].keys() == {4, 8}


RUNNER = """
import sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads({threads})
import test_experiment as t
t.run_tiny(t.Path(sys.argv[1]))
"""


@pytest.mark.parametrize("stage", ["vqgan", "decoder"])
def test_a_run_killed_in_any_stage_resumes_to_the_same_bits(
    finished: Path, tmp_path: Path, stage: str
) -> None:
    code = RUNNER.format(tests=str(Path(__file__).parent), threads=torch.get_num_threads())
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    pattern = (
        "runs/.cache/vqgan-*/last.ckpt"
        if stage == "vqgan"
        else "runs/tiny/*/checkpoints/last.ckpt"
    )
    deadline = time.monotonic() + 100
    while not list(tmp_path.glob(pattern)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(tmp_path.glob(pattern)), "killed too late"
    with pytest.raises(ValueError, match=r"last.ckpt: .* give the same --micro-batch-size"):
        run_tiny(tmp_path, micro_batch_size=2)
    resumed = run_tiny(tmp_path)
    assert_equal_weights(finished, resumed)
    assert curves(resumed) == curves(finished)


def test_a_run_stopped_after_its_training_is_not_trained_again(finished: Path) -> None:
    before = curves(finished)
    summary = json.loads((finished / "summary.json").read_text())
    written = (finished / "checkpoints" / "decoder.safetensors").stat().st_mtime_ns
    run_tiny(finished.parent.parent.parent)
    assert (finished / "checkpoints" / "decoder.safetensors").stat().st_mtime_ns == written
    assert curves(finished) == before
    again = json.loads((finished / "summary.json").read_text())
    assert again["metrics"] == summary["metrics"]
    assert again["seconds"]["decoder"] == summary["seconds"]["decoder"]
    assert again["seconds"]["data"] > summary["seconds"]["data"]


def test_two_processes_train_one_run(tmp_path: Path) -> None:
    write(tmp_path)
    flags = [
        "--accelerator",
        "cpu",
        "--devices",
        "2",
        "--strategy",
        "ddp",
        "--precision",
        "32-true",
    ]
    command = [sys.executable, "-m", "rudolph", "run", "tiny.yaml", *flags]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    summaries = list(tmp_path.glob("runs/tiny/*/summary.json"))
    assert [json.loads(path.read_text())["status"] for path in summaries] == ["finished"]
    assert (tmp_path / "results" / "tiny" / "runs.csv").is_file()
    journal = (summaries[0].parent / "journal.jsonl").read_text()
    assert journal.count('"decoder/val/loss"') == 2


def test_a_loss_that_is_not_finite_stops_the_run_and_names_it(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLossError, match=r"step \d+: the loss of \w+ is (nan|inf)"):
        run_tiny(
            tmp_path, ("decoder_optim.learning_rate=1e30", "decoder_optim.gradient_clip=null")
        )
    summary = json.loads(next(tmp_path.glob("runs/tiny/*/summary.json")).read_text())
    assert summary["status"] == "failed"


def test_a_batch_that_cannot_be_divided_is_told(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="must be a multiple of 1 devices times micro_batch_size 3"
    ):
        run_tiny(tmp_path, micro_batch_size=3)


def test_runs_of_one_vqgan_share_it(finished: Path) -> None:
    folder = finished.parent.parent.parent
    before = {
        path: path.stat().st_mtime_ns for path in folder.glob("runs/.cache/vqgan-*/*.safetensors")
    }
    other = run_tiny(folder, ("decoder.num_layers=1",))
    after = {
        path: path.stat().st_mtime_ns for path in folder.glob("runs/.cache/vqgan-*/*.safetensors")
    }
    assert before == after and len(after) == 1
    assert curves(other)["vqgan/val/psnr"] == curves(finished)["vqgan/val/psnr"]
    assert other != finished


def test_a_runs_folder_samples_alone(finished: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("config.yaml", "checkpoints"):
        os.symlink(finished / name, moved / name)
    monkeypatch.chdir(tmp_path)
    call = ["generate", "Синий крест", "-n", "3", "--run", "moved", "--guidance", "2"]
    first = [main([*call, "--output", name]) for name in ("a.png", "b.png")]
    assert first == [0, 0]
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    record = json.loads(Path("a.json").read_text())
    assert record["sampling"]["guidance"] == 2.0 and record["text"] == "Синий крест"
    assert main(["caption", "a.png", "-n", "2", "--run", "moved"]) == 0
    assert sum(int(line.split()[0]) for line in capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "круг"], "no finished run"),
        (["generate", "круг", "--run", "nowhere"], "not a trained run"),
        (["generate", "круг", "--run", "moved", "--top-k", "0"], "top_k must be at least 1"),
        (["generate", "круг", "--run", "moved", "-n", "0"], "-n must be at least 1"),
        (["caption", "text.png", "--run", "moved", "-n", "0"], "-n must be at least 1"),
        (["run", "tiny.yaml", "--devices", "0"], "--devices must be at least 1, got 0"),
        (["run", "tiny.yaml", "--micro-batch-size", "0"], "--micro-batch-size must be at least 1"),
        (["caption", "nothing.png", "--run", "moved"], "nothing.png: no such file or directory"),
        (["caption", ".", "--run", "moved"], "rudolph: .: is a directory"),
        (["caption", "text.png", "--run", "moved"], "text.png"),
        (["export", "tiny.yaml"], "no finished run"),
    ],
)
def test_mistakes_of_sampling_are_one_line_and_exit_code_2(
    finished: Path, tmp_path: Path, monkeypatch, capsys, arguments: list[str], words: str
) -> None:
    os.symlink(finished, tmp_path / "moved")
    (tmp_path / "text.png").write_text("no picture")
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
    assert "finished before" in capsys.readouterr().err
    results = folder / "results"
    exported = {path: path.read_bytes() for path in results.rglob("*") if path.is_file()}
    assert main(["export", "tiny.yaml"]) == 0
    assert {path: path.read_bytes() for path in results.rglob("*") if path.is_file()} == exported
    assert main(["figures", "tiny"]) == 0
    assert {path: path.read_bytes() for path in results.rglob("*") if path.is_file()} == exported
    capsys.readouterr()
    # Outside of git every run counts as dirty, and nobody has written an answer yet.
    assert main(["check"]) == 1
    problems = capsys.readouterr().err.splitlines()
    expected = ("its commit does not name", "no answer is written", "2 problems")
    assert len(problems) == 3 and all(
        words in line for words, line in zip(expected, problems, strict=True)
    ), problems


def test_mlflow_holds_the_run(finished: Path) -> None:
    import mlflow

    folder = finished.parent.parent.parent
    uri = f"sqlite:///{folder}/mlflow.db"
    from rudolph.results.tracking import send_pending

    send_pending(folder / "runs", uri)
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("tiny")
    digest = json.loads((finished / "summary.json").read_text())["digest"]
    run = client.search_runs([experiment.experiment_id], f"tags.digest = '{digest}'")[0]
    assert run.data.params["decoder.num_layers"] == "2"
    assert run.data.metrics["vqgan/psnr/test"] > 0
    history = client.get_metric_history(run.info.run_id, "decoder/val/loss")
    assert [metric.step for metric in history] == [4, 8]
    artifacts = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
    assert {"config.yaml", "samples"} <= artifacts
