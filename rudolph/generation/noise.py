"""How a token follows from its distribution and from noise that is fixed before it.

``inversion`` takes one number a token and inverts the distribution function.
``exponential_race`` takes a time for every code, and the code that comes first is drawn; it draws
other tokens, of the same probabilities, and draws from two distributions that are near differ
less often, so guesses of several tokens at once (``generate``) are right more often.

To add a coupling, write its noise and its draw and name them in ``NOISES``.

Shapes: B samples, N new tokens, V codes.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rudolph.generation.filters import sample_token


class SamplingNoise(NamedTuple):
    """``noise(seeds, N, V)`` is ``(B, N, ...)``; ``sample_token(shares, noise)`` has a row a
    token."""

    noise: Callable[[Sequence[int], int, int], Tensor]
    draw: Callable[[Tensor, Tensor], Tensor]


def uniform_numbers(seeds: Sequence[int], num_new: int, num_codes: int = 0) -> Tensor:
    """Numbers in [0, 1) for each draw, ``(len(seeds), N)``: one stream a sample, by its seed."""
    rows = [
        torch.rand(num_new, generator=torch.Generator().manual_seed(seed % 2**63))
        for seed in seeds
    ]
    return torch.stack(rows)


def exponential_times(seeds: Sequence[int], num_new: int, num_codes: int) -> Tensor:
    """Exponential times above 0, ``(len(seeds), N, V)``: one stream a sample, by its seed.

    Of 1024 tokens of 8192 codes these are 32 MiB a sample.
    """
    rows = [
        torch.empty(num_new, num_codes).exponential_(
            generator=torch.Generator().manual_seed(seed % 2**63)
        )
        for seed in seeds
    ]
    return torch.stack(rows).clamp(min=torch.finfo(torch.float32).tiny)


def exponential_race(shares: Tensor, times: Tensor) -> Tensor:
    """One token a row of ``(B, V)``: the first, as each comes at its time over its share.

    From distributions of total variation d the tokens are the same with a probability of at least
    ``(1 - d) / (1 + d)``, in whatever order the codes are (Daliri et al. 2024, arXiv:2408.07978).
    """
    return (shares / times).argmax(-1)


NOISES = {
    "inversion": SamplingNoise(uniform_numbers, sample_token),
    "race": SamplingNoise(exponential_times, exponential_race),
}
