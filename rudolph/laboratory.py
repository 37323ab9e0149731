"""Many runs: of a file or of a folder of files, one after the other or some at a time.

A run that fails stops no other.  Processes that work at once share the cores; each executes run
after run, so that libraries are imported once.
"""

import os
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

from rudolph.config import Experiment, Run, load_experiment
from rudolph.execution import Folders, Hardware, Progress
from rudolph.experiment import execute, is_finished, run_folder
from rudolph.settings import ConfigError
from rudolph.training.callbacks import NonFiniteLossError

BASES = "base"


@dataclass(frozen=True)
class Place:
    """Where runs are executed and on what; ``uri`` is that of the tracking server."""

    folders: Folders
    hardware: Hardware
    uri: str


@dataclass(frozen=True)
class Job:
    """One run of an experiment file, as another process finds it again."""

    file: Path
    settings: tuple[str, ...]
    number: int

    def load(self) -> tuple[Experiment, Run]:
        experiment = load_experiment(self.file, self.settings)
        return experiment, experiment.runs[self.number]


def experiment_files(path: Path) -> list[Path]:
    """The file itself; of a folder its experiments and those of its folders, but no bases.

    Raises:
        ConfigError: when there is none.
    """
    if not path.is_dir():
        return [path]
    found = sorted(each for each in path.rglob("*.yaml") if each.parent.name != BASES)
    if not found:
        raise ConfigError(f"{path}: holds no experiment (*.yaml)")
    return found


def failure_of(experiment: Experiment, run: Run, place: Place, progress: Progress) -> str:
    """Execute a run unless it is finished; how its loss ended it, empty if it did not.

    Raises:
        ValueError: for a mistake in the data or the hardware flags.
    """
    if is_finished(run_folder(place.folders, experiment, run)):
        return ""
    try:
        execute(
            experiment,
            run,
            folders=place.folders,
            hardware=place.hardware,
            uri=place.uri,
            progress=progress,
        )
    except NonFiniteLossError as error:
        return f"{error}; the last good checkpoint is kept"
    return ""


def run_at_once(jobs: Sequence[Job], place: Place, *, number: int) -> Iterator[tuple[Job, str]]:
    """Execute jobs in ``number`` processes; each as it ends, with why it failed."""
    threads = max(1, (os.cpu_count() or 1) // number)
    pool = ProcessPoolExecutor(
        number, mp_context=get_context("spawn"), initializer=_begin, initargs=(threads,)
    )
    with pool:
        jobs_of = {pool.submit(_execute_job, job, place): job for job in jobs}
        for future in as_completed(jobs_of):
            try:
                yield jobs_of[future], future.result()
            except BrokenProcessPool:
                yield jobs_of[future], "its process was killed, by the system or for its memory"


def _begin(threads: int) -> None:
    from rudolph.console import silence_libraries

    torch.set_num_threads(threads)
    silence_libraries()


def _execute_job(job: Job, place: Place) -> str:
    try:
        return failure_of(*job.load(), place, _unseen)
    except (ValueError, OSError) as error:
        return " ".join(str(error).split())
    except Exception as error:
        # What is no mistake of the user is shown whole, and the other runs go on.
        traceback.print_exc()
        return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _unseen(stage: str, done: int, total: int, note: str) -> None:
    """Of runs at once only their ends are told."""
