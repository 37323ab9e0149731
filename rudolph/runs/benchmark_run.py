"""A run that measures speed: weights, implementations in turn, scores, and the files of both.

It stands where ``stages`` stand for a run that trains.
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
from rudolph.reports.timings import write_profile, write_timings
from rudolph.runs.execution import Execution

# Logits and images of size about 1 in float32: more is another model.
LARGEST_DIFFERENCE = 1e-2


def run_benchmark(execution: Execution) -> tuple[list[Score], dict[str, str]]:
    """Let the implementations of a run work in turn: its scores, and the digests of the weights.

    Raises:
        ValueError: in one line, when an implementation is missing or fails, or when the reference
        says
            something else of the same weights.
    """
    case = measurable(benchmark_case_of(execution))
    execution.hardware.check(execution.config)
    require_implementations(case.speed.implementations)
    folder = execution.folder / "speed" / "weights"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        with execution.stage("weights") as advance:
            advance(0, 1, "random weights are written")
            said, models = prepare_case(case, folder)
            digests = {name: weights_digest(model) for name, model in models.items()}
            # The implementations need the memory.
            models.clear()
            advance(1, 1, "")
        differences: list[float] = []
        check = partial(compare_outputs, said=said, folder=folder, differences=differences)
        contest = compare_memory if case.speed.workload == "memory" else compare_implementations
        with execution.stage(case.speed.workload or "") as advance:
            found = contest(case, folder, report_progress=advance, check=check)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    execution.versions |= found.versions
    record_timings(execution, found)
    return scores_of(case, found, differences), digests


def measurable(case: BenchmarkCase) -> BenchmarkCase:
    """Return the case without implementations that would measure an emulation of bfloat16.

    Raises:
        ValueError: when no implementation is left.
    """
    kept = case.speed.measurable_implementations
    left_out = [name for name in case.speed.implementations if name not in kept]
    if not left_out:
        return case
    reason = f"{', '.join(left_out)}: this processor emulates bfloat16 products"
    if not set(kept) - {ROOFLINE, REFERENCE}:
        raise ValueError(f"speed.implementations: nothing is left to measure; {reason}")
    warnings.warn(f"speed.implementations: left out {reason}", stacklevel=2)
    return replace(case, speed=replace(case.speed, implementations=kept))


def benchmark_case_of(execution: Execution) -> BenchmarkCase:
    """What implementations need of a run's configuration."""
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
    said: dict[str, Tensor],
    folder: Path,
    differences: list[float],
) -> None:
    """Hold what an implementation says of the fixed inputs against what ours say.

    Raises:
        ValueError: when they differ by more than ``LARGEST_DIFFERENCE``.
    """
    path = folder / f"{worker.name}-said.safetensors"
    worker.request({"do": "check", "path": str(path.resolve())})
    theirs = load_file(path)
    for name, ours in said.items():
        difference = (theirs[name] - ours).abs().max().item()
        if not difference <= LARGEST_DIFFERENCE:
            raise ValueError(
                f"implementation {worker.name}: its {name} differ from ours by {difference:.3g} "
                f"on the same weights; at most {LARGEST_DIFFERENCE:g} is rounding"
            )
        differences.append(difference)


def record_timings(execution: Execution, found: ComparisonResult) -> None:
    """Repetitions and profiles into the run's folder and to where it is tracked."""
    paths = [write_timings(execution.folder, found.timings)]
    paths += [write_profile(execution.folder, name, rows) for name, rows in found.profiles.items()]
    for path in paths:
        execution.tracker.log_artifact(path, "speed")


def scores_of(
    case: BenchmarkCase, found: ComparisonResult, differences: list[float]
) -> list[Score]:
    """A score's name is the implementation and the quantity; its examples are the repetitions."""
    count = case.speed.num_repetitions
    scores = [
        Score(name, quantity, value, low, high, None, count)
        for (name, quantity), (value, low, high) in metrics_of(case, found).items()
    ]
    if differences:
        worst = max(differences)
        scores.append(Score("check", "max_abs_difference", worst, worst, worst, None, 1))
    return scores
