"""The VQ-GAN image tokenizer: encoder, quantizer and decoder.

``images -> encoder -> quant_conv -> quantizer -> post_quant_conv -> decoder -> images``

With ``wavelet`` the decoder outputs the four Haar bands of an image of twice the size.  Module
names are those of taming-transformers, so its checkpoint keys load without renaming.

The model computes in the dtype of its weights; bfloat16 is more than twice as fast as float32
on machines with native bfloat16 products.  Images larger than about 256 pixels are computed in
strips; see ``rudolph.models.cpu.tiled_conv``.

Source: taming-transformers, ``modules/diffusionmodules/model.py``; rudalle, ``vae/model.py`` and
``vae/decoder_dwt.py``.

Shapes: B batch, C channels, H and W pixels, h = H / factor and w = W / factor the grid of latents,
I = h * w indices.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rudolph.files.constraints import Count, check
from rudolph.models.cpu.group_norm import group_norm, statistics_dtype
from rudolph.models.cpu.tiled_conv import (
    MAX_STRIP_VALUES,
    fast_memory_format,
    is_tiled,
    norm_conv,
    norm_silu,
    tiled_norm_conv,
    upsample_conv,
)
from rudolph.models.layers.attention import KeyValue, attention
from rudolph.models.vqgan.quantizers import QUANTIZERS, QuantizerConfig


@dataclass(frozen=True)
class VQGANConfig:
    """The architecture of a VQ-GAN; the defaults are those of Sber's checkpoint.

    Attributes:
        resolution: side of the training images in pixels, a multiple of ``factor``.
        channels: width of each level; every level except the last halves the image.
        num_res_blocks: residual blocks per encoder level; decoder levels have one more.
        attention_resolutions: sides of the feature maps at which attention follows every residual
            block, for images of side ``resolution``.
        z_channels: channels of the latents.
        dropout: dropout probability in residual blocks.
        norm_groups: groups of each group norm, reduced to the largest number that divides the
            channels.  Narrow networks need few groups, because a group of one channel loses that
            channel's magnitude.
        wavelet: whether the decoder outputs Haar bands.
        init: name of pretrained weights to use without training, or None.
        quantizer: codebook settings.
    """

    resolution: int = 256
    channels: tuple[int, ...] = (128, 128, 256, 512)
    num_res_blocks: Count = 2
    attention_resolutions: tuple[int, ...] = (32,)
    z_channels: Count = 256
    dropout: float = 0.0
    norm_groups: Count = 32
    wavelet: bool = False
    init: str | None = None
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for a setting that is out of range."""
        if not self.channels or min(self.channels) < 1:
            raise ValueError(f"channels must be positive, got {list(self.channels)}")
        check(self)
        if self.resolution < self.factor or self.resolution % self.factor:
            raise ValueError(
                f"resolution must be a multiple of the factor {self.factor} that "
                f"{len(self.channels)} channels give, got {self.resolution}"
            )

    @property
    def factor(self) -> int:
        """Return the number of pixels per side of a token."""
        return 2 ** (len(self.channels) - 1)

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Return the side of the feature map at each level, in encoder order."""
        return tuple(self.resolution // 2**level for level in range(len(self.channels)))


def make_norm(channels: int, config: VQGANConfig) -> nn.GroupNorm:
    """Return a group norm over ``channels`` channels.

    Its number of groups is the largest divisor of ``channels`` that is at most ``norm_groups``.
    """
    most = min(config.norm_groups, channels)
    groups = next(groups for groups in range(most, 0, -1) if channels % groups == 0)
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """A residual block with two 3x3 convolutions, ``(B, C_in, H, W)`` to ``(B, C_out, H, W)``."""

    def __init__(self, channels_in: int, channels_out: int, config: VQGANConfig) -> None:
        super().__init__()
        self.norm1 = make_norm(channels_in, config)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = make_norm(channels_out, config)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        if channels_in != channels_out:
            self.nin_shortcut = nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output; large maps are computed in strips outside training."""
        hidden = norm_conv(x, self.norm1, self.conv1)
        if is_tiled(hidden) and not self.training:
            for index, rows in tiled_norm_conv(hidden, self.norm2, self.conv2):
                hidden[index] = rows.add_(self.shortcut(x[index]))
            return hidden
        return self.conv2(self.dropout(norm_silu(hidden, self.norm2))).add_(self.shortcut(x))

    def shortcut(self, x: Tensor) -> Tensor:
        """Return the input with ``C_out`` channels for the residual addition."""
        return self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x


