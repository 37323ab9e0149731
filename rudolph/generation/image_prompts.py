"""Image prompts: borders, a region or a random part of an image that generation keeps.

The VQ-GAN encodes the given part, whose indices stay fixed; all other indices are sampled.  The
decoder samples row by row, so a token can attend only to given tokens that precede it in row-major
order.

Source: rudalle, ``image_prompts.py``.

Shapes: I image tokens, h and w sides of the token grid, H and W pixels.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from rudolph.generation.generate import TO_SAMPLE
from rudolph.models.vqgan.model import VQGAN

SIDES = ("up", "down", "left", "right")


def border_mask(borders: Mapping[str, int], side: int) -> Tensor:
    """Return which tokens of a ``(side, side)`` grid lie in given borders, as a bool mask.

    >>> print(border_mask({"up": 1, "left": 2}, 3).int())
    tensor([[1, 1, 1],
            [1, 1, 0],
            [1, 1, 0]], dtype=torch.int32)

    Args:
        borders: the width of each given border in rows or columns of tokens, keyed by side.
        side: the side of the grid.

    Raises:
        ValueError: if a side is unknown or a border is wider than the grid.
    """
    is_given = torch.zeros(side, side, dtype=torch.bool)
    for name, width in borders.items():
        if name not in SIDES:
            raise ValueError(f"borders: expected {', '.join(SIDES)}, got {name!r}")
        if not 0 <= width <= side:
            raise ValueError(f"border {name}: expected 0 to {side} tokens, got {width}")
        if name in ("up", "down"):
            is_given[slice(width) if name == "up" else slice(side - width, None)] = True
        else:
            is_given[:, slice(width) if name == "left" else slice(side - width, None)] = True
    return is_given


def parse_borders(text: str) -> dict[str, int]:
    """Parse borders in the command line's format: ``up=4,left=2``.

    Raises:
        ValueError: if the text has another format or names a side twice.
    """
    borders = {}
    for border in text.split(","):
        match = re.fullmatch(r"\s*(\w+)\s*=\s*(\d+)\s*", border)
        if match is None:
            raise ValueError(f"borders: expected widths in tokens like up=4,left=2, got {text!r}")
        if match[1] in borders:
            raise ValueError(f"borders: expected each side once, got {text!r}")
        borders[match[1]] = int(match[2])
    return borders


def token_mask(mask: Tensor, side: int) -> Tensor:
    """Convert a pixel mask ``(H, W)`` to a token mask ``(side, side)``.

    Both masks are true where the image is given.  A token is given if all of its pixels are given.

    Raises:
        ValueError: if H or W is not a multiple of ``side``.
    """
    height, width = mask.shape
    if height % side or width % side:
        raise ValueError(
            f"mask: expected sides in multiples of {side} pixels, got {height} x {width}"
        )
    cells = mask.view(side, height // side, side, width // side)
    return cells.all(3).all(1)


def known_indices(
    vqgan: VQGAN, image: Tensor, is_given: Tensor, *, crop_first: bool = False
) -> Tensor:
    """Encode the given part of an image as indices ``(I,)``, with ``TO_SAMPLE`` everywhere else.

    Args:
        vqgan: the VQ-GAN.
        image: ``(3, H, W)`` in [0, 1].
        is_given: ``(h, w)`` bool, true for tokens that are given.
        crop_first: whether to paint the pixels outside the given part grey before encoding, so
            that they cannot affect the indices.  The reference instead encodes each border as an
            image of its own.

    Raises:
        ValueError: if the size of the image does not match the grid.
    """
    factor = vqgan.config.factor
    expected = (3, *(side * factor for side in is_given.shape))
    if image.shape != expected:
        raise ValueError(f"image: expected shape {expected}, got {tuple(image.shape)}")
    if crop_first:
        pixels = is_given.repeat_interleave(factor, 0).repeat_interleave(factor, 1)
        image = torch.where(pixels.to(image.device), image, 0.5)
    indices = vqgan.encode_indices(image[None].to(vqgan.quant_conv.weight))[0]
    return torch.where(is_given.flatten().to(indices.device), indices, TO_SAMPLE)


def variation_mask(fraction: float, side: int, generator: torch.Generator) -> Tensor:
    """Return the tokens of a ``(side, side)`` grid that are kept for a variation, as a bool mask.

    Args:
        fraction: the fraction of tokens to sample again, in (0, 1].
        side: the side of the grid.
        generator: the source of randomness.

    Raises:
        ValueError: if ``fraction`` is not in (0, 1].
    """
    require_fraction(fraction)
    return torch.rand(side, side, generator=generator) >= fraction


def require_fraction(fraction: float) -> None:
    """Raise ``ValueError`` unless the fraction to sample again is in (0, 1]."""
    if not 0 < fraction <= 1:
        raise ValueError(
            f"fraction to sample again: expected above 0 and at most 1, got {fraction}"
        )
