"""Execution of many runs, sequentially or in parallel processes.

The runs come from one experiment file or from a folder of files.  A failed run does not stop the
others.  Parallel processes share the cores.  Each executes several runs, so that libraries are
imported once.
"""

import gc
import os
import threading
import time
import traceback
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from typing import Any

import torch

from rudolph.config.experiment_file import Experiment, Run, load_experiment
from rudolph.files.atomic import DamagedFileError, explain_os_error, write_text
from rudolph.files.settings import ConfigError
from rudolph.reports.run_files import finished_row
from rudolph.reports.schema import read_report
from rudolph.runs.execution import (
    Folders,
    Hardware,
    ProgressCallback,
    discard_progress,
    is_finished,
    run_folder,
)
from rudolph.tracking.run_directory import RunDirectory
from rudolph.training.preemption import PreemptedError

BASES = "base"
# In the folder of an experiment's runs: the path of the experiment file.
OWNER = "experiment.txt"
KILLED = "the process was killed, perhaps because memory ran out"
# Seconds that parallel runs get to stop after Ctrl-C, and the exit code of their processes.
SECONDS_TO_STOP = 3.0
INTERRUPTED = 130
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


@dataclass(frozen=True)
class RunContext:
    """Folders, hardware and tracking server of a command's runs.

    Attributes:
        folders: Folders of the runs, the cache and the checkout.
        hardware: Hardware that every run uses.
        uri: URI of the tracking server.
    """

    folders: Folders
    hardware: Hardware
    uri: str


@dataclass(frozen=True)
class Job:
    """One run of an experiment file, in a form that can be sent to another process."""

    file: Path
    settings: tuple[str, ...]
    name: str
    run: Run = field(compare=False)

    def load(self) -> tuple[Experiment, Run]:
        """Load the experiment file and return it with the run."""
        return load_experiment(self.file, self.settings), self.run


def experiment_files(path: Path) -> list[Path]:
    """Return the path of a file, or all experiment files below a folder except base files.

    Raises:
        ConfigError: If a folder contains no experiment file.
    """
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.rglob("*.yaml") if file.parent.name != BASES)
    if not files:
        raise ConfigError(f"{path}: expected experiment files (*.yaml), found none")
    return files


def require_own_experiments(
    experiments: Sequence[Experiment], folders: Folders, results: Path
) -> None:
    """Check that no other file has runs or results under the name of an experiment.

    A copy of a file with the same title, question and runs shares the original's runs and results.
    If the file that owns them no longer exists, it counts as moved.

    Raises:
        ConfigError: If another file uses the name of an experiment.
    """
    known: dict[str, Experiment] = {}
    for experiment in experiments:
        other = known.setdefault(experiment.name.casefold(), experiment)
        if other is not experiment:
            raise _name_conflict(experiment, str(other.path), "the same command")
        for folder, owner in _existing_owners(experiment, folders, results):
            path = folders.checkout / owner
            if path.is_file() and not _has_same_runs(experiment, path):
                raise _name_conflict(experiment, owner, str(folder))


def _name_conflict(experiment: Experiment, owner: str, location: str) -> ConfigError:
    return ConfigError(
        f"{experiment.path}: expected a unique experiment name, got {experiment.name!r}, which "
        f"{owner} uses in {location}. Rename one of the files"
    )


def _existing_owners(
    experiment: Experiment, folders: Folders, results: Path
) -> Iterator[tuple[Path, str]]:
    """Yield each folder that has an experiment's name, and the experiment file that created it."""
    runs = folders.runs / experiment.name
    if (runs / OWNER).is_file():
        yield runs, (runs / OWNER).read_text("utf-8", errors="replace").strip()
    if (results / experiment.name / "report.json").is_file():
        try:
            yield results / experiment.name, read_report(results / experiment.name).source
        except DamagedFileError:
            # The next export rewrites the damaged report.
            return


def _has_same_runs(experiment: Experiment, path: Path) -> bool:
    if path.samefile(experiment.path):
        return True
    try:
        other = load_experiment(path)
        own = load_experiment(experiment.path)
    except ConfigError:
        return False
    contents = [
        (loaded.title, loaded.question, [(run.name, run.config.digest) for run in loaded.runs])
        for loaded in (own, other)
    ]
    return contents[0] == contents[1]


def write_owner(experiment: Experiment, folders: Folders) -> None:
    """Write the path of an experiment file into the folder of the experiment's runs."""
    path = experiment.path.resolve()
    checkout = folders.checkout.resolve()
    owner = path.relative_to(checkout) if path.is_relative_to(checkout) else path
    write_text(folders.runs / experiment.name / OWNER, f"{owner.as_posix()}\n")


def run_or_error(
    experiment: Experiment, run: Run, context: RunContext, progress: ProgressCallback
) -> str:
    """Run unless already finished. Return the error message if the run failed, else "".

    The traceback of an error that is not a user error is written to the run's folder.

    Raises:
        ValueError: If the data or the hardware flags are invalid.
        OSError: If a file cannot be read or written.
    """
    # Lightning and MLflow take seconds to import, so only training imports them.
    from rudolph.runs.experiment import execute
    from rudolph.training.callbacks import NonFiniteLossError

    folder = run_folder(context.folders, experiment, run)
    if is_finished(folder):
        return ""
    traceback_path = RunDirectory(folder).traceback
    traceback_path.unlink(missing_ok=True)
    try:
        execute(
            experiment,
            run,
            folders=context.folders,
            hardware=context.hardware,
            uri=context.uri,
            progress=progress,
        )
    except NonFiniteLossError as error:
        return f"{error}; the last good checkpoint is kept"
    except (ValueError, OSError):
        raise
    except Exception as error:
        if context.hardware.world > 1:
            # The other processes of the run wait for this one until it dies.
            raise
        write_text(traceback_path, traceback.format_exc())
        message = f"{error_line(error)}; traceback: {traceback_path}"
    else:
        return ""
    # The frames of the traceback kept the models alive.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return message


