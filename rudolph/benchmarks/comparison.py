"""Comparison of implementations, each in its own process, with only one running at a time.

Repetition k of every implementation comes before repetition k + 1 of any. A machine that slows
down or warms up thus affects all implementations alike.
"""

import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from rudolph.benchmarks.benchmark_case import CAPTION, BenchmarkCase
from rudolph.benchmarks.config import (
    INSTRUCTION_SET_VARIABLES,
    OURS,
    REFERENCE,
    ROOFLINE,
    TRANSFORMERS,
    WORKLOADS,
)
from rudolph.data.seeds import mixed_seed
from rudolph.reports.schema import Timing

REFERENCE_VARIABLE = "RUDOLPH_REFERENCE"
REFERENCE_FOLDER = Path("data/reference")
REFERENCE_PACKAGES = ("rudolph==0.0.1rc10", "rudalle==1.1.3", "taming-transformers==0.0.1")
# Seconds, longer than any repetition: a process that has not answered by then has failed.
ANSWER_TIMEOUT = 3 * 3600.0
CLOSE_TIMEOUT = 5.0

# Progress callback, called before each repetition with done, total and a note.
RepetitionCallback = Callable[[int, int, str], None]


@dataclass
class ComparisonResult:
    """The repetitions of a comparison and further facts about each implementation.

    Attributes:
        timings: The timed repetitions of all implementations, in order.
        weights_bytes: Bytes of all weights, keyed by implementation.
        cache_bytes: Bytes of the key/value cache, keyed by implementation.
        profiles: Rows keyed by implementation. Each row has a part, an operation, its number of
            calls, its milliseconds and its fraction of the total time.
        versions: Versions of third-party packages, keyed by package.
    """

    timings: list[Timing] = field(default_factory=list)
    weights_bytes: dict[str, int] = field(default_factory=dict)
    cache_bytes: dict[str, int] = field(default_factory=dict)
    profiles: dict[str, list[tuple[str, str, int, float, float]]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


class ImplementationProcess:
    """The process of one implementation, with the requests that it answers.

    Args:
        name: The implementation's name, used in error messages.
        command: The command line that starts the process.
        log: File for its standard error; its last line becomes the error message of a failure.
        variables: Variables added to the environment of the process.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.name, self.log = name, log
        with log.open("wb") as errors:
            # In its own process group the child does not receive Ctrl-C; the parent ends it.
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                bufsize=0,
                process_group=0,
                env={**os.environ, **(variables or {})},
            )

    def request(self, content: Mapping[str, Any], timeout: float = ANSWER_TIMEOUT) -> Any:
        """Send one request and wait for its answer.

        Args:
            content: The request, sent as one line of JSON.
            timeout: Seconds to wait for the answer.

        Returns:
            The answer, parsed from JSON.

        Raises:
            ValueError: If the process ends or does not answer within ``timeout`` seconds.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(content).encode() + b"\n")
        except OSError as error:
            raise self.failure_error() from error
        if not select.select([self.process.stdout], [], [], timeout)[0]:
            raise ValueError(f"implementation {self.name}: no answer in {timeout:g} s")
        line = self.process.stdout.readline()
        if not line.endswith(b"\n"):
            raise self.failure_error()
        return json.loads(line)

    def failure_error(self) -> ValueError:
        """Return the error that reports why the process ended, in one line."""
        try:
            code: int | None = self.process.wait(CLOSE_TIMEOUT)
        except subprocess.TimeoutExpired:
            code = None
        text = self.log.read_text("utf-8", errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        reason = lines[-1] if lines else f"ended with exit code {code}"
        return ValueError(f"implementation {self.name}: {reason[:400]}")

    def close(self) -> None:
        """Kill the process and close its pipes."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


def require_implementations(names: Sequence[str]) -> None:
    """Check that the third-party packages of the named implementations are installed.

    Raises:
        ValueError: If one is missing; the message has the command that installs it.
    """
    if REFERENCE in names:
        folder = reference_folder()
        if not (folder / "rudolph").is_dir() or not (folder / "rudalle").is_dir():
            packages = " ".join(REFERENCE_PACKAGES)
            raise ValueError(
                f"implementation {REFERENCE}: no packages in {folder} (or ${REFERENCE_VARIABLE}); "
                f"pip install --no-deps --target {folder} {packages}"
            )
    if TRANSFORMERS in names and find_spec("transformers") is None:
        raise ValueError(f"implementation {TRANSFORMERS}: not installed; pip install transformers")


def reference_folder() -> Path:
    """Return the folder that holds the reference's packages."""
    return Path(os.environ.get(REFERENCE_VARIABLE) or REFERENCE_FOLDER)


def implementation_command(name: str) -> list[str]:
    """Return the command line that starts an implementation's process."""
    if name == REFERENCE:
        script = Path(__file__).with_name("reference_worker.py")
        return [sys.executable, "-P", str(script), str(reference_folder().resolve())]
    return [sys.executable, "-m", "rudolph.benchmarks.worker"]


@contextmanager
def started_process(
    name: str, case: BenchmarkCase, folder: Path
) -> Iterator[tuple[ImplementationProcess, Any]]:
    """Start an implementation and end its process on leaving the block.

    Args:
        name: The implementation's name.
        case: The case to run.
        folder: The folder that ``prepare_case`` filled.

    Yields:
        The process and its first answer, sent when its models are loaded.

    Raises:
        ValueError: If the process fails to start.
    """
    # The log is outside the folder, so that it can be read after the folder has been deleted.
    variables = INSTRUCTION_SET_VARIABLES.get(case.speed.instruction_set or "")
    worker = ImplementationProcess(
        name, implementation_command(name), folder.parent / f"{name}.log", variables
    )
    try:
        ready = worker.request(
            {
                "implementation": name,
                "case": case.to_plain(),
                "folder": str(folder.resolve()),
                "caption": CAPTION,
                "threads": torch.get_num_threads(),
                "seed": mixed_seed(case.seed, "speed"),
            }
        )
        yield worker, ready
    finally:
        worker.close()


def compare_implementations(
    case: BenchmarkCase,
    folder: Path,
    *,
    report_progress: RepetitionCallback,
    check: Callable[[ImplementationProcess], None],
) -> ComparisonResult:
    """Warm up all implementations, time them in turn, then profile those of this package.

    Args:
        case: The case to run.
        folder: The folder that ``prepare_case`` filled; the process logs go next to it.
        report_progress: Progress callback.
        check: Called with the reference's process before anything is timed.

    Raises:
        ValueError: If an implementation fails.
    """
    result, names = ComparisonResult(), case.speed.implementations
    turns = list(turns_of(case))
    with ExitStack() as stack:
        workers: dict[str, ImplementationProcess] = {}
        for name in names:
            report_progress(0, len(turns), f"{name} starts")
            workers[name], ready = stack.enter_context(started_process(name, case, folder))
            note_ready(result, name, ready)
            if name == REFERENCE:
                check(workers[name])
        for name, part in implementation_parts(case):
            report_progress(0, len(turns), f"{name} warms up")
            workers[name].request({"do": "run", "part": part, "is_short": True})
        for done, (repetition, name, part) in enumerate(turns):
            report_progress(done, len(turns), turn_note(case, repetition, name, part))
            answer = workers[name].request({"do": "run", "part": part, "is_short": False})
            note_answer(result, case, answer, (repetition, name, part))
        for name, part in implementation_parts(case):
            if name in OURS:
                report_progress(len(turns), len(turns), f"{name} is profiled")
                answer = workers[name].request({"do": "profile", "part": part})
                rows = [(part, *row) for row in answer["operations"]]
                result.profiles.setdefault(name, []).extend(rows)
    report_progress(len(turns), len(turns), "")
    return result


def compare_memory(
    case: BenchmarkCase,
    folder: Path,
    *,
    report_progress: RepetitionCallback,
    check: Callable[[ImplementationProcess], None],
) -> ComparisonResult:
    """Measure peak memory, with a fresh process per repetition.

    A peak thus covers the whole life of a process. Arguments and errors are the same as in
    ``compare_implementations``.
    """
    result, names = ComparisonResult(), case.speed.implementations
    if REFERENCE in names:
        with started_process(REFERENCE, case, folder) as (worker, _):
            check(worker)
    total = case.speed.num_repetitions * len(names)
    for done in range(total):
        repetition, name = done // len(names), names[done % len(names)]
        report_progress(done, total, turn_note(case, repetition, name, "decode"))
        with started_process(name, case, folder) as (worker, ready):
            note_ready(result, name, ready)
            answer = worker.request({"do": "run", "part": "decode", "is_short": False})
        loaded = {**ready, "units": 1, "cache_bytes": 0}
        note_answer(result, case, loaded, (repetition, name, "load"))
        note_answer(result, case, answer, (repetition, name, "decode"))
    report_progress(total, total, "")
    return result


def implementation_parts(case: BenchmarkCase) -> Iterator[tuple[str, str]]:
    """Yield every implementation with each part of its work.

    The roofline (the machine's limits) comes first; then the implementations, grouped by part.
    """
    workload = WORKLOADS[case.speed.workload or ""]
    names = [name for name in case.speed.implementations if name != ROOFLINE]
    if ROOFLINE in case.speed.implementations:
        yield from ((ROOFLINE, part) for part in units_of(case, ROOFLINE))
    yield from ((name, part) for part in workload.units for name in names)


def units_of(case: BenchmarkCase, implementation: str) -> Mapping[str, str]:
    """Return the parts of an implementation's work, and the unit that each part counts."""
    workload = WORKLOADS[case.speed.workload or ""]
    return workload.units_of(implementation, has_bfloat16=case.speed.has_bfloat16)


def turns_of(case: BenchmarkCase) -> Iterator[tuple[int, str, str]]:
    """Yield repetition, implementation and part of every timed turn, in order."""
    for repetition in range(case.speed.num_repetitions):
        yield from ((repetition, name, part) for name, part in implementation_parts(case))


def turn_note(case: BenchmarkCase, repetition: int, name: str, part: str) -> str:
    """Return the progress note of a turn."""
    units = units_of(case, name)
    name_and_part = f"{name} {part}" if len(units) > 1 else name
    return f"{name_and_part}, repetition {repetition + 1} of {case.speed.num_repetitions}"


def note_ready(result: ComparisonResult, name: str, ready: Mapping[str, Any]) -> None:
    """Record weight sizes and versions from a process's first answer."""
    result.weights_bytes[name] = ready["weights_bytes"]
    result.versions |= ready["versions"]


def note_answer(
    result: ComparisonResult,
    case: BenchmarkCase,
    answer: Mapping[str, Any],
    turn: tuple[int, str, str],
) -> None:
    """Record the timing and cache size of one turn (repetition, implementation, part)."""
    repetition, name, part = turn
    units = units_of(case, name)
    result.timings.append(
        Timing(
            implementation=name,
            part=part if len(units) > 1 else "",
            unit=units[part],
            repetition=repetition,
            seconds=answer["seconds"],
            units=answer["units"],
            peak_bytes=answer["peak_bytes"],
        )
    )
    if answer["cache_bytes"]:
        result.cache_bytes[name] = answer["cache_bytes"]
