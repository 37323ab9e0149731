"""What quantizers have in common: the nearest code, the gradient around it, how many are used.

Shapes: B batch, E embedding dim, H and W the grid of latents, K the number of codes, M vectors.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# Scores of vectors against codes that are in memory at once.
MOST_SCORES = 2**22


class Quantized(NamedTuple):
    """``z_q`` (B, E, H, W), ``indices`` (B, H, W) int64 and the quantizer's own scalar loss."""

    z_q: Tensor
    indices: Tensor
    loss: Tensor


def nearest_codes(vectors: Tensor, codebook: Tensor) -> Tensor:
    """The index of the nearest code of each vector by squared distance, ``(M,)``."""
    # |v|^2 is the same for every code and is left out.
    squares = codebook.pow(2).sum(1)
    found = [
        (squares - 2 * part @ codebook.t()).argmin(1) for part in _parts(vectors, len(codebook))
    ]
    return torch.cat(found)


def largest_logit(vectors: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The index of the largest of ``vectors @ weight.T + bias`` for each vector, ``(M,)``."""
    found = [F.linear(part, weight, bias).argmax(1) for part in _parts(vectors, len(weight))]
    return torch.cat(found)


def _parts(vectors: Tensor, num_codes: int) -> tuple[Tensor, ...]:
    return torch.split(vectors, max(MOST_SCORES // num_codes, 1))


def straight_through(z: Tensor, z_q: Tensor) -> Tensor:
    return z + (z_q - z).detach()


def codebook_usage(counts: Tensor) -> tuple[float, float]:
    """Share of codes that occur and their perplexity, exp of the entropy, from counts (K,)."""
    share = counts.double() / counts.sum().clamp(min=1)
    entropy = -(share * share.clamp(min=1e-12).log()).sum()
    return (counts > 0).double().mean().item(), entropy.exp().item()


def nearest_map(z: Tensor, codebook: Tensor) -> Tensor:
    vectors = z.movedim(1, -1)  # (B, H, W, E)
    found = nearest_codes(vectors.reshape(-1, vectors.shape[-1]).float(), codebook.float())
    return found.view(vectors.shape[:-1])


def channels(vector: Tensor) -> Tensor:
    return vector[None, :, None, None]
