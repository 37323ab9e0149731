"""The image upscaler: Real-ESRGAN's generator, a chain of dense residual blocks.

``images -> conv_first -> body -> conv_body -> (nearest x2, conv) ... -> conv_hr -> conv_last``

Module names are those of Real-ESRGAN, so its checkpoint keys load without renaming.

Source: Wang 2021 (arXiv:2107.10833); rudalle, ``realesrgan/rrdbnet_arch.py``.

Shapes: B batch, C channels, H and W pixels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rudolph.files.constraints import Count, check
from rudolph.models.cpu.tiled_conv import fast_memory_format, upsample_conv

UPSCALER_SCALES = (2, 4, 8)
NUM_DENSE = 5


@dataclass(frozen=True)
class UpscalerConfig:
    """The architecture of an upscaler.

    Attributes:
        scale: enlargement factor, one of ``UPSCALER_SCALES``.  With 2, the upscaler first
            folds 2 x 2 pixels into channels and then enlarges by 4.
        num_channels: width of the body.
        num_blocks: number of residual blocks.
        growth: channels that each dense convolution adds.
    """

    scale: int = 4
    num_channels: Count = 64
    num_blocks: Count = 23
    growth: Count = 32

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for a setting that is out of range."""
        if self.scale not in UPSCALER_SCALES:
            raise ValueError(f"scale must be one of 2, 4, 8, got {self.scale}")
        check(self)


def conv3x3(channels_in: int, channels_out: int) -> nn.Conv2d:
    """Return a 3x3 convolution that keeps the map's size."""
    return nn.Conv2d(channels_in, channels_out, 3, padding=1)


class DenseBlock(nn.Module):
    """Five convolutions, each of which reads the outputs of all previous ones."""

    def __init__(self, config: UpscalerConfig) -> None:
        super().__init__()
        size, growth = config.num_channels, config.growth
        for index in range(NUM_DENSE):
            is_last = index == NUM_DENSE - 1
            layer = conv3x3(size + index * growth, size if is_last else growth)
            self.add_module(f"conv{index + 1}", layer)

    def forward(self, x: Tensor) -> Tensor:
        """Return the input ``(B, C, H, W)`` plus 0.2 times the last convolution's output."""
        features = [x]
        for index in range(NUM_DENSE - 1):
            layer = self.get_submodule(f"conv{index + 1}")
            features.append(F.leaky_relu(layer(torch.cat(features, dim=1)), 0.2, inplace=True))
        last = self.get_submodule(f"conv{NUM_DENSE}")
        return torch.add(x, last(torch.cat(features, dim=1)), alpha=0.2)


class ResidualBlock(nn.Module):
    """Three dense blocks in a residual connection."""

    def __init__(self, config: UpscalerConfig) -> None:
        super().__init__()
        self.rdb1 = DenseBlock(config)
        self.rdb2 = DenseBlock(config)
        self.rdb3 = DenseBlock(config)

    def forward(self, x: Tensor) -> Tensor:
        """Return the input ``(B, C, H, W)`` plus 0.2 times the last dense block's output."""
        return torch.add(x, self.rdb3(self.rdb2(self.rdb1(x))), alpha=0.2)


class Upscaler(nn.Module):
    """Upscaler from ``(B, 3, H, W)`` in [0, 1] to ``(B, 3, H * scale, W * scale)``, unclamped."""

    def __init__(self, config: UpscalerConfig) -> None:
        super().__init__()
        self.config = config
        size = config.num_channels
        self.conv_first = conv3x3(12 if config.scale == 2 else 3, size)
        self.body = nn.Sequential(*(ResidualBlock(config) for _ in range(config.num_blocks)))
        self.conv_body = conv3x3(size, size)
        self.conv_up1 = conv3x3(size, size)
        self.conv_up2 = conv3x3(size, size)
        if config.scale == 8:
            self.conv_up3 = conv3x3(size, size)
        self.conv_hr = conv3x3(size, size)
        self.conv_last = conv3x3(size, 3)

    def forward(self, images: Tensor) -> Tensor:
        """Return the enlarged images."""
        if self.config.scale == 2:
            images = F.pixel_unshuffle(images, 2)
        x = self.conv_first(fast_memory_format(images))
        x = x + self.conv_body(self.body(x))
        for name in ("conv_up1", "conv_up2", "conv_up3"):
            if hasattr(self, name):
                upsampled = upsample_conv(x, getattr(self, name))
                x = F.leaky_relu(upsampled, 0.2, inplace=True)
        return self.conv_last(F.leaky_relu(self.conv_hr(x), 0.2, inplace=True))
