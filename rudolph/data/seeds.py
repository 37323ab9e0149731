"""Seeds, permutations and random numbers that depend on the example number alone.

Every example has its own random stream, which does not depend on batches, workers or machines.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np


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


def shuffled_pairs(numbers: Sequence[int], num_pairs: int, seed: int) -> np.ndarray[Any, Any]:
    """Return the pair index of each example number.

    Every epoch of ``num_pairs`` examples is a permutation of the pairs.
    """
    epochs, offsets = np.divmod(np.asarray(numbers), num_pairs)
    pairs = np.empty_like(offsets)
    for epoch in np.unique(epochs):
        permutation = np.random.default_rng([seed, int(epoch)]).permutation(num_pairs)
        pairs[epochs == epoch] = permutation[offsets[epochs == epoch]]
    return pairs


def uniform_per_example(numbers: Sequence[int], seed: int, size: int) -> np.ndarray[Any, Any]:
    """Sample uniform numbers in [0, 1), ``(len(numbers), size)``.

    Each row depends only on ``seed`` and its example number.
    """
    streams = (np.random.Philox(key=seed, counter=[0, 0, 0, number]) for number in numbers)
    return np.stack([np.random.Generator(stream).random(size) for stream in streams])
