"""Seeds, permutations and random numbers that depend on the example number alone.

Every example has its own random stream, which does not depend on batches, workers or machines.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

Numbers = np.ndarray[Any, Any]


def mixed_seed(*parts: int | str) -> int:
    """Return a 63-bit seed computed from several numbers and names."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def grid_seeds(seed: int, num_prompts: int, num_samples: int) -> list[int]:
    """Return the sampling seeds of a run's sample grid, prompt by prompt."""
    return [
        mixed_seed(seed, prompt, sample)
        for prompt in range(num_prompts)
        for sample in range(num_samples)
    ]


# Larger sets are permuted without a table of all pairs.
MAX_TABLE = 2**20
# More than the four rounds that suffice in theory (Luby and Rackoff 1988), because the round
# function here is simple.
NUM_ROUNDS = 6


def permuted(places: Numbers, size: int, *key: int) -> Numbers:
    """Apply a seeded permutation of ``range(size)`` to each number in ``places``.

    A Feistel network permutes all numbers of an even number of bits.  A result of ``size`` or more
    is permuted again until it is below ``size`` (cycle walking).  No table is needed.

    Args:
        places: ``(B,)``, numbers below ``size``.
        size: length of the permuted range, at most 2**62.
        key: numbers that determine the permutation.
    """
    half = max(1, -(-(size - 1).bit_length() // 2))
    mask = np.uint64(2**half - 1)
    rounds = np.random.Generator(np.random.Philox(np.random.SeedSequence(key))).integers(
        0, 2**64, NUM_ROUNDS, dtype=np.uint64
    )
    values = np.asarray(places, dtype=np.uint64)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():
        left, right = values[outside] >> np.uint64(half), values[outside] & mask
        for round_key in rounds:
            left, right = right, left ^ (_mixed(right + round_key) & mask)
        values[outside] = left << np.uint64(half) | right
        outside = values >= size
    return values.astype(np.int64)


def _mixed(values: Numbers) -> Numbers:
    """Mix the 64 bits of each number (the finaliser of SplitMix64, Steele 2014)."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)


def shuffled_pairs(numbers: Sequence[int], num_pairs: int, seed: int) -> Numbers:
    """Return the pair index of each example number.

    Every epoch of ``num_pairs`` examples is a permutation of the pairs.
    """
    epochs, offsets = np.divmod(np.asarray(numbers), num_pairs)
    pairs = np.empty_like(offsets)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        if num_pairs > MAX_TABLE:
            pairs[chosen] = permuted(offsets[chosen], num_pairs, seed, int(epoch))
        else:
            permutation = np.random.default_rng([seed, int(epoch)]).permutation(num_pairs)
            pairs[chosen] = permutation[offsets[chosen]]
    return pairs


def uniform_per_example(numbers: Sequence[int], seed: int, size: int) -> Numbers:
    """Sample uniform numbers in [0, 1), ``(len(numbers), size)``.

    Each row depends only on ``seed`` and its example number.
    """
    streams = (np.random.Philox(key=seed, counter=[0, 0, 0, number]) for number in numbers)
    return np.stack([np.random.Generator(stream).random(size) for stream in streams])
