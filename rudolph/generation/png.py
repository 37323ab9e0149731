"""PNG files with metadata that records their provenance.

Shapes: H and W pixels.
"""

from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from rudolph.files.atomic import json_text, write_atomic

PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"


def to_image(image: Tensor) -> Image.Image:
    """Convert an image ``(3, H, W)`` in [0, 1] to an 8-bit RGB image, rounded."""
    pixels = image.float().clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(np.ascontiguousarray(pixels))


def save_png(image: Image.Image, path: Path, metadata: Mapping[str, Any]) -> None:
    """Write a PNG with one text field per item of ``metadata``; non-text values become JSON.

    Raises:
        OSError: if the file cannot be written.
    """
    info = PngInfo()
    for key, value in metadata.items():
        text = value if isinstance(value, str) else json_text(value)
        info.add_itxt(key, text)
    write_atomic(path, partial(image.save, format="PNG", pnginfo=info))


def is_whole_png(path: Path) -> bool:
    """Return whether a file begins and ends like a PNG."""
    if not path.is_file():
        return False
    content = path.read_bytes()
    return content.startswith(PNG_START) and content.endswith(PNG_END)


def has_text_fields(path: Path, keys: Collection[str]) -> bool:
    """Return whether a file is a readable PNG with text fields of these names."""
    try:
        return set(keys) <= read_text_fields(path).keys()
    # Pillow raises these for a file that is not an image, a broken image or an oversized one.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False


def read_text_fields(path: Path) -> dict[str, str]:
    """Return the text fields of a PNG that ``save_png`` wrote."""
    with Image.open(path) as image:
        fields = ((str(key), value) for key, value in image.info.items())
        return {key: str(value) for key, value in fields if isinstance(value, str)}
