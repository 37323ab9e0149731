"""The mixture of datasets and tasks, which gives each example number an entry and a pair.

Shapes: B examples, N pairs, K entries.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from rudolph.data.seeds import shuffled_pairs

Indices = np.ndarray[Any, Any]


class Mixture:
    """A weighted mixture of entries; each example samples an entry in proportion to its weight.

    Args:
        weights: Weight of each entry, ``(K,)``.
        sizes: Number of pairs of each entry.
        seed: Seed of the order of the pairs.
    """

    def __init__(self, weights: Sequence[float], sizes: Sequence[int], *, seed: int) -> None:
        total = np.array(weights)
        self.bounds = (total / total.sum()).cumsum()
        self.sizes, self.seed = list(sizes), seed

    def rows(self, uniform: Indices) -> Indices:
        """Return the entry ``(B,)`` that each uniform number selects.

        ``uniform`` is ``(B,)`` in [0, 1).
        """
        # Rounding can make the last bound smaller than a sampled number; that bound is left out.
        return np.searchsorted(self.bounds[:-1], uniform, side="right")

    def pairs(self, numbers: Sequence[int], rows: Indices) -> Indices:
        """Return the pair ``(B,)`` of each example, shuffled for every epoch of its entry.

        An epoch of an entry has as many example numbers as the entry has pairs.

        Args:
            numbers: Example numbers.
            rows: Entry of each example.
        """
        pair_of_example = {
            size: shuffled_pairs(numbers, size, self.seed) for size in set(self.sizes)
        }
        return np.array(
            [pair_of_example[self.sizes[row]][index] for index, row in enumerate(rows)]
        )

    @cached_property
    def validation_entries(self) -> Indices:
        """Return the (pair, entry) indices of all validation examples, ``(sum of sizes, 2)``.

        They are sorted by pair.  Pair i occurs once for every entry that has more than i pairs.
        """
        pairs_and_rows = [
            (pair, row) for row, size in enumerate(self.sizes) for pair in range(size)
        ]
        return np.array(sorted(pairs_and_rows))
