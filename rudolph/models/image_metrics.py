"""How near a reconstructed image is to the original.

Source: Wang 2004 (SSIM), as torchmetrics computes it.

Shapes: B batch, H and W pixels.
"""

import torch
from torch import Tensor


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of images ``(B, 3, H, W)`` in [0, 1], in dB, ``(B,)``."""
    mse = (images - truth).pow(2).mean((1, 2, 3))
    return -10 * mse.clamp(min=1e-10).log10()


def ssim(images: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity of images ``(B, 3, H, W)`` in [0, 1], at most 1, ``(B,)``."""
    # Its import takes five seconds, which whoever asks for no SSIM need not wait for.
    from torchmetrics.functional.image.ssim import structural_similarity_index_measure

    found = structural_similarity_index_measure(images, truth, data_range=1.0, reduction="none")
    assert isinstance(found, torch.Tensor)
    return found
