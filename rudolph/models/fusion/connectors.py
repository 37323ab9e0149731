"""Connectors: from the tokens of a vision encoder to vectors that a language model reads.

``connector(features, mask) -> Tokens(values, mask)``.  ``connector.num_tokens`` is the number of
output tokens.  ``connector.grid_out`` holds their rows and columns, or None if they form no grid.

==============  ===============================================  =================
``linear``      one linear layer (LLaVA)                         M = N
``mlp``         two linear layers with GELU (LLaVA-1.5)          M = N
``pool``        mean of ``factor x factor`` cells, then an MLP   M = N / factor^2
``shuffle``     pixel shuffle: cells of ``factor x factor``      M = N / factor^2
                tokens side by side as channels, then an MLP
``abstractor``  convolutions, adaptive pooling, convolutions     M = ``num_out``
``tome``        the most similar tokens merged, then an MLP      M = ``num_out``
``resampler``   latents that attend to the tokens (Flamingo),    M = ``num_out``
                then one linear layer
``table``       an embedding per VQ code (RUDOLPH); the tokens   M = N
                are codes ``(B, N)``
``blank``       learnt vectors that ignore the image: a blind    M = ``num_out``
                control
==============  ===============================================  =================

A mask ``(B, N)`` is true for real tokens.  Padded tokens never change an output, whatever their
values.  An output token is real if at least one of its input tokens is.

To add a connector, write a class ``(ConnectorConfig, ConnectorShape)`` and name it in
``CONNECTORS``.

Source: Liu 2023 (arXiv:2310.03744) for ``mlp``; nanoVLM, ``models/modality_projector.py``, for
``shuffle``; Cha 2024 (arXiv:2312.06742) for ``abstractor``; Bolya 2023 (arXiv:2210.09461) for
``tome``.

Shapes: B images, N tokens in, M tokens out, Dv and D channels in and out, h and w the grid.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rudolph.models.fusion.resampler import PerceiverResampler, ResamplerConfig
from rudolph.models.vision.conv import ConvBlock

RESAMPLER_HEAD_SIZE = 64


class Tokens(NamedTuple):
    """``values`` (B, M, D); ``mask`` (B, M) bool is true for real tokens, None if all are real."""

    values: Tensor
    mask: Tensor | None


class ConnectorShape(NamedTuple):
    """Input and output sizes of a connector.

    Attributes:
        width_in: Channels of the vision encoder, Dv.
        width_out: Channels of the language model, D.
        grid: Rows and columns of the encoder's tokens, (1, N) if they form a row.
    """

    width_in: int
    width_out: int
    grid: tuple[int, int]

    @property
    def num_tokens(self) -> int:
        """Return the number of input tokens, N."""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class ConnectorConfig:
    """A connector and its settings.

    Args:
        kind: A name in ``CONNECTORS``.
        factor: Side of a cell of ``pool`` and ``shuffle``, in tokens.
        num_out: Output tokens of ``abstractor`` (a square number), ``tome``, ``resampler`` and
            ``blank``.
        width: Channels inside ``abstractor``.
        depth: Convolutional blocks before and after the pooling of ``abstractor``, or layers of
            ``resampler``.
    """

    kind: str = "mlp"
    factor: int = 2
    num_out: int = 64
    width: int = 1024
    depth: int = 3

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for a setting that is out of range."""
        if self.kind not in CONNECTORS:
            names = ", ".join(CONNECTORS)
            raise ValueError(f"kind: expected one of {names}, got {self.kind!r}")
        for name in ("factor", "num_out", "width", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.kind == "abstractor" and math.isqrt(self.num_out) ** 2 != self.num_out:
            raise ValueError(f"num_out: expected a square for abstractor, got {self.num_out}")


def build_connector(config: ConnectorConfig, shape: ConnectorShape) -> nn.Module:
    """Return the connector that a config names.

    Raises:
        ValueError: If the grid does not fit the config.
    """
    return CONNECTORS[config.kind](config, shape)


def coarse_grid(config: ConnectorConfig, shape: ConnectorShape) -> tuple[int, int]:
    """Return how many rows and columns of ``factor x factor`` cells the grid has.

    Raises:
        ValueError: If the factor does not divide the grid.
    """
    rows, columns = shape.grid
    if rows % config.factor or columns % config.factor:
        raise ValueError(
            f"factor: expected a divisor of the grid {rows}x{columns}, got {config.factor}"
        )
    return rows // config.factor, columns // config.factor


def mlp(width_in: int, width_out: int) -> nn.Sequential:
    """Return LLaVA-1.5's ``mlp2x_gelu``: two linear layers with GELU between them."""
    return nn.Sequential(
        nn.Linear(width_in, width_out), nn.GELU(), nn.Linear(width_out, width_out)
    )


def zero_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """Set padded tokens of ``(B, N, C)`` to 0, even where they are NaN."""
    return x if mask is None else x.masked_fill(~mask[..., None], 0)


class LinearConnector(nn.Module):
    """Linear connector ``(B, N, Dv) -> (B, N, D)``."""

    def __init__(self, config: ConnectorConfig, shape: ConnectorShape) -> None:
        super().__init__()
        self.num_tokens, self.grid_out = shape.num_tokens, shape.grid
        self.project: nn.Module = nn.Linear(shape.width_in, shape.width_out)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tokens:
        """Map tokens ``(B, N, Dv)`` to ``(B, N, D)``; the mask ``(B, N)`` is unchanged."""
        require_tokens(features, self.num_tokens)
        return Tokens(self.project(features), mask)


class MLPConnector(LinearConnector):
    """MLP connector ``(B, N, Dv) -> (B, N, D)`` with one hidden layer of D channels."""

    def __init__(self, config: ConnectorConfig, shape: ConnectorShape) -> None:
        super().__init__(config, shape)
        self.project = mlp(shape.width_in, shape.width_out)


class AveragePool(nn.Module):
    """Pooling connector ``(B, h * w, Dv) -> (B, h * w / factor^2, D)``.

    A cell becomes the mean of its real tokens.
    """

    def __init__(self, config: ConnectorConfig, shape: ConnectorShape) -> None:
        super().__init__()
        self.grid, self.factor = shape.grid, config.factor
        self.grid_out = coarse_grid(config, shape)
        self.num_tokens = math.prod(self.grid_out)
        self.project = mlp(shape.width_in, shape.width_out)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tokens:
        """Map tokens ``(B, N, Dv)`` to the means ``(B, M, D)`` of their cells."""
        cells = to_cells(features, self.grid, self.factor)  # (B, M, factor^2, Dv)
        if mask is None:
            return Tokens(self.project(cells.mean(2)), None)
        is_real = to_cells(mask[..., None], self.grid, self.factor)
        mean = cells.masked_fill(~is_real, 0).sum(2) / is_real.sum(2).clamp(min=1)
        return Tokens(self.project(mean), is_real.any(2).squeeze(-1))


class PixelShuffle(nn.Module):
    """Pixel-shuffle connector ``(B, h * w, Dv) -> (B, h * w / factor^2, D)``.

    Padded tokens of a cell count as zeros.
    """

    def __init__(self, config: ConnectorConfig, shape: ConnectorShape) -> None:
        super().__init__()
        self.grid, self.factor = shape.grid, config.factor
        self.grid_out = coarse_grid(config, shape)
        self.num_tokens = math.prod(self.grid_out)
        self.project = mlp(config.factor**2 * shape.width_in, shape.width_out)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tokens:
        """Map tokens ``(B, N, Dv)`` to ``(B, M, D)``; a cell's tokens become channels."""
        cells = to_cells(zero_padding(features, mask), self.grid, self.factor)
        if mask is not None:
            mask = to_cells(mask[..., None], self.grid, self.factor).any(2).squeeze(-1)
        return Tokens(self.project(cells.flatten(2)), mask)


def to_cells(x: Tensor, grid: tuple[int, int], factor: int) -> Tensor:
    """Group tokens ``(B, h * w, C)`` into cells ``(B, h * w / factor^2, factor^2, C)``.

    The cells, and the tokens of a cell, are in row-major order.

    >>> to_cells(torch.arange(8)[None, :, None], (2, 4), 2).flatten(1).tolist()
    [[0, 1, 4, 5, 2, 3, 6, 7]]

    Raises:
        ValueError: If the tokens do not fill the grid.
    """
    rows, columns = grid
    require_tokens(x, rows * columns)
    x = x.view(len(x), rows // factor, factor, columns // factor, factor, -1)
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def require_tokens(x: Tensor, number: int) -> None:
    """Raise ``ValueError`` unless ``x`` ``(B, N, C)`` has N = ``number`` tokens."""
    if x.shape[1] != number:
        raise ValueError(f"connector: expected {number} tokens per image, got {x.shape[1]}")


class Abstractor(nn.Module):
    """Convolutions around an adaptive pooling: ``(B, h * w, Dv) -> (B, num_out, D)``.

    Unlike a resampler, it keeps the spatial layout.  A learnt position is added to each token.
    Honeybee's C-Abstractor has RegNet blocks; this one has the ConvNeXt blocks of
    ``vision/conv.py``.
    """

    def __init__(self, config: ConnectorConfig, shape: ConnectorShape) -> None:
        super().__init__()
        self.grid, self.num_tokens = shape.grid, config.num_out
        self.side = math.isqrt(config.num_out)
        self.grid_out = (self.side, self.side)
        width = config.width
        self.positions = nn.Parameter(torch.randn(shape.num_tokens, shape.width_in).mul_(0.02))
        self.project_in = nn.Linear(shape.width_in, width)
        self.before = nn.ModuleList(ConvBlock(width, 3) for _ in range(config.depth))
        self.after = nn.Sequential(*(ConvBlock(width, 3) for _ in range(config.depth)))
        self.project_out = nn.Sequential(
            nn.Linear(width, shape.width_out),
            nn.SiLU(),
            nn.Linear(shape.width_out, shape.width_out),
        )

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tokens:
        """Map tokens ``(B, N, Dv)`` to ``(B, num_out, D)``."""
        require_tokens(features, len(self.positions))
        x = self.project_in(zero_padding(features + self.positions, mask))
        rows, columns = self.grid
        x = x.mT.reshape(len(x), -1, rows, columns)
        real = None if mask is None else mask.view(-1, 1, rows, columns).to(x.dtype)
        for block in self.before:
            x = block(x if real is None else x * real)
        pooled = F.adaptive_avg_pool2d(x if real is None else x * real, self.side)
        if real is not None:
            # Average over real tokens only; cells without any stay 0.
            share = F.adaptive_avg_pool2d(real, self.side)
            pooled = pooled / share.where(share > 0, 1)
            mask = (share > 0).flatten(1)
        values = self.project_out(self.after(pooled).flatten(2).mT)
        return Tokens(values, mask)


class TokenMerging(nn.Module):
    """ToMe connector: merge similar tokens until ``num_out`` are left, then project them.

    Tokens keep the order of the image.  ToMe compares attention keys inside an encoder's layers;
    this connector compares the features.
    """

    def __init__(self, config: ConnectorConfig, shape: ConnectorShape) -> None:
        super().__init__()
        if config.num_out > shape.num_tokens:
            raise ValueError(
                f"num_out: expected at most the {shape.num_tokens} tokens that tome reads, "
                f"got {config.num_out}"
            )
        self.num_tokens, self.grid_out = config.num_out, None
        self.project = mlp(shape.width_in, shape.width_out)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tokens:
        """Map tokens ``(B, N, Dv)`` to ``(B, num_out, D)``."""
        merged = merge_tokens(features, self.num_tokens, mask)
        return Tokens(self.project(merged.values), None if mask is None else merged.sizes > 0)


class Merged(NamedTuple):
    """Groups of merged tokens.

    Attributes:
        values: Mean of each group.
        sizes: Number of real tokens in each group.
        groups: Group of each input token.
    """

    values: Tensor  # (B, M, C)
    sizes: Tensor  # (B, M)
    groups: Tensor  # (B, N)


def merge_tokens(x: Tensor, num_out: int, mask: Tensor | None = None) -> Merged:
    """Merge tokens ``(B, N, C)`` into ``num_out`` means of similar tokens.

    Each round of bipartite matching merges at most every second token.

    Raises:
        ValueError: If there are fewer than ``num_out`` tokens.
    """
    batch, length = x.shape[:2]
    if length < num_out:
        raise ValueError(f"tome: expected at least {num_out} tokens per image, got {length}")
    x = zero_padding(x, mask)
    sizes = torch.ones_like(x[..., 0]) if mask is None else mask.to(x.dtype)
    groups = torch.arange(length, device=x.device).expand(batch, -1)
    while x.shape[1] > num_out:
        target = match_tokens(x, sizes, min(x.shape[1] // 2, x.shape[1] - num_out))
        totals = x.new_zeros(batch, int(target.max()) + 1)
        totals = totals.scatter_add(1, target, sizes)
        sums = x.new_zeros(*totals.shape, x.shape[2])
        sums = sums.scatter_add(1, target[..., None].expand_as(x), x * sizes[..., None])
        x, sizes = sums / totals.clamp(min=1)[..., None], totals
        groups = target.gather(1, groups)
    return Merged(x, sizes, groups)


def match_tokens(x: Tensor, sizes: Tensor, num_merged: int) -> Tensor:
    """Return the target index ``(B, N)`` of each token after merging ``num_merged`` pairs.

    Each token at an even position is paired with the most similar token at an odd position.  The
    most similar pairs are merged.

    Source: ToMe, ``tome/merge.py``, ``bipartite_soft_matching``.
    """
    unit = F.normalize(x.detach(), dim=-1)
    similarity = unit[:, ::2] @ unit[:, 1::2].mT  # (B, N / 2, N / 2)
    # Padding has size 0.  It is merged first, and tokens merge into padding only if they must.
    is_empty = sizes == 0
    similarity = similarity.masked_fill(is_empty[:, None, 1::2], -2)
    similarity = similarity.masked_fill(is_empty[:, ::2, None], 2)
    best, partner = similarity.max(-1)  # (B, N / 2)
    order = best.argsort(dim=-1, descending=True, stable=True)[:, :num_merged]
    is_merged = torch.zeros_like(sizes, dtype=torch.bool)
    is_merged[:, ::2] = torch.zeros_like(best, dtype=torch.bool).scatter(1, order, True)
    place = (~is_merged).cumsum(1) - 1  # (B, N), index among the remaining tokens
    destination = torch.zeros_like(place)
    destination[:, ::2] = place[:, 1::2].gather(1, partner)
    return torch.where(is_merged, destination, place)


class ResamplerConnector(nn.Module):
    """Perceiver resampler and a linear layer: ``(B, N, Dv) -> (B, num_out, D)``."""

    def __init__(self, config: ConnectorConfig, shape: ConnectorShape) -> None:
        super().__init__()
        self.num_in, self.num_tokens, self.grid_out = shape.num_tokens, config.num_out, None
        num_heads = max(shape.width_in // RESAMPLER_HEAD_SIZE, 1)
        self.resampler = PerceiverResampler(
            ResamplerConfig(
                width=shape.width_in,
                num_layers=config.depth,
                num_latents=config.num_out,
                num_heads=num_heads,
                head_size=shape.width_in // num_heads,
            )
        )
        self.project = nn.Linear(shape.width_in, shape.width_out)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tokens:
        """Map tokens ``(B, N, Dv)`` to ``(B, num_out, D)``."""
        require_tokens(features, self.num_in)
        features = zero_padding(features, mask)
        latents = self.resampler(features[:, None], None if mask is None else mask[:, None])
        is_real = None if mask is None else mask.any(1, keepdim=True).expand(-1, self.num_tokens)
        return Tokens(self.project(latents[:, 0]), is_real)


class CodeTable(nn.Module):
    """An embedding of each VQ code: ``(B, N)`` int64 to ``(B, N, D)``."""

    def __init__(self, config: ConnectorConfig, shape: ConnectorShape) -> None:
        super().__init__()
        self.num_tokens, self.grid_out = shape.num_tokens, shape.grid
        self.embedding = nn.Embedding(shape.width_in, shape.width_out)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tokens:
        """Embed codes ``(B, N)`` as ``(B, N, D)``; the mask ``(B, N)`` is unchanged."""
        require_tokens(features, self.num_tokens)
        return Tokens(self.embedding(features), mask)


class Blank(nn.Module):
    """Learnt vectors ``(num_out, D)`` for every image, whatever it shows.

    This connector accepts features without tokens, so a model need not encode the images.
    """

    reads_features = False
    undecayed = ("vectors",)

    def __init__(self, config: ConnectorConfig, shape: ConnectorShape) -> None:
        super().__init__()
        self.num_tokens, self.grid_out = config.num_out, None
        self.vectors = nn.Parameter(torch.randn(config.num_out, shape.width_out))

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tokens:
        """Return the learnt vectors ``(B, num_out, D)``, all real."""
        return Tokens(self.vectors.expand(len(features), -1, -1), None)


# Connector classes, keyed by name and built from a config and a shape by ``build_connector``.
CONNECTORS: dict[str, Any] = {
    "linear": LinearConnector,
    "mlp": MLPConnector,
    "pool": AveragePool,
    "shuffle": PixelShuffle,
    "abstractor": Abstractor,
    "tome": TokenMerging,
    "resampler": ResamplerConnector,
    "table": CodeTable,
    "blank": Blank,
}
