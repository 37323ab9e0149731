"""Shared functions of the procedurally generated datasets.

An example depends only on the configuration, the split and its index, because all its random
numbers come from ``example_rng``.  Any number of examples can be generated, in any order.  The
hash of a text decides the split of an example, and a dataset samples until an example belongs to
its split.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from random import Random
from typing import Any, Protocol, TypeVar

from rudolph.data.pairs import hash_fraction

Option = TypeVar("Option")
Sampled = TypeVar("Sampled")

# A text belongs to the first split whose bound is above its hash_fraction.
_SPLIT_BOUNDS = {"train": 0.8, "validation": 0.9, "test": 1.0}
_MAX_SAMPLES = 10_000


class SplitSizes(Protocol):
    """A config with the number of examples per split.

    The compositional split is as large as the test split.
    """

    @property
    def num_train(self) -> int:
        """Return the size of the training split."""
        ...

    @property
    def num_validation(self) -> int:
        """Return the size of the validation split."""
        ...

    @property
    def num_test(self) -> int:
        """Return the size of the test split."""
        ...


def num_examples(config: SplitSizes, split: str) -> int:
    """Return the number of examples in a split."""
    size = "test" if split == "compositional" else split
    num_pairs: int = getattr(config, f"num_{size}")
    return num_pairs


def example_rng(index: int, *, seed: int, split: str, length: int, unit: str = "pairs") -> Random:
    """Return the random number generator of one example.

    Args:
        index: Index of the example.
        seed: Seed of the dataset.
        split: Name of the split.
        length: Number of examples in the split.
        unit: Plural name of the examples, for the error message.

    Raises:
        IndexError: If ``index`` is not in ``range(length)``.
    """
    if not 0 <= index < length:
        raise IndexError(f"{split} has {length} {unit}, got index {index}")
    return Random(f"{seed}/{split}/{index}")


def sample_until(
    sample: Callable[[], Sampled | None], belongs: Callable[[Sampled], bool], *, error_message: str
) -> Sampled:
    """Return the first sample for which ``belongs`` is true.

    ``sample`` returns ``None`` for a failed attempt.

    Raises:
        ValueError: With the message ``error_message``, after 10,000 attempts.
    """
    for _ in range(_MAX_SAMPLES):
        candidate = sample()
        if candidate is not None and belongs(candidate):
            return candidate
    raise ValueError(error_message)


def split_by_hash(text: str) -> str:
    """Return "train" (80 %), "validation" (10 %) or "test" (10 %), depending on the text alone."""
    fraction = hash_fraction(text)
    return next(split for split, bound in _SPLIT_BOUNDS.items() if fraction < bound)


def choose(rng: Random, options: Sequence[Option]) -> Option:
    """Sample one of the options uniformly."""
    # Only random() is guaranteed to give the same numbers in every version of Python.
    return options[int(rng.random() * len(options))]


def choose_distinct(rng: Random, options: Sequence[Option], *, number: int) -> list[Option]:
    """Sample ``number`` distinct options in random order."""
    remaining = list(options)
    return [remaining.pop(int(rng.random() * len(remaining))) for _ in range(number)]


def choose_number(rng: Random, minimum: int, maximum: int) -> int:
    """Sample an integer from ``minimum`` to ``maximum``, both included."""
    return minimum + int(rng.random() * (maximum - minimum + 1))


def json_digest(*parts: Any) -> str:
    """Return the hexadecimal SHA-256 of values that JSON can encode."""
    return hashlib.sha256(json.dumps(list(parts), sort_keys=True).encode()).hexdigest()


def require_choices(
    field: str, names: tuple[str, ...], *, legal: Collection[str], at_least: int
) -> None:
    """Raise ``ValueError`` unless ``names`` holds ``at_least`` or more distinct legal names."""
    if len(names) < at_least or len(set(names)) < len(names) or not set(names) <= set(legal):
        raise ValueError(
            f"{field} must be at least {at_least} of {', '.join(legal)}, each once, got {names}"
        )


def require_within(field: str, value: float, minimum: float, maximum: float) -> None:
    """Raise ``ValueError`` if a number is not in ``[minimum, maximum]``."""
    if not minimum <= value <= maximum:
        raise ValueError(f"{field} must be {minimum} to {maximum}, got {value}")
