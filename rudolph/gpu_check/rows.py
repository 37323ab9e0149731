"""What a part of the check gives: cases, and the rows that each measures."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

OK, FAILED = "ok", "failed"


class UnavailableError(Exception):
    """The machine lacks what a case needs; the message says what."""


@dataclass(frozen=True)
class CheckRow:
    """One number of a case.  With a ``limit`` it is a check: the value must not exceed it."""

    quantity: str
    value: float
    unit: str = ""
    limit: float | None = None
    note: str = ""

    @property
    def status(self) -> str:
        is_fine = math.isfinite(self.value) and (self.limit is None or self.value <= self.limit)
        return OK if is_fine else FAILED


class Case(NamedTuple):
    """A piece of a part that fails alone."""

    name: str
    run: Callable[[], Iterable[CheckRow]]
