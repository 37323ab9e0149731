"""Many runs: of a file or of a folder of files, one after the other or some at a time.

A run that fails stops no other.  Processes that work at once share the cores; each executes run
after run, so that libraries are imported once.
"""

import os
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rudolph.disk import explain
from rudolph.execution import Folders, Hardware, Progress, is_finished, run_folder
from rudolph.experiment_file import Experiment, Run, load_experiment
from rudolph.results.store import finished_row
from rudolph.settings import ConfigError

BASES = "base"


@dataclass(frozen=True)
class Place:
    """Where runs are executed and on what; ``uri`` is that of the tracking server."""

    folders: Folders
    hardware: Hardware
    uri: str


@dataclass(frozen=True)
class Job:
    """One run of an experiment file, as another process is given it."""

    file: Path
    settings: tuple[str, ...]
    name: str
    run: Run = field(compare=False)

    def load(self) -> tuple[Experiment, Run]:
        return load_experiment(self.file, self.settings), self.run


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
    # Only what trains takes the seconds that Lightning and MLflow need to be imported.
    from rudolph.experiment import execute
    from rudolph.training.callbacks import NonFiniteLossError

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


def search_of(experiment: Experiment, folders: Folders) -> Iterator[list[Run]]:
    """The rounds of an experiment's search: each is to be executed before the next is taken."""
    if experiment.search is None:
        return
    from rudolph.searching import search_rounds

    def row_of(run: Run) -> Mapping[str, Any] | None:
        return finished_row(run_folder(folders, experiment, run))

    yield from search_rounds(experiment, row_of)


def all_runs(experiment: Experiment, folders: Folders) -> list[Run]:
    """The runs of an experiment, with those of its search up to a round that is not finished."""
    runs = list(experiment.runs)
    for found in search_of(experiment, folders):
        ended = [run for run in found if finished_row(run_folder(folders, experiment, run))]
        runs += ended
        if len(ended) < len(found):
            break
    return runs


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
    import torch

    from rudolph.console import silence_libraries

    torch.set_num_threads(threads)
    silence_libraries()


def _execute_job(job: Job, place: Place) -> str:
    try:
        return failure_of(*job.load(), place, _unseen)
    except OSError as error:
        return explain(error)
    except ValueError as error:
        return " ".join(str(error).split())
    except Exception as error:
        # What is no mistake of the user is shown whole, and the other runs go on.
        traceback.print_exc()
        return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _unseen(stage: str, done: int, total: int, note: str) -> None:
    """Of runs at once only their ends are told."""