def is_shared_error(folder: Path, run: Run, others: Sequence[Run]) -> bool:
    """Return whether a user error in a run's first stage would end all other runs too.

    By the end of that stage a run has read its data, its tokenizer and a VQ-GAN named as
    ``vqgan.init``.

    Args:
        folder: Folder of the failed run.
        run: The failed run.
        others: All runs of the command.
    """

    def inputs(run: Run) -> tuple[Any, ...]:
        config, model = run.config, run.config.model
        sources = model.init, sorted(source for source, _ in model.part_sources.values())
        return model.family, sources, config.data, config.tokenizer, config.vqgan

    if any(inputs(other) != inputs(run) for other in others):
        return False
    directory = RunDirectory(folder)
    return directory.summary.is_file() and set(directory.read_summary()["seconds"]) <= {"data"}


def error_line(error: Exception) -> str:
    """Return an error as one line, with advice if memory ran out."""
    text = " ".join(str(error).split())
    line = f"{type(error).__name__}: {text}" if text else type(error).__name__
    is_memory = isinstance(error, MemoryError) or any(
        words in text.lower() for words in OUT_OF_MEMORY
    )
    return f"{line} (a smaller --micro-batch-size needs less memory)" if is_memory else line


def search_of(experiment: Experiment, folders: Folders) -> Iterator[list[Run]]:
    """Yield the rounds of an experiment's search; the caller executes each before the next."""
    if experiment.search is None:
        return
    from rudolph.runs.search import search_rounds

    def row_of(run: Run) -> Mapping[str, Any] | None:
        return finished_row(run_folder(folders, experiment, run))

    yield from search_rounds(experiment, row_of)


def all_runs(experiment: Experiment, folders: Folders) -> list[Run]:
    """Return the runs of an experiment and the finished runs of its search."""
    search_runs = _runs_of_search(experiment, folders)
    finished = [run for run in search_runs if finished_row(run_folder(folders, experiment, run))]
    return [*experiment.runs, *finished]


def missing_runs(experiment: Experiment, folders: Folders) -> tuple[str, ...]:
    """Return the names of unfinished runs, then a note with the number of search runs to come."""
    search_runs = _runs_of_search(experiment, folders)
    missing = [
        run.name
        for run in (*experiment.runs, *search_runs)
        if finished_row(run_folder(folders, experiment, run)) is None
    ]
    if experiment.search is not None:
        search = experiment.search
        num_expected = search.trials + len(search.domains) * len(experiment.seeds)
        num_left = num_expected - len(search_runs)
        missing += [f"{num_left} more runs of its search"] if num_left else []
    return tuple(missing)


def _runs_of_search(experiment: Experiment, folders: Folders) -> list[Run]:
    """Return the runs of a search up to the first round that has not begun."""
    runs: list[Run] = []
    for search_round in search_of(experiment, folders):
        paths = (run_folder(folders, experiment, run) for run in search_round)
        if not any(RunDirectory(path).summary.exists() for path in paths):
            break
        runs += search_round
    return runs


def run_parallel(
    jobs: Sequence[Job], context: RunContext, *, number: int
) -> Iterator[tuple[Job, str]]:
    """Execute jobs in parallel processes; yield each finished job and its error message or "".

    Args:
        jobs: The runs to execute.
        context: Folders, hardware and tracking server of the runs.
        number: Number of processes.
    """
    broken = yield from _run_in_pool(jobs, context, number)
    # A killed process breaks its whole pool, so each remaining job gets a pool of one.
    for job in broken:
        if (yield from _run_in_pool([job], context, 1)):
            yield job, KILLED


def _run_in_pool(
    jobs: Sequence[Job], context: RunContext, number: int
) -> Generator[tuple[Job, str], None, list[Job]]:
    """Execute jobs in one process pool; return the jobs that a killed process left undone."""
    threads = max(1, (os.cpu_count() or 1) // number)
    pool = ProcessPoolExecutor(
        number,
        mp_context=get_context("spawn"),
        initializer=_initialize_process,
        initargs=(threads,),
    )
    broken = []
    with _shutting_down(pool):
        jobs_of = {pool.submit(_execute_job, job, context): job for job in jobs}
        for future in as_completed(jobs_of):
            try:
                error = future.result()
            except BrokenProcessPool:
                broken.append(jobs_of[future])
            else:
                yield jobs_of[future], error
    return broken


@contextmanager
def _shutting_down(pool: ProcessPoolExecutor) -> Iterator[None]:
    """Shut a process pool down; terminate its processes after an error or Ctrl-C here."""
    others = active_children()
    try:
        yield
    except BaseException:
        # Without this, queued jobs would still start.
        deadline = time.monotonic() + SECONDS_TO_STOP
        children = [child for child in active_children() if child not in others]
        for child in children:
            child.join(max(0.0, deadline - time.monotonic()))
        for child in children:
            child.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def _initialize_process(threads: int) -> None:
    from rudolph.runs.console import silence_libraries

    torch.set_num_threads(threads)
    silence_libraries()
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Exit when the parent process ends: a killed parent cannot stop its children."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(INTERRUPTED)


def _execute_job(job: Job, context: RunContext) -> str:
    try:
        return run_or_error(*job.load(), context, discard_progress)
    except OSError as error:
        return explain_os_error(error)
    except ValueError as error:
        return " ".join(str(error).split())
    except (KeyboardInterrupt, PreemptedError):
        # Otherwise the pool would give this process its next job.
        os._exit(INTERRUPTED)
