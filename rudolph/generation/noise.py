"""Couplings: how a token follows from its distribution and from noise that is fixed in advance.

``inversion`` uses one number per token and inverts the CDF.  ``race`` uses one arrival time per
code, and the code that arrives first is sampled.  Both sample from the same distribution, although
their tokens differ.  With ``race``, samples from two similar distributions differ less often, so
guesses of several tokens at once (``generate``) are right more often.

To add a coupling, write its noise and its sampler and name them in ``NOISES``.

Shapes: B samples, N new tokens, V codes.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rudolph.generation.filters import sample_token


class SamplingNoise(NamedTuple):
    """A coupling: a function that generates noise and a function that samples with it.

    ``noise(seeds, N, V)`` returns ``(B, N, ...)``.  ``sample(probabilities, noise)`` takes one row
    per token and returns one token per row.
    """

    noise: Callable[[Sequence[int], int, int], Tensor]
    sample: Callable[[Tensor, Tensor], Tensor]


def uniform_numbers(seeds: Sequence[int], num_new: int, num_codes: int = 0) -> Tensor:
    """Generate uniform numbers in [0, 1), ``(len(seeds), N)``, with one stream per seed."""
    rows = [
        torch.rand(num_new, generator=torch.Generator().manual_seed(seed % 2**63))
        for seed in seeds
    ]
    return torch.stack(rows)


def exponential_times(seeds: Sequence[int], num_new: int, num_codes: int) -> Tensor:
    """Generate exponential times above 0, ``(len(seeds), N, V)``, with one stream per seed.

    1024 tokens of 8192 codes take 32 MiB per sample.
    """
    rows = [
        torch.empty(num_new, num_codes).exponential_(
            generator=torch.Generator().manual_seed(seed % 2**63)
        )
        for seed in seeds
    ]
    return torch.stack(rows).clamp(min=torch.finfo(torch.float32).tiny)


def exponential_race(probabilities: Tensor, arrival_times: Tensor) -> Tensor:
    """Sample one token per row of ``(B, V)``: the least time divided by probability.

    Let two distributions have a total variation distance of d.  With the same arrival times, their
    tokens agree with a probability of at least ``(1 - d) / (1 + d)``, however codes are numbered.

    Source: Daliri et al. 2024 (arXiv:2408.07978).

    Args:
        probabilities: ``(B, V)``, probabilities.
        arrival_times: ``(B, V)``, exponential times above 0.
    """
    return (probabilities / arrival_times).argmax(-1)


NOISES = {
    "inversion": SamplingNoise(uniform_numbers, sample_token),
    "race": SamplingNoise(exponential_times, exponential_race),
}
