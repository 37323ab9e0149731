"""Execution of one run: stages or benchmark, tracking, summary and environment.

``stages`` trains and evaluates a model; ``benchmark_run`` measures speed.  This module writes the
run's configuration, summary and environment and tracks the run.
"""

import os
import platform
import time
from collections.abc import Callable
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
from rudolph.reports.run_files import CONFIG, ENVIRONMENT, SUMMARY, read_summary
from rudolph.reports.schema import OVERHEAD
from rudolph.runs.benchmark_run import run_benchmark
from rudolph.runs.execution import (
    Execution,
    Folders,
    Hardware,
    NullRecorder,
    ProgressCallback,
    is_main_process,
    run_folder,
)
from rudolph.runs.stages.run import run_stages
from rudolph.runs.stages.shared import TAKEN
from rudolph.tracking.event_log import file_lock
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
    if not is_main_process():
        work_of(run)(Execution(run, folder, folders, hardware, NullRecorder(), progress))
        return _summary(experiment, run)
    with file_lock(folder / "running.lock", 0) as is_alone:
        if not is_alone:
            raise ValueError(f"{folder}: another process executes this run")
        return _execute_alone(
            experiment, run, folders=folders, hardware=hardware, uri=uri, progress=progress
        )


def _execute_alone(
    experiment: Experiment,
    run: Run,
    *,
    folders: Folders,
    hardware: Hardware,
    uri: str,
    progress: ProgressCallback,
) -> dict[str, Any]:
    folder, started = run_folder(folders, experiment, run), time.monotonic()
    write_text(folder / CONFIG, run_yaml(run.config))
    commit, dirty = git_state(folders.checkout)
    summary = _summary(experiment, run) | {"commit": commit, "dirty": dirty}
    with Tracker(
        folder,
        uri,
        experiment=experiment.name,
        run=run.name,
        digest=run.config.digest,
        runs_folder=folders.runs,
    ) as tracker:
        tracker.log_params(to_plain(run.config))
        if not tracker.is_continued:
            # Curves of stages trained by other runs are missing too, so they are logged again.
            (folder / TAKEN).unlink(missing_ok=True)
        tracker.log_artifact(folder / CONFIG)
        tracker.log_tags({"commit": commit, "dirty": dirty, "digest": run.config.digest})
        seconds = _earlier_seconds(folder)
        earlier_seconds = dict(seconds)
        execution = Execution(run, folder, folders, hardware, tracker, progress, seconds)
        _write_summary(folder, summary, "running", execution)
        try:
            scores, digests = outcome_of(execution)
        except BaseException:
            # Errors and Ctrl-C alike must not lose the durations of the stages so far.
            _write_summary(folder, summary, "failed", execution)
            raise
        _add_scores(summary, scores)
        tracker.log_metrics(summary["metrics"], step=run.config.optim.num_steps)
        _write_environment(execution, commit, digests)
        tracker.log_artifact(folder / ENVIRONMENT)
        _add_overhead(seconds, earlier_seconds, time.monotonic() - started)
        _write_summary(folder, summary, "finished", execution)
        tracker.log_artifact(folder / SUMMARY)
    return summary


def outcome_of(execution: Execution) -> tuple[list[Score], dict[str, str]]:
    """Execute a run and return its scores and the digests of its data, parts and model.

    With the evaluator ``convergence``, a diverged loss is a score and not an error.

    Raises:
        NonFiniteLossError: If the loss diverged and ``convergence`` is not evaluated.
    """
    run = execution.run
    try:
        return work_of(run)(execution)
    except NonFiniteLossError:
        if "convergence" not in run.config.evaluation.evaluators:
            raise
        return [diverged_score(split) for split in run.config.evaluation.splits], {}


def _add_overhead(
    seconds: dict[str, float], earlier_seconds: dict[str, float], elapsed: float
) -> None:
    """Add the seconds spent outside the stages: tracking, images and records."""
    in_stages = sum(seconds.values()) - sum(earlier_seconds.values())
    seconds[OVERHEAD] = round(earlier_seconds.get(OVERHEAD, 0.0) + elapsed - in_stages, 3)


def work_of(run: Run) -> Callable[[Execution], tuple[list[Score], dict[str, str]]]:
    """Return the function that computes the scores of a run: its stages or its benchmark."""
    if run.config.speed.workload is not None:
        return run_benchmark
    return run_stages


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


def _earlier_seconds(folder: Path) -> dict[str, float]:
    """Return the stage durations of earlier attempts at this run; empty if they were lost."""
    if not (folder / SUMMARY).exists():
        return {}
    try:
        seconds: dict[str, float] = read_summary(folder)["seconds"]
    except (DamagedFileError, OSError) as error:
        warn_once(f"{error}; the seconds of earlier attempts are lost")
        return {}
    return seconds


def _write_summary(
    folder: Path, summary: dict[str, Any], status: str, execution: Execution
) -> None:
    content = summary | {"status": status, "seconds": execution.seconds}
    write_json(folder / SUMMARY, content)


def _write_environment(execution: Execution, commit: str, digests: dict[str, str]) -> None:
    """Write what results may depend on besides the configuration."""
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
    write_json(execution.folder / ENVIRONMENT, content)


def _processor() -> str:
    """Return the processor's model name, which ``platform`` lacks on Linux."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text("utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
