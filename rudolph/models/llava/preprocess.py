"""Preprocessing of images of any size into the views that a LLaVA reads.

Without canvases an image becomes one square view by a method of ``ASPECTS``: ``pad`` centres it on
a square of CLIP's mean colour (LLaVA-1.5), ``squeeze`` changes its aspect ratio, ``crop`` keeps
its central square.  With canvases, an image becomes a squeezed whole view and the tiles of its
canvas, which is black around the image (LLaVA-NeXT).

Source: LLaVA, ``llava/mm_utils.py``.

Shapes: H and W pixels of an image, S pixels per side of a view, P images, C crops per image.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from rudolph.models.llava.anyres import Size, fitted_size, select_canvas
from rudolph.models.llava.llava import ImageTokenConfig
from rudolph.models.vision.clip import MEAN, STD


def prepare_images(
    images: Sequence[Tensor], config: ImageTokenConfig, *, aspect: str = "pad"
) -> tuple[Tensor, Tensor]:
    """Return ``pixel_values`` and ``image_sizes`` for ``LLaVA.embed``.

    Args:
        images: Images ``(3, H, W)`` in [0, 1].
        config: How images are represented in a text.
        aspect: A name in ``ASPECTS``, for one view per image.

    Raises:
        ValueError: If there are no images, the aspect is unknown or an image has another shape.
    """
    if aspect not in ASPECTS:
        raise ValueError(f"aspect: expected one of {', '.join(ASPECTS)}, got {aspect!r}")
    if not images:
        raise ValueError("images: expected at least one image, got none")
    for index, image in enumerate(images):
        if image.dim() != 3 or image.shape[0] != 3 or not image.numel():
            raise ValueError(
                f"images: expected (3, H, W) for image {index}, got {tuple(image.shape)}"
            )
    sizes = torch.tensor([image.shape[1:] for image in images])
    if not config.canvases:
        views = [ASPECTS[aspect](image, config.image_size) for image in images]
        return normalised(torch.stack(views)), sizes
    crops = [normalised(anyres_crops(image, config)) for image in images]
    most = max(map(len, crops))
    return torch.stack([F.pad(part, [0] * 7 + [most - len(part)]) for part in crops]), sizes


def anyres_crops(image: Tensor, config: ImageTokenConfig) -> Tensor:
    """Return the whole view, then the tiles in row-major order, as ``(C, 3, S, S)``."""
    side, (height, width) = config.image_size, image.shape[1:]
    canvas_size = select_canvas((height, width), config.canvases)
    rows, columns = fitted_size((height, width), canvas_size)
    canvas = image.new_zeros(3, *canvas_size)
    top, left = (canvas_size[0] - rows) // 2, (canvas_size[1] - columns) // 2
    canvas[:, top : top + rows, left : left + columns] = resized(image, (rows, columns))
    tiles = canvas.unfold(1, side, side).unfold(2, side, side)  # (3, rows, columns, S, S)
    return torch.cat([squeezed(image, side)[None], tiles.flatten(1, 2).transpose(0, 1)])


def resized(image: Tensor, size: Size) -> Tensor:
    """Resize ``(3, H, W)`` to (height, width) as Pillow's bicubic filter does."""
    if tuple(image.shape[1:]) == size:
        return image
    out = F.interpolate(image[None], size, mode="bicubic", antialias=True)
    return out[0].clamp(0, 1)


def padded(image: Tensor, side: int) -> Tensor:
    """Centre an image on a square of the mean colour and resize it to ``(3, S, S)``."""
    height, width = image.shape[1:]
    most = max(height, width)
    colour = torch.tensor(MEAN, dtype=image.dtype, device=image.device)
    square = colour[:, None, None].repeat(1, most, most)
    top, left = (most - height) // 2, (most - width) // 2
    square[:, top : top + height, left : left + width] = image
    return resized(square, (side, side))


def squeezed(image: Tensor, side: int) -> Tensor:
    """Resize an image to ``(3, S, S)`` without keeping its aspect ratio."""
    return resized(image, (side, side))


def cropped(image: Tensor, side: int) -> Tensor:
    """Resize the central square of an image to ``(3, S, S)``."""
    least = min(image.shape[1:])
    top, left = ((extent - least) // 2 for extent in image.shape[1:])
    return resized(image[:, top : top + least, left : left + least], (side, side))


def normalised(views: Tensor) -> Tensor:
    """Subtract CLIP's mean from ``(..., 3, S, S)`` and divide by its standard deviation."""
    mean, std = (
        torch.tensor(values, dtype=views.dtype, device=views.device)[:, None, None]
        for values in (MEAN, STD)
    )
    return (views - mean) / std


ASPECTS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "pad": padded,
    "squeeze": squeezed,
    "crop": cropped,
}
