"""Execution of one run: stages or benchmark, tracking, summary and environment.

``stages`` trains and evaluates a model; ``benchmark_run`` measures speed.  This module writes the
run's configuration, summary and environment and tracks the run.
"""

import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from rudolph.config.experiment_file import Experiment, Run
from rudolph.config.run import run_yaml, to_plain
from rudolph.evaluation.context import Score
from rudolph.evaluation.evaluators.numerics import diverged_score
from rudolph.files.atomic import DamagedFileError, warn_once, write_json, write_text
from rudolph.models.layers.native_types import native_product_names
from rudolph.reports.schema import OVERHEAD
from rudolph.runs.benchmark_run import run_benchmark
from rudolph.runs.execution import (
    Execution,
    Folders,
    Hardware,
    NullRecorder,
    ProgressCallback,
    discard_progress,
    run_folder,
)
from rudolph.runs.stages.run import run_stages
from rudolph.tracking.event_log import file_lock
from rudolph.tracking.run_directory import RunDirectory
from rudolph.tracking.tracker import Tracker, git_state
from rudolph.training.callbacks import NonFiniteLossError

RECORDED = ("torch", "pytorch-lightning", "youtokentome", "numpy", "pillow", "mlflow")


def execute(
    experiment: Experiment,
    run: Run,
    *,
    folders: Folders,
    hardware: Hardware,
    uri: str,
    progress: ProgressCallback,
) -> dict[str, Any]:
    """Execute one run and return its summary.

    Raises:
        NonFiniteLossError: If a loss is NaN or infinite; the last checkpoint is kept.
        ValueError: If the data or the hardware flags are invalid, or if another process executes
            the same run.
    """
    folder = run_folder(folders, experiment, run)
    if not hardware.is_main_process:
        progress = discard_progress
    execution = Execution(run, folder, folders, hardware, NullRecorder(), progress)
    if not execution.is_main_process:
        train_or_benchmark(execution)
        return _summary(experiment, run)
    with file_lock(execution.directory.running_lock, 0) as is_alone:
        if not is_alone:
            raise ValueError(f"{folder}: another process executes this run")
        return _execute_alone(experiment, execution, uri)


def _execute_alone(experiment: Experiment, execution: Execution, uri: str) -> dict[str, Any]:
    run, directory, folders = execution.run, execution.directory, execution.folders
    seconds, started = execution.seconds, time.monotonic()
    write_text(directory.config, run_yaml(run.config))
    commit, dirty = git_state(folders.checkout)
    summary = _summary(experiment, run) | {"commit": commit, "dirty": dirty}
    with Tracker(
        execution.folder,
        uri,
        experiment=experiment.name,
        run=run.name,
        digest=run.config.digest,
        runs_folder=folders.runs,
    ) as tracker:
        execution.tracker = tracker
        tracker.log_params(to_plain(run.config))
        if not tracker.is_continued:
            # The new log also lacks the curves of stages that other runs trained; log them again.
            directory.shared.unlink(missing_ok=True)
        tracker.log_artifact(directory.config)
        tracker.log_tags({"commit": commit, "dirty": dirty, **_place_tags(execution)})
        earlier_seconds = _earlier_seconds(directory)
        seconds |= earlier_seconds
        directory.write_summary(summary, status="running", seconds=seconds)
        try:
            scores, digests = scores_and_digests(execution)
        except BaseException:
            # Errors and Ctrl-C alike must not lose the durations of the stages so far.
            directory.write_summary(summary, status="failed", seconds=seconds)
            raise
        _add_scores(summary, scores)
        tracker.log_metrics(summary["metrics"], step=run.config.optim.num_steps)
        _write_environment(execution, commit, digests)
        tracker.log_artifact(directory.environment)
        _add_overhead(seconds, earlier_seconds, time.monotonic() - started)
        directory.write_summary(summary, status="finished", seconds=seconds)
        tracker.log_artifact(directory.summary)
    return summary


def scores_and_digests(execution: Execution) -> tuple[list[Score], dict[str, str]]:
    """Execute a run and return its scores and the digests of its data, parts and model.

    With the evaluator ``convergence``, a diverged loss is a score and not an error.

    Raises:
        NonFiniteLossError: If the loss diverged and ``convergence`` is not evaluated.
    """
    evaluation = execution.config.evaluation
    try:
        return train_or_benchmark(execution)
    except NonFiniteLossError:
        if "convergence" not in evaluation.evaluators:
            raise
        return [diverged_score(split) for split in evaluation.splits], {}


def _add_overhead(
    seconds: dict[str, float], earlier_seconds: dict[str, float], elapsed: float
) -> None:
    """Add the seconds spent outside the stages: tracking, images and records."""
    in_stages = sum(seconds.values()) - sum(earlier_seconds.values())
    seconds[OVERHEAD] = round(earlier_seconds.get(OVERHEAD, 0.0) + elapsed - in_stages, 3)


def train_or_benchmark(execution: Execution) -> tuple[list[Score], dict[str, str]]:
    """Execute the benchmark of a run or its stages; return the scores and the digests."""
    is_benchmark = execution.config.speed.workload is not None
    return run_benchmark(execution) if is_benchmark else run_stages(execution)


def _place_tags(execution: Execution) -> dict[str, str]:
    """Return the tags for a run's digest and for the machine and devices that execute it."""
    hardware = execution.hardware
    devices = f"{hardware.world} {hardware.kind}"
    return {
        "digest": execution.config.digest,
        "node": platform.node(),
        "devices": devices,
    }


def _summary(experiment: Experiment, run: Run) -> dict[str, Any]:
    """Return the part of a run's summary that is known before it starts."""
    return {
        "experiment": experiment.name,
        "run": run.name,
        "variant": run.variant,
        "grid": dict(run.grid),
        "seed": run.config.seed,
        "digest": run.config.digest,
        "target": dict(experiment.targets),
        "metrics": {},
        "intervals": {},
        "chance": {},
    }


def _add_scores(summary: dict[str, Any], scores: list[Score]) -> None:
    for score in scores:
        summary["metrics"][score.name] = score.value
        summary["intervals"][score.name] = [score.low, score.high]
        if score.chance is not None:
            summary["chance"][score.name] = score.chance


def _earlier_seconds(directory: RunDirectory) -> dict[str, float]:
    """Return the stage durations of earlier attempts at this run; empty if they were lost."""
    if not directory.summary.exists():
        return {}
    try:
        seconds: dict[str, float] = directory.read_summary()["seconds"]
    except (DamagedFileError, OSError) as error:
        warn_once(f"{error}; the seconds of earlier attempts are lost")
        return {}
    return seconds


def _write_environment(execution: Execution, commit: str, digests: dict[str, str]) -> None:
    """Write the facts, besides the configuration, on which results may depend."""
    content = {
        "commit": commit,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in RECORDED} | execution.versions,
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "native_products": native_product_names(),
            "gpus": [
                torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
            ],
        },
        "hardware": to_plain(execution.hardware)
        | {"precision": execution.hardware.used_precision},
        "digests": digests,
    }
    write_json(execution.directory.environment, content)


def _processor() -> str:
    """Return the processor's model name, which ``platform`` lacks on Linux."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text("utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
