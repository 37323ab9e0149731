"""Messages and progress of commands, on standard error."""

import logging
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

SECONDS_BETWEEN_LINES = 15.0


@cache
def console() -> Any:
    """Return the console on standard error; ``rich`` is imported only at the first message."""
    from rich.console import Console

    return Console(stderr=True)


@contextmanager
def stage_progress() -> Iterator[Callable[[str, int, int, str], None]]:
    """Yield ``progress(stage, done, total, note)``: live bars on a terminal, else log lines."""
    if not console().is_terminal:
        yield LogProgress()
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("  {task.description:28}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console()) as bars:
        tasks: dict[str, Any] = {}

        def progress(stage: str, done: int, total: int, note: str) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, note="", rate="")
            task = bars.tasks[tasks[stage]]
            rate = f"{done / task.elapsed:.1f}/s" if task.elapsed and done else ""
            bars.update(tasks[stage], completed=done, total=total, note=note, rate=rate)

        yield progress


class LogProgress:
    """Progress as text: a line per ``SECONDS_BETWEEN_LINES`` and one at the end of a stage."""

    def __init__(self) -> None:
        self.started: dict[str, float] = {}
        self.last = time.monotonic()

    def __call__(self, stage: str, done: int, total: int, note: str) -> None:
        """Print the progress of a stage if it is done or the last line is old enough."""
        now = time.monotonic()
        started = self.started.setdefault(stage, now)
        if done < total and now - self.last < SECONDS_BETWEEN_LINES:
            return
        self.last = now
        left = (now - started) * (total - done) / done if done else 0.0
        times = f"{now - started:.0f} s" + (f", {left:.0f} s left" if left else "")
        print_line(f"  {stage}: {done}/{total}  {times}  {note}".rstrip())


def print_line(text: str) -> None:
    """Print one line on standard error, without markup or line wrapping."""
    console().print(text, markup=False, highlight=False, soft_wrap=True)


def silence_libraries() -> None:
    """Hide messages of libraries that users of this program cannot act on."""
    for name in ("pytorch_lightning", "lightning.pytorch", "alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.showwarning = print_warning
    warnings.filterwarnings("ignore", module="pytorch_lightning|mlflow|torch|lightning|urllib3")


_show_as_python = warnings.showwarning


def print_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: str | None = None,
) -> None:
    """Print a warning of this package as one line, and any other as Python does."""
    if category.__module__.startswith("rudolph."):
        print_line(f"  {message}")
    else:
        _show_as_python(message, category, filename, lineno, file, line)
