"""The KL autoencoder: VQ-GAN's encoder and decoder around a diagonal Gaussian.

``images -> encoder -> quant_conv -> (mean, logvar) -> z -> post_quant_conv -> decoder -> images``

Latents are continuous: no codebook, and ``z = mean + exp(logvar / 2) * noise``.  The encoder and
the decoder are those of ``model.py``, with attention only at the lowest resolution.

Source: latent-diffusion, ``ldm/models/autoencoder.py`` and ``modules/distributions``; Rombach 2022
(arXiv:2112.10752), appendix G; diffusers, ``AutoencoderKL``; Kingma 2014 (arXiv:1312.6114) for KL.

Shapes: B batch, H and W pixels, E latent channels; latents are H / factor by W / factor.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rudolph.models.vqgan.model import Decoder, Encoder, VQGANConfig

# Standard deviations lie between 3e-7 and 22,026, so neither exp nor its gradient overflows.
LOGVAR_BOUNDS = (-30.0, 20.0)


@dataclass(frozen=True)
class KLAutoencoderConfig:
    """Shape of a KL autoencoder; the defaults are Stable Diffusion's.

    Args:
        resolution: side of the training images in pixels; other sizes work too.
        channels: width of each level; every level except the last halves the image.
        kl_reduction: how ``forward`` reduces the KL term, a name in ``KL_REDUCTIONS``.
        scaling_factor: 1 / standard deviation of the latents; a model of latents reads
            ``scaling_factor * z``.
    """

    resolution: int = 256
    channels: tuple[int, ...] = (128, 256, 512, 512)
    num_res_blocks: int = 2
    latent_channels: int = 4
    norm_groups: int = 32
    dropout: float = 0.0
    kl_reduction: str = "sum"
    scaling_factor: float = 0.18215

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for a setting that is out of range."""
        if self.kl_reduction not in KL_REDUCTIONS:
            names = ", ".join(KL_REDUCTIONS)
            raise ValueError(f"kl_reduction: expected one of {names}, got {self.kl_reduction!r}")
        if self.latent_channels < 1:
            raise ValueError(f"latent_channels: expected at least 1, got {self.latent_channels}")
        if not self.scaling_factor > 0:
            raise ValueError(f"scaling_factor: expected above 0, got {self.scaling_factor}")
        # Building the backbone's config checks the other fields.
        _ = self.backbone

    @property
    def backbone(self) -> VQGANConfig:
        """The shape of the decoder; the encoder has twice its ``z_channels``."""
        return VQGANConfig(
            resolution=self.resolution,
            channels=self.channels,
            num_res_blocks=self.num_res_blocks,
            attention_resolutions=(),
            z_channels=self.latent_channels,
            dropout=self.dropout,
            norm_groups=self.norm_groups,
        )

    @property
    def factor(self) -> int:
        """Pixels per latent along a side."""
        return self.backbone.factor


class KLReconstruction(NamedTuple):
    """``images`` (B, 3, H, W) in [-1, 1], not clamped; ``mean`` and ``logvar``; ``kl`` scalar."""

    images: Tensor
    mean: Tensor
    logvar: Tensor
    kl: Tensor


class KLAutoencoder(nn.Module):
    """An autoencoder from images to Gaussian latents and back."""

    def __init__(self, config: KLAutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        size = config.latent_channels
        self.encoder = Encoder(replace(config.backbone, z_channels=2 * size))
        self.quant_conv = nn.Conv2d(2 * size, 2 * size, 1)
        self.post_quant_conv = nn.Conv2d(size, size, 1)
        self.decoder = Decoder(config.backbone)

    def forward(self, images: Tensor, generator: torch.Generator) -> KLReconstruction:
        """Reconstruct images ``(B, 3, H, W)`` in [-1, 1] from sampled latents."""
        mean, logvar = self.encode(images)
        z = self.sample(mean, logvar, generator)
        kl = KL_REDUCTIONS[self.config.kl_reduction](mean, logvar)
        return KLReconstruction(self.decode(z), mean, logvar, kl)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log variance, ``(B, E, h, w)`` each, of images in [-1, 1].

        Raises:
            ValueError: when a side of the images is no multiple of ``factor``.
        """
        height, width = images.shape[-2:]
        factor = self.config.factor
        if height % factor or width % factor:
            raise ValueError(
                f"images: expected height and width in multiples of {factor}, "
                f"got {height} x {width}"
            )
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, logvar.clamp(*LOGVAR_BOUNDS)

    def decode(self, z: Tensor) -> Tensor:
        """Return images ``(B, 3, H, W)`` in [-1, 1], not clamped, of latents ``(B, E, h, w)``."""
        return self.decoder(self.post_quant_conv(z))

    def sample(self, mean: Tensor, logvar: Tensor, generator: torch.Generator) -> Tensor:
        """Sample latents ``(B, E, h, w)`` from the Gaussian; the gradient reaches both inputs."""
        noise = torch.randn(
            mean.shape, generator=generator, device=generator.device, dtype=mean.dtype
        )
        return mean + (logvar / 2).exp() * noise.to(mean.device)


def gaussian_kl(mean: Tensor, logvar: Tensor) -> Tensor:
    """Return KL(N(mean, exp(logvar)) || N(0, 1)) of each latent in nats, in the inputs' shape.

    >>> float(gaussian_kl(torch.tensor(0.0), torch.tensor(0.0)))
    0.0
    """
    return (mean**2 + logvar.exp() - 1 - logvar) / 2


def kl_sum(mean: Tensor, logvar: Tensor) -> Tensor:
    """Return the KL in nats per image, summed over its latents and averaged over the batch.

    Source: latent-diffusion, whose KL weight of 1e-6 assumes this sum and a reconstruction loss
    summed over pixels.
    """
    return kl_per_image(mean, logvar).mean()


def kl_mean(mean: Tensor, logvar: Tensor) -> Tensor:
    """Return the KL in nats per latent, averaged over latents and batch, at any resolution."""
    return gaussian_kl(mean, logvar).mean()


def kl_per_image(mean: Tensor, logvar: Tensor) -> Tensor:
    """Return the KL ``(B,)`` in nats of each image, summed over channels, rows and columns."""
    return gaussian_kl(mean, logvar).flatten(1).sum(1)


KL_REDUCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": kl_sum,
    "mean": kl_mean,
}
