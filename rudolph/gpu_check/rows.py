"""Cases of a part of the check, and the rows that they yield."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

OK, FAILED = "ok", "failed"


class UnavailableError(Exception):
    """Raised if the machine lacks what a case needs; the message names it."""


@dataclass(frozen=True)
class CheckRow:
    """One number of a case; a row with a ``limit`` is a check, which fails above the limit."""

    quantity: str
    value: float
    unit: str = ""
    limit: float | None = None
    note: str = ""

    @property
    def status(self) -> str:
        """Return ``OK``, or ``FAILED`` for a value that is not finite or exceeds the limit."""
        is_fine = math.isfinite(self.value) and (self.limit is None or self.value <= self.limit)
        return OK if is_fine else FAILED


class Case(NamedTuple):
    """A piece of a part; its failure does not stop the other pieces."""

    name: str
    run: Callable[[], Iterable[CheckRow]]
