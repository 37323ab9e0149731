"""A run that measures speed: weights, contestants in turn, scores, and the files of both.

It stands where ``stages`` stand for a run that trains.
"""

import shutil
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from rudolph.benchmarks.config import LIMIT, REFERENCE
from rudolph.benchmarks.contest import Found, Worker, hold, hold_memory, require_contestants
from rudolph.benchmarks.metrics import metrics_of
from rudolph.benchmarks.subject import Subject, prepare
from rudolph.evaluation.evaluator import Score
from rudolph.models.weights import weights_digest
from rudolph.reports.repetitions import write_profile, write_repetitions
from rudolph.runs.execution import Execution

# Logits and pictures of size about 1 in float32: more is another model.
LARGEST_DIFFERENCE = 1e-2


def measure(execution: Execution) -> tuple[list[Score], dict[str, str]]:
    """Let the contestants of a run work in turn: its scores, and the digests of the weights.

    Raises:
        ValueError: in one line, when a contestant is missing or fails, or when the reference says
            something else of the same weights.
    """
    subject = measurable(subject_of(execution))
    execution.hardware.check(execution.config)
    require_contestants(subject.speed.contestants)
    folder = execution.folder / "speed" / "weights"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        with execution.stage("weights") as advance:
            advance(0, 1, "random weights are written")
            said, models = prepare(subject, folder)
            digests = {name: weights_digest(model) for name, model in models.items()}
            # The contestants need the memory.
            models.clear()
            advance(1, 1, "")
        differences: list[float] = []
        check = partial(compare, said=said, folder=folder, differences=differences)
        contest = hold_memory if subject.speed.measure == "memory" else hold
        with execution.stage(subject.speed.measure or "") as advance:
            found = contest(subject, folder, told=advance, check=check)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    execution.versions |= found.versions
    record(execution, found)
    return scores_of(subject, found, differences), digests


def measurable(subject: Subject) -> Subject:
    """Return the subject without contestants that would measure an emulation of bfloat16.

    Raises:
        ValueError: when no contestant is left.
    """
    kept = subject.speed.measurable
    left_out = [name for name in subject.speed.contestants if name not in kept]
    if not left_out:
        return subject
    reason = f"{', '.join(left_out)}: this processor emulates bfloat16 products"
    if not set(kept) - {LIMIT, REFERENCE}:
        raise ValueError(f"speed.contestants: nothing is left to measure; {reason}")
    warnings.warn(f"speed.contestants: left out {reason}", stacklevel=2)
    return replace(subject, speed=replace(subject.speed, contestants=kept))


def subject_of(execution: Execution) -> Subject:
    """What contestants need of a run's configuration."""
    config = execution.config
    return Subject(
        seed=config.seed,
        speed=config.speed,
        decoder=config.decoder,
        layout=config.sequence_layout,
        vocabulary=config.vocabulary,
        vqgan=config.vqgan,
        losses=config.decoder_losses,
        vqgan_losses=config.vqgan_losses,
        optim=config.decoder_optim,
        vqgan_optim=config.vqgan_optim,
        sampling=config.sampling.image,
    )


def compare(
    worker: Worker, *, said: dict[str, Tensor], folder: Path, differences: list[float]
) -> None:
    """Hold what a contestant says of the fixed inputs against what ours say.

    Raises:
        ValueError: when they differ by more than ``LARGEST_DIFFERENCE``.
    """
    path = folder / f"{worker.name}-said.safetensors"
    worker.ask({"do": "check", "path": str(path.resolve())})
    theirs = load_file(path)
    for name, ours in said.items():
        difference = (theirs[name] - ours).abs().max().item()
        if not difference <= LARGEST_DIFFERENCE:
            raise ValueError(
                f"contestant {worker.name}: its {name} differ from ours by {difference:.3g} on "
                f"the same weights; at most {LARGEST_DIFFERENCE:g} is rounding"
            )
        differences.append(difference)


def record(execution: Execution, found: Found) -> None:
    """Repetitions and profiles into the run's folder and to where it is tracked."""
    paths = [write_repetitions(execution.folder, found.repetitions)]
    paths += [write_profile(execution.folder, name, rows) for name, rows in found.profiles.items()]
    for path in paths:
        execution.tracker.log_artifact(path, "speed")


def scores_of(subject: Subject, found: Found, differences: list[float]) -> list[Score]:
    """A score's name is the contestant and the quantity; its examples are the repetitions."""
    count = subject.speed.repetitions
    scores = [
        Score(name, quantity, value, low, high, None, count)
        for (name, quantity), (value, low, high) in metrics_of(subject, found).items()
    ]
    if differences:
        worst = max(differences)
        scores.append(Score("check", "largest_difference", worst, worst, worst, None, 1))
    return scores
