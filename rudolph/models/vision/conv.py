"""A small convolutional image encoder: ConvNeXt with an output norm.

``images -> stem -> [blocks, downsample] per level -> norm -> tokens``

A convolution needs less data than a transformer to learn locality.  It has no learnt positions;
zero padding distinguishes the border from the centre.

Source: Liu 2022 (arXiv:2201.03545), section 2; LayerScale: Touvron 2021 (arXiv:2103.17239).

Shapes: P images, C channels, H and W pixels; a token spans ``stem_size * 2**(levels - 1)`` pixels.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

LAYER_SCALE = 1e-6


@dataclass(frozen=True)
class ConvEncoderConfig:
    """Shape of the encoder; ``widths`` and ``depths`` have one entry per level.

    ConvNeXt-T has widths 96, 192, 384, 768, depths 3, 3, 9, 3 and a stem of 4 pixels.

    Attributes:
        image_size: Side of the input images in pixels.
        widths: Channels of each level; each level but the last halves the sides of the map.
        depths: Blocks of each level.
        stem_size: Side in pixels of the patches that the first convolution joins.
        kernel_size: Side of the depthwise kernels, odd.
    """

    image_size: int = 64
    widths: tuple[int, ...] = (64, 128, 256)
    depths: tuple[int, ...] = (2, 2, 4)
    stem_size: int = 2
    kernel_size: int = 7

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for a setting that is out of range."""
        if len(self.widths) != len(self.depths):
            raise ValueError(
                f"depths: expected one entry for each of {len(self.widths)} widths, "
                f"got {len(self.depths)}"
            )
        if not self.widths or min(*self.widths, *self.depths, self.stem_size) < 1:
            raise ValueError(
                f"widths, depths and stem_size: expected at least 1, got {list(self.widths)}, "
                f"{list(self.depths)} and {self.stem_size}"
            )
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: expected an odd number, got {self.kernel_size}")
        if self.image_size % self.factor:
            raise ValueError(
                f"image_size: expected a multiple of {self.factor}, the pixels per token, "
                f"got {self.image_size}"
            )

    @property
    def factor(self) -> int:
        """Return the pixels per token along a side."""
        return self.stem_size * 2 ** (len(self.widths) - 1)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of maps ``(P, C, H, W)``."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``(P, C, H, W)`` over the channels."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class ConvBlock(nn.Module):
    """``x + scale * MLP(norm(depthwise(x)))`` of maps ``(P, C, H, W)``."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(
            channels, channels, kernel_size, padding=kernel_size // 2, groups=channels
        )
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels)
        )
        self.scale = nn.Parameter(torch.full((channels,), LAYER_SCALE))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(P, C, H, W)`` to ``(P, C, H, W)``."""
        hidden = self.norm(self.depthwise(x).movedim(1, -1))  # (P, H, W, C)
        return x + (self.scale * self.mlp(hidden)).movedim(-1, 1)


class ConvEncoder(nn.Module):
    """ConvNeXt encoder from images ``(P, 3, H, W)`` to tokens ``(P, N, widths[-1])``."""

    def __init__(self, config: ConvEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.image_size = config.image_size
        side = config.image_size // config.factor
        self.width, self.grid, self.num_tokens = config.widths[-1], (side, side), side**2
        first = config.widths[0]
        stem = nn.Conv2d(3, first, config.stem_size, stride=config.stem_size)
        self.stem = nn.Sequential(stem, ChannelNorm(first, eps=1e-6))
        self.levels = nn.ModuleList(
            nn.Sequential(*(ConvBlock(width, config.kernel_size) for _ in range(depth)))
            for width, depth in zip(config.widths, config.depths, strict=True)
        )
        self.downsamples = nn.ModuleList(
            nn.Sequential(ChannelNorm(before, eps=1e-6), nn.Conv2d(before, after, 2, stride=2))
            for before, after in itertools.pairwise(config.widths)
        )
        self.norm_out = nn.LayerNorm(self.width, eps=1e-6)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return tokens ``(P, N, widths[-1])``, in row-major order, of normalised images.

        Raises:
            ValueError: If the images have another shape than ``(P, 3, image_size, image_size)``.
        """
        side = self.image_size
        if pixel_values.shape[1:] != (3, side, side):
            raise ValueError(
                f"pixel_values: expected (P, 3, {side}, {side}), got {tuple(pixel_values.shape)}"
            )
        x = self.levels[0](self.stem(pixel_values))
        for downsample, level in zip(self.downsamples, self.levels[1:], strict=True):
            x = level(downsample(x))
        return self.norm_out(x.flatten(2).transpose(1, 2))
