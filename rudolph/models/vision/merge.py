"""Several vision encoders as one.

* ``channels``: concatenate the channels of each cell; needs equal grids (Prismatic, Eagle)
* ``tokens``: concatenate the tokens of all encoders; any grids (I-MoF)
* ``sum``: add the tokens of each cell; needs equal grids

``tokens`` and ``sum`` first project each encoder to the width of the first.

To add a merge, write its class and name it in ``MERGES``.

Source: Karamcheti 2024 (arXiv:2402.07865), section 4.2; Tong 2024 (arXiv:2401.06209), section 4.

Shapes: P images, N tokens, W channels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def require_equal_grids(encoders: Sequence[Any], kind: str) -> None:
    """Raise ``ValueError`` unless all encoders have the same grid."""
    grids = [encoder.grid for encoder in encoders]
    if any(grid != grids[0] for grid in grids):
        given = " and ".join(f"{rows}x{columns}" for rows, columns in grids)
        raise ValueError(f"merge {kind}: expected equal grids of tokens, got {given}")


class ChannelMerge(nn.Module):
    """Concatenation of channels: ``(P, N, W_1)``, ... to ``(P, N, W_1 + W_2 + ...)``."""

    def __init__(self, encoders: Sequence[Any]) -> None:
        super().__init__()
        require_equal_grids(encoders, "channels")
        self.encoders = nn.ModuleList(encoders)
        self.image_size: int = encoders[0].image_size
        self.grid, self.num_tokens = encoders[0].grid, encoders[0].num_tokens
        self.width: int = sum(encoder.width for encoder in encoders)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode images ``(P, 3, H, W)`` as tokens ``(P, N, W_1 + W_2 + ...)``."""
        return torch.cat([encoder(pixel_values) for encoder in self.encoders], dim=-1)


class TokenMerge(nn.Module):
    """Concatenation of tokens: ``(P, N_1, W_1)``, ... to ``(P, N_1 + N_2 + ..., W_1)``.

    The result is one row of tokens, so ``grid`` is (1, N).
    """

    def __init__(self, encoders: Sequence[Any]) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        self.image_size: int = encoders[0].image_size
        self.width: int = encoders[0].width
        self.project = projections(encoders, self.width)
        self.num_tokens: int = sum(encoder.num_tokens for encoder in encoders)
        self.grid = (1, self.num_tokens)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode images ``(P, 3, H, W)`` as tokens ``(P, N_1 + N_2 + ..., W_1)``."""
        return torch.cat(projected(self.encoders, self.project, pixel_values), dim=1)


class SumMerge(nn.Module):
    """Sum of tokens: ``(P, N, W_1)``, ``(P, N, W_2)``, ... to ``(P, N, W_1)``."""

    def __init__(self, encoders: Sequence[Any]) -> None:
        super().__init__()
        require_equal_grids(encoders, "sum")
        self.encoders = nn.ModuleList(encoders)
        self.image_size: int = encoders[0].image_size
        self.width: int = encoders[0].width
        self.project = projections(encoders, self.width)
        self.grid, self.num_tokens = encoders[0].grid, encoders[0].num_tokens

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode images ``(P, 3, H, W)`` as tokens ``(P, N, W_1)``."""
        return torch.stack(projected(self.encoders, self.project, pixel_values)).sum(0)


def projections(encoders: Sequence[Any], width: int) -> nn.ModuleList:
    """Return one linear layer per encoder to a common width; the first is the identity."""
    later = (nn.Linear(encoder.width, width) for encoder in encoders[1:])
    return nn.ModuleList([nn.Identity(), *later])


def projected(encoders: Any, project: Any, pixel_values: Tensor) -> list[Tensor]:
    """Return the tokens ``(P, N_i, W)`` of each encoder at the common width."""
    pairs = zip(encoders, project, strict=True)
    return [layer(encoder(pixel_values)) for encoder, layer in pairs]


MERGES = {"channels": ChannelMerge, "tokens": TokenMerge, "sum": SumMerge}
