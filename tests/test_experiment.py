"""A whole run at the smallest size: resumed, skipped, exported, sampled from and tracked."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import quiet, run_tiny, write

from rudolph.config.experiment_file import load_experiment
from rudolph.data.splits import Splits
from rudolph.families.interface import Parts
from rudolph.families.registry import family_of
from rudolph.reports.schema import CARD
from rudolph.runs.execution import Folders, run_folder
from rudolph.runs.resolve import load_run
from rudolph.runs.stages.evaluation import evaluate_again
from rudolph.tracking.event_log import file_lock, read_event_log
from rudolph.training.callbacks import NonFiniteLossError
from rudolph.training.losses import segment_losses


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
    """Return every metric of a run by step; a repeated step keeps the later value."""
    found: dict[str, dict[int, float]] = {}
    for _, record in read_event_log(folder / "journal.jsonl"):
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
    assert {"data", "vqgan", "decoder", "scene_accuracy on test"} <= set(summary["seconds"])
    assert 0 < summary["seconds"]["overhead"] < sum(summary["seconds"].values())
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


def test_micro_batches_and_workers_change_no_image_tokenizer(
    finished: Path, tmp_path: Path
) -> None:
    again = run_tiny(tmp_path, micro_batch_size=2, num_workers=1)
    for name in ("vqgan/val/psnr", "vqgan/val/loss/reconstruction"):
        assert curves(again)[name] == pytest.approx(curves(finished)[name], rel=1e-4)
    # The decoder has dropout, which is drawn for each micro-batch.
    assert curves(again)["decoder/val/loss"].keys() == curves(finished)["decoder/val/loss"].keys()


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
    pattern = f"runs/.cache/{stage}-*/last.ckpt"
    deadline = time.monotonic() + 100
    while not list(tmp_path.glob(pattern)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(tmp_path.glob(pattern)), "killed too late"
    resumed = run_tiny(tmp_path)
    assert_equal_weights(finished, resumed)
    assert curves(resumed) == curves(finished)


def test_a_run_stopped_after_its_training_is_not_trained_again(finished: Path) -> None:
    before = curves(finished)
    summary = json.loads((finished / "summary.json").read_text())
    [weights] = finished.parent.parent.glob(".cache/decoder-*/weights.safetensors")
    written = weights.stat().st_mtime_ns
    run_tiny(finished.parent.parent.parent)
    assert weights.stat().st_mtime_ns == written
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
    found = curves(summaries[0].parent)
    assert sorted(found["decoder/val/loss"]) == [4, 8]
    # Each process evaluates a part of the examples and tasks, but the loss covers all of them.
    for name, loss in validation_losses(summaries[0].parent).items():
        assert found[f"decoder/val/loss/{name}"][8] == pytest.approx(loss, rel=1e-4)
    # They share the evaluation, which one process repeats.
    folder = summaries[0].parent
    card = (folder / CARD).read_text()
    (folder / CARD).unlink()
    evaluate_again(folder, Folders(tmp_path, tmp_path / "runs"), quiet)
    assert (folder / CARD).read_text() == card
    assert done.stderr.count("reconstruction on test: 1/1") == 1


def validation_losses(folder: Path) -> dict[str, float]:
    """Compute the losses of a finished run on its whole validation split in one batch."""
    pipeline, config = load_run(folder)
    splits = Splits(config.data, folder.parent.parent / ".cache")
    parts = Parts(
        pipeline.tokenizer,
        pipeline.vqgan,
        lambda split: pipeline.encode(split.image_batch(range(len(split)))).numpy(),
    )
    examples = family_of(config.model).examples(config, splits, "validation", parts)
    batch = examples.whole(range(examples.num_whole))
    with torch.no_grad():
        losses = segment_losses(
            pipeline.decoder, batch.tokens, config.model.losses, scored=batch.scored
        )
    return {name: loss.item() for name, loss in losses.items()}


def test_a_run_that_is_being_executed_is_not_started_again(tmp_path: Path) -> None:
    experiment = load_experiment(write(tmp_path))
    folder = run_folder(Folders(tmp_path, tmp_path / "runs"), experiment, experiment.runs[0])
    with (
        file_lock(folder / "running.lock", 0) as is_alone,
        pytest.raises(ValueError, match="another process executes this run"),
    ):
        assert is_alone
        run_tiny(tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_it(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLossError, match=r"step \d+: loss[\w/]* is (nan|inf)"):
        run_tiny(tmp_path, ("optim.learning_rate=1e30", "optim.gradient_clip=null"))
    summary = json.loads(next(tmp_path.glob("runs/tiny/*/summary.json")).read_text())
    assert summary["status"] == "failed"


def test_a_batch_that_cannot_be_divided_is_told(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="expected a multiple of 1 devices times micro_batch_size 3, got"
    ):
        run_tiny(tmp_path, micro_batch_size=3)


def test_runs_of_one_vqgan_share_it(finished: Path) -> None:
    folder = finished.parent.parent.parent
    before = {
        path: path.stat().st_mtime_ns for path in folder.glob("runs/.cache/vqgan-*/*.safetensors")
    }
    other = run_tiny(folder, ("model.num_layers=1",))
    after = {
        path: path.stat().st_mtime_ns for path in folder.glob("runs/.cache/vqgan-*/*.safetensors")
    }
    assert before == after and len(after) == 1
    assert curves(other)["vqgan/val/psnr"] == curves(finished)["vqgan/val/psnr"]
    assert other != finished


def test_mlflow_holds_the_run(finished: Path) -> None:
    import mlflow

    folder = finished.parent.parent.parent
    uri = f"sqlite:///{folder}/mlflow.db"
    from rudolph.tracking.tracker import send_pending

    send_pending(folder / "runs", uri)
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("tiny")
    digest = json.loads((finished / "summary.json").read_text())["digest"]
    run = client.search_runs([experiment.experiment_id], f"tags.digest = '{digest}'")[0]
    assert run.data.params["model.num_layers"] == "2"
    assert run.data.metrics["vqgan/psnr/test"] > 0
    history = client.get_metric_history(run.info.run_id, "decoder/val/loss")
    assert [metric.step for metric in history] == [4, 8]
    artifacts = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
    assert {"config.yaml", "samples"} <= artifacts
