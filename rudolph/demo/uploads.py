"""Images from the browser, decoded under the same limits as images in data files.

Shapes: H and W pixels.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rudolph.data.image_files import RejectedError, decode_image


@dataclass(frozen=True)
class Uploads:
    """Files that browsers have uploaded.

    Attributes:
        folder: The only folder from which files are read.
        max_bytes: Largest file.
    """

    folder: Path
    max_bytes: int

    def image(self, file: Any, name: str) -> Image.Image:
        """Decode an uploaded file as upright RGB.

        Args:
            file: Gradio's description of a file, or None.
            name: Name of the field, for messages.

        Raises:
            ValueError: If there is no file, or it is too large or no readable image.
        """
        try:
            return decode_image(self._content(file, name)).image
        except RejectedError as error:
            raise ValueError(f"{name}: expected an image, got a file with: {error}") from error

    def mask(self, file: Any, size: tuple[int, int]) -> Image.Image:
        """Return a mask that is white where a layer of the editor is painted.

        Args:
            file: Gradio's description of the layer's PNG, or None.
            size: Width and height of the mask, in pixels.

        Raises:
            ValueError: If nothing is painted or the file is no readable image.
        """
        # The brush is black, and the decoder shows transparent pixels as white.
        layer = self.image(file, "painted region").convert("L").resize(size)
        is_painted = np.asarray(layer) < 128
        if not is_painted.any():
            raise ValueError("painted region: expected one, got none. Paint over the image")
        return Image.fromarray(np.where(is_painted, 255, 0).astype(np.uint8)).convert("RGB")

    def _content(self, file: Any, name: str) -> bytes:
        if not isinstance(file, dict) or not isinstance(file.get("path"), str):
            raise ValueError(f"{name}: expected one, got none. Upload or draw it")
        path = Path(file["path"]).resolve()
        if not path.is_relative_to(self.folder.resolve()) or not path.is_file():
            raise ValueError(f"{name}: expected an uploaded file, got another one")
        if path.stat().st_size > self.max_bytes:
            raise ValueError(
                f"{name}: expected at most {self.max_bytes} bytes, got {path.stat().st_size}"
            )
        return path.read_bytes()
