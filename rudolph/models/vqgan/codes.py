"""Operations shared by the quantizers: nearest codes, straight-through gradient, codebook usage.

Shapes: B batch, E embedding dim, H and W the grid of latents, K number of codes, M vectors.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# Maximum number of vector-code scores in memory.
MAX_SCORES_IN_MEMORY = 2**22


class Quantized(NamedTuple):
    """The output of a quantizer.

    Attributes:
        z_q: quantized latents ``(B, E, H, W)``.
        indices: ``(B, H, W)`` int64.
        loss: scalar loss of the quantizer itself.
    """

    z_q: Tensor
    indices: Tensor
    loss: Tensor


def nearest_codes(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Return the index ``(M,)`` int64 of each vector's nearest code by squared distance.

    Args:
        vectors: ``(M, E)``.
        codebook: ``(K, E)``.
    """
    # |v|^2 is the same for every code, so it does not affect the argmin.
    squares = codebook.pow(2).sum(1)
    indices = [
        (squares - 2 * part @ codebook.t()).argmin(1) for part in _parts(vectors, len(codebook))
    ]
    return torch.cat(indices)


def largest_logit(vectors: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the argmax ``(M,)`` int64 of ``vectors @ weight.T + bias`` for each vector.

    Args:
        vectors: ``(M, E)``.
        weight: ``(K, E)``.
        bias: ``(K,)``.
    """
    indices = [F.linear(part, weight, bias).argmax(1) for part in _parts(vectors, len(weight))]
    return torch.cat(indices)


def _parts(vectors: Tensor, num_codes: int) -> tuple[Tensor, ...]:
    return torch.split(vectors, max(MAX_SCORES_IN_MEMORY // num_codes, 1))


def straight_through(z: Tensor, z_q: Tensor) -> Tensor:
    """Return ``z_q``; the backward pass gives its gradient to ``z`` unchanged."""
    return z + (z_q - z).detach()


def codebook_usage(counts: Tensor) -> tuple[float, float]:
    """Return the fraction of codes in use and their perplexity, the exp of the entropy in nats.

    Args:
        counts: occurrences of each code, ``(K,)``.
    """
    probabilities = counts.double() / counts.sum().clamp(min=1)
    entropy = -(probabilities * probabilities.clamp(min=1e-12).log()).sum()
    return (counts > 0).double().mean().item(), entropy.exp().item()


def nearest_map(z: Tensor, codebook: Tensor) -> Tensor:
    """Return the index ``(B, H, W)`` int64 of each latent's nearest code, compared in float32.

    Args:
        z: latents ``(B, E, H, W)``.
        codebook: ``(K, E)``.
    """
    vectors = z.movedim(1, -1)  # (B, H, W, E)
    indices = nearest_codes(vectors.reshape(-1, vectors.shape[-1]).float(), codebook.float())
    return indices.view(vectors.shape[:-1])


def channels(vector: Tensor) -> Tensor:
    """Return a vector ``(C,)`` as ``(1, C, 1, 1)``, to broadcast over maps."""
    return vector[None, :, None, None]
