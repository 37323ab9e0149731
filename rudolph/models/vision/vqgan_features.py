"""A VQ-GAN as a vision encoder: its codes, or its latents before quantization.

RUDOLPH reads an image as VQ codes, each with an embedding of its own.  ``VQGANCodes`` with the
connector ``table`` gives any language model the same kind of input.  ``VQGANCodes`` and
``VQGANLatents`` have the interface of ``features.py``.

Source: Esser 2021 (arXiv:2012.09841), section 3; ru-dolph, ``rudolph/model/model.py``.

Shapes: P images, N tokens, K codes, Z latent channels.
"""

import torch
from torch import Tensor, nn

from rudolph.models.vision.clip import MEAN, STD
from rudolph.models.vqgan.model import VQGAN


class VQGANFeatures(nn.Module):
    """The image size and the input conversion that both encoders share."""

    def __init__(self, vqgan: VQGAN, width: int) -> None:
        super().__init__()
        self.vqgan, self.width = vqgan, width
        self.image_size = vqgan.config.resolution
        side = self.image_size // vqgan.config.factor
        self.grid, self.num_tokens = (side, side), side**2
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)

    mean: Tensor
    std: Tensor

    def unit_images(self, pixel_values: Tensor) -> Tensor:
        """Convert images ``(P, 3, H, W)`` from CLIP's normalisation back to [0, 1].

        Raises:
            ValueError: If the images have another size than the VQ-GAN was built for.
        """
        side = self.image_size
        if pixel_values.shape[1:] != (3, side, side):
            raise ValueError(
                f"pixel_values: expected (P, 3, {side}, {side}), got {tuple(pixel_values.shape)}"
            )
        return pixel_values * self.std + self.mean


class VQGANCodes(VQGANFeatures):
    """Codebook indices of images; ``width`` is the size of the codebook, K."""

    def __init__(self, vqgan: VQGAN) -> None:
        super().__init__(vqgan, vqgan.config.quantizer.num_codes)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return the codes ``(P, N)`` int64, in row-major order, of normalised images."""
        return self.vqgan.encode_indices(self.unit_images(pixel_values))


class VQGANLatents(VQGANFeatures):
    """Latents of the encoder, before they are projected for the quantizer."""

    def __init__(self, vqgan: VQGAN) -> None:
        super().__init__(vqgan, vqgan.config.z_channels)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return latents ``(P, N, Z)``, in row-major order, of normalised images."""
        latents: Tensor = self.vqgan.encoder(2 * self.unit_images(pixel_values) - 1)
        return latents.flatten(2).mT
