"""What datasets that are drawn by rule have in common.

An example depends on the configuration, the split and its index alone, so there are as many as
wanted and none needs an earlier one: its draws come from ``example_rng``. Which split something
belongs to, the hash of a text says. A dataset draws until it has drawn something of its split.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from random import Random
from typing import Any, Protocol, TypeVar

from rudolph.data.pairs import hash_fraction

Option = TypeVar("Option")
Drawn = TypeVar("Drawn")

# A text is of the first split whose bound is above its hash_fraction.
_SPLIT_BOUNDS = {"train": 0.8, "validation": 0.9, "test": 1.0}
_MAX_DRAWS = 10_000


class SplitSizes(Protocol):
    """A config that says how many examples there are of each split.

    The compositional split has as many as the test split.
    """

    @property
    def num_train(self) -> int: ...
    @property
    def num_validation(self) -> int: ...
    @property
    def num_test(self) -> int: ...


def num_examples(config: SplitSizes, split: str) -> int:
    """How many examples a split has."""
    size = "test" if split == "compositional" else split
    number: int = getattr(config, f"num_{size}")
    return number


def example_rng(index: int, *, seed: int, split: str, length: int, unit: str = "pairs") -> Random:
    """The source of all that is drawn for one example; ``unit`` is what ``length`` counts.

    Raises:
        IndexError: there is no such example.
    """
    if not 0 <= index < length:
        raise IndexError(f"{split} has {length} {unit}, got index {index}")
    return Random(f"{seed}/{split}/{index}")


def sample_until(
    draw: Callable[[], Drawn | None], belongs: Callable[[Drawn], bool], *, otherwise: str
) -> Drawn:
    """The first draw that belongs; ``None`` is a draw that failed.

    Raises:
        ValueError: with the message ``otherwise``, when nearly none can belong.
    """
    for _ in range(_MAX_DRAWS):
        drawn = draw()
        if drawn is not None and belongs(drawn):
            return drawn
    raise ValueError(otherwise)


def split_by_hash(text: str) -> str:
    """Train (80 %), validation or test, which depends on the text alone."""
    fraction = hash_fraction(text)
    return next(split for split, bound in _SPLIT_BOUNDS.items() if fraction < bound)


def choose(rng: Random, options: Sequence[Option]) -> Option:
    """One of the options."""
    # Of all methods, only random() is promised to give the same in every version of Python.
    return options[int(rng.random() * len(options))]


def choose_distinct(rng: Random, options: Sequence[Option], *, number: int) -> list[Option]:
    """As many of the options, each at most once, in an order that is drawn as well."""
    remaining = list(options)
    return [remaining.pop(int(rng.random() * len(remaining))) for _ in range(number)]


def choose_number(rng: Random, least: int, most: int) -> int:
    """A whole number from ``least`` to ``most``, both of them included."""
    return least + int(rng.random() * (most - least + 1))


def json_digest(*parts: Any) -> str:
    """SHA-256, in hexadecimal, of values that JSON can write."""
    return hashlib.sha256(json.dumps(list(parts), sort_keys=True).encode()).hexdigest()


def require_choices(
    field: str, names: tuple[str, ...], *, legal: Collection[str], at_least: int
) -> None:
    """Raise ``ValueError`` unless the names are legal, different and enough."""
    if len(names) < at_least or len(set(names)) < len(names) or not set(names) <= set(legal):
        raise ValueError(
            f"{field} must be at least {at_least} of {', '.join(legal)}, each once, got {names}"
        )


def require_within(field: str, value: float, least: float, most: float) -> None:
    """Raise ``ValueError`` for a number out of its bounds."""
    if not least <= value <= most:
        raise ValueError(f"{field} must be {least} to {most}, got {value}")


def require_sizes(config: SplitSizes) -> None:
    """Raise ``ValueError`` for a split without examples."""
    for name in ("num_train", "num_validation", "num_test"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")
