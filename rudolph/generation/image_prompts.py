"""An image that is partly given: borders, any region, or a share of it to be kept.

What is given is read by the VQ-GAN and stands in the sequence as it is; the rest is drawn.  The
decoder draws row by row, so it sees what is given above and left of a token, and what is below
only when it gets there.

Source: rudalle, ``image_prompts.py``.

Shapes: h and w are sides of the grid of tokens, H and W pixels.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from rudolph.generation.generate import FREE
from rudolph.models.vqgan.model import VQGAN

SIDES = ("up", "down", "left", "right")


def border_mask(borders: Mapping[str, int], side: int) -> Tensor:
    """Which tokens of a ``(side, side)`` grid are given: so many rows or columns of each border.

    >>> print(border_mask({"up": 1, "left": 2}, 3).int())
    tensor([[1, 1, 1],
            [1, 1, 0],
            [1, 1, 0]], dtype=torch.int32)

    Raises:
        ValueError: for an unknown side, or a border that is no part of the image.
    """
    is_given = torch.zeros(side, side, dtype=torch.bool)
    for name, width in borders.items():
        if name not in SIDES:
            raise ValueError(f"borders must be of {', '.join(SIDES)}, got {name!r}")
        if not 0 <= width <= side:
            raise ValueError(f"border {name} must be 0 to {side} tokens, got {width}")
        if name in ("up", "down"):
            is_given[slice(width) if name == "up" else slice(side - width, None)] = True
        else:
            is_given[:, slice(width) if name == "left" else slice(side - width, None)] = True
    return is_given


def parse_borders(text: str) -> dict[str, int]:
    """Borders as the command line writes them: ``up=4,left=2``.

    Raises:
        ValueError: for anything else.
    """
    borders = {}
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\w+)\s*=\s*(\d+)\s*", part)
        if found is None:
            raise ValueError(f"borders must be like up=4,left=2 in tokens, got {text!r}")
        if found[1] in borders:
            raise ValueError(f"borders must name each side once, got {text!r}")
        borders[found[1]] = int(found[2])
    return borders


def token_mask(mask: Tensor, side: int) -> Tensor:
    """Which tokens of a grid are given, from a mask ``(H, W)`` that is true where pixels are.

    A token is given when all of its pixels are.
    """
    height, width = mask.shape
    if height % side or width % side:
        raise ValueError(f"the mask must be a multiple of {side} a side, got {height} x {width}")
    cells = mask.view(side, height // side, side, width // side)
    return cells.all(3).all(1)


def known_indices(
    vqgan: VQGAN, image: Tensor, is_given: Tensor, *, crop_first: bool = False
) -> Tensor:
    """Indices ``(I,)`` of an image ``(3, H, W)`` in [0, 1] where given (h, w), else ``FREE``.

    Args:
        crop_first: nothing but what is given may tell its indices: what is free is grey while
            the image is read.  The reference reads each border as an image of its own instead.

    Raises:
        ValueError: when the image is not of the grid's size.
    """
    factor = vqgan.config.factor
    expected = (3, *(side * factor for side in is_given.shape))
    if image.shape != expected:
        raise ValueError(f"the image must be {expected}, got {tuple(image.shape)}")
    if crop_first:
        pixels = is_given.repeat_interleave(factor, 0).repeat_interleave(factor, 1)
        image = torch.where(pixels.to(image.device), image, 0.5)
    indices = vqgan.encode_indices(image[None].to(vqgan.quant_conv.weight))[0]
    return torch.where(is_given.flatten().to(indices.device), indices, FREE)


def variation_mask(share: float, side: int, generator: torch.Generator) -> Tensor:
    """Tokens of a ``(side, side)`` grid that stay when a share of them is drawn anew at random."""
    require_fraction(share)
    return torch.rand(side, side, generator=generator) >= share


def require_fraction(share: float) -> None:
    """Raise ``ValueError`` unless a fraction of an image can be sampled again."""
    if not 0 < share <= 1:
        raise ValueError(f"the share to draw anew must be in (0, 1], got {share}")