class AttentionBlock(nn.Module):
    """Single-head self-attention over all cells of a feature map."""

    def __init__(self, channels: int, config: VQGANConfig) -> None:
        super().__init__()
        self.norm = make_norm(channels, config)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(B, C, H, W)`` with the attention output added."""
        hidden = group_norm(x, self.norm)
        query, key, value = (
            layer(hidden).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )  # each (B, H * W, C)
        key_values = [KeyValue(key, value)]
        # Split the queries of a large map, or the scores would need more memory than the map.
        parts = [
            attention(part, key_values, pb_relax=None, dropout=0.0)
            for part in query.split(max(MAX_STRIP_VALUES // query.shape[1], 1), dim=1)
        ]
        out = torch.cat(parts, dim=1).transpose(1, 2).view(x.shape)
        return self.proj_out(out).add_(x)


class Downsample(nn.Module):
    """A strided 3x3 convolution that halves the map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(B, C, H / 2, W / 2)``."""
        # The reference pads only on the right and at the bottom.
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbour enlargement by 2, followed by a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(B, C, 2H, 2W)``."""
        return upsample_conv(x, self.conv)


class MiddleBlocks(nn.Module):
    """Residual block, attention and residual block at the lowest resolution."""

    def __init__(self, channels: int, config: VQGANConfig) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, config)
        self.attn_1 = AttentionBlock(channels, config)
        self.block_2 = ResnetBlock(channels, channels, config)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the same shape."""
        return self.block_2(self.attn_1(self.block_1(x)))


class ResolutionLevel(nn.Module):
    """The residual and attention blocks of one resolution, then the change of resolution if any.

    Args:
        channels: widths before the first and after each residual block.
        config: architecture.
        resolution: side of the feature map; it decides whether attention blocks exist.
    """

    downsample: Downsample
    upsample: Upsample

    def __init__(self, channels: list[int], config: VQGANConfig, *, resolution: int) -> None:
        super().__init__()
        pairs = itertools.pairwise(channels)
        self.block = nn.ModuleList(ResnetBlock(first, then, config) for first, then in pairs)
        attention = (AttentionBlock(size, config) for size in channels[1:])
        has_attention = resolution in config.attention_resolutions
        self.attn = nn.ModuleList(attention if has_attention else ())

    def layers(self) -> Iterator[nn.Module]:
        """Yield the layers in the order of the forward pass."""
        for index, block in enumerate(self.block):
            yield block
            if len(self.attn):
                yield self.attn[index]
        for name in ("downsample", "upsample"):
            if hasattr(self, name):
                yield getattr(self, name)


class Encoder(nn.Module):
    """The encoder, from images ``(B, 3, H, W)`` in [-1, 1] to ``(B, z_channels, h, w)``."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        first, last = config.channels[0], config.channels[-1]
        self.conv_in = nn.Conv2d(3, first, 3, padding=1)
        self.down: Any = nn.ModuleList()
        for index, channels in enumerate(config.channels):
            before = config.channels[max(index - 1, 0)]
            level = ResolutionLevel(
                [before] + [channels] * config.num_res_blocks,
                config,
                resolution=config.resolutions[index],
            )
            if index < len(config.channels) - 1:
                level.downsample = Downsample(channels)
            self.down.append(level)
        self.mid = MiddleBlocks(last, config)
        self.norm_out = make_norm(last, config)
        self.conv_out = nn.Conv2d(last, config.z_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """Return the latents of images."""
        x = self.conv_in(fast_memory_format(images))
        for level in self.down:
            # Loop here, not in a level's forward, so that each previous map is freed at once.
            for layer in level.layers():
                x = layer(x)
        return norm_conv(self.mid(x), self.norm_out, self.conv_out)


class Decoder(nn.Module):
    """The decoder, from latents ``(B, z_channels, h, w)`` to images ``(B, 3, H, W)``."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        first, last = config.channels[0], config.channels[-1]
        self.conv_in = nn.Conv2d(config.z_channels, last, 3, padding=1)
        self.mid = MiddleBlocks(last, config)
        self.up: Any = nn.ModuleList()
        for index, channels in enumerate(config.channels):
            before = config.channels[min(index + 1, len(config.channels) - 1)]
            level = ResolutionLevel(
                [before] + [channels] * (config.num_res_blocks + 1),
                config,
                resolution=config.resolutions[index],
            )
            if index > 0:
                level.upsample = Upsample(channels)
            self.up.append(level)
        self.norm_out = make_norm(first, config)
        self.has_wavelet = config.wavelet
        self.conv_out = nn.Conv2d(first, 12 if config.wavelet else 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """Return images, not clamped; with ``wavelet`` their sides are doubled."""
        x = self.mid(self.conv_in(fast_memory_format(z)))
        for level in reversed(self.up):
            for layer in level.layers():
                x = layer(x)
        x = norm_conv(x, self.norm_out, self.conv_out)
        return inverse_haar(x) if self.has_wavelet else x


def haar_filters() -> tuple[Tensor, Tensor]:
    """Return the low-pass and high-pass filters of the Haar wavelet, ``(2,)`` each."""
    half = 0.5**0.5
    return torch.tensor([half, half]), torch.tensor([half, -half])


def inverse_haar(bands: Tensor) -> Tensor:
    """Return images ``(B, 3, 2H, 2W)`` from Haar coefficients ``(B, 12, H, W)``.

    The first three channels are the low-pass bands of the colours.  Then follow the vertical,
    horizontal and diagonal differences of each colour in turn.
    """
    low, details = bands[:, :3, None], bands[:, 3:].reshape(len(bands), 3, 3, *bands.shape[2:])
    # Rows are bands; columns are the four pixels of a coefficient in row-major order.
    signs = [[1, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]]
    spread = torch.tensor(signs, device=bands.device, dtype=bands.dtype) / 2
    pixels = torch.einsum("bcnhw,np->bcphw", torch.cat([low, details], dim=2), spread)
    return F.pixel_shuffle(pixels.flatten(1, 2), 2)


class Reconstruction(NamedTuple):
    """The output of a VQ-GAN's forward pass.

    Attributes:
        images: ``(B, 3, H, W)``, nominally in [-1, 1], not clamped.
        indices: ``(B, h, w)`` int64.
        loss: scalar loss of the quantizer.
    """

    images: Tensor
    indices: Tensor
    loss: Tensor


class VQGAN(nn.Module):
    """A VQ-GAN, which maps images to codebook indices and back."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.config = config
        size = config.quantizer.embedding_dim
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(config.z_channels, size, 1)
        self.quantize: Any = QUANTIZERS[config.quantizer.kind](config.quantizer)
        self.post_quant_conv = nn.Conv2d(size, config.z_channels, 1)
        if config.wavelet:
            # The released file has a second, unused layer, kept so that exports are complete.
            self.unused_post_quant_conv = nn.Conv2d(size, config.z_channels, 1)
        self.decoder = Decoder(config)

    def forward(self, images: Tensor) -> Reconstruction:
        """Reconstruct images ``(B, 3, H, W)`` in [-1, 1]."""
        return self.reconstruct(self.latents(images))

    def latents(self, images: Tensor) -> Tensor:
        """Return latents ``(B, embedding_dim, h, w)`` of images ``(B, 3, H, W)`` in [-1, 1]."""
        return self.quant_conv(self.encoder(images))

    def reconstruct(self, latents: Tensor) -> Reconstruction:
        """Quantize latents and decode them."""
        quantized = self.quantize(latents)
        decoded = self.decoder(self.post_quant_conv(quantized.z_q))
        return Reconstruction(decoded, quantized.indices, quantized.loss)

    def encode(self, images: Tensor) -> Tensor:
        """Return latents ``(B, embedding_dim, h, w)`` of images ``(B, 3, H, W)`` in [0, 1]."""
        # Cast after the scaling, so that 8-bit pixel values are not rounded before it.
        return self.latents((2 * images - 1).to(self.quant_conv.weight.dtype))

    @torch.no_grad()
    def encode_indices(
        self, images: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return row-major codebook indices ``(B, I)`` of images ``(B, 3, H, W)`` in [0, 1].

        Args:
            images: images whose sides are multiples of the factor.
            generator: None selects the best code of each cell.  With a generator, a Gumbel
                quantizer samples each code from its softmax, which is the reference's default.

        Raises:
            ValueError: if a side is not a multiple of the factor, or a generator is given with
                another quantizer.
        """
        height, width = images.shape[-2:]
        if height % self.config.factor or width % self.config.factor:
            raise ValueError(
                f"height and width must be multiples of {self.config.factor}, "
                f"got {height} x {width}"
            )
        z = self.encode(images)
        if generator is None:
            return self.quantize.indices(z).flatten(1)
        if self.config.quantizer.kind != "gumbel":
            raise ValueError(f"a {self.config.quantizer.kind} quantizer cannot sample codes")
        return self.quantize.sample(z, generator).flatten(1)

    @torch.no_grad()
    def decode_indices(self, indices: Tensor, *, height: int | None = None) -> Tensor:
        """Return images ``(B, 3, H, W)`` in [0, 1] from indices ``(B, I)``.

        The images are at least float32, even if the weights have half precision.

        Args:
            indices: row-major codebook indices.
            height: rows of the token grid; None expects a square.

        Raises:
            ValueError: if the indices do not fill a rectangle of that height.
        """
        rows = height or round(indices.shape[1] ** 0.5)
        if indices.shape[1] % rows or (height is None and rows * rows != indices.shape[1]):
            raise ValueError(f"{indices.shape[1]} indices do not fill {rows} rows")
        codes = self.quantize.codes(indices.view(indices.shape[0], rows, -1))
        decoded = self.decoder(self.post_quant_conv(codes.to(self.post_quant_conv.weight.dtype)))
        return ((decoded.to(statistics_dtype(decoded.dtype)) + 1) / 2).clamp(0, 1)
