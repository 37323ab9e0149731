"""Constraints of settings as types: the JSON Schema states them and ``check`` enforces them.

``Annotated[float, Bounds(gt=0)]`` is a positive number, ``Literal["row", "matrix"]`` one of two
words.  A configuration calls ``check(self)`` in ``__post_init__``.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Bounds:
    """Bounds of a number: at least ``ge``, above ``gt``, at most ``le``, below ``lt``."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def holds(self, value: float) -> bool:
        """Return whether a number lies within the bounds; NaN and infinities never do."""
        return (
            (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
            and -math.inf < value < math.inf
        )

    @property
    def is_open(self) -> bool:
        """True if the lower or the upper bound is missing."""
        has_low = self.ge is not None or self.gt is not None
        has_high = self.le is not None or self.lt is not None
        return not (has_low and has_high)

    def __str__(self) -> str:
        """Return the bounds as they stand in messages.

        >>> str(Bounds(ge=1)), str(Bounds(gt=0)), str(Bounds(ge=0, lt=1)), str(Bounds(le=5))
        ('at least 1', 'above 0', 'in [0, 1)', 'at most 5')
        """
        low, high = (
            (self.gt if self.ge is None else self.ge),
            (self.lt if self.le is None else self.le),
        )
        if low is not None and high is not None:
            opening, closing = (
                "[" if self.ge is not None else "(",
                "]" if self.le is not None else ")",
            )
            return f"in {opening}{_number(low)}, {_number(high)}{closing}"
        if low is not None:
            return f"{'above' if self.ge is None else 'at least'} {_number(low)}"
        return f"{'below' if self.le is None else 'at most'} {_number(high)}"

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        """State the bounds in the JSON Schema."""
        content: dict[str, Any] = handler(schema)
        names = {
            "minimum": self.ge,
            "exclusiveMinimum": self.gt,
            "maximum": self.le,
            "exclusiveMaximum": self.lt,
        }
        return content | {name: value for name, value in names.items() if value is not None}


def _number(value: float | None) -> str:
    """Return a bound as text, without an exponent if it is a whole number."""
    assert value is not None
    return str(int(value)) if value == int(value) else f"{value:g}"


Positive = Annotated[float, Bounds(gt=0)]
NonNegative = Annotated[float, Bounds(ge=0)]
Fraction = Annotated[float, Bounds(ge=0, le=1)]
Count = Annotated[int, Bounds(ge=1)]
NonNegativeInt = Annotated[int, Bounds(ge=0)]
Seed = Annotated[int, Bounds(ge=0, lt=2**32)]


def check(config: Any) -> None:
    """Check every field of a dataclass against the constraints of its type.

    Raises:
        ValueError: naming, in one line, the first field that violates its constraint.
    """
    for name, rule, legal, is_optional in _constraints(config.__class__):
        value = getattr(config, name)
        if value is None and is_optional:
            continue
        or_null = " or null" if is_optional else ""
        if isinstance(rule, Bounds) and not rule.holds(value):
            is_finite = -math.inf < value < math.inf
            finite = "finite and " if rule.is_open and not is_finite else ""
            raise ValueError(f"{name} must be {finite}{rule}{or_null}, got {value!r}")
        if legal and value not in legal:
            raise ValueError(f"{name} must be {one_of(legal)}{or_null}, got {value!r}")


def one_of(legal: tuple[Any, ...]) -> str:
    """Return ``one of a, b`` for messages."""
    return f"one of {', '.join(map(str, legal))}"


@cache
def _constraints(kind: Any) -> tuple[tuple[str, Bounds | None, tuple[Any, ...], bool], ...]:
    """Return name, bounds, legal values and optionality of the constrained fields of a class."""
    hints = get_type_hints(kind, include_extras=True)
    constraints = []
    for field in fields(kind):
        bounds, legal, is_optional = constraint_of(hints[field.name])
        if bounds or legal:
            constraints.append((field.name, bounds, legal, is_optional))
    return tuple(constraints)


def constraint_of(hint: Any) -> tuple[Bounds | None, tuple[Any, ...], bool]:
    """Return a type's bounds, its legal values, and whether null is legal."""
    members = get_args(hint) if isinstance(hint, UnionType) or get_origin(hint) is not None else ()
    is_union = isinstance(hint, UnionType) or str(get_origin(hint)) == "typing.Union"
    if is_union:
        inner = [member for member in members if member is not NoneType]
        bounds, legal, _ = constraint_of(inner[0]) if len(inner) == 1 else (None, (), False)
        return bounds, legal, NoneType in members
    if get_origin(hint) is Annotated:
        rules = [rule for rule in hint.__metadata__ if isinstance(rule, Bounds)]
        return (rules[0] if rules else None), (), False
    return None, (members if get_origin(hint) is Literal else ()), False


@contextmanager
def errors_under(key: str) -> Iterator[None]:
    """Put the section ``key`` in front of a ``ValueError`` message that starts with a setting."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{key}.{error}") from error
