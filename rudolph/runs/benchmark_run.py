"""Runs that measure speed: weights, implementations in turn, scores and their files.

A benchmark run calls ``run_benchmark``; a training run calls ``run_stages`` instead.
"""

import shutil
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from rudolph.benchmarks.benchmark_case import BenchmarkCase, prepare_case
from rudolph.benchmarks.comparison import (
    ComparisonResult,
    ImplementationProcess,
    compare_implementations,
    compare_memory,
    require_implementations,
)
from rudolph.benchmarks.config import REFERENCE, ROOFLINE
from rudolph.benchmarks.metrics import metrics_of
from rudolph.evaluation.context import Score
from rudolph.models.weights import weights_digest
from rudolph.reports.schema import SPEED_FOLDER
from rudolph.reports.timings import write_profile, write_timings
from rudolph.runs.execution import Execution

# Logits and images have size about 1 in float32; a larger difference means another model.
LARGEST_DIFFERENCE = 1e-2


def run_benchmark(execution: Execution) -> tuple[list[Score], dict[str, str]]:
    """Measure the implementations of a run in turn; return scores and digests of the weights.

    Raises:
        ValueError: If an implementation is missing or fails, or if its outputs differ from ours on
            the same weights.
    """
    case = drop_emulated_implementations(benchmark_case_of(execution))
    execution.hardware.check(execution.config)
    require_implementations(case.speed.implementations)
    folder = execution.folder / SPEED_FOLDER / "weights"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        with execution.stage("weights") as advance:
            advance(0, 1, "writing random weights")
            expected, models = prepare_case(case, folder)
            digests = {name: weights_digest(model) for name, model in models.items()}
            # The measured processes need the memory.
            models.clear()
            advance(1, 1, "")
        differences: list[float] = []
        check = partial(compare_outputs, expected=expected, folder=folder, differences=differences)
        compare = compare_memory if case.speed.workload == "memory" else compare_implementations
        with execution.stage(case.speed.workload or "") as advance:
            result = compare(case, folder, report_progress=advance, check=check)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    execution.versions |= result.versions
    record_timings(execution, result)
    return scores_of(case, result, differences), digests


def drop_emulated_implementations(case: BenchmarkCase) -> BenchmarkCase:
    """Return the case without implementations that emulate bfloat16 on this processor.

    Raises:
        ValueError: If no implementation is left.
    """
    kept = case.speed.measurable_implementations
    dropped = [name for name in case.speed.implementations if name not in kept]
    if not dropped:
        return case
    reason = f"{', '.join(dropped)}: this processor emulates bfloat16 products"
    if not set(kept) - {ROOFLINE, REFERENCE}:
        raise ValueError(f"speed.implementations: no implementation left to measure; {reason}")
    warnings.warn(f"speed.implementations: left out {reason}", stacklevel=2)
    return replace(case, speed=replace(case.speed, implementations=kept))


def benchmark_case_of(execution: Execution) -> BenchmarkCase:
    """Return the settings of a run's configuration that implementations need."""
    config = execution.config
    return BenchmarkCase(
        seed=config.seed,
        speed=config.speed,
        decoder=config.decoder.architecture,
        layout=config.sequence_layout,
        vocabulary=config.vocabulary,
        vqgan=config.vqgan,
        losses=config.decoder.losses,
        vqgan_losses=config.vqgan_losses,
        optim=config.optim,
        vqgan_optim=config.vqgan_optim,
        sampling=config.sampling.image,
    )


def compare_outputs(
    worker: ImplementationProcess,
    *,
    expected: dict[str, Tensor],
    folder: Path,
    differences: list[float],
) -> None:
    """Compare the outputs of an implementation on fixed inputs with ours.

    Args:
        worker: Process of the implementation.
        expected: Our outputs, keyed by name.
        folder: Folder for the outputs of the implementation.
        differences: Receives the largest absolute difference of each output.

    Raises:
        ValueError: If an output differs by more than ``LARGEST_DIFFERENCE``.
    """
    path = folder / f"{worker.name}-outputs.safetensors"
    worker.request({"do": "check", "path": str(path.resolve())})
    outputs = load_file(path)
    for name, reference in expected.items():
        difference = (outputs[name] - reference).abs().max().item()
        if not difference <= LARGEST_DIFFERENCE:
            raise ValueError(
                f"implementation {worker.name}: expected {name} within "
                f"{LARGEST_DIFFERENCE:g} of ours on the same weights, got a difference of "
                f"{difference:.3g}"
            )
        differences.append(difference)


def record_timings(execution: Execution, result: ComparisonResult) -> None:
    """Write repetitions and profiles to the run's folder and log them."""
    paths = [write_timings(execution.folder, result.timings)]
    paths += [
        write_profile(execution.folder, name, rows) for name, rows in result.profiles.items()
    ]
    for path in paths:
        execution.tracker.log_artifact(path, SPEED_FOLDER)


def scores_of(
    case: BenchmarkCase, result: ComparisonResult, differences: list[float]
) -> list[Score]:
    """Return one score per implementation and quantity; its count is the number of repetitions."""
    count = case.speed.num_repetitions
    scores = [
        Score(name, quantity, value, low, high, None, count)
        for (name, quantity), (value, low, high) in metrics_of(case, result).items()
    ]
    if differences:
        worst = max(differences)
        scores.append(Score("check", "max_abs_difference", worst, worst, worst, None, 1))
    return scores
