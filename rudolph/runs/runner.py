"""Many runs: of a file or of a folder of files, one after the other or some at a time.

A run that fails stops no other.  Processes that work at once share the cores; each executes run
after run, so that libraries are imported once.
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
from rudolph.reports.report import read_report
from rudolph.reports.run_files import SUMMARY, read_summary
from rudolph.reports.store import finished_row
from rudolph.runs.execution import Folders, Hardware, ProgressCallback, is_finished, run_folder

BASES = "base"
# In the folder of an experiment's runs, the file that they are of.
OWNER = "experiment.txt"
# In a run's folder, where the error that ended it was raised.
TRACEBACK = "traceback.txt"
KILLED = "its process was killed, by the system or for its memory"
# Seconds that runs at once have to end after Ctrl-C, and the exit code of their processes.
SECONDS_TO_STOP = 3.0
INTERRUPTED = 130
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


@dataclass(frozen=True)
class RunContext:
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


def require_own_experiments(
    experiments: Sequence[Experiment], folders: Folders, results: Path
) -> None:
    """Raise ``ConfigError`` for a file whose name belongs to another file's runs or results.

    A copy that asks the same of the same runs shares them.  A file that is no longer there has
    been moved.
    """
    known: dict[str, Experiment] = {}
    for experiment in experiments:
        other = known.setdefault(experiment.name.casefold(), experiment)
        if other is not experiment:
            raise _owned(experiment, str(other.path), "the same command")
        for place, owner in _owners(experiment, folders, results):
            path = folders.checkout / owner
            if path.is_file() and not _asks_the_same(experiment, path):
                raise _owned(experiment, owner, str(place))


def _owned(experiment: Experiment, owner: str, place: str) -> ConfigError:
    return ConfigError(
        f"{experiment.path}: expected a name of its own, got {experiment.name!r}, which is that "
        f"of {owner} in {place}. Rename one of the files"
    )


def _owners(experiment: Experiment, folders: Folders, results: Path) -> Iterator[tuple[Path, str]]:
    """Yield each folder of an experiment's name with the file that it was made from."""
    runs = folders.runs / experiment.name
    if (runs / OWNER).is_file():
        yield runs, (runs / OWNER).read_text("utf-8", errors="replace").strip()
    if (results / experiment.name / "report.json").is_file():
        try:
            yield results / experiment.name, read_report(results / experiment.name).source
        except DamagedFileError:
            # The next export writes it anew.
            return


def _asks_the_same(experiment: Experiment, path: Path) -> bool:
    if path.samefile(experiment.path):
        return True
    try:
        other = load_experiment(path)
        own = load_experiment(experiment.path)
    except ConfigError:
        return False
    asked = [
        (each.title, each.question, [(run.name, run.config.digest) for run in each.runs])
        for each in (own, other)
    ]
    return asked[0] == asked[1]


def keep_owner(experiment: Experiment, folders: Folders) -> None:
    """Note whose runs lie in the folder of an experiment."""
    path = experiment.path.resolve()
    checkout = folders.checkout.resolve()
    shown = path.relative_to(checkout) if path.is_relative_to(checkout) else path
    write_text(folders.runs / experiment.name / OWNER, f"{shown.as_posix()}\n")


def failure_of(
    experiment: Experiment, run: Run, place: RunContext, progress: ProgressCallback
) -> str:
    """Execute a run unless it is finished; return the error that ended it, empty if none did.

    The traceback of an error that is no user's mistake is kept in the run's folder.

    Raises:
        ValueError: for a mistake in the data or the hardware flags.
        OSError: for a file that cannot be read or written.
    """
    # Only what trains takes the seconds that Lightning and MLflow need to be imported.
    from rudolph.runs.experiment import execute
    from rudolph.training.callbacks import NonFiniteLossError

    folder = run_folder(place.folders, experiment, run)
    if is_finished(folder):
        return ""
    kept = folder / TRACEBACK
    kept.unlink(missing_ok=True)
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
    except (ValueError, OSError):
        raise
    except Exception as error:
        if place.hardware.world > 1:
            # The other processes of the run wait for this one until it dies.
            raise
        write_text(kept, traceback.format_exc())
        why = f"{error_line(error)}; its traceback is in {kept}"
    else:
        return ""
    # The frames of the error held the models.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return why


def is_shared_mistake(folder: Path, run: Run, others: Sequence[Run]) -> bool:
    """Return whether what ended a run in its first stage must end all others too.

    Until then a run has read its data, its tokenizer and a VQ-GAN that is named.

    Args:
        folder: of the run that failed.
    """

    def read_first(each: Run) -> tuple[Any, ...]:
        return each.config.model.family, each.config.data, each.config.tokenizer, each.config.vqgan

    if any(read_first(each) != read_first(run) for each in others):
        return False
    return (folder / SUMMARY).is_file() and set(read_summary(folder)["seconds"]) <= {"data"}


