"""Image quality metrics between a reconstruction and its original: PSNR and SSIM.

Source: Wang 2004 (SSIM), as implemented by torchmetrics.

Shapes: B batch, H and W pixels.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

COMPARED_SIZE = (32, 32)


def psnr(images: Tensor, target: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio ``(B,)`` in dB, at most 100.

    Args:
        images: ``(B, 3, H, W)`` in [0, 1].
        target: the originals, of the same shape and range.
    """
    mse = (images - target).pow(2).mean((1, 2, 3))
    return -10 * mse.clamp(min=1e-10).log10()


def psnr_32px(images: Tensor, target: Tensor) -> Tensor:
    """Return the PSNR ``(B,)`` in dB after averaging both inputs down to 32 x 32 pixels.

    This metric compares image tokenizers that work at different image sizes.

    Args:
        images: ``(B, 3, H, W)`` in [0, 1].
        target: the originals, of the same shape and range.
    """
    reduced, reduced_target = (
        F.interpolate(each, size=COMPARED_SIZE, mode="area") for each in (images, target)
    )
    return psnr(reduced, reduced_target)


def ssim(images: Tensor, target: Tensor) -> Tensor:
    """Return the structural similarity ``(B,)``, at most 1.

    Args:
        images: ``(B, 3, H, W)`` in [0, 1].
        target: the originals, of the same shape and range.
    """
    # Imported here, because this import takes five seconds.
    from torchmetrics.functional.image.ssim import structural_similarity_index_measure

    values = structural_similarity_index_measure(images, target, data_range=1.0, reduction="none")
    assert isinstance(values, torch.Tensor)
    return values
