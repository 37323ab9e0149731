"""Limits of the demo: checks of values from the browser, and requests that end early.

A browser can send any value, so nothing from it is used unchecked.
"""

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rudolph.sequence.texts import clean_text, require_text

MAX_SEED = 2**31 - 1


@dataclass(frozen=True)
class DemoLimits:
    """Largest request of one user.

    Attributes:
        max_number: Images or texts per request.
        max_characters: Characters of a text.
        max_classes: Classes of a zero-shot classification.
        max_seconds: Seconds of computation.
        max_upload_bytes: Bytes of an uploaded file.
        max_waiting: Requests that wait; further ones are rejected.
    """

    max_number: int = 16
    max_characters: int = 400
    max_classes: int = 50
    max_seconds: float = 300.0
    max_upload_bytes: int = 20 * 2**20
    max_waiting: int = 20


def require_words(value: Any, name: str, limits: DemoLimits) -> str:
    """Return a text from the browser, cleaned and stripped.

    Raises:
        ValueError: If it is empty or too long.
    """
    text = value if isinstance(value, str) else ""
    require_text(text, name)
    text = clean_text(text).strip()
    if not text:
        raise ValueError(f"{name}: expected a text, got none")
    if len(text) > limits.max_characters:
        raise ValueError(
            f"{name}: expected at most {limits.max_characters} characters, got {len(text)}"
        )
    return text


def require_integer(value: Any, name: str, low: int, high: int) -> int:
    """Return a whole number from the browser.

    Raises:
        ValueError: If it is no whole number from ``low`` to ``high``.
    """
    number = optional_number(value, name)
    if number is None or number != int(number) or not low <= number <= high:
        shown = "none" if number is None else f"{number:g}"
        raise ValueError(f"{name}: expected a whole number from {low} to {high}, got {shown}")
    return int(number)


def optional_integer(value: Any, name: str) -> int | None:
    """Return a whole number from the browser, or None for an empty field.

    Raises:
        ValueError: If it is no whole number.
    """
    number = optional_number(value, name)
    if number is not None and number != int(number):
        raise ValueError(f"{name}: expected a whole number, got {number:g}")
    return None if number is None else int(number)


def optional_number(value: Any, name: str) -> float | None:
    """Return a finite number from the browser, or None for an empty field.

    Raises:
        ValueError: If it is no finite number.
    """
    text = "" if value is None else str(value).strip().replace(",", ".")
    if not text:
        return None
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name}: expected a number, got {text[:40]!r}")
    return number


def require_choice(value: Any, name: str, choices: list[str] | tuple[str, ...]) -> str:
    """Return a value from the browser that is one of the choices.

    Raises:
        ValueError: If it is not.
    """
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {str(value)[:40]!r}")
    return str(value)


class StoppedError(Exception):
    """A request that its user cancelled or that took too long."""


class Watch:
    """The progress of one request; a stopped request ends between two tokens.

    Args:
        max_seconds: Longest time after ``start``, in seconds.
        on_progress: Called with the stage and the amounts done and in total.
    """

    def __init__(
        self, max_seconds: float, on_progress: Callable[[str, int, int], None] | None = None
    ) -> None:
        self.max_seconds, self.on_progress = max_seconds, on_progress
        self.started = time.monotonic()
        self.is_cancelled = threading.Event()

    def start(self) -> None:
        """Count the time from now on, because a request may have waited for its turn.

        Raises:
            StoppedError: If the request was cancelled while it waited.
        """
        self.started = time.monotonic()
        self.require_time("waiting")

    def cancel(self) -> None:
        """End the request at its next token; safe from any thread."""
        self.is_cancelled.set()

    def require_time(self, position: str) -> None:
        """Raise ``StoppedError`` if the request was cancelled or took too long."""
        if self.is_cancelled.is_set():
            raise StoppedError(f"cancelled, {position}")
        if time.monotonic() - self.started > self.max_seconds:
            raise StoppedError(f"stopped after {self.max_seconds:g} seconds, {position}")

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Report progress.

        Raises:
            StoppedError: If the request was cancelled or took too long.
        """
        self.require_time(f"{stage} {done} of {total}")
        if self.on_progress is not None:
            self.on_progress(stage, done, total)