def error_line(error: Exception) -> str:
    """Return an error in one line, with what helps where memory ran out."""
    text = " ".join(str(error).split())
    line = f"{type(error).__name__}: {text}" if text else type(error).__name__
    is_memory = isinstance(error, MemoryError) or any(
        words in text.lower() for words in OUT_OF_MEMORY
    )
    return f"{line} (a smaller --micro-batch-size needs less memory)" if is_memory else line


def search_of(experiment: Experiment, folders: Folders) -> Iterator[list[Run]]:
    """The rounds of an experiment's search: each is to be executed before the next is taken."""
    if experiment.search is None:
        return
    from rudolph.runs.search import search_rounds

    def row_of(run: Run) -> Mapping[str, Any] | None:
        return finished_row(run_folder(folders, experiment, run))

    yield from search_rounds(experiment, row_of)


def all_runs(experiment: Experiment, folders: Folders) -> list[Run]:
    """The runs of an experiment, with those of its search that have finished."""
    found = _runs_of_search(experiment, folders)
    ended = [run for run in found if finished_row(run_folder(folders, experiment, run))]
    return [*experiment.runs, *ended]


def missing_runs(experiment: Experiment, folders: Folders) -> tuple[str, ...]:
    """Return the names of the runs that have not finished, and how many of a search follow."""
    found = _runs_of_search(experiment, folders)
    missing = [
        run.name
        for run in (*experiment.runs, *found)
        if finished_row(run_folder(folders, experiment, run)) is None
    ]
    if experiment.search is not None:
        search = experiment.search
        left = search.trials + len(search.domains) * len(experiment.seeds) - len(found)
        missing += [f"{left} more of its search"] if left else []
    return tuple(missing)


def _runs_of_search(experiment: Experiment, folders: Folders) -> list[Run]:
    """The runs of a search up to the first round that has not begun."""
    runs: list[Run] = []
    for found in search_of(experiment, folders):
        if not any((run_folder(folders, experiment, run) / SUMMARY).exists() for run in found):
            break
        runs += found
    return runs


def run_at_once(
    jobs: Sequence[Job], place: RunContext, *, number: int
) -> Iterator[tuple[Job, str]]:
    """Execute jobs in ``number`` processes; each as it ends, with why it failed."""
    broken = yield from _in_processes(jobs, place, number)
    # One that is killed takes all others of its pool along, so each is tried by itself.
    for job in broken:
        if (yield from _in_processes([job], place, 1)):
            yield job, KILLED


def _in_processes(
    jobs: Sequence[Job], place: RunContext, number: int
) -> Generator[tuple[Job, str], None, list[Job]]:
    """Execute jobs in one pool of processes; return those that a killed process left."""
    threads = max(1, (os.cpu_count() or 1) // number)
    pool = ProcessPoolExecutor(
        number, mp_context=get_context("spawn"), initializer=_begin, initargs=(threads,)
    )
    broken = []
    with _ended(pool):
        jobs_of = {pool.submit(_execute_job, job, place): job for job in jobs}
        for future in as_completed(jobs_of):
            try:
                why = future.result()
            except BrokenProcessPool:
                broken.append(jobs_of[future])
            else:
                yield jobs_of[future], why
    return broken


@contextmanager
def _ended(pool: ProcessPoolExecutor) -> Iterator[None]:
    """End the processes of a pool; at once, where an error or a key press stops this one."""
    others = active_children()
    try:
        yield
    except BaseException:
        # Jobs that wait in the pool would still start.
        deadline = time.monotonic() + SECONDS_TO_STOP
        children = [child for child in active_children() if child not in others]
        for child in children:
            child.join(max(0.0, deadline - time.monotonic()))
        for child in children:
            child.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def _begin(threads: int) -> None:
    from rudolph.runs.console import silence_libraries

    torch.set_num_threads(threads)
    silence_libraries()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process once its parent is gone; a killed parent cannot end it itself."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(INTERRUPTED)


def _execute_job(job: Job, place: RunContext) -> str:
    try:
        return failure_of(*job.load(), place, _unseen)
    except OSError as error:
        return explain_os_error(error)
    except ValueError as error:
        return " ".join(str(error).split())
    except KeyboardInterrupt:
        # The pool would give this process its next job.
        os._exit(INTERRUPTED)


def _unseen(stage: str, done: int, total: int, note: str) -> None:
    """Show nothing: runs at once report only their ends."""
